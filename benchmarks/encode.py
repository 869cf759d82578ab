"""How fast is encoder.py, beside picoGPT's encoder, tiktoken and Hugging Face's tokenizers?

usage: python benchmarks/encode.py TEXT TOKENIZER_FOLDER

Encodes four texts with the GPT-2 vocabulary of a folder (encoder.json + vocab.bpe): an English text
file, made-up Chinese, the source of Python's standard library, and random bytes. The encoders take
turns in one process, and all must give the same ids. "cold" is the first time that a new encoder
sees the text, "warm" the second. tiktoken has no cache, and tokenizers has kept its own since the
first round. Without arguments it takes data/shakespeare.txt and models/124M, where the trainer and
gpt2.py put their downloads.
"""

import sys
import sysconfig
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import regex
import tiktoken
import tokenizers
from common import ROOT, machine

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


def hugging_face_tokenizer(encoder):
    """Build Hugging Face's tokenizer, which is written in Rust, from the same vocabulary."""
    vocab = {piece: id for piece, id in encoder.vocab.items() if piece != ours.ENDOFTEXT}
    model = tokenizers.models.BPE(vocab, encoder.merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def chinese(rng, n_chars=300_000):
    """Sentences of common characters, some far commoner than others, as in real text."""
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    shares = 1 / np.arange(1, 3001)
    drawn = rng.choice(3000, n_chars, p=shares / shares.sum())
    signs = rng.random(n_chars) < 0.1
    return "".join(
        "，。"[i % 2] if sign else characters[i] for i, sign in zip(drawn, signs, strict=True)
    )


def code(n_bytes=1_000_000):
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py")))
    return text[:n_bytes]


def random_bytes(rng, n_bytes=300_000):
    return rng.bytes(n_bytes).decode("utf-8", "replace")


def seconds(encode, text):
    start = time.perf_counter()
    ids = encode(text)
    return time.perf_counter() - start, ids


def measure(text, base):  # -> {name: MB/s}
    rust, face = tiktoken_encoding(base), hugging_face_tokenizer(base)
    expected = rust.encode_ordinary(text)
    names = "ours cold", "ours warm", "pico cold", "pico warm", "tiktoken", "tokenizers"
    times = {name: [] for name in names}
    for _ in range(ROUNDS):
        mine = ours.Encoder(base.merges, base.vocab)
        pico = PicoEncoder(mine)
        encodes = [mine.encode, mine.encode, pico.encode, pico.encode]
        encodes += [rust.encode_ordinary, lambda text: face.encode(text).ids]
        for name, encode in zip(times, encodes, strict=True):
            elapsed, ids = seconds(encode, text)
            assert ids == expected, f"{name}: other ids than tiktoken's"
            times[name].append(elapsed)
    mb = len(text.encode()) / 1e6
    return {name: mb / median(elapsed) for name, elapsed in times.items()}


def main(text_file, tokenizer_folder):
    folder = tokenizer_folder.resolve()
    base = ours.get_encoder(folder.name, folder.parent)
    rng = np.random.default_rng(0)
    texts = {
        text_file.name: text_file.read_text("utf-8"),
        "Chinese": chinese(rng),
        "Python's source": code(),
        "random bytes": random_bytes(rng),
    }
    print(f"{machine()}, tokenizers {tokenizers.__version__}; MB/s, medians of {ROUNDS} rounds")
    for i, (name, text) in enumerate(texts.items()):
        speeds = measure(text, base)
        if i == 0:
            print(f"{'':18}" + "".join(f"{column:>12}" for column in speeds))
        print(f"{name:18}" + "".join(f"{speed:12.2f}" for speed in speeds.values()))


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]] or DEFAULTS
    if len(paths) != 2 or not all(path.exists() for path in paths):
        sys.exit("usage: python benchmarks/encode.py TEXT TOKENIZER_FOLDER (with encoder.json)")
    main(*paths)
