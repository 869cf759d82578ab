"""Tasks: a worker turns the spans of a task into two numbered shards and a note about them.

A task can be done anywhere, any number of times, even by two workers at once: its cuts, order and
random numbers follow from the files alone, and its note is written last.
"""

import contextlib
import hashlib
import itertools
import json
import operator
import os
import uuid
from pathlib import Path

import numpy as np

from corpus.documents import cut_source, read_span
from encoder import get_encoder
from model_files.vocabulary import CHAR_OF_BYTE
from plumbing.files import read_json, write_whole

SPLITS = ["train", "val"]
FEW_DRAWN = 10  # with fewer documents for validation, they are not drawn
MOST_AHEAD = 2**31  # bytes that are read at most to see whether there are few documents
WORK = ".work"  # a folder inside the shards' folder, for what is not complete

# --- From spans to tasks ------------------------------------------------------------------------


def make_tasks(sources, options, work_dir):  # yields {"number": ..., "spans": [...]}
    """Spans in order, small ones together, so that a task has about shard_bytes to read."""
    cut = [cut_source(i, source, options, work_dir) for i, source in enumerate(sources)]
    spans = split_few(itertools.chain.from_iterable(cut), options)
    group, size, numbers = [], 0, itertools.count()
    for span in spans:
        group.append(span)
        size += span["size"]
        if size >= options["shard_bytes"]:
            yield {"number": next(numbers), "spans": group}
            group, size = [], 0
    if group:
        yield {"number": next(numbers), "spans": group}


def split_few(spans, options):  # -> the same spans or, for few documents, parts of them
    """With few documents, the last part of the text is for validation: a draw would be too uneven.

    Few means: a draw would give validation fewer than FEW_DRAWN of them on average.
    """
    ahead, documents, size = [], [], 0  # documents: (its span's place in ahead, position, n_bytes)
    enough = FEW_DRAWN / max(options["val_fraction"], 1e-9)
    for span in spans if options["val_fraction"] else ():
        for position, text, _ in itertools.chain.from_iterable(read_span(span, options)):
            if documents and documents[-1][:2] == (len(ahead), position):
                documents[-1] = len(ahead), position, documents[-1][2] + len(text)
            else:
                documents.append((len(ahead), position, len(text)))
            if len(documents) >= enough:
                break
        ahead.append(span)
        size += span["size"]
        if len(documents) >= enough or size > MOST_AHEAD:
            return itertools.chain(ahead, spans)
    if not documents:
        return itertools.chain(ahead, spans)
    return split_last_part(ahead, documents, options["last_fraction"])


def split_last_part(spans, documents, fraction):  # of split_few -> spans
    """Cuts where the last `fraction` of the bytes begins: text right there, rows between two."""
    n_bytes = sum(n for _, _, n in documents)
    n_train, ends = int(n_bytes * (1 - fraction)), np.cumsum([n for _, _, n in documents])
    k = min(int(np.searchsorted(ends, n_train, side="right")), len(documents) - 1)
    i, position, n = documents[k]
    offset = n_train - int(ends[k] - n)  # bytes of that document before the cut
    if spans[i]["format"] == "text":
        border = cut_text(spans[i], position, offset, n)
    else:
        k += 2 * offset > n  # the row's nearer end, with at least one row on each side
        k = max(1, min(k, len(documents) - 1))
        i = documents[k][0] if k < len(documents) else i
        border = [spans[i] | {"val_from": documents[k][1] if k < len(documents) else 2**63}]
    train = [span | {"split": "train"} for span in spans[:i]]
    return [*train, *border, *(span | {"split": "val"} for span in spans[i + 1 :])]


def cut_text(span, position, offset, n):  # -> three spans, the last for validation
    """What is before a document of n bytes, its first `offset` bytes, and all that follows."""
    with open(span["path"], "rb") as file:
        at = file.seek(position + offset)
        following = file.read(3)  # so as not to cut a character
        at += len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))
    # Only the last span counts any bytes, so that the three stay in one task.
    none = {"size": 0, "progress": 0}
    return [
        span | none | {"split": "train", "stop": position},
        span | none | {"split": "train", "start": position, "stop": at, "ends": at == position + n},
        span | {"split": "val", "start": at},
    ]


# --- A task: from documents to shards -----------------------------------------------------------

encoders = {}  # a worker reads the tokenizer once


