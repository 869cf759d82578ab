"""Does anything grow in a long run? Memory, open files and threads of the engine and the trainers.

usage: python benchmarks/endurance.py generate [GENERATIONS]     # 10000, of changing batches
       python benchmarks/endurance.py train [MINUTES]            # 20, a checkpoint every 50 steps
       python benchmarks/endurance.py backprop [MINUTES]         # the same by backprop.py

Prints a line at every tenth. Linux only: it reads /proc. For the server, benchmarks/serve.py does
the same: python benchmarks/serve.py load 1200 32
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
from common import ROOT, random_params

import kv_cache


def usage(pid="self"):  # -> MiB in memory, open files, threads, of all its processes together
    with open(f"/proc/{pid}/status") as f:
        status = dict(line.split(":", 1) for line in f)
    files, own = len(os.listdir(f"/proc/{pid}/fd")), status["Pid"].strip()
    total = int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])
    with open(f"/proc/{own}/task/{own}/children") as f:  # what they share counts in each
        return tuple(map(sum, zip(total, *map(usage, f.read().split()), strict=True)))


def report(done, pid="self"):
    memory, files, threads = usage(pid)
    print(f"{done}: {memory:.1f} MiB, {files} files, {threads} threads", flush=True)


def generate(n):
    """Batches of 1 to 16 prompts, of 1 to 100 tokens, greedy and sampled, some left half-way."""
    rng = np.random.default_rng(0)
    params = random_params({"n_vocab": 257, "n_ctx": 128, "n_embd": 64, "n_head": 4, "n_layer": 2})
    done, tenth = 0, 0
    while done < n:
        lengths = rng.integers(1, 101, size=rng.integers(1, 17))
        prompts = [rng.integers(257, size=length).tolist() for length in lengths]
        options = {"batch_size": int(rng.integers(1, 9)), "temperature": float(rng.choice([0, 1]))}
        rows = kv_cache.generate_stream(prompts, params, 4, int(rng.integers(1, 28)), **options)
        for _ in range(int(rng.choice([3, 10**9]))):  # 3: left half-way
            if next(rows, None) is None:
                break
        done += len(prompts)
        if done * 10 // n > tenth:
            tenth = done * 10 // n
            report(f"{done} generations")


def train(minutes, script="train_jax.py"):
    """The default recipe, as a process of its own, from python-docs; SIGTERM ends it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / script, "--data", "python-docs", "--out", folder]
        command += ["--n_steps", "1000000", "--eval_every", "100", "--checkpoint_every", "50"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for tenth in range(1, 11):
            time.sleep(6 * minutes)
            report(f"{tenth * minutes / 10:g} minutes", process.pid)
        process.terminate()
        print("exit code", process.wait())


if __name__ == "__main__":
    works = {"generate": (generate, 10_000), "train": (train, 20)}
    works["backprop"] = partial(train, script="backprop.py"), 20
    if sys.argv[1:2] not in [[what] for what in works]:
        sys.exit(__doc__)
    work, amount = works[sys.argv[1]]
    work(float(sys.argv[2]) if sys.argv[2:] else amount)
