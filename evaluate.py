"""How good is a model? Measure its perplexity on a text, or its accuracy in tests of understanding.

    python evaluate.py perplexity --model_size 124M --data wiki.txt
    python evaluate.py hellaswag --model_size 124M    # which of four endings does a story have?
    python evaluate.py lambada --model_size 124M      # what is the last word of a passage?
    python evaluate.py choose --data quiz.jsonl       # which of your own choices follows a prompt?

All of them ask the model the same question: how likely is this token after the tokens before it?
`score` answers it. The rest decides which tokens to ask about, what the model sees before each of
them, and how the answers become one number. evaluation/tasks.py reads the items of the last three
and marks the answers.

The result is one line of JSON. Nothing else is written to standard output.
"""

import importlib.util
import itertools
import json
import math
import os
import sys
from functools import partial

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from corpus.shards import check_ids, count_ids, open_shards
from corpus.texts import encode_text, read_text
from encoder import mend_surrogates
from engine import threads
from evaluation.tasks import TASKS, accuracy, encode_item, load_items
from kv_cache import copy_cache, extend, extend_all, new_cache, next_logits
from plumbing.cli import run_cli
from utils import load_encoder_hparams_and_params

LOGITS_ROWS = 64  # positions whose logits are in memory at the same time: 13 MB for 50257 ids
CACHED_TOKENS = 2048  # in all caches of a group, 144 MiB for 124M, unless one item needs more


def score(x, targets, params):  # [n, n_embd], [n] -> [n] float32, [n] bool
    """Returns each target's log-probability after a hidden state, and whether it is the likeliest.

    The largest logit is subtracted first, so exp cannot overflow. Raises ValueError if a result is
    not finite, because NaN would silently count as a wrong answer.
    """
    scores = []
    for start in range(0, len(x), LOGITS_ROWS):
        rows = slice(start, start + LOGITS_ROWS)
        logits = next_logits(x[rows], params)  # [n_rows, n_vocab]
        score_rows = partial(score_logits, logits, targets[rows])
        scores += threads.in_threads(score_rows, len(logits))
    log_probs, hits = map(np.concatenate, zip(*scores, strict=True))
    if not np.isfinite(log_probs).all():
        raise ValueError("the model's probabilities are not finite: its weights must be damaged")
    return log_probs, hits


def score_logits(logits, targets, rows):  # [n, n_vocab], [n], a slice -> the rows' log_probs, hits
    logits = logits[rows]
    targets = targets[rows]
    positions = np.arange(len(logits))
    best = logits.argmax(-1)
    logits -= logits[positions, best, None]  # in place, since nothing else uses them
    target_logits = logits[positions, targets]
    return target_logits - np.log(np.exp(logits, out=logits).sum(-1)), best == targets


def score_row(row, params, n_head):  # -> log_probs, hits
    """Scores the last n_scored ids of a row (ids, n_scored), which has at most n_ctx + 1 ids."""
    ids, n_scored = row
    cache = new_cache(params, n_head, capacity=len(ids) - 1)
    x = extend_all([cache], [ids[:-1]], params, n_head)[-n_scored:]
    return score(x, ids[-n_scored:], params)


# --- Perplexity ---------------------------------------------------------------------------------


def load_ids(data, encoder):  # the --data flag -> ids [1 + n_tokens], n_bytes, n_words
    """Returns a text file's ids, and how many bytes and words all ids but the first stand for.

    The first id is <|endoftext|>, so the model predicts all of the text. If the tokenizer has no
    <|endoftext|>, the first id is the text's first token. corpus/texts.py reads the documents. The
    <|endoftext|> between them is also predicted, but has no bytes. Bytes that are not UTF-8 are
    read as U+FFFD, and words are separated by white space. If data is a folder, load_shards reads
    it. Raises ValueError if there is nothing to predict.
    """
    if os.path.isdir(data):
        return load_shards(data, encoder)
    documents = read_text(data)
    ids = encode_text(documents, encoder)
    predicted = [mend_surrogates(document).encode() for document in documents]
    if encoder.endoftext is not None:
        ids = np.concatenate([[encoder.endoftext], ids])
    elif len(ids):
        first = encoder.decode_bytes([int(ids[0])])
        if encoder.add_prefix_space and not predicted[0].startswith(b" "):
            first = first.removeprefix(b" ")  # not part of the text
        predicted[0] = predicted[0][len(first) :]
    if len(ids) < 2:
        raise ValueError(f"{data} is empty, or too short to predict any of it; name a longer text")
    n_words = sum(len(document.decode(errors="replace").split()) for document in predicted)
    return ids, sum(map(len, predicted)), n_words


