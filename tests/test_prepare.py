"""prepare.py and corpus/ against plain twins: whatever the format, the cuts, the workers."""

import gzip
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import REPO, SHAKESPEARE, on_linux
from hypothesis import given, settings
from hypothesis import strategies as st

import encoder as encoder_module
import prepare
from corpus import documents, jobs
from corpus.documents import Options, Span
from encoder import ENDOFTEXT, Encoder, get_encoder

OPTIONS = Options(seed=1, val_fraction=0.0, last_fraction=0.0)
fuzz = settings(max_examples=150, deadline=None, database=None, print_blob=True)
small = encoder_module.train(Path(encoder_module.__file__).read_text("utf-8"), 600)
FILES = {"meta.json", "vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"}


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)
    return random.Random(seed)


def run(*args, **options):
    """Where it asks for several workers, or Ray, as a person runs it; else here, by one worker."""
    workers = dict(zip(args, args[1:], strict=False)).get("--workers", 1)
    if str(workers) != "1" or "--ray" in args or "stdin" in options:
        return conftest.run("prepare.py", *args, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        return conftest.call("prepare.py", *args, **options)


def make(*args, **kwargs):
    code, out, err = run(*args, **kwargs)
    assert code == 0, err
    return out, err


def split_plainly(data, separator=ENDOFTEXT):
    """The documents of a text, line by line, then at <|endoftext|>; without the empty ones."""
    documents, document = [], b""
    for line in re.findall(rb"[^\n]*\n|[^\n]+", data):
        if line.removesuffix(b"\n").removesuffix(b"\r").decode() in (separator, ENDOFTEXT):
            documents.append(document)
            document = b""
        else:
            document += line
    within = [document.split(ENDOFTEXT.encode()) for document in [*documents, document]]
    return [document for parts in within for document in parts if document]


def ids_of(documents, encoder=None):
    """All documents' ids, each with <|endoftext|>, one after the other."""
    encoder = encoder or Encoder([])
    ids = []
    for document in documents:
        ids += [*encoder.encode(document.decode(errors="replace")), encoder.endoftext]
    return ids


def read(folder, split):
    """The ids of a folder's shards, by what the format says."""
    meta = json.loads((folder / "meta.json").read_text())
    names = sorted(path.name for path in folder.glob(f"{split}_*.bin"))
    assert names == [name for name in meta["shards"] if name.startswith(split)]
    shards = [
        np.fromfile(folder / name, "<u2" if meta["dtype"] == "uint16" else "<u4") for name in names
    ]
    assert [len(shard) for shard in shards] == [meta["shards"][name] for name in names]
    ids = np.concatenate([np.zeros(0, int), *shards]).tolist()
    assert len(ids) == meta["n_tokens"][split]
    assert ids.count(meta["endoftext"]) == meta["n_documents"][split]
    return ids


def documents_of(ids, encoder=None):
    encoder = encoder or Encoder([])
    text = encoder.decode(ids)
    assert text.endswith(ENDOFTEXT) or not text
    return text.split(ENDOFTEXT)[:-1]


def stories(rng, n, separator=ENDOFTEXT):
    """Short made-up documents with signs of several scripts."""
    words = [
        "a",
        "the",
        "king's",
        "hören",
        "Ж",
        "我们",
        "🙂",
        "x" * 70,
        "1984",
        "  ",
        "\t",
        "\n\n",
        "—",
    ]
    words = [word for word in words if separator or "\n\n" not in word]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) + f" {i}\n" for i in range(n)]
    return texts, f"{separator}\n".join(texts)


