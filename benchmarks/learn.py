"""How fast does encoder.train learn a vocabulary, beside Hugging Face's trainer (in Rust)?

usage: python benchmarks/learn.py TEXT [N_VOCAB]

Learns 500 entries from the first 130 kB of a text, 1024 from all of it, and N_VOCAB if that is
given; both take turns in one process. A text larger than 10 MB is learned from once, as a stream of
lines, and the memory of the process stated. Without arguments it takes data/shakespeare.txt.
"""

import resource
import sys
import time
from pathlib import Path
from statistics import median

from common import machine
from encode import DEFAULTS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import encoder

ROUNDS = 5


def theirs(text, n_vocab):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)


def compare(name, text, n_vocab):
    seconds = {"ours": [], "theirs": []}
    for _ in range(ROUNDS):
        for side, learn in ("ours", encoder.train), ("theirs", theirs):
            start = time.perf_counter()
            learn(text, n_vocab)
            seconds[side].append(time.perf_counter() - start)
    mine, other = median(seconds["ours"]), median(seconds["theirs"])
    print(f"{name} to {n_vocab}: {mine:.2f} s, Hugging Face {other:.2f} s, {other / mine:.2f}x")


def main(path, n_vocab=None):
    print(machine())
    if path.stat().st_size > 1e7:
        start = time.perf_counter()
        with open(path, encoding="utf-8", errors="replace") as lines:
            learned = encoder.train(lines, n_vocab or 8192)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{path.stat().st_size / 1e6:.0f} MB to {learned.n_vocab}: "
            f"{time.perf_counter() - start:.1f} s, {memory:.0f} MiB resident"
        )
        return
    text = path.read_text("utf-8")
    compare("130 kB", text[:130_000], 500)
    compare("all of it", text, n_vocab or 1024)


if __name__ == "__main__":
    if len(sys.argv) > 3 or not Path(*sys.argv[1:2] or DEFAULTS[:1]).is_file():
        sys.exit("usage: python benchmarks/learn.py TEXT [N_VOCAB]")
    main(Path(*sys.argv[1:2] or DEFAULTS[:1]), *map(int, sys.argv[2:]))
