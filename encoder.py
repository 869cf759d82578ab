"""Byte-level byte-pair encoding: text to GPT-2's token ids, and back.

A model reads numbers, so text is first cut into tokens, each with an id. Three steps do it:

1. a pattern cuts the text into pieces: words, numbers, runs of punctuation, runs of spaces;
2. each piece becomes its UTF-8 bytes, so that any text at all needs only 256 symbols;
3. in each piece, the pair of neighbours that stands first in a list of merges is joined into
   one longer symbol, then the next such pair, until no two neighbours are in the list.

With GPT-2's list of 50000 merges:

    "Hello world"  ->  "Hello", " world"  ->  15496, 995

The list is learned from text (`train`) by joining, again and again, the pair that is most frequent.
With an empty list every byte stays a token of its own: the byte model.

After Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909), for the merges; Radford et al. 2019
and https://github.com/openai/gpt-2/blob/master/src/encoder.py, for the bytes, the pattern and the
files; https://github.com/karpathy/minbpe, for how to teach it; and
https://github.com/openai/tiktoken, for what to do with broken Unicode.
"""

import codecs
import json
import re
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import pairwise
from operator import index
from pathlib import Path

import regex

from model_files.tokenizer import parse_added, parse_tokenizer
from plumbing.files import check_file, read_json, write_whole

# GPT-2's pattern, letter for letter, since another one would give other ids. Read it as a list
# of what a piece may be, of which the first that fits is taken: the ending of an English
# contraction; letters; digits; other signs; white space. The last space before a word belongs to
# the word, which is why most tokens begin with one. This is what \s+(?!\S) is for: it takes a run
# of white space, but not its last character if something follows. Two oddities must stay: only
# lower-case endings count ("DON'T" is cut into "DON", "'", "T"), and they count even where no word
# comes before them ("'tis" at the start of a line is cut into "'t", "is"). \p{L} is a letter of any
# script and \p{N} any digit; Python's own `re` knows neither. `re` also takes \x1c to \x1f for
# white space, but `regex`, which OpenAI's encoder uses, does not, and nor does tiktoken.
PIECE = regex.compile(
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)

# A coarser pattern that `re` runs three times as fast: a word with all that touches it and the one
# white-space character before it, or what is left of the white space. It cuts only where PIECE cuts
# as well, so its words can be encoded one by one, and most have been met before.
SPACE, SOLID = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"  # what `regex` calls \s and \S
WORD = re.compile(rf"{SPACE}?{SOLID}+|{SPACE}+(?!{SOLID})")

ENDOFTEXT = "<|endoftext|>"  # stands between the documents that GPT-2 was trained on
LONG_PIECE = 50  # bytes from which merge_long overtakes merge_short
CACHE_ENTRIES = 2**17  # texts that a Cache holds before it starts afresh: some 25 MB
CACHE_CHARS = 64  # longer texts are unlikely to come again

MOST_IDS = 2**24  # each id is a row of the model's embedding: no tokenizer has nearly as many
TOKENIZER_FILES = [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("tokenizer.json",)]


