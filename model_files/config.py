"""Reads and writes a model's sizes: Hugging Face's config.json, or OpenAI's hparams.json."""

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
OTHER_NAMES = {  # transformers reads a size under either name; the one here comes first
    "n_ctx": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
DEFAULTS = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
SUPPORTED = {  # the values of Hugging Face's settings for which gpt2.py is right
    "model_type": ("gpt2",),
    "activation_function": (  # names of the tanh form
        "gelu_new",
        "gelu_pytorch_tanh",
        "gelu_python_tanh",
        "gelu_fast",
        "gelu_accurate",
    ),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    # query_scales handles the second values of these two.
    "scale_attn_weights": (True, False),
    "scale_attn_by_inverse_layer_idx": (False, True),
    "add_cross_attention": (False,),
}


def sizes_file(model_dir):
    """Returns the path of a folder's config.json or hparams.json (OpenAI's), or None."""
    paths = [os.path.join(model_dir, name) for name in ("config.json", "hparams.json")]
    return next(filter(os.path.isfile, paths), None)


def read_hparams(model_dir):
    """Reads the sizes {n_vocab, n_ctx, n_embd, n_head, n_layer} of a model in either layout.

    n_inner, the width of the ffn's hidden layer, is included only if it is not 4 * n_embd. Raises
    ValueError for impossible sizes, and for variants of GPT-2 that are not supported.
    """
    path = sizes_file(model_dir)
    if path is None:
        raise FileNotFoundError(f"{model_dir}: no model, neither config.json nor hparams.json")
    config = read_json(path)
    hugging_face = path.endswith("config.json")
    if hugging_face:
        for key, values in SUPPORTED.items():
            if config.get(key, values[0]) not in values:
                expected = f"only {values[0]!r} is"
                raise ValueError(f"{path}: {key} {config[key]!r} is not supported; {expected}")
    hparams = {}
    for name, hugging_face_key in HUGGING_FACE_SIZES.items():
        key = hugging_face_key if hugging_face else name
        if hugging_face and OTHER_NAMES.get(name) in config:
            key = OTHER_NAMES[name]
        size = config.get(key, DEFAULTS[name] if hugging_face else None)
        if type(size) is not int or not 0 < size <= 2**24:
            raise ValueError(f"{path}: {key} is {size!r}, not a sensible number")
        hparams[name] = size
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(f"{path}: n_embd {hparams['n_embd']} is not a multiple of n_head")
    if hugging_face:
        n_inner = config.get("n_inner")
        if n_inner is not None and (type(n_inner) is not int or not 0 < n_inner <= 2**24):
            raise ValueError(f"{path}: n_inner is {n_inner!r}, not a sensible number")
        if n_inner not in (None, 4 * hparams["n_embd"]):
            hparams["n_inner"] = n_inner
    return hparams


def query_scales(model_dir, hparams):  # -> [n_layer], a factor for each block's queries
    """Returns factors that make gpt2.py compute two variants of GPT-2, all 1 for GPT-2 itself.

    The variants scale the scores of attention differently. If scale_attn_weights is false, the
    factor is 1 instead of 1 / sqrt(d_head). If scale_attn_by_inverse_layer_idx is true, block i has
    an additional factor 1 / (i + 1). gpt2.py always divides by sqrt(d_head), and the factors
    compensate for that. (reorder_and_upcast_attn, a third variant, changes nothing in float32.)
    """
    path = sizes_file(model_dir)
    config = read_json(path) if path.endswith("config.json") else {}
    scale = 1.0
    if not config.get("scale_attn_weights", True):
        scale = math.sqrt(hparams["n_embd"] // hparams["n_head"])
    by_block = config.get("scale_attn_by_inverse_layer_idx", False)
    return [scale / (i + 1) if by_block else scale for i in range(hparams["n_layer"])]


def hugging_face_config(encoder, hparams, dtype):
    """Returns the config.json with which transformers gives the same result as gpt2.py."""
    end_ids = list(encoder.end_ids)
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in SUPPORTED.items()},
        **{key: hparams[name] for name, key in HUGGING_FACE_SIZES.items()},
        "n_ctx": hparams["n_ctx"],  # the older name of n_positions, which llama.cpp reads
        "n_inner": hparams.get("n_inner"),
        "bos_token_id": encoder.endoftext,
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids or None,
        "torch_dtype": dtype,
    }
