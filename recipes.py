"""What a training run's flags may be: the recipes that have a value for each, and the checks.

Every value is overridden by train_jax.py's flag of its name; `python train_jax.py --help` explains
them. Nothing here needs JAX.
"""

import math

SHAKESPEARE = {
    "data": "shakespeare",
    "n_accumulate": 1,
    "optimizer": "muon",
    "n_warmup": 100,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "adam_b2": 0.99,
    "drop_rate": 0.0,
    "dtype": None,  # float32 on CPUs, bfloat16 elsewhere
    "fsdp": False,
    "eval_every": 200,
    "checkpoint_every": 200,
    "seed": 1337,
}
GPT2 = SHAKESPEARE | {
    "data": None,
    "n_ctx": 1024,
    "batch_size": 32,
    "n_accumulate": 16,  # 32 * 16 * 1024 = 524288 tokens a step, and 10 billion in all
    "n_steps": 19073,
    "optimizer": "adamw",
    "n_warmup": 700,
    "adam_b2": 0.95,
    "eval_every": 250,
    "checkpoint_every": 1000,
}
RECIPES = {
    "shakespeare-cpu": SHAKESPEARE
    | {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_ctx": 64, "batch_size": 12, "n_steps": 2000}
    | {"learning_rate": 5e-3, "min_learning_rate": 5e-5},
    "shakespeare": SHAKESPEARE
    | {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_ctx": 256, "batch_size": 64, "n_steps": 5000}
    | {"learning_rate": 3e-3, "min_learning_rate": 3e-5, "drop_rate": 0.1},
    "tinystories": SHAKESPEARE  # 23 million parameters with 8192 tokens of the stories' own
    | {"n_layer": 6, "n_head": 8, "n_embd": 512, "n_ctx": 512, "batch_size": 64, "n_steps": 20000}
    | {"learning_rate": 2e-3, "min_learning_rate": 2e-5, "n_warmup": 500, "data": None},
    "finetune": SHAKESPEARE  # the model's own sizes
    | {"n_ctx": 256, "batch_size": 4, "n_accumulate": 4, "n_steps": 200, "data": None}
    | {"optimizer": "adamw", "learning_rate": 3e-5, "min_learning_rate": 3e-6, "n_warmup": 10}
    | {"weight_decay": 0.0, "eval_every": 50, "checkpoint_every": 50},
}
# Layers, heads, width and learning rate: GPT-2's sizes (Radford et al. 2019) with the rates of
# GPT-3 at these, and GPT-3's own (Brown et al. 2020, arXiv:2005.14165, table 2.1; but 1.3B has 24
# heads there, which do not divide its width).
LARGER = {
    "gpt2-124M": (12, 12, 768, 6e-4),
    "gpt2-355M": (24, 16, 1024, 3e-4),
    "gpt2-774M": (36, 20, 1280, 2.5e-4),
    "gpt2-1558M": (48, 25, 1600, 2e-4),
    "gpt3-125M": (12, 12, 768, 6e-4),
    "gpt3-350M": (24, 16, 1024, 3e-4),
    "gpt3-760M": (24, 16, 1536, 2.5e-4),
    "gpt3-1.3B": (24, 16, 2048, 2e-4),
    "gpt3-2.7B": (32, 32, 2560, 1.6e-4),
    "gpt3-6.7B": (32, 32, 4096, 1.2e-4),
    "gpt3-13B": (40, 40, 5120, 1e-4),
    "gpt3-175B": (96, 96, 12288, 6e-5),
}
RECIPES |= {
    name: GPT2
    | {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "fsdp": n_embd >= 1600}
    | {"learning_rate": rate, "min_learning_rate": rate / 10}
    | ({"n_ctx": 2048, "batch_size": 16} if name.startswith("gpt3") else {})
    for name, (n_layer, n_head, n_embd, rate) in LARGER.items()
}

SIZE = "from 1 to 1048576", lambda n: 1 <= n <= 2**20
COUNT = "from 1 to 2147483647", lambda n: 1 <= n < 2**31
POSITIVE = "more than 0", lambda x: 0 < x < math.inf
NOT_NEGATIVE = "0 or more", lambda x: 0 <= x < math.inf
LIMITS = {  # what a flag must be, in words and as a test
    "n_layer": SIZE,
    "n_head": COUNT,  # and n_embd's divisor
    "n_embd": SIZE,
    "n_ctx": SIZE,
    "batch_size": SIZE,
    "n_accumulate": SIZE,
    "n_steps": COUNT,
    "optimizer": ("adamw or muon", lambda word: word in ("adamw", "muon")),
    "learning_rate": POSITIVE,
    "min_learning_rate": NOT_NEGATIVE,
    "n_warmup": COUNT,
    "weight_decay": NOT_NEGATIVE,
    "grad_clip": POSITIVE,
    "adam_b2": ("more than 0 and less than 1", lambda x: 0 < x < 1),
    "drop_rate": ("from 0 to 0.9", lambda x: 0 <= x <= 0.9),
    "dtype": ("float32 or bfloat16", lambda word: word in ("float32", "bfloat16")),
    "eval_every": COUNT,
    "checkpoint_every": COUNT,
    "seed": ("from 0 to 4294967295", lambda n: 0 <= n < 2**32),
    "saved_dtype": ("float32 or float16", lambda word: word in ("float32", "float16")),
}


def check_flags(flags):
    """Raises ValueError, one clear line, for a model or a run that cannot be."""
    for name, value in flags.items():
        if name in LIMITS and not LIMITS[name][1](value):
            raise ValueError(f"{name} must be {LIMITS[name][0]}, not {value}")
    if flags["n_embd"] % flags["n_head"]:
        raise ValueError("n_embd {n_embd} must be a multiple of n_head {n_head}".format(**flags))
    if flags["min_learning_rate"] > flags["learning_rate"]:
        raise ValueError("min_learning_rate must not be more than learning_rate")


def choose(recipe, typed, backend, hparams=None):  # -> the flags of a run
    """The recipe's values, but for those typed and, of a model to start from, its own sizes.

    backend: what JAX computes on, "cpu" or another, which decides what nobody asked for.
    """
    if recipe is None:
        recipe = "shakespeare-cpu" if backend == "cpu" else "shakespeare"
        recipe = "finetune" if hparams else recipe
    flags = {"recipe": recipe, **RECIPES[recipe], **typed}
    if "learning_rate" in typed and "min_learning_rate" not in typed:
        flags["min_learning_rate"] *= typed["learning_rate"] / RECIPES[recipe]["learning_rate"]
    if hparams:
        for name in ("n_layer", "n_head", "n_embd"):
            if typed.get(name, hparams[name]) != hparams[name]:
                raise ValueError(f"{name} is {hparams[name]} in that model: leave out --{name}")
            flags[name] = hparams[name]
        if "n_ctx" not in typed:
            flags["n_ctx"] = min(flags["n_ctx"], hparams["n_ctx"])
        if flags["n_ctx"] > hparams["n_ctx"]:
            raise ValueError(f"n_ctx is at most {hparams['n_ctx']} in that model")
    elif not {"n_layer", "n_head", "n_embd"} <= flags.keys():
        raise ValueError(f"recipe {recipe} needs --init_from: a model to start with")
    if flags["data"] is None:
        raise ValueError(f"recipe {recipe} needs --data: a text file or a folder of token shards")
    if flags["dtype"] is None:
        flags["dtype"] = "float32" if backend == "cpu" else "bfloat16"
    check_flags(flags)
    return flags


def check_saved(saved, place):  # -> the flags of a run that is resumed
    """ValueError if run.json is damaged, or of another trainer."""
    try:
        flags = saved["flags"]
        wanted = RECIPES[flags["recipe"]] | {"n_layer": 1, "n_head": 1, "n_embd": 1}
        wanted |= {"dtype": "", "saved_dtype": "", "data": ""}
        right = all(type(flags[name]) is type(value) for name, value in wanted.items())
        right &= flags.keys() <= wanted.keys() | {"recipe", "out", "init_from", "tokenizer"}
        right &= type(saved["step"]) is int and 0 <= saved["step"] <= flags["n_steps"]
        right &= isinstance(saved["best"], float | None) and isinstance(saved["text"], dict)
        check_flags(flags)
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{place}/run.json: damaged, or not of this trainer")
    return flags
