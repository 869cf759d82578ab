"""A training step in NumPy on all cores: how gradients and updates are divided among them.

    with share(evaluate, params, moments, n_rows) as shared:
        loss, gradients = shared.evaluate(tokens)     # the sums over the whole batch
        for_each(update, cut(shared.params, gradients, ...))

Nothing here knows the model or the optimizer, because both are passed as functions. Arrays are
always {name: array}. There are two ways:

*  Large models: threads share a batch's sequences, and each array is kept separately.
*  Small models, on Linux: processes share the sequences (see processes.py). All matrices are joined
   into one array, and all vectors into another, because an update is faster for two large arrays
   than for many small ones.
"""

import contextlib
from typing import NamedTuple

import numpy as np

from engine import memory, processes
from engine.threads import in_threads, own_threads

PIECE = 2**17  # numbers; so many stay in the processor's cache during an update
SMALL = 2**13  # numbers; for smaller arrays waking a thread doesn't pay


class Shared(NamedTuple):
    """What `share` yields. All of it is the same memory, so an update of `params` shows everywhere.

    by_name: the parameters and moments under their own names, for checkpoints and validation.
    params, moments: the same numbers for an update, perhaps joined.
    evaluate: (tokens) -> loss, gradients with the names of params, valid until the next call.
    """

    by_name: tuple
    params: dict
    moments: dict
    evaluate: object


def over_sequences(evaluate, n):  # -> [evaluate(slice), ...]
    """Cuts 0 .. n into one slice per thread. OpenBLAS uses one thread in each.

    For a single sequence, OpenBLAS uses its own threads.
    """
    memory.keep()
    with own_threads(n):
        return in_threads(evaluate, n)


@contextlib.contextmanager
def share(evaluate, params, moments, n_rows):
    """Yields a Shared for batches of n_rows sequences.

    evaluate(params, tokens, **options) -> a number, and gradients like params. params and moments
    are first copied into memory that processes can share, and the copies are trained.
    """
    n_bytes = sum(x.nbytes for x in params.values())
    if n_bytes > processes.LARGEST:
        own = {name: np.array(x) for name, x in params.items()}
        del params  # otherwise they would stay in memory as long as the copies

        def evaluate_in_threads(tokens, **options):
            return evaluate(own, tokens, **options)

        yield Shared((own, moments), own, moments, evaluate_in_threads)
        return
    joined = {kind: processes.shared(x) for kind, x in join(params).items()}
    joined_moments = {kind: processes.shared(x) for kind, x in join(moments).items()}
    own = split(joined, params)
    own_moments = split(joined_moments, moments)
    del params, moments  # otherwise they would stay in memory as long as the copies

    def work(tokens, room=None, **options):
        loss, gradients = evaluate(own, tokens, **options)
        in_order = {name: gradients[name] for name in own}
        return loss, join(in_order, room)

    n = processes.count(n_rows, n_bytes)
    with processes.sharing(work, n, joined) as ask_all:

        def evaluate_in_processes(tokens, **options):
            return add_up(ask_all(tokens, **options))

        yield Shared((own, own_moments), joined, joined_moments, evaluate_in_processes)


def add_up(parts):  # (number, {name: array}), ... -> their sums
    """Adds the parts in order, into the arrays of the first one."""
    parts = iter(parts)
    total, sums = next(parts)
    for number, arrays in parts:
        total += number
        for name, x in arrays.items():
            sums[name] += x
    return float(total), sums


# --- Joined arrays --------------------------------------------------------------------------------


def join(arrays, room=None):  # {name: array} -> {"matrices": [n, 1], "vectors": [n]}
    """Each kind's arrays end to end, in `room` or in new arrays. Moments: {"m.matrices": ...}."""
    kinds = {}
    for name, x in arrays.items():
        as_column = x.reshape(-1, *[1] * (x.ndim - 1))
        kinds.setdefault(kind_of(name, x), []).append(as_column)
    room = room or {}
    return {kind: np.concat(parts, out=room.get(kind)) for kind, parts in kinds.items()}


def split(joined, arrays):  # the reverse: -> {name: view}, for arrays of these names and shapes
    rest, views = dict(joined), {}
    for name, x in arrays.items():
        kind = kind_of(name, x)
        views[name] = rest[kind][: x.size].reshape(x.shape)
        rest[kind] = rest[kind][x.size :]
    return views


def kind_of(name, x):  # ("m.wte", its array) -> "m.matrices"
    moment = name[:2] if name[1] == "." else ""  # a parameter's name begins with a longer word
    return moment + ("vectors" if x.ndim == 1 else "matrices")


# --- Pieces of arrays -----------------------------------------------------------------------------


class Pieces(NamedTuple):
    """Parts of arrays: each is a tuple of a name and views of the same part of several arrays."""

    small: list
    large: list


def cut(*trees):  # of the same names -> Pieces of (name, a part of each tree's array)
    """Pieces of at most PIECE numbers, the small arrays' first. A piece is a view.

    An array whose rows do not lie one after the other cannot be viewed as one row of numbers. It
    is one piece, as it is.
    """
    small, large = [], []
    for name in trees[0]:
        arrays = [tree[name] for tree in trees]
        if not all(x.flags.c_contiguous for x in arrays):
            large.append((name, *arrays))
            continue
        flat = [x.reshape(-1) for x in arrays]
        for start in range(0, flat[0].size, PIECE):
            piece = [x[start : start + PIECE] for x in flat]
            (small if flat[0].size < SMALL else large).append((name, *piece))
    return Pieces(small, large)


def norm(pieces, index):  # -> a float, of the index-th array of every piece, all together
    arrays = [piece[index] for piece in pieces.small + pieces.large]
    with own_threads(len(pieces.large)):
        squares = [float(np.vdot(x, x)) for x in arrays]
    return sum(squares) ** 0.5


def for_each(update, pieces):
    """Calls update(*piece) for each: the small ones' here, the large ones' in threads."""
    for piece in pieces.small:  # threads would wait for each other longer than these take
        update(*piece)

    def work(span):
        for piece in pieces.large[span]:
            update(*piece)

    in_threads(work, len(pieces.large))
