"""LoRA: each matrix stays frozen and learns a small update, the product of two thin factors.

How much memory training takes decides who can train: gradients and AdamW's two moments are as large
as what is trained. Here that is lora_A, [r, n_in], and lora_B, [n_out, r], with r of 8 or so, while
the model itself stays as it is (Hu et al. 2021, arXiv:2106.09685).

`adapt` puts an `Adapted` in the place of a matrix. gpt2.py's `x @ w` is then x @ w plus the product
of x with both factors, one after the other, so that the model's functions stay as they are and no
gradient of w is ever computed. No JAX here.
"""

import dataclasses
import hashlib
import os

import numpy as np

from model_files.adapters import LAYERS
from model_files.weights import leaves, nest


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """Stands where a matrix [n_in, n_out] stood: x @ it is x @ (w + scale * (lora_B @ lora_A).T).

    training/state.py makes it a part of JAX's trees.
    """

    w: object  # [n_in, n_out]
    lora_A: object  # [r, n_in]
    lora_B: object  # [n_out, r]
    scale: float

    __array_ufunc__ = None  # NumPy's arrays then leave `x @ adapted` to __rmatmul__

    @property
    def dtype(self):
        return self.w.dtype

    def __rmatmul__(self, x):  # [..., n_in] -> [..., n_out]
        return x @ self.w + (x @ self.lora_A.T) @ (self.scale * self.lora_B.T)


def new_adapters(params, flags):  # -> {"blocks.0.attn.c_attn.w": (lora_A, lora_B, scale), ...}
    """For the layers that lora_targets names; c_proj means both in a block. The update starts at 0.

    lora_B is 0. lora_A is uniform within +-1 / sqrt(n_in), as in peft (Kaiming with a = sqrt(5)).
    """
    rng, adapters = np.random.default_rng(flags["seed"]), {}
    rank, targets = flags["lora_rank"], flags["lora_targets"].split(",")
    for i in range(len(params["blocks"])):
        for layer in LAYERS:
            if layer in targets or layer.split(".")[1] in targets:
                part, name = layer.split(".")
                n_in, n_out = params["blocks"][i][part][name]["w"].shape
                lora_A = (2 * rng.random((rank, n_in), np.float32) - 1) / np.float32(n_in**0.5)
                lora_B = np.zeros((n_out, rank), np.float32)
                adapters[f"blocks.{i}.{layer}.w"] = lora_A, lora_B, flags["lora_alpha"] / rank
    return adapters


def adapt(params, adapters):  # -> a tree like params, with an Adapted for each adapted matrix
    arrays = leaves(params)
    return nest(arrays | {name: Adapted(arrays[name], *rest) for name, rest in adapters.items()})


def find_adapters(params):  # the reverse of adapt
    found = {name: x for name, x in leaves(params).items() if isinstance(x, Adapted)}
    return {name: (x.lora_A, x.lora_B, x.scale) for name, x in found.items()}


def count_params(params):  # -> how many numbers are trained, and how many are frozen
    """With adapters, only their factors are trained. Otherwise everything is."""
    arrays = leaves(params).values()
    adapted = [x for x in arrays if isinstance(x, Adapted)]
    n_factors = sum(x.lora_A.size + x.lora_B.size for x in adapted)
    n_params = sum(x.w.size if isinstance(x, Adapted) else x.size for x in arrays)
    return (n_factors, n_params) if adapted else (n_params, 0)


def base_name(init_from, models_dir):
    """The base's name in an adapter's files, by which it is found again: a name, or a full path.

    A folder in `models` is found by its name alone. One in another models_dir, or one given by a
    relative path, needs its full path.
    """
    folders = (os.path.join(models_dir, init_from), init_from)
    folder = next(filter(os.path.isdir, folders), None)
    is_named = models_dir == "models" and folder == folders[0]
    return os.path.abspath(folder) if folder and not is_named else init_from


def base_fingerprint(params):  # -> SHA-256, hexadecimal, of all frozen arrays
    found = hashlib.sha256()
    for x in leaves(params).values():
        found.update(np.ascontiguousarray(x.w if isinstance(x, Adapted) else x))
    return found.hexdigest()
