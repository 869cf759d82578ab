"""A tokenizer's files, in OpenAI's layout and in Hugging Face's: read, checked and written.

    encoder.json + vocab.bpe     OpenAI's: {piece: id}, and a merge a line
    vocab.json + merges.txt      Hugging Face's names for the same two files; beside them, added
                                 tokens are in tokenizer_config.json
    tokenizer.json               Hugging Face's newer format: all of it in one file

encoder.py makes an Encoder of what is read. Only the second layout is written. After
https://github.com/openai/gpt-2/blob/master/src/encoder.py and https://huggingface.co/docs/tokenizers.
"""

import json
from pathlib import Path
from typing import NamedTuple

from model_files.vocabulary import ENDOFTEXT, add_special, check_vocab, printable
from plumbing.files import check_file, naming, read_json, write_whole

TOKENIZER_FILES = [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("tokenizer.json",)]
TOKENIZER_CONFIG = "tokenizer_config.json"
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# The settings of a tokenizer.json, and the values with which its ids are encoder.py's.
SUPPORTED = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


class Tokenizer(NamedTuple):
    """A tokenizer as its files describe it."""

    merges: list  # of (left piece, right piece), the first to be merged first
    vocab: dict  # {piece: id}
    special: dict  # {text: id} of the texts that can become a single id
    end_ids: tuple  # the ids that end a text, () if none do; the first stands between documents
    merges_file: Path  # the file that the merges are in, for error messages


# --- Reading ------------------------------------------------------------------------------------


def find_tokenizer(folder):
    """Return the paths of a folder's vocabulary and merges, or of the one file that has both.

    Raises FileNotFoundError if the folder has neither.
    """
    for names in TOKENIZER_FILES:
        paths = [Path(folder, name) for name in names]
        if all(path.is_file() for path in paths):
            return paths
    expected = " or ".join(" + ".join(names) for names in TOKENIZER_FILES)
    raise FileNotFoundError(f"no tokenizer in {folder}: expected {expected}")


def read_tokenizer(folder):  # -> Tokenizer
    """Read the tokenizer of a folder, in the first of the three layouts that it has.

    Raises FileNotFoundError if the folder has none of them. Raises ValueError, which names the
    file, if one is malformed or not supported.
    """
    paths = find_tokenizer(folder)
    merges_file = paths[-1]
    config = read_optional(folder, TOKENIZER_CONFIG)
    if len(paths) == 1:
        with naming(merges_file):
            merges, vocab, special = parse_tokenizer(read_json(merges_file))
            vocab = add_special(vocab, special)
    else:
        with naming(paths[0]):
            vocab = check_vocab(read_json(paths[0]))
        with naming(Path(folder, TOKENIZER_CONFIG)):
            special = parse_added(config.get("added_tokens_decoder") or {})
            vocab = add_special(vocab, special)
        with naming(merges_file):
            check_file(merges_file)
            merges = parse_merges(merges_file.read_text("utf-8"))
    roles = read_roles(folder, config)
    for text in [ENDOFTEXT, *roles.values()]:
        if is_text(text) and printable(text) in vocab:
            special[text] = vocab[printable(text)]
    return Tokenizer(
        merges, vocab, special, read_end_ids(folder, roles, special, vocab), merges_file
    )


def read_optional(folder, name):  # -> the JSON object in a file, {} if there is no such file
    path = Path(folder, name)
    return read_json(path) if path.is_file() else {}


def read_roles(folder, config):  # -> {"eos_token": "<|endoftext|>", ...}
    """Return the texts that have a role. config: the content of tokenizer_config.json.

    Older folders name them in special_tokens_map.json; transformers reads it if
    tokenizer_config.json has no added_tokens_decoder, and there it comes first.
    """
    roles = {key: token_text(config.get(key)) for key in ROLES}
    if "added_tokens_decoder" not in config:
        named = read_optional(folder, "special_tokens_map.json")
        roles |= {key: token_text(named[key]) for key in ROLES if named.get(key)}
    return {key: text for key, text in roles.items() if text}


def token_text(token):  # "</s>", or {"content": "</s>", ...} -> "</s>"; None if it is neither
    text = token.get("content") if isinstance(token, dict) else token
    return text if is_text(text) else None


