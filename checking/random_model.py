"""Small random models of any shape, in which every parameter affects the result."""

import numpy as np

from model_files.weights import nest, tensor_shapes

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "n_vocab": 50, "n_ctx": 16, "n_batch": 2,
         "n_seq": 11}  # fmt: skip


def read_sizes(spec):  # "n_layer=2,n_head=3" -> {"n_layer": 2, "n_head": 3, ...}
    """Raises ValueError for unknown names, and for sizes that make no model."""
    sizes, given = dict(SIZES), {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, value = part.partition("=")
        if name not in SIZES or not value.isdecimal() or not 0 < int(value) <= 2**20:
            raise ValueError(
                f"--random {part}: expected NAME=NUMBER, where NAME is one of {', '.join(SIZES)}"
            )
        given[name] = int(value)
    sizes |= given
    if "n_embd" not in given:
        sizes["n_embd"] = 8 * sizes["n_head"]
    if "n_seq" not in given:
        sizes["n_seq"] = min(sizes["n_seq"], sizes["n_ctx"])
    if sizes["n_embd"] % sizes["n_head"]:
        raise ValueError(f"--random: n_embd {sizes['n_embd']} is not a multiple of n_head")
    if sizes["n_seq"] > sizes["n_ctx"]:
        raise ValueError(f"--random: n_seq {sizes['n_seq']} is more than n_ctx {sizes['n_ctx']}")
    return sizes


def random_params(rng, hparams):
    """Returns float32 parameters. No bias is near 0 and no gain near 1, so a missing one shows."""
    arrays = {}
    for name, shape in tensor_shapes(hparams):
        ending = name.rpartition(".")[2]
        scale = {"w": shape[0] ** -0.5, "g": 0.3, "b": 0.3}.get(ending, 0.5)
        arrays[name] = rng.standard_normal(shape, np.float32) * np.float32(scale)
        if ending == "g":
            arrays[name] += 1
    return nest(arrays)


def random_case(spec, seed):  # -> params, n_head, tokens [n_batch, n_seq + 1], words about them
    sizes = read_sizes(spec)
    rng = np.random.default_rng(seed)
    params = random_params(rng, sizes)
    shape = sizes["n_batch"], sizes["n_seq"] + 1
    tokens = rng.integers(0, sizes["n_vocab"], shape)
    about = "random, " + ",".join(f"{name}={n}" for name, n in sizes.items()) + f", seed {seed}"
    return params, sizes["n_head"], tokens, about
