"""Jobs: a worker turns the spans of a job into two numbered shards and a note about them.

A job can be done anywhere, any number of times, even by two workers at once: its cuts, its order
and its random numbers follow from the files alone, and its note is written last.
"""

import contextlib
import hashlib
import itertools
import json
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.documents import FORMATS, cut_source, mend, read_span
from encoder import get_encoder
from model_files.vocabulary import CHAR_OF_BYTE
from plumbing.files import read_json, write_whole

SPLITS = ["train", "val"]
FEW_DRAWN = 10  # if a draw would give validation fewer documents than this, there is no draw
MOST_AHEAD = 2**31  # bytes that are read at most to see whether there are few documents
BORDER = 2**16  # bytes on each side of a border in which an added token is looked for
WORK = ".work"  # a folder inside the shards' folder, for unfinished files


class Job(NamedTuple):
    """Work for one worker: spans to encode into the shards of a number, or files to checksum."""

    number: int | None = None
    spans: tuple = ()
    files: dict = {}  # {a source's name: the path to read it from}


# --- From spans to jobs ------------------------------------------------------------------------


def make_jobs(sources, options, work_dir):  # yields Jobs
    """Spans in order, small ones together, so that a job has about shard_bytes to read."""
    spans = itertools.chain.from_iterable(
        cut_source(i, source, options, work_dir) for i, source in enumerate(sources)
    )
    group = []
    size = 0
    numbers = itertools.count()
    for span in divide_few(spans, options):
        group.append(span)
        size += span.size
        if size >= options.shard_bytes:
            yield Job(next(numbers), tuple(group))
            group = []
            size = 0
    if group:
        yield Job(next(numbers), tuple(group))


class Document(NamedTuple):
    """Where a document is: the index of its span, its position there, and its size."""

    span: int
    position: int
    n_bytes: int


def divide_few(spans, options):  # -> the same spans or, for few documents, parts of them
    """For few documents, give validation the last part of the text: a draw would be too uneven.

    Documents are few if a draw would give validation fewer than FEW_DRAWN of them on average.
    """
    if not options.val_fraction:
        return spans
    n_enough = FEW_DRAWN / max(options.val_fraction, 1e-9)
    spans_ahead = []
    documents = []
    size = 0
    for span in spans:
        for part in itertools.chain.from_iterable(read_span(span, options)):
            if part.is_null:
                continue
            document = Document(len(spans_ahead), part.position, len(part.text))
            if documents and documents[-1][:2] == document[:2]:  # another part of the same one
                documents[-1] = document._replace(n_bytes=documents[-1].n_bytes + len(part.text))
            else:
                documents.append(document)
            if len(documents) >= n_enough:
                break
        spans_ahead.append(span)
        size += span.size
        if len(documents) >= n_enough or size > MOST_AHEAD:
            return itertools.chain(spans_ahead, spans)
    if not documents:
        return spans_ahead
    return divide_last_part(spans_ahead, documents, options.last_fraction)


def divide_last_part(spans, documents, fraction):  # -> [Span]
    """Cut where the last `fraction` of the bytes begins: in a text right there, or between rows."""
    n_bytes = sum(document.n_bytes for document in documents)
    n_train = int(n_bytes * (1 - fraction))
    ends = np.cumsum([document.n_bytes for document in documents])
    k = min(int(np.searchsorted(ends, n_train, side="right")), len(documents) - 1)
    document = documents[k]
    n_before_cut = n_train - int(ends[k] - document.n_bytes)  # bytes of that document
    i = document.span
    if FORMATS[spans[i].format].divisible:
        divided = cut_span(spans[i], document, n_before_cut)
    else:
        if 2 * n_before_cut > document.n_bytes:  # the document's end is nearer
            k += 1
        k = max(1, min(k, len(documents) - 1))  # at least one document on each side
        if k < len(documents):
            i = documents[k].span
            val_from = documents[k].position
        else:
            val_from = 2**63
        divided = [replace(spans[i], val_from=val_from)]
    train = [replace(span, split="train") for span in spans[:i]]
    val = [replace(span, split="val") for span in spans[i + 1 :]]
    return [*train, *divided, *val]


