"""How good is a model? Its perplexity on a text, and two tests of understanding.

    python evaluate.py perplexity --model_size 124M --data wiki.txt
    python evaluate.py hellaswag --model_size 124M    # which of four endings does a story have?
    python evaluate.py lambada --model_size 124M      # what is the last word of a passage?
    python evaluate.py choose --data quiz.jsonl       # which of your own choices follows a prompt?

All of them ask the model one question: how likely is this token after those before it? `score`
answers it. The rest decides which tokens to ask about, what the model sees before each, and how the
answers become one number. Everybody does this a little differently, and then the numbers differ,
too; so the docstrings below say which source each task follows.

The result is one line of JSON. Nothing else is written to standard output.
"""

import importlib.util
import itertools
import json
import math
import os
from collections import Counter
from functools import partial

import numpy as np
from tqdm import tqdm

from corpus.shards import check_ids, count_ids, open_shards
from encoder import mend_surrogates
from engine import threads
from kv_cache import copy_cache, extend, extend_all, new_cache, next_logits
from model_files.download import download_file
from plumbing.cli import run_cli
from plumbing.files import parse_json
from utils import load_encoder_hparams_and_params

URLS = {
    "hellaswag": "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "lambada": "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
}

LOGITS_ROWS = 64  # positions whose logits are held at the same time: 13 MB with 50257 ids
CACHED_TOKENS = 2048  # in all caches together, or one item's if it has more: 144 MiB for 124M


def score(x, targets, params):  # [n, n_embd], [n] -> [n] float32, [n] bool
    """Each target's log-probability, from the hidden state before it, and whether it is likeliest.

    The largest logit is subtracted first, so that exp cannot overflow. ValueError if a
    result is not a number: NaN would silently count as wrong everywhere.
    """
    answers = []
    for start in range(0, len(x), LOGITS_ROWS):
        some = slice(start, start + LOGITS_ROWS)
        logits = next_logits(x[some], params)  # [n_some, n_vocab]
        shares = partial(score_logits, logits, targets[some])
        answers += threads.in_threads(shares, len(logits))
    log_probs, hits = map(np.concatenate, zip(*answers, strict=True))
    if not np.isfinite(log_probs).all():
        raise ValueError("the model's probabilities are not finite: its weights must be damaged")
    return log_probs, hits


def score_logits(logits, targets, rows):  # [n, n_vocab], [n], a slice -> score's answer for it
    logits, targets = logits[rows], targets[rows]
    each, best = np.arange(len(logits)), logits.argmax(-1)
    logits -= logits[each, best, None]  # in place: nobody else uses them
    chosen = logits[each, targets]
    return chosen - np.log(np.exp(logits, out=logits).sum(-1)), best == targets


def score_row(row, params, n_head):  # -> score's answer
    """row: (ids, n_scored), at most n_ctx + 1 ids, of which the last n_scored are scored."""
    ids, n_scored = row
    cache = new_cache(params, n_head, capacity=len(ids) - 1)
    x = extend_all([cache], [ids[:-1]], params, n_head)[-n_scored:]
    return score(x, ids[-n_scored:], params)


# --- Perplexity ---------------------------------------------------------------------------------


def load_ids(data, encoder):  # the --data flag -> ids [1 + n_tokens], n_bytes, n_words
    """A text file's ids, and how many bytes and words all of them but the first stand for.

    The first is <|endoftext|>, so that the model predicts all of the text. If the tokenizer
    has none, the first id is the text's first token. Bytes that are not UTF-8 are read as U+FFFD;
    words are separated by white space. load_shards reads a folder. ValueError if nothing is left
    to predict.
    """
    if os.path.isdir(data):
        return load_shards(data, encoder)
    with open(data, "rb") as f:
        text = f.read().decode("utf-8", errors="replace")
    ids, predicted = encoder.encode(text), text.encode()
    if encoder.endoftext is not None:
        ids = [encoder.endoftext, *ids]
    elif ids:
        first = encoder.piece_of_id[ids[0]]
        predicted = predicted[len(first) :]  # a piece has a character for every byte
    if len(ids) < 2:
        raise ValueError(f"{data}: an empty text, or one too short to predict any of it")
    return np.array(ids), len(predicted), len(predicted.decode(errors="replace").split())


