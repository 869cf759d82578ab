"""Files to documents: of any size, in several formats, a megabyte at a time.

A source is a file: text, JSON lines or Parquet, also compressed. `cut_source` cuts it into spans
that end where a document ends, and reads little of it; `read_span` yields the documents of a span.
So several processes can read one file, each its own spans, and none holds much of it in memory.
`read_documents` does both, for a text that fits into memory.

A new format is a row in FORMATS, at the end of this file, and the two functions that it names.
"""

import codecs
import contextlib
import glob
import itertools
import json
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import regex

from corpus.compression import COMPRESSIONS, read_blocks
from encoder import ENDOFTEXT, mend_surrogates
from plumbing.cli import count

BLOCK = 2**20  # bytes that are read at a time
MOST_LINE = 2**28  # bytes of a line of JSON: it is parsed whole, in several times its size
NEWLINE = ord("\n")
SHORTER = "the file became shorter while it was read"
# How files begin that hold no text, {what they are: their first bytes}.
BINARY = {
    "PDF": b"%PDF-",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "7-Zip": b"7z\xbc\xaf\x27\x1c",
    "zip": b"PK\x03\x04",
    "Arrow": b"ARROW1",
    "NumPy's": b"\x93NUMPY",
    "SQLite": b"SQLite format 3\0",
    "gzip, but its name does not end in .gz": b"\x1f\x8b\x08",
    "Zstandard, but its name does not end in .zst": b"\x28\xb5\x2f\xfd",
    "Parquet, but its name does not end in .parquet": b"PAR1",
}
# Files that describe a data set of Hugging Face's, beside its data.
ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
LIST_HINT = ": jq -c '.[]' turns a list into JSON lines"
END = ENDOFTEXT.encode()  # separates documents in every format
N_START = 4096  # bytes by which a file is judged

# Where a long text can be cut without changing its ids: before the white-space character that
# precedes a word, and between a letter or digit and a sign. Searched from the end.
CUT = regex.compile(r"(?r)(?=\s\S)|(?<=[\p{L}\p{N}])(?=[^\s\p{L}\p{N}])")


@dataclass(frozen=True)
class Options:
    """How texts are read and divided. The first two matter to formats, all of them to prepare.py.

    They stand in an interrupted run's plan.json, in this order.
    """

    separator: str = ENDOFTEXT  # the line between the documents of a text
    field: str = "text"  # the field or column with the text, in JSON lines and Parquet
    seed: int = 1337  # of the draw of documents for validation
    val_fraction: float = 0.01  # share of the documents that are drawn
    last_fraction: float = 0.1  # share of the text that is for validation if documents are few
    shard_bytes: int = 32_000_000  # of text


class Source(NamedTuple):
    """A file, as plan.json describes it: enough to notice, on the next run, that it has changed."""

    name: str  # "-" is standard input
    format: str  # a key of FORMATS
    n_bytes: int | None
    mtime_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of a source that ends where a document ends."""

    source: int  # the number of its source
    name: str  # its source's name, for error messages
    path: str  # the file to read it from: its source, or what was unpacked of it
    format: str
    start: int = 0  # in the file: the first byte, or row group of Parquet
    stop: int | None = None
    size: int = 0  # bytes of text, roughly
    progress: int = 0  # bytes of the source that it counts as
    offset: int = 0  # position in the source of the byte 0 of the file
    line: int = 0  # lines of the source before the file
    temporary: bool = False  # is the file deleted after use?
    ends: bool = True  # is its last document complete?
    split: str | None = None  # "train" or "val"; None if each document is drawn
    val_from: int | None = None  # documents from this position on are for validation
    extra: object = None  # what its format needs to know besides, such as a table's header


class Part(NamedTuple):
    """A document, or a part of a long one. A null in place of a text has neither text nor end."""

    position: int  # where the whole document begins in its span's file
    text: bytes
    ends: bool  # does the document end with this part?

    @property
    def is_null(self):
        return not self.text and not self.ends


class Format(NamedTuple):
    """A format of text.

    cut(span, options, work_dir) yields the spans of a whole file, which is the given span; files
    that it needs go into work_dir. read(file, span, options) yields lists of the Parts in a span.
    """

    endings: tuple[str, ...]  # of files' names
    cut: Callable
    read: Callable
    divisible: bool = False  # can a document be cut at any byte?


class BadText(ValueError):
    """What is wrong with a text, and where: a position in the span's file, or None."""

    def __init__(self, problem, position=None):
        super().__init__(problem)
        self.problem = problem
        self.position = position


