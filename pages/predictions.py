"""Summarizes what a model predicts at each position of a text. Heads can be switched off."""

import numpy as np

import gpt2

N_GROUPS = 64  # groups of unlikely tokens, which is enough for their sum at any temperature
N_AT_ONCE = 32  # positions whose logits are in memory at the same time


def predictions(ids, params, n_head, without=(), positions=None, n_shown=50):
    """Returns how surprising each token was, and what is predicted after each of `positions`.

    without: (block, head) pairs of the heads that are switched off. positions: all by default.
    """
    x = gpt2.hidden_state(np.asarray(ids), **mute(params, n_head, without), n_head=n_head)
    positions = list(range(len(ids))) if positions is None else positions
    scores, shown = [], []
    for start in range(0, len(ids), N_AT_ONCE):
        logits = x[start : start + N_AT_ONCE] @ params["wte"].T
        next_ids = ids[start + 1 : start + 1 + len(logits)]
        scores.append(surprise(next_ids, logits[: len(next_ids)]))
        rows = [i - start for i in positions if start <= i < start + len(logits)]
        shown.append(distributions(logits[rows], n_shown))
    found = {name: np.concatenate([part[name] for part in scores]) for name in scores[0]}
    for name in ("top_ids", "top_logits", "tail_logits"):
        found[name] = np.concatenate([part[name] for part in shown])
    return found | {"positions": np.sort(positions), "tail_counts": shown[0]["tail_counts"]}


def mute(params, n_head, heads):  # -> params, with an `attend` in each block that has muted heads
    blocks = list(params["blocks"])
    for block in {block for block, _ in heads}:
        voices = np.ones((n_head, 1, 1), np.float32)
        voices[[head for b, head in heads if b == block]] = 0
        attend = blocks[block].get("attend", gpt2.attention_in_blocks)
        blocks[block] = blocks[block] | {"attend": attend_with(voices, attend)}
    return params | {"blocks": blocks}


def attend_with(voices, attend):  # [n_head, 1, 1] -> a function for a block
    """A head's output is a mean of its values, so if they are 0, the output is also 0."""
    return lambda q, k, v: attend(q, k, v * voices)


def surprise(next_ids, logits):  # [n] ids, [n, n_vocab] -> bits [n], rank [n]
    """Returns how many bits each token cost, given the logits before it, and its rank from 1."""
    ids = np.asarray(next_ids, int)[:, None]
    exact = logits.astype(np.float64)
    nats = np.logaddexp.reduce(exact, -1) - np.take_along_axis(exact, ids, -1)[:, 0]
    likelier = logits > np.take_along_axis(logits, ids, -1)
    return {"bits": nats / np.log(2), "rank": 1 + likelier.sum(-1)}


def distributions(logits, n_shown):  # of [n, n_vocab]
    """Returns the logits of the n_shown likeliest tokens one by one, and of the rest in groups."""
    top_ids = likeliest(logits, n_shown)
    tail_counts, tail_logits = group(np.sort(logits)[:, ::-1][:, n_shown:], n_shown)
    return {
        "top_ids": top_ids,
        "top_logits": np.take_along_axis(logits, top_ids, -1),
        "tail_counts": tail_counts,
        "tail_logits": tail_logits,
    }


def likeliest(logits, n):  # [n_seq, n_vocab] -> [n_seq, n], or [n_seq, n_vocab] if n is larger
    """Returns the ids of the n largest logits, best first. If two are tied, the lower id is first.

    If several tokens tie for the last place, it is arbitrary which of them are included.
    """
    if n == 1:  # about a hundred times as fast
        return logits.argmax(-1, keepdims=True)
    n = min(n, logits.shape[-1])
    ids = np.sort(np.argpartition(-logits, n - 1)[:, :n])
    order = np.argsort(-np.take_along_axis(logits, ids, -1), kind="stable")
    return np.take_along_axis(ids, order, -1)


def group(logits, n_before):  # [n_seq, n], descending -> [n_groups], [n_seq, n_groups]
    """Returns how many tokens each group has, and the logit that stands for each of them.

    n_before: how many likelier tokens there are.

    The groups' sizes grow geometrically, so likely tokens are in small groups. Each group's sum of
    exp(logit) is exact. At other temperatures it is approximate.
    """
    n = logits.shape[-1]  # 0 if all tokens are shown one by one
    bounds = np.unique(np.geomspace(n_before, n_before + n, N_GROUPS + 1).round().astype(int))
    starts = bounds[:-1] - n_before
    counts = np.diff(bounds)
    largest = logits[:, :1].astype(np.float64)
    with np.errstate(divide="ignore"):  # a token that is too unlikely for float64 gets -inf
        means = np.log(np.add.reduceat(np.exp(logits - largest), starts, -1) / counts)
    return counts, largest + means


def bytes_of(ids, encoder):  # -> {id: its bytes in hex}; "" for an id that is not in the vocabulary
    """Returns the ids' bytes. A token may be a part of a character, which is not text by itself."""
    known = encoder.piece_of_id
    return {id: encoder.decode_bytes([id] if id in known else []).hex() for id in sorted(ids)}
