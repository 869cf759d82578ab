"""Hugging Face's tokenizer.json and added tokens, as far as they are of GPT-2's kind."""

OUR_MODEL = {  # the values of a tokenizer.json's settings that mean what encoder.py does
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}
OUR_CUTTER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def parse_tokenizer(found):  # a tokenizer.json -> merges, vocab, {special text: id}
    """Hugging Face's one file for a tokenizer, if it is of GPT-2's kind; ValueError for all others.

    Current transformers save this file alone. It can describe many kinds of tokenizers. We refuse
    those for which our ids would be wrong. https://huggingface.co/docs/tokenizers
    """
    model = found.get("model") if isinstance(found.get("model"), dict) else {}
    for key, same in OUR_MODEL.items():
        if model.get(key, same[0]) not in same:
            raise ValueError(f"model.{key} {model[key]!r} is not supported, only {same[0]!r} is")
    if found.get("normalizer") is not None:
        raise ValueError("a normalizer is not supported")
    cutter = found.get("pre_tokenizer") if isinstance(found.get("pre_tokenizer"), dict) else {}
    cutter = {"use_regex": True} | cutter  # older files do not have it
    if any(cutter.get(key) != value for key, value in OUR_CUTTER.items()):
        raise ValueError("only GPT-2's pre_tokenizer is supported: ByteLevel, no prefix space")
    after = found.get("post_processor")
    if isinstance(after, dict) and after.get("special_tokens"):
        raise ValueError("a post_processor that adds tokens is not supported")
    added = found.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) for t in added):
        raise ValueError("added_tokens is not a list of objects")
    added = parse_added({str(token.get("id")): token for token in added})
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError("model.merges is not a list")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in merges]
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_text, pair)):
            raise ValueError(f"merge {number} is {merges[number - 1]!r}, not a pair of pieces")
    return pairs, model.get("vocab"), added


def is_text(value):
    return isinstance(value, str) and value != ""


def parse_added(tokens):  # {id as text: {"content": text, ...}} -> {text: id}
    """Hugging Face's added tokens. ValueError for one that swallows the spaces beside it."""
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
