"""Tasks of evaluate.py and of train_jax.py --eval_tasks: how likely are endings of a context?

    hellaswag   Which of four endings does a story have?
    lambada     What is the last word of a passage?
    choose      Which of several choices of your own follows a prompt?

A task reads items from JSON lines; `encode_item` turns them into ids, a scorer (evaluate.py's or
training/scoring.py's) finds how likely the tokens of each ending are, and `accuracy` averages the
marks of all items. Everybody does this a little differently, and then the figures differ as well;
so the docstrings say which source each task follows.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from model_files.download import download_file
from plumbing.files import parse_json


class Task(NamedTuple):
    """read(dict, where) -> context, endings, label; mark(scores, label) -> {measure: bool}.

    scores: (log_probs, hits) for each ending: its tokens' log-probabilities, and whether each token
    is the likeliest in its position. url: of the task's own items, None if it has none.
    """

    read: Callable
    mark: Callable
    url: str | None


class Question(NamedTuple):
    """An item as text. where: its file and line, for error messages. label: as `mark` takes it."""

    where: str
    context: str
    endings: list
    label: object


@dataclass(frozen=True, slots=True)
class Item:
    """A question in ids. n_seq: the positions that it needs. is_cut: has its context been cut?"""

    context: list
    endings: list  # of lists of ids
    label: object
    n_seq: int
    is_cut: bool


def read_hellaswag(item, where):
    """Read {"ctx", "endings", "label"}. Raises ValueError, which says what is wrong with it."""
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

    The data is from Zellers et al. 2019, arXiv:1905.07830. The scoring is that of Karpathy's
    build-nanogpt and llm.c, which give GPT-2 124M an acc of 0.2859 and an acc_norm of 0.2955. Do
    not compare these with the 0.2892 and 0.3114 of EleutherAI's harness, which cleans the texts
    first and divides by characters, not tokens.
    """
    sums = [log_probs.sum(dtype=np.float64) for log_probs, _ in scores]
    means = [log_probs.mean(dtype=np.float64) for log_probs, _ in scores]
    chosen, chosen_norm = sums.index(max(sums)), means.index(max(means))
    return {"acc": chosen == label, "acc_norm": chosen_norm == label}


def read_lambada(item, where):
    """Read {"text"}: the context ends before the last space, and the rest is the one ending."""
    if not isinstance(item.get("text"), str):
        raise ValueError(f"{where}: text is missing or not text")
    context, space, word = item["text"].rpartition(" ")
    if not space or not word.strip():
        raise ValueError(f"{where}: text should end with a space and a last word")
    return context, [" " + word], None


def mark_lambada(scores, label):  # (log_probs, hits) of the one ending -> {measure: bool}
    """Is every token of the last word the likeliest in its position? Is the very last token?

    The data is from Paperno et al. 2016, arXiv:1606.06031, in OpenAI's version. For the word,
    EleutherAI's harness gives GPT-2 124M 0.3256. The 0.4599 of GPT-2's paper is closer to what
    others measured for the last token, which is easier: a word's beginning gives away its end.
    """
    ((_, hits),) = scores
    return {"acc_last_word": bool(hits.all()), "acc_last_token": bool(hits[-1])}


def read_choices(item, where):
    """Read {"prompt", "choices", "answer"}. The label is (answer, each choice's characters).

    A choice follows its prompt unchanged, so it must begin with the space that it needs.
    """
    prompt, choices, answer = (item.get(key) for key in ("prompt", "choices", "answer"))
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt is missing or not text")
    texts = choices if isinstance(choices, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{where}: choices is missing, or not a list of two texts or more")
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise ValueError(f"{where}: answer is {answer!r}, not a number from 0 to {len(texts) - 1}")
    return prompt, texts, (answer, [len(text) for text in texts])


def mark_choices(scores, label):  # (log_probs, hits) for each choice -> {measure: bool}
    """Is the right choice the likeliest, by its tokens' sum and per character? On a tie, the first.

    The same as acc and acc_norm of EleutherAI's harness, whose figure per byte is acc_bytes.
    """
    answer, n_chars = label
    sums = [log_probs.sum(dtype=np.float64) for log_probs, _ in scores]
    means = [nats / n for nats, n in zip(sums, n_chars, strict=True)]
    return {"acc": sums.index(max(sums)) == answer, "acc_norm": means.index(max(means)) == answer}


TASKS = {
    "hellaswag": Task(
        read_hellaswag,
        mark_hellaswag,
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    ),
    "lambada": Task(
        read_lambada,
        mark_lambada,
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    ),
    "choose": Task(read_choices, mark_choices, None),
}


def load_items(task, path=None, flag="--data "):  # -> [Question]
    """Read the items of a file of JSON lines, by default the task's own, downloaded once.

    Raises ValueError, which names the file and the line, for an item that is not of the task's
    form. flag: what names a file on the command line, for the error message.
    """
    if path is None:
        url = TASKS[task].url
        path = os.path.join("data", os.path.basename(url))
        try:
            download_file(url, path)  # unless the file exists
        except ConnectionError as error:
            raise ConnectionError(f"{error}; {flag}FILE takes a copy of your own") from None
    with open(path, "rb") as f:
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(f, 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no items")
    read = TASKS[task].read
    return [Question(where, *read(parse_json(line, where), where)) for where, line in lines]


def encode_item(where, context, endings, label, encoder, n_ctx):  # a Question's parts -> Item
    """Encode a question, its context cut on the left to leave room for the longest ending.

    An ending's last token predicts nothing, so it needs no position. Raises ValueError for an
    ending that is too long by itself, and for an empty context if the tokenizer has no
    <|endoftext|> to start from.
    """
    context = encoder.encode(context)
    endings = [encoder.encode(text) for text in endings]
    if not context and encoder.endoftext is None:
        raise ValueError(f"{where}: no context, and there is no <|endoftext|> to start from")
    context = context or [encoder.endoftext]
    longest = max(map(len, endings))
    if longest > n_ctx:
        raise ValueError(f"{where}: an ending of {longest} tokens, but n_ctx is only {n_ctx}")
    n_seq = min(len(context) + longest - 1, n_ctx)
    n_context = n_seq + 1 - longest
    is_cut = n_context < len(context)
    return Item(context[-n_context:], endings, label, n_seq, is_cut)


def accuracy(items, mark, scored, **bar_options):  # -> {measure: share of items, ...}
    """Return the share of items that pass each of a task's measures.

    items: [Item]. scored: (item, its scores) pairs, in any order. bar_options: of the progress bar.
    n_cut counts the items that lost some of their context.
    """
    totals, n_done = Counter(), 0
    with tqdm(total=len(items), unit="item", **{"disable": None} | bar_options) as bar:
        for item, scores in scored:
            totals.update(mark(scores, item.label))
            n_done += 1
            shares = {name: f"{n / n_done:.4f}" for name, n in totals.items()}
            bar.set_postfix(shares, refresh=False)
            bar.update(1)
    shares = {name: n / n_done for name, n in totals.items()}
    return shares | {"n_items": n_done, "n_cut": sum(item.is_cut for item in items)}
