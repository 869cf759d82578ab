"""Estimates of a run's memory, before it starts, and of its time, after the first steps."""

import math

from model_files.download import SIZES
from model_files.weights import tensor_shapes
from plumbing.memory import free_bytes
from training.recipes import RECIPES


def released_hparams(name):  # "124M" -> its sizes; another name -> None
    if name not in SIZES:
        return None
    recipe = RECIPES[f"gpt2-{name}"]
    sizes = {key: recipe[key] for key in ("n_ctx", "n_embd", "n_head", "n_layer")}
    return {"n_vocab": 50257} | sizes


def least_bytes(hparams, flags):
    """Returns the memory that training needs without the activations, in bytes.

    For each parameter that is four bytes for itself, its gradient, each of the optimizer's moments
    (Muon has one, AdamW two) and, with --ema, the average. With adapters, only the frozen model
    counts.
    """
    n_params = sum(math.prod(shape) for _, shape in tensor_shapes(hparams))
    if "lora_rank" in flags:
        return 4 * n_params
    n_moments = {"muon": 1, "adamw": 2}[flags["optimizer"]]
    return 4 * n_params * (2 + n_moments + bool(flags["ema"]))


def check_memory(hparams, flags, platform):
    """Raises ValueError if a model can't be trained in this machine's memory.

    Other platforms have their own memory, and report themselves when it is full.
    """
    free = free_bytes()
    needed = least_bytes(hparams, flags)
    if platform != "cpu" or free is None or needed <= free:
        return
    remedy = "train a smaller model"
    with_adapters = least_bytes(hparams, flags | {"lora_rank": 8})
    if "init_from" in flags and with_adapters <= free:
        remedy = f"--lora_rank 8 takes about {with_adapters / 1e9:.1f} GB"
    raise ValueError(
        f"training takes at least {needed / 1e9:.1f} GB of memory, for the parameters, gradients "
        f"and moments, but only {free / 1e9:.1f} GB are free; {remedy}"
    )


def in_words(seconds):
    """
    >>> [in_words(n) for n in (0.4, 59, 61, 3599, 3600, 90000)]
    ['1 s', '59 s', '1 min 1 s', '59 min 59 s', '1 h 0 min', '25 h 0 min']
    """
    seconds = max(1, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
