"""How fast is encoder.py, beside picoGPT's encoder and tiktoken?

usage: python benchmarks/encode.py TEXT TOKENIZER_FOLDER

Encodes a text file with the GPT-2 vocabulary of a folder (encoder.json + vocab.bpe). The three
take turns in one process, and all must give the same ids. "cold" is the first time that a new
encoder sees the text, "warm" the second. Without arguments it takes data/shakespeare.txt and
models/124M, where the trainer and gpt2.py put their downloads.
"""

import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import regex
import tiktoken
from common import ROOT

import encoder as ours

DEFAULTS = [ROOT / "data" / "shakespeare.txt", ROOT / "models" / "124M"]
ROUNDS = 7


class PicoEncoder:
    """The algorithm of OpenAI's encoder.py, which picoGPT uses as it is, restated.

    Each piece becomes a tuple of symbols; each round finds the best of all pairs of neighbours
    and rebuilds the tuple with every occurrence joined; finished pieces stay in a dict as one
    string with spaces, which every use splits and looks up again.
    """

    def __init__(self, encoder):
        self.vocab, self.cache = encoder.vocab, {}
        self.ranks = {pair: rank for rank, pair in enumerate(encoder.merges)}
        self.pattern = regex.compile(ours.PIECE.pattern)

    def encode(self, text):
        ids = []
        for piece in self.pattern.findall(text):
            printable = "".join(ours.CHAR_OF_BYTE[byte] for byte in piece.encode())
            ids.extend(self.vocab[symbol] for symbol in self.merge(printable).split(" "))
        return ids

    def merge(self, printable):
        if printable in self.cache:
            return self.cache[printable]
        symbols = tuple(printable)
        while len(symbols) > 1:
            pairs = set(pairwise(symbols))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, float("inf")))
            if best not in self.ranks:
                break
            symbols = join_everywhere(symbols, best)
        self.cache[printable] = " ".join(symbols)
        return self.cache[printable]


def join_everywhere(symbols, pair):
    left, right = pair
    joined, i = [], 0
    while i < len(symbols):
        try:
            j = symbols.index(left, i)
        except ValueError:
            joined.extend(symbols[i:])
            break
        joined.extend(symbols[i:j])
        if symbols[j + 1 : j + 2] == (right,):
            joined.append(left + right)
            i = j + 2
        else:
            joined.append(left)
            i = j + 1
    return tuple(joined)


def tiktoken_encoding(encoder):
    """Build tiktoken's encoder from the same vocabulary, without its download."""
    pieces = {piece: id for piece, id in encoder.vocab.items() if piece != ours.ENDOFTEXT}
    ranks = {bytes(map(ours.BYTE_OF_CHAR.get, piece)): id for piece, id in pieces.items()}
    special = {ours.ENDOFTEXT: encoder.endoftext}
    pattern = ours.PIECE.pattern
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def seconds(encode, text):
    start = time.perf_counter()
    ids = encode(text)
    return time.perf_counter() - start, ids


def main(text_file, tokenizer_folder):
    text = text_file.read_text("utf-8")
    mb = len(text.encode()) / 1e6
    folder = tokenizer_folder.resolve()
    times = {name: [] for name in ["ours cold", "ours warm", "pico cold", "pico warm", "tiktoken"]}
    rust = tiktoken_encoding(ours.get_encoder(folder.name, folder.parent))
    expected = rust.encode_ordinary(text)
    for _ in range(ROUNDS):
        mine = ours.get_encoder(folder.name, folder.parent)
        pico = PicoEncoder(mine)
        encodes = [mine.encode, mine.encode, pico.encode, pico.encode, rust.encode_ordinary]
        for name, encode in zip(times, encodes, strict=True):
            elapsed, ids = seconds(encode, text)
            assert ids == expected, f"{name}: other ids than tiktoken's"
            times[name].append(elapsed)
    speed = {name: mb / median(elapsed) for name, elapsed in times.items()}
    print(f"{text_file.name}, {mb:.1f} MB, {len(expected)} tokens, medians of {ROUNDS} rounds")
    print(f"{'':12}{'MB/s':>8}{'times pico, cold':>20}{'times pico, warm':>20}")
    for name, rate in speed.items():
        cold, warm = rate / speed["pico cold"], rate / speed["pico warm"]
        print(f"{name:12}{rate:8.1f}{cold:20.1f}{warm:20.1f}")


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]] or DEFAULTS
    if len(paths) != 2 or not all(path.exists() for path in paths):
        sys.exit("usage: python benchmarks/encode.py TEXT TOKENIZER_FOLDER (with encoder.json)")
    main(*paths)