# --- From words of the command line to sources --------------------------------------------------


def find_files(inputs, leave_out):  # words of the command line -> [paths]
    """Return the files, in the order of the words; those of a folder or a glob sorted by name.

    A folder's hidden files are left out, and all files in the folder `leave_out`.
    """
    files, files_left_out = [], []
    for name in inputs:
        if name == "-" or os.path.isfile(name):
            files.append(name)
            continue
        if os.path.isdir(name):
            paths = list_folder(name, leave_out)
            texts = without_descriptions(list(filter(format_of, paths)))
            files += texts
            files_left_out += sorted(set(paths) - set(texts))
            continue
        paths = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        files += paths
        if not paths and os.path.exists(name):
            raise ValueError(f"{name}: not a regular file; - reads standard input")
        if not paths:
            raise FileNotFoundError(f"{name}: no such file, folder or pattern")
    n_twice = len(files) - len({os.path.realpath(path) for path in files})
    if n_twice:
        notice(f"{count(n_twice, 'file')} named more than once: read each time")
    if files_left_out:
        shown = ", ".join(sorted(set(map(kind_of, files_left_out)))[:8])
        n_left_out = count(len(files_left_out), "file")
        notice(f"left out {n_left_out} of other kinds ({shown}): name them to include them")
    if not files:
        endings = " ".join(ending for format in FORMATS.values() for ending in format.endings)
        packed = ", ".join(COMPRESSIONS)
        raise ValueError(
            f"nothing to prepare: name files, or folders that hold {endings} [{packed}]"
        )
    return files


def without_descriptions(paths):  # the texts of a folder -> those that are data
    """Leave out what describes a data set, and its README.md unless the data are Markdown."""
    paths = [path for path in paths if Path(path.lower()).name not in ABOUT_DATA]
    if all(path.lower().endswith(".md") for path in paths):
        return paths
    return [path for path in paths if Path(path.lower()).name != "readme.md"]


def list_folder(folder, leave_out):  # -> the paths of its visible files, sorted
    leave_out = Path(leave_out).absolute()
    paths = []
    for path in sorted(walk(Path(folder), set())):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_hidden or path.absolute().is_relative_to(leave_out):
            continue
        if path.is_file():
            paths.append(str(path))
        elif path.is_symlink() and not path.exists():
            notice(f"left out {path}: a link to a file that does not exist")
    return paths


def walk(folder, seen):  # yields the paths in it, those in linked folders as well
    """`seen`: the real folders so far. Each is read once, so a link to its parent ends."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from walk(path, seen)
        else:
            yield path


def format_of(path):  # -> a key of FORMATS by the ending of the file's name, or None
    path = Path(path.lower())
    ending = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    for name, format in FORMATS.items():
        if ending in format.endings:
            return name
    return None


def kind_of(path):  # -> its ending, or the whole name if that says more
    path = Path(path)
    return path.name if format_of(str(path)) else path.suffix or path.name


def describe(path, json_lines=False):  # -> Source
    """Describe a file. json_lines: is it JSON lines if its name does not say what it is?"""
    format = format_of(path) or ("json" if json_lines else "text")
    if path == "-":
        return Source(path, format, None, None)
    if format != "parquet" and not is_compressed(path):
        with open(path, "rb") as file:
            check_start(file.read(N_START), path)
    status = os.stat(path)
    return Source(path, format, status.st_size, status.st_mtime_ns)


def is_compressed(path):
    return Path(path).suffix.lower() in COMPRESSIONS


def check_start(start, name):  # a text's first bytes
    """Raises ValueError, which names the file, if they are UTF-16's, or those of no text at all."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{name}: is UTF-16, not UTF-8: iconv -f UTF-16 -t UTF-8 converts it")
    for order, i in (("LE", 1), ("BE", 0)):  # the half of each unit that is 0 in English
        zeros = start[i::2].count(0)
        n_others = start[1 - i :: 2].count(0)
        if len(start) >= 4 and n_others == 0 and 2 * zeros > len(start[i::2]):
            encoding = f"UTF-16{order}"
            raise ValueError(
                f"{name}: is UTF-16, not UTF-8: iconv -f {encoding} -t UTF-8 converts it"
            )
    for kind, magic in BINARY.items():
        if start.startswith(magic):
            if kind == "bzip2" and start[4:10] != b"1AY&SY":  # "BZh" can begin a text
                continue
            raise ValueError(f"{name}: not text, but {kind}: unpack or convert it first")
    if start[257:262] == b"ustar":
        raise ValueError(f"{name}: not text, but a tar archive: unpack it first")


