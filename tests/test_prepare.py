"""prepare.py and documents.py against plain twins: whatever the format, the cuts, the workers."""

import gzip
import json
import os
import random
import re
import resource
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, SHAKESPEARE
from hypothesis import given, settings
from hypothesis import strategies as st

import documents
import encoder as encoder_module
import prepare
from encoder import ENDOFTEXT, Encoder, get_encoder

OPTIONS = {"separator": ENDOFTEXT, "field": "text", "val_fraction": 0.0, "seed": 1, "dtype": "<u2"}
fuzz = settings(max_examples=150, deadline=None, database=None, print_blob=True)
small = encoder_module.train(Path(encoder_module.__file__).read_text("utf-8"), 600)
FILES = {"meta.json", "vocab.json", "merges.txt", "tokenizer_config.json"}


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)
    return random.Random(seed)


def run(*args, timeout=120, **kwargs):
    command = [sys.executable, str(REPO / "prepare.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, timeout=timeout, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def make(*args, **kwargs):
    code, out, err = run(*args, **kwargs)
    assert code == 0, err
    return out, err


def split_plainly(data, separator=ENDOFTEXT):
    """The documents of a text, line by line, without the empty ones."""
    documents, document = [], b""
    for line in re.findall(rb"[^\n]*\n|[^\n]+", data):
        if line.removesuffix(b"\n").removesuffix(b"\r") == separator.encode():
            documents.append(document)
            document = b""
        else:
            document += line
    return [document for document in [*documents, document] if document]


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
        "",
        "\r",
        "word" * 9,
        "é 我 🙂",
        "a b c",
    ]
)
texts = st.lists(lines, max_size=12).map("\n".join)


def parts_of(data, read, option, path, start=0, stop=None):
    path.write_bytes(data)
    with open(path, "rb") as file:
        parts = [
            p for ps in read(file, start, len(data) if stop is None else stop, option) for p in ps
        ]
    return parts


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
def test_text_is_parted_at_separator_lines_whatever_the_block(
    tmp_path_factory, text, block, separator
):
    path = tmp_path_factory.getbasetemp() / "text"
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", block)
        parts = parts_of(data, documents.read_text, separator, path)
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
        parts = [part for _, part, _ in parts_of(data, documents.read_text, "never", path)]
        others = [part for _, part, _ in documents.cut_long(0, data)]
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


def test_the_cut_is_found_however_far_back(rng):
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
        parts = parts_of(data, documents.read_json, "text", tmp_path_factory.getbasetemp() / "json")
    assert joined(parts) == [row.encode() for row in rows if row]


# From files to spans


@given(texts, st.integers(1, 90), st.integers(20, 50))
@fuzz
def test_spans_lose_nothing_and_are_the_same_packed(tmp_path_factory, text, n_most, block):
    folder = tmp_path_factory.getbasetemp()
    data = text.encode()
    (folder / "a.txt").write_bytes(data)
    (folder / "b.txt.gz").write_bytes(gzip.compress(data))
    options = OPTIONS | {"shard_bytes": n_most}
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", block)
        for name in ("a.txt", "b.txt.gz"):
            source = documents.describe(str(folder / name), False)
            cut = []
            for span in documents.cut_source(0, source, options, str(folder)):
                parts = [part for parts in documents.read_span(span, options) for part in parts]
                cut.append((joined(parts), [at + span["offset"] for at, _, _ in parts]))
            found.append([entry for entry in cut if entry[0]])
    assert found[0] == found[1]
    assert [d for whole, _ in found[0] for d in whole] == split_plainly(data)


# The command line


def test_a_text_of_many_documents(tmp_path, rng):
    texts, data = stories(rng, 300)
    (tmp_path / "a.txt").write_text(data, newline="")
    out, err = make(tmp_path / "a.txt", "--out", tmp_path / "s", "--val_fraction", "0.2")
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    train, val = (documents_of(read(tmp_path / "s", split)) for split in ("train", "val"))
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
    assert err == "notice: left out 1 files of other kinds (.png): name them to include them\n"
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


