"""plumbing/files.py: what is not read, and what is never half-written."""

import os

import pytest

from plumbing import files


def test_a_file_may_have_as_many_bytes_as_are_allowed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert files.read_json(path, n_most=8) == {"a": 1}
    with pytest.raises(ValueError, match="a.json: 8 bytes, more than the 7 allowed"):
        files.read_json(path, n_most=7)


def test_what_is_no_ordinary_file_is_not_opened(tmp_path):
    """A pipe would have us wait, /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match="not an ordinary file"):
            files.read_json(path)
        with pytest.raises(ValueError, match=f"{path}: not an ordinary file"):
            files.open_locked(path)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "nothing")


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"\xff{}", b"{", b'{"a": NaN} x', b"[" * 10**5])
def test_what_is_no_json_object_is_a_line_that_names_the_file(data):
    with pytest.raises(ValueError, match="^x.json: not (JSON|a JSON object)") as caught:
        files.parse_json(data, "x.json")
    assert "\n" not in str(caught.value)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_whole(path, "one\r\ntwo\n é")
    assert path.read_bytes() == "one\r\ntwo\n é".encode()
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_whole(path, "new")
    assert synced == [3] and path.read_text("utf-8").startswith("one")
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(path, "\ud83d")
    assert os.listdir(tmp_path) == ["a.txt"]
    files.remove(path, tmp_path / "nothing")
    assert os.listdir(tmp_path) == []


def test_a_locked_file_is_appended_to_and_ours_alone(tmp_path):
    path = tmp_path / "log"
    path.write_text("one ")
    with files.open_locked(path) as f:
        f.write(b"two")
        with pytest.raises(BlockingIOError):
            files.open_locked(path, wait=False)
    with files.open_locked(path, wait=False):
        assert path.read_text() == "one two"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        files.open_locked(tmp_path / "link")