def checked(blocks, name):  # yields the same blocks of bytes
    """Check how unpacked text, or standard input, begins: as check_start."""
    blocks = iter(blocks)
    start = b""
    for block in blocks:
        start += block
        if len(start) >= N_START:
            break
    check_start(start[:N_START], name)
    yield start
    yield from blocks


def is_same(source):
    """Is a file still the same as when it was described?"""
    try:
        status = os.stat(source.name)
    except FileNotFoundError:
        return False
    return (status.st_size, status.st_mtime_ns) == (source.n_bytes, source.mtime_ns)


def notice(text):
    print(f"notice: {text}", file=sys.stderr)


# --- From sources to documents, whatever the format ---------------------------------------------


def cut_source(number, source, options, work_dir):  # yields Spans
    """Cut a source into spans of about shard_bytes. Compressed files are unpacked to work_dir."""
    span = Span(
        source=number,
        name=source.name,
        path=os.path.abspath(source.name),
        format=source.format,
        stop=source.n_bytes,
    )
    yield from FORMATS[source.format].cut(span, options, work_dir)


def read_span(span, options):  # yields lists of Parts, none of them much longer than a block
    """Read the documents of a span, without empty ones. Null texts are Parts that say so.

    Raises ValueError, which names the source and the line, for what cannot be read.
    """
    try:
        with open(span.path, "rb") as file:
            yield from FORMATS[span.format].read(file, span, options)
    except BadText as error:
        line = "" if error.position is None else f"line {line_number(span, error.position)}: "
        raise ValueError(f"{span.name}: {line}{error.problem}") from None


def line_number(span, position):
    """Return the number of the line that begins at a position, counted from its source's start."""
    number = span.line + 1
    with open(span.path, "rb") as file:
        while file.tell() < position:
            block = file.read(min(BLOCK, position - file.tell()))
            if not block:
                raise ValueError(f"{span.name}: {SHORTER}")
            number += block.count(b"\n")
    return number


def delete_unpacked(spans):
    """Delete the files that were unpacked for some spans."""
    for path in {span.path for span in spans if span.temporary}:
        os.unlink(path)


def read_documents(path, options=None, json_lines=False):  # yields str
    """Read a file's documents, one by one and whole, in any of the formats, also compressed.

    Bytes that are not UTF-8 become U+FFFD, and a notice counts them. json_lines: as `describe`
    takes it. Raises ValueError or OSError, which name the file, if it cannot be read.
    """
    options = options or Options()
    source = describe(os.fspath(path), json_lines)
    n_replaced = n_null = 0
    with tempfile.TemporaryDirectory() as work_dir:
        for span in cut_source(0, source, options, work_dir):
            document = []
            for part in itertools.chain.from_iterable(read_span(span, options)):
                n_null += part.is_null
                document.append(part.text)
                if part.ends:
                    (text,), n = mend([b"".join(document)])
                    n_replaced += n
                    yield text.decode()
                    document = []
            delete_unpacked([span])
    if n_replaced:
        notice_replaced(n_replaced)
    if n_null:
        notice_null(n_null)


def read_lines(path):  # yields bytes
    """Read the lines of a file that may be compressed. Raises ValueError if it is no text."""
    describe(path)
    with open(path, "rb") as file:
        if not is_compressed(path):
            yield from file
            return
        rest = b""
        for block in checked(read_blocks(file, path, BLOCK), path):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line + b"\n"
            if len(rest) > MOST_LINE:
                raise ValueError(f"{path}: a line of more than {MOST_LINE} bytes")
        if rest:
            yield rest