@pytest.mark.parametrize("n", [1, 2, 9, 10, 1000, 4321])
def test_one_document_is_cut_at_nine_tenths(tmp_path, n):
    text = ("é" * n)[: n - n // 3] + "x" * (n // 3)
    for name, packed in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(packed)
        make(tmp_path / name, "--out", tmp_path / f"{name}.out")
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
    options = OPTIONS | {"shard_bytes": 5000}
    seen = []
    monkeypatch.setattr(encoder_module, "train", lambda texts, n: seen.extend(texts))
    prepare.learn_tokenizer(400, sources, options, str(tmp_path))
    assert len(data.encode()) / 5 < len("".join(seen).encode()) < len(data.encode()) / 2
    assert seen[0] in texts[0] and seen[-1] in "".join(texts[-60:])


def test_released_tokenizers_are_asked_for_by_name(tmp_path, monkeypatch):
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
    """Two files, one of them packed, of some 100 tasks; the flags; the folder that they make."""
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


def test_two_runs_into_one_folder(corpus, tmp_path):
    flags, whole = corpus
    out = tmp_path / "out"
    first = start(*flags, "--out", out, "--workers", "2")
    wait_for_notes(out, 1, first)
    code, printed, err = run(*flags, "--out", out)
    assert (code, printed, err) == (2, "", f"error: {out}: another prepare.py is at work there\n")
    assert first.wait(60) == 0
    assert tree(out) == whole
    printed, err = make(*flags, "--out", out)  # all is done already
    assert "training" in printed and tree(out) == whole


def test_a_full_disk(corpus, tmp_path):
    flags, whole = corpus
    out = tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))

    for workers in (1, 2):
        code, printed, err = run(*flags, "--out", out, "--workers", workers, preexec_fn=limit)
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
        problem = f"s holds the shards of another run (other {other}): remove it, or name another"
        assert (code, out, err) == (2, "", f"error: {problem} folder with --out\n")
    assert run("-", "--out", "s", cwd=tmp_path, input=b"some text")[0] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    code, out, err = run("a.txt", "--out", "full", cwd=tmp_path)
    assert err == "error: full is not empty: remove it, or name another folder with --out\n"
    assert tree(tmp_path / "s") == before
    assert [p.name for p in (tmp_path / "full").iterdir() if p.is_file()] == ["thesis.tex"]
    (tmp_path / "a.txt").write_text("some more text")  # the same name, another text
    code, out, err = run("a.txt", "--out", "s", cwd=tmp_path)
    assert "(other sources)" in err


ROW = b'{"text": "a"}\n'
NOT_GZIP, NOT_ZSTD = "not gzip, or cut short (", "not zstd, or damaged ("
BROKEN = {
    "empty.txt": (b"", "there is no text in empty.txt"),
    "none.txt": (f"{ENDOFTEXT}\n{ENDOFTEXT}\n".encode(), "there is no text in none.txt"),
    "utf16.txt": ("text".encode("utf-16"), "utf16.txt: is UTF-16, not UTF-8: iconv"),
    "cut.txt.gz": (gzip.compress(os.urandom(9999))[:-500], f"cut.txt.gz: {NOT_GZIP}"),
    "no.txt.gz": (b"plain text", f"no.txt.gz: {NOT_GZIP}"),
    "no.txt.zst": (b"plain text", f"no.txt.zst: {NOT_ZSTD}"),
    "no.parquet": (b"plain text", "no.parquet: not Parquet, or cut short ("),
    "a.jsonl": (
        ROW + b'\n{"b": 1}',
        "a.jsonl: line 3: no text in the field 'text' (there is: 'b')",
    ),
    "null.jsonl": (ROW + b'{"text": null}\n', "null.jsonl: line 2: no text in the field 'text'"),
    "list.jsonl": (
        b'["text"]\n',
        "list.jsonl: line 1: no text in the field 'text' (there is: no o",
    ),
    "cut.jsonl": (ROW + b'{"text": "b', "cut.jsonl: line 2: not JSON ("),
    "cut.jsonl.gz": (gzip.compress(ROW * 70 + b'{"text'), "cut.jsonl.gz: line 71: not JSON ("),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "latin.jsonl: line 1: not JSON ("),
    "deep.jsonl": (b"[" * 100000, "deep.jsonl: line 1: not JSON ("),
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
    if not list((tmp_path / "out").glob("*.bin")):  # what failed at once is no hindrance
        (tmp_path / "good.txt").write_text("good")
        make("good.txt", "--out", "out", cwd=tmp_path)


