"""encoder.py against plain twins, tiktoken and Hugging Face, on text of every kind."""

import codecs
import json
import os
import pickle
import random
import re
import shutil
import string
import sys
import unicodedata
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from conftest import GPT2_FILES, SHAKESPEARE
from hypothesis import given, settings
from hypothesis import strategies as st

import encoder as encoder_module
from encoder import (
    ASCII_PIECE,
    CACHE_CHARS,
    ENDOFTEXT,
    PIECE,
    SOLID,
    SPACE,
    Encoder,
    get_encoder,
    merge_long,
    merge_short,
    train,
)
from model_files.tokenizer import find_tokenizer, parse_merges
from model_files.vocabulary import BYTE_OF_CHAR, CHAR_OF_BYTE
from plumbing.files import MOST_BYTES

TEXTS = {
    "empty": "",
    "prose": "Not all heroes wear capes. I'll say it's 'tis, DON'T we'LL they'd  two  spaces.\n",
    "code": "def f(x):\n\treturn {\"a\": x**2, 'b': [1, 22, 333]}  # done\r\n\n\n    pass\n  ",
    "emoji": "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇳🇱 and 😀😀",
    "chinese": "我能吞下玻璃而不伤身体。 今天天气 很好!",
    "arabic": "أنا قادر على أكل الزجاج و هذا لا يؤلمني ١٢٣",
    "accents": "Zażółć gęślą jaźń, e\u0301 is not \u00e9, ﬁ Ⅷ ² ½ नमस्ते",
    "controls": "".join(map(chr, range(33))) + "\x7f\x80\x85\xa0 a\x0bb \x00\x00 c",
    "spaces": " \u3000 \u2028\u2029 x\u00a0y \u200b z \u1680 \t \n ",
    "endoftext": f"one{ENDOFTEXT}two {ENDOFTEXT}\n\n{ENDOFTEXT} three <|endoftext <|endoftext|",
    "invalid bytes": bytes(range(256)).decode("utf-8", errors="replace"),
    "surrogates": bytes(range(256)).decode("utf-8", errors="surrogateescape"),
    "numbers": "3.14159 1,000,000 0xff 1e-10 ٣٤ १२",
    "long words": "x" * 199 + " " + "ab" * 100 + " " * 300 + "-" * 201,
}
every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())

# Characters newer than this Python's Unicode may be letters to one library and signs to another.
assigned = st.characters(exclude_categories=["Cs", "Cn"])
telling = st.sampled_from(list("aZ é'stdlrevm19.!-_\t\n \r\x0b\x1c\x1d\x1e\x1f\x85\xa0\u3000中😀½"))
strings = st.lists(telling | assigned, max_size=60).map("".join)
fuzz = settings(max_examples=200, deadline=None, database=None, print_blob=True)


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # pytest shows it where a test fails
    return random.Random(seed)


def need_gpt2_files():
    if not (GPT2_FILES / "encoder.json").is_file():
        pytest.skip(f"GPT-2's tokenizer files are not in {GPT2_FILES} (set SIXTYGPT_DATA)")


@pytest.fixture(scope="module")
def gpt2():
    need_gpt2_files()
    return get_encoder(GPT2_FILES.name, GPT2_FILES.parent)


@pytest.fixture(scope="module")
def tiktoken_gpt2():
    """tiktoken from OpenAI's files, read here rather than by the module under test."""
    need_gpt2_files()
    tiktoken = pytest.importorskip("tiktoken")
    vocab = json.loads((GPT2_FILES / "encoder.json").read_text("utf-8"))
    special = {ENDOFTEXT: vocab.pop(ENDOFTEXT)}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of_char = {chr(byte): byte for byte in shown}
    byte_of_char |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    ranks = {bytes(byte_of_char[char] for char in piece): id for piece, id in vocab.items()}
    pattern = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding("g", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def hugging_face_gpt2(tmp_path_factory):
    need_gpt2_files()
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hugging_face")
    shutil.copyfile(GPT2_FILES / "encoder.json", folder / "vocab.json")
    shutil.copyfile(GPT2_FILES / "vocab.bpe", folder / "merges.txt")
    return transformers.GPT2TokenizerFast.from_pretrained(folder)


def train_plainly(texts, n_vocab):
    """Learn merges in the plainest way: count every pair anew for each of them."""
    documents = [document for text in texts for document in text.split(ENDOFTEXT)]
    pieces = [piece for document in documents for piece in PIECE.findall(document)]
    words = Counter(tuple(CHAR_OF_BYTE[byte] for byte in piece.encode()) for piece in pieces)
    merges = []
    while len(merges) < n_vocab - 257:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], *map(bytes_of, pair)))
        words = Counter({tuple(join_pair(word, best)): n for word, n in words.items()})
        merges.append(best)
    return merges


def bytes_of(piece):
    return bytes(BYTE_OF_CHAR[char] for char in piece)