def mend(texts):  # [bytes] -> [UTF-8], how many invalid sequences became U+FFFD
    try:
        b"\n".join(texts).decode()
        return texts, 0
    except UnicodeDecodeError:
        mended = [text.decode(errors="replace").encode() for text in texts]
    replacement = "\ufffd".encode()
    n_before = sum(text.count(replacement) for text in texts)
    n_after = sum(text.count(replacement) for text in mended)
    return mended, n_after - n_before


def notice_replaced(n):
    notice(f"{count(n, 'piece')} of invalid UTF-8 replaced by U+FFFD")


def notice_null(n):
    notice(f"left out {count(n, 'row')} whose text is null")


# --- Files that are cut at lines: in place or, if they are compressed, while they are unpacked ---


def cut_at(boundary, span, options, work_dir):  # a pattern of bytes, a whole file -> yields Spans
    """Cut at the first boundary after each shard_bytes of text."""
    if span.name == "-" or is_compressed(span.name):
        yield from unpack(boundary, span, options, work_dir)
        return
    n_bytes = span.stop
    start = 0
    while start < n_bytes:
        stop = find_boundary(span.name, start + options.shard_bytes, boundary)
        stop = n_bytes if stop is None else min(stop, n_bytes)
        yield replace(span, start=start, stop=stop, size=stop - start, progress=stop - start)
        start = stop


def find_boundary(path, start, boundary):  # -> the end of the first one from `start` on, or None
    n_overlap = len(boundary.pattern)  # a boundary can lie across two blocks
    with open(path, "rb") as file:
        file.seek(start)
        buffer = b""
        position = start  # of the buffer's first byte
        while block := file.read(BLOCK):
            buffer += block
            found = boundary.search(buffer)
            if found:
                return position + found.end()
            position += max(0, len(buffer) - n_overlap)
            buffer = buffer[-n_overlap:]
    return None


def unpack(boundary, span, options, work_dir):  # yields Spans
    """Unpack a file that cannot be cut in place: each span gets its own file."""
    with contextlib.ExitStack() as stack:
        if span.name != "-":
            packed = stack.enter_context(open(span.name, "rb"))
        elif sys.stdin is None:
            raise ValueError("standard input is closed")
        else:
            packed = sys.stdin.buffer
        blocks = checked(read_blocks(packed, span.name, BLOCK), span.name)
        file = None
        n_packed = 0  # bytes of the packed file that belong to earlier spans
        for piece, ends in cut_stream(blocks, boundary, options.shard_bytes):
            if file is None:
                path = os.path.join(work_dir, uuid.uuid4().hex)
                file = stack.enter_context(open(path, "wb"))
                n_lines = 0
            file.write(piece)
            n_lines += piece.count(b"\n")
            if ends:
                file.close()
                file = None
                size = os.path.getsize(path)
                n_packed_now = packed.tell() if span.name != "-" else n_packed + size
                yield replace(
                    span,
                    path=path,
                    temporary=True,
                    stop=size,
                    size=size,
                    progress=n_packed_now - n_packed,
                )
                n_packed = n_packed_now
                span = replace(span, offset=span.offset + size, line=span.line + n_lines)


def cut_stream(blocks, boundary, n_span):  # yields (bytes, whether a span ends with them)
    """Cut where cut_at cuts a file: at the first boundary that begins after n_span bytes."""
    buffer = b""
    n_before = 0  # bytes of the span before the buffer
    for block in blocks:
        buffer += block
        while found := boundary.search(buffer, max(0, n_span - n_before)):
            yield buffer[: found.end()], True
            buffer = buffer[found.end() :]
            n_before = 0
        n_done = max(0, len(buffer) - len(boundary.pattern))
        yield buffer[:n_done], False
        buffer = buffer[n_done:]
        n_before += n_done
    yield buffer, True


# --- Long documents -----------------------------------------------------------------------------