def test_a_zst_cut_short(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(secrets.token_bytes(100000))
    (tmp_path / "a.txt.zst").write_bytes(packed[:-100])
    code, out, err = run("a.txt.zst", "--out", "out", cwd=tmp_path)
    assert (code, out, err) == (2, "", "error: a.txt.zst: cut short\n")


def test_parquet_without_the_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a", None]}), tmp_path / "a.parquet")
    code, out, err = run("a.parquet", "--out", "out", cwd=tmp_path)
    assert (code, err) == (2, "error: a.parquet: no column 'text', but body\n")
    code, out, err = run("a.parquet", "--out", "out", "--field", "body", cwd=tmp_path)
    assert (code, err) == (2, "error: a.parquet: row 2 has no text in the column 'body'\n")


FLAGS = [
    ("", "nothing to prepare: name files, folders, - or shakespeare"),
    ("gone.txt", "gone.txt: no such file, folder or pattern"),
    ("- a.txt", "- (standard input) cannot be together with other inputs"),
    ("-", "name the folder for the shards with --out"),
    ("a.txt a.txt", "name the folder for the shards with --out"),
    ("a.txt --val_fraction 1", "val_fraction must be at least 0 and below 1, not 1.0"),
    ("a.txt --val_fraction nan", "val_fraction must be at least 0 and below 1, not nan"),
    ("a.txt --seed -1", "seed must be 0 or more, and below 2**64, not -1"),
    ("a.txt --shard_mb 0", "shard_mb must be a positive number, not 0.0"),
    ("a.txt --workers 0", "workers must be 1 or more, not 0"),
    ("a.txt --separator=a\nb", "separator must be the content of one line"),
    ("a.txt --tokenizer x --train_tokenizer 300", "--tokenizer and --train_tokenizer exclude each"),
    (
        "a.txt --train_tokenizer 256",
        "train_tokenizer must be 257 (bytes and <|endoftext|>) or more",
    ),
    ("- --out s --train_tokenizer 300", "--train_tokenizer reads the text twice, which standard"),
    ("folder", "nothing to prepare: name files, or folders that hold .txt"),
]


@pytest.mark.parametrize("flags, problem", FLAGS)
def test_bad_flags_give_one_clear_line(tmp_path, flags, problem):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "folder").mkdir()
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
        assert err == "notice: 3 sequences of bytes were no UTF-8 and became U+FFFD\n"


def test_a_line_of_many_blocks_and_bounded_memory(tmp_path, rng):
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


def test_more_than_65536_ids_are_uint32(tmp_path):
    names = [a + b for a in small.vocab if len(a) == 1 for b in small.vocab if len(b) == 1][:65400]
    large = Encoder([(name[0], name[1]) for name in names])
    large.save(tmp_path / "large")
    (tmp_path / "a.txt").write_text("zz~~yy")
    make("a.txt", "--tokenizer", "large", "--models_dir", ".", "--val_fraction", "0", cwd=tmp_path)
    assert json.loads((tmp_path / "shards/a/meta.json").read_text())["dtype"] == "uint32"
    assert read(tmp_path / "shards" / "a", "train") == ids_of([b"zz~~yy"], large)


def test_no_validation_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text(f"one\n{ENDOFTEXT}\ntwo\n")
    out, err = make("a.txt", "--val_fraction", "1e-9", cwd=tmp_path)
    assert err.startswith("notice: no document fell to validation")


# Ray


def test_ray_gives_the_same_bytes_though_a_node_dies(corpus, tmp_path):
    """A cluster of two machines (nodes) of one processor each; one is killed half-way."""
    pytest.importorskip("ray", reason="ray is not installed (requirements-ray.txt)")
    script = Path(__file__).parent / "ray_cluster.py"
    flags, whole = corpus
    command = [sys.executable, script, tmp_path / "out", *flags]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a node was killed after" in done.stdout
    assert tree(tmp_path / "out") == whole


def test_ray_on_this_machine(corpus, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed (requirements-ray.txt)")
    flags, whole = corpus
    make(*flags, "--out", tmp_path / "out", "--ray", "local")
    assert tree(tmp_path / "out") == whole
    (tmp_path / "bad.jsonl").write_text('{"body": 1}\n' * 3)
    code, out, err = run(tmp_path / "bad.jsonl", "--out", tmp_path / "bad", "--ray", "local")
    assert (code, out) == (2, "")
    assert "bad.jsonl: line 1: no text in the field" in err.splitlines()[-1]
    code, out, err = run(flags[0], "--out", tmp_path / "no", "--ray", "auto")
    assert code == 2 and err.splitlines()[-1].startswith("error: Ray: ")
