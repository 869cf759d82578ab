"""Texts as people have them: every command reads the same documents, or refuses them in a line."""

import bz2
import gzip
import json
import lzma
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import conftest
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import encoder as encoder_module
from corpus import documents, examples, jobs, texts
from corpus.documents import Options, Span
from corpus.shards import open_shards
from encoder import ENDOFTEXT, Encoder
from evaluate import load_ids
from model_files.vocabulary import BYTE_OF_CHAR, AddedToken
from training.text import load_text, load_tokens

OPTIONS = Options(val_fraction=0.0, last_fraction=0.0)
BYTES = Encoder([])
SMALL = encoder_module.train((conftest.REPO / "gpt2.py").read_text("utf-8"), 400)


def test_a_file_that_became_shorter_ends_the_count_of_its_lines(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"a\nb\n")
    span = Span(source=0, name="short.txt", path=str(path), format="text", stop=9)
    assert documents.line_number(span, 2) == 2
    with pytest.raises(ValueError, match=r"short\.txt: the file became shorter"):
        documents.line_number(span, 9)


def test_zst_with_the_longest_window(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frame = zstandard.ZstdCompressor().compressobj()
    packed = bytearray(frame.compress(b"Once upon a time.\n") + frame.flush())
    assert not packed[4] & 0x20  # the frame states its window, in the next byte
    packed[5] = (31 - 10) << 3  # 2 GiB, as zstd --long=31 writes it
    path = tmp_path / "long.txt.zst"
    path.write_bytes(packed)
    assert list(documents.read_documents(path)) == ["Once upon a time.\n"]


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_file_that_became_shorter_is_an_error_and_not_an_end(tmp_path, ending):
    path = tmp_path / f"short.{ending}"
    path.write_text('{"text": "Once upon a time."}\n' * 9)
    source = documents.describe(str(path))
    (span,) = documents.cut_source(0, source, documents.Options(), str(tmp_path))
    os.truncate(path, 60)
    with pytest.raises(ValueError, match=rf"short\.{ending}: .*the file became shorter"):
        list(documents.read_span(span, documents.Options()))


REFUSED = {
    "a.pdf": b"%PDF-1.7\n",
    "a.bz2": bz2.compress(b"text"),
    "a.xz": lzma.compress(b"text"),
    "a.zip": b"PK\x03\x04rest",
    "a.arrow": b"ARROW1\0\0",
    "gzip.txt": gzip.compress(b"text"),
    "parquet.txt": b"PAR1rest",
    "marked.txt": "text".encode("utf-16"),
    "little.txt": "some text".encode("utf-16-le"),
    "big.txt": "some text".encode("utf-16-be"),
    "utf16.txt.gz": gzip.compress("some text".encode("utf-16-le")),
    "tar.gz": gzip.compress(b"name".ljust(257, b"\0") + b"ustar\0" + bytes(250)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_its_first_bytes(tmp_path, name):
    (tmp_path / name).write_bytes(REFUSED[name])
    for read in (texts.read_text, lambda path: load_text(path), lambda p: load_ids(p, Encoder([]))):
        with pytest.raises(ValueError, match="not text, but|is UTF-16") as caught:
            read(str(tmp_path / name))
        assert name in str(caught.value)
    code, out, err = conftest.call("prepare.py", name, "--out", "s", cwd=tmp_path)
    assert (code, out) == (2, "") and err.startswith(f"error: {name}: "), err


def shards_of(folder, name):  # -> ids of prepare.py's shards, training before validation
    code, _, err = conftest.call("prepare.py", name, "--out", name + "-s", cwd=folder)
    assert code == 0, err
    shards, _ = open_shards(folder / (name + "-s"))
    return np.concatenate([*shards["train"], *shards["val"]]).tolist()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT.GZ", "a.JSONL", "a.ndjson", "a.json.gz"])
def test_every_command_reads_the_same_ids(tmp_path, name, end):
    parts = [f"Once{end}upon{end}", f"a time.{end}", f"The end.{end}é"]
    data = f"{ENDOFTEXT}{end}".join(parts)
    if "txt" not in name.lower():
        data = "".join(json.dumps({"text": part}) + "\n" for part in parts)
    data = data.encode()
    packed = gzip.compress(data) if name.lower().endswith(".gz") else data
    (tmp_path / name).write_bytes(packed)
    path = str(tmp_path / name)
    expected = [id for part in parts for id in [*Encoder([]).encode(part), 256]]
    assert shards_of(tmp_path, name) == expected
    assert not examples.is_examples(path)
    arrays, _ = load_tokens(path)
    assert np.concatenate([*arrays["train"], *arrays["val"]]).tolist() == expected
    ids, n_bytes, _ = load_ids(path, Encoder([]))
    assert ids.tolist() == [256, *expected] and n_bytes == len("".join(parts).encode())


def test_endoftext_separates_within_a_line_and_one_document_has_none(tmp_path):
    path = tmp_path / "a.txt"
    encode = Encoder([]).encode
    path.write_text(f"one{ENDOFTEXT}two")
    expected = [256, *encode("one"), 256, *encode("two"), 256]
    assert load_ids(str(path), Encoder([]))[0].tolist() == expected
    path.write_text("one\ntwo\n")
    arrays, _ = load_tokens(str(path))
    assert [*arrays["train"][0], *arrays["val"][0]] == encode("one\ntwo\n")


def prepared(path, options=OPTIONS, encoder=BYTES):  # -> ids, as prepare.py's workers encode them
    with tempfile.TemporaryDirectory() as folder:
        spans = documents.cut_source(0, documents.describe(str(path)), options, folder)
        paths = {split: Path(folder, split) for split in jobs.SPLITS}
        jobs.write_shards(list(spans), paths, encoder, options, np.dtype("<u4"))
        return np.fromfile(paths["train"], "<u4").tolist()


def split_plainly(data):  # -> [documents], line by line, then at <|endoftext|>
    data = data.removeprefix(b"\xef\xbb\xbf")
    kept = [
        b"\0" if line.rstrip(b"\n").removesuffix(b"\r") == END else line
        for line in re.findall(rb"[^\n]*\n|[^\n]+", data)
    ]
    return list(filter(None, b"".join(kept).replace(END, b"\0").split(b"\0")))


END = ENDOFTEXT.encode()
PIECES = [b"Once", b" upon", b" ", b"\n", b"\r\n", b"\r", "é€😀".encode(), b"\xef\xbb\xbf"]
PIECES += [
    b"\xff",
    b"\xe2\x82",
    b"\x80",
    END,
    b"\n" + END + b"\n",
    b"\r\n" + END + b"\r\n",
    b"<|endof",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40), st.booleans(), st.integers(20, 90))
@settings(max_examples=150, deadline=None, database=None, print_blob=True)
def test_any_bytes_give_the_same_ids_for_every_command(tmp_path_factory, pieces, packed, n_block):
    data = b"".join(pieces)
    wanted = split_plainly(data)
    assume(wanted)
    path = tmp_path_factory.getbasetemp() / ("any.txt.gz" if packed else "any.txt")
    path.write_bytes(gzip.compress(data) if packed else data)
    ids = []
    for document in wanted:
        ids += [*BYTES.encode(document.decode(errors="replace")), 256]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", n_block)
        patch.setattr(documents, "notice", lambda text: None)
        assert prepared(path, replace(OPTIONS, shard_bytes=n_block)) == ids
        arrays, _ = load_tokens(str(path))
        measured, _, _ = load_ids(str(path), BYTES)
    if len(wanted) == 1:
        ids.pop()  # a single text has no <|endoftext|> there
    assert np.concatenate([*arrays["train"], *arrays["val"]]).tolist() == ids
    assert measured.tolist() == [256, *ids]


@given(
    st.lists(
        st.sampled_from(["Once", " upon", " ", "  ", "\n\nAnd", "'s", "é", ENDOFTEXT]), max_size=30
    )
)
@settings(max_examples=150, deadline=None, database=None, print_blob=True)
def test_endoftext_in_a_line_has_its_id_as_in_tiktoken(tmp_path_factory, pieces):
    tiktoken = pytest.importorskip("tiktoken")
    text = "a" + ENDOFTEXT.join(filter(None, "".join(pieces).split(ENDOFTEXT))) + "z" + ENDOFTEXT
    ranks = dict(SMALL.vocab)
    del ranks[ENDOFTEXT]
    ranks = {bytes(map(BYTE_OF_CHAR.get, piece)): id for piece, id in ranks.items()}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding(
        "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: SMALL.endoftext}
    )
    path = tmp_path_factory.getbasetemp() / "inline.txt"
    path.write_text(text, newline="")
    assert prepared(path, encoder=SMALL) == theirs.encode(text, allowed_special="all")


def test_a_byte_order_mark_is_not_text(tmp_path):
    """As in JSON lines, and in a file of prompts."""
    path = tmp_path / "a.txt"
    path.write_text("\ufeffHello\n<|endoftext|>\n\ufeffworld", encoding="utf-8")
    assert list(documents.read_documents(path)) == ["Hello\n", "\ufeffworld"]
    assert prepared(path) == [*BYTES.encode("Hello\n"), 256, *BYTES.encode("\ufeffworld"), 256]


@pytest.mark.parametrize("text", ["word{},item;", "a[sep|tok]", "New York", "b New York é"])
def test_a_long_document_has_the_ids_of_the_whole_text(tmp_path, monkeypatch, rng, text):
    """Wherever it is cut, with a tokenizer that adds spaces and with added tokens."""
    monkeypatch.setattr(documents, "BLOCK", int(rng.integers(200, 300)))
    added = {
        text: AddedToken(SMALL.n_vocab + i, is_special=False, normalized=False)
        for i, text in enumerate(["[sep|tok]", "New York"])
    }
    added[ENDOFTEXT] = AddedToken(SMALL.endoftext)
    vocab = {piece: id for piece, id in SMALL.vocab.items() if piece != ENDOFTEXT}
    text = "".join(text.format(i) for i in range(1000))
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    for add_prefix_space in (False, True):
        how = {"end_ids": [SMALL.endoftext], "add_prefix_space": add_prefix_space}
        encoder = Encoder(SMALL.merges, vocab, added=added, **how)
        assert prepared(path, encoder=encoder) == [*encoder.encode(text), SMALL.endoftext]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json", "a.jsonl.gz"])
def test_examples_are_read_whatever_their_files_are_called(tmp_path, name):
    rows = {"prompt": "a", "completion": f" b{ENDOFTEXT}"}, {"prompt": "a", "completion": " b"}
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    path = str(tmp_path / name)
    assert examples.is_examples(path)
    (first, second), *_ = examples.load_examples(path, Encoder([]), 99)
    assert first.tolist() == second.tolist() and first[-1] == 256 and len(first) == 4


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
@pytest.mark.parametrize("n_vocab", [200, 50257])
def test_the_width_of_bare_ids_is_told_by_their_zeros(tmp_path, dtype, n_vocab):
    ids = np.random.default_rng().integers(0, n_vocab, 64)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    (found,) = open_shards(tmp_path)[0]["train"]
    assert found.tolist() == ids.tolist(), ids


def test_an_unknown_magic_is_refused_and_a_missing_tokenizer_is_said(tmp_path, capsys):
    header = np.zeros(256, "<i4")
    header[:3] = 20251231, 1, 8
    (tmp_path / "train.bin").write_bytes(header.tobytes() + bytes(16))
    with pytest.raises(ValueError, match="train.bin: its header begins with 20251231"):
        open_shards(tmp_path)
    np.arange(64, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"pickle")
    open_shards(tmp_path)
    assert "meta.pkl" in capsys.readouterr().err


def test_links_are_followed_once_and_what_is_left_out_is_said(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "text.txt").write_text("text")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "broken.txt").symlink_to(tmp_path / "none")
    name = str(tmp_path / "a" / "linked" / "text.txt")
    assert documents.find_files([str(tmp_path / "a"), name], tmp_path / "s") == [name, name]
    err = capsys.readouterr().err
    assert "broken.txt" in err and "1 file named more than once" in err


@pytest.mark.parametrize("data", ['[{"text": "a"}]', '[\n{"text": "a"}\n]'])
def test_a_list_of_json_is_refused_with_what_to_do(tmp_path, data):
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(ValueError, match="line 1: .*jq -c"):
        texts.read_text(str(tmp_path / "a.json"))