def cut_span(span, document, n_before_cut):  # -> three Spans, the last for validation
    """Return what is before a document, its first n_before_cut bytes, and everything after them."""
    start = document.position
    with open(span.path, "rb") as file:
        cut = file.seek(start + n_before_cut)
        next_bytes = file.read(3)
    # Move past the other bytes of a character, so as not to cut it.
    cut += len(next_bytes) - len(next_bytes.lstrip(bytes(range(0x80, 0xC0))))
    # Only the last span counts any bytes, so that the three stay in one job.
    train = replace(span, size=0, progress=0, split="train")
    return [
        replace(train, stop=start),
        replace(train, start=start, stop=cut, ends=cut == start + document.n_bytes),
        replace(span, split="val", start=cut),
    ]


# --- A job: from documents to shards ------------------------------------------------------------

encoders = {}  # a worker reads the tokenizer once


def read_or_empty(path):
    """Return the JSON object in a file, or an empty one if the file is missing or broken."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_json(path, n_most=2**30)  # it can name many files
    return {}


def do_job(job, out, options, dtype):  # -> its note: counts of what is in its shards
    """Write the shards of a job, then its note. Each file is complete or absent.

    A machine that was thought lost may do the same job at the same time: that does no harm. For
    files, return {name: checksum}.
    """
    if job.files:
        return {name: checksum(path) for name, path in job.files.items()}
    number = f"{job.number:06d}"
    work_dir = os.path.join(out, WORK)
    shards = {split: os.path.join(out, f"{split}_{number}.bin") for split in SPLITS}
    temporary = {split: os.path.join(work_dir, f"{split}_{uuid.uuid4().hex}") for split in SPLITS}
    note_file = Path(work_dir, f"{number}.json")
    fingerprint = fingerprint_of(job.spans)
    note = read_or_empty(note_file)
    if is_done(note, fingerprint, shards, dtype):
        return note
    if out not in encoders:
        encoders[out] = get_encoder("", out)
    try:
        note = {"spans": fingerprint}
        note |= write_shards(job.spans, temporary, encoders[out], options, dtype)
        for split in SPLITS:
            if note["n_tokens"][split]:
                os.replace(temporary[split], shards[split])
            elif os.path.exists(shards[split]):  # left by another draw
                os.unlink(shards[split])
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or out) from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    write_whole(note_file, json.dumps(note))
    return note


def fingerprint_of(spans):  # -> SHA-256, hexadecimal
    """Of all that decides which documents the spans hold, and the documents' splits."""
    fields = [
        [span.source, span.offset, span.start, span.stop, span.split, span.val_from]
        for span in spans
    ]
    return hashlib.sha256(repr(fields).encode()).hexdigest()


def is_done(note, fingerprint, shards, dtype):
    """Is the note of the same spans, and are the shards as large as the note says?"""
    if note.get("spans") != fingerprint:
        return False
    sizes = {s: os.path.getsize(path) for s, path in shards.items() if os.path.exists(path)}
    n_bytes = {split: dtype.itemsize * n for split, n in note["n_tokens"].items()}
    return all(sizes.get(split, 0) == n for split, n in n_bytes.items())


def write_shards(spans, paths, encoder, options, dtype):  # -> the note
    """Encode the documents of some spans into the files `paths`, one per split, and count them."""
    note = {"n_tokens": dict.fromkeys(SPLITS, 0), "n_documents": dict.fromkeys(SPLITS, 0)}
    note |= {"n_bytes": 0, "n_replaced": 0, "n_null": 0}
    with open(paths["train"], "wb") as train, open(paths["val"], "wb") as val:
        files = {"train": train, "val": val}
        for span in spans:
            joints = {split: Joint(encoder) for split in SPLITS}
            for parts in read_span(span, options):
                by_split = split_parts(parts, span, options)
                for split in SPLITS:
                    pieces = add_parts(by_split[split], split, span, joints[split], note)
                    note["n_tokens"][split] += write_ids(pieces, files[split], encoder, dtype)
            for split in SPLITS:
                pieces = joints[split].rest()
                note["n_tokens"][split] += write_ids(pieces, files[split], encoder, dtype)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return note