def load_shards(folder, encoder):  # -> the same as load_ids
    """The validation split of a folder of token shards, in which <|endoftext|> has no bytes.

    ValueError if the shards are empty, or another tokenizer than the model's made them. nanoGPT's
    and llm.c's do not name a tokenizer: they may have any ids that the model has.
    """
    shards, theirs = open_shards(folder)
    if not count_ids(shards["val"]):
        raise ValueError(f"{folder}: no validation shards")
    if theirs and (theirs.vocab, theirs.merges) != (encoder.vocab, encoder.merges):
        raise ValueError(f"{folder}: its tokenizer is not the model's")
    check_ids(shards["val"], encoder.n_vocab, folder)
    ids = np.concatenate(shards["val"])
    if encoder.endoftext not in (None, ids[0]):
        ids = np.concatenate([[encoder.endoftext], ids])
    documents = np.split(ids[1:], np.flatnonzero(ids[1:] == encoder.endoftext))
    texts = (encoder.decode(doc[doc != encoder.endoftext].tolist()) for doc in documents)
    n_words = sum(len(text.split()) for text in texts)
    sizes = np.array([len(encoder.piece_of_id.get(id, "")) for id in range(encoder.n_vocab)])
    n_of_id = np.bincount(ids[1:][ids[1:] != encoder.endoftext], minlength=len(sizes))
    n_bytes = int(n_of_id @ sizes)
    if not n_bytes:
        raise ValueError(f"{folder}: no text to predict in its validation shards")
    return ids, n_bytes, n_words


def windows(n_tokens, n_ctx, stride):  # -> (start, stop, n_scored) of each
    """Where to cut: ids[start:stop] predict ids[start + 1 : stop + 1], the last n_scored count.

    All windows are full. In the first, all targets count; each further one starts `stride` later,
    and only its new targets count. The last is moved back so that it ends with the text.

    >>> list(windows(n_tokens=11, n_ctx=4, stride=3))
    [(0, 4, 4), (3, 7, 3), (6, 10, 3), (7, 11, 1)]
    """
    n_seq, done = min(n_ctx, n_tokens), 0
    while done < n_tokens:
        stop = min(done + (stride if done else n_seq), n_tokens)
        yield stop - n_seq, stop, stop - done
        done = stop


def perplexity(ids, n_bytes, n_words, params, n_head, stride=None, score_rows=None):  # -> dict
    """How surprised the model is by load_ids' text: the mean of -log p(token), and e to that power.

    Every token but the first id counts once. After the first window it is predicted from at least
    n_ctx - stride + 1 tokens and at most n_ctx; so a smaller stride gives a lower figure, at the
    price of more windows. The default, n_ctx, cuts as EleutherAI's harness does for its rolling
    log-likelihoods. Tokenizers cut texts differently: compare models with different tokenizers by
    the byte or by the word. None stands for a perplexity too large for a float.

    score_rows: a function of a list of score_row's rows -> their answers; by default in NumPy.
    ValueError for a stride that is not in 1 .. n_ctx.
    """
    n_tokens, n_ctx = len(ids) - 1, len(params["wpe"])
    stride = n_ctx if stride is None else stride
    if not 1 <= stride <= n_ctx:
        raise ValueError(f"stride must be from 1 to this model's n_ctx, {n_ctx}, not {stride}")
    nats, cuts = 0.0, list(windows(n_tokens, n_ctx, stride))
    rows = [(ids[start : stop + 1], n_scored) for start, stop, n_scored in cuts]
    score_rows = score_rows or partial(map, partial(score_row, params=params, n_head=n_head))
    with tqdm(total=n_tokens, unit="token", disable=None) as bar:
        for (_, stop, n_scored), (log_probs, _) in zip(cuts, score_rows(rows), strict=True):
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
    """e to the power of x, or None if that is too large: JSON has no infinity."""
    try:
        return math.exp(x)
    except OverflowError:
        return None


# --- HellaSwag and LAMBADA: how likely are these endings of that context? -----------------------


