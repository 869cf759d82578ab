"""Reads, checks and writes a tokenizer's files, in OpenAI's layout and in Hugging Face's.

    encoder.json + vocab.bpe     OpenAI's files: {piece: id}, and one merge per line
    tokenizer.json               Hugging Face's newer format: everything in one file
    vocab.json + merges.txt      Hugging Face's names for OpenAI's two files

Added tokens are also in tokenizer_config.json or, in older folders, in added_tokens.json.
special_tokens_map.json, another older file, says which of them are special. A chat template is in
chat_template.jinja or, in older folders, in tokenizer_config.json.

encoder.py turns a Tokenizer into an Encoder. Both of Hugging Face's layouts are written. Sources:
https://github.com/openai/gpt-2/blob/master/src/encoder.py and https://huggingface.co/docs/tokenizers.
"""

import json
from pathlib import Path
from typing import NamedTuple

from model_files.vocabulary import ENDOFTEXT, AddedToken, add_tokens, check_vocab, printable
from plumbing.files import check_file, naming, read_json, write_whole

TOKENIZER_FILES = [("encoder.json", "vocab.bpe"), ("tokenizer.json",), ("vocab.json", "merges.txt")]
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
VERSION = "#version: 0.2"  # the first line of a merges.txt
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# The settings of a tokenizer.json, and the values for which encoder.py gives the same ids.
SUPPORTED = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}
PRE_TOKENIZER = {"type": "ByteLevel", "use_regex": True}


class Tokenizer(NamedTuple):
    """A tokenizer as its files describe it."""

    merges: list  # of (left piece, right piece), in the order of merging
    vocab: dict  # {piece: id}
    added: dict  # {text: AddedToken} of the texts that are or can become a single id
    end_ids: tuple  # the ids that end a text, if any; the first one separates documents
    add_prefix_space: bool  # whether a text that begins without a space gets one
    chat_template: str | None  # Jinja, for transformers; only copied when the model is saved
    merges_file: Path  # the file with the merges, for error messages


# --- Reading ------------------------------------------------------------------------------------


def find_tokenizer(folder):
    """Returns the paths of a folder's vocabulary and merges, or of the one file that has both.

    Raises FileNotFoundError if the folder has neither.
    """
    for names in TOKENIZER_FILES:
        paths = [Path(folder, name) for name in names]
        if all(path.is_file() for path in paths):
            return paths
    expected = "encoder.json + vocab.bpe or vocab.json + merges.txt or tokenizer.json"
    raise FileNotFoundError(f"no tokenizer in {folder}: expected {expected}")


def read_tokenizer(folder):  # -> Tokenizer
    """Reads the tokenizer of a folder, in the first of the three layouts that it has.

    Raises FileNotFoundError if the folder has none of them, and ValueError, which names the file,
    if one is malformed or not supported.
    """
    paths = find_tokenizer(folder)
    merges_file = paths[-1]
    config = read_optional(folder, TOKENIZER_CONFIG)
    with naming(Path(folder, TOKENIZER_CONFIG)):
        for key in ("add_bos_token", "add_eos_token"):
            if config.get(key):
                raise ValueError(f"{key} is not supported; set it to false")
        add_prefix_space = read_flag(config, "add_prefix_space")
    if len(paths) == 1:
        with naming(merges_file):
            content = read_json(merges_file)
            merges, vocab, added = parse_tokenizer(content)
            in_same_file = read_flag(content["pre_tokenizer"], "add_prefix_space")
            add_prefix_space = in_same_file if add_prefix_space is None else add_prefix_space
            add_tokens(vocab, added)
    else:
        with naming(paths[0]):
            vocab = check_vocab(read_json(paths[0]))
            added = {}
        with naming(merges_file):
            check_file(merges_file)
            merges = parse_merges(merges_file.read_text("utf-8"))
    roles, special = read_special(folder, config)
    path, found = read_added(folder, config, special)
    with naming(path):
        for text, token in found.items():
            if text in added and added[text].id != token.id:
                raise ValueError(f"{text!r} has two ids, {added[text].id} and {token.id}")
        added |= found
    special_file = Path(folder, SPECIAL_TOKENS_MAP)
    with naming(special_file if special_file.is_file() else Path(folder, TOKENIZER_CONFIG)):
        added = number_special(special, added, vocab)
    with naming(path):
        vocab, piece_of_id = add_tokens(vocab, added)
    end_ids = read_end_ids(folder, roles, added, piece_of_id)
    chat_template = read_chat_template(folder, config)
    return Tokenizer(
        merges, vocab, added, end_ids, bool(add_prefix_space), chat_template, merges_file
    )


