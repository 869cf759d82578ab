"""Files to documents, for prepare.py: of any size, in a few formats, a megabyte at a time.

A source is a file: text, JSON lines or Parquet, plain or compressed. `cut_source` cuts it into
spans that end where a document ends, and reads little of it; `read_span` yields the documents of a
span. So several processes can read one file, each its own spans, and none holds much of it.

A document, or a part of one that is long, is a tuple (position, text, ends): where the whole
document begins in its file, the bytes of this part, and whether the document ends with it.
"""

import codecs
import contextlib
import glob
import gzip
import itertools
import json
import os
import re
import sys
import uuid
import zlib
from pathlib import Path

import regex

from encoder import mend_surrogates
from plumbing.cli import count

BLOCK = 2**20  # bytes that are read at a time
MOST_LINE = 2**28  # bytes of a line of JSON: it is parsed whole, in several times its size
NEWLINE = ord("\n")
SHORTER = "the file became shorter while it was read"
FORMATS = {  # endings of names. A new format also has a line in cut_source and one in read_span
    "text": [".txt", ".text", ".md"],
    "json": [".jsonl", ".ndjson", ".json"],
    "parquet": [".parquet"],
}
PACKED = [".gz", ".zst"]

# Where a long text may be cut without changing its ids: before the white-space character that
# precedes a word, and between a letter or digit and a sign. Searched from the end.
CUT = regex.compile(r"(?r)(?=\s\S)|(?<=[\p{L}\p{N}])(?=[^\s\p{L}\p{N}])")

# --- From words of the command line to files, and from files to spans --------------------------


def find_files(inputs, leave_out):  # words of the command line -> [paths]
    """The files, in the order of the words; the files of a folder or a glob are sorted by name.

    Hidden files of a folder are left out, and all files of the folder `leave_out`.
    """
    files, left_out = [], []
    for name in inputs:
        if name == "-" or os.path.isfile(name):
            files.append(name)
        elif os.path.isdir(name):
            inside = sorted(p for p in Path(name).rglob("*") if p.is_file())
            inside = [
                p for p in inside if not p.absolute().is_relative_to(Path(leave_out).absolute())
            ]
            shown = [
                str(p) for p in inside if not any(x[0] == "." for x in p.relative_to(name).parts)
            ]
            files += filter(format_of, shown)
            left_out += itertools.filterfalse(format_of, shown)
        elif found := sorted(filter(os.path.isfile, glob.glob(name, recursive=True))):
            files += found
        elif os.path.exists(name):
            raise ValueError(f"{name}: not a regular file; - reads standard input")
        else:
            raise FileNotFoundError(f"{name}: no such file, folder or pattern")
    if left_out:
        ends = ", ".join(sorted({Path(p).suffix or Path(p).name for p in left_out})[:8])
        files_left_out = count(len(left_out), "file")
        notice(f"left out {files_left_out} of other kinds ({ends}): name them to include them")
    if not files:
        kinds = " ".join(itertools.chain(*FORMATS.values()))
        raise ValueError(
            f"nothing to prepare: name files, or folders that hold {kinds} [{', '.join(PACKED)}]"
        )
    return files


def format_of(path):  # -> a key of FORMATS by the name's ending, or None
    path = path.lower()
    plain = Path(path).stem if Path(path).suffix in PACKED else path
    return next((name for name, ends in FORMATS.items() if Path(plain).suffix in ends), None)


