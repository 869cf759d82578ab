"""What a training run in NumPy needs beside the mathematics, for backprop.py's trainer."""

import contextlib
import math
import time

import numpy as np

from corpus.shards import count_ids, read_stretches
from engine import processes
from engine.threads import in_threads, own_threads
from gpt2 import gpt2
from model_files.weights import leaves, nest
from training.init import init_tree


@contextlib.contextmanager
def start_sharing(share_of_mean, params, moments, flags):  # moments: None for zeros
    """Gives (params, moments) by name, the same memory as train_step takes it, and its share.

    The parameters are copies. Small models stand in memory that processes can share, and joined for
    train_step: AdamW needs less time for a few large arrays than for many small ones.
    """
    n_head, n_bytes = flags["n_head"], sum(x.nbytes for x in leaves(params).values())
    n, small = processes.count(flags["batch_size"], n_bytes), n_bytes <= processes.LARGEST
    moments = moments or {name: np.zeros(*of) for name, of in moment_shapes(params).items()}
    whole = state = {name: np.array(x) for name, x in leaves(params).items()}, moments
    if small:
        whole = [{kind: processes.shared(x) for kind, x in join(some).items()} for some in state]
        state = [*map(split, whole, state)]
    params, moments = nest(state[0]), state[1]

    def work(tokens, out=None, **options):
        number, gradients = share_of_mean(tokens, params, n_head, **options)
        if small:
            gradients = join({name: gradients[name] for name in state[0]}, out)
        return number, gradients

    with processes.sharing(work, n, whole[0]) as share:
        yield (params, moments), whole, share


def join(arrays, out=None):  # {name: array} -> {"matrices": [n, 1], "vectors": [n]}
    """Each kind's arrays end to end, in `out` or in new arrays. Of moments: {"m.matrices": ...}."""
    kinds, out = {}, out or {}
    for name, x in arrays.items():
        kinds.setdefault(kind_of(name, x), []).append(x.reshape(-1, *[1] * (x.ndim - 1)))
    return {kind: np.concat(some, out=out.get(kind)) for kind, some in kinds.items()}


def split(whole, arrays):  # the reverse: -> {name: view}, for arrays of these names and shapes
    rest, views = dict(whole), {}
    for name, x in arrays.items():
        kind = kind_of(name, x)
        views[name], rest[kind] = rest[kind][: x.size].reshape(x.shape), rest[kind][x.size :]
    return views


def kind_of(name, x):  # ("m.wte", its array) -> "m.matrices"
    moment = name[:2] if name.startswith(("m.", "v.")) else ""
    return moment + ("vectors" if x.ndim == 1 else "matrices")


def nats(params, tokens, n_head, cross_entropy):  # [n, n_seq + 1] -> the sum over all tokens
    def work(mine):
        logits = gpt2(tokens[mine, :-1], **params, n_head=n_head)
        logits = logits.reshape(-1, logits.shape[-1])
        return cross_entropy(logits, tokens[mine, 1:].ravel())[0].sum(dtype=np.float64)

    with own_threads(len(tokens)):
        return float(sum(in_threads(work, len(tokens))))


def new_model(flags, n_vocab):  # -> hparams, parameters
    """GPT-2's initialisation, with NumPy's random numbers."""
    rng = np.random.default_rng(flags["seed"])
    hparams = {"n_vocab": n_vocab} | {n: flags[n] for n in ("n_ctx", "n_embd", "n_head", "n_layer")}
    return hparams, init_tree(hparams, lambda shape: rng.standard_normal(shape, np.float32))


def moment_shapes(params):  # -> {"m.wte": (shape, dtype), ..., "v.wte": ...}, AdamW's moments
    arrays = leaves(params).items()
    return {f"{kind}.{name}": (x.shape, np.dtype("<f4")) for kind in "mv" for name, x in arrays}


def draw(shards, seed, step, shape):  # -> [*shape], ids
    """Stretches from random places. The places depend on the seed and the step alone."""
    *many, n = shape
    places = count_ids(shards) - n + 1
    starts = np.random.default_rng([seed, step]).integers(0, places, math.prod(many))
    return read_stretches(shards, starts, n).reshape(shape)


def measure_peak():  # -> the FLOP/s of one large product
    n, seconds = 2048, []
    x = np.ones((n, n), np.float32)
    for _ in range(5):
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)