def read_or_empty(path):
    """The JSON object in a file, or an empty one if the file is missing or broken."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_json(path, n_most=2**30)  # it may name many files
    return {}


def do_task(task, out, options):  # -> its note: counts of what is in its shards
    """Write the shards of a task, then its note. Each file is whole or absent.

    A machine that was thought lost may do the same task at the same time: that does no harm.
    """
    if "checksums" in task:
        return {name: checksum(path) for name, path in task["checksums"].items()}
    number, work_dir = f"{task['number']:06d}", os.path.join(out, WORK)
    shards = {split: os.path.join(out, f"{split}_{number}.bin") for split in SPLITS}
    names = {split: os.path.join(work_dir, f"{split}_{uuid.uuid4().hex}") for split in SPLITS}
    note_file = Path(work_dir, f"{number}.json")
    about = hashlib.sha256(repr([cut_of(span) for span in task["spans"]]).encode()).hexdigest()
    if is_done(note := read_or_empty(note_file), about, shards, options):
        return note
    if out not in encoders:
        encoders[out] = get_encoder("", out)
    try:
        note = {"spans": about} | write_shards(task["spans"], names, encoders[out], options)
        for split in SPLITS:
            if note["n_tokens"][split]:
                os.replace(names[split], shards[split])
            elif os.path.exists(shards[split]):  # left by another draw
                os.unlink(shards[split])
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or out) from None
    finally:
        for name in names.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    write_whole(note_file, json.dumps(note))
    return note


def cut_of(span):  # what decides which documents the span holds, and their split
    return [span[key] for key in ("source", "offset", "start", "stop", "split", "val_from")]


def is_done(note, about, shards, options):
    """Is the note about the same spans, and are the shards as large as the note says?"""
    if note.get("spans") != about:
        return False
    width = np.dtype(options["dtype"]).itemsize
    sizes = {split: os.path.getsize(p) for split, p in shards.items() if os.path.exists(p)}
    return all(sizes.get(split, 0) == width * n for split, n in note["n_tokens"].items())


def write_shards(spans, names, encoder, options):  # -> the note
    """Encode the documents of some spans into the files `names`, one per split, and count them."""
    note = {"n_tokens": dict.fromkeys(SPLITS, 0), "n_documents": dict.fromkeys(SPLITS, 0)}
    note |= {"n_bytes": 0, "n_replaced": 0}
    with open(names["train"], "wb") as train, open(names["val"], "wb") as val:
        for span in spans:
            for parts in read_span(span, options):
                add_parts(parts, span, {"train": train, "val": val}, encoder, options, note)
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    return note


def add_parts(parts, span, files, encoder, options, note):
    """Encode some parts, append them to their split's file, and count them in the note."""
    drawn = [span["split"] == "val"] * len(parts)
    if span["val_from"] is not None:
        drawn = [position >= span["val_from"] for position, _, _ in parts]
    elif span["split"] is None:
        positions = np.array([position for position, _, _ in parts], np.uint64)
        numbers = draw(positions + np.uint64(span["offset"]), span["source"], options["seed"])
        drawn = (numbers < options["val_fraction"]).tolist()
    for split, chosen in ("train", map(operator.not_, drawn)), ("val", drawn):
        chosen = list(itertools.compress(parts, chosen))
        ends = [ends and span["ends"] for _, _, ends in chosen]
        texts, n_replaced = mend([text for _, text, _ in chosen])
        ids = encode(texts, ends, encoder, options["dtype"])
        files[split].write(ids)
        note["n_tokens"][split] += len(ids)
        note["n_documents"][split] += sum(ends)
        note["n_bytes"] += sum(map(len, texts))
        note["n_replaced"] += n_replaced


def draw(positions, source, seed):  # [n] uint64 -> [n] float64 from 0 to 1, one per document
    """A hash of (seed, source, position): every worker gets the same number at any time.

    The mixing function is splitmix64's (Steele et al. 2014).
    """
    key = np.random.SeedSequence([seed, source]).generate_state(1, np.uint64)
    x = key + positions * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)) * 2.0**-53


def mend(texts):  # [bytes] -> [UTF-8], how many invalid sequences became U+FFFD
    try:
        b"\n".join(texts).decode()
        return texts, 0
    except UnicodeDecodeError:
        mended = [text.decode(errors="replace").encode() for text in texts]
        sign = "\ufffd".encode()
        n_before, n_after = (sum(text.count(sign) for text in some) for some in (texts, mended))
        return mended, n_after - n_before


def encode(texts, ends, encoder, dtype):  # [UTF-8], [bool] -> [n] ids
    """The ids of the texts, with the id of <|endoftext|> after each text that ends."""
    if not encoder.merges:  # a table is enough. The byte 0xFF, never in UTF-8, ends a document
        table = [encoder.vocab[CHAR_OF_BYTE[byte]] for byte in range(255)] + [encoder.endoftext]
        data = b"".join(itertools.chain(*zip(texts, (b"\xff"[:end] for end in ends), strict=True)))
        return np.array(table, dtype)[np.frombuffer(data, np.uint8)]
    ids = []
    for text, end in zip(texts, ends, strict=True):
        ids += encoder.encode(text.decode())
        if end:
            ids.append(encoder.endoftext)
    return np.fromiter(ids, dtype, len(ids))


def checksum(path):  # -> SHA-256, hexadecimal
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete_unpacked(task):
    for path in {span["path"] for span in task["spans"] if span["temporary"]}:
        os.unlink(path)
