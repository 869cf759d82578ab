"""Examples to learn from: JSON lines, packed into rows of ids that are marked as learned or read.

    {"prompt": "The capital of France is", "completion": " Paris."}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

These are the forms of OpenAI's finetuning and of TRL's "prompt-completion" and "conversational"
data sets. The model learns the completion, or every answer, and the end token after it; it only
reads the rest. A row holds many examples, none of which sees the others: marks that are added to
the ids say where each begins.
"""

import contextlib
import json
import math
import os
import sys
from bisect import bisect_left, insort
from collections import Counter
from typing import NamedTuple

import numpy as np

from corpus.chat import (
    check_messages,
    encode_answer,
    encode_latest,
    encode_messages,
    is_empty_answer,
    is_learned_answer,
    without_end,
)
from corpus.documents import Options, format_of, read_lines
from corpus.jobs import draw
from model_files.vocabulary import MOST_IDS
from plumbing.cli import count
from plumbing.files import check_file, parse_json

# Marks that are added to an id, which is smaller than both.
READ = MOST_IDS  # only read: the model need not predict it
BEGINS = 2 * MOST_IDS  # the first token of an example
KEYS = {"text", "prompt", "completion", "messages"}

# The rules by which examples are cut to fit and held out. A resumed run keeps those that it began
# with. By the first rules, which checkpoints do not name, an example loses its beginning, every
# tenth is held out, and where there are very many the longest of these are measured.
RULES = 2
FIRST_RULES = 1
SEED = Options.seed  # of the draw: whatever the seed of a run, the same examples are held out

# What the summary says after a number of examples.
CUT_ON_THE_LEFT = "cut on the left to fit"
CUT_AT_THE_END = "cut at the end to fit"
FORGOTTEN = "without the oldest messages, to fit"
EMPTY_ANSWER = "with an empty answer, which is not learned"
NOTHING = "left out with nothing to learn"
MERGED = "whose completion would have merged with the prompt"
NOTES = (CUT_ON_THE_LEFT, CUT_AT_THE_END, FORGOTTEN, EMPTY_ANSWER, NOTHING, MERGED)


class Examples(NamedTuple):
    """The examples of a file, a line for people, and whether some are conversations."""

    examples: list  # of [n] int32, marked ids
    summary: str
    has_conversations: bool


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


def load_examples(path, encoder, n_max, rules=RULES):  # -> Examples
    """Read examples: each is int32, at most n_max marked ids, and has something to learn.

    Raises ValueError, which names the file and the line, for a line that is not an example.
    """
    check_file(path, math.inf)
    examples = []
    counts = Counter()
    has_conversations = False
    n_fit = n_max if rules == RULES else sys.maxsize  # then only mark cuts
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        is_conversation = "messages" in row
        has_conversations |= is_conversation
        read = read_conversation if is_conversation else read_completion
        try:
            parts, notes = read(row, encoder, n_fit)
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from None
        example = mark(parts, n_max)
        if not is_learned(example).any():
            counts[NOTHING] += 1
            continue
        if len(example) < sum(len(ids) for ids, _ in parts):
            notes.append(CUT_ON_THE_LEFT)
        examples.append(example)
        counts.update(notes)
    words = [f"{counts[note]} {note}" for note in NOTES if counts[note]]
    summary = ", ".join([count(len(examples), "example"), *words])
    return Examples(examples, summary, has_conversations)


def read_completion(row, encoder, n_max):  # -> [(ids, whether they are learned), ...], notes
    """Encode a prompt and a completion. A completion of n_max ids or more loses its end.

    They are encoded separately, so that the prompt never contains a part of the completion. notes:
    the ones of NOTES that are true of the example.
    """
    prompt = row.get("prompt")
    completion = row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError("expected a prompt and a completion, both text, or messages")
    completion = without_end(completion, encoder)
    notes = []
    if encoder.encode(prompt + completion) != encoder.encode(prompt) + encoder.encode(completion):
        notes.append(MERGED)
    parts = [(encoder.encode_prompt(prompt), False)]
    parts.append((encode_answer(completion, encoder) if completion else [], True))
    return cut_answer(parts, n_max, notes), notes


def read_conversation(row, encoder, n_max):  # -> [(ids, whether they are learned), ...], notes
    """Encode a conversation. If it has more than n_max ids, it loses its oldest messages.

    A last answer of n_max ids or more loses its end. notes: as read_completion's.
    """
    for key in ("tools", "functions"):
        if row.get(key):
            raise ValueError(f"{key} are not supported; leave them out")
    messages = check_messages(row["messages"])
    learned = [i for i, message in enumerate(messages) if is_learned_answer(message, encoder)]
    n_empty = sum(is_empty_answer(message, encoder) for message in messages)
    notes = [EMPTY_ANSWER] if n_empty and learned else []
    parts = encode_messages(messages, encoder)
    if count_ids(parts) <= n_max or not learned:
        return parts, notes
    messages = messages[: learned[-1] + 1]  # nothing is learned from what follows
    parts = encode_messages(messages, encoder)
    room = n_max - least_room(len(parts[-1][0]), n_max)
    latest = encode_latest(messages, encoder, room)
    if count_ids(latest) < count_ids(parts):
        notes.append(FORGOTTEN)
    return cut_answer(latest, n_max, notes), notes


def count_ids(parts):
    return sum(len(ids) for ids, _ in parts)


def cut_answer(parts, n_max, notes):  # -> parts, which mark may still cut on the left
    """Cut the end of the last part if it would not fit even alone; add CUT_AT_THE_END to notes."""
    *before, (answer, is_learned) = parts
    n = max(least_room(len(answer), n_max), n_max - count_ids(before))
    if n < len(answer):
        notes.append(CUT_AT_THE_END)
    return [*before, (answer[:n], is_learned)]


def least_room(n_answer, n_max):  # -> how many of n_max ids an answer gets, whatever its prompt
    """The answer is whole if that leaves room for an id before it; otherwise it gets a quarter."""
    return n_answer if n_answer < n_max else max(1, n_max // 4)


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


def hold_out(examples, rules=RULES):  # -> those to train on, those to validate with
    """Hold out a tenth, at least one, drawn at random: always the same ones of as many examples."""
    n = max(1, len(examples) // 10)
    if rules == RULES:
        held_out = set(draw_some(len(examples), n))
    else:
        held_out = set(range(min(10, len(examples)) - 1, len(examples), 10))
    parts = [], []
    for number, example in enumerate(examples):
        parts[number in held_out].append(example)
    return parts


def draw_some(n, n_drawn):  # -> n_drawn of the numbers below n, all if there are no more
    """Draw without replacement, as prepare.py draws documents."""
    numbers = draw(np.arange(n, dtype=np.uint64), 0, SEED)
    return np.argsort(numbers, kind="stable")[:n_drawn]


def thin(rows, n_most, rules=RULES):  # [n_rows, n] -> at most n_most of them
    """Draw rows to validate with if there are more than that. pack puts the longest first."""
    return rows[:n_most] if rules != RULES else rows[np.sort(draw_some(len(rows), n_most))]