def read_flag(settings, key):  # -> True, False, or None if there is no such setting
    value = settings.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, not true or false")
    return value


def read_optional(folder, name):  # -> the JSON object in a file, {} if there is no such file
    path = Path(folder, name)
    return read_json(path) if path.is_file() else {}


def read_special(folder, config):  # -> {"eos_token": "</s>", ...}, {text: settings}
    """Returns the tokens with a role, and all special texts, in the order of transformers.

    config: the content of tokenizer_config.json. Older folders name the tokens in
    special_tokens_map.json. As in transformers, that file is read only if tokenizer_config.json has
    no added_tokens_decoder, and then takes precedence. The settings are those of an
    added_tokens_decoder.
    """
    sources = [config]
    if "added_tokens_decoder" not in config:
        sources.append(read_optional(folder, SPECIAL_TOKENS_MAP))
    by_role = dict.fromkeys(ROLES)
    others = []
    for source in sources:
        by_role |= {key: source[key] for key in source if key.endswith("_token") and source[key]}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = source.get(key)
            if isinstance(tokens, dict):
                others += tokens.values()
            elif isinstance(tokens, list):
                others += tokens
    roles = {role: token_text(token) for role, token in by_role.items()}
    special = {}
    for token in [*by_role.values(), *others]:
        text = token_text(token)
        if text is not None:
            settings = token if isinstance(token, dict) else {}  # a text alone has no settings
            special[text] = special.get(text, {}) | settings
    return roles, special


def number_special(special, added, vocab):  # -> {text: AddedToken}, added with all of special
    """Numbers the special tokens without an id in any file, after all others, like transformers.

    special: {text: settings}. <|endoftext|> is special even if no file says so.
    """
    added = dict(added)
    if ENDOFTEXT in added or ENDOFTEXT in vocab:
        special = {ENDOFTEXT: {}} | special
    for text, settings in special.items():
        if text in added:
            added[text] = added[text]._replace(is_special=True)
            continue
        if text in vocab and printable(text) == text:  # "Ġ" in the vocabulary is not the text "Ġ"
            id = vocab[text]
        else:
            id = 1 + max([len(vocab) - 1, *(token.id for token in added.values())])
        added |= parse_added({str(id): settings | {"content": text, "special": True}})
    return added


def read_chat_template(folder, config):  # -> Jinja, or None
    """Reads the chat template. If there are several, it is the one named default.

    Raises ValueError, which names the file, if none has that name, or if a template is not text.
    """
    path = Path(folder, CHAT_TEMPLATE_FILE)
    if path.is_file():
        with naming(path):
            check_file(path)
            return path.read_text("utf-8") or None
    template = config.get("chat_template")
    entries = template if isinstance(template, list) else []
    for entry in entries:
        if isinstance(entry, dict) and entry.get("name") == "default":
            template = entry.get("template")
    if template is not None and not isinstance(template, str):
        path = Path(folder, TOKENIZER_CONFIG)
        expected = "a text, or a list of templates of which one is named default"
        raise ValueError(f"{path}: chat_template must be {expected}")
    return template or None


def read_added(folder, config, special):  # -> the path of their file, {text: AddedToken}
    """Reads the added tokens that are not in the vocabulary. config, special: see read_special.

    Older folders have added_tokens.json, {text: id}, instead of an added_tokens_decoder.
    """
    path = Path(folder, TOKENIZER_CONFIG)
    if "added_tokens_decoder" in config:
        with naming(path):
            return path, parse_added(config["added_tokens_decoder"] or {})
    path = Path(folder, "added_tokens.json")
    with naming(path):
        tokens = {}
        for text, id in read_optional(folder, path.name).items():
            is_special = text in special
            tokens[str(id)] = {"content": text, "special": is_special}
        return path, parse_added(tokens)


def token_text(token):  # "</s>", or {"content": "</s>", ...} -> "</s>"; None if it is neither
    text = token.get("content") if isinstance(token, dict) else token
    return text if is_text(text) else None


