"""Examples to learn from: JSON lines, packed into rows of ids that say what is to be learned.

    {"prompt": "The capital of France is", "completion": " Paris."}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

These are the forms of OpenAI's finetuning and of TRL's "prompt-completion" and "conversational"
data sets. The model learns the completion, or every answer, and the <|endoftext|> at its end; it
only reads the rest. Many examples fit into a row. None sees the others: marks that are added to
the ids say where each begins.
"""

import math
from bisect import bisect_left, insort

import numpy as np

from corpus.chat import check_messages, encode_answer, encode_messages
from model_files.vocabulary import MOST_IDS
from plumbing.cli import count
from plumbing.files import check_file, parse_json

# Marks that are added to an id, which is smaller than both.
READ = MOST_IDS  # only read: the model need not predict it
BEGINS = 2 * MOST_IDS  # the first token of an example


def is_examples(data):  # the --data flag
    return data.endswith(".jsonl")


def load_examples(path, encoder, n_most):  # -> examples, and a line about them for people
    """Each example is int32, at most n_most marked ids. Those with nothing to learn are left out.

    A bad line is a ValueError, which names the file and the line's number.
    """
    check_file(path, math.inf)
    examples, n_cut, n_apart, n_empty = [], 0, 0, 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            parts, is_apart = read_example(line, f"{path}, line {number}", encoder)
            example = mark(parts, n_most)
            if not is_learned(example).any():
                n_empty += 1
                continue
            examples.append(example)
            n_cut += sum(len(ids) for ids, _ in parts) > n_most
            n_apart += is_apart
    words = [
        f"{n_cut} cut on the left to fit" * (n_cut > 0),
        f"{n_empty} left out with nothing to learn" * (n_empty > 0),
        f"{n_apart} whose completion would have merged with the prompt" * (n_apart > 0),
    ]
    return examples, ", ".join([count(len(examples), "example"), *filter(None, words)])


def read_example(line, where, encoder):  # -> [(ids, whether they are learned), ...], is_apart
    """is_apart: encoded as one text, the prompt and the completion would share a token.

    Here they are encoded apart, so that the prompt never holds a part of what is to be written.
    """
    item = parse_json(line, where)
    prompt, completion, messages = map(item.get, ("prompt", "completion", "messages"))
    if "messages" in item:
        try:
            check_messages(messages)
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from None
        return encode_messages(messages, encoder), False
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(f"{where}: expected a prompt and a completion, both text, or messages")
    ids, answer = encoder.encode(prompt), encoder.encode(completion)
    is_apart = encoder.encode(prompt + completion) != ids + answer
    if completion:
        answer = encode_answer(completion, encoder)
    return [(encoder.encode_prompt(prompt), False), (answer, True)], is_apart


def mark(parts, n_most):  # [(ids, whether they are learned), ...] -> [n] int32, the last n_most
    """An example's first token is never learned: there is nothing to predict it from."""
    marked = [id + (0 if learned else READ) for ids, learned in parts for id in ids][-n_most:]
    example = np.array(marked, np.int32)
    example[:1] |= READ | BEGINS
    return example


def is_learned(marked):  # [...] -> [...] bool
    return marked & READ == 0


def pack(examples, n):  # [arrays of at most n] -> [n_rows, n]
    """Puts each, longest first, into the fullest row with room. Empty places are not learned.

    Best fit decreasing (Johnson 1973) makes few rows, so that little computing is wasted.
    """
    rows, rooms = [], []  # rooms: (how much, in which row), sorted
    for example in sorted(examples, key=len, reverse=True):
        i = bisect_left(rooms, (len(example), 0))
        room, row = rooms.pop(i) if i < len(rooms) else (n, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        insort(rooms, (room - len(example), row))
    packed = np.full((len(rows), n), READ | BEGINS, np.int32)
    for filled, row in zip(packed, rows, strict=True):
        ids = np.concatenate(row)
        filled[: len(ids)] = ids
    return packed


def hold_out(examples):  # -> those to train on, those to validate with
    """Every tenth is for validation; of fewer than ten, the last one."""
    n = min(10, len(examples))
    return [e for i, e in enumerate(examples, 1) if i % n], examples[n - 1 :: n]