def tree(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def without_sources(files):
    """The files of a folder, without what in meta.json depends on the sources' names."""
    meta = json.loads(files["meta.json"])
    del meta["sha256"], meta["plan"]
    return files | {"meta.json": meta}


# From bytes to documents

lines = st.sampled_from(
    [
        ENDOFTEXT,
        ENDOFTEXT + "\r",
        " " + ENDOFTEXT,
        ENDOFTEXT + " ",
        f"one{ENDOFTEXT}two",
        f"one{ENDOFTEXT}",
        f"{ENDOFTEXT}two{ENDOFTEXT}{ENDOFTEXT}",
        "word" * 30 + ENDOFTEXT,
        "<|endoft",
        "",
        "\r",
        "word" * 9,
        "é 我 🙂",
        "a b c",
    ]
)
texts = st.lists(lines, max_size=12).map("\n".join)


def parts_of(data, read, options, path):
    path.write_bytes(data)
    span = Span(source=0, name="a", path=str(path), format="", stop=len(data))
    with open(path, "rb") as file:
        return [part for parts in read(file, span, options) for part in parts]


def joined(parts):
    whole, current = [], b""
    for _, text, ends in parts:
        current += text
        if ends:
            whole.append(current)
            current = b""
    assert current == b""
    return whole


@given(texts, st.integers(20, 80), st.sampled_from([ENDOFTEXT, "", "a b c"]))
@fuzz
def test_text_is_split_at_separator_lines_whatever_the_block(
    tmp_path_factory, text, block, separator
):
    path = tmp_path_factory.getbasetemp() / "text"
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", block)
        parts = parts_of(data, documents.read_text, Options(separator), path)
    assert joined(parts) == split_plainly(data, separator)
    assert all(text or ends for _, text, ends in parts)
    starts = {position for position, _, _ in parts}
    for document, start in zip(joined(parts), sorted(starts), strict=True):
        assert data[start : start + len(document)] == document


pieces = st.lists(
    st.sampled_from(
        ["a", "Z", "é", "我", "🙂", " ", "\n", "\u3000", "'s", "'", "7", "-", "\x1c", "\u0301"]
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=120,
).map("".join)


@given(pieces, st.integers(8, 40))
@fuzz
def test_the_parts_of_a_long_document_have_the_ids_of_the_whole(tmp_path_factory, text, block):
    """Unless there is no place to cut: then no byte is lost, and no character broken."""
    path, data = tmp_path_factory.getbasetemp() / "long", text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", block)
        parts = [part for _, part, _ in parts_of(data, documents.read_text, Options("never"), path)]
        others = [part for _, part, _ in documents.cut_document(0, data)]
    for some in (parts, others):
        assert b"".join(some) == data
        assert all(len(part) <= 2 * block + 8 for part in some)
        borders, at = [], 0
        for part in some[:-1]:
            part.decode()
            at += len(part)
            borders.append(len(data[:at].decode()))
        possible = {m.start() for m in documents.CUT.finditer(text)}
        if set(borders) <= possible:
            ids = [id for part in some for id in small.encode(part.decode())]
            assert ids == small.encode(text)


@given(pieces)
@fuzz
def test_every_place_to_cut_is_one(text):
    for found in documents.CUT.finditer(text):
        at = found.start()
        assert small.encode(text[:at]) + small.encode(text[at:]) == small.encode(text)


def test_the_cut_is_found_however_far_back():
    for n in (0, 10, 5000, 70000):
        tail = "我" * n
        text = ("word " * 20000 + tail).encode()
        cut = documents.find_cut(text)
        assert text[:cut].endswith(b"word") or n < 2
        assert documents.find_cut(text[: len(text) - 1]) <= len(text) - 1
    nothing = ("我" * 3000).encode()
    assert documents.find_cut(nothing[:-1]) == len(nothing) - 3  # before a broken character
    assert documents.find_cut(b"\xff" * 5000) == 5000


@given(st.lists(st.text(max_size=30), max_size=8), st.integers(8, 60))
@fuzz
def test_json_lines(tmp_path_factory, rows, block):
    data = b"".join(json.dumps({"id": 1, "text": row}).encode() + b"\n\n \n" for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", block)
        parts = parts_of(
            data, documents.read_json_lines, OPTIONS, tmp_path_factory.getbasetemp() / "json"
        )
    assert joined(parts) == [row.encode() for row in rows if row]


# From files to spans


@given(texts, st.integers(1, 90), st.integers(20, 50))
@fuzz
def test_spans_lose_nothing_and_are_the_same_packed(tmp_path_factory, text, n_most, block):
    folder = tmp_path_factory.getbasetemp()
    data = text.encode()
    (folder / "a.txt").write_bytes(data)
    (folder / "b.txt.gz").write_bytes(gzip.compress(data))
    options = replace(OPTIONS, shard_bytes=n_most)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", block)
        for name in ("a.txt", "b.txt.gz"):
            source = documents.describe(str(folder / name), False)
            cut = []
            for span in documents.cut_source(0, source, options, str(folder)):
                parts = [part for parts in documents.read_span(span, options) for part in parts]
                cut.append((joined(parts), [at + span.offset for at, _, _ in parts]))
            found.append([entry for entry in cut if entry[0]])
    assert found[0] == found[1]
    assert [d for whole, _ in found[0] for d in whole] == split_plainly(data)


@given(st.lists(texts, max_size=6), st.integers(1, 90))
@fuzz
def test_one_reader_gives_the_documents_of_any_format(tmp_path_factory, rows, n_span):
    """JSON lines, plain and packed, give each row; a text gives what lies between separators."""
    folder = tmp_path_factory.mktemp("one")
    lines = b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.JSON.gz").write_bytes(gzip.compress(lines))
    (folder / "c.rows").write_bytes(lines)
    text = "\n".join(rows)
    (folder / "d.md").write_text(text, "utf-8", newline="")
    options = replace(OPTIONS, shard_bytes=n_span)
    for name in ("a.jsonl", "b.JSON.gz", "c.rows"):
        found = documents.read_documents(folder / name, options, json_lines=name == "c.rows")
        assert list(found) == [part for row in rows for part in row.split(ENDOFTEXT) if part]
    found = list(documents.read_documents(folder / "d.md", options))
    assert found == [document.decode() for document in split_plainly(text.encode())]
    assert len(os.listdir(folder)) == 4


def test_one_reader_gives_long_documents_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 50)
    text = "many words, " * 100 + "\ufffd"
    (tmp_path / "a.txt").write_bytes(text.encode()[:-3] + b"\xff")
    assert list(documents.read_documents(tmp_path / "a.txt")) == [text]


def test_tasks_of_earlier_versions_are_recognized():
    """The fingerprint in a job's note is of this list, as it was when notes were introduced."""
    span = Span(source=0, name="a", path="/a", format="text", stop=8, size=8, progress=8)
    spans = [span, replace(span, source=1, offset=5, start=2, stop=4, split="val", val_from=7)]
    known = "[[0, 0, 0, 8, None, None], [1, 5, 2, 4, 'val', 7]]"
    assert jobs.fingerprint_of(spans) == hashlib.sha256(known.encode()).hexdigest()


# The command line


def test_a_text_of_many_documents(tmp_path, rng):
    texts, data = stories(rng, 300)
    (tmp_path / "a.txt").write_text(data, newline="")
    out, err = make(tmp_path / "a.txt", "--out", tmp_path / "s", "--val_fraction", "0.2")
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    train, val = (documents_of(read(tmp_path / "s", s)) for s in ("train", "val"))
    assert 20 < len(val) < 120 and sorted(train + val) == sorted(texts)
    assert [t for t in texts if t in set(train)] == train and [
        t for t in texts if t in set(val)
    ] == val
    assert meta["n_bytes"] == sum(len(text.encode()) for text in texts)
    assert (meta["dtype"], meta["n_vocab"], meta["endoftext"], meta["n_replaced"]) == (
        "uint16",
        257,
        256,
        0,
    )
    assert f"{meta['n_tokens']['train']} training" in out and err == ""
    assert set(tree(tmp_path / "s")) == FILES | {"train_000000.bin", "val_000000.bin"}
    make(tmp_path / "a.txt", "--out", tmp_path / "t", "--val_fraction", "0.2", "--seed", "2")
    assert documents_of(read(tmp_path / "t", "val")) != val
    make(tmp_path / "a.txt", "--out", tmp_path / "u", "--val_fraction", "0")
    assert read(tmp_path / "u", "train") == ids_of([text.encode() for text in texts])


def test_the_bytes_do_not_depend_on_workers_or_packing(tmp_path, rng):
    _, data = stories(rng, 3000)
    (tmp_path / "a.txt").write_text(data, newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data.encode()))
    small.save(tmp_path / "tokenizer")
    flags = ["--shard_mb", "0.02", "--val_fraction", "0.1", "--tokenizer", tmp_path / "tokenizer"]
    make(tmp_path / "a.txt", *flags, "--out", tmp_path / "one", "--workers", "1")
    make(tmp_path / "a.txt", *flags, "--out", tmp_path / "two", "--workers", "2")
    make(tmp_path / "b.txt.gz", *flags, "--out", tmp_path / "gz", "--workers", "3")
    with open(tmp_path / "a.txt", "rb") as file:
        make("-", *flags, "--out", tmp_path / "pipe", stdin=file)
    one = tree(tmp_path / "one")
    assert len(one) > 20 and one == tree(tmp_path / "two")
    assert without_sources(one) == without_sources(tree(tmp_path / "gz"))
    assert without_sources(one) == without_sources(tree(tmp_path / "pipe"))
    both = (
        documents_of(read(tmp_path / "one", "train"), small),
        documents_of(read(tmp_path / "one", "val"), small),
    )
    assert sorted(both[0] + both[1]) == sorted(d.decode() for d in split_plainly(data.encode()))


def test_every_format_gives_the_same_ids(tmp_path, rng):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    texts, data = stories(rng, 200)
    rows = "".join(json.dumps({"n": i, "body": t}) + "\n" for i, t in enumerate(texts)).encode()
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(rows[:5000]) + gzip.compress(rows[5000:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.ndjson.zst").write_bytes(pack(rows[:7000]) + pack(rows[7000:]))
    (tmp_path / "b.txt").write_text(data, newline="")
    table = pyarrow.table({"n": list(range(200)), "body": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    want = ids_of([text.encode() for text in texts])
    for name in ("a.jsonl", "a.json.gz", "a.ndjson.zst", "b.txt", "a.parquet"):
        flags = ["--field", "body", "--val_fraction", "0", "--shard_mb", "0.005"]
        make(tmp_path / name, *flags, "--out", tmp_path / "out" / name, "--workers", "2")
        assert read(tmp_path / "out" / name, "train") == want, name
        assert len(tree(tmp_path / "out" / name)) > 6
    done = run(
        "-",
        "--out",
        tmp_path / "out" / "pipe",
        "--field",
        "body",
        "--val_fraction",
        "0",
        input=rows,
    )
    assert done[0] == 0 and read(tmp_path / "out" / "pipe", "train") == want


def test_folders_globs_and_their_order(tmp_path):
    for name in (
        "corpus/b.txt",
        "corpus/a.md",
        "corpus/deep/c.txt",
        "corpus/.hidden/d.txt",
        "corpus/e.png",
        "z.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    out, err = make("corpus", "z.txt", "--out", "s", "--val_fraction", "0", cwd=tmp_path)
    names = ["corpus/a.md", "corpus/b.txt", "corpus/deep/c.txt", "z.txt"]
    assert documents_of(read(tmp_path / "s", "train")) == [f"text of {name}" for name in names]
    assert err == "notice: left out 1 file of other kinds (.png): name them to include them\n"
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    assert [s["name"] for s in meta["plan"]["sources"]] == names == list(meta["sha256"])
    sums = subprocess.run(
        ["sha256sum", *names], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    assert [line.split()[0] for line in sums.splitlines()] == list(meta["sha256"].values())
    make("corpus/*.txt", "--out", "t", "--val_fraction", "0", cwd=tmp_path)
    assert documents_of(read(tmp_path / "t", "train")) == ["text of corpus/b.txt"]
    make("corpus/e.png", "--out", "u", "--val_fraction", "0", cwd=tmp_path)  # named, so it counts
    assert documents_of(read(tmp_path / "u", "train")) == ["text of corpus/e.png"]
    make("z.txt", cwd=tmp_path)
    assert (tmp_path / "shards" / "z" / "meta.json").exists()


@pytest.mark.parametrize("n", [1, 2, 9, 10, 1000, 40000])
def test_one_document_is_cut_at_nine_tenths(tmp_path, n):
    text = ("é" * n)[: n - n // 3] + "x<|endoftext>" * (n // 30)  # that is no separator
    line = f"\n{ENDOFTEXT}\n".encode()
    for name, packed in (
        ("a.txt", text.encode()),
        ("b.txt", line[1:] + text.encode() + line[1:] * text.endswith("\n")),
        ("a.txt.gz", gzip.compress(text.encode())),  # of more than one shard's size, and in two
    ):
        (tmp_path / name).write_bytes(packed)
        make(tmp_path / name, "--out", tmp_path / f"{name}.out", "--shard_mb", "0.01")
        train, val = (read(tmp_path / f"{name}.out", split) for split in ("train", "val"))
        assert train + val == ids_of([text.encode()])
        assert abs(len(train) - 0.9 * len(text.encode())) <= 2
        assert "\ufffd" not in Encoder([]).decode(train)  # no character is cut


def test_shakespeare_is_the_classic_split(tmp_path):
    if not SHAKESPEARE.is_file():
        pytest.skip(f"tiny Shakespeare is not at {SHAKESPEARE} (set SIXTYGPT_DATA)")
    (tmp_path / "data").mkdir()
    text = SHAKESPEARE.read_bytes()
    (tmp_path / "data" / "shakespeare.txt").write_bytes(text)
    make("shakespeare", cwd=tmp_path)
    out = tmp_path / "shards" / "shakespeare"
    assert Encoder([]).decode(read(out, "train")).encode() == text[:1003854]
    assert Encoder([]).decode(read(out, "val")).encode() == text[1003854:] + ENDOFTEXT.encode()


# Learning a tokenizer


def test_a_tokenizer_is_learned_from_the_text(tmp_path, rng, monkeypatch):
    texts, data = stories(rng, 300)
    (tmp_path / "a.txt").write_text(data, newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data.encode()))
    flags = ["--train_tokenizer", "400", "--shard_mb", "0.005", "--val_fraction", "0"]
    make(tmp_path / "a.txt", *flags, "--out", tmp_path / "s")
    want = encoder_module.train(texts, 400)
    assert get_encoder("s", tmp_path).merges == want.merges
    assert read(tmp_path / "s", "train") == ids_of([text.encode() for text in texts], want)
    make(tmp_path / "b.txt.gz", *flags, "--out", tmp_path / "t")
    assert get_encoder("t", tmp_path).merges == want.merges

    monkeypatch.setattr(prepare, "TRAINING_BYTES", len(data.encode()) // 4)  # an even share of it
    sources = [documents.describe(str(tmp_path / "a.txt"), False)]
    options = replace(OPTIONS, shard_bytes=5000)
    seen = []
    monkeypatch.setattr(encoder_module, "train", lambda texts, n: seen.extend(texts))
    prepare.learn_tokenizer(400, sources, options, str(tmp_path))
    assert len(data.encode()) / 5 < len("".join(seen).encode()) < len(data.encode()) / 2
    assert seen[0] in texts[0] and seen[-1] in "".join(texts[-60:])


def test_released_tokenizers_are_asked_for_by_name(tmp_path):
    """Only the tokenizer of a released size is downloaded, and none where it is there already."""
    small.save(tmp_path / "models" / "124M")
    (tmp_path / "models" / "124M" / "config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("some text")
    make("a.txt", "--tokenizer", "124M", "--val_fraction", "0", cwd=tmp_path)
    assert read(tmp_path / "shards" / "a", "train") == ids_of([b"some text"], small)
    code, out, err = run("a.txt", "--tokenizer", "9M", "--out", "s", cwd=tmp_path)
    assert (code, out) == (2, "") and err.startswith("error: no model '9M': choose one of 124M,")
    assert not (tmp_path / "s").exists()


# Interruptions


def wait_for_notes(out, n, process):
    end = time.monotonic() + 60
    while len(list(out.glob(".work/0*.json"))) < n and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def corpus(tmp_path, rng):
    """Two files, one of them packed, of some 100 jobs; the flags; the folder that they make."""
    _, data = stories(rng, 6000)
    (tmp_path / "a.txt").write_text(data, newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data.encode()))
    small.save(tmp_path / "tokenizer")
    flags = [
        tmp_path / "a.txt",
        tmp_path / "b.txt.gz",
        "--shard_mb",
        "0.02",
        "--val_fraction",
        "0.1",
    ]
    flags += ["--tokenizer", tmp_path / "tokenizer"]
    make(*flags, "--out", tmp_path / "whole", "--workers", "2")
    return flags, tree(tmp_path / "whole")


def start(*args):
    command = [sys.executable, str(REPO / "prepare.py"), *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def alive(group):
    done = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True)
    return [state for state in done.stdout.split() if not state.startswith("Z")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGINT to all", "SIGTERM"])
def test_a_stopped_run_leaves_no_worker_and_goes_on(corpus, tmp_path, rng, how):
    flags, whole = corpus
    out = tmp_path / "out"
    process = start(*flags, "--out", out, "--workers", "2")
    wait_for_notes(out, rng.randrange(3, 60), process)
    sign = getattr(signal, how.split()[0])
    os.killpg(process.pid, sign) if how.endswith("all") else process.send_signal(sign)
    printed, err = process.communicate(timeout=30)
    assert printed == b""
    if sign == signal.SIGINT:
        assert (process.returncode, err) == (130, b"")
    end = time.monotonic() + 10
    while alive(process.pid):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.05)
    assert not (out / "meta.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    notes = {path.stem for path in out.glob(".work/0*.json")}
    assert notes
    assert all(whole[name] == (out / name).read_bytes() for name in done)  # none is half written
    make(*flags, "--out", out, "--workers", "2")
    assert tree(out) == whole
    for name, when in done.items():  # what had its note was not done again
        if name.split("_")[1].removesuffix(".bin") in notes:
            assert (out / name).stat().st_mtime_ns == when


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_line(corpus, tmp_path):
    flags, whole = corpus
    out = tmp_path / "out"
    process = start(*flags, "--out", out, "--workers", "2")
    wait_for_notes(out, 3, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True
    )
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    printed, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.decode().startswith("error: a worker was killed") and err.count(b"\n") == 1
    make(*flags, "--out", out, "--workers", "2")
    assert tree(out) == whole


@pytest.mark.parametrize("name", ["meta.json", ".work/plan.json"])
def test_a_pipe_among_what_an_earlier_run_left_is_not_waited_for(tmp_path, name):
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "out" / ".work").mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / name)
    command = ["prepare.py", tmp_path / "a.txt", "--out", tmp_path / "out"]
    code, _, err = conftest.run(*command, timeout=60)
    assert code == 0 or (code, err.count("\n")) == (2, 1) and str(tmp_path) in err


@pytest.mark.slow
def test_two_runs_into_one_folder(corpus, tmp_path):
    flags, whole = corpus
    out = tmp_path / "out"
    first = start(*flags, "--out", out, "--workers", "2")
    wait_for_notes(out, 1, first)
    first.send_signal(signal.SIGSTOP)  # it cannot end before the other has begun
    code, printed, err = run(*flags, "--out", out)
    first.send_signal(signal.SIGCONT)
    words = "another prepare.py is working there; wait for it, or name another --out"
    assert (code, printed, err) == (2, "", f"error: {out}: {words}\n")
    assert first.wait(60) == 0
    assert tree(out) == whole
    printed, err = make(*flags, "--out", out)  # all is done already
    assert "training" in printed and tree(out) == whole


def test_a_full_disk(corpus, tmp_path):
    flags, whole = corpus
    out = tmp_path / "out"

    for workers in (1, 2):
        command = [sys.executable, REPO / "prepare.py", *flags, "--out", out, "--workers", workers]
        limited = ["sh", "-c", 'ulimit -f 24; exec "$@"', "-", *map(str, command)]  # 12 kB a file
        done = subprocess.run(limited, capture_output=True, text=True, timeout=120)
        code, printed, err = done.returncode, done.stdout, done.stderr
        assert (code, printed, err) == (2, "", f"error: {out}: File too large\n")
        assert not list(out.glob("*.bin")) and not list(out.glob(".work/train*"))
    make(*flags, "--out", out)
    assert tree(out) == whole


# Bad input


def test_another_plan_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("other text")
    make("a.txt", "--out", "s", cwd=tmp_path)
    before = tree(tmp_path / "s")
    for flags, other in ((["b.txt"], "sources"), (["a.txt", "--seed", "7"], "seed")):
        code, out, err = run(*flags, "--out", "s", cwd=tmp_path)
        problem = f"s holds the shards of another run (other {other}); remove it, or name another"
        assert (code, out, err) == (2, "", f"error: {problem} folder with --out\n")
    assert run("-", "--out", "s", cwd=tmp_path, input=b"some text")[0] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    code, out, err = run("a.txt", "--out", "full", cwd=tmp_path)
    assert err == "error: full is not empty; remove it, or name another folder with --out\n"
    assert tree(tmp_path / "s") == before
    assert [p.name for p in (tmp_path / "full").iterdir() if p.is_file()] == ["thesis.tex"]
    (tmp_path / "a.txt").write_text("some more text")  # the same name, another text
    code, out, err = run("a.txt", "--out", "s", cwd=tmp_path)
    assert "(other sources)" in err


def damaged(data):
    """Some bytes in the middle turned round."""
    return data[:3000] + bytes(255 - byte for byte in data[3000:3100]) + data[3100:]


ROW = b'{"text": "a"}\n'
NOT_GZIP, NOT_ZSTD = "not gzip, or cut short (", "not zstd, or damaged ("
BROKEN = {
    "empty.txt": (b"", "there is no text in empty.txt"),
    "none.txt": (f"{ENDOFTEXT}\n{ENDOFTEXT}\n".encode(), "there is no text in none.txt"),
    "utf16.txt": ("text".encode("utf-16"), "utf16.txt: is UTF-16, not UTF-8: iconv"),
    "be.txt": ("text".encode("utf-16-be").join([b"\xfe\xff", b""]), "be.txt: is UTF-16, not"),
    "bad.txt.gz": (damaged(gzip.compress(os.urandom(9999))), f"bad.txt.gz: {NOT_GZIP}"),
    "cut.txt.gz": (gzip.compress(os.urandom(9999))[:-500], f"cut.txt.gz: {NOT_GZIP}"),
    "no.txt.gz": (b"plain text", f"no.txt.gz: {NOT_GZIP}"),
    "no.txt.zst": (b"plain text", f"no.txt.zst: {NOT_ZSTD}"),
    "no.parquet": (b"plain text", "no.parquet: not Parquet, or cut short ("),
    "a.jsonl": (
        ROW + b'\n{"b": 1}',
        "a.jsonl: line 3: no text in the field 'text' (it has 'b')",
    ),
    "list.jsonl": (
        b'["text"]\n',
        "list.jsonl: line 1: no text in the field 'text' (it is not an o",
    ),
    "cut.jsonl": (ROW + b'{"text": "b', "cut.jsonl: line 2: not JSON ("),
    "cut.jsonl.gz": (gzip.compress(ROW * 70 + b'{"text'), "cut.jsonl.gz: line 71: not JSON ("),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "latin.jsonl: line 1: not JSON ("),
    "deep.jsonl": (b"[" * 100000, "deep.jsonl: line 1: not JSON ("),
    "digits.jsonl": (ROW + b'{"text": ' + b"9" * 5000 + b"}", "digits.jsonl: line 2: not JSON ("),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_give_one_clear_line(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    content, problem = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    for workers in (1, 2):
        flags = ["--out", "out", "--workers", workers, "--shard_mb", "0.0001"]
        code, out, err = run(name, *flags, cwd=tmp_path)
        assert (code, out) == (2, "") and err.startswith("error: " + problem), err
        assert err.count("\n") == 1
        assert not (tmp_path / "out" / "meta.json").exists()
    if not list((tmp_path / "out").glob("*.bin")):  # what failed at once is not in the way
        (tmp_path / "good.txt").write_text("good")
        make("good.txt", "--out", "out", cwd=tmp_path)


def test_a_line_of_json_longer_than_may_be_held(tmp_path, monkeypatch):
    """Packed, ten gigabytes of one line are ten megabytes; and a row is held whole."""
    monkeypatch.setattr(documents, "MOST_LINE", 1000)
    row = json.dumps({"text": "x" * 988}).encode() + b"\n"
    assert len(row) == 1001
    for ending in ("", ".gz"):
        for rows, problem in ((ROW + row[1:], "not JSON"), (ROW + row, "a line of more than 1000")):
            path = tmp_path / f"a.jsonl{ending}"
            path.write_bytes(gzip.compress(rows) if ending else rows)
            with pytest.raises(ValueError, match=f"a.jsonl{ending}: line 2: {problem}"):
                read_here(path, tmp_path)
    (tmp_path / "a.jsonl").write_bytes(ROW + row.replace(b"xx", b"x", 1))
    assert [len(text) for text in read_here(tmp_path / "a.jsonl", tmp_path)] == [1, 987]


def read_here(path, work_dir):  # -> the parts of its documents
    options = replace(OPTIONS, shard_bytes=10**9)
    source = documents.describe(str(path), json_lines=False)
    spans = documents.cut_source(0, source, options, str(work_dir))
    return [
        text
        for span in spans
        for parts in documents.read_span(span, options)
        for _, text, _ in parts
    ]


def pack_zst(data, n):
    """A frame of n blocks of 128 KiB of one byte: four bytes each. RFC 8878, section 3.1.1."""
    block, last = (
        ((2**17 << 3) | 0b010).to_bytes(3, "little"),
        ((1 << 3) | 0b011).to_bytes(3, "little"),
    )
    return bytes.fromhex("28b52ffd0058") + n * (block + data) + last + data


BOMBS = {  # the first and the last of them are quick
    "spaces.txt.gz": lambda: gzip.compress(b" " * 10**7, 1) * 30,
    "letters.txt.gz": lambda: gzip.compress(b"a" * 10**7, 1) * 30,
    "lines.txt.gz": lambda: gzip.compress(b"\n" * 10**7, 1) * 30,
    "line.jsonl.gz": lambda: gzip.compress(b"[" * 10**7, 1) * 30,
    "letters.txt.zst": lambda: pack_zst(b"a", 2300),
}


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_300_megabytes_takes_little_memory(tmp_path, name):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(BOMBS[name]())
    assert os.path.getsize(tmp_path / name) < 2_000_000
    code = f"""if True:
        from corpus import documents
        documents.MOST_LINE = 2**20
        options = documents.{replace(OPTIONS, shard_bytes=32 * 10**6)!r}
        source = documents.describe({str(tmp_path / name)!r}, json_lines=False)
        n_bytes = 0
        try:
            for span in documents.cut_source(0, source, options, {str(tmp_path)!r}):
                n_bytes += span.size
                next(documents.read_span(span, options))
        except ValueError as error:
            print(error)
        print(n_bytes, *[x for x in open("/proc/self/status") if "VmHWM" in x])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    n_bytes, memory = (int(done.stdout.split()[i]) for i in (-4, -2))
    assert n_bytes > 299_000_000 and memory < 120_000  # KiB
    assert name != "line.jsonl.gz" or "line.jsonl.gz: line 1: a line of more than" in done.stdout


def test_a_zst_cut_short(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(secrets.token_bytes(100000))
    (tmp_path / "a.txt.zst").write_bytes(packed[:-100])
    code, out, err = run("a.txt.zst", "--out", "out", cwd=tmp_path)
    assert (code, out, err) == (2, "", "error: a.txt.zst: cut short\n")


def test_parquet_whose_text_is_no_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    latin = pyarrow.array([b"a", b"caf\xe9"]).view(pyarrow.string())
    for texts in (latin, [b"a", b"b"], [["a"]], [{"text": "a"}], [1, 2]):
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"a.parquet: row [12](: 'utf-8'| has no text in the)"):
            read_here(tmp_path / "a.parquet", tmp_path)


def test_rows_whose_text_is_null_are_left_out_and_counted(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [None, "one", None, "two", "", None]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    for name in ("a.parquet", "a.jsonl"):
        out, err = make(name, "--out", tmp_path / "out" / name, cwd=tmp_path)
        documents_made = [
            text
            for split in ("train", "val")
            for text in documents_of(read(tmp_path / "out" / name, split))
        ]
        assert documents_made == ["one", "two"]
        assert "2 documents" in out and "notice: left out 3 rows whose text is null\n" in err
        assert list(documents.read_documents(tmp_path / name)) == ["one", "two"]
    (tmp_path / "nothing.jsonl").write_text('{"text": null}\n')
    code, out, err = run("nothing.jsonl", "--out", "none", cwd=tmp_path)
    assert (code, out) == (2, "") and err == "error: there is no text in nothing.jsonl\n"


def test_files_about_a_data_set_are_not_its_text(tmp_path):
    """As the Hub and `datasets` lay them out: a card, and what save_to_disk writes."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"text": "one"}\n')
    for name in ("README.md", "dataset_info.json", "state.json"):
        (folder / name).write_text('{"license": "mit"}')
    out, err = make("set", "--out", "s", "--val_fraction", "0", cwd=tmp_path)
    assert documents_of(read(tmp_path / "s", "train")) == ["one"]
    kinds = "README.md, dataset_info.json, state.json"
    assert f"left out 3 files of other kinds ({kinds}): name them to include them" in err
    # A README.md among Markdown is a text like the others, and so is what is named.
    (folder / "data.jsonl").rename(folder / "data.md")
    make("set", "--out", "t", "--val_fraction", "0", cwd=tmp_path)
    assert len(documents_of(read(tmp_path / "t", "train"))) == 2
    make("set/README.md", "--out", "u", "--val_fraction", "0", cwd=tmp_path)
    assert documents_of(read(tmp_path / "u", "train")) == ['{"license": "mit"}']


@pytest.mark.slow
def test_rows_of_parquet_that_are_one_long_text(tmp_path):
    """A text that comes often is in the file but once, so the rows must not be held together."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 30), ["x" * 3_000_000])
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert os.path.getsize(tmp_path / "a.parquet") < 300_000
    source = documents.describe(str(tmp_path / "a.parquet"), json_lines=False)
    (span,) = documents.cut_source(0, source, replace(OPTIONS, shard_bytes=10**9), str(tmp_path))
    sizes = [sum(len(x) for _, x, _ in parts) for parts in documents.read_span(span, OPTIONS)]
    assert sum(sizes) == 30 * 3_000_000 and max(sizes) == 3_000_000


def test_parquet_without_the_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    code, out, err = run("a.parquet", "--out", "out", cwd=tmp_path)
    assert (code, err) == (2, "error: a.parquet: no column 'text', only body, n\n")
    code, out, err = run("a.parquet", "--out", "out", "--field", "n", cwd=tmp_path)
    assert (code, err) == (2, "error: a.parquet: row 1 has no text in the column 'n'\n")


FLAGS = [
    ("", "nothing to prepare; name files, folders, - or shakespeare"),
    ("gone.txt", "gone.txt: no such file, folder or pattern"),
    ("- a.txt", "- (standard input) cannot be combined with other inputs"),
    ("-", "name the folder for the shards with --out"),
    ("a.txt a.txt", "name the folder for the shards with --out"),
    ("a.txt --val_fraction 1", "val_fraction must be at least 0 and below 1, not 1.0"),
    ("a.txt --val_fraction nan", "val_fraction must be at least 0 and below 1, not nan"),
    ("a.txt --seed -1", "seed must be 0 or more and below 2**64, not -1"),
    ("a.txt --shard_mb 0", "shard_mb must be from 0.000001 to 1000000, not 0.0"),
    ("a.txt --seed 18446744073709551616", "seed must be 0 or more and below 2**64, not"),
    ("*.txt", "name the folder for the shards with --out"),
    ("pipe", "pipe: not a regular file; - reads standard input"),
    ("a.txt --workers 0", "workers must be 1 or more, not 0"),
    ("a.txt --separator=a\nb", "separator must be a single line"),
    (
        "a.txt --tokenizer x --train_tokenizer 300",
        "--tokenizer and --train_tokenizer cannot be used",
    ),
    (
        "a.txt --train_tokenizer 256",
        "train_tokenizer must be 257 (bytes and <|endoftext|>) or more",
    ),
    ("- --out s --train_tokenizer 300", "--train_tokenizer reads the text twice, so it cannot"),
    ("folder", "nothing to prepare: name files, or folders that hold .txt"),
]


@pytest.mark.parametrize("flags, problem", FLAGS)
def test_bad_flags_give_one_clear_line(tmp_path, flags, problem):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    code, out, err = run(*filter(None, flags.split(" ")), cwd=tmp_path, input=b"text")
    assert (code, out) == (2, "") and err.startswith("error: " + problem), err
    assert err.count("\n") == 1


def test_strange_bytes_are_counted_and_the_rest_is_kept(tmp_path):
    data = b"caf\xe9 \x00 na\xc3\xafve \xff\xfe\n" + f"{ENDOFTEXT}\n".encode() + "fine �\n".encode()
    (tmp_path / "a.txt").write_bytes(data)
    for tokenizer in ([], ["--tokenizer", tmp_path / "small"]):
        small.save(tmp_path / "small")
        out, err = make(
            tmp_path / "a.txt",
            "--out",
            tmp_path / f"s{len(tokenizer)}",
            "--val_fraction",
            "0",
            *tokenizer,
        )
        found = read(tmp_path / f"s{len(tokenizer)}", "train")
        wanted = [data.split(b"<")[0], "fine �\n".encode()]
        assert found == ids_of(wanted, small if tokenizer else None)
        assert err == "notice: 3 pieces of invalid UTF-8 replaced by U+FFFD\n"


@pytest.mark.slow
@on_linux
def test_a_line_of_many_blocks_and_bounded_memory(tmp_path):
    """30 MB in one line, with spaces and without: read, encoded and written in little memory."""
    script = (
        "import sys, prepare; prepare.main(*sys.argv[1:3], out=sys.argv[3], workers=1);"
        "print(*[line for line in open('/proc/self/status') if 'VmHWM' in line])"
    )
    (tmp_path / "a.txt").write_bytes(b"one line of words " * 1_600_000)
    (tmp_path / "b.jsonl").write_bytes(json.dumps({"text": "x" * 3_000_000}).encode())
    command = [
        sys.executable,
        "-c",
        script,
        tmp_path / "a.txt",
        tmp_path / "b.jsonl",
        tmp_path / "s",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) < 100_000  # KiB
    ids = read(tmp_path / "s", "train") + read(tmp_path / "s", "val")
    assert len(ids) == 18 * 1_600_000 + 3_000_000 + 2


def test_no_validation_is_noticed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one row cannot be split"}')
    out, err = make("a.jsonl", "--val_fraction", "0.1", cwd=tmp_path)
    assert err.startswith("notice: no document is for validation")


# Ray


@pytest.mark.slow
def test_ray_gives_the_same_bytes_though_a_node_dies(corpus, tmp_path):
    """A cluster of two machines (nodes) of one processor each; one is killed half-way."""
    pytest.importorskip("ray", reason="ray is not installed (requirements/ray.txt)")
    script = Path(__file__).parent / "ray_cluster.py"
    flags, whole = corpus
    command = [sys.executable, script, tmp_path / "out", *flags]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a node was killed after" in done.stdout
    assert tree(tmp_path / "out") == whole


@pytest.mark.slow
def test_ray_on_this_machine(corpus, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed (requirements/ray.txt)")
    flags, whole = corpus
    make(*flags, "--out", tmp_path / "out", "--ray", "local")
    assert tree(tmp_path / "out") == whole
    (tmp_path / "bad.jsonl").write_text('{"body": 1}\n' * 3)
    code, out, err = run(tmp_path / "bad.jsonl", "--out", tmp_path / "bad", "--ray", "local")
    assert (code, out) == (2, "")
    assert "bad.jsonl: line 1: no text in the field" in err.splitlines()[-1]
    code, out, err = run(flags[0], "--out", tmp_path / "no", "--ray", "auto")
    assert code == 2 and err.splitlines()[-1].startswith("error: Ray: ")


def test_what_ray_sends_needs_no_copy_of_the_project(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed (requirements/ray.txt)")
    small.save(tmp_path)
    send = f"""if True:
        import sys
        sys.path.insert(0, {str(REPO)!r})
        import prepare
        from ray import cloudpickle
        from corpus import jobs, workers
        workers.send_by_value(cloudpickle)
        work = lambda: jobs.get_encoder("", ".").encode("Once upon a time")
        sys.stdout.buffer.write(cloudpickle.dumps((jobs.do_job, work)))
    """
    receive = """if True:
        import pickle, sys
        do_job, work = pickle.load(sys.stdin.buffer)
        print(work())
    """
    pickled = b""
    for code in (send, receive):
        command = [sys.executable, "-I", "-c", code]
        done = subprocess.run(command, input=pickled, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        pickled = done.stdout
    assert json.loads(done.stdout) == small.encode("Once upon a time")


# What reviewers and mutations of the code found


def test_blank_lines_part_a_single_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\nthree\n")
    make("a.txt", "--separator", "", "--val_fraction", "0", cwd=tmp_path)
    assert read(tmp_path / "shards" / "a", "train") == ids_of([b"one\n", b"two\n", b"three\n"])


@pytest.mark.parametrize(
    "name, out",
    [("corpus", None), ("corpus/", None), ("./corpus", "corpus/out"), (".", None), (".", "out")],
)
def test_hidden_files_and_ones_own_output_stay_out(tmp_path, name, out):
    for path in ("corpus/a.txt", "corpus/.git/b.txt", "corpus/.c.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    where = tmp_path / "corpus" if name == "." else tmp_path
    for _ in range(2):  # the second time, its own files are there
        make(name, "--val_fraction", "0", *(["--out", out] if out else []), cwd=where)
        assert read(where / (out or "shards/corpus"), "train") == ids_of([b"corpus/a.txt"])


def test_many_small_files_share_shards(tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(200):
        (tmp_path / "many" / f"{i:03d}.txt").write_text(f"file {i:03d} " * 10)
    flags = ["--shard_mb", "0.003", "--val_fraction", "0.3", "--workers", "2"]
    make("many", *flags, "--out", "s", cwd=tmp_path)
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    assert (
        len([name for name in meta["shards"] if name.startswith("train")])
        == 6  # of 34 files at most
    )  # 200 * 90 / 3000
    assert list(meta["sha256"]) == [f"many/{i:03d}.txt" for i in range(200)]
    assert 25 < meta["n_documents"]["val"] < 100  # each file draws for itself, though all are alike


def test_the_draw_is_splitmix64():
    """Written out for single integers, and for the sequence that its authors publish for 0."""

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    positions = np.arange(0, 10**6, 997, dtype=np.uint64)
    for source in (0, 3):
        key = int(np.random.SeedSequence([7, source]).generate_state(1, np.uint64)[0])
        numbers = [mix((key + int(p) * 0x9E3779B97F4A7C15) % 2**64) for p in positions]
        drawn = jobs.draw(positions, source, seed=7)
        assert drawn.tolist() == [(x >> 11) * 2.0**-53 for x in numbers]


@pytest.mark.parametrize("workers", [1, 2])
def test_of_few_documents_the_last_part_is_for_validation(tmp_path, workers):
    """However the text is spread over files, and whatever the seed: a draw would be mere chance."""
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i:02}.txt").write_text(f"document {i:04}\n" * 10)
    flags = ["--shard_mb", "0.0001", "--workers", workers]  # a shard each
    out, err = make("in", *flags, "--val_fraction", "0.12", cwd=tmp_path)
    train, val = (Encoder([]).decode(read(tmp_path / "shards" / "in", s)) for s in ("train", "val"))
    line = "document {:04}\n".format
    text = "".join(line(i) * 10 for i in range(20))
    n_train = int(len(text) * 0.88)
    rest = text[n_train : len(line(0)) * 180]
    assert val == "".join(t + ENDOFTEXT for t in (rest, line(18) * 10, line(19) * 10)) and err == ""
    whole = "".join(line(i) * 10 + ENDOFTEXT for i in range(17))
    assert train == whole + (line(17) * 10).removesuffix(rest)
    assert make("in", *flags, "--val_fraction", "0.12", cwd=tmp_path)[0] == out


def test_the_validation_split_does_not_swallow_the_corpus(tmp_path):
    """A long text and a short one: today a tenth of both, before either of them as a whole."""
    (tmp_path / "long.txt").write_text("A long story. " * 9000)
    (tmp_path / "short.md").write_text("And a short one. " * 60)
    for files in (["long.txt", "short.md"], ["short.md", "long.txt"]):
        for seed in range(3):
            make(*files, "--out", f"s{files[0]}{seed}", "--seed", seed, cwd=tmp_path)
            meta = json.loads((tmp_path / f"s{files[0]}{seed}" / "meta.json").read_text())
            n_val, n_train = meta["n_tokens"]["val"], meta["n_tokens"]["train"]
            assert n_val / (n_val + n_train) == pytest.approx(0.1, abs=1e-4)


def test_a_tokenizer_that_settles_for_fewer_ids_says_so(tmp_path):
    """And it learns from all of the text, whichever part is for validation."""
    (tmp_path / "a.txt").write_text("ab\n" * 90 + "cd\n" * 5)
    out, err = make("a.txt", "--train_tokenizer", "300", cwd=tmp_path)
    words = "the tokenizer has only 259 entries, because the text has no more pairs to merge"
    assert err == f"notice: {words}\n"
    assert "259 ids" in out


def test_few_rows_are_split_between_two(tmp_path, rng):
    """The border is the nearer end of the row in which the last tenth begins."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for sizes, n_val in (([10] * 30, 3), ([5, 900], 1), ([900, 5], 1), ([7] * 4 + [50], 1)):
        texts = [chr(97 + i % 26) * n for i, n in enumerate(sizes)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "a.jsonl").write_text(rows)
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
        parquet.write_table(
            pyarrow.table({"text": texts}), tmp_path / "c.parquet", row_group_size=9
        )
        for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
            shutil.rmtree(tmp_path / "s", ignore_errors=True)
            make(name, "--out", "s", cwd=tmp_path)
            train, val = (documents_of(read(tmp_path / "s", s)) for s in ("train", "val"))
            assert (train, val) == (texts[:-n_val], texts[-n_val:])


def test_standard_input_is_split_as_a_file(tmp_path):
    text = f"\n{ENDOFTEXT}\n".join(["one", "two", "three"])
    (tmp_path / "a.txt").write_text(text)
    make("a.txt", "--out", "t", cwd=tmp_path)
    out, err = make("-", "--out", "s", cwd=tmp_path, input=text.encode())
    assert read(tmp_path / "s", "val") == ids_of([b"ee"]) == read(tmp_path / "t", "val")
    train = ids_of([b"one\n", b"two\n"]) + Encoder([]).encode("thr")
    assert read(tmp_path / "s", "train") == train == read(tmp_path / "t", "train")


def test_a_share_far_from_the_one_asked_for_is_said(tmp_path):
    """1000 short documents, and one longer than all of them that falls to validation."""
    texts = ["short\n"] * 1000 + ["long " * 9000]
    data, offset = f"{ENDOFTEXT}\n".join(texts), len(f"short\n{ENDOFTEXT}\n") * 1000
    seed = next(
        seed for seed in range(10**5) if jobs.draw(np.array([offset], np.uint64), 0, seed)[0] < 0.01
    )
    (tmp_path / "a.txt").write_text(data)
    _, err = make("a.txt", "--seed", seed, cwd=tmp_path)
    assert re.match(r"notice: validation has 8\d\.\d% of the tokens, because single documents", err)


def test_a_hundredth_is_for_validation(tmp_path):
    (tmp_path / "a.txt").write_text(f"word\n{ENDOFTEXT}\n" * 20000)
    make("a.txt", cwd=tmp_path)
    assert 130 < len(documents_of(read(tmp_path / "shards" / "a", "val"))) < 270


def test_a_source_that_changes_ends_the_run(tmp_path):
    for name, old in (("a.txt", "one text\n" * 9), ("a.jsonl", '{"text": "some"}\n' * 9)):
        (tmp_path / name).write_text(old)
        source = documents.describe(str(tmp_path / name), False)
        (span,) = documents.cut_source(
            0, source, replace(OPTIONS, shard_bytes=10**6), str(tmp_path)
        )
        (tmp_path / name).write_text(old[: len(old) // 9 * 4])
        assert not documents.is_same(source)
        with pytest.raises(
            ValueError, match="line [15]: the file became shorter while it was read"
        ):
            list(documents.read_span(span, OPTIONS))
    (tmp_path / "b.txt").write_text("old text")
    make("b.txt", "--out", "s", cwd=tmp_path)
    (tmp_path / "b.txt").write_text("new text")  # as long as the old
    code, out, err = run("b.txt", "--out", "s", cwd=tmp_path)
    assert code == 2 and "(other sources)" in err


def test_shards_that_were_lost_are_noticed(corpus, tmp_path):
    flags, whole = corpus
    out = tmp_path / "out"
    process = start(*flags, "--out", out, "--workers", "2")
    wait_for_notes(out, 9, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first, second, *_ = sorted(out.glob("train_*.bin"))
    first.unlink()
    second.write_bytes(b"")
    (out / "merges.txt").unlink()
    (out / "vocab.json.123.tmp").write_text("half")
    code, printed, err = run(*flags, "--out", out, "--seed", "7")
    assert code == 2 and "(other seed)" in err  # an unfinished folder is not another run's either
    make(*flags, "--out", out)
    assert tree(out) == whole
    first.unlink()
    code, printed, err = run(*flags, "--out", out)
    assert (code, printed) == (2, "") and "train_000000.bin: No such file" in err
    assert not (out / ".work").exists()


def test_a_shard_that_cannot_be_placed_has_no_note(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out" / ".work").mkdir(parents=True)
    Encoder([]).save(tmp_path / "out")
    options = replace(OPTIONS, shard_bytes=100)
    source = documents.describe(str(tmp_path / "a.txt"), False)
    (job,) = jobs.make_jobs([source], options, str(tmp_path))
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        jobs.do_job(job, str(tmp_path / "out"), options, np.dtype("<u2"))
    assert list((tmp_path / "out" / ".work").iterdir()) == []


def test_what_is_unpacked_does_not_pile_up(tmp_path, rng, monkeypatch):
    _, data = stories(rng, 2000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data.encode()))
    most, plain = [], prepare.run_here

    def run_here(jobs, work):
        for done in plain(jobs, work):
            most.append(len(list((tmp_path / "s" / ".work").glob("*[!.json]"))))
            yield done

    monkeypatch.setattr(prepare, "run_here", run_here)
    path = str(tmp_path / "a.txt.gz")
    prepare.main(path, out=str(tmp_path / "s"), shard_mb=0.01, workers=1, val_fraction=0)
    assert len(most) > 20 and max(most) <= 4  # the next span, the lock, and half a look ahead


def test_standard_input_is_read_anew(tmp_path):
    rows = [json.dumps({"text": f"row {i}"}) + "\n" for i in range(99)]
    flags = ["-", "--out", "s", "--field", "text", "--val_fraction", "0", "--shard_mb", "0.0002"]
    code, out, err = run(*flags, cwd=tmp_path, input="".join([*rows, "broken"]).encode())
    assert code == 2 and err.startswith("error: -: line 100: not JSON (")
    assert list((tmp_path / "s").glob("*.bin"))
    (tmp_path / "s" / "notes.txt").write_text("mine")
    make(*flags, cwd=tmp_path, input="".join(rows[::-1]).encode())
    assert read(tmp_path / "s", "train") == ids_of([f"row {i}".encode() for i in range(98, -1, -1)])
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"
    code, out, err = run(*flags, cwd=tmp_path, input=b"")
    assert code == 2 and "remove it" in err


def test_a_tokenizers_folder_is_not_taken(tmp_path):
    small.save(tmp_path / "tokenizer")
    before = tree(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("text")
    code, out, err = run("a.txt", "--out", "tokenizer", cwd=tmp_path)
    assert (code, out) == (2, "") and "tokenizer is not empty; remove it" in err
    assert tree(tmp_path / "tokenizer") == before and not (tmp_path / "tokenizer/.work").exists()


def test_another_tokenizer_of_the_same_name_is_another_run(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    small.save(tmp_path / "tokenizer")
    make("a.txt", "--tokenizer", "tokenizer", "--out", "s", cwd=tmp_path)
    Encoder([("a", "b")]).save(tmp_path / "tokenizer")
    code, out, err = run("a.txt", "--tokenizer", "tokenizer", "--out", "s", cwd=tmp_path)
    assert code == 2 and "(other merges)" in err


def test_two_runs_in_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("ab ab ab")
    for n_vocab in (None, 258):
        prepare.main("a.txt", out="s", train_tokenizer=n_vocab, val_fraction=0)
        encoder = get_encoder("s", ".")
        assert read(Path("s"), "train") == ids_of([b"ab ab ab"], encoder)
        for path in Path("s").iterdir():
            path.unlink()


def test_windows_line_ends_cut_spans_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"one\r\n{ENDOFTEXT}\r\n".encode() * 99)
    make("a.txt", "--val_fraction", "0", "--shard_mb", "0.0005", cwd=tmp_path)
    assert read(tmp_path / "shards" / "a", "train") == ids_of([b"one\r\n"] * 99)
    assert len(list((tmp_path / "shards" / "a").glob("train*"))) == 4  # 99 * 20 / 500


def test_names_that_are_no_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    for _ in range(2):
        make("in", "--val_fraction", "0", cwd=tmp_path)
    assert read(tmp_path / "shards" / "in", "train") == ids_of([b"text"])


def test_lone_surrogates_in_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b\\ud83d\\ude00"}')
    make("a.jsonl", "--val_fraction", "0", cwd=tmp_path)
    assert read(tmp_path / "shards" / "a", "train") == ids_of(["a\ufffdb😀".encode()])


def test_rows_of_parquet_are_counted_through_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [b"word " * 99] * 90 + [b"\xff"] + [b"word"] * 9
    table = pyarrow.table({"text": pyarrow.array(texts).view(pyarrow.string())})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20, use_dictionary=False)
    code, out, err = run("a.parquet", "--out", "s", "--shard_mb", "0.01", cwd=tmp_path)
    assert code == 2 and err.startswith("error: a.parquet: row 91: 'utf-8' codec can't decode")
    table = pyarrow.table({"text": [os.urandom(99).hex() for _ in range(900)]})
    parquet.write_table(table, tmp_path / "b.parquet", compression="none")
    data = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:100] + b"\xff" * 9999 + data[10099:])
    code, out, err = run("b.parquet", "--out", "t", cwd=tmp_path)
    assert code == 2 and err.startswith("error: b.parquet: damaged (") and err.count("\n") == 1


@pytest.mark.parametrize("n_vocab, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_the_width_of_ids_is_that_of_the_largest(tmp_path, n_vocab, dtype):
    chars = list(encoder_module.CHAR_OF_BYTE.values())
    pairs = [(a, b) for a in chars for b in chars][: n_vocab - 257]
    large = Encoder(pairs)
    large.save(tmp_path / "large")
    (tmp_path / "a.txt").write_text("zz~~yy")
    make("a.txt", "--tokenizer", "large", "--models_dir", ".", "--val_fraction", "0", cwd=tmp_path)
    assert json.loads((tmp_path / "shards/a/meta.json").read_text())["dtype"] == dtype
    assert read(tmp_path / "shards" / "a", "train") == ids_of([b"zz~~yy"], large)


def test_a_tokenizer_learns_from_no_more_than_it_should(tmp_path, monkeypatch):
    (tmp_path / "many").mkdir()
    for i in range(300):
        (tmp_path / "many" / f"{i:03d}.txt").write_text(f"file {i:03d} " * 10)
    monkeypatch.setattr(prepare, "TRAINING_BYTES", 2000)
    files = documents.find_files([str(tmp_path / "many")], leave_out=str(tmp_path / "s"))
    sources = [documents.describe(path, False) for path in files]
    seen = []
    monkeypatch.setattr(encoder_module, "train", lambda texts, n: seen.extend(texts))
    prepare.learn_tokenizer(400, sources, replace(OPTIONS, shard_bytes=1000), str(tmp_path))
    assert 1900 < len("".join(seen)) < 2200
    assert int(seen[0][5:8]) < 20 and int(seen[-1][5:8]) > 270


def test_a_bad_row_ends_the_other_workers_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("bad\n")
    (tmp_path / "b.txt").write_text("".join(f"{i} und {i * i}: " for i in range(10**6)))
    small.save(tmp_path / "tokenizer")
    flags = ["--tokenizer", "tokenizer", "--out", "s", "--shard_mb", "0.000001", "--workers", "2"]
    started = time.monotonic()
    code, out, err = run("b.txt", "a.jsonl", *flags, cwd=tmp_path)
    assert code == 2 and err.startswith("error: a.jsonl: line 1: not JSON")
    assert time.monotonic() - started < 30