def read_end_ids(folder, roles, special, vocab):  # -> a tuple of ids, without duplicates
    """Return the ids that end a text: the model's if it names any, otherwise the tokenizer's.

    A model names them as eos_token_id, a number or a list. generation_config.json comes first, as
    in transformers. Ids that the tokenizer does not have are left out, because configurations of
    small models often keep GPT-2's 50256. Raises ValueError, which names the file, if eos_token_id
    is neither a number nor a list of numbers.
    """
    known = set(vocab.values())
    for name in ("generation_config.json", "config.json"):
        ids = read_optional(folder, name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        for id in ids:
            if id is not None and type(id) is not int:
                raise ValueError(f"{Path(folder, name)}: eos_token_id {id!r} is not an id")
        if end_ids := tuple(id for id in dict.fromkeys(ids) if id in known):
            return end_ids
    for text in (roles.get("eos_token"), ENDOFTEXT):
        if text in special:
            return (special[text],)
    return ()


def parse_merges(text):
    """Return the merges of a merges.txt or vocab.bpe: a pair of pieces a line, in rank order.

    Only a first line can be a header; any other line that begins with "#" merges number signs.

    >>> parse_merges("#version: 0.2\\nĠ t\\n# #\\n")
    [('Ġ', 't'), ('#', '#')]
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    n_header = 1 if lines and lines[0].startswith("#version") else 0
    merges = [tuple(line.split(" ")) for line in lines[n_header:]]
    for number, pair in enumerate(merges, n_header + 1):
        if len(pair) != 2 or "" in pair:
            raise ValueError(f"line {number} is {' '.join(pair)!r}, not two pieces and a space")
    return merges


def parse_tokenizer(content):  # -> merges, vocab, special
    """Read the content of a tokenizer.json.

    Current versions of transformers save this file alone. It can describe many kinds of tokenizers;
    those for which our ids would be wrong raise ValueError.
    """
    model = content.get("model") if isinstance(content.get("model"), dict) else {}
    for key, values in SUPPORTED.items():
        if model.get(key, values[0]) not in values:
            raise ValueError(f"model.{key} {model[key]!r} is not supported, only {values[0]!r} is")
    if content.get("normalizer") is not None:
        raise ValueError("a normalizer is not supported")
    pre_tokenizer = content.get("pre_tokenizer")
    if not isinstance(pre_tokenizer, dict):
        pre_tokenizer = {}
    pre_tokenizer = {"use_regex": True} | pre_tokenizer  # older files do not have it
    if any(pre_tokenizer.get(key) != value for key, value in PRE_TOKENIZER.items()):
        raise ValueError("only GPT-2's pre_tokenizer is supported: ByteLevel, no prefix space")
    post_processor = content.get("post_processor")
    if isinstance(post_processor, dict) and post_processor.get("special_tokens"):
        raise ValueError("a post_processor that adds tokens is not supported")
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError("added_tokens is not a list of objects")
    special = parse_added({str(token.get("id")): token for token in added})
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError("model.merges is not a list")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in merges]
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_text, pair)):
            raise ValueError(f"merge {number} is {merges[number - 1]!r}, not a pair of pieces")
    return pairs, check_vocab(model.get("vocab")), special


def is_text(value):
    return isinstance(value, str) and value != ""


def parse_added(tokens):  # {id as text: {"content": text, ...}} -> {text: id}
    """Read Hugging Face's added tokens.

    Raises ValueError for a token that takes spaces or words beside it into account.
    """
    if not isinstance(tokens, dict):
        raise ValueError("added_tokens_decoder is not an object")
    added = {}
    for id, token in tokens.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not id.isdecimal() or len(id) > 9 or not is_text(content):
            raise ValueError(f"the added token {id!r} has no id or no text")
        if any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            raise ValueError(f"the added token {content!r} takes its surroundings into account")
        added[content] = int(id)
    return added


# --- Writing ------------------------------------------------------------------------------------


def write_tokenizer(folder, merges, vocab, special, end_token):
    """Write Hugging Face's vocab.json, merges.txt and tokenizer_config.json.

    end_token: the text that ends a document, None if the vocabulary has none. Each file appears
    under its name only when it is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": end_token for role in ("bos", "eos", "unk")}
    if special.keys() - {end_token}:
        settings = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        config["added_tokens_decoder"] = {
            id: {"content": text, "special": True} | settings for text, id in special.items()
        }
    lines = [f"{left} {right}\n" for left, right in merges]
    write_whole(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    write_whole(folder / "merges.txt", "#version: 0.2\n" + "".join(lines))
    write_whole(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2))
