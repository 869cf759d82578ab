"""What several test files need: a seed that is printed, random models, and transformers' twin."""

import secrets

import numpy as np
import pytest

import utils


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def random_params(rng, hparams):
    """Float32 parameters that make logits of a few units, and attention that has preferences."""
    arrays = {}
    for name, shape in utils.tensor_shapes(hparams):
        kind = name.split(".")[-1]
        embedding = 2 * hparams["n_embd"] ** -0.5
        scales = {"wte": embedding, "wpe": embedding, "w": shape[0] ** -0.5, "g": 0.3, "b": 0.3}
        arrays[name] = rng.standard_normal(shape, dtype=np.float32) * scales[kind]
        arrays[name] += kind == "g"  # gains around 1
    return utils.nest(arrays)


def hugging_face(params, hparams):
    """transformers' GPT-2 with a copy of these parameters; skips the test without transformers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {theirs: hparams[ours] for ours, theirs in utils.HUGGING_FACE_SIZES.items()}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()  # eval: no dropout
    names = [name for name, _ in utils.tensor_shapes(hparams)]
    state = {
        "transformer." + utils.hugging_face_name(name): torch.tensor(utils.leaf(params, name))
        for name in names
    }
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model