def load_shards(folder, encoder):  # -> the same as load_ids
    """Reads the validation split of a folder of token shards, in which <|endoftext|> has no bytes.

    Raises ValueError if the shards are empty, or were made with a tokenizer other than the model's.
    The shards of nanoGPT and llm.c do not name a tokenizer, so any ids that the model has will do.
    """
    shards, shards_encoder = open_shards(folder)
    if not count_ids(shards["val"]):
        raise ValueError(
            f"{folder} has no validation shards; run prepare.py with a larger --val_fraction"
        )
    if shards_encoder and (
        (shards_encoder.vocab, shards_encoder.merges) != (encoder.vocab, encoder.merges)
    ):
        raise ValueError(
            f"{folder} was made with another tokenizer; run prepare.py with --tokenizer MODEL"
        )
    check_ids(shards["val"], encoder.n_vocab)
    ids = np.concatenate(shards["val"])
    if encoder.endoftext not in (None, ids[0]):
        ids = np.concatenate([[encoder.endoftext], ids])
    documents = np.split(ids[1:], np.flatnonzero(ids[1:] == encoder.endoftext))
    n_words = n_spaces = 0
    for document in documents:
        text = encoder.decode(document[document != encoder.endoftext].tolist())
        n_words += len(text.split())
        n_spaces += text.startswith(" ")
    sizes = np.array([len(encoder.piece_of_id.get(id, "")) for id in range(encoder.n_vocab)])
    n_of_id = np.bincount(ids[1:][ids[1:] != encoder.endoftext], minlength=len(sizes))
    n_bytes = int(n_of_id @ sizes)
    if encoder.add_prefix_space and encoder.endoftext is not None:
        n_bytes -= n_spaces  # the tokenizer added them
    if not n_bytes:
        raise ValueError(f"{folder}: the validation shards hold no text to predict")
    return ids, n_bytes, n_words


def windows(n_tokens, n_ctx, stride):  # yields (start, stop, n_scored)
    """Cuts a text into windows: ids[start:stop] predict ids[start + 1 : stop + 1].

    Of these targets, the last n_scored count. All windows are full. In the first, every target
    counts. Each further window starts `stride` later, and only its new targets count. The last
    window is moved back, to end with the text.

    >>> list(windows(n_tokens=11, n_ctx=4, stride=3))
    [(0, 4, 4), (3, 7, 3), (6, 10, 3), (7, 11, 1)]
    """
    n_seq = min(n_ctx, n_tokens)
    n_done = 0
    while n_done < n_tokens:
        stop = min(n_done + (stride if n_done else n_seq), n_tokens)
        yield stop - n_seq, stop, stop - n_done
        n_done = stop


def perplexity(ids, n_bytes, n_words, params, n_head, stride=None, score_rows=None):  # -> dict
    """Returns the mean of -log p(token) over load_ids' text, and the perplexity, e to that power.

    Every token but the first counts once. After the first window, each token is predicted from at
    least n_ctx - stride + 1 tokens and at most n_ctx. So a smaller stride gives a lower perplexity,
    but takes more windows. The default, n_ctx, is what EleutherAI's harness uses for its rolling
    log-likelihoods. Tokenizers cut texts differently, so compare models with different tokenizers
    per byte or per word. A perplexity that is too large for a float is returned as None.

    score_rows: a function that takes a list of score_row's rows and returns each row's (log_probs,
        hits), by default with NumPy.

    Raises ValueError if stride is not from 1 to n_ctx.
    """
    n_tokens, n_ctx = len(ids) - 1, len(params["wpe"])
    stride = n_ctx if stride is None else stride
    if not 1 <= stride <= n_ctx:
        raise ValueError(f"stride must be from 1 to this model's n_ctx, {n_ctx}, not {stride}")
    nats = 0.0
    text_windows = list(windows(n_tokens, n_ctx, stride))
    rows = [(ids[start : stop + 1], n_scored) for start, stop, n_scored in text_windows]
    score_rows = score_rows or partial(map, partial(score_row, params=params, n_head=n_head))
    with tqdm(total=n_tokens, unit="token", disable=None) as bar:
        scored = zip(text_windows, score_rows(rows), strict=True)
        for (_, stop, n_scored), (log_probs, _) in scored:
            nats -= float(log_probs.sum(dtype=np.float64))
            bar.set_postfix(nats_per_token=f"{nats / stop:.4f}", refresh=False)
            bar.update(n_scored)
    return {
        "nats_per_token": nats / n_tokens,
        "perplexity": exp(nats / n_tokens),
        "nats_per_byte": nats / n_bytes,
        "perplexity_per_word": exp(nats / n_words) if n_words else None,
        "n_tokens": n_tokens,
        "n_bytes": n_bytes,
        "n_words": n_words,
        "n_ctx": n_ctx,
        "stride": stride,
    }


def exp(x):
    """Returns e to the power of x, or None if that is too large, since JSON has no infinity."""
    try:
        return math.exp(x)
    except OverflowError:
        return None


# --- Items: how likely are these endings of that context? ----------------------------------------


def group_items(items):  # [Item] -> yields lists of neighbours
    """Makes groups as large as CACHED_TOKENS allows, because a token costs less in a large pass."""
    group, n_tokens = [], 0
    for item in items:
        n_item = item.n_seq * (1 + len(item.endings))  # a cache for the context, and its copies
        if group and n_tokens + n_item > CACHED_TOKENS:
            yield group
            group, n_tokens = [], 0
        group.append(item)
        n_tokens += n_item
    yield group


