"""Byte-level byte-pair encoding turns text into GPT-2's token ids, and ids into text.

A model reads numbers, so text is first cut into tokens, each with an id. This takes three steps:

1. A pattern cuts the text into pieces: words, numbers, runs of punctuation, runs of spaces.
2. Each piece becomes its UTF-8 bytes, so any text at all needs only 256 symbols.
3. In each piece, the pair of neighbours that comes first in a list of merges is joined into one
   longer symbol. This is repeated until no two neighbours are in the list.

With GPT-2's list of 50000 merges:

    "Hello world"  ->  "Hello", " world"  ->  15496, 995

`train` learns the list from a text: it joins the most frequent pair, again and again. With an empty
list, every byte is a token of its own. That is the byte model.

A vocabulary spells every byte as a visible character. The space is "Ġ", so " world" is "Ġworld".
model_files/vocabulary.py has the table, and says why it is needed. model_files/tokenizer.py reads
and writes a tokenizer's files.

Sources:

    the merges            Sennrich et al. 2016, https://arxiv.org/abs/1508.07909
    bytes and pattern     Radford et al. 2019, and
                          https://github.com/openai/gpt-2/blob/master/src/encoder.py
    how to teach it       https://github.com/karpathy/minbpe
    broken Unicode        https://github.com/openai/tiktoken
"""

import codecs
import copy
import re
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise, takewhile
from operator import index
from pathlib import Path

import regex

from model_files.tokenizer import read_tokenizer, write_tokenizer
from model_files.vocabulary import (
    BYTE_OF_CHAR,
    CHAR_OF_BYTE,
    ENDOFTEXT,
    AddedToken,
    add_tokens,
    added_pattern,
    check_vocab,
    split_added,
)
from plumbing.files import naming

# This is GPT-2's pattern, letter for letter, because any other would give different ids. It lists
# what a piece can be: the ending of an English contraction, letters, digits, other signs, or white
# space. The first alternative that matches is taken. The last space before a word belongs to the
# word, which is why most tokens begin with a space. That is the purpose of \s+(?!\S), which takes a
# run of white space, but leaves its last character if something follows. Two oddities must stay.
# Only lower-case endings count ("DON'T" is cut into "DON", "'", "T"), and they count even if no
# word comes before them ("'tis" at the start of a line is cut into "'t", "is"). \p{L} is a letter
# of any script and \p{N} any digit; Python's own `re` has neither. `re` also counts \x1c to \x1f as
# white space. `regex`, which OpenAI's encoder uses, doesn't, and neither does tiktoken. A newer
# version of `regex` can know newer letters than tiktoken does, and cuts texts with these otherwise.
PIECE = regex.compile(
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)