def join_pair(symbols, pair):
    """Join every occurrence of one pair: ["a", "b", "a"], ("a", "b") -> ["ab", "a"]."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def encode_plainly(encoder, text):
    """OpenAI's algorithm without any cache: each round joins the best pair wherever it stands."""
    ranks = {pair: rank for rank, pair in enumerate(encoder.merges)}
    ids = []
    for piece in PIECE.findall(text):
        symbols = [CHAR_OF_BYTE[byte] for byte in piece.encode()]
        while known := [pair for pair in pairwise(symbols) if pair in ranks]:
            symbols = join_pair(symbols, min(known, key=ranks.get))
        ids += [encoder.vocab[symbol] for symbol in symbols]
    return ids


def merge_plainly(ids, ranks, merged):
    """Join the best, leftmost pair, one at a time."""
    ids = list(ids)
    while known := [i for i in range(len(ids) - 1) if (ids[i], ids[i + 1]) in ranks]:
        i = min(known, key=lambda i: ranks[ids[i], ids[i + 1]])
        ids[i : i + 2] = [merged[ranks[ids[i], ids[i + 1]]]]
    return ids


def mended(text):
    """The text without lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# A small vocabulary, 400 merges, learned from the module's own source.
small = Encoder(train_plainly([Path(encoder_module.__file__).read_text("utf-8")], 657))
bytes_only = Encoder([])
both = pytest.mark.parametrize("encoder", [small, bytes_only], ids=["small", "bytes"])


# By hand


def test_ids_checked_by_hand():
    encoder = Encoder([("l", "o"), ("lo", "w"), ("Ġ", "low")])
    assert encoder.encode("low low lo") == [257, 258, 220, 256]
    assert encoder.encode("Hi!") == [39, 72, 0]  # "!" is GPT-2's id 0, "A" is 32
    assert encoder.decode([257, 258, 220, 256]) == "low low lo"
    assert (encoder.n_vocab, encoder.endoftext) == (260, 259)


def test_the_byte_model():
    assert (bytes_only.n_vocab, bytes_only.endoftext) == (257, 256)
    assert bytes_only.encode("") == []
    assert bytes_only.encode(" A\n") == [220, 32, 198]  # as in GPT-2
    every_byte = [bytes_only.vocab[CHAR_OF_BYTE[byte]] for byte in range(256)]
    assert sorted(every_byte) == list(range(256))
    text = "é😀 naïve\x00"
    assert bytes_only.encode(text) == [every_byte[byte] for byte in text.encode()]


def test_two_merges_that_make_one_piece_share_its_id():
    encoder = Encoder([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])
    assert encoder.encode("abc") == [encoder.vocab["abc"]] == [258]
    assert encoder.n_vocab == 256 + 3 + 1


def test_a_vocabulary_with_other_ids_and_gaps():
    vocab = {char: 1000 + 2 * i for i, char in enumerate(CHAR_OF_BYTE.values())} | {"ab": 5}
    encoder = Encoder([("a", "b")], vocab)
    assert encoder.encode("abc") == [5, vocab["c"]]
    assert (encoder.n_vocab, encoder.endoftext) == (1511, None)
    assert Encoder([], vocab).encode("ab") == [vocab["a"], vocab["b"]]
    assert encoder.encode(ENDOFTEXT, allow_endoftext=True) == encoder.encode(ENDOFTEXT)


@both
def test_endoftext_is_text_unless_asked_for(encoder):
    end = encoder.endoftext
    assert end not in encoder.encode(f"a{ENDOFTEXT}b")
    ids = encoder.encode(f"a {ENDOFTEXT}{ENDOFTEXT}b", allow_endoftext=True)
    assert ids == [*encoder.encode("a "), end, end, *encoder.encode("b")]
    assert encoder.encode(ENDOFTEXT, allow_endoftext=True) == [end]
    assert encoder.encode("", allow_endoftext=True) == []
    assert encoder.decode(ids) == f"a {ENDOFTEXT}{ENDOFTEXT}b"


@both
def test_surrogates(encoder):
    assert encoder.encode("\ud83d\ude00") == encoder.encode("😀")
    assert encoder.encode("a\ud83d b\udc80") == encoder.encode("a\ufffd b\ufffd")
    assert encoder.encode("\ufeffa") != encoder.encode("a")  # not taken for a byte order mark


def test_words_part_at_the_white_space_of_the_pattern():
    """`re` and `regex` each bring their own Unicode; WORD relies on the same white space."""
    characters = "".join(map(chr, range(0x110000)))
    assert re.findall(SPACE, characters) == regex.findall(r"\s", characters)
    assert len(re.findall(SOLID, characters)) == len(regex.findall(r"\S", characters))


def test_the_four_separators_are_signs_not_white_space():
    """OpenAI's encoder cuts with `regex`, to which \\x1c to \\x1f are not \\s; to `re` they are."""
    for char in "\x1c\x1d\x1e\x1f":
        assert PIECE.findall(f"a {char}b  {char}") == ["a", f" {char}", "b", " ", f" {char}"]
        encoder = Encoder([("Ġ", CHAR_OF_BYTE[ord(char)])])
        assert encoder.encode(f"a  {char}") == [*encoder.encode("a"), 220, 256]


# Twins and properties, with vocabularies made on the spot


@both
@every_text
def test_ids_are_the_plain_algorithms(encoder, text):
    assert encoder.encode(text) == encode_plainly(encoder, mended(text))


@both
@every_text
def test_round_trip(encoder, text):
    assert encoder.decode(encoder.encode(text)) == mended(text)


