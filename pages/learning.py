"""Makes explain.py's page about a training run: how its snapshots read the same text."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pages.explanation import page, read_lens
from pages.predictions import bytes_of, surprise
from pages.recording import record

MAX_TOKENS = 128
SHARE = 0.5  # a head with more of its attention on the previous token "looks at it"
MOST_BYTES = 3_000_000  # of all snapshots' attention; if there is more, some are left out
N_SAMPLE = 160  # tokens that each snapshot generates
N_POINTS = 400  # the most points of a curve


class Run(NamedTuple):
    """A training run: its name, the steps of its snapshots, and how to read one of them."""

    name: str
    steps: list
    read: Callable  # step -> parameters
    log: list  # the lines of metrics.jsonl


def learning(inputs, run, encoder, hparams, generate):  # -> the page's text
    """Runs each of a run's snapshots on inputs, [n_seq] ids, and returns a page about all of them.

    generate: kv_cache.generate. Raises ValueError if there are too many or too few tokens, or if a
    snapshot's logits are not finite.
    """
    n_max = min(MAX_TOKENS, hparams["n_ctx"])
    if not 2 <= len(inputs) <= n_max:
        raise ValueError(f"{len(inputs)} tokens, but this page needs 2 and shows at most {n_max}")
    data = learning_data(inputs, run, encoder, hparams, generate)
    return page(data | {"model": run.name}, "learning.html")


def learning_data(inputs, run, encoder, hparams, generate):
    """Returns the page's data, a dict that `page` can write."""
    steps = thin(run.steps, len(inputs), hparams)
    parts, samples = [], []
    for step in tqdm(steps, unit="snapshot", disable=None):
        params = run.read(step)
        parts.append(look(inputs, params, hparams["n_head"], f"{run.name}, step {step}"))
        samples.append(write(params, encoder, hparams["n_head"], generate))
    data = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    data["lens_ids"] = data["lens_ids"].astype(np.min_scalar_type(hparams["n_vocab"]))
    ids = {*inputs, *np.unique(data["lens_ids"]).tolist()}
    return data | {
        "hparams": hparams,
        "ids": inputs,
        "bytes": bytes_of(ids, encoder),
        "steps": steps,
        "samples": samples,
        "curves": {name: curve(run.log, name, steps) for name in ("loss", "validation")},
        "share": SHARE,
        "formed": find_formed(data["previous"]),
    }


def thin(steps, n_seq, hparams):
    """Returns evenly spaced steps of a run, with the first and the last, or all steps."""
    n_heads = hparams["n_layer"] * hparams["n_head"]
    n = max(2, MOST_BYTES // (n_heads * n_seq * (n_seq + 1) // 2))
    if len(steps) <= n:
        return list(steps)
    return [steps[i] for i in np.linspace(0, len(steps) - 1, n).round().astype(int)]


def look(inputs, params, n_head, source):
    """Runs one snapshot on the text and returns arrays of what happened.

    bits [n_seq - 1]: how surprising each token was, except the first.
    attention: the square roots of each head's weights, from 0 to 255. The rows of its triangle
        stand one after the other.
    previous [n_layer, n_head]: the mean weight of the previous token.
    lens_ids, lens_probs: see read_lens.
    """
    recording = record(inputs, params, n_head)
    if not np.isfinite(recording["logits"]).all():
        raise ValueError(f"{source}: the logits are not finite, so the weights must be damaged")
    past, attention = np.tril_indices(len(inputs)), recording["attention"]
    found = read_lens(recording["stream"], params)
    return {
        "bits": surprise(inputs[1:], recording["logits"][:-1])["bits"].astype(np.float32),
        "attention": np.rint(255 * np.sqrt(attention[:, :, *past])).astype(np.uint8),
        "previous": np.diagonal(attention, -1, 2, 3).mean(-1),
        "lens_ids": found["lens_ids"],
        "lens_probs": np.rint(found["lens_probs"] / 257).astype(np.uint8),
    }


def write(params, encoder, n_head, generate):  # -> the text that a snapshot generates after "\n"
    prompt = encoder.encode("\n") or list(encoder.end_ids)
    options = {"temperature": 0.8, "seed": 1, "slide": True}
    [ids] = generate([prompt], params, n_head, N_SAMPLE, endoftext=encoder.end_ids, **options)
    return re.sub(r"\n{3,}", "\n\n", encoder.decode(ids)).strip("\n")


def curve(log, name, steps):  # -> [[place, loss], ...], where snapshot 3 is at place 3
    """Returns the losses of a log or, if there are many, their means over short stretches."""
    found = [(line["step"], line[name]) for line in log if name in line]
    if not found:
        return []
    places = np.interp([step for step, _ in found], steps, np.arange(len(steps)))
    stretches = np.floor(places * N_POINTS / (len(steps) - 1))
    points = np.column_stack([places, [loss for _, loss in found]])
    means = [points[stretches == i].mean(0) for i in np.unique(stretches)]
    return np.round(means, 4).tolist()


def find_formed(previous):  # [n_snapshots, n_layer, n_head] -> [[block, head, snapshot], ...]
    """Returns the heads that learned to look at the previous token, and the first such snapshot."""
    looks = previous > SHARE
    is_formed = looks.any(0) & ~looks[0]
    found = [[*map(int, head), int(looks[:, *head].argmax())] for head in np.argwhere(is_formed)]
    return sorted(found, key=lambda head: head[2])
