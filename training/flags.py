"""The flags of a training run: what each means, what it may be, and how a recipe fills in the rest.

Nothing here needs JAX.
"""

import inspect
import math

from model_files.adapters import LAYERS
from training.recipes import LORA, RECIPES

HOW = ("resume", "overwrite", "models_dir", "tensorboard")
HOW += ("coordinator", "num_processes", "process_id")


def read_flags(
    data: str | None = None,
    out: str = "models/mine",
    recipe: str | None = None,
    init_from: str | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    tokenizer: str | None = None,
    models_dir: str = "models",
    n_layer: int | None = None,
    n_head: int | None = None,
    n_embd: int | None = None,
    n_ctx: int | None = None,
    batch_size: int | None = None,
    n_accumulate: int | None = None,
    n_steps: int | None = None,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    min_learning_rate: float | None = None,
    n_warmup: int | None = None,
    weight_decay: float | None = None,
    grad_clip: float | None = None,
    adam_b2: float | None = None,
    drop_rate: float | None = None,
    dtype: str | None = None,
    fsdp: bool | None = None,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    eval_tasks: str | None = None,
    eval_tasks_every: int | None = None,
    seed: int | None = None,
    saved_dtype: str = "float32",
    tensorboard: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
):  # -> what is trained, {name: value} of those given; and HOW, {name: value or None}
    """Train a GPT-2 on a text or on token shards, and save it as a model folder.

    The last tenth of a text is kept for validation. Losses, in nats per token, are printed as they
    are measured, with a sample. Whenever the validation loss is the best so far, the model is saved
    to `out`, in place of the one before: whatever happens later, the best one is kept. Ctrl-C and
    SIGTERM end a run after the current steps, with a checkpoint. Beside the model are metrics.jsonl
    and loss.png, which show how it went.

    backprop.py computes all of it with NumPy: it takes AdamW and float32 alone, and refuses
    lora_rank, examples, drop_rate, fsdp, eval_tasks and several processes of one run.

    A recipe sets each of the flags from n_layer to seed except eval_tasks, and may set data. A flag
    that you type replaces the recipe's value. The recipes are in training/recipes.py.

    Args:
        data: a text file, shakespeare (downloaded once), python-docs (it comes with Python), a
            folder of token shards (prepare.py's, nanoGPT's or llm.c's), or a file NAME.jsonl of
            examples. Each line of that has either a prompt and a completion, or messages; only the
            completions and the assistant's messages are learned.
        out: the folder to write, a new one; `python gpt2.py "..." --model_size mine` then reads
            models/mine.
        recipe: shakespeare-cpu, shakespeare (the default on a GPU or TPU), tinystories, finetune
            (the default with init_from), gpt2-124M, -355M, -774M, -1558M, or gpt3-125M to -175B.
        init_from: start with this model, a name or a folder as in gpt2.py, and with its tokenizer.
        lora_rank: train only adapters of this rank for that model (LoRA), by default with
            3e-4 as the highest learning rate; `out` gets just the adapters, in peft's layout, and
            can be used like any model's folder.
        lora_alpha: the adapters' update is multiplied by lora_alpha / lora_rank; 16 by default.
        lora_targets: the matrices that get an adapter, with commas between them; any of c_attn,
            c_proj (both of them in a block), c_fc, attn.c_proj and mlp.c_proj; by default
            c_attn,c_proj,c_fc.
        resume: the `out` of an earlier run, which then goes on where it stopped, with its flags.
            Only n_steps may be given again, to go on for longer, with a learning rate that follows
            the cosine of the longer run.
        overwrite: replace another model in `out`, and its checkpoints.
        tokenizer: 124M (GPT-2's), a folder in models_dir, or a path; by default the shards' own,
            and bytes for a text.
        models_dir: the folder that holds the models.
        n_layer: transformer blocks.
        n_head: attention heads in each; n_embd must be a multiple of it.
        n_embd: width of the model.
        n_ctx: the longest stretch of text it sees at once.
        batch_size: stretches at a time, on all devices together.
        n_accumulate: batches that make one step, their gradients averaged.
        n_steps: steps in all.
        optimizer: adamw, or muon for the matrices in the blocks and Adam for the rest.
        learning_rate: the highest, reached after n_warmup steps.
        min_learning_rate: the last, reached at the end along a cosine.
        n_warmup: steps of linear warmup, at most half of all.
        weight_decay: decay of the matrices (with muon, only of those in the blocks).
        grad_clip: longest gradient allowed.
        adam_b2: Adam's second decay rate.
        drop_rate: share of the blocks' weights left out at random in every step, in 256ths.
        dtype: float32 (the default on CPUs) or bfloat16, of the products; the rest is float32.
        fsdp: spread parameters and moments over the devices, too, for models too large for one.
        eval_every: steps between two measurements of the validation loss.
        checkpoint_every: steps between two checkpoints in out/checkpoints; the last two are kept.
        eval_tasks: hellaswag, lambada, or both with a comma between them; measures how much of each
            the model gets right, as evaluate.py does. hellaswag=FILE takes a file of JSON lines
            instead of the one downloaded once.
        eval_tasks_every: steps between two such measurements, eval_every by default.
        seed: the same seed gives the same run.
        saved_dtype: float32 or float16, of the best model's weights on disk.
        tensorboard: also write the losses to out/tensorboard (needs pip install tensorboard).
        coordinator: HOST:PORT of process 0, for a run in several processes. Start each with the
            same flags; on Slurm, Kubernetes, TPU and Open MPI they find each other without this.
        num_processes: how many processes there are.
        process_id: which one this is, from 0.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    how = {name: given.pop(name, None) for name in HOW}
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    if init_from is not None and tokenizer is not None:
        raise ValueError("--init_from brings its own tokenizer: leave out --tokenizer")
    default = {p.name: p.default for p in inspect.signature(read_flags).parameters.values()}
    more = [name for name in given.keys() - {"n_steps"} if given[name] != default[name]]
    if resume is not None and more:
        raise ValueError(f"--resume takes the run's own flags: leave out --{min(more)}")
    if resume is not None and overwrite:
        raise ValueError("--resume goes on with a run: leave out --overwrite")
    if init_from is not None:
        check_has_data(data, recipe or "finetune")  # before a download in vain
    return given, how


def check_has_data(data, recipe):  # the --data flag, or None
    """ValueError if none is given and the recipe has none of its own."""
    if data is None and RECIPES[recipe]["data"] is None:
        raise ValueError(f"recipe {recipe} needs --data: a text file or a folder of token shards")


def is_targets(text):
    return set(text.split(",")) <= {word for name in LAYERS for word in (name, name.split(".")[1])}


SIZE = "from 1 to 1048576", lambda n: 1 <= n <= 2**20
COUNT = "from 1 to 2147483647", lambda n: 1 <= n < 2**31
POSITIVE = "more than 0", lambda x: 0 < x < math.inf
NOT_NEGATIVE = "0 or more", lambda x: 0 <= x < math.inf
LIMITS = {  # what a flag must be, in words and as a test
    "lora_rank": SIZE,
    "lora_alpha": POSITIVE,
    "lora_targets": ("some of c_attn, c_proj, c_fc, with commas between them", is_targets),
    "n_layer": SIZE,
    "n_head": COUNT,  # and it must divide n_embd
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
    "eval_tasks_every": COUNT,
    "seed": ("from 0 to 4294967295", lambda n: 0 <= n < 2**32),
    "saved_dtype": ("float32 or float16", lambda word: word in ("float32", "float16")),
}


def read_tasks(text):  # the --eval_tasks flag -> {task: path or None}
    """ "hellaswag=a.jsonl,lambada" -> {"hellaswag": "a.jsonl", "lambada": None}. ValueError."""
    tasks = {}
    for word in text.split(",") if text is not None else ():
        task, named, path = word.partition("=")
        if task not in ("hellaswag", "lambada") or task in tasks or (named and not path):
            raise ValueError(f"eval_tasks must be hellaswag, lambada or both, not {text!r}")
        tasks[task] = path or None
    return tasks


def check_flags(flags):
    """Raises ValueError, one clear line, for flags with which no model or run is possible."""
    for name, value in flags.items():
        if name in LIMITS and not LIMITS[name][1](value):
            raise ValueError(f"{name} must be {LIMITS[name][0]}, not {value}")
    if flags["n_embd"] % flags["n_head"]:
        raise ValueError("n_embd {n_embd} must be a multiple of n_head {n_head}".format(**flags))
    if flags["min_learning_rate"] > flags["learning_rate"]:
        raise ValueError("min_learning_rate must not be more than learning_rate")
    if "eval_tasks_every" in flags and "eval_tasks" not in flags:
        raise ValueError("eval_tasks_every needs --eval_tasks: what to measure")
    read_tasks(flags.get("eval_tasks"))
    check_lora(flags)


def check_lora(flags):
    for name in ("lora_alpha", "lora_targets"):
        if name in flags and "lora_rank" not in flags:
            raise ValueError(f"{name} needs --lora_rank: the width of the adapters")
    for name, only in (("optimizer", "adamw"), ("drop_rate", 0.0)) if "lora_rank" in flags else ():
        if flags[name] != only:
            raise ValueError(f"{name} must be {only} with --lora_rank, not {flags[name]}")
    if flags.get("lora_rank", 0) > flags["n_embd"]:
        raise ValueError(f"lora_rank is at most n_embd, {flags['n_embd']} in that model")


def choose(typed, backend, hparams=None):  # -> the flags of a run
    """The recipe's values, replaced by the typed flags and by the sizes of a model to start from.

    backend: what JAX computes on, "cpu" or another. It decides the defaults.
    """
    recipe = typed.get("recipe")
    if recipe is None:
        recipe = "shakespeare-cpu" if backend == "cpu" else "shakespeare"
        recipe = "finetune" if hparams else recipe
    values = RECIPES[recipe] | (LORA if "lora_rank" in typed else {})
    flags = values | typed | {"recipe": recipe}
    if "learning_rate" in typed and "min_learning_rate" not in typed:
        flags["min_learning_rate"] *= typed["learning_rate"] / values["learning_rate"]
    if hparams:
        for name in ("n_layer", "n_head", "n_embd"):
            if typed.get(name, hparams[name]) != hparams[name]:
                raise ValueError(f"{name} is {hparams[name]} in that model: leave out --{name}")
            flags[name] = hparams[name]
        if "n_ctx" not in typed:
            flags["n_ctx"] = min(flags["n_ctx"], hparams["n_ctx"])
        if flags["n_ctx"] > hparams["n_ctx"]:
            raise ValueError(f"n_ctx is at most {hparams['n_ctx']} in that model")
    elif "lora_rank" in typed:
        raise ValueError("--lora_rank needs --init_from: a model to adapt")
    elif not {"n_layer", "n_head", "n_embd"} <= flags.keys():
        raise ValueError(f"recipe {recipe} needs --init_from: a model to start with")
    check_has_data(flags["data"], recipe)
    if flags["dtype"] is None:
        flags["dtype"] = "float32" if backend == "cpu" else "bfloat16"
    check_flags(flags)
    return flags


def check_saved(saved, place):  # -> the flags of a run that is resumed
    """ValueError if run.json is damaged, or another trainer wrote it."""
    try:
        flags = saved["flags"]
        wanted = RECIPES[flags["recipe"]] | {"n_layer": 1, "n_head": 1, "n_embd": 1}
        wanted |= {"dtype": "", "saved_dtype": "", "data": ""}
        wanted |= LORA | {"init_from": ""} if "lora_rank" in flags else {}
        right = all(type(flags[name]) is type(value) for name, value in wanted.items())
        maybe = {"eval_tasks": str, "eval_tasks_every": int, "init_from": str, "lora_rank": int}
        right &= all(type(flags[name]) is kind for name, kind in maybe.items() if name in flags)
        more = {*maybe, "recipe", "out", "tokenizer"}
        right &= flags.keys() <= wanted.keys() | more
        right &= type(saved["step"]) is int and 0 <= saved["step"] <= flags["n_steps"]
        right &= isinstance(saved.get("run"), int | None)
        right &= isinstance(saved["best"], float | None) and isinstance(saved["text"], dict)
        check_flags(flags)
    except (AttributeError, KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{place}/run.json: damaged, or not of this trainer")
    return flags


def extend(flags, step, n_steps):  # -> the flags of a run that is to go on after `step` steps
    """With n_steps in all, unless that is None. ValueError if there is nothing left to do."""
    flags = flags if n_steps is None else flags | {"n_steps": n_steps}
    check_flags(flags)
    if n_steps is not None and n_steps <= step:
        raise ValueError(f"{step} steps are done already: --n_steps must be more than that")
    return flags