def read_hellaswag(item, where):
    """{"ctx", "endings", "label"} -> context, endings, label; ValueError says what is bad."""
    context, endings, label = (item.get(key) for key in ("ctx", "endings", "label"))
    if not isinstance(context, str):
        raise ValueError(f"{where}: ctx is missing or not text")
    texts = endings if isinstance(endings, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: endings is missing, or not a list of two texts or more")
    if label is None:
        raise ValueError(f"{where}: no label (the test set has none: use the validation set)")
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(f"{where}: label is {label!r}, not a number from 0 to {len(endings) - 1}")
    return context, [" " + text for text in endings], label


def mark_hellaswag(scores, label):  # (log_probs, hits) for each ending -> {measure: bool}
    """Is the right ending the likeliest, by its tokens' sum and by their mean? On a tie, the first.

    The data is that of Zellers et al. 2019, arXiv:1905.07830, the scoring that of Karpathy's
    build-nanogpt and llm.c, by which GPT-2 124M has an acc of 0.2859 and an acc_norm of 0.2955.
    Do not compare these with the 0.2892 and 0.3114 of EleutherAI's harness, which cleans the texts
    first and divides by bytes, not tokens.
    """
    sums = [log_probs.sum(dtype=np.float64) for log_probs, _ in scores]
    means = [log_probs.mean(dtype=np.float64) for log_probs, _ in scores]
    chosen, chosen_norm = sums.index(max(sums)), means.index(max(means))
    return {"acc": chosen == label, "acc_norm": chosen_norm == label}


def read_lambada(item, where):
    """{"text"} -> the text before the last space, [the rest, with this space], no label."""
    if not isinstance(item.get("text"), str):
        raise ValueError(f"{where}: text is missing or not text")
    context, space, word = item["text"].rpartition(" ")
    if not space or not word.strip():
        raise ValueError(f"{where}: text should end with a space and a last word")
    return context, [" " + word], None


def mark_lambada(scores, label):  # (log_probs, hits) of the one ending -> {measure: bool}
    """Is each token of the last word the likeliest in its place? Is the very last token?

    The data is that of Paperno et al. 2016, arXiv:1606.06031, in OpenAI's version. For the word,
    EleutherAI's harness gives GPT-2 124M 0.3256. The 0.4599 of GPT-2's paper is nearer to what
    others measured for the last token. That is easier, since a word's beginning gives away its end.
    """
    ((_, hits),) = scores
    return {"acc_last_word": bool(hits.all()), "acc_last_token": bool(hits[-1])}


def read_choices(item, where):
    """{"prompt", "choices", "answer"} -> prompt, choices, (answer, bytes of each choice).

    A choice is put after its prompt unchanged, so it must begin with the space that it needs.
    """
    prompt, choices, answer = (item.get(key) for key in ("prompt", "choices", "answer"))
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt is missing or not text")
    texts = choices if isinstance(choices, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{where}: choices is missing, or not a list of two texts or more")
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise ValueError(f"{where}: answer is {answer!r}, not a number from 0 to {len(texts) - 1}")
    return prompt, texts, (answer, [len(mend_surrogates(text).encode()) for text in texts])


def mark_choices(scores, label):  # (log_probs, hits) for each choice -> {measure: bool}
    """Is the right choice the likeliest, by its tokens' sum and per byte? On a tie, the first.

    The same as acc and acc_norm of EleutherAI's harness.
    """
    answer, n_bytes = label
    sums = [log_probs.sum(dtype=np.float64) for log_probs, _ in scores]
    means = [nats / n for nats, n in zip(sums, n_bytes, strict=True)]
    return {"acc": sums.index(max(sums)) == answer, "acc_norm": means.index(max(means)) == answer}


TASKS = {
    "hellaswag": (read_hellaswag, mark_hellaswag),
    "lambada": (read_lambada, mark_lambada),
    "choose": (read_choices, mark_choices),
}


def load_items(task, path=None, flag="--data "):  # -> [(where, context, endings, label)]
    """The items of a file of JSON lines, by default the task's own, which is downloaded once."""
    if path is None:
        path = os.path.join("data", os.path.basename(URLS[task]))
        try:
            download_file(URLS[task], path)  # unless it is there
        except ConnectionError as error:
            raise ConnectionError(f"{error}; {flag}FILE takes a copy that is here") from None
    with open(path, "rb") as f:
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(f, 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no items")
    return [(where, *TASKS[task][0](parse_json(line, where), where)) for where, line in lines]


def encode_item(where, context, endings, label, encoder, n_ctx):  # texts -> a dict of ids
    """The item in ids, its context cut on the left to leave room for the longest of its endings.

    An ending's last token predicts nothing, and so needs no position. ValueError for an ending too
    long by itself, and for an empty context if there is no <|endoftext|> to stand for it.
    """
    context, endings = encoder.encode(context), [encoder.encode(text) for text in endings]
    if not context and encoder.endoftext is None:
        raise ValueError(f"{where}: no context, and there is no <|endoftext|> to start from")
    context = context or [encoder.endoftext]
    longest = max(map(len, endings))
    if longest > n_ctx:
        raise ValueError(f"{where}: an ending of {longest} tokens, but n_ctx is only {n_ctx}")
    n_seq = min(len(context) + longest - 1, n_ctx)
    kept = context[longest - 1 - n_seq :]
    cut = len(kept) < len(context)
    return {"context": kept, "endings": endings, "label": label, "n_seq": n_seq, "cut": cut}


def group_items(items):  # -> lists of neighbours
    """Groups as large as CACHED_TOKENS allows: the more tokens in a pass, the faster each is."""
    group, n_tokens = [], 0
    for item in items:
        n_more = item["n_seq"] * (1 + len(item["endings"]))  # a cache for the context, and copies
        if group and n_tokens + n_more > CACHED_TOKENS:
            yield group
            group, n_tokens = [], 0
        group.append(item)
        n_tokens += n_more
    yield group


def score_items(items, params, n_head):  # -> [item][ending]: score's answer
    """Two passes: the contexts, then all endings, each with its own copy of its context's cache.

    A context's last token runs with its endings instead, and an ending's last token not at all. So
    each token of the second pass predicts one that counts.
    """
    caches = [new_cache(params, n_head, capacity=item["n_seq"]) for item in items]
    prompts = [(c, i["context"][:-1]) for c, i in zip(caches, items, strict=True)]
    if prompts := [(cache, ids) for cache, ids in prompts if ids]:
        extend(*zip(*prompts, strict=True), params, n_head)
    rows, targets = [], []
    for cache, item in zip(caches, items, strict=True):
        for ending in item["endings"]:
            rows.append((copy_cache(cache), [item["context"][-1], *ending[:-1]]))
            targets.append(ending)
    x = extend_all(*zip(*rows, strict=True), params, n_head)  # [n_tokens, n_embd]
    log_probs, hits = score(x, np.concatenate(targets), params)
    cuts = np.cumsum([len(ending) for ending in targets])[:-1]
    answers = zip(np.split(log_probs, cuts), np.split(hits, cuts), strict=True)
    return [list(itertools.islice(answers, len(item["endings"]))) for item in items]


def score_all(items, params, n_head):  # -> (item, score_items' answer) of each
    for group in group_items(items):
        yield from zip(group, score_items(group, params, n_head), strict=True)


def accuracy(items, mark, scored, **shown):  # of encode_item -> dict
    """The share of items that get each mark; n_cut counts those that lost some of their context.

    scored: score_all's pairs, in any order; shown: options of the bar.
    """
    totals, n_done = Counter(), 0
    with tqdm(total=len(items), unit="item", **{"disable": None} | shown) as bar:
        for item, scores in scored:
            totals.update(mark(scores, item["label"]))
            n_done += 1
            bar.set_postfix({k: f"{n / n_done:.4f}" for k, n in totals.items()}, refresh=False)
            bar.update(1)
    shares = {name: n / n_done for name, n in totals.items()}
    return shares | {"n_items": n_done, "n_cut": sum(item["cut"] for item in items)}


# --- The command line ---------------------------------------------------------------------------


def check_flags(task, data, stride):
    """Raises ValueError or FileNotFoundError, one clear line, before looking for a model."""
    if task not in ("perplexity", *TASKS):
        raise ValueError(f"no task {task!r}: there are perplexity, {', '.join(TASKS)}")
    if stride is not None and task != "perplexity":
        raise ValueError(f"stride is for perplexity; {task} has none")
    if stride is not None and stride < 1:
        raise ValueError(f"stride must be 1 or more, not {stride}")
    if data is None and task == "perplexity":
        raise ValueError("perplexity needs --data: a text file, or a folder of token shards")
    if data is None and task not in URLS:
        raise ValueError(f"{task} needs --data: a file of JSON lines")
    if data is None or os.path.isfile(data) or task == "perplexity" and os.path.isdir(data):
        return
    kind = "text file or a folder of token shards" if task == "perplexity" else "file of JSON lines"
    raise FileNotFoundError(f"no file at {data}: --data takes the path of a {kind}")


def choose_backend(backend):  # the --backend flag -> "numpy" or "jax"
    """By default jax if it finds an accelerator, else numpy. ValueError for another name.

    This starts JAX, but not if no plugin for an accelerator is installed: that saves a second.
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
        data: for perplexity, a text file, or a folder of token shards, whose validation split is
            read; for the other tasks a file of JSON lines. hellaswag and lambada download theirs
            once if there is no --data. For choose, each line has a prompt (a text), choices (a list
            of texts), and the answer (the number of the right choice, counted from 0).
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. What is not here yet is downloaded once.
        models_dir: the folder that holds the models.
        stride: tokens from one window of perplexity to the next, at most the model's n_ctx, which
            is also the default.
        backend: numpy, or jax, which uses all devices; jax is the default where it finds a GPU or a
            TPU, else numpy.
    """
    check_flags(task, data, stride)
    backend, score_rows, scored = choose_backend(backend), None, None
    items = [] if task == "perplexity" else load_items(task, data)  # checked before loading
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    items = [encode_item(*item, encoder, hparams["n_ctx"]) for item in items]
    model = params, hparams["n_head"]
    if backend == "jax":
        from training import scoring

        score_rows = scoring.load_scorer(*model)
        scored = scoring.score_items(items, score_rows)
    if task == "perplexity":
        result = perplexity(*load_ids(data, encoder), *model, stride, score_rows)
    else:
        result = accuracy(items, TASKS[task][1], scored or score_all(items, *model))
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    run_cli(main)
