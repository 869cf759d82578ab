"""Trainers that run as processes of their own, for tests that stop them half-way."""

import subprocess
import sys
import time

from conftest import REPO


def begin(script, *args):
    command = [sys.executable, str(REPO / script), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(out, step, process):
    end = time.monotonic() + 120
    while process.poll() is None and not (out / f"checkpoints/{step:08d}/run.json").exists():
        assert time.monotonic() < end
        time.sleep(0.002)
