"""gpt2.hidden_state on all cores: each thread runs it on its own slice of the tokens.

NumPy uses several cores for products of matrices alone; all the rest, gelu and norms and softmax,
runs on one. But embeddings, norms, matrices and gelu treat each token by itself. So a long sequence
is cut into slices, and each thread takes one through the whole model. Only attention needs other
tokens, and there the threads meet: each brings its slice's queries, keys and values, each does some
pieces of the work for all tokens, and each goes on with what its own tokens got.

A few tokens are not worth it, for each thread reads all the weights: then one thread runs the
model, and the products share their columns out instead.
"""

import math
from functools import partial

import numpy as np

from engine import memory, products, threads
from gpt2 import hidden_state, softmax

MIN_TOKENS = 64  # in a slice


def run(tokens, positions, params, n_head, n_rows, attend):  # -> [n_tokens, n_embd]
    """hidden_state of n_rows texts' tokens, one text after the other, with attend for attention.

    attend(layer, pieces, q, k, v, out) does the pieces, each (row, slice of its heads): it finds
    the q, k and v that they need and puts their part into out, [n_head, n_tokens, d_head] each.
    """
    memory.keep()
    params, n_tokens, n_embd = products.wrap(params), len(tokens), params["wpe"].shape[1]
    n_slices = threads.parts(n_tokens // MIN_TOKENS)
    pieces = share_heads(n_rows, n_head, whole_rows(params, n_tokens, n_rows, n_slices))
    shared = np.empty((4, n_tokens, n_head, n_embd // n_head), np.float32)  # q, k, v and out
    out = shared[3].swapaxes(0, 1)  # laid out by tokens: what mha does with it next copies nothing

    def alone(q, k, v, layer):  # [n_head, n_tokens, d_head] each -> the same
        def work(some):
            attend(layer, pieces[some], q, k, v, out)

        if n_tokens + positions.sum() > 64 * len(pieces):  # else waking a thread takes longer
            threads.in_threads(work, len(pieces))
        else:
            work(slice(None))
        return out

    def run_slice(number, mine, meet):
        def together(*own, layer):  # [n_head, n_mine, d_head] each -> the same
            for array, part in zip(shared, own, strict=False):
                array[mine] = part.swapaxes(0, 1)
            meet()
            attend(layer, pieces[number::n_slices], *shared.swapaxes(1, 2))
            meet()
            return out[:, mine]

        return run_with(together, mine)

    def run_with(attend, mine):
        blocks = [b | {"attend": partial(attend, layer=i)} for i, b in enumerate(params["blocks"])]
        here = {"wpe": params["wpe"][positions[mine]], "blocks": blocks}
        return hidden_state(tokens[mine], **params | here, n_head=n_head)

    with threads.own_threads(n_tokens):
        if n_slices == 1:
            return run_with(alone, slice(None))
        return np.concatenate(threads.in_step(run_slice, n_tokens, n_slices))


def whole_rows(params, n_tokens, n_rows, n_slices):
    """Is a row's attention done by one thread, all heads? A block's own attention may expect it."""
    own = any("attend" in block for block in params["blocks"])
    return own or n_rows > 1 and (n_slices == 1 or n_tokens == n_rows)


def share_heads(n_rows, n_head, whole):  # -> [(row, slice of its heads)]
    """The pieces of attention's work: a row each, or some of its heads for each thread."""
    n = n_head if whole else -(-n_head // threads.parts(n_head))  # heads a piece, rounded up
    heads = [slice(first, first + n) for first in range(0, n_head, n)]
    return [(row, some) for row in range(n_rows) for some in heads]


def attention_of_rows(rows):  # of (q [n_head, 1, d_head], keys, values, where the answer goes)
    """gpt2.attention for the last token of each of many texts: one softmax for all of them."""
    q, _, _, _ = rows[0]
    lengths = [keys.shape[-2] for _, keys, _, _ in rows]
    scores = np.full((len(rows), *q.shape[:-1], max(lengths)), -math.inf, q.dtype)
    for (q, keys, _, _), n, its in zip(rows, lengths, scores, strict=True):
        np.matmul(q, keys.swapaxes(-1, -2), out=its[..., :n])
    weights = softmax(scores / math.sqrt(q.shape[-1]))
    for (_, _, values, out), n, its in zip(rows, lengths, weights, strict=True):
        np.matmul(its[..., :n], values, out=out)
