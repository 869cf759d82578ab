"""How fast is prepare.py, in how much memory?

usage: python benchmarks/prepare.py TEXT TOKENIZER_FOLDER [MEGABYTES]

Makes a file of so many megabytes (1100 unless told): short documents, stretches from random places
of TEXT, with a line of <|endoftext|> between them, as TinyStories has them. Then prepares it, the
sides taking turns: as bytes with one worker, with GPT-2's tokens on all processors, and beside the
latter tiktoken's encoder in one process, on as many of the same documents as one shard has. Last,
all of the file on all processors, with the memory of all processes together, sampled every 50 ms.
Without arguments it takes data/shakespeare.txt and models/124M.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import ROOT, machine
from encode import DEFAULTS, tiktoken_encoding

import encoder as ours

ROUNDS, SHORT = 5, 100  # megabytes of the runs that are repeated
LINE = "\n<|endoftext|>\n"


def write_stories(path, text, megabytes):
    """Documents of 200 to 1500 characters, until the file has its size."""
    rng, size = random.Random(0), 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        while size < megabytes * 1e6:
            starts = [rng.randrange(len(text) - 1500) for _ in range(1000)]
            stories = LINE.join(text[i : i + rng.randrange(200, 1500)] for i in starts) + LINE
            size += len(stories.encode())
            file.write(stories)


def prepare(path, folder, *flags):
    """Run it; return the seconds that the whole process took."""
    out = Path(folder, f"out{time.monotonic_ns()}")
    start = time.perf_counter()
    command = [sys.executable, ROOT / "prepare.py", path, "--out", out, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    elapsed = time.perf_counter() - start
    subprocess.run(["rm", "-r", out], check=True)
    return elapsed


def peak_memory(process):
    """The largest sum of resident memory of a process and its children, in MiB."""
    peak = 0
    while process.poll() is None:
        done = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(process.pid), "--ppid", str(process.pid)],
            capture_output=True,
        )
        peak = max(peak, sum(map(int, done.stdout.split())))
        time.sleep(0.05)
    return peak / 1024


def main(text_file, tokenizer_folder, megabytes=1100):
    tokenizer_folder = tokenizer_folder.resolve()
    n_cores = os.cpu_count()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        text = text_file.read_text("utf-8")
        long, short = Path(folder, "long.txt"), Path(folder, "short.txt")
        write_stories(long, text, megabytes)
        write_stories(short, text, SHORT)
        rust = tiktoken_encoding(ours.get_encoder("", tokenizer_folder))
        stories = short.read_text("utf-8").split(LINE)[:30_000]
        n_mb = sum(len(story.encode()) for story in stories) / 1e6

        def tiktoken():
            start = time.perf_counter()
            for story in stories:
                rust.encode_ordinary(story)
            return (time.perf_counter() - start) / n_mb

        bpe = ["--tokenizer", tokenizer_folder]
        speeds = {
            "bytes, one worker": lambda: prepare(short, folder, "--workers", "1") / SHORT,
            "GPT-2's tokens, one worker": lambda: (
                prepare(short, folder, *bpe, "--workers", "1") / SHORT
            ),
            f"GPT-2's tokens, {n_cores} workers": lambda: prepare(short, folder, *bpe) / SHORT,
            "tiktoken, one process, no output": tiktoken,
        }
        seconds = {name: [] for name in speeds}
        for _ in range(ROUNDS):
            for name, run in speeds.items():
                seconds[name].append(run())
        for name, values in seconds.items():
            print(f"{name:36}{1 / median(values):8.1f} MB/s")
        size = long.stat().st_size / 1e6
        for flags in ([], bpe):
            start = time.perf_counter()
            command = [
                sys.executable,
                ROOT / "prepare.py",
                long,
                "--out",
                Path(folder, "o"),
                *flags,
            ]
            memory = peak_memory(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            elapsed = time.perf_counter() - start
            subprocess.run(["rm", "-r", Path(folder, "o")], check=True)
            what = "GPT-2's tokens" if flags else "bytes"
            print(
                f"{size:.0f} MB, {what}, {n_cores} workers: {elapsed:.1f} s, {size / elapsed:.1f} "
                f"MB/s, {memory:.0f} MiB resident in all"
            )


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:3]] or DEFAULTS
    if len(paths) != 2 or not all(path.exists() for path in paths):
        sys.exit("usage: python benchmarks/prepare.py TEXT TOKENIZER_FOLDER [MEGABYTES]")
    main(*paths, *map(float, sys.argv[3:4]))