def printable_bytes():
    """Return {byte: the printable character that stands for it}, in the order of GPT-2's ids.

    GPT-2's files are text: a merge is a line, its two halves separated by a space. Raw bytes would
    break that, being newlines, spaces or no valid UTF-8, so each is written as a character one
    can see. Those that Latin-1 shows stand for themselves; the 68 others (controls, blanks and
    the soft hyphen) take the code points from 256 on: the space, byte 32, is the famous "Ġ".

    >>> printable_bytes()[ord("A")], printable_bytes()[ord(" ")], printable_bytes()[0]
    ('A', 'Ġ', 'Ā')
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    visible += range(ord("®"), ord("ÿ") + 1)
    hidden = [byte for byte in range(256) if byte not in visible]
    shown = {byte: chr(byte) for byte in visible}
    return shown | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


CHAR_OF_BYTE = printable_bytes()
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def printable(text):
    """Return a text as a vocabulary spells it, a character for each of its UTF-8 bytes.

    >>> printable(" a 我")
    'ĠaĠæĪĳ'
    """
    return "".join(CHAR_OF_BYTE[byte] for byte in text.encode())


def merge_short(ids, ranks, merged):
    """Merge ids until no two neighbours are a pair of `ranks`; return what is left.

    ids: one per byte of a piece. ranks: {(id, id): rank}, the lowest goes first, the leftmost
    among equals. merged: the id that the merge of each rank makes.

    >>> merge_short([7, 8, 9, 7, 8], {(8, 9): 0, (7, 8): 1}, [89, 78])
    [7, 89, 78]
    """
    ids, never = list(ids), len(merged)
    found = [ranks.get(pair, never) for pair in pairwise(ids)]  # the rank of each two neighbours
    while found and (rank := min(found)) < never:
        i = found.index(rank)
        ids[i : i + 2] = [merged[rank]]
        del found[i]
        if i > 0:
            found[i - 1] = ranks.get((ids[i - 1], ids[i]), never)
        if i < len(found):
            found[i] = ranks.get((ids[i], ids[i + 1]), never)
    return ids


def merge_long(ids, ranks, merged):
    """Do what merge_short does, in n log n steps rather than n * n: a word may be a megabyte.

    A heap hands out the pairs, best first. A merged id takes the left one's place, the right one's
    becomes None, and `before` and `after` lead from each id to its neighbours across these gaps.
    """
    n = len(ids)
    ids = [*ids, None]  # a None past the end; before[0], which is -1, finds it, too
    before, after = list(range(-1, n)), list(range(1, n + 1))
    pairs = enumerate(pairwise(ids))
    heap = [ranks[pair] * n + i for i, pair in pairs if pair in ranks]  # (rank, i) as one int
    heapify(heap)
    while heap:
        rank, i = divmod(heappop(heap), n)
        if ranks.get((ids[i], ids[after[i]])) != rank:
            continue  # an earlier merge took one of the two
        ids[i], ids[after[i]] = merged[rank], None
        after[i] = after[after[i]]
        before[after[i]] = i
        # The new id makes a pair with each of its neighbours.
        for j, pair in (before[i], (ids[before[i]], ids[i])), (i, (ids[i], ids[after[i]])):
            if pair in ranks:
                heappush(heap, ranks[pair] * n + j)
    return [id for id in ids if id is not None]


class Cache(dict):
    """A dict that computes what it lacks, and empties itself when it is full."""

    def __init__(self, compute):
        self.compute = compute

    def __missing__(self, text):
        value = self.compute(text)
        if len(text) <= CACHE_CHARS:
            if len(self) >= CACHE_ENTRIES:
                self.clear()
            self[text] = value
        return value


class Encoder:
    """A byte-level BPE vocabulary, for both directions.

    merges: pairs of pieces in printable form, first to be merged first. vocab: {piece: id}, by
    default numbered as GPT-2's is: the 256 bytes, what each merge makes, then <|endoftext|>.
    special: {text: id} of texts that encode() can turn into a single id, if it is told to; by
    default <|endoftext|>, if it is in the vocabulary. ValueError for a merge of pieces that the
    vocabulary lacks, and for anything that check_vocab refuses.

    n_vocab: one more than the largest id. endoftext: its id, None where the vocabulary has none.
    piece_of_id: the inverse of vocab.

    >>> encoder = Encoder([("Ġ", "a"), ("b", "c")])
    >>> encoder.encode(" abc"), encoder.decode([256, 257]), encoder.endoftext, encoder.n_vocab
    ([256, 257], ' abc', 258, 259)
    """

    def __init__(self, merges, vocab=None, special=None):
        self.merges = [(left, right) for left, right in merges]
        self.vocab = number_pieces(self.merges) if vocab is None else check_vocab(vocab)
        if special:
            self.vocab = add_special(self.vocab, special)
        elif ENDOFTEXT in self.vocab:
            special = {ENDOFTEXT: self.vocab[ENDOFTEXT]}
        self.special = special or {}
        self.n_vocab = max(self.vocab.values()) + 1
        self.endoftext = self.vocab.get(ENDOFTEXT)
        self.piece_of_id = {id: piece for piece, id in self.vocab.items()}
        self._byte_ids = [self.vocab[CHAR_OF_BYTE[byte]] for byte in range(256)]
        self._ranks, self._merged = rank_merges(self.merges, self.vocab)
        self._n_longest = max(map(len, self.vocab))
        self._ids_of_piece = Cache(self._encode_piece)
        self._ids_of_word = Cache(self._encode_word)

    def encode(self, text, allow_endoftext=False):
        """Return the token ids of a string: list[int].

        "<|endoftext|>" in it is text like any other, unless allow_endoftext is true: then it is
        one id, and so are the other texts of `special`; where two fit, the longer one. Lone
        surrogates, which UTF-8 cannot hold, become U+FFFD.
        """
        text = mend_surrogates(text)
        if not allow_endoftext or not self.special:
            return self._encode_plain(text)
        longest_first = sorted(self.special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = []
        for plain, special in zip(parts[::2], [*parts[1::2], None], strict=True):
            ids += self._encode_plain(plain)
            ids += [] if special is None else [self.special[special]]
        return ids

    def encode_prompt(self, text, n_ctx=None):
        """Return encode(text), or for an empty text <|endoftext|> alone, if the vocabulary has it.

        ValueError for a text that is too long even if each of n_ctx tokens were the longest there
        is. This check costs nothing, while encoding a huge file would fill the memory.
        """
        if n_ctx is not None and len(text) > n_ctx * self._n_longest:
            raise ValueError(
                f"a prompt of {len(text)} characters, but this model has only {n_ctx} positions "
                "(n_ctx)"
            )
        return self.encode(text) or ([] if self.endoftext is None else [self.endoftext])

    def decode(self, ids):
        """Return the text of an iterable of ids; bytes that are not UTF-8 become U+FFFD.

        An id outside the vocabulary is a ValueError.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):  # -> bytes
        """Return the ids' bytes; they may begin or end inside a character. ValueError as decode."""
        ids = [index(id) for id in ids]
        try:
            chars = "".join([self.piece_of_id[id] for id in ids])
        except KeyError as unknown:
            raise ValueError(f"id {unknown} is not in the vocabulary of {self.n_vocab}") from None
        return bytes([BYTE_OF_CHAR[char] for char in chars])

    def decode_stream(self, ids):
        """Yield the text of ids as they arrive, in all the same as decode(ids).

        A character whose bytes are spread over several tokens comes with the last of them.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if text := utf8.decode(self.decode_bytes([id])):
                yield text
        if text := utf8.decode(b"", final=True):
            yield text

    def save(self, model_dir):
        """Write the vocabulary to a folder, as get_encoder and Hugging Face's transformers read it.

        Each file appears under its name only when it is complete.
        """
        folder = Path(model_dir)
        folder.mkdir(parents=True, exist_ok=True)
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        special = None if self.endoftext is None else ENDOFTEXT
        config = {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False}
        config |= {f"{role}_token": special for role in ("bos", "eos", "unk")}
        if self.special.keys() - {ENDOFTEXT}:
            plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
            config["added_tokens_decoder"] = {
                id: {"content": text, "special": True} | plain for text, id in self.special.items()
            }
        write_whole(folder / "vocab.json", json.dumps(self.vocab, ensure_ascii=False))
        write_whole(folder / "merges.txt", "#version: 0.2\n" + merges)
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2))

    def _encode_plain(self, text):
        if not self._ranks and max(self._byte_ids) < 256:  # without merges, a table will do
            return list(text.encode().translate(bytes(self._byte_ids)))
        ids, ids_of_word = [], self._ids_of_word
        for word in WORD.findall(text):
            ids += ids_of_word[word]
        return ids

    def _encode_word(self, word):
        ids = []
        for piece in PIECE.findall(word):
            ids += self._ids_of_piece[piece]
        return ids

    def _encode_piece(self, piece):
        ids = [self._byte_ids[byte] for byte in piece.encode()]
        merge = merge_short if len(ids) < LONG_PIECE else merge_long
        return merge(ids, self._ranks, self._merged)


def train(texts, n_vocab):
    """Learn an Encoder of n_vocab entries from a string, or from an iterable of strings.

    The entries are the 256 bytes, <|endoftext|>, and what the merges make: fewer where the text
    runs out of pairs. Each merge joins the two neighbours that come most often at that point; of
    pairs that come equally often, the one with the greater bytes. Nothing is merged across the
    pieces that encode() cuts, nor across texts, nor with <|endoftext|>, which separates documents.
    Memory grows with the number of different pieces, not with the text. Time grows with their
    length, so a text without white space or signs is slow. ValueError if n_vocab is below 257.
    Sennrich et al. 2016, algorithm 1.

    In "low lower lowest", (l, o) and (o, w) come three times each, and o is the greater byte: "ow"
    is the first merge, "low" the second. Then (" ", low) and (low, e) come twice each.

    >>> train("low lower lowest", 260).merges
    [('o', 'w'), ('l', 'ow'), ('low', 'e')]
    """
    if n_vocab < 257:
        raise ValueError(f"n_vocab is {n_vocab}, but 256 bytes and {ENDOFTEXT} are 257 entries")
    pieces = count_pieces([texts] if isinstance(texts, str) else texts)
    return Encoder(learn_merges(pieces, n_vocab - 257))


def count_pieces(texts):  # -> {piece: how often it comes}
    """Count the words, then cut each word into its pieces once."""
    words, pieces = Counter(), Counter()
    for text in texts:
        for document in mend_surrogates(text).split(ENDOFTEXT):
            words.update(WORD.findall(document))
    for word, n in words.items():
        for piece in PIECE.findall(word):
            pieces[piece] += n
    return pieces


def learn_merges(pieces, n_new):  # {piece: how often it comes} -> [(left, right), ...], printable
    """Merge until n_new symbols are made, or all pieces are single symbols.

    A merge changes only the pieces that hold its pair: `where` finds them, so that nothing else is
    counted again, and a heap finds the best pair. Its entries go out of date as counts fall; each
    is checked when it comes up, and goes back with the right count.
    """
    split, n_times = [[bytes([b]) for b in piece.encode()] for piece in pieces], [*pieces.values()]
    counts, where = Counter(), defaultdict(set)  # of each pair: how often, and in which pieces
    for i, symbols in enumerate(split):
        for pair in pairwise(symbols):
            counts[pair] += n_times[i]
            where[pair].add(i)
    heap = [heap_entry(pair, n) for pair, n in counts.items()]
    heapify(heap)
    merges = []
    while heap and len(merges) < n_new:
        n, _, _, pair = heappop(heap)
        if counts[pair] != -n:
            if counts[pair]:
                heappush(heap, heap_entry(pair, counts[pair]))
            continue
        symbol = pair[0] + pair[1]
        merges.append(pair)
        touched = set()
        for i in where.pop(pair):
            for old in pairwise(split[i]):
                counts[old] -= n_times[i]
            split[i] = join(split[i], pair, symbol)
            for new in pairwise(split[i]):
                counts[new] += n_times[i]
                if symbol in new:
                    where[new].add(i)
                    touched.add(new)
        for new in touched:
            heappush(heap, heap_entry(new, counts[new]))
    return [tuple("".join(map(CHAR_OF_BYTE.get, half)) for half in pair) for pair in merges]


def join(symbols, pair, symbol):
    """Replace every occurrence of a pair, from the left, by one symbol.

    >>> join([b"a", b"a", b"a", b"b"], (b"a", b"a"), b"aa")
    [b'aa', b'a', b'b']
    """
    joined = []
    for right in symbols:
        if joined and (joined[-1], right) == pair:
            joined[-1] = symbol
        else:
            joined.append(right)
    return joined


MIRROR = bytes(range(255, -1, -1))  # translates byte b to 255 - b


def heap_entry(pair, n):
    """A tuple that sorts first for the most frequent pair and, among equals, the greatest bytes.

    A heap hands out its smallest entry, so everything is turned round: -n, and 255 - byte. The
    longer of b"a" and b"ab" is the greater and must come first, so each text ends with a character
    that is larger than any byte.
    """
    return -n, *[half.translate(MIRROR).decode("latin-1") + "\u0100" for half in pair], pair


def number_pieces(merges):
    """Return {piece: id} in GPT-2's order: the bytes, what each merge makes, <|endoftext|>.

    >>> list(number_pieces([("l", "o"), ("lo", "w")]).items())[-3:]
    [('lo', 256), ('low', 257), ('<|endoftext|>', 258)]
    """
    made = [left + right for left, right in merges]  # two merges may make the same piece
    pieces = dict.fromkeys([*CHAR_OF_BYTE.values(), *made, ENDOFTEXT])
    return {piece: id for id, piece in enumerate(pieces)}


def add_special(vocab, special):
    """Return the vocabulary with special texts in it; ValueError if one has another id there."""
    for text, id in special.items():
        if vocab.get(printable(text), id) != id:
            raise ValueError(f"{text!r} has two ids, {vocab[printable(text)]} and {id}")
    return check_vocab(vocab | {printable(text): id for text, id in special.items()})


def rank_merges(merges, vocab):
    """Return the merges as ids: {(left id, right id): rank} and [the id each rank makes]."""
    ranks, merged = {}, []
    for rank, (left, right) in enumerate(merges):
        try:
            ranks[vocab[left], vocab[right]] = rank
            merged.append(vocab[left + right])
        except KeyError as unknown:
            problem = f"the vocabulary has no {unknown}, which merge {rank + 1} needs"
            raise ValueError(f"{problem}: {left!r} + {right!r}") from None
    return ranks, merged


def check_vocab(vocab):
    """Return vocab, or raise a ValueError that says why it cannot be one."""
    if not isinstance(vocab, dict):
        raise ValueError("a vocabulary is one JSON object, from pieces to ids")
    piece_of_id = {}
    for piece, id in vocab.items():
        if type(id) is not int or not 0 <= id < MOST_IDS:
            wanted = f"an integer from 0 to {MOST_IDS - 1}"
            raise ValueError(f"the id of {piece!r} is {id!r}, not {wanted}")
        if id in piece_of_id:
            raise ValueError(f"{piece_of_id[id]!r} and {piece!r} have the same id, {id}")
        piece_of_id[id] = piece
    if missing := [char for char in BYTE_OF_CHAR if char not in vocab]:
        raise ValueError(f"{len(missing)} of the 256 bytes have no id, the first is {missing[0]!r}")
    if strange := set("".join(vocab)) - BYTE_OF_CHAR.keys():
        raise ValueError(f"{min(strange)!r} is in a piece, but stands for no byte")
    return vocab


def mend_surrogates(text):
    """Join surrogates that form a pair; replace lone ones with U+FFFD, as tiktoken does.

    Such halves of characters come from UTF-16 and from file names that are not UTF-8.

    >>> mend_surrogates("\\ud83d\\ude00 \\ud83d")
    '😀 �'
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def get_encoder(model_name, models_dir):
    """Read the Encoder of the folder models_dir/model_name, in OpenAI's or Hugging Face's layout.

    FileNotFoundError where the folder has neither; ValueError, naming the file, where one is
    malformed. From https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    folder = Path(models_dir) / model_name
    file, *others = find_tokenizer(folder)  # `file` is always the one that is being read
    try:
        if not others:
            return Encoder(*parse_tokenizer(read_json(file)))
        [merges_file] = others
        vocab = check_vocab(read_json(file))
        file = folder / "tokenizer_config.json"
        settings = read_json(file) if file.is_file() else {}
        special = parse_added(settings.get("added_tokens_decoder") or {})
        vocab = add_special(vocab, special)
        file = merges_file
        check_file(file)
        return Encoder(parse_merges(file.read_text("utf-8")), vocab, special)
    except ValueError as problem:  # so is text that is not UTF-8
        text = str(problem)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: {text}") from None


def find_tokenizer(folder):
    """Return the paths of a folder's vocabulary and merges, or of the one file that has both."""
    for names in TOKENIZER_FILES:
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    expected = " or ".join(" + ".join(names) for names in TOKENIZER_FILES)
    raise FileNotFoundError(f"no tokenizer in {folder}: expected {expected}")


def parse_merges(text):
    """Return the merges of a merges.txt or vocab.bpe: a pair of pieces a line, in rank order.

    Only a first line may be a header; any other that begins with "#" merges number signs.

    >>> parse_merges("#version: 0.2\\nĠ t\\n# #\\n")
    [('Ġ', 't'), ('#', '#')]
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    header = 1 if lines and lines[0].startswith("#version") else 0
    merges = [tuple(line.split(" ")) for line in lines[header:]]
    for number, pair in enumerate(merges, header + 1):
        if len(pair) != 2 or "" in pair:
            raise ValueError(f"line {number} is {' '.join(pair)!r}, not two pieces and a space")
    return merges
