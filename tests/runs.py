"""Trainers that run as processes of their own, for tests that stop them half-way."""

import gc
import re
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
from conftest import REPO, run, tree_map

import training.run
from model_files import weights


def begin(script, *args):
    command = [sys.executable, str(REPO / script), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(out, step, process):
    end = time.monotonic() + 120
    while process.poll() is None and not (out / f"checkpoints/{step:08d}/run.json").exists():
        assert time.monotonic() < end
        time.sleep(0.002)


def stop_and_go_on(script, args, out, sign, step, n_steps):
    """A run that gets a signal after that step, and is then resumed to its last one."""
    process = begin(script, *args, "--out", out)
    wait_for_step(out, step, process)
    process.send_signal(getattr(signal, sign))
    printed, err = process.communicate(timeout=120)
    assert (process.returncode, err) == ({"SIGINT": 130, "SIGTERM": 143}[sign], "")
    stopped = int(re.search(r"stopped after step (\d+), which is saved in ", printed)[1])
    assert step <= stopped < n_steps
    assert (out / "checkpoints" / f"{stopped:08d}" / "run.json").exists()
    code, printed, err = run(script, "--resume", out)
    assert (code, err) == (0, "") and f"step {n_steps}:" in printed


def count_arrays_left(monkeypatch, trainer_class):
    """-> a list: whenever batches are read, how many arrays of the model it began with still exist.

    That is before the first step, and after each.
    """
    load, read = training.run.load_encoder_hparams_and_params, trainer_class.read
    arrays, n_left = [], []

    def load_copies(*args):
        model = load(*args)
        params = tree_map(np.array, model.params)
        arrays.extend(map(weakref.ref, weights.leaves(params).values()))
        return model._replace(params=params)

    def count_and_read(*args):
        gc.collect()
        assert arrays
        n_left.append(sum(array() is not None for array in arrays))
        return read(*args)

    monkeypatch.setattr(training.run, "load_encoder_hparams_and_params", load_copies)
    monkeypatch.setattr(trainer_class, "read", count_and_read)
    return n_left
