"""What a model says at each position of a text, in few numbers; with heads switched off, too."""

import numpy as np

import gpt2

N_GROUPS = 64  # the unlikely tokens come in groups, enough for the sum under any temperature
N_AT_ONCE = 32  # positions whose logits are in memory together


def predictions(ids, params, n_head, without=(), positions=None, n_shown=50):
    """What comes after each position, or after those given, and how each token was foreseen.

    without: (block, head) pairs, the heads that are switched off.
    """
    x = gpt2.hidden_state(np.asarray(ids), **mute(params, n_head, without), n_head=n_head)
    kept = list(range(len(ids))) if positions is None else positions
    scores, shown = [], []
    for start in range(0, len(ids), N_AT_ONCE):
        part = slice(start, start + N_AT_ONCE)
        logits = x[part] @ params["wte"].T
        following = ids[start + 1 : start + 1 + len(logits)]
        scores.append(foreseen(following, logits[: len(following)]))
        rows = [i - start for i in kept if start <= i < start + len(logits)]
        shown.append(distributions(logits[rows], n_shown))
    joined = {name: np.concatenate([part[name] for part in scores]) for name in scores[0]}
    for name in ("top_ids", "top_logits", "tail_logits"):
        joined[name] = np.concatenate([part[name] for part in shown])
    return joined | {"positions": np.sort(kept), "tail_counts": shown[0]["tail_counts"]}


def mute(params, n_head, heads):  # the parameters, with an `attend` where a head is to be silent
    blocks = list(params["blocks"])
    for block in {block for block, _ in heads}:
        voices = np.ones((n_head, 1, 1), np.float32)
        voices[[head for b, head in heads if b == block]] = 0
        attend = blocks[block].get("attend", gpt2.attention_in_blocks)
        blocks[block] = blocks[block] | {"attend": attend_with(voices, attend)}
    return params | {"blocks": blocks}


def attend_with(voices, attend):  # [n_head, 1, 1] -> a function for a block
    """A head's answer is a mean of its values: where these are 0, so is the answer."""
    return lambda q, k, v: attend(q, k, v * voices)


def foreseen(following, logits):  # [n] ids, [n, n_vocab] -> bits [n], rank [n]
    """How surprising each token was after the logits before it, and how many were likelier."""
    ids = np.asarray(following, int)[:, None]
    exact = logits.astype(np.float64)
    nats = np.logaddexp.reduce(exact, -1) - np.take_along_axis(exact, ids, -1)[:, 0]
    likelier = logits > np.take_along_axis(logits, ids, -1)
    return {"bits": nats / np.log(2), "rank": 1 + likelier.sum(-1)}


def distributions(logits, n_shown):  # of [n, n_vocab]
    """The logits of the likeliest tokens, one by one, and of the rest in groups."""
    shown = likeliest(logits, n_shown)
    tail_counts, tail_logits = group(np.sort(logits)[:, ::-1][:, n_shown:], n_shown)
    return {
        "top_ids": shown,
        "top_logits": np.take_along_axis(logits, shown, -1),
        "tail_counts": tail_counts,
        "tail_logits": tail_logits,
    }


def likeliest(logits, n):  # [n_seq, n_vocab] -> [n_seq, n], all where there are fewer
    """The ids of the n greatest logits, best first, the lower id first among equals.

    Which ones of the last's equals are among them is chance.
    """
    if n == 1:  # some hundred times as fast
        return logits.argmax(-1, keepdims=True)
    n = min(n, logits.shape[-1])
    ids = np.sort(np.argpartition(-logits, n - 1)[:, :n])
    order = np.argsort(-np.take_along_axis(logits, ids, -1), kind="stable")
    return np.take_along_axis(ids, order, -1)


def group(logits, n_before):  # [n_seq, n], descending -> [n_groups], [n_seq, n_groups]
    """(how many tokens each group has, the logit that each of them might have as well).

    n_before: how many likelier ones there are. The bounds grow like powers, so that likely tokens
    are in small groups. Every group keeps its sum of exp(logit), exactly, and under other
    temperatures nearly.
    """
    n = logits.shape[-1]  # 0, where all tokens are shown one by one
    bounds = np.unique(np.geomspace(n_before, n_before + n, N_GROUPS + 1).round().astype(int))
    starts, counts = bounds[:-1] - n_before, np.diff(bounds)
    largest = logits[:, :1].astype(np.float64)
    with np.errstate(divide="ignore"):  # what is too unlikely for float64 has no chance: -inf
        means = np.log(np.add.reduceat(np.exp(logits - largest), starts, -1) / counts)
    return counts, largest + means


def bytes_of(ids, encoder):  # -> {id: its bytes in hex}; "" for a gap in the ids
    """A token may be a part of a character: only its bytes say what it is."""
    there = encoder.piece_of_id
    return {id: encoder.decode_bytes([id] if id in there else []).hex() for id in sorted(ids)}
