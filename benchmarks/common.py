"""What the benchmarks share: a model of GPT-2 124M's shape, and clocks fair to both sides."""

import contextlib
import itertools
import platform
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import encoder  # noqa: E402
import utils  # noqa: E402
from model_files import config, weights  # noqa: E402

HPARAMS = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}


def random_params(hparams=HPARAMS):
    """Random weights: what they say is nonsense, how long they take to say it is not."""
    rng = np.random.default_rng(0)
    shapes = weights.tensor_shapes(hparams)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes}
    return weights.nest({name: array * np.float32(0.02) for name, array in arrays.items()})


@contextlib.contextmanager
def model_folder(hparams=HPARAMS):
    """A temporary folder in Hugging Face's layout, with a made-up tokenizer: what a user loads."""
    characters = list(encoder.CHAR_OF_BYTE.values())
    pairs = itertools.product(characters, characters)
    tokenizer = encoder.Encoder(list(itertools.islice(pairs, hparams["n_vocab"] - 257)))
    with tempfile.TemporaryDirectory() as folder:
        utils.save_model(folder, tokenizer, hparams, random_params(hparams))
        yield folder


def hugging_face(params, hparams=HPARAMS):
    """transformers' GPT-2 with the same weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {theirs: hparams[ours] for ours, theirs in config.HUGGING_FACE_SIZES.items()}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    state = {
        "transformer." + weights.hugging_face_name(name): torch.tensor(weights.leaf(params, name))
        for name, _ in weights.tensor_shapes(hparams)
    }
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model


def alternate(rounds, **functions):
    """{name: median seconds}. The functions take turns, so that a noisy moment hits them alike.

    A pause before each: a library's idle threads spin for up to 0.1 s, at the next one's expense.
    """
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(0.2)
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


N_PROMPT, SHORT, LONG, ROUNDS = 16, 8, 40, 5


def step_seconds(engines, ids):  # {name: function of (ids, n_tokens)} -> {name: seconds}
    """A step writes one token for each row of ids: the time of LONG tokens less that of SHORT."""
    runs = {
        f"{name}/{n}": partial(write, ids, n)
        for name, write in engines.items()
        for n in (SHORT, LONG)
    }
    seconds = alternate(ROUNDS, **runs)
    return {
        name: (seconds[f"{name}/{LONG}"] - seconds[f"{name}/{SHORT}"]) / (LONG - SHORT)
        for name in engines
    }


def machine():
    """One line that names the processor and the versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        cpu = f"{len(names)} x {names[0]}" if names else platform.machine()
    return f"{cpu}, Python {platform.python_version()}, NumPy {np.__version__}"


def print_table(title, seconds, baseline):
    """Milliseconds, and how many times faster than it the baseline's row (ours) is."""
    print(f"\n{title}\n{'':34}{'ms':>9}{'ours is':>10}")
    for name, value in seconds.items():
        ratio = "" if name == baseline else f"{value / seconds[baseline]:9.2f}x"
        print(f"{name.replace('_', ' '):34}{value * 1e3:9.1f}{ratio:>10}")