def score_items(items, params, n_head):  # [Item] -> for each: (log_probs, hits) of each ending
    """Makes two passes: the contexts, then all endings, each with a copy of its context's cache.

    The last token of a context runs in the second pass, with each of its endings, and the last
    token of an ending does not run at all. So each token of the second pass predicts one that
    counts.
    """
    caches = [new_cache(params, n_head, capacity=item.n_seq) for item in items]
    prompts = [(cache, item.context[:-1]) for cache, item in zip(caches, items, strict=True)]
    prompts = [(cache, ids) for cache, ids in prompts if ids]
    if prompts:
        extend(*zip(*prompts, strict=True), params, n_head)
    rows, targets = [], []
    for cache, item in zip(caches, items, strict=True):
        for ending in item.endings:
            rows.append((copy_cache(cache), [item.context[-1], *ending[:-1]]))
            targets.append(ending)
    x = extend_all(*zip(*rows, strict=True), params, n_head)  # [n_tokens, n_embd]
    log_probs, hits = score(x, np.concatenate(targets), params)
    borders = np.cumsum([len(ending) for ending in targets])[:-1]
    scores = zip(np.split(log_probs, borders), np.split(hits, borders), strict=True)
    return [list(itertools.islice(scores, len(item.endings))) for item in items]


def score_all(items, params, n_head):  # yields each item and its scores
    for group in group_items(items):
        yield from zip(group, score_items(group, params, n_head), strict=True)


# --- The command line ---------------------------------------------------------------------------


def check_flags(task, data, stride):
    """Raises ValueError or FileNotFoundError, in one clear line, before a model is looked for."""
    if task not in ("perplexity", *TASKS):
        raise ValueError(f"unknown task {task!r}; choose one of perplexity, {', '.join(TASKS)}")
    if stride is not None and task != "perplexity":
        raise ValueError(f"{task} has no stride: --stride is only for perplexity")
    if stride is not None and stride < 1:
        raise ValueError(f"stride must be 1 or more, not {stride}")
    if data is None and task == "perplexity":
        raise ValueError("perplexity needs --data, a text file or a folder of token shards")
    if data is None and task != "perplexity" and TASKS[task].url is None:
        raise ValueError(f"{task} needs --data, a file of JSON lines")
    if data is None or os.path.isfile(data) or task == "perplexity" and os.path.isdir(data):
        return
    kind = "text file or a folder of token shards" if task == "perplexity" else "file of JSON lines"
    raise FileNotFoundError(f"no file at {data}: --data takes the path of a {kind}")


def choose_backend(backend):  # the --backend flag -> "numpy" or "jax"
    """Returns jax by default if it finds an accelerator, otherwise numpy.

    Raises ValueError for another name. This starts JAX only if a plugin for an accelerator is
    installed, which saves a second.
    """
    if backend not in (None, "numpy", "jax"):
        raise ValueError(f"backend must be numpy or jax, not {backend!r}")
    if backend is None and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
        return "numpy"
    if backend != "numpy":
        from training.scoring import find_platform

        backend = "numpy" if find_platform() == "cpu" and backend is None else "jax"
    return backend


def main(
    task: str,
    data: str | None = None,
    model_size: str = "124M",
    models_dir: str = "models",
    stride: int | None = None,
    backend: str | None = None,
):
    """Measure how good a model is. The result is one line of JSON on standard output.

    Args:
        task: perplexity, hellaswag, lambada, or choose.
        data: for perplexity, a text file or a folder of token shards, whose validation split is
            read; for the other tasks, a file of JSON lines. Without --data, hellaswag and lambada
            download theirs once. For choose, each line has a prompt (a text), choices (a list of
            texts), and the answer (the number of the right choice, counted from 0).
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. A missing model is downloaded once.
        models_dir: the folder that holds the models.
        stride: tokens from one window of perplexity to the next. The default, and the most, is the
            model's n_ctx.
        backend: numpy, or jax, which uses all devices. The default is jax if it finds a GPU or a
            TPU, otherwise numpy.
    """
    check_flags(task, data, stride)
    backend = choose_backend(backend)
    questions = [] if task == "perplexity" else load_items(task, data)  # checked before loading
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    n_head = hparams["n_head"]
    score_rows = None
    if backend == "jax":
        from training import scoring

        score_rows = scoring.load_scorer(params, n_head)
    if task == "perplexity":
        result = perplexity(*load_ids(data, encoder), params, n_head, stride, score_rows)
    else:
        items = [encode_item(*question, encoder, hparams["n_ctx"]) for question in questions]
        if score_rows:
            scored = scoring.score_items(items, score_rows)
        else:
            scored = score_all(items, params, n_head)
        result = accuracy(items, TASKS[task].mark, scored)
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    run_cli(main)
