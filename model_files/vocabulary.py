"""What a vocabulary is: pieces of text, spelled in printable characters, each with an id."""

ENDOFTEXT = "<|endoftext|>"  # stands between the documents that GPT-2 was trained on
MOST_IDS = 2**24  # each id is a row of the model's embedding: no tokenizer has nearly as many


def printable_bytes():
    """Return {byte: the printable character that stands for it}, in the order of GPT-2's ids.

    GPT-2's files are text: a merge is a line, its two halves separated by a space. Raw bytes would
    break that, because some are newlines or spaces and many are not valid UTF-8, so each is written
    as a visible character. The bytes that Latin-1 shows stand for themselves. The other 68
    (controls, blanks and the soft hyphen) take the code points from 256 on: the space, byte 32, is
    the famous "Ġ".

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
    """Return a text as a vocabulary spells it, a character for each of its UTF-8 bytes.

    >>> printable(" a 我")
    'ĠaĠæĪĳ'
    """
    return "".join(CHAR_OF_BYTE[byte] for byte in text.encode())


def check_vocab(vocab):
    """Return vocab, {piece: id}. Raises ValueError, which says why, if it cannot be one."""
    if not isinstance(vocab, dict):
        raise ValueError("a vocabulary is one JSON object, from pieces to ids")
    piece_of_id = {}
    for piece, id in vocab.items():
        if type(id) is not int or not 0 <= id < MOST_IDS:
            expected = f"an integer from 0 to {MOST_IDS - 1}"
            raise ValueError(f"the id of {piece!r} is {id!r}, not {expected}")
        if id in piece_of_id:
            raise ValueError(f"{piece_of_id[id]!r} and {piece!r} have the same id, {id}")
        piece_of_id[id] = piece
    missing = [char for char in BYTE_OF_CHAR if char not in vocab]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes have no id, the first is {missing[0]!r}")
    unknown = set("".join(vocab)) - BYTE_OF_CHAR.keys()
    if unknown:
        raise ValueError(f"{min(unknown)!r} is in a piece, but stands for no byte")
    return vocab


def add_special(vocab, special):
    """Return the vocabulary with special texts, {text: id}, added.

    Raises ValueError if the vocabulary has another id for one of them.
    """
    for text, id in special.items():
        if vocab.get(printable(text), id) != id:
            raise ValueError(f"{text!r} has two ids, {vocab[printable(text)]} and {id}")
    return check_vocab(vocab | {printable(text): id for text, id in special.items()})
