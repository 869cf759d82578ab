"""Rows: the texts that are written together. Who joins, who runs in a pass, and who has ended.

A row is a dict. It joins a batch between two passes (`admit`), reads its prompt, writes a token a
pass, and leaves once it has an "end". kv_cache.advance makes the passes; this file decides what
goes into each pass and what becomes of its logits.
"""

from functools import partial

import numpy as np

from engine import lookup as guessing
from gpt2 import sample

MIN_SHARED = 8  # tokens at the beginning of two rows; fewer are not worth waiting for


def new_row(prompt, n_tokens, draw, endoftext=None, stop=None, lookup=0):
    """A text to write, as a dict: "ids" are its new tokens so far, "end" becomes why it ended.

    draw(logits) chooses a token: see drawing. stop(ids) is called after each token. lookup: how
    many guesses a pass checks. prompt: at least one id. n_tokens: 0 only reads the prompt.
    """
    row = {"prompt": prompt, "n_tokens": n_tokens, "draw": draw, "read": None}
    row |= {"endoftext": endoftext, "stop": stop, "lookup": lookup, "trust": 1.0}
    row |= {"ids": [], "end": None, "cache": None, "to_run": prompt, "guesses": []}
    return row | {"has_slid": False}


def drawing(seed, number, sampling=()):  # -> draw, as new_row takes it
    """gpt2.sample with a random generator for this row. sampling: what sample takes after rng.

    Row 0 draws what gpt2.py draws with that seed; every other row draws from the seed and its own
    number. So what a row draws does not depend on its neighbours.
    """
    rng = np.random.default_rng([seed, number] if seed is not None and number > 0 else seed)
    return partial(draw_with, rng, sampling)


def draw_with(rng, sampling, logits):  # [n_vocab] -> one token id
    return sample(logits, rng, *sampling)


def admit(rows, row, ended=()):
    """Adds the row. If another row, or an ended one, begins like it, their shared part is copied.

    A row with "read" shares nothing: that function must see the states of the whole prompt.
    """
    others = [] if row["read"] else [*rows, *ended]
    shared = [(n_shared(row, other), n_read(other)) for other in others]
    best = max(shared, default=(0, 0))
    row |= {"source": others[shared.index(best)] if best[0] else None, "n_shared": best[0]}
    rows.append(row)


def n_shared(row, other):
    """How many first tokens the prompt, without its last one, has in common with the other row."""
    if other["has_slid"]:  # its beginning is forgotten
        return 0
    ours, theirs = row["prompt"][:-1], other["prompt"] + other["ids"]
    pairs = enumerate(zip(ours, theirs, strict=False))
    n = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return n if n >= MIN_SHARED else 0


def n_read(row):
    return row["cache"]["n_seq"] if row["cache"] else 0


def n_to_copy(row):  # -> how many tokens of its source's cache the row begins with, or None
    """None while the row waits for its source to read the part that they share."""
    source, n = row["source"], row["n_shared"]
    if not source or source["has_slid"]:
        return 0
    if n_read(source) < n and not source["end"]:
        return None
    return min(n, n_read(source))


def choose(rows, n_tokens):  # -> [(row, the ids it runs now)], n_tokens together at most
    """First the rows that write, each with one token and its guesses; then the shortest prompts."""
    batch = []
    for row in sorted(rows, key=lambda row: (not row["ids"], len(row["to_run"]))):
        ids = row["to_run"][:n_tokens] if row["cache"] else []
        if ids:
            batch.append((row, ids))
            n_tokens -= len(ids)
            row["to_run"] = [] if row["guesses"] else row["to_run"][len(ids) :]
            row["guesses"] = row["guesses"][: len(ids) - 1]
    return batch


def write(row, logits):  # [1 + n_guesses, n_vocab] -> [(row, its ids so far, None or its end)]
    """Draws the row's next token, and one more for every guess that turns out right."""
    if row["n_tokens"] == 0:
        row["end"] = "length"
        return [(row, [], row["end"])]
    written, guesses = [], row["guesses"]
    for guess, scores in zip([*guesses, None], logits, strict=True):
        token = row["draw"](scores)
        row["end"] = put(row, token)
        written.append((row, list(row["ids"]), row["end"]))
        if row["end"] or token != guess:
            break
    row["cache"]["n_seq"] -= len(guesses) + 1 - len(written)  # forgets the wrong ones
    row["trust"] = guessing.new_trust(row["trust"], len(guesses), len(written) - 1)
    n = min(row["lookup"], row["n_tokens"] - len(row["ids"]) - 1) if row["trust"] >= 1 else 0
    row["guesses"] = guessing.guess(row["prompt"] + row["ids"], n) if n > 0 else []
    row["to_run"] = [token, *row["guesses"]]
    return written


def put(row, token):
    """Adds the next token to the row. Returns why the row ends with this token, or None."""
    if token == row["endoftext"]:
        return "endoftext"
    row["ids"].append(token)
    if row["stop"] and row["stop"](row["ids"]):
        return "stop"
    return "length" if len(row["ids"]) == row["n_tokens"] else None
