"""The text of a run: turns --data into ids to train on and windows to validate with."""

import hashlib
import math
import os
import typing

import numpy as np

from corpus.chat import CHAT_TEMPLATE
from corpus.examples import (
    FIRST_RULES,
    RULES,
    hold_out,
    is_examples,
    is_learned,
    load_examples,
    pack,
    prompt_of,
    thin,
)
from corpus.shards import check_ids, count_ids, open_shards, read_sequences
from corpus.texts import encode_text, read_text
from encoder import Encoder
from model_files.download import download_shakespeare

NAMED_TEXTS = ("shakespeare", "python-docs")
MOST_VALIDATION = 2**20  # tokens of a validation, at most
MOST_FINGERPRINT = 2**24  # tokens that are compared when a run is resumed


def check_data(data):  # the --data flag, or None
    """Raises FileNotFoundError if it is no file, no folder and no name of a text."""
    if data not in (None, *NAMED_TEXTS) and not (os.path.isfile(data) or os.path.isdir(data)):
        raise FileNotFoundError(
            f"no text at {data}: --data takes a text file's path, shakespeare or python-docs"
        )


def load_text(data):  # the --data flag -> [str], the documents
    """`shakespeare` (1.1 MB, downloaded once), `python-docs`, or the text file of that path."""
    if data == "python-docs":  # the language reference, part of every Python: no network needed
        from pydoc_data.topics import topics

        return ["\n".join(topics[name] for name in sorted(topics))]
    path = data
    if data == "shakespeare":
        try:
            path = download_shakespeare()
        except ConnectionError as error:
            raise ConnectionError(f"{error}; --data python-docs needs no network") from None
    check_data(path)
    return read_text(path)


def load_tokens(data, encoder=None):  # -> {"train": [arrays], "val": [arrays]}, Encoder
    """Token shards from a folder, or a text as bytes or `encoder`'s tokens, the last tenth for val.

    `encoder` is the model's or --tokenizer's. Raises ValueError for shards that were made with
    another tokenizer, and for an id beyond the vocabulary.
    """
    if data in NAMED_TEXTS or not os.path.isdir(data):
        encoder = encoder or Encoder([])
        ids = encode_text(load_text(data), encoder)
        n_train = len(ids) * 9 // 10
        return {"train": [ids[:n_train]], "val": [ids[n_train:]]}, encoder
    shards, own = open_shards(data)
    if not (encoder or own):
        raise ValueError(f"{data}: these shards have no tokenizer; name theirs with --tokenizer")
    if encoder and own and encoder.vocab != own.vocab:
        raise ValueError(
            f"{data}: these shards are of another tokenizer; prepare them again with the model's"
        )
    encoder = encoder or own
    for split in shards.values():
        check_ids(split, encoder.n_vocab)
    return shards, encoder


class Text(typing.NamedTuple):
    """What a run learns from, in ids.

    train: arrays of ids, or, of examples, one array [n_rows, n_ctx + 1], which is read row by row.
    windows: [n_windows, n_ctx + 1], what is validated with. description: what a checkpoint says of
    both: counts and fingerprints; of examples, also a line for people, and their rules. encoder:
    what is saved with the model. prompt: ids, the beginning of the samples that are shown: a line's
    end, or the first validation example's prompt.
    """

    train: list
    windows: np.ndarray
    description: dict
    encoder: Encoder
    prompt: list


def open_text(data, encoder, n_ctx, described=None):  # the --data flag -> Text
    """encoder: the model's or --tokenizer's, or None: then a text is bytes.

    described: what the checkpoint of a resumed run says of its text.
    """
    if is_examples(data):
        rules = RULES if described is None else described.get("rules", FIRST_RULES)
        return open_examples(data, encoder or Encoder([]), n_ctx, rules)
    shards, encoder = load_tokens(data, encoder)
    check_enough(shards, n_ctx, data)
    windows = cut_windows(shards["val"], n_ctx)
    description = {
        "n_train": count_ids(shards["train"]),
        "training": fingerprint(shards["train"]),
        "validation": hashlib.sha256(windows.tobytes()).hexdigest(),
    }
    return Text(shards["train"], windows, description, encoder, encoder.encode("\n"))


def open_examples(data, encoder, n_ctx, rules):
    """As open_text, for a file of JSON lines that corpus/examples.py describes."""
    examples, summary, has_conversations = load_examples(data, encoder, n_ctx + 1, rules)
    if len(examples) < 2:
        raise ValueError(f"{data}: {summary}: at least 2 are needed, one of them to validate with")
    held_out = hold_out(examples, rules)
    prompt = prompt_of(held_out[1][0])[-max(1, n_ctx - 1) :]  # so that there is room for a token
    train, windows = (pack(part, n_ctx + 1) for part in held_out)
    windows = thin(windows, max(1, MOST_VALIDATION // n_ctx), rules)
    description = {
        "n_train": int(is_learned(train).sum()),
        "training": fingerprint([train.ravel()]),
        "validation": hashlib.sha256(windows.tobytes()).hexdigest(),
        "examples": summary,
        "rules": rules,
    }
    if has_conversations:  # the model's folder will say what it has learned
        encoder = encoder.with_chat_template(CHAT_TEMPLATE)
    return Text([train], windows, description, encoder, prompt)


def describe(text):  # -> a line for people
    n_train = text.description["n_train"]
    words = text.description.get("examples")
    if words is None:
        return f"{n_train} training and {text.windows[:, 1:].size} validation tokens"
    n_val = int(is_learned(text.windows).sum())
    return f"{n_train} training and {n_val} validation tokens to learn, of {words}"


def draw_sequences(shards, seed, step, shape):  # -> [*shape], ids
    """Stretches from random places, for backprop.py. They depend on the seed and the step alone."""
    n = shape[-1]
    n_places = count_ids(shards) - n + 1
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, n_places, math.prod(shape[:-1]))
    return read_sequences(shards, starts, n).reshape(shape)


def fingerprint(shards):  # [arrays] -> SHA-256, hexadecimal
    """Of the ids, not their type or files. If there are very many, of parts from all over them."""
    n_ids, n = count_ids(shards), 2**12
    step = n * -(-n_ids // MOST_FINGERPRINT)
    found = hashlib.sha256()
    for start in range(0, n_ids, step):
        found.update(read_sequences(shards, [start], min(n, n_ids - start)).tobytes())
    return found.hexdigest()


def check_enough(shards, n_ctx, data):
    """Raises ValueError if the text is too short for one training and one validation sequence."""
    for split, arrays in shards.items():
        if count_ids(arrays) <= n_ctx:
            raise ValueError(
                f"{data}: too few {split} tokens: {count_ids(arrays)}, but n_ctx + 1 is {n_ctx + 1}"
            )


def cut_windows(shards, n_ctx):  # [arrays] -> [n_windows, n_ctx + 1]
    """The validation text in windows side by side.

    A window is one token longer than n_ctx, because its inputs and its targets are one apart; its
    last token is the next window's first. A remainder that is shorter than a
    window is dropped. At most MOST_VALIDATION tokens are used, from all over the text.
    """
    n_windows = (count_ids(shards) - 1) // n_ctx
    step = -(-n_windows * n_ctx // MOST_VALIDATION)
    return read_sequences(shards, np.arange(0, n_windows, step) * n_ctx, n_ctx + 1)
