"""A run's State on JAX's devices: how it begins, and its parts' names."""

import jax
import jax.numpy as jnp
import numpy as np

from training.adapters import Adapted
from training.checkpoints import State
from training.devices import make_sharding, put, spread
from training.init import init_tree

FACTORS = ("lora_A", "lora_B")  # if there are adapters, only these are trained
jax.tree_util.register_dataclass(Adapted, ("w", *FACTORS), ("scale",))


def init_params(key, n_vocab, n_ctx, n_embd, n_layer, n_head=None):
    """GPT-2's initialisation, with JAX's random numbers. The number of heads doesn't matter."""
    keys = iter(jax.random.split(key, 2 + 4 * n_layer))
    hparams = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_layer": n_layer}
    tree = init_tree(hparams, lambda shape: jax.random.normal(next(keys), shape))
    return jax.tree.map(jnp.asarray, tree)


def start_state(params, moments, n_done, optimizer, n_rows, mesh, fsdp):
    """-> State on the devices, and its shardings, which are a State too.

    params: a tree of NumPy's or JAX's arrays; moments: a checkpoint's {name: array}, or None.
    """
    params = resize_vocab(jax.tree.map(np.asarray, params), n_rows)
    shapes = jax.eval_shape(optimizer.init, partition(params)[0])
    shardings = State(spread(params, mesh, fsdp), spread(shapes, mesh, fsdp), make_sharding(mesh))
    params = put(params, shardings.params)
    if moments is None:
        moments = jax.jit(optimizer.init, out_shardings=shardings.moments)(partition(params)[0])
    else:
        moments = jax.tree.unflatten(jax.tree.structure(shapes), moments.values())
        moments = put(resize_vocab(moments, n_rows), shardings.moments)
    return State(params, moments, put(np.int32(n_done), shardings.n_done)), shardings


def partition(params):
    """-> what is trained, and what is frozen: trees like params, with None for the other's arrays.

    In a model with adapters only their factors are trained, in any other model everything.
    """
    marks = jax.tree.map_with_path(lambda path, _: str(path[-1])[1:] in FACTORS, params)
    if not any(jax.tree.leaves(marks)):
        marks = jax.tree.map(lambda _: True, marks)
    trained = jax.tree.map(lambda x, mark: x if mark else None, params, marks)
    return trained, jax.tree.map(lambda x, mark: None if mark else x, params, marks)


def combine(trained, frozen):  # the reverse of partition
    def choose(a, b):
        return b if a is None else a

    return jax.tree.map(choose, trained, frozen, is_leaf=lambda x: x is None)


def resize_vocab(tree, n_rows):  # NumPy's wte, [n_vocab, n_embd], -> [n_rows, n_embd]
    """Pads every wte in a tree of parameters or moments with rows of zeros, or cuts them off."""

    def resize(path, x):
        if "['wte']" not in jax.tree_util.keystr(path) or x.ndim != 2:
            return x
        return np.pad(x[:n_rows], ((0, max(0, n_rows - len(x))), (0, 0)))

    return jax.tree.map_with_path(resize, tree)


def count_rows(n_vocab):  # -> the rows of wte while it trains
    """GPUs and TPUs prefer a multiple of 128: 50304 instead of 50257."""
    return n_vocab if jax.default_backend() == "cpu" else -(-n_vocab // 128) * 128


def name_leaves(tree):  # -> {where it is in the tree: array}
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def moment_shapes(optimizer, params):  # -> {name: (shape, dtype)}, in the tree's order
    moments = name_leaves(jax.eval_shape(optimizer.init, partition(params)[0]))
    return {name: (x.shape, x.dtype) for name, x in moments.items()}