# The same for ASCII, where letters are A to Z and digits 0 to 9. Python's `re` runs it twice as
# fast.
ASCII_PIECE = re.compile(
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+""", re.ASCII
)

# Most words of a text have occurred before, so the ids of whole words are cached, and most of a
# text never needs PIECE. WORD is the coarser pattern that finds these words. A word is a run of
# characters that are not white space, together with the one white-space character before it. Any
# other white space forms words of its own. PIECE cuts wherever WORD cuts, so encoding the words one
# by one gives the same ids. `re` runs this simpler pattern three times as fast as `regex` runs
# PIECE.
SPACE = r"[^\S\x1c-\x1f]"  # what `regex` calls \s
SOLID = r"[\S\x1c-\x1f]"  # what `regex` calls \S
WORD = re.compile(rf"{SPACE}?{SOLID}+|{SPACE}+(?!{SOLID})")

LONG_PIECE = 50  # from this many bytes on, merge_long is faster than merge_short
CACHE_ENTRIES = 2**17  # a Cache is emptied when it holds this many texts: about 25 MB of English
CACHE_BYTES = 2**26  # or when the texts and their ids take this many bytes
CACHE_CHARS = 64  # longer texts are unlikely to occur again


def cut_word(word):  # -> its pieces
    pattern = ASCII_PIECE if word.isascii() else PIECE
    return pattern.findall(word)


def merge_short(ids, ranks, merged):
    """Merges pairs of ids until no two neighbours are a pair of `ranks`, and returns what is left.

    ids: one per byte of a piece.
    ranks: {(id, id): rank}. The pair with the lowest rank is merged first, the leftmost if tied.
    merged: the id that the merge of each rank makes.

    >>> merge_short([7, 8, 9, 7, 8], {(8, 9): 0, (7, 8): 1}, [89, 78])
    [7, 89, 78]
    """
    ids = list(ids)
    no_rank = len(merged)  # stands for a pair that is not merged
    rank_of = ranks.get
    pair_ranks = [rank_of(pair, no_rank) for pair in pairwise(ids)]
    while pair_ranks:
        rank = min(pair_ranks)
        if rank == no_rank:
            break
        i = pair_ranks.index(rank)
        id = merged[rank]
        ids[i] = id
        del ids[i + 1], pair_ranks[i]
        if i > 0:
            pair_ranks[i - 1] = rank_of((ids[i - 1], id), no_rank)
        if i < len(pair_ranks):
            pair_ranks[i] = rank_of((id, ids[i + 1]), no_rank)
    return ids


def merge_long(ids, ranks, merged):
    """Does the same as merge_short, in n log n steps instead of n * n, since words can be huge.

    A heap hands out the pairs, lowest rank first. A merged id replaces the left id of its pair, and
    the right one becomes None. `before` and `after` lead from each id to its neighbours across
    these gaps.
    """
    n = len(ids)
    ids = [*ids, None]  # a None past the end; before[0], which is -1, also leads to it
    before = list(range(-1, n))
    after = list(range(1, n + 1))
    pairs = enumerate(pairwise(ids))
    heap = [ranks[pair] * n + i for i, pair in pairs if pair in ranks]  # (rank, i) as one int
    heapify(heap)
    while heap:
        rank, i = divmod(heappop(heap), n)
        if ranks.get((ids[i], ids[after[i]])) != rank:
            continue  # an earlier merge took one of the two
        ids[i] = merged[rank]
        ids[after[i]] = None
        after[i] = after[after[i]]
        before[after[i]] = i
        pair_with_left = ids[before[i]], ids[i]
        pair_with_right = ids[i], ids[after[i]]
        if pair_with_left in ranks:
            heappush(heap, ranks[pair_with_left] * n + before[i])
        if pair_with_right in ranks:
            heappush(heap, ranks[pair_with_right] * n + i)
    return [id for id in ids if id is not None]


class Cache(dict):
    """{text: tuple of ids}: computes a missing value, and empties itself when it is full.

    Tuples, because Python's garbage collector looks through lists again and again. n_bytes is at
    least what sys.getsizeof gives for the texts and the tuples, and is faster to compute.
    """

    def __init__(self, compute):
        self.compute = compute
        self.n_bytes = 0

    def __missing__(self, text):
        value = self.compute(text)
        if len(text) <= CACHE_CHARS:
            n_bytes = 128 + 4 * len(text) + 8 * len(value)
            if len(self) >= CACHE_ENTRIES or self.n_bytes + n_bytes > CACHE_BYTES:
                self.clear()
                self.n_bytes = 0
            self[text] = value
            self.n_bytes += n_bytes
        return value


class Encoder:
    """A byte-level BPE vocabulary, which encodes text to ids and decodes ids to text.

    merges: pairs of pieces in printable form, in the order in which they are merged.
    vocab: {piece: id}. By default it is numbered like GPT-2's: the 256 bytes, what each merge
        makes, then <|endoftext|>.
    special: {text: id} of the texts that encode() turns into a single id when asked to. By default
        that is <|endoftext|>, if the vocabulary has it.
    added: {text: AddedToken} of more such texts. Those that are not special always become one id.
    end_ids: the ids that end a text, by default that of <|endoftext|>. A model can have others.
    add_prefix_space: encode a text, and the text after an added token, as if it began with a space.
    chat_template: a Jinja template for transformers; see corpus/chat.py.

    Raises ValueError for a merge of pieces that are not in the vocabulary, and for a vocabulary
    that check_vocab rejects.

    Its attributes include n_vocab, the largest id plus one; endoftext, the first of end_ids, which
    is written after a document, or None if there are none; and piece_of_id, the inverse of vocab,
    which includes all added tokens.

    >>> encoder = Encoder([("Ġ", "a"), ("b", "c")])
    >>> encoder.encode(" abc"), encoder.decode([256, 257]), encoder.endoftext, encoder.n_vocab
    ([256, 257], ' abc', 258, 259)
    """

    def __init__(
        self, merges, vocab=None, special=None, end_ids=None, added=None, add_prefix_space=False,
        chat_template=None,
    ):  # fmt: skip
        self.merges = [(left, right) for left, right in merges]
        vocab = number_pieces(self.merges) if vocab is None else check_vocab(vocab)
        if not special and not added and ENDOFTEXT in vocab:
            special = {ENDOFTEXT: vocab[ENDOFTEXT]}
        self.added = {text: AddedToken(id) for text, id in (special or {}).items()} | (added or {})
        self.special = {text: token.id for text, token in self.added.items() if token.is_special}
        self.vocab, self.piece_of_id = add_tokens(vocab, self.added)
        self.n_vocab = max(self.piece_of_id) + 1
        if end_ids is None:
            end_ids = [self.vocab[ENDOFTEXT]] if ENDOFTEXT in self.vocab else []
        self.add_prefix_space = add_prefix_space
        self.chat_template = chat_template
        self.end_ids = tuple(end_ids)
        self.endoftext = self.end_ids[0] if self.end_ids else None
        self._byte_ids = [self.vocab.get(CHAR_OF_BYTE[byte]) for byte in range(256)]
        self._ranks, self._merged = rank_merges(self.merges, self.vocab)
        self._n_longest = max(map(len, self.piece_of_id.values()))
        self._is_limited = False
        self._passes = []  # of split_added
        for normalized in (False, True):
            tokens = {t: token for t, token in self.added.items() if token.normalized == normalized}
            if tokens:
                self._passes.append((tokens, added_pattern(tokens)))
        self._has_plain_added = len(self.special) < len(self.added)
        self.is_byte_model = (  # encode() only looks up each byte
            not self.merges
            and not self._has_plain_added
            and not add_prefix_space
            and None not in self._byte_ids
        )
        self._ids_of_piece = Cache(self._encode_piece)
        self._ids_of_word = Cache(self._encode_word)

    def encode(self, text, allow_endoftext=False, begins=True):
        """Returns the token ids of a string: list[int].

        The texts of `special`, such as "<|endoftext|>", are encoded as ordinary text, unless
        allow_endoftext is true. Then they become one id each (the longer one, if two match). Added
        tokens that are not special always become one id. Lone surrogates, which UTF-8 cannot
        encode, become U+FFFD. begins: False for a text that continues another, so that
        add_prefix_space does not apply to it.
        """
        text = mend_surrogates(text)
        if not allow_endoftext and not self._has_plain_added:
            return self._checked(self._encode_plain(text, begins))
        parts = [text]  # texts, and the ids of added tokens
        for tokens, pattern in self._passes:
            split = []
            for part in parts:
                if isinstance(part, str):
                    split += split_added(part, tokens, pattern, allow_endoftext)
                else:
                    split.append(part)
            parts = split
        ids = []
        for i, part in enumerate(parts):
            begins = begins or i > 0
            ids += self._encode_plain(part, begins) if isinstance(part, str) else [part]
        return self._checked(ids)

    def _checked(self, ids):
        """Returns ids. Raises ValueError if limit_ids has removed one of them."""
        if self._is_limited and ids and max(ids) >= self.n_vocab:
            raise ValueError(
                f"the text has the id {max(ids)}, but the model has only {self.n_vocab} rows"
            )
        return ids

    def start_of_added(self, text, place):  # -> a position
        """Returns where the added token begins that lies across a place in the text, or ends there.

        Without such a token, returns the place. Only tokens that always become one id count.
        """
        for tokens, pattern in self._passes:
            for match in pattern.finditer(text):
                is_there = match.start() < place <= match.end()
                if is_there and not tokens[match[0]].is_special:
                    return match.start()
        return place

    def encode_prompt(self, text, n_ctx=None):
        """Returns encode(text) or, for an empty text, only the end token, if there is one.

        Raises ValueError for a text that would be too long even if each of n_ctx tokens were the
        longest in the vocabulary. This check costs nothing, while encoding a huge file would fill
        the memory.
        """
        if n_ctx is not None and len(text) > n_ctx * self._n_longest:
            raise ValueError(
                f"a prompt of {len(text)} characters, but this model has only {n_ctx} positions "
                "(n_ctx)"
            )
        ids = self.encode(text)
        if not ids and self.endoftext is not None:
            ids = [self.endoftext]
        return ids

    def limit_ids(self, n_vocab):
        """Keeps only the ids below n_vocab, for which the model has rows.

        From then on, encode raises ValueError for a text with any other id.
        """
        self.n_vocab = n_vocab
        self.end_ids = tuple(id for id in self.end_ids if id < n_vocab)
        self.endoftext = self.end_ids[0] if self.end_ids else None
        self.piece_of_id = {id: piece for id, piece in self.piece_of_id.items() if id < n_vocab}
        self._is_limited = True
        self.is_byte_model = False

    def with_chat_template(self, chat_template):  # -> Encoder
        """Returns a copy that saves another chat template."""
        encoder = copy.copy(self)
        encoder.chat_template = chat_template
        return encoder

    def decode(self, ids):
        """Returns the text of an iterable of ids. Bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id that is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def before_end(self, ids):
        """Yields the ids before the first one that ends a text."""
        return takewhile(lambda id: id not in self.end_ids, ids)

    def decode_bytes(self, ids):  # -> bytes
        """Returns the bytes of ids, which may begin or end inside a character.

        Raises ValueError for an id that is not in the vocabulary.
        """
        ids = [index(id) for id in ids]
        try:
            chars = "".join([self.piece_of_id[id] for id in ids])
        except KeyError as unknown:
            raise ValueError(f"id {unknown} is not in the vocabulary of {self.n_vocab}") from None
        return bytes([BYTE_OF_CHAR[char] for char in chars])

    def decode_stream(self, ids):
        """Yields the text of ids as they arrive. Joined, the parts are decode(ids).

        A character whose bytes are spread over several tokens is yielded with the last of them.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            text = utf8.decode(self.decode_bytes([id]))
            if text:
                yield text
        text = utf8.decode(b"", final=True)
        if text:
            yield text

    def save(self, model_dir):
        """Writes a folder that get_encoder and Hugging Face's transformers can read."""
        ends = [text for text, id in self.special.items() if id == self.endoftext]
        end_token = ends[0] if ends else None
        write_tokenizer(model_dir, self, end_token)

    def _encode_plain(self, text, begins):
        if self.add_prefix_space and begins and text and not text.startswith(" "):
            text = " " + text
        if self.is_byte_model and max(self._byte_ids) < 256:
            return list(text.encode().translate(bytes(self._byte_ids)))
        words = WORD.findall(text)
        return list(chain.from_iterable(map(self._ids_of_word.__getitem__, words)))

    def _encode_word(self, word):
        pieces = cut_word(word)
        if len(pieces) == 1:
            return self._ids_of_piece[word]
        return tuple(chain.from_iterable(map(self._ids_of_piece.__getitem__, pieces)))

    def _encode_piece(self, piece):
        ids = [self._byte_ids[byte] for byte in piece.encode()]
        if None in ids:
            byte = piece.encode()[ids.index(None)]
            raise ValueError(f"the vocabulary has no id for the byte {byte:#04x}, in {piece!r}")
        merge = merge_short if len(ids) < LONG_PIECE else merge_long
        return tuple(merge(ids, self._ranks, self._merged))


def train(texts, n_vocab):
    """Learns an Encoder of n_vocab entries from a string, or from an iterable of strings.

    The entries are the 256 bytes, <|endoftext|>, and what the merges make. There are fewer than
    n_vocab if the text runs out of pairs. Each merge joins the pair of neighbours that is most
    frequent at that point. If several pairs are equally frequent, the one with the greater bytes is
    joined. Nothing is merged across the pieces that encode() cuts, across texts, or with
    <|endoftext|>, which separates documents.

    Memory grows with the number of different pieces, not with the text. Time grows with the length
    of the pieces, so a text without white space or punctuation is slow. Raises ValueError if
    n_vocab is below 257. Sennrich et al. 2016, algorithm 1.

    In "low lower lowest", (l, o) and (o, w) occur three times each. o is the greater byte, so "ow"
    is the first merge. "low" is the second. Then (" ", low) and (low, e) occur twice each.

    >>> train("low lower lowest", 260).merges
    [('o', 'w'), ('l', 'ow'), ('low', 'e')]
    """
    if n_vocab < 257:
        raise ValueError(f"n_vocab is {n_vocab}, but 256 bytes and {ENDOFTEXT} are 257 entries")
    pieces = count_pieces([texts] if isinstance(texts, str) else texts)
    return Encoder(learn_merges(pieces, n_vocab - 257))


def count_pieces(texts):  # -> {piece: how often it occurs}
    """Counts the words first, and cuts each different word into pieces only once."""
    words = Counter()
    pieces = Counter()
    for text in texts:
        for document in mend_surrogates(text).split(ENDOFTEXT):
            words.update(WORD.findall(document))
    for word, n in words.items():
        for piece in cut_word(word):
            pieces[piece] += n
    return pieces


def learn_merges(pieces, n_merges):  # {piece: count} -> [(left, right), ...], printable
    """Learns n_merges merges, or as many as it takes to make every piece a single symbol.

    A merge changes only the pieces that contain its pair. `pieces_with` finds them, so nothing else
    is counted again. A heap finds the most frequent pair. Its entries go out of date as counts
    fall, so each entry is checked when it is popped, and pushed back with the right count.
    """
    splits = [[bytes([byte]) for byte in piece.encode()] for piece in pieces]
    piece_counts = list(pieces.values())
    pair_counts = Counter()
    pieces_with = defaultdict(set)  # {pair: indices of the pieces that contain it}
    for i, symbols in enumerate(splits):
        for pair in pairwise(symbols):
            pair_counts[pair] += piece_counts[i]
            pieces_with[pair].add(i)
    heap = [heap_entry(pair, count) for pair, count in pair_counts.items()]
    heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        minus_count, _, _, pair = heappop(heap)
        if pair_counts[pair] != -minus_count:
            if pair_counts[pair]:
                heappush(heap, heap_entry(pair, pair_counts[pair]))
            continue
        symbol = pair[0] + pair[1]
        merges.append(pair)
        new_pairs = set()
        for i in pieces_with.pop(pair):
            for old_pair in pairwise(splits[i]):
                pair_counts[old_pair] -= piece_counts[i]
            splits[i] = merge_pair(splits[i], pair, symbol)
            for new_pair in pairwise(splits[i]):
                pair_counts[new_pair] += piece_counts[i]
                if symbol in new_pair:
                    pieces_with[new_pair].add(i)
                    new_pairs.add(new_pair)
        for new_pair in new_pairs:
            heappush(heap, heap_entry(new_pair, pair_counts[new_pair]))
    return [(spell(left), spell(right)) for left, right in merges]


def spell(symbol):  # bytes -> printable characters
    return "".join(CHAR_OF_BYTE[byte] for byte in symbol)


def merge_pair(symbols, pair, symbol):
    """Replaces every occurrence of a pair by one symbol, from left to right.

    >>> merge_pair([b"a", b"a", b"a", b"b"], (b"a", b"a"), b"aa")
    [b'aa', b'a', b'b']
    """
    merged = []
    for right in symbols:
        if merged and (merged[-1], right) == pair:
            merged[-1] = symbol
        else:
            merged.append(right)
    return merged


MIRROR = bytes(range(255, -1, -1))  # translates byte b to 255 - b


def heap_entry(pair, count):
    """Returns a tuple that sorts by falling count and, if those are equal, by falling bytes.

    A heap pops its smallest entry, so everything is negated: -count, and 255 - byte. Of b"a" and
    b"ab", the longer is the greater and must come first, so each key ends with a character that is
    larger than any byte.
    """
    left, right = [half.translate(MIRROR).decode("latin-1") + "\u0100" for half in pair]
    return -count, left, right, pair


def number_pieces(merges):
    """Returns {piece: id} in GPT-2's order: the bytes, what each merge makes, <|endoftext|>.

    >>> list(number_pieces([("l", "o"), ("lo", "w")]).items())[-3:]
    [('lo', 256), ('low', 257), ('<|endoftext|>', 258)]
    """
    made = [left + right for left, right in merges]  # two merges may make the same piece
    pieces = dict.fromkeys([*CHAR_OF_BYTE.values(), *made, ENDOFTEXT])
    return {piece: id for id, piece in enumerate(pieces)}


def rank_merges(merges, vocab):
    """Returns the merges as ids, {(left id, right id): rank}, and the id that each rank makes.

    Raises ValueError for a merge of pieces that are not in the vocabulary.
    """
    ranks = {}
    merged = []
    for rank, (left, right) in enumerate(merges):
        try:
            ranks[vocab[left], vocab[right]] = rank
            merged.append(vocab[left + right])
        except KeyError as unknown:
            problem = f"the vocabulary has no {unknown}, which merge {rank + 1} needs"
            raise ValueError(f"{problem}: {left!r} + {right!r}") from None
    return ranks, merged


def mend_surrogates(text):
    """Joins surrogates that form a pair, and replaces lone ones with U+FFFD, like tiktoken.

    Surrogates are halves of characters. They come from UTF-16, and from file names that are not
    UTF-8.

    >>> mend_surrogates("\\ud83d\\ude00 \\ud83d")
    '😀 �'
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def get_encoder(model_name, models_dir):
    """Reads the Encoder of the folder models_dir/model_name, in OpenAI's or Hugging Face's layout.

    Raises FileNotFoundError if the folder has neither layout, and ValueError, which names the file,
    if a file is malformed. model_files/tokenizer.py reads the files.
    """
    tokenizer = read_tokenizer(Path(models_dir, model_name))
    with naming(tokenizer.merges_file):  # errors in the other files were raised while reading
        encoder = Encoder(
            tokenizer.merges,
            tokenizer.vocab,
            end_ids=tokenizer.end_ids,
            added=tokenizer.added,
            add_prefix_space=tokenizer.add_prefix_space,
            chat_template=tokenizer.chat_template,
        )
    return encoder
