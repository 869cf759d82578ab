"""Examples to learn from: JSON lines, packed into rows of ids that say what is to be learned.

    {"prompt": "The capital of France is", "completion": " Paris."}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

These are the forms of OpenAI's finetuning and of TRL's "prompt-completion" and "conversational"
data sets. The model learns the completion, or every answer, and the <|endoftext|> at its end; it
only reads the rest. A row holds many examples, none of which sees the others: marks that are added
to the ids say where each begins.
"""

import contextlib
import json
import math
import os
from bisect import bisect_left, insort

import numpy as np

from corpus.chat import (
    CHAT_TEMPLATE,
    check_messages,
    encode_answer,
    encode_messages,
    without_end,
)
from corpus.documents import format_of, read_lines
from model_files.vocabulary import MOST_IDS
from plumbing.cli import count
from plumbing.files import check_file, parse_json

# Marks that are added to an id, which is smaller than both.
READ = MOST_IDS  # only read: the model need not predict it
BEGINS = 2 * MOST_IDS  # the first token of an example
KEYS = {"text", "prompt", "completion", "messages"}


def is_examples(data):  # the --data flag
    """Is it a file of JSON lines? Only one of documents, as prepare.py takes them, is a text."""
    if format_of(data) != "json" or not os.path.isfile(data):
        return format_of(data) == "json" and not os.path.isdir(data)
    for line in read_lines(data):
        if line.strip():
            with contextlib.suppress(ValueError, RecursionError):  # said later, with the line
                row = json.loads(line)
                return not (isinstance(row, dict) and set(row) & KEYS == {"text"})
            break
    return True


def load_examples(path, encoder, n_max):  # -> examples, and a line for people that counts them
    """Read examples: each is int32, at most n_max marked ids, and has something to learn.

    Raises ValueError, which names the file and the line, for a line that is not an example.
    """
    check_file(path, math.inf)
    examples = []
    n_cut = n_apart = n_empty = 0
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        parts, is_apart = read_example(line, f"{path}, line {number}", encoder)
        example = mark(parts, n_max)
        if not is_learned(example).any():
            n_empty += 1
            continue
        examples.append(example)
        n_cut += sum(len(ids) for ids, _ in parts) > n_max
        n_apart += is_apart
    summary = [count(len(examples), "example")]
    if n_cut:
        summary.append(f"{n_cut} cut on the left to fit")
    if n_empty:
        summary.append(f"{n_empty} left out with nothing to learn")
    if n_apart:
        summary.append(f"{n_apart} whose completion would have merged with the prompt")
    return examples, ", ".join(summary)


def read_example(line, where, encoder):  # -> [(ids, whether they are learned), ...], is_apart
    """Encode an example. is_apart: in one text, the prompt and the completion would share a token.

    They are encoded separately, so that the prompt never holds a part of the completion.
    """
    example = parse_json(line, where)
    prompt = example.get("prompt")
    completion = example.get("completion")
    if "messages" in example:
        messages = example["messages"]
        try:
            messages = check_messages(messages)
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from None
        encoder.chat_template = CHAT_TEMPLATE  # so that the model's folder says what it learned
        return encode_messages(messages, encoder), False
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(f"{where}: expected a prompt and a completion, both text, or messages")
    completion = without_end(completion)
    is_apart = encoder.encode(prompt + completion) != [
        *encoder.encode(prompt),
        *encoder.encode(completion),
    ]
    answer = encode_answer(completion, encoder) if completion else []
    return [(encoder.encode_prompt(prompt), False), (answer, True)], is_apart


def mark(parts, n_max):  # [(ids, whether they are learned), ...] -> [n] int32, the last n_max
    """Mark the ids. An example's first token is never learned: nothing comes before it."""
    marked = [id + (0 if learned else READ) for ids, learned in parts for id in ids]
    example = np.array(marked[-n_max:], np.int32)
    example[:1] |= READ | BEGINS
    return example


def is_learned(marked):  # [...] -> [...] bool
    return marked & READ == 0


def prompt_of(example):  # marked ids -> the ids before the first that is learned
    """
    >>> prompt_of(mark([([7, 8], False), ([9], True), ([4], False)], n_max=9))
    [7, 8]
    """
    n_read = int(is_learned(example).argmax())
    return (example[:n_read] & (READ - 1)).tolist()


def pack(examples, n):  # [arrays of at most n] -> [n_rows, n]
    """Put each example, longest first, into the fullest row with room. The rest is not learned.

    Best fit decreasing (Johnson 1973) makes few rows, so that little computing is wasted.
    """
    rows = []  # of lists of examples
    rooms = []  # (how many ids still fit, into which row), sorted
    for example in sorted(examples, key=len, reverse=True):
        i = bisect_left(rooms, (len(example), 0))
        if i < len(rooms):
            room, row = rooms.pop(i)
        else:
            room, row = n, len(rows)
            rows.append([])
        rows[row].append(example)
        insort(rooms, (room - len(example), row))
    packed = np.full((len(rows), n), READ | BEGINS, np.int32)
    for i, row in enumerate(rows):
        ids = np.concatenate(row)
        packed[i, : len(ids)] = ids
    return packed


def hold_out(examples):  # -> those to train on, those to validate with
    """Every tenth is for validation; of fewer than ten, the last one."""
    n = min(10, len(examples))
    train = [example for number, example in enumerate(examples, 1) if number % n]
    return train, examples[n - 1 :: n]
