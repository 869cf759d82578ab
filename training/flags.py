"""The flags of a training run, one row each.

A row gives the flag's type, limits and help text, where its default comes from, and whether a
resumed run and backprop.py accept it. Nothing here needs JAX.
"""

import collections
import inspect
import math
import textwrap
import typing
from collections.abc import Callable

from corpus.examples import is_examples
from model_files.adapters import LAYERS
from plumbing.cli import either
from training.recipes import LORA, RECIPES

OPTIMIZERS = ("adamw", "muon")  # train_jax.py's
DTYPES = ("float32", "bfloat16")
SAVED_DTYPES = ("float32", "float16")

# Where a flag's value lives.
CALL = "call"  # it concerns this call of the script, and is not saved
RUN = "run"  # it is saved with the run, if it has a value
RECIPE = "recipe"  # as RUN, and a recipe fills it in


class Limits(typing.NamedTuple):
    """The values that are allowed: words to follow "must be", and a test."""

    words: str
    allow: Callable


def one_of(words):
    return Limits(either(words), lambda word: word in words)


def is_targets(text):
    return set(text.split(",")) <= {word for name in LAYERS for word in (name, name.split(".")[1])}


ANY = Limits("anything", lambda value: True)
SIZE = Limits("from 1 to 1048576", lambda n: 1 <= n <= 2**20)
COUNT = Limits("from 1 to 2147483647", lambda n: 1 <= n < 2**31)
POSITIVE = Limits("more than 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Limits("0 or more", lambda x: 0 <= x < math.inf)
BELOW_1 = Limits("more than 0 and less than 1", lambda x: 0 < x < 1)
DROPOUT = Limits("from 0 to 0.9", lambda x: 0 <= x <= 0.9)
EMA = Limits("0 or more, and less than 1", lambda x: 0 <= x < 1)
SNAPSHOTS = Limits("from 2 to 1000", lambda n: 2 <= n <= 1000)
SEED = Limits("from 0 to 4294967295", lambda n: 0 <= n < 2**32)
TARGETS = Limits("some of c_attn, c_proj, c_fc, with commas between them", is_targets)

EVERY_VALUE = "every value"


class Flag(typing.NamedTuple):
    """A row of FLAGS.

    default: the value if neither the command line nor the recipe gives one, nor the run.json of a
    run that is older than the flag. None: the flag has no value then.
    needs: the flag without which this one has no meaning.
    is_required: a run.json without it is damaged (if it has the flag that this one needs).
    numpy: the only value that backprop.py accepts; None: backprop.py doesn't have this flag.
    """

    name: str
    kind: type
    source: str
    help: str
    limits: Limits = ANY
    default: object = None
    needs: str | None = None
    is_required: bool = False
    numpy: object = EVERY_VALUE


FLAGS = [
    Flag(
        "data", str, RECIPE, is_required=True,
        help="a text file, shakespeare (downloaded once), python-docs (part of Python), a folder "
        "of token shards (from prepare.py, nanoGPT or llm.c), or a file NAME.jsonl of examples. "
        "Each line of it has either a prompt and a completion, or messages; only the completions "
        "and the assistant's messages are learned.",
    ),
    Flag(
        "out", str, RUN, default="models/mine",
        help="a new folder for the model. A bare name, such as mine, is a folder in models_dir, "
        "where --resume and --model_size also look; anything with a slash is a path.",
    ),
    Flag(
        "recipe", str, RUN, is_required=True,
        help="shakespeare-cpu, shakespeare (the default on a GPU or TPU), tinystories, finetune "
        "(the default with init_from), gpt2-124M, -355M, -774M, -1558M, or gpt3-125M to -175B.",
    ),
    Flag(
        "init_from", str, RUN,
        help="start from this model (a name or a folder, as in gpt2.py) and its tokenizer.",
    ),
    Flag(
        "lora_rank", int, RUN, limits=SIZE, numpy=None,
        help="train only adapters of this rank for that model (LoRA). The peak learning rate is "
        "then 3e-4 by default. `out` gets only the adapters, in peft's layout, and every script "
        "accepts it as a model.",
    ),
    Flag(
        "lora_alpha", float, RECIPE, limits=POSITIVE, needs="lora_rank", is_required=True,
        help="the adapters' update is multiplied by lora_alpha / lora_rank; 16 by default.",
    ),
    Flag(
        "lora_targets", str, RECIPE, limits=TARGETS, needs="lora_rank", is_required=True,
        help="the matrices that get an adapter, separated by commas; any of c_attn, c_proj (both "
        "of them in a block), c_fc, attn.c_proj and mlp.c_proj; c_attn,c_proj,c_fc by default.",
    ),
    Flag(
        "resume", str, CALL,
        help="continue the run in this folder, the `out` of an earlier run, with its flags. You "
        "may give n_steps again, for a longer run (the cosine of the learning rate is stretched "
        "to it), and data or (with lora_rank) init_from, if they have moved.",
    ),
    Flag(
        "overwrite", bool, CALL, default=False,
        help="replace the model that is in `out`, and its checkpoints.",
    ),
    Flag(
        "tokenizer", str, RUN,
        help="124M (GPT-2's), a folder in models_dir, or a path. By default, the one that the "
        "shards were made with, and bytes for a text.",
    ),
    Flag(
        "models_dir", str, CALL, default="models",
        help="the folder that holds the models.",
    ),
    Flag(
        "n_layer", int, RECIPE, limits=SIZE, is_required=True,
        help="number of transformer blocks.",
    ),
    Flag(
        "n_head", int, RECIPE, limits=COUNT, is_required=True,
        help="number of attention heads per block; must divide n_embd.",
    ),
    Flag(
        "n_embd", int, RECIPE, limits=SIZE, is_required=True,
        help="width of the model.",
    ),
    Flag(
        "n_ctx", int, RECIPE, limits=SIZE, is_required=True,
        help="context length: the number of tokens in a training sequence.",
    ),
    Flag(
        "batch_size", int, RECIPE, limits=SIZE, is_required=True,
        help="sequences per batch, on all devices together.",
    ),
    Flag(
        "n_accumulate", int, RECIPE, limits=SIZE, default=1,
        help="batches per step; their gradients are averaged.",
    ),
    Flag(
        "n_steps", int, RECIPE, limits=COUNT, is_required=True,
        help="total number of steps.",
    ),
    Flag(
        "optimizer", str, RECIPE, limits=one_of(OPTIMIZERS), is_required=True, numpy="adamw",
        help="adamw, or muon for the matrices in the blocks and Adam for the rest.",
    ),
    Flag(
        "learning_rate", float, RECIPE, limits=POSITIVE, is_required=True,
        help="peak learning rate, reached after n_warmup steps.",
    ),
    Flag(
        "min_learning_rate", float, RECIPE, limits=NOT_NEGATIVE, is_required=True,
        help="final learning rate, at the end of a cosine decay.",
    ),
    Flag(
        "n_warmup", int, RECIPE, limits=COUNT, is_required=True,
        help="steps of linear warmup, at most half of n_steps.",
    ),
    Flag(
        "weight_decay", float, RECIPE, limits=NOT_NEGATIVE, is_required=True,
        help="weight decay of the matrices (with muon, only of those in the blocks).",
    ),
    Flag(
        "grad_clip", float, RECIPE, limits=POSITIVE, is_required=True,
        help="maximum gradient norm; longer gradients are scaled down to it.",
    ),
    Flag(
        "adam_b2", float, RECIPE, limits=BELOW_1, is_required=True,
        help="decay rate of Adam's second moment (beta 2).",
    ),
    Flag(
        "dropout", float, RECIPE, limits=DROPOUT, default=0.0, numpy=0.0,
        help="dropout rate, rounded to a multiple of 1/256, for the sum of the embeddings and the "
        "outputs of attention and ffn.",
    ),
    Flag(
        "ema", float, RECIPE, limits=EMA, default=0.0,
        help="keep an exponential moving average of the parameters with this decay rate, such as "
        "0.999, and validate, sample from and save that average. 0 for none.",
    ),
    Flag(
        "dtype", str, RECIPE, limits=one_of(DTYPES), is_required=True, numpy="float32",
        help="precision of matrix products: float32 (the default on CPUs) or bfloat16. Everything "
        "else is float32.",
    ),
    Flag(
        "fsdp", bool, RECIPE, default=False, numpy=False,
        help="also shard parameters and moments across the devices, for models too large for one.",
    ),
    Flag(
        "eval_every", int, RECIPE, limits=COUNT, is_required=True,
        help="number of steps between measurements of the validation loss.",
    ),
    Flag(
        "checkpoint_every", int, RECIPE, limits=COUNT, is_required=True,
        help="number of steps between checkpoints in out/checkpoints; the last two are kept.",
    ),
    Flag(
        "eval_tasks", str, RUN, numpy=None,
        help="hellaswag, lambada, or both, separated by a comma. The model's accuracy on them is "
        "also measured, as evaluate.py does. hellaswag=FILE reads a file of JSON lines instead of "
        "downloading one.",
    ),
    Flag(
        "eval_tasks_every", int, RUN, limits=COUNT, needs="eval_tasks", numpy=None,
        help="number of steps between those measurements, eval_every by default.",
    ),
    Flag(
        "seed", int, RECIPE, limits=SEED, is_required=True,
        help="the same seed gives the same run.",
    ),
    Flag(
        "saved_dtype", str, RUN, limits=one_of(SAVED_DTYPES), default="float32", is_required=True,
        help="precision of the best model's weights on disk: float32 or float16.",
    ),
    Flag(
        "snapshots", int, RUN, limits=SNAPSHOTS,
        help="keep this many float16 copies of the parameters in out/snapshots, most of them from "
        "the first steps. `python explain.py TEXT --run OUT` turns them into a page that shows "
        "how the model learned.",
    ),
    Flag(
        "tensorboard", bool, CALL, default=False,
        help="also write the losses to out/tensorboard (needs pip install tensorboard).",
    ),
    Flag(
        "coordinator", str, CALL, numpy=None,
        help="HOST:PORT of process 0, for a run in several processes. Start each with the same "
        "flags. On Slurm, Kubernetes, TPUs and Open MPI they find each other without it.",
    ),
    Flag(
        "num_processes", int, CALL, numpy=None,
        help="the number of processes.",
    ),
    Flag(
        "process_id", int, CALL, numpy=None,
        help="the number of this process, from 0.",
    ),
]  # fmt: skip

# Flags of earlier versions, each with the only value whose runs can be resumed.
RETIRED = {"drop_rate": 0.0}

# The flags that concern this call alone: options.resume, options.models_dir ...
Options = collections.namedtuple("Options", [flag.name for flag in FLAGS if flag.source == CALL])

HELP = """Train a GPT-2 on a text or on token shards, and save it as a model folder.

The last tenth of a text is kept for validation, or a random tenth of the examples. Losses, in
nats per token, are printed as they are measured, with a sample. Whenever the validation loss
reaches a new minimum, the model in `out` is replaced, so the best one is always kept. Ctrl-C and
SIGTERM end a run after the current steps, with a checkpoint. metrics.jsonl and loss.png, beside the
model, show how the run went.
{about}
A recipe sets each of the flags from n_layer to seed except eval_tasks, and may set data. A flag
that you type replaces the recipe's value. The recipes are in training/recipes.py.

Args:
"""


JAX_ABOUT = """
backprop.py trains with NumPy alone. It supports only AdamW and float32, and doesn't support
lora_rank, examples, dropout, fsdp, eval_tasks and several processes.
"""

NUMPY_ABOUT = """
Everything is computed with NumPy, in float32 and with AdamW. This needs only the packages of
`make demo` (requirements/generate.txt), and matplotlib for loss.png. train_jax.py also learns from
examples, has other optimizers and precisions, and uses GPUs and several machines.
"""

# The flags that backprop.py always rejects, and those that have no meaning without them.
JAX_ONLY = {flag.name for flag in FLAGS if flag.numpy != EVERY_VALUE}
JAX_ONLY |= {flag.name for flag in FLAGS if flag.needs in JAX_ONLY}


def make_signature():
    """Returns a parameter for each row. plumbing/cli.py turns each into a flag: --n_layer=6."""
    parameters = []
    for flag in FLAGS:
        default = None if flag.source == RECIPE else flag.default
        parameters.append(
            inspect.Parameter(
                flag.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default,
                annotation=flag.kind | None if default is None else flag.kind,
            )
        )
    return inspect.Signature(parameters)


def make_help(about, flags):
    """Returns HELP with a paragraph about the trainer and one for each flag."""
    wrapped = (
        textwrap.fill(
            f"{flag.name}: {flag.help}", 96, initial_indent=" " * 4, subsequent_indent=" " * 8
        )
        for flag in flags
    )
    return HELP.format(about=about) + "\n".join(wrapped) + "\n"


def numpy_help():  # backprop.py's
    return make_help(NUMPY_ABOUT, [flag for flag in FLAGS if flag.name not in JAX_ONLY])


# --- The flags that are typed -------------------------------------------------------------------


def read_flags(*args, **kwargs):  # -> {name: value} of the flags for the run, Options
    """Returns the run's flags that were typed, and the Options of this call."""
    bound = inspect.signature(read_flags).bind(*args, **kwargs)
    bound.apply_defaults()
    values = bound.arguments
    options = Options(*(values[name] for name in Options._fields))
    typed = {flag.name: values[flag.name] for flag in FLAGS if flag.source != CALL}
    typed = {name: value for name, value in typed.items() if value is not None}
    recipe, init_from = values["recipe"], values["init_from"]
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    if init_from is not None and values["tokenizer"] is not None:
        raise ValueError("--init_from has its own tokenizer, so leave out --tokenizer")
    if options.resume is not None:
        check_resumes(typed, options)
    elif init_from is not None:
        check_has_data(values["data"], recipe or "finetune")  # before a download for nothing
    return typed, options


read_flags.__signature__ = make_signature()
read_flags.__doc__ = make_help(JAX_ABOUT, FLAGS)


AGAIN = ("n_steps", "data", "init_from")  # the flags that are allowed beside --resume


def check_resumes(typed, options):
    """Raises ValueError for flags that are not allowed beside --resume."""
    defaults = {flag.name: flag.default for flag in FLAGS if flag.source == RUN}
    extra = [n for n in typed if n not in AGAIN and typed[n] != defaults.get(n)]
    if extra:
        raise ValueError(f"--resume uses the run's own flags, so leave out --{min(extra)}")
    if options.overwrite:
        raise ValueError("--resume continues a run, so leave out --overwrite")


def numpy_flags(typed, options):  # -> typed, and the values that backprop.py always has
    """Raises ValueError for what only train_jax.py can do."""
    check_numpy(typed | options._asdict())
    fixed = {flag.name: flag.numpy for flag in FLAGS if flag.numpy not in (EVERY_VALUE, None)}
    return fixed | typed


def check_numpy(values):  # {flag: value}
    """Raises ValueError for what only train_jax.py can do."""
    for flag in FLAGS:
        value = values.get(flag.name)
        if flag.numpy != EVERY_VALUE and value is not None and value != flag.numpy:
            asked = f"--{flag.name}" if value is True else f"--{flag.name} {value}"
            raise ValueError(f"backprop.py doesn't support {asked}; use train_jax.py")
    if is_examples(values.get("data", "")):
        raise ValueError(
            f"backprop.py doesn't learn from examples (--data {values['data']}); use train_jax.py"
        )


def check_has_data(data, recipe):  # the --data flag, or None
    """Raises ValueError if none is given and the recipe has none of its own."""
    if data is None and RECIPES[recipe]["data"] is None:
        raise ValueError(f"recipe {recipe} needs --data, a text file or a folder of token shards")


def read_tasks(text):  # the --eval_tasks flag -> {task: path or None}
    """ "hellaswag=a.jsonl,lambada" -> {"hellaswag": "a.jsonl", "lambada": None}. ValueError."""
    tasks = {}
    for word in text.split(",") if text is not None else ():
        task, named, path = word.partition("=")
        if task not in ("hellaswag", "lambada") or task in tasks or (named and not path):
            raise ValueError(f"eval_tasks must be hellaswag, lambada or both, not {text!r}")
        tasks[task] = path or None
    return tasks


# --- The flags of a run -------------------------------------------------------------------------


def choose(typed, platform, hparams=None):  # -> the flags of a new run
    """Returns the recipe's values, overridden by the typed flags and by a starting model's sizes.

    platform: where JAX computes, "cpu" or another. The defaults depend on it.
    """
    recipe = typed.get("recipe")
    if recipe is None:
        recipe = "shakespeare-cpu" if platform == "cpu" else "shakespeare"
        recipe = "finetune" if hparams else recipe
    values = RECIPES[recipe] | (LORA if "lora_rank" in typed else {})
    flags = with_defaults(values | typed | {"recipe": recipe})
    if "learning_rate" in typed and "min_learning_rate" not in typed:
        flags["min_learning_rate"] *= typed["learning_rate"] / values["learning_rate"]
    if hparams:
        for name in ("n_layer", "n_head", "n_embd"):
            if typed.get(name, hparams[name]) != hparams[name]:
                raise ValueError(f"{name} is {hparams[name]} in that model, so leave out --{name}")
            flags[name] = hparams[name]
        if "n_ctx" not in typed:
            flags["n_ctx"] = min(flags["n_ctx"], hparams["n_ctx"])
        if flags["n_ctx"] > hparams["n_ctx"]:
            raise ValueError(f"n_ctx is at most {hparams['n_ctx']} in that model")
    elif "lora_rank" in typed:
        raise ValueError("--lora_rank needs --init_from, the model to adapt")
    elif not {"n_layer", "n_head", "n_embd"} <= flags.keys():
        raise ValueError(f"recipe {recipe} needs --init_from, a model to start with")
    check_has_data(flags["data"], recipe)
    if flags["dtype"] is None:
        flags["dtype"] = "float32" if platform == "cpu" else "bfloat16"
    check_flags(flags)
    return flags


def with_defaults(flags):  # -> the flags, with defaults for those that are missing
    rows = (flag for flag in FLAGS if flag.source != CALL and flag.default is not None)
    return flags | {flag.name: flag.default for flag in rows if flag.name not in flags}


def check_flags(flags):
    """Raises ValueError, one clear line, if no model or run is possible with these flags."""
    for flag in FLAGS:
        if flag.name in flags and not flag.limits.allow(flags[flag.name]):
            raise ValueError(f"{flag.name} must be {flag.limits.words}, not {flags[flag.name]}")
        if flag.name in flags and flag.needs and flag.needs not in flags:
            raise ValueError(f"{flag.name} needs --{flag.needs}")
    if flags["n_embd"] % flags["n_head"]:
        raise ValueError("n_embd {n_embd} must be a multiple of n_head {n_head}".format(**flags))
    if flags["dropout"] and round(256 * flags["dropout"]) == 0:
        raise ValueError(
            f"dropout is rounded to 256ths, and {flags['dropout']} would be 0; "
            f"the minimum is 1/256, {1 / 256:.4f}"
        )
    if flags["min_learning_rate"] > flags["learning_rate"]:
        raise ValueError("min_learning_rate must not be more than learning_rate")
    read_tasks(flags.get("eval_tasks"))
    if "lora_rank" in flags:
        check_lora(flags)


def check_lora(flags):
    if flags["optimizer"] != "adamw":
        raise ValueError(f"optimizer must be adamw with --lora_rank, not {flags['optimizer']}")
    if "snapshots" in flags:
        raise ValueError(
            "snapshots are only of whole models, so leave out --snapshots or --lora_rank"
        )
    if flags["lora_rank"] > flags["n_embd"]:
        raise ValueError(f"lora_rank is at most n_embd, {flags['n_embd']} in that model")


def check_saved(metadata, folder):  # a checkpoint's run.json -> the run's flags
    """A flag that is newer than the run gets its default.

    Raises ValueError if run.json is damaged or was written by another program, or if the run needs
    a flag that no longer exists.
    """
    rows = {flag.name: flag for flag in FLAGS if flag.source != CALL}
    retired = []
    try:
        flags = metadata["flags"]
        retired = [name for name in RETIRED if flags.get(name, RETIRED[name]) != RETIRED[name]]
        flags = {name: value for name, value in flags.items() if name not in RETIRED}
        is_right = flags["recipe"] in RECIPES
        is_right &= all(type(flags[name]) is rows[name].kind for name in flags)
        for flag in rows.values():
            is_meant = flag.needs is None or flag.needs in flags
            is_right &= flag.name in flags or not (flag.is_required and is_meant)
        is_right &= "init_from" in flags or "lora_rank" not in flags
        flags = with_defaults(flags)
        is_right &= type(metadata["step"]) is int and 0 <= metadata["step"] <= flags["n_steps"]
        is_right &= isinstance(metadata.get("run"), int | None)
        is_right &= isinstance(metadata["best"], float | None)
        is_right &= isinstance(metadata["text"], dict)
        check_flags(flags)
    except (AttributeError, KeyError, TypeError, ValueError):
        is_right = False
    if not is_right:
        raise ValueError(f"{folder}/run.json: damaged, or written by another program")
    if retired:
        raise ValueError(
            f"{folder}: was trained with --{retired[0]}, which this version doesn't have; "
            "resume it with the version that began it, or train on from its model with --init_from"
        )
    return flags


def extend(flags, step, n_steps):  # -> the flags of a run that continues after `step` steps
    """Sets the total to n_steps, unless it is None. Raises ValueError if nothing is left to do."""
    flags = flags if n_steps is None else flags | {"n_steps": n_steps}
    check_flags(flags)
    if n_steps is not None and n_steps <= step:
        raise ValueError(f"{step} steps are done already; --n_steps must be more than that")
    return flags