def split_parts(parts, span, options):  # [Part] -> {split: [Part]}
    """Divide parts between the splits, as their span says or, if it does not, by draw."""
    if span.val_from is not None:
        is_val = [part.position >= span.val_from for part in parts]
    elif span.split is not None:
        is_val = [span.split == "val"] * len(parts)
    else:
        positions = np.array([part.position for part in parts], np.uint64)
        numbers = draw(positions + np.uint64(span.offset), span.source, options.seed)
        is_val = (numbers < options.val_fraction).tolist()
    by_split = {"train": [], "val": []}
    for part, val in zip(parts, is_val, strict=True):
        by_split["val" if val else "train"].append(part)
    return by_split


def add_parts(parts, split, span, joint, note):  # -> [Piece]
    """Count some parts of a split in the note, and return the pieces that can be encoded now."""
    ends = [part.ends and span.ends for part in parts]
    texts, n_replaced = mend([part.text for part in parts])
    note["n_documents"][split] += sum(ends)
    note["n_bytes"] += sum(map(len, texts))
    note["n_replaced"] += n_replaced
    note["n_null"] += sum(part.is_null for part in parts)
    pieces = []
    for text, end in zip(texts, ends, strict=True):
        if text or end:  # otherwise it is a null
            pieces += joint.add(text, end)
    return pieces


class Piece(NamedTuple):
    """A text to encode by itself: a document, or a part of one."""

    text: bytes
    begins: bool  # is it the document's beginning?
    ends: bool  # is it the document's end?


class Joint:
    """Where the parts of a long document meet. A part waits for the next one.

    If an added token lies across the border between them, or right before it, the border moves to
    the token's beginning.
    """

    def __init__(self, encoder):
        self.encoder = encoder
        self.waiting = None  # a Piece, which does not end its document

    def add(self, text, ends):  # -> [Piece], those that can be encoded now
        pieces = []
        if self.waiting is not None:
            before, text = self.move_border(self.waiting.text, text)
            pieces.append(self.waiting._replace(text=before))
        piece = Piece(text, self.waiting is None, ends)
        self.waiting = None if ends else piece
        return [*pieces, piece] if ends else pieces

    def rest(self):  # -> [Piece], what still waits at the end of a span
        waiting, self.waiting = self.waiting, None
        return [waiting] if waiting else []

    def move_border(self, before, after):  # two texts that meet -> the same, cut elsewhere
        head = before[-BORDER:].decode(errors="ignore")
        tail = after[:BORDER].decode(errors="ignore")
        start = self.encoder.start_of_added(head + tail, len(head))
        n_moved = len(head[start:].encode())
        n_kept = len(before) - n_moved
        return before[:n_kept], before[n_kept:] + after


def write_ids(pieces, file, encoder, dtype):  # -> how many
    ids = encode(pieces, encoder, dtype)
    file.write(ids)
    return len(ids)


def draw(positions, source, seed):  # [n] uint64 -> [n] float64 from 0 to 1, one per document
    """Hash (seed, source, position): every worker gets the same number at any time.

    The mixing function is splitmix64's (Steele et al. 2014).
    """
    key = np.random.SeedSequence([seed, source]).generate_state(1, np.uint64)
    x = key + positions * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)) * 2.0**-53


def encode(pieces, encoder, dtype):  # [Piece] -> [n] ids
    """Encode the pieces, with the id of <|endoftext|> after each one that ends a document."""
    if encoder.is_byte_model:  # a table is enough; 0xFF, which UTF-8 never has, ends a document
        table = [encoder.vocab[CHAR_OF_BYTE[byte]] for byte in range(255)] + [encoder.endoftext]
        texts = []
        for piece in pieces:
            texts.append(piece.text)
            if piece.ends:
                texts.append(b"\xff")
        return np.array(table, dtype)[np.frombuffer(b"".join(texts), np.uint8)]
    ids = []
    for piece in pieces:
        ids += encoder.encode(piece.text.decode(), begins=piece.begins)
        if piece.ends:
            ids.append(encoder.endoftext)
    return np.fromiter(ids, dtype, len(ids))


def checksum(path):  # -> SHA-256, hexadecimal
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