def describe(path, json_lines):  # -> a source
    """What the plan notes of a file: enough to notice, on the next run, that it has changed."""
    source = {"name": path, "format": format_of(path) or ("json" if json_lines else "text")}
    if path == "-":
        return source | {"n_bytes": None, "mtime_ns": None}
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path}: is UTF-16, not UTF-8: iconv -f UTF-16 -t UTF-8 converts it")
    status = os.stat(path)
    return source | {"n_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def is_same(source):
    """Is a source still what it was when it was described?"""
    try:
        status = os.stat(source["name"])
    except FileNotFoundError:
        return False
    return (status.st_size, status.st_mtime_ns) == (source["n_bytes"], source["mtime_ns"])


def cut_source(number, source, options, work_dir):  # yields spans
    """A span's file `path` is to be read from `start` to `stop`; it begins at the byte `offset` and
    after `line` lines of its source. `progress`: how many of the source's bytes it counts as.
    """
    name, n_bytes, n_most = source["name"], source["n_bytes"], options["shard_bytes"]
    span = {"source": number, "name": name, "path": os.path.abspath(name)}
    span |= {"format": source["format"]}
    span |= {"offset": 0, "line": 0, "temporary": False, "ends": True}
    span |= {"split": None, "val_from": None}  # which of its documents are for validation
    if source["format"] == "parquet":
        yield from cut_parquet(span, n_bytes, n_most)
        return
    border = {"text": b"\n" + options["separator"].encode(), "json": b""}[source["format"]]
    boundary = re.compile(re.escape(border) + rb"\r?\n")  # what a span ends with
    if name == "-" or Path(name).suffix.lower() in PACKED:
        yield from unpack(span, boundary, n_most, work_dir)
    else:
        start = 0
        while start < n_bytes:
            stop = min(find_boundary(name, start + n_most, boundary) or n_bytes, n_bytes)
            size = stop - start
            yield span | {"start": start, "stop": stop, "size": size, "progress": size}
            start = stop


def find_boundary(path, start, boundary):  # -> where the first one from `start` on ends, or None
    with open(path, "rb") as file:
        file.seek(start)
        held, at = b"", start
        while block := file.read(BLOCK):
            held += block
            if found := boundary.search(held):
                return at + found.end()
            at += max(0, len(held) - len(boundary.pattern))
            held = held[-len(boundary.pattern) :]  # a boundary may lie across two blocks
    return None


def cut_parquet(span, n_bytes, n_most):
    """Spans of whole row groups: `start` and `stop` are numbers of row groups."""
    try:
        with open(span["path"], "rb") as file:
            groups = open_parquet(file).metadata
    except ValueError as error:
        raise ValueError(f"{span['name']}: {error.args[0]}") from None
    sizes = [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
    start = size = 0
    for stop, more in enumerate(sizes, 1):
        size += more
        if size >= n_most or stop == len(sizes):
            progress = n_bytes * size // max(1, sum(sizes))
            yield span | {"start": start, "stop": stop, "size": size, "progress": progress}
            start, size = stop, 0


def unpack(span, boundary, n_most, work_dir):
    """Unpacks what cannot be cut in place: each span gets its own file, deleted after use."""
    with contextlib.ExitStack() as stack:
        if span["name"] != "-":
            packed = stack.enter_context(open(span["name"], "rb"))
        elif sys.stdin is None:
            raise ValueError("standard input is closed")
        else:
            packed = sys.stdin.buffer
        file, n_read = None, 0
        for piece, ends in cut_stream(read_packed(packed, span["name"]), boundary, n_most):
            if file is None:
                path = os.path.join(work_dir, uuid.uuid4().hex)
                file = stack.enter_context(open(path, "wb"))
                n_lines = 0
            file.write(piece)
            n_lines += piece.count(b"\n")
            if ends:
                file.close()
                size = os.path.getsize(path)
                span |= {"path": path, "start": 0, "stop": size, "size": size, "temporary": True}
                n_now = packed.tell() if span["name"] != "-" else n_read + size
                yield span | {"progress": n_now - n_read}
                span |= {"offset": span["offset"] + size, "line": span["line"] + n_lines}
                file, n_read = None, n_now


def cut_stream(blocks, boundary, n_most):  # yields (bytes, whether a span ends with them)
    """Cuts where cut_source cuts a file: at the first boundary that begins after n_most bytes."""
    held, size = b"", 0  # size: bytes of the span before `held`
    for block in blocks:
        held += block
        while found := boundary.search(held, max(0, n_most - size)):
            yield held[: found.end()], True
            held, size = held[found.end() :], 0
        done = max(0, len(held) - len(boundary.pattern))
        yield held[:done], False
        held, size = held[done:], size + done
    yield held, True


def read_packed(file, name):  # yields bytes
    """The content of a compressed file, or of standard input. ValueError if it is cut short."""
    try:
        if name.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as plain:
                yield from iter(lambda: plain.read(BLOCK), b"")
        elif name.lower().endswith(".zst"):
            yield from read_zst(file, name)
        else:
            yield from iter(lambda: file.read(BLOCK), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}: not gzip, or cut short ({error})") from None


def read_zst(file, name):
    """Zstandard frames one after the other. Reads few bytes at once: four may unpack to 131072."""
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"{name}: reading it needs zstandard: pip install zstandard") from None
    frame = None
    try:
        while bite := file.read(512):
            while bite:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(bite)
                bite = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise ValueError(f"{name}: not zstd, or damaged ({error})") from None
    if frame:
        raise ValueError(f"{name}: cut short")


def notice(text):
    print(f"notice: {text}", file=sys.stderr)


# --- From bytes to documents --------------------------------------------------------------------


def read_text(file, start, stop, separator):  # yields lists of parts
    """The documents of a span of text, split at lines that hold only the separator."""
    line = re.compile(re.escape(separator.encode()) + rb"\r?(?:\n|\Z)")
    held, at, document, begun, new_line = b"", start, start, False, True
    file.seek(start)
    while True:
        block = file.read(min(BLOCK, stop - at - len(held)))
        held += block
        complete = held.rfind(b"\n") + 1 if block else len(held)
        parts, used = [], 0
        for found in line.finditer(held, 0, complete):
            end = found.start()
            if not found[0] or (held[end - 1] != NEWLINE if end else not new_line):
                continue  # only the end of a longer line, so no separator
            if begun or end > used:  # between two separators in a row there is no document
                parts.append((document, held[used:end], True))
            used, begun = found.end(), False
            document = at + used
        rest = held[used:] if used else held
        if not block:
            if at + len(held) < stop:
                raise ValueError(SHORTER, at)
            if begun or rest:
                parts.append((document, rest, True))
            yield parts
            return
        if len(rest) >= BLOCK:
            if len(held) - complete < len(separator) + 2:  # may be half a separator
                rest = held[used:complete] or rest
            rest = rest[: find_cut(rest)]
            parts.append((document, rest, False))
            used, begun = used + len(rest), True
        if used:
            new_line = held[used - 1] == NEWLINE
            held, at = held[used:], at + used
        yield parts


def find_cut(text):  # bytes -> position
    """The last position where the text may be cut, or else the end of its last whole character.

    A megabyte with no white space and no sign has no such position. Only there the ids differ from
    those of the whole text; but without a cut, nothing would limit the memory.
    """
    for n in (2**12, 2**16, len(text)):
        utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        window = utf8.decode(text[-n:])  # without the bytes of a last, incomplete character
        rest = len(utf8.getstate()[0])
        found = CUT.search(window)
        if found and found.start() > 4:  # the first 3 may be bytes of a character
            return (
                len(text) - rest - len(window[found.start() :].encode("utf-8", "surrogateescape"))
            )
    return len(text) - rest


def read_json_lines(file, start, stop, field):  # yields lists of parts
    """The documents of a span of JSON lines; ValueError says which line is wrong."""
    file.seek(start)
    parts, n_bytes, at = [], 0, start
    while at < stop:
        line = file.readline(MOST_LINE + 1)
        if not line:
            raise ValueError(SHORTER, at)
        if len(line) > MOST_LINE:
            raise ValueError(f"a line of more than {MOST_LINE} bytes", at)
        if line.strip():
            parts += cut_long(at, text_of_line(line, field, at))
        at += len(line)
        n_bytes += len(line)
        if n_bytes >= BLOCK:
            yield parts
            parts, n_bytes = [], 0
    yield parts


def text_of_line(line, field, at):
    """A ValueError has `at` as its second argument; read_span turns it into a line's number."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({getattr(error, 'msg', error)})", at) from None
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        names = ", ".join(map(repr, list(row)[:8])) if isinstance(row, dict) else ""
        there = f"it has {names or 'none'}" if isinstance(row, dict) else "it is not an object"
        raise ValueError(f"no text in the field {field!r} ({there})", at)
    return mend_surrogates(text).encode()


def read_parquet(file, start, stop, field):  # yields lists of parts
    """The documents of some row groups; their positions are the numbers of their rows."""
    table = open_parquet(file)
    if field not in table.schema_arrow.names:
        raise ValueError(f"no column {field!r}, only {', '.join(table.schema_arrow.names)}", None)
    row = sum(table.metadata.row_group(i).num_rows for i in range(start))
    batches = table.iter_batches(64, row_groups=list(range(start, stop)), columns=[field])
    while batch := next_batch(batches):
        parts = []
        for value in batch.column(0):  # one at a time: a few bytes may stand for long texts
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"row {row}: {error}", None) from None
            if not isinstance(text, str):
                raise ValueError(f"row {row} has no text in the column {field!r}", None)
            parts += cut_long(row, text.encode())
            if len(text) >= BLOCK:
                yield parts
                parts = []
        yield parts


def next_batch(batches):
    """The next batch, None after the last; ValueError for what pyarrow cannot read."""
    try:
        return next(batches, None)
    except Exception as error:  # pyarrow has OSError, ValueError and others for damage
        raise ValueError(f"damaged ({error})", None) from None


def open_parquet(file):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{file.name}: needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"not Parquet, or cut short ({error})", None) from None


def read_span(span, options):  # yields lists of parts, none of them much longer than a block
    """The documents of a span, whatever its format, without empty ones."""
    read, option = {
        "text": (read_text, "separator"),
        "json": (read_json_lines, "field"),
        "parquet": (read_parquet, "field"),
    }[span["format"]]
    try:
        with open(span["path"], "rb") as file:
            yield from read(file, span["start"], span["stop"], options[option])
    except ValueError as error:
        if len(error.args) != 2:
            raise
        problem, at = error.args
        line = "" if at is None else f"line {line_number(span, at)}: "
        raise ValueError(f"{span['name']}: {line}{problem}") from None


def cut_long(position, text):  # yields the parts of a document
    start = 0
    while len(text) - start > 2 * BLOCK:
        stop = start + find_cut(text[start : start + BLOCK])
        yield position, text[start:stop], False
        start = stop
    if text:
        yield position, text[start:], True


def line_number(span, at):
    """The number of the line that begins at a position, counted from the start of its source."""
    number = span["line"] + 1
    with open(span["path"], "rb") as file:
        while n := min(BLOCK, at - file.tell()):
            number += file.read(n).count(b"\n")
    return number
