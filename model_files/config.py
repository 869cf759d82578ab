"""A model's sizes on the disk: Hugging Face's config.json, or OpenAI's hparams.json."""

import math
import os

from plumbing.files import read_json

HUGGING_FACE_SIZES = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
OUR_ARITHMETIC = {  # the values of Hugging Face's settings that mean what gpt2.py computes
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    # query_scales handles the second values of these two.
    "scale_attn_weights": (True, False),
    "scale_attn_by_inverse_layer_idx": (False, True),
    "add_cross_attention": (False,),
}


def sizes_file(model_dir):
    """The path of a folder's config.json (Hugging Face's) or hparams.json (OpenAI's), or None."""
    paths = [os.path.join(model_dir, name) for name in ("config.json", "hparams.json")]
    return next(filter(os.path.isfile, paths), None)


def read_hparams(model_dir):
    """The sizes {n_vocab, n_ctx, n_embd, n_head, n_layer}, whichever layout they are written in.

    n_inner, the width inside the ffn, is among them only if it is not 4 * n_embd. ValueError for
    impossible sizes, and for variants of GPT-2 that we would compute wrongly.
    """
    path = sizes_file(model_dir)
    if path is None:
        raise FileNotFoundError(f"{model_dir}: no model, neither config.json nor hparams.json")
    config = read_json(path)
    hugging_face = path.endswith("config.json")
    if hugging_face:
        for key, same in OUR_ARITHMETIC.items():
            if config.get(key, same[0]) not in same:
                raise ValueError(
                    f"{path}: {key} {config[key]!r} is not supported: only {same[0]!r} is"
                )
    hparams = {}
    for ours, theirs in HUGGING_FACE_SIZES.items():
        key = theirs if hugging_face else ours
        size = hparams[ours] = config.get(key)
        if type(size) is not int or not 0 < size <= 2**24:
            raise ValueError(f"{path}: {key} is {size!r}, not a sensible number")
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(f"{path}: n_embd {hparams['n_embd']} is not a multiple of n_head")
    if hugging_face:
        n_inner = config.get("n_inner")
        if n_inner is not None and (type(n_inner) is not int or not 0 < n_inner <= 2**24):
            raise ValueError(f"{path}: n_inner is {n_inner!r}, not a sensible number")
        if n_inner not in (None, 4 * hparams["n_embd"]):
            hparams["n_inner"] = n_inner
    return hparams


def query_scales(model_dir, hparams):  # -> [n_layer], what each block's queries are multiplied by
    """All 1, except in two variants of GPT-2, which divide a query's scores by something else.

    All blocks divide by sqrt(d_head) unless scale_attn_weights is false, and block i also by i + 1
    if scale_attn_by_inverse_layer_idx is true. gpt2.py always divides by sqrt(d_head), so the
    queries are multiplied to make up for it. (reorder_and_upcast_attn, a third variant, changes
    nothing in float32.)
    """
    path = sizes_file(model_dir)
    config = read_json(path) if path.endswith("config.json") else {}
    scale, blocks = 1.0, range(1, hparams["n_layer"] + 1)
    if not config.get("scale_attn_weights", True):
        scale = math.sqrt(hparams["n_embd"] // hparams["n_head"])
    by_block = config.get("scale_attn_by_inverse_layer_idx", False)
    return [scale / i if by_block else scale for i in blocks]


def hugging_face_config(encoder, hparams, dtype):
    """The settings with which transformers computes what gpt2.py computes."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: same[0] for key, same in OUR_ARITHMETIC.items()},
        **{key: hparams[ours] for ours, key in HUGGING_FACE_SIZES.items()},
        "n_inner": hparams.get("n_inner"),
        "bos_token_id": encoder.endoftext,
        "eos_token_id": encoder.endoftext,
        "torch_dtype": dtype,
    }
