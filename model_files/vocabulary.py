"""A vocabulary: pieces of text, spelled in printable characters, each with an id."""

import re
from typing import NamedTuple

ENDOFTEXT = "<|endoftext|>"  # separates the documents that GPT-2 was trained on
MOST_IDS = 2**24  # each id is a row of the model's embedding, so no tokenizer has nearly as many


def printable_bytes():
    """Returns {byte: the printable character that stands for it}, in the order of GPT-2's ids.

    GPT-2's files are text. Each merge is a line, with a space between its two halves. Raw bytes
    would break that, because some are newlines or spaces and many are not valid UTF-8. So each byte
    is written as a visible character. The bytes that Latin-1 shows stand for themselves. The other
    68 (controls, blanks and the soft hyphen) get the code points from 256 on. The space, byte 32,
    becomes the famous "Ġ".

    >>> printable_bytes()[ord("A")], printable_bytes()[ord(" ")], printable_bytes()[0]
    ('A', 'Ġ', 'Ā')
    """
    visible = [*range(ord("!"), ord("~") + 1)]
    visible += range(ord("¡"), ord("¬") + 1)
    visible += range(ord("®"), ord("ÿ") + 1)
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    return characters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


CHAR_OF_BYTE = printable_bytes()
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def printable(text):
    """Returns a text as a vocabulary spells it, one character for each of its UTF-8 bytes.

    >>> printable(" a 我")
    'ĠaĠæĪĳ'
    """
    return "".join(CHAR_OF_BYTE[byte] for byte in text.encode())


def check_vocab(vocab):
    """Returns vocab, {piece: id}. Raises ValueError, which says why, if it is not a vocabulary."""
    if not isinstance(vocab, dict):
        raise ValueError("the vocabulary must be a JSON object, from pieces to ids")
    piece_of_id = {}
    for piece, id in vocab.items():
        if type(id) is not int or not 0 <= id < MOST_IDS:
            expected = f"an integer from 0 to {MOST_IDS - 1}"
            raise ValueError(f"the id of {piece!r} is {id!r}, not {expected}")
        if id in piece_of_id:
            raise ValueError(f"{piece_of_id[id]!r} and {piece!r} have the same id, {id}")
        piece_of_id[id] = piece
    if BYTE_OF_CHAR.keys().isdisjoint(vocab):
        raise ValueError("none of the 256 bytes has an id, so this is not a byte-level vocabulary")
    unknown = set("".join(vocab)) - BYTE_OF_CHAR.keys()
    if unknown:
        raise ValueError(f"a piece contains {min(unknown)!r}, which does not stand for a byte")
    return vocab


class AddedToken(NamedTuple):
    """A text that becomes one id wherever it occurs, independent of the merges."""

    id: int
    is_special: bool = True  # it becomes an id only if encode() is asked for special tokens
    normalized: bool = False  # it is found after those that are not normalized, as in `tokenizers`


def add_tokens(vocab, added):  # {piece: id}, {text: AddedToken} -> vocab, piece_of_id
    """Returns the vocabulary with the added tokens, and its inverse, which has all of them.

    A text that the vocabulary spells differently, such as two spaces, may have an id of its own
    although a merge makes the same piece. Then only the inverse has it. Raises ValueError if any
    other text has two ids, or if two texts have the same id.
    """
    own_ids = {}
    spelled = {}
    for text, token in added.items():
        piece = printable(text)
        if vocab.get(piece, token.id) == token.id:
            spelled[piece] = token.id
        elif piece == text:
            raise ValueError(f"{text!r} has two ids, {vocab[piece]} and {token.id}")
        else:
            own_ids[token.id] = piece
    vocab = check_vocab(vocab | spelled)
    piece_of_id = {id: piece for piece, id in vocab.items()}
    for id, piece in own_ids.items():
        if not 0 <= id < MOST_IDS or id in piece_of_id:
            raise ValueError(f"{piece_of_id.get(id)!r} and {piece!r} have the same id, {id}")
        piece_of_id[id] = piece
    return vocab, piece_of_id


def added_pattern(added):  # {text: AddedToken} -> a compiled pattern of all texts, longest first
    return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))


def split_added(text, added, pattern, allow_special):  # yields texts, and ids of added tokens
    """Cuts a text at its added tokens. Special ones stay text unless allow_special is true.

    Even then no other token is looked for inside them, as in `tokenizers`.
    """
    start = 0
    for match in pattern.finditer(text):
        token = added[match[0]]
        if token.is_special and not allow_special:
            continue
        if start < match.start():
            yield text[start : match.start()]
        yield token.id
        start = match.end()
    if start < len(text):
        yield text[start:]