@fuzz
@given(strings)
def test_any_string(text):
    for encoder in small, bytes_only:
        ids = encoder.encode(text)
        assert ids == encode_plainly(encoder, text)
        assert encoder.decode(ids) == text


@fuzz
@given(st.text(alphabet="ab ", max_size=80), st.randoms(use_true_random=False))
def test_random_merges(text, rng):
    pieces, merges = list("abĠ"), []
    for _ in range(12):  # only merges of pieces made before, as training would find them
        pair = rng.choice(pieces), rng.choice(pieces)
        if "".join(pair) not in pieces:
            merges.append(pair)
            pieces.append("".join(pair))
    encoder = Encoder(merges)
    assert encoder.encode(text) == encode_plainly(encoder, text)


def test_merges_in_any_order(rng):
    """A merge may come before those that make its parts, so some tokens never come about."""
    n_unreachable = 0
    for _ in range(300):
        pieces, merges = list("abĠ"), []
        for _ in range(10):
            pair = rng.choice(pieces), rng.choice(pieces)
            merges.append(pair)
            pieces.append("".join(pair))
        rng.shuffle(merges)
        encoder = Encoder(merges)
        texts = [piece.replace("Ġ", " ") for piece in pieces]
        for text in [*texts, "".join(rng.choices("ab ", k=80))]:
            expected = []
            for piece in PIECE.findall(text):
                ids = [encoder.vocab[CHAR_OF_BYTE[byte]] for byte in piece.encode()]
                expected += merge_plainly(ids, encoder._ranks, encoder._merged)
            assert encoder.encode(text) == expected, (merges, text)
            if text in texts and len(PIECE.findall(text)) == 1:
                n_unreachable += len(expected) > 1
    assert n_unreachable > 0


@fuzz
@given(
    st.lists(st.integers(0, 5), max_size=120),
    st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.none(), max_size=40),
    st.randoms(use_true_random=False),
)
def test_short_and_long_merge_alike(ids, pairs, rng):
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    merged = [rng.randrange(10) for _ in ranks]
    before = list(ids)
    expected = merge_plainly(ids, ranks, merged)
    assert merge_short(ids, ranks, merged) == expected
    assert merge_long(ids, ranks, merged) == expected
    assert ids == before


