"""What several test files need: real files, a printed seed, random models, transformers' twin."""

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import utils
from encoder import Encoder
from model_files import config, weights

with contextlib.suppress(ImportError):
    import jax

    jax.config.update("jax_num_cpu_devices", 8)  # for test_devices.py, before JAX starts

REPO = Path(__file__).resolve().parent.parent
# GPT-2's own tokenizer files and tiny Shakespeare are not part of the project. Tests that want them
# look here, then where the project's own downloads land, and skip where there are none.
DATA = Path(os.environ.get("SIXTYGPT_DATA", REPO.parent / "shared" / "data"))


def first_there(*paths):
    return next((path for path in paths if path.exists()), paths[0])


GPT2_FILES = first_there(DATA / "gpt2-tokenizer", REPO / "models" / "124M")
SHAKESPEARE = first_there(DATA / "shakespeare" / "input.txt", REPO / "data" / "shakespeare.txt")


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux, by /proc or prlimit")


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def run(script, *args, models_dir=None, timeout=300, **options):
    """A script as a person runs it: (its exit code, what it printed, what it complained)."""
    where = [] if models_dir is None else ["--models_dir", str(models_dir)]
    words = [word if isinstance(word, bytes) else str(word) for word in args]
    command = [sys.executable, str(REPO / script), *words, *where]
    done = subprocess.run(command, capture_output=True, timeout=timeout, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def random_params(rng, hparams):
    """Float32 parameters that make logits of a few units, and attention that has preferences."""
    arrays = {}
    for name, shape in weights.tensor_shapes(hparams):
        kind = name.split(".")[-1]
        embedding = 2 * hparams["n_embd"] ** -0.5
        scales = {"wte": embedding, "wpe": embedding, "w": shape[0] ** -0.5, "g": 0.3, "b": 0.3}
        arrays[name] = rng.standard_normal(shape, dtype=np.float32) * scales[kind]
        arrays[name] += kind == "g"  # gains around 1
    return weights.nest(arrays)


def tree_map(f, node):
    if isinstance(node, dict):
        return {key: tree_map(f, child) for key, child in node.items()}
    if isinstance(node, list):
        return [tree_map(f, child) for child in node]
    return f(node)


def hugging_face(params, hparams):
    """transformers' GPT-2 with a copy of these parameters; skips the test without transformers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {theirs: hparams[ours] for ours, theirs in config.HUGGING_FACE_SIZES.items()}
    sizes["n_inner"] = hparams.get("n_inner")
    settings = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(settings).eval()  # eval: no dropout
    names = [name for name, _ in weights.tensor_shapes(hparams)]
    state = {
        "transformer." + weights.hugging_face_name(name): torch.tensor(weights.leaf(params, name))
        for name in names
    }
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model


def exclaiming(hparams):
    """Parameters whose equal logits always give id 0, which is "!" where ids are bytes."""
    return weights.nest({n: np.ones(s, np.float32) for n, s in weights.tensor_shapes(hparams)})


TINY = {"n_vocab": 257, "n_ctx": 48, "n_embd": 16, "n_head": 2, "n_layer": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder with one random byte-level model, "tiny", and that model's parameters."""
    seed = secrets.randbits(32)
    print("seed", seed)
    folder = tmp_path_factory.mktemp("models")
    params = random_params(np.random.default_rng(seed), TINY)
    utils.save_model(folder / "tiny", Encoder([]), TINY, params)
    return folder, params
