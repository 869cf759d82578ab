"""Texts as people have them: every command reads the same documents, or refuses them in a line."""

import os

import conftest
import pytest

from corpus import documents
from corpus.documents import Span

SHADOWS = ("threading", "json", "regex", "tempfile", "signal", "numpy")  # what a worker imports


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


def shadow_modules(folder):
    """Modules of the standard library's names, each of which says that it was executed."""
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(
            f"import pathlib\npathlib.Path({str(folder / 'executed')!r}).write_text({name!r})\n"
        )


@pytest.mark.parametrize("ray", [False, conftest.slow(True)])
def test_workers_execute_nothing_of_the_current_folder(tmp_path, ray):
    if ray:
        pytest.importorskip("ray", reason="ray is not installed (requirements/ray.txt)")
    shadow_modules(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time.\n" * 100)
    flags = ["--ray", "local"] if ray else ["--workers", 2]
    args = ["text.txt", "--out", "s", "--shard_mb", "0.0002", *flags]
    before = dict(os.environ)
    code, _, err = conftest.run("prepare.py", *args, cwd=tmp_path)
    assert code == 0, err
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()
    assert dict(os.environ) == before