def cut_row(position, text):  # a row of JSON lines or of Parquet -> yields Parts
    """A row is a document, or several if <|endoftext|> is in it; all have the row's position."""
    if text is None:
        yield Part(position, b"", False)
        return
    for document in text.split(END):
        yield from cut_document(position, document)


def cut_document(position, text):  # yields Parts
    start = 0
    while len(text) - start > 2 * BLOCK:
        stop = start + find_cut(text[start : start + BLOCK])
        yield Part(position, text[start:stop], False)
        start = stop
    if text:
        yield Part(position, text[start:], True)


def find_cut(text):  # bytes -> position
    """Return the last position where the text can be cut, or the end of its last whole character.

    A megabyte with no white space and no sign has no such position. Only there the ids differ from
    those of the whole text; but without a cut, nothing would limit the memory.
    """
    for n_bytes in (2**12, 2**16, len(text)):
        utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        window = utf8.decode(text[-n_bytes:])
        n_incomplete = len(utf8.getstate()[0])  # bytes of a last, incomplete character
        found = CUT.search(window)
        if found and found.start() > 4:  # the first 3 can be bytes of a character
            after_cut = window[found.start() :].encode("utf-8", "surrogateescape")
            return len(text) - n_incomplete - len(after_cut)
    return len(text) - n_incomplete


# --- Plain text ---------------------------------------------------------------------------------


def cut_text(span, options, work_dir):  # yields Spans that end where a document ends
    """After a separator's line, or after <|endoftext|> in a line of other text.

    What follows must not look like a line of its own: each span is read as if it began a file.
    """
    separator = re.escape(options.separator.encode())
    boundary = rb"\n%s\r?\n" % separator
    if options.separator in ("", ENDOFTEXT):
        boundary += rb"|%s(?=[^\r\n<])" % re.escape(END)
    yield from cut_at(re.compile(boundary), span, options, work_dir)


def read_text(file, span, options):  # yields lists of Parts
    """Split a text at the lines that hold only the separator, and wherever <|endoftext|> is.

    A line that holds only <|endoftext|> goes with its end; within a line, only <|endoftext|> does.
    A byte order mark at the beginning of the source is not part of the text.
    """
    separator = options.separator.encode()
    line = rb"(?:%s|%s)\r?" % (re.escape(END), re.escape(separator))
    found_before_end = re.compile(rb"%s\n|%s" % (line, re.escape(END)))
    found_at_end = re.compile(rb"%s(?:\n|\Z)|%s" % (line, re.escape(END)))
    n_most = max(len(END), len(separator)) + 2  # bytes of what may be found
    buffer = b""
    file.seek(span.start)
    if span.start + span.offset > 0 or file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(span.start)
    position = file.tell()  # of the buffer's first byte
    document = position  # where the document that is being read begins
    is_begun = False  # has a part of it been made?
    at_line_start = True  # is the buffer's first byte the first of its line?
    while True:
        block = file.read(min(BLOCK, span.stop - position - len(buffer)))
        buffer += block
        pattern = found_before_end if block else found_at_end
        # What begins later may be incomplete.
        n_certain = max(0, len(buffer) - n_most) if block else len(buffer)
        parts = []
        n_used = 0
        for found in pattern.finditer(buffer):
            start, end = found.span()
            if start >= n_certain or start == end:
                break
            follows_newline = buffer[start - 1] == NEWLINE if start else at_line_start
            if not follows_newline:
                if not found[0].startswith(END):
                    continue  # only the end of a longer line, so not a separator
                end = start + len(END)
            if is_begun or start > n_used:  # between two separators in a row there is no document
                parts.append(Part(document, buffer[n_used:start], True))
            n_used = end
            is_begun = False
            document = position + n_used
        if not block:
            if position + len(buffer) < span.stop:
                raise BadText(SHORTER, position)
            rest = buffer[n_used:]
            if is_begun or rest:
                parts.append(Part(document, rest, True))
            yield parts
            return
        if n_certain - n_used >= BLOCK:
            rest = buffer[n_used:n_certain]
            rest = rest[: find_cut(rest)]
            parts.append(Part(document, rest, False))
            n_used += len(rest)
            is_begun = True
        if n_used:
            at_line_start = buffer[n_used - 1] == NEWLINE
            buffer = buffer[n_used:]
            position += n_used
        yield parts


