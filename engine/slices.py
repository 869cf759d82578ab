"""gpt2.hidden_state on all cores: each thread runs it on its own slice of the tokens.

NumPy uses several cores only for matrix products. Everything else, such as gelu, norms and
softmax, runs on one. But embeddings, norms, matrices and gelu treat each token by itself. So a long
sequence is cut into slices, and each thread takes one of them through the whole model. Only
attention needs other tokens, and there the threads meet: each brings the queries, keys and values
of its slice, does a part of the work for all tokens, and continues with the results for its own
tokens.

This does not pay for a few tokens, because each thread reads all the weights. Then one thread runs
the model, and only the products are shared among several (see products.py).
"""

import math
from functools import partial

import numpy as np

from engine import memory, products, threads
from gpt2 import hidden_state, softmax

MIN_TOKENS = 64  # in a slice
MIN_SIZE = 192 * 768  # tokens * n_embd, all slices together


def run(tokens, positions, params, n_head, n_rows, attend):  # -> [n_tokens, n_embd]
    """hidden_state of the tokens of n_rows texts, one text after the other.

    attend(layer, head_groups, q, k, v, out) does a part of attention's work: for each group (a row
    and a slice of its heads) it writes the answer to out. q, k, v, out: [n_head, n_tokens, d_head].
    """
    memory.keep()
    params, n_tokens, n_embd = products.wrap(params), len(tokens), params["wpe"].shape[1]
    n_slices = threads.parts(n_tokens // MIN_TOKENS) if n_tokens * n_embd >= MIN_SIZE else 1
    head_groups = share_heads(n_rows, n_head, whole_rows(params, n_tokens, n_rows, n_slices))
    all_heads = share_heads(n_rows, n_head, whole=True)  # for one thread, fewer and larger products
    shared = np.empty((4, n_tokens, n_head, n_embd // n_head), np.float32)  # q, k, v and out
    out = shared[3].swapaxes(0, 1)  # stored token by token, so that mha need not copy it
    n_seen = (1 + positions.mean()) * n_rows  # about how many keys a layer reads

    def alone(q, k, v, layer):  # [n_head, n_tokens, d_head] each -> the same
        def work(groups):
            attend(layer, groups, q, k, v, out)

        are_free = threads.n_users or n_tokens == 1  # NumPy's own threads are idle meanwhile
        if are_free and n_seen > 400 * len(head_groups):  # otherwise waking ours costs more
            threads.in_threads(lambda part: work(head_groups[part]), len(head_groups))
        else:
            work(all_heads)
        return out

    def run_slice(number, span, meet):  # span: the thread's slice of the tokens
        def together(*qkv, layer):  # [n_head, n_span, d_head] each -> the same
            for array, of_span in zip(shared, qkv, strict=False):
                array[span] = of_span.swapaxes(0, 1)
            meet()
            attend(layer, head_groups[number::n_slices], *shared.swapaxes(1, 2))
            meet()
            return out[:, span]

        return run_with(together, span)

    def run_with(attend, span):
        blocks = [b | {"attend": partial(attend, layer=i)} for i, b in enumerate(params["blocks"])]
        changed = {"wpe": params["wpe"][positions[span]], "blocks": blocks}
        return hidden_state(tokens[span], **params | changed, n_head=n_head)

    if n_slices == 1:
        with products.own_threads(n_tokens, n_embd):
            return run_with(alone, slice(None))
    with threads.own_threads(n_tokens):
        return np.concatenate(threads.in_step(run_slice, n_tokens, n_slices))


def whole_rows(params, n_tokens, n_rows, n_slices):
    """Does one thread do all heads of a row? A block's own `attend` may rely on that."""
    own = any("attend" in block for block in params["blocks"])
    return own or n_rows > 1 and (n_slices == 1 or n_tokens == n_rows)


def share_heads(n_rows, n_head, whole):  # -> [(row, slice of its heads)]
    """Divides attention's work into groups: all heads of a row, or some of them."""
    n = n_head if whole else -(-n_head // threads.parts(n_head))  # heads in a group, rounded up
    groups = [slice(first, first + n) for first in range(0, n_head, n)]
    return [(row, heads) for row in range(n_rows) for heads in groups]


def attention_of_rows(rows):  # of (q [n_heads, 1, d_head], keys, values, out)
    """gpt2.attention for the last token of many texts, with one softmax for all of them."""
    ends = np.cumsum([len(q) for q, _, _, _ in rows]).tolist()  # where each row's heads end
    longest = max(keys.shape[-2] for _, keys, _, _ in rows)
    scores = np.full((ends[-1], 1, longest), -math.inf, np.float32)
    for (q, keys, _, _), end in zip(rows, ends, strict=True):
        np.matmul(q, keys.swapaxes(-1, -2), out=scores[end - len(q) : end, :, : keys.shape[-2]])
    weights = softmax(scores / math.sqrt(q.shape[-1]))
    for (q, keys, values, out), end in zip(rows, ends, strict=True):
        np.matmul(weights[end - len(q) : end, :, : keys.shape[-2]], values, out=out)