@pytest.mark.slow
def test_words_of_a_megabyte(rng):
    """In seconds: one merge at a time over a plain list would take hours."""
    n = 10**6
    encoder = Encoder([*small.merges, ("a", "a"), ("aa", "aa"), ("Ġ" * 2, "Ġ" * 2)])
    assert encoder.encode("a" * n) == [encoder.vocab["aaaa"]] * (n // 4)
    for word in "".join(rng.choices(string.ascii_letters, k=n)), " " * n + "x", "中" * (n // 3):
        assert encoder.decode(encoder.encode(word)) == word
    assert max(map(len, encoder._ids_of_word), default=0) <= CACHE_CHARS


def test_ascii_is_cut_in_the_same_places_by_both_patterns(rng):
    """All of ASCII, with more of what the patterns tell apart."""
    characters = [chr(i) for i in range(128)] + list("'s t re ve m ll d  \t\n\r\x0b\x1c\x1f") * 5
    for _ in range(2000):
        text = "".join(rng.choices(characters, k=rng.randrange(30)))
        assert ASCII_PIECE.findall(text) == PIECE.findall(text), repr(text)


def test_long_pieces_give_the_plain_algorithms_ids(rng):
    for n in 49, 50, 51, 2000:
        for letters in "a", "ab", "self.ids ":
            text = "".join(rng.choices(letters, k=n))
            assert small.encode(text) == encode_plainly(small, text)


def test_caches_are_bounded_and_change_nothing(monkeypatch, rng):
    monkeypatch.setattr(encoder_module, "CACHE_ENTRIES", 10)
    encoder = Encoder(small.merges)
    words = ["".join(rng.choices("abcdef'9,", k=rng.randrange(1, 100))) for _ in range(300)]
    assert encoder.encode(" ".join(words)) == encode_plainly(encoder, " ".join(words))
    for cache in encoder._ids_of_word, encoder._ids_of_piece:
        assert 0 < len(cache) <= 10
        assert max(map(len, cache)) <= CACHE_CHARS
    encoder = Encoder(small.merges)
    encoder.encode("one two three four")
    assert len(encoder._ids_of_word) == len(encoder._ids_of_piece) == 4  # until it is full


def test_the_memory_of_caches_is_bounded(monkeypatch, rng):
    """Words of 64 characters of four bytes have 256 ids each."""
    monkeypatch.setattr(encoder_module, "CACHE_BYTES", 200_000)
    encoder = Encoder(small.merges)
    for _ in range(100):
        encoder.encode("".join(chr(rng.randrange(0x1F600, 0x1F640)) for _ in range(64)))
    for cache in encoder._ids_of_word, encoder._ids_of_piece:
        n_bytes = sum(sys.getsizeof(x) for item in cache.items() for x in item)
        assert 0 < n_bytes <= 200_000 and len(cache) < 30


@pytest.mark.parametrize("letters", ["ab", "aé", "a中", "a😀"])
def test_caches_count_at_least_the_memory_of_their_contents(letters, rng):
    """Python keeps a text in 1, 2 or 4 bytes a character."""
    encoder = Encoder(small.merges)
    for n in range(1, CACHE_CHARS + 1):
        encoder.encode("".join(rng.choices(letters, k=n)))
    for cache in encoder._ids_of_word, encoder._ids_of_piece:
        assert 0 < sum(sys.getsizeof(x) for item in cache.items() for x in item) <= cache.n_bytes


def test_ids_may_lie_anywhere_below_the_most(rng):
    """A byte model whose ids do not begin at 0, and one with the largest id there may be."""
    for ids in range(1, 257), [*range(2**24 - 1, 2**24 - 257, -1)]:
        encoder = Encoder([], dict(zip(BYTES, ids, strict=False)))
        text = "".join(rng.choices(string.printable, k=50))
        assert encoder.encode(text) == [ids[list(BYTES).index(CHAR_OF_BYTE[ord(c)])] for c in text]
        assert encoder.n_vocab == max(ids) + 1 and encoder.decode(encoder.encode(text)) == text
    assert encoder.encode_prompt("") == [] and Encoder([]).encode_prompt("") == [256]


def test_what_a_caller_does_to_the_ids_stays_with_the_caller():
    ids = small.encode("encoder")
    ids.append(0)
    assert small.encode("encoder") == ids[:-1]


def test_an_encoder_travels_to_another_process():
    small.encode("warm words")
    assert pickle.loads(pickle.dumps(small)).encode("warm words") == small.encode("warm words")


# Learning a vocabulary


def test_the_textbook_example():
    """Of Sennrich et al. 2016, by hand: es, est; then lo, low; and ties to the greater bytes."""
    text = " ".join(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3)
    # (e,s), (s,t): 9 each, so (s,t) goes first; then (e,st) 9; (w,e) 8 is (w,e)r 2 + ne(w,est)...
    merges = train(text, 257 + 4).merges
    assert merges[:2] == [("s", "t"), ("e", "st")]
    assert merges == train_plainly([text], 257 + 4)


def test_ties_go_to_the_greater_bytes():
    assert train("ab cd", 258).merges == [("c", "d")]  # not ("a", "b"), nor (" ", "c")
    assert train("é ~~", 258).merges == [("Ã", "©")]  # bytes C3 A9 against 7E 7E
    assert train("\x00a !a", 258).merges == [("Ġ", "!")]  # bytes, not their printable characters
    # (b, aa) and (b, a) come twice each in this order of merges: the longer is the greater
    assert train("baa baa ba ba aa aa aa", 260).merges == train_plainly(
        ["baa baa ba ba aa aa aa"], 260
    )


def test_nothing_is_merged_across_texts_documents_or_into_endoftext():
    assert train(["ab", "ab"], 300).merges == [("a", "b")]
    assert train(f"ab{ENDOFTEXT}ab{ENDOFTEXT}", 300).merges == [("a", "b")]
    assert train([ENDOFTEXT] * 9, 300).merges == []


def test_a_text_without_pairs_gives_the_byte_model():
    for nothing in ("", [], ["a", "b"], " a b c"[:1]):
        assert train(nothing, 1000).n_vocab == 257
    assert train("abcd" * 9, 257).merges == []
    with pytest.raises(ValueError, match="n_vocab is 256, but 256 bytes and .* are 257 entries"):
        train("abc", 256)


@given(st.lists(st.text("aab b'\né", max_size=40), max_size=4), st.integers(257, 300))
@fuzz
def test_training_is_the_plain_algorithms(texts, n_vocab):
    learned = train(iter(texts), n_vocab)
    assert learned.merges == train_plainly(texts, n_vocab)
    assert learned.n_vocab == 257 + len(learned.merges) <= n_vocab  # no two make the same piece
    for text in texts:
        assert learned.encode(text) == encode_plainly(learned, text)


def test_training_on_prose_is_the_plain_algorithms(tmp_path):
    transformers = pytest.importorskip("transformers")
    prose = Path(encoder_module.__file__).read_text("utf-8") + " ".join(TEXTS.values())
    learned = train(prose, 500)
    assert learned.n_vocab == 500
    assert learned.merges == train_plainly([mended(prose)], 500)
    learned.save(tmp_path)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    for text in map(mended, [*TEXTS.values(), prose]):
        assert theirs(text, split_special_tokens=True)["input_ids"] == learned.encode(text)


def test_training_holds_one_text_at_a_time():
    """A generator's texts are gone before the next one comes."""
    alive = weakref.WeakSet()

    class Text(str):  # a plain str cannot be weakly referred to
        pass

    def texts():
        for i in range(5):
            assert len(alive) <= 1
            text = Text(f"text {i} " * 3)
            alive.add(text)
            yield text
            del text

    assert train(texts(), 260).n_vocab == 260


# Decoding


@both
def test_decode_takes_any_iterable_of_integers(encoder):
    ids = encoder.encode("héllo wörld")
    kinds = [tuple(ids), iter(ids), np.array(ids), np.array(ids, np.uint16), map(np.int64, ids)]
    assert [encoder.decode(kind) for kind in kinds] == ["héllo wörld"] * len(kinds)
    assert encoder.decode([]) == ""


def test_invalid_utf8_becomes_replacement_characters():
    ids = [bytes_only.vocab[CHAR_OF_BYTE[byte]] for byte in b"a\xff\xe4\xb8b\xf0\x9f"]
    assert bytes_only.decode(ids) == "a\ufffd\ufffdb\ufffd"
    assert "".join(bytes_only.decode_stream(ids)) == "a\ufffd\ufffdb\ufffd"


@both
@pytest.mark.parametrize("bad", [-1, 1000, np.int64(-1), np.int32(1000)])
def test_ids_outside_the_vocabulary(encoder, bad):
    message = rf"^id {int(bad)} is not in the vocabulary of {encoder.n_vocab}$"
    with pytest.raises(ValueError, match=message):
        encoder.decode([0, bad])
    with pytest.raises(ValueError, match=message):
        list(encoder.decode_stream([0, bad]))


def test_a_character_streams_when_its_last_byte_comes():
    received = []

    def ids():
        for id in bytes_only.encode("é😀!"):
            yield id
            received.append("id")

    for text in bytes_only.decode_stream(ids()):
        received.append(text)
    assert received == ["id", "é", "id", "id", "id", "id", "😀", "id", "!", "id"]


@fuzz
@given(st.lists(st.integers(0, small.n_vocab - 1), max_size=40))
def test_a_stream_joins_to_what_decode_returns(ids):
    """For any ids, so for any bytes, and no part ends within a character."""
    parts = list(small.decode_stream(ids))
    assert "".join(parts) == small.decode(ids)
    assert "" not in parts


@fuzz
@given(st.binary(max_size=40))
def test_any_bytes_decode_as_python_decodes_them(data):
    ids = [bytes_only.vocab[CHAR_OF_BYTE[byte]] for byte in data]
    assert bytes_only.decode(ids) == data.decode("utf-8", errors="replace")
    assert "".join(bytes_only.decode_stream(ids)) == data.decode("utf-8", errors="replace")


# Files


def write_tokenizer(folder, vocab, merges, names=("vocab.json", "merges.txt")):
    folder.mkdir(exist_ok=True)
    for name, content in zip(names, (vocab, merges), strict=True):
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        (folder / name).write_bytes(content)


@both
def test_save_and_read_back(encoder, tmp_path):
    encoder.save(tmp_path / "deep" / "model")
    again = get_encoder("model", tmp_path / "deep")
    assert (again.vocab, again.merges) == (encoder.vocab, encoder.merges)
    assert all(again.encode(text) == encoder.encode(text) for text in TEXTS.values())


@pytest.mark.parametrize("auto", [False, True], ids=["GPT2TokenizerFast", "AutoTokenizer"])
@both
def test_save_opens_in_hugging_face(encoder, auto, tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder.save(tmp_path)
    loader = transformers.AutoTokenizer if auto else transformers.GPT2TokenizerFast
    theirs = loader.from_pretrained(tmp_path)
    assert len(theirs) == encoder.n_vocab
    assert theirs.eos_token_id == encoder.endoftext
    for text in map(mended, TEXTS.values()):
        assert theirs(text, split_special_tokens=True)["input_ids"] == encoder.encode(text)
        assert theirs(text)["input_ids"] == encoder.encode(text, allow_endoftext=True)
        assert theirs.decode(encoder.encode(text)) == text


def test_save_without_endoftext_adds_no_token_in_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = {char: id for id, char in enumerate(CHAR_OF_BYTE.values())}
    Encoder([], vocab).save(tmp_path)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 256


def test_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    small.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        bytes_only.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_both_layouts_and_windows_line_ends_are_read(tmp_path):
    merges = "#version: 0.2\r\n" + "".join(f"{a} {b}\r\n" for a, b in small.merges)
    write_tokenizer(tmp_path / "openai", small.vocab, merges, ("encoder.json", "vocab.bpe"))
    write_tokenizer(tmp_path / "hugging_face", small.vocab, merges.replace("\r", ""))
    for name in "openai", "hugging_face":
        assert get_encoder(name, str(tmp_path)).merges == small.merges
    assert find_tokenizer(tmp_path / "openai")[0].name == "encoder.json"


def test_only_a_first_line_is_a_header():
    pairs = [("#", "#"), ("##", "##"), ("#version:", "0.2")]
    lines = "".join(f"{left} {right}\n" for left, right in pairs)
    assert parse_merges("#version: 0.2\n" + lines) == pairs
    assert parse_merges(lines) == pairs  # no header: the first merge is one all the same
    assert parse_merges(lines.removesuffix("\n")) == pairs
    for text in "", "#version: 0.2", "#version: 0.2\n":
        assert parse_merges(text) == []


def test_a_folder_without_a_tokenizer(tmp_path):
    write_tokenizer(tmp_path / "half", {}, "", ("encoder.json", "merges.txt"))
    for name in "nowhere", "half":
        with pytest.raises(FileNotFoundError) as error:
            get_encoder(name, tmp_path)
        assert str(tmp_path / name) in str(error.value)
        assert "encoder.json + vocab.bpe or vocab.json + merges.txt" in str(error.value)
        assert "\n" not in str(error.value)


BYTES = bytes_only.vocab
DEEP = json.loads("[" * 500 + "]" * 500)
MALFORMED = {
    "not JSON": ("{'a': 1}", "", "vocab.json: not JSON (Expecting property name"),
    "cut short": (json.dumps(BYTES)[:-9], "", "vocab.json: "),
    "empty": ("", "", "vocab.json: not JSON (Expecting value"),
    "not UTF-8": (b"\xff{}", "", "vocab.json: not JSON ('utf-8' codec can't decode byte 0xff"),
    "deep": ("[" * 200_000, "", "vocab.json: not JSON (maximum recursion depth exceeded"),
    "a number too long": ('{"a": ' + "9" * 5000 + "}", "", "vocab.json: not JSON (Exceeds the"),
    "not an object": ([1, 2], "", "vocab.json: not a JSON object"),
    "id is text": (BYTES | {"a": "64"}, "", "vocab.json: the id of 'a' is '64'"),
    "id is a float": (BYTES | {"a": 64.0}, "", "vocab.json: the id of 'a' is 64.0"),
    "id is true": (BYTES | {"a": True}, "", "vocab.json: the id of 'a' is True"),
    "id is null": (BYTES | {"a": None}, "", "vocab.json: the id of 'a' is None"),
    "id is negative": (BYTES | {"a": -1}, "", "vocab.json: the id of 'a' is -1"),
    "two of one id": (BYTES | {"a": 65}, "", "vocab.json: 'a' and 'b' have the same id, 65"),
    "id is not a number": (BYTES | {"a": float("nan")}, "", "vocab.json: the id of 'a' is nan"),
    "id of 24 bits": (BYTES | {"a": 2**24}, "", "vocab.json: the id of 'a' is 16777216, not an"),
    "id of 63 bits": (BYTES | {"a": 2**63}, "", f"vocab.json: the id of 'a' is {2**63}, not an"),
    "id of 400 digits": (BYTES | {"a": 10**400}, "", "vocab.json: the id of 'a' is 1000"),
    "id is a deep list": (BYTES | {"a": DEEP}, "", "vocab.json: the id of 'a' is [[["),
    "twice, the last wrong": (
        json.dumps(BYTES)[:-1] + ', "a": 65}',
        "",
        "vocab.json: 'a' and 'b' have the same id, 65",
    ),
    "lone surrogate": (BYTES | {"\ud800": 300}, "", "vocab.json: a piece contains '\\ud800'"),
    "NUL": (BYTES | {"a\0": 300}, "", "vocab.json: a piece contains '\\x00', which does not stand"),
    "a huge file": (b" " * (MOST_BYTES + 1), "", "vocab.json: 16777217 bytes, more than"),
    "huge merges": (BYTES, b"\n" * (MOST_BYTES + 1), "merges.txt: 16777217 bytes, more than"),
    "merges of one line": (BYTES, b"a" * 10**6, "merges.txt: line 1 is 'aaaaaaaa"),
    "many spaces": (BYTES, b" " * 10**6, "merges.txt: line 1 is '        "),
    "no bytes": ({}, "", "vocab.json: none of the 256 bytes has an id"),
    "a byte lacks that a merge needs": (
        {piece: id for piece, id in BYTES.items() if piece != "Ġ"} | {"Ġa": 300},
        "Ġ a\n",
        "merges.txt: the vocabulary has no 'Ġ', which merge 1 needs: 'Ġ' + 'a'",
    ),
    "raw space": (
        BYTES | {"a b": 300},
        "",
        "vocab.json: a piece contains ' ', which does not stand for a byte",
    ),
    "unknown half": (
        BYTES,
        "a bc\n",
        "merges.txt: the vocabulary has no 'bc', which merge 1 needs",
    ),
    "unknown result": (BYTES, "a b\n", "merges.txt: the vocabulary has no 'ab', which merge 1"),
    "three pieces": (BYTES, "#version: 0.2\na b c\n", "merges.txt: line 2 is 'a b c', not two"),
    "one piece": (BYTES, "ab\n", "merges.txt: line 1 is 'ab', not two"),
    "blank line": (BYTES, "#version: 0.2\n\na b\n", "merges.txt: line 2 is '', not two"),
    "two spaces": (BYTES, "a  b\n", "merges.txt: line 1 is 'a  b', not two"),
    "merges not UTF-8": (BYTES, b"a b\n\xff c\n", "merges.txt: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("vocab, merges, problem", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_give_one_clear_line(vocab, merges, problem, tmp_path):
    write_tokenizer(tmp_path / "model", vocab, merges)
    with pytest.raises(ValueError) as error:
        get_encoder("model", tmp_path)
    assert type(error.value) is ValueError
    assert str(tmp_path / "model" / problem) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spaces", range(940, 1000, 4))
def test_nesting_that_json_just_bears_can_be_shown(spaces, tmp_path):
    """A complaint repeats what it found, and repr() nests as deeply as what it shows."""
    value = "[" * spaces + "]" * spaces
    write_tokenizer(tmp_path, json.dumps(BYTES).replace('"a": 64', f'"a": {value}'), "")
    with pytest.raises(ValueError, match=r"(the id of 'a' is \[\[|maximum recursion depth)"):
        get_encoder("", tmp_path)


# Lists that no training makes, but that are legal: they must end, and lose nothing

STRANGE = {
    "a merge twice": [("a", "b"), ("b", "a"), ("a", "b")],
    "results before their parts": [("aba", "b"), ("ab", "a"), ("a", "b")],
    "one that grows forever": [("a" * n, "a" * n) for n in (1, 2, 4, 8, 16, 32)],
    "one piece in many ways": [("a", "aa"), ("aa", "a"), ("a", "a"), ("aa", "aa"), ("aaa", "a")],
    "endoftext": [("<|", "endoftext"), ("<|endoftext", "|>"), ("<", "|"), ("|", ">")]
    + [("endoftex"[:i], "endoftext"[i]) for i in range(1, 9)],
}


@pytest.mark.parametrize("merges", STRANGE.values(), ids=STRANGE.keys())
def test_strange_merges_end_and_lose_nothing(merges, tmp_path):
    vocab = dict.fromkeys([*BYTES, *(left + right for left, right in merges)])
    vocab = {piece: id for id, piece in enumerate(vocab)}
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    write_tokenizer(tmp_path / "strange", vocab, lines)
    encoder = get_encoder("strange", tmp_path)
    for text in "abab" * 40, "aaa" * 33, "ababaaba " * 9, f"<{ENDOFTEXT}>{ENDOFTEXT} <|endoftext":
        ids = encoder.encode(text)
        assert encoder.decode(ids) == text
        assert encoder.endoftext not in ids  # the pieces that encode() cuts part it
        for piece in PIECE.findall(text):
            before = [encoder.vocab[char] for char in piece.replace(" ", "Ġ")]
            tables = encoder._ranks, encoder._merged
            assert merge_short(before, *tables) == merge_long(before, *tables)
            assert merge_short(before, *tables) == merge_plainly(before, *tables)


def test_a_piece_of_ten_megabytes(tmp_path):
    write_tokenizer(tmp_path / "long", BYTES | {"a" * 10**7: 257}, "")
    encoder = get_encoder("long", tmp_path)
    assert encoder.encode("aa") == [BYTES["a"]] * 2
    assert encoder.decode([257]) == "a" * 10**7


# GPT-2's own vocabulary, where it is at hand


def test_gpt2s_own_order_is_the_default(gpt2):
    assert (gpt2.n_vocab, gpt2.endoftext, len(gpt2.merges)) == (50257, 50256, 50000)
    assert Encoder(gpt2.merges).vocab == gpt2.vocab
    assert gpt2.encode("Hello world") == [15496, 995]


@every_text
def test_same_ids_as_tiktoken(gpt2, tiktoken_gpt2, text):
    ids = gpt2.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text) == encode_plainly(gpt2, mended(text))
    special = tiktoken_gpt2.encode(text, allowed_special="all")
    assert gpt2.encode(text, allow_endoftext=True) == special
    assert gpt2.decode(ids) == tiktoken_gpt2.decode(ids) == mended(text)


@every_text
def test_same_ids_as_hugging_face(gpt2, hugging_face_gpt2, text):
    text = mended(text)
    ids = gpt2.encode(text)
    assert ids == hugging_face_gpt2(text, split_special_tokens=True)["input_ids"]
    assert gpt2.decode(ids) == hugging_face_gpt2.decode(ids)


@fuzz
@given(text=strings)
def test_same_ids_for_any_string(gpt2, tiktoken_gpt2, hugging_face_gpt2, text):
    ids = gpt2.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text)
    assert ids == hugging_face_gpt2(text, split_special_tokens=True)["input_ids"]
    assert gpt2.decode(ids) == text


def test_same_ids_around_every_kind_of_character(gpt2, tiktoken_gpt2, rng):
    known = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    text = "".join(f"a{char} {char}1{char}  " for char in known[:0x3100] + rng.sample(known, 10**4))
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)


def test_same_ids_for_long_words(gpt2, tiktoken_gpt2, rng):
    words = [rng.choices(letters, k=20000) for letters in ("a", "theran", string.printable[:62])]
    for word in [*map("".join, words), " " * 20000 + "\n" * 20000]:
        assert gpt2.encode(word) == tiktoken_gpt2.encode_ordinary(word)


def test_same_ids_for_shakespeare(gpt2, tiktoken_gpt2):
    if not SHAKESPEARE.is_file():
        pytest.skip(f"tiny Shakespeare is not at {SHAKESPEARE} (set SIXTYGPT_DATA)")
    text = SHAKESPEARE.read_text("utf-8")
    expected = tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.encode(text) == gpt2.encode(text) == expected
    assert gpt2.decode(expected) == text
    assert bytes_only.decode(bytes_only.encode(text)) == text


def test_gpt2_streams_emoji_whole(gpt2):
    text = "".join(TEXTS[name] for name in ("emoji", "chinese", "arabic"))
    ids = gpt2.encode(text)
    parts = list(gpt2.decode_stream(ids))
    assert "".join(parts) == text and len(parts) < len(ids)
    whole = codecs.getincrementaldecoder("utf-8")()
    for part in parts:
        assert "\ufffd" not in part and whole.decode(part.encode()) == part


def test_gpt2_saved_opens_in_hugging_face(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in map(mended, TEXTS.values()):
        assert theirs(text, split_special_tokens=True)["input_ids"] == gpt2.encode(text)
    assert get_encoder(tmp_path.name, tmp_path.parent).vocab == gpt2.vocab


def test_printable_bytes_are_a_bijection():
    assert len(CHAR_OF_BYTE) == len(BYTE_OF_CHAR) == 256
    assert all(char.isprintable() and not char.isspace() for char in BYTE_OF_CHAR)
    assert (CHAR_OF_BYTE[32], CHAR_OF_BYTE[10], CHAR_OF_BYTE[173]) == ("Ġ", "Ċ", "Ń")


# tokenizer.json, all that today's transformers save, and added tokens

CHAT = ["<|user|>", "<|user|><|end|>", "a token 我"]


def their_tokenizer(folder, extra=()):
    """transformers' twin of `small`, saved by transformers as it does today, with more tokens."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small.save(folder / "plain")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder / "plain")
    theirs.add_special_tokens({"additional_special_tokens": list(extra)})
    theirs.save_pretrained(folder / "theirs")
    return theirs, folder / "theirs"


@pytest.mark.parametrize("extra", [[], CHAT])
def test_a_tokenizer_json_alone_is_read(tmp_path, extra):
    theirs, folder = their_tokenizer(tmp_path, extra)
    assert not (folder / "vocab.json").exists()
    ours = encoder_module.get_encoder("", folder)
    assert ours.merges == small.merges and ours.n_vocab == small.n_vocab + len(extra)
    assert set(ours.special) == {ENDOFTEXT, *extra}
    text = "".join([f"Once{ENDOFTEXT} upon", *extra, " a time: ", *reversed(extra), "'tis <|user|"])
    ids = ours.encode(text, allow_endoftext=True)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text
    assert set(ours.encode(text)).isdisjoint(ours.special.values())  # not asked for
    ours.save(tmp_path / "again")
    again = encoder_module.get_encoder("", tmp_path / "again")
    assert again.special == ours.special and again.encode(text, allow_endoftext=True) == ids


def test_gpt2s_own_tokenizer_json_gives_gpt2s_ids(gpt2, hugging_face_gpt2, tmp_path):
    hugging_face_gpt2.save_pretrained(tmp_path)
    ours = encoder_module.get_encoder("", tmp_path)
    assert (ours.vocab, ours.merges, ours.endoftext) == (gpt2.vocab, gpt2.merges, 50256)


BAD_TOKENIZERS = {
    "model.type 'Unigram'": lambda t: t["model"].update(type="Unigram"),
    "model.byte_fallback True": lambda t: t["model"].update(byte_fallback=True),
    "model.ignore_merges True": lambda t: t["model"].update(ignore_merges=True),
    "model.end_of_word_suffix '</w>'": lambda t: t["model"].update(end_of_word_suffix="</w>"),
    "model.merges is not a list": lambda t: t["model"].pop("merges"),
    "merge 2 is 7": lambda t: t["model"]["merges"].__setitem__(1, 7),
    "merge 1 is 'abc'": lambda t: t["model"]["merges"].__setitem__(0, "abc"),
    "merge 1 is ['a', '']": lambda t: t["model"]["merges"].__setitem__(0, ["a", ""]),
    "vocabulary must be a JSON object": lambda t: t["model"].update(vocab=[1]),
    "the vocabulary has no 'a', which": lambda t: t["model"]["vocab"].pop("a"),
    "only GPT-2's pre_tokenizer": lambda t: t["pre_tokenizer"].update(use_regex=False),
    "add_prefix_space is 1, not": lambda t: t["pre_tokenizer"].update(add_prefix_space=1),
    "only GPT-2's pre_tokenizer is": lambda t: t.update(pre_tokenizer=None),
    "a normalizer is not supported": lambda t: t.update(normalizer={"type": "NFC"}),
    "a post_processor that adds": lambda t: t["post_processor"].update(special_tokens={"a": 1}),
    "added_tokens is not a list": lambda t: t.update(added_tokens=[7]),
    "has no id or no text": lambda t: t["added_tokens"][0].update(id=-1),
    "has no id or no text ": lambda t: t["added_tokens"][0].update(content=None),
    "has lstrip, rstrip or single_word": lambda t: t["added_tokens"][0].update(lstrip=True),
    "have the same id, 97": lambda t: t["added_tokens"].append({"id": 97, "content": "a new"}),
    "'<|endoftext|>' has two ids": lambda t: t["added_tokens"][0].update(id=10**6),
    "surrogates not allowed": lambda t: t["added_tokens"].append({"id": 900, "content": "\ud800"}),
}


@pytest.mark.parametrize("problem", BAD_TOKENIZERS)
def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, problem):
    _, folder = their_tokenizer(tmp_path)
    found = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    BAD_TOKENIZERS[problem](found)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(ValueError) as caught:
        encoder_module.get_encoder("", folder)
    assert str(caught.value).startswith(f"{folder}/tokenizer.json: ")
    assert problem.strip() in str(caught.value) and "\n" not in str(caught.value)