def read_end_ids(folder, roles, added, known):  # -> a tuple of ids, without duplicates
    """Returns the ids that end a text: the model's if it names any, otherwise the tokenizer's.

    A model names them as eos_token_id, a number or a list. generation_config.json takes precedence,
    as in transformers. Ids that the tokenizer does not have are left out, because the
    configurations of small models often keep GPT-2's 50256. Raises ValueError, which names the
    file, if eos_token_id is neither a number nor a list of numbers.
    """
    for name in ("generation_config.json", "config.json"):
        ids = read_optional(folder, name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        for id in ids:
            if id is not None and type(id) is not int:
                raise ValueError(f"{Path(folder, name)}: eos_token_id {id!r} is not an id")
        if end_ids := tuple(id for id in dict.fromkeys(ids) if id in known):
            return end_ids
    for text in (roles.get("eos_token"), ENDOFTEXT):
        if text in added:
            return (added[text].id,)
    return ()


def parse_merges(text):
    """Returns the merges of a merges.txt or vocab.bpe, which has one pair of pieces per line.

    The merges are in rank order. Only the first line can be a header. Any other line that begins
    with "#" merges number signs.

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


def parse_tokenizer(content):  # -> merges, vocab, {text: AddedToken}
    """Reads the content of a tokenizer.json.

    Current versions of transformers save only this file. It can describe many kinds of tokenizers.
    Those for which our ids would be wrong raise ValueError.
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
    pre_tokenizer = {"use_regex": True} | pre_tokenizer  # older files don't have this setting
    if any(pre_tokenizer.get(key) != value for key, value in PRE_TOKENIZER.items()):
        raise ValueError("only GPT-2's pre_tokenizer is supported: ByteLevel, with its pattern")
    post_processor = content.get("post_processor")
    if isinstance(post_processor, dict) and post_processor.get("special_tokens"):
        raise ValueError("a post_processor that adds tokens is not supported")
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError("added_tokens is not a list of objects")
    added = parse_added({str(token.get("id")): token for token in added})
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError("model.merges is not a list")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in merges]
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_text, pair)):
            raise ValueError(f"merge {number} is {merges[number - 1]!r}, not a pair of pieces")
    return pairs, check_vocab(model.get("vocab")), added


def is_text(value):
    return isinstance(value, str) and value != ""


def parse_added(tokens):  # {id as text: {"content": text, ...}} -> {text: AddedToken}
    """Reads Hugging Face's added tokens. A token is special only if it says so.

    Raises ValueError for a token with lstrip, rstrip or single_word.
    """
    if not isinstance(tokens, dict):
        raise ValueError("added_tokens_decoder is not an object")
    added = {}
    for id, token in tokens.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not id.isdecimal() or len(id) > 9 or not is_text(content):
            raise ValueError(f"the added token {id!r} has no id or no text")
        if any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            raise ValueError(
                f"the added token {content!r} has lstrip, rstrip or single_word, "
                "which are not supported"
            )
        is_special = bool(token.get("special", False))
        normalized = bool(token.get("normalized", not is_special))
        added[content] = AddedToken(int(id), is_special, normalized)
    return added


# --- Writing ------------------------------------------------------------------------------------


def write_tokenizer(folder, encoder, end_token):
    """Writes Hugging Face's vocab.json, merges.txt, tokenizer_config.json and tokenizer.json.

    end_token: the text that ends a document, or None if the vocabulary has none. Each file appears
    under its name only when it is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": end_token for role in ("bos", "eos", "unk")}
    if encoder.add_prefix_space:
        config["add_prefix_space"] = True
    if encoder.chat_template:
        config["chat_template"] = encoder.chat_template
    if encoder.added.keys() - {end_token}:
        config["added_tokens_decoder"] = {
            token.id: added_settings(text, token) for text, token in encoder.added.items()
        }
    vocab = vocab_to_write(encoder)
    merges = [f"{left} {right}" for left, right in encoder.merges]
    write_whole(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    write_whole(folder / "merges.txt", "".join(f"{line}\n" for line in [VERSION, *merges]))
    write_whole(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2))
    content = tokenizer_json(encoder, vocab, merges)
    write_whole(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))


def added_settings(text, token):
    settings = {"content": text, "special": token.is_special, "normalized": token.normalized}
    return settings | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)


def vocab_to_write(encoder):  # -> {piece: id}
    """Returns the vocabulary without the added tokens that `tokenizers` would not find in it.

    It searches for the text of an added token, such as two spaces, although the vocabulary spells
    it "ĠĠ". The tokens that it has not found are then numbered, in order, from the end of the
    vocabulary.
    """
    respelled = [token.id for text, token in encoder.added.items() if printable(text) != text]
    if not respelled:
        return encoder.vocab
    added_later = {
        printable(text) for text, token in encoder.added.items() if token.id >= min(respelled)
    }
    return {
        piece: id
        for piece, id in encoder.vocab.items()
        if piece not in added_later or id < min(respelled)
    }


def tokenizer_json(encoder, vocab, merges):  # merges: ["Ġ t", ...]
    """Returns the content of a tokenizer.json, which has everything that `tokenizers` needs."""
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    added = sorted(encoder.added.items(), key=lambda item: item[1].id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token.id} | added_settings(text, token) for text, token in added],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"add_prefix_space": encoder.add_prefix_space},
        "post_processor": byte_level | {"add_prefix_space": True, "trim_offsets": False},
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