# --- JSON lines ---------------------------------------------------------------------------------


def cut_json_lines(span, options, work_dir):  # yields Spans of whole lines
    yield from cut_at(re.compile(rb"\r?\n"), span, options, work_dir)


def read_json_lines(file, span, options):  # yields lists of Parts
    """Each line is an object, whose field options.field is a document."""
    file.seek(span.start)
    position = span.start
    parts = []
    n_bytes = 0  # of the lines that the parts are from
    while position < span.stop:
        line = file.readline(MOST_LINE + 1)
        if not line:
            raise BadText(SHORTER, position)
        if len(line) > MOST_LINE:
            raise BadText(f"a line of more than {MOST_LINE} bytes", position)
        if line.strip():
            parts += cut_row(position, text_of_line(line, options.field, position))
        position += len(line)
        n_bytes += len(line)
        if n_bytes >= BLOCK:
            yield parts
            parts = []
            n_bytes = 0
    yield parts


def text_of_line(line, field, position):  # bytes -> UTF-8, or None for null
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = LIST_HINT if line.strip() == b"[" else ""
        raise BadText(f"not JSON ({getattr(error, 'msg', error)}){hint}", position) from None
    if not isinstance(row, dict):
        hint = LIST_HINT if isinstance(row, list) else ""
        raise BadText(f"no text in the field {field!r} (it is not an object){hint}", position)
    text = row.get(field)
    if field in row and text is None:
        return None
    if not isinstance(text, str):
        names = ", ".join(map(repr, list(row)[:8])) or "none"
        raise BadText(f"no text in the field {field!r} (it has {names})", position)
    return mend_surrogates(text).encode()


# --- Parquet ------------------------------------------------------------------------------------


def cut_parquet(span, options, work_dir):  # yields Spans
    """Spans of whole row groups: `start` and `stop` are numbers of row groups."""
    try:
        with open(span.path, "rb") as file:
            metadata = open_parquet(file).metadata
    except BadText as error:
        raise ValueError(f"{span.name}: {error.problem}") from None
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    start = 0
    size = 0
    for stop, group_size in enumerate(sizes, 1):
        size += group_size
        if size >= options.shard_bytes or stop == len(sizes):
            progress = span.stop * size // max(1, sum(sizes))
            yield replace(span, start=start, stop=stop, size=size, progress=progress)
            start = stop
            size = 0


def read_parquet(file, span, options):  # yields lists of Parts
    """Read the documents of some row groups; their positions are the numbers of their rows."""
    table = open_parquet(file)
    columns = table.schema_arrow.names
    if options.field not in columns:
        raise BadText(f"no column {options.field!r}, only {', '.join(columns)}")
    row_groups = list(range(span.start, span.stop))
    row = sum(table.metadata.row_group(i).num_rows for i in range(span.start))
    batches = table.iter_batches(64, row_groups=row_groups, columns=[options.field])
    while batch := next_batch(batches):
        parts = []
        for value in batch.column(0):  # one at a time: a few bytes can stand for long texts
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise BadText(f"row {row}: {error}") from None
            if text is None:
                parts += cut_row(row, None)
                continue
            if not isinstance(text, str):
                raise BadText(f"row {row} has no text in the column {options.field!r}")
            parts += cut_row(row, text.encode())
            if len(text) >= BLOCK:
                yield parts
                parts = []
        yield parts


def next_batch(batches):
    """Return the next batch, None after the last. Raises BadText if pyarrow cannot read it."""
    try:
        return next(batches, None)
    except Exception as error:  # for damage, pyarrow raises OSError, ValueError and others
        raise BadText(f"damaged ({error})") from None


def open_parquet(file):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{file.name}: needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadText(f"not Parquet, or cut short ({error})") from None


FORMATS = {
    "text": Format((".txt", ".text", ".md"), cut_text, read_text, divisible=True),
    "json": Format((".jsonl", ".ndjson", ".json"), cut_json_lines, read_json_lines),
    "parquet": Format((".parquet",), cut_parquet, read_parquet),
}
