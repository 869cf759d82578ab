"""Kills, full disks, folders that turn read-only or vanish, clocks that go back: at any moment.

What was complete is still there, what is not complete does not look it, and the next run goes on.
SIGXTYGPT_KILLS raises the number of kills at random times: SIXTYGPT_KILLS=50 pytest -k random
"""

import hashlib
import os
import subprocess
import sys

import pytest
import test_download
from conftest import REPO

server = test_download.server  # a fixture
FAULTS = ("killed", "full", "read-only")


def python(code, *args, timeout=120):
    """Run some Python, with tests/ and the project to import from; -> its lines."""
    paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


# At every single change that the code makes to a folder

DOWNLOAD = """
import os, sys, faults, utils
url, folder, fault, sha256 = sys.argv[1:]
path = folder + "/new/file"
utils.BACKOFF = 0.001

def whole():
    with open(path, "rb") as f:
        return utils.hashlib.file_digest(f, "sha256").hexdigest() == sha256

for n in faults.at_every_change(folder, fault, lambda: utils.download_file(url, path)):
    part = path + ".part"
    all_there = os.path.exists(part) and os.path.getsize(part) == 300_000
    assert not os.path.exists(path) or whole()
    utils.download_file("http://127.0.0.1:9/nobody" if all_there else url, path)
    assert whole() and set(os.listdir(folder + "/new")) <= {"file", "file.part.json"}
print(n)
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_survives_a_fault_at_every_step(server, tmp_path, fault):
    sha256 = hashlib.sha256(server.files[test_download.FILE]).hexdigest()
    *lines, n = python(
        DOWNLOAD, server.url + test_download.FILE, tmp_path / "models", fault, sha256
    )
    assert int(n) >= (4 if fault == "full" else 6)  # folders, part, note; and the renaming
    assert all(line.startswith(f"cannot write {tmp_path}/models/new/file: ") for line in lines)
    assert len(lines) == (0 if fault == "killed" else int(n))
