"""A training run in NumPy alone, from the flags to the best model, for backprop.py."""

import contextlib
import functools
import math
import secrets
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

from corpus.examples import is_examples
from corpus.shards import count_ids, read_stretches
from engine import sharing
from engine.threads import in_threads, own_threads
from gpt2 import gpt2
from model_files.weights import leaves, nest, tensor_shapes
from training import progress
from training.checkpoints import check_out, clear_away, find_checkpoint, find_out
from training.flags import check_saved, choose, extend
from training.loop import load_start, make_savers, train
from training.text import check_data
from utils import load_encoder_hparams_and_params

ONLY = {"optimizer": "adamw", "dtype": "float32", "drop_rate": 0.0, "fsdp": False}
ALONE = ("coordinator", "num_processes", "process_id")
STEPS_PER_CALL = (10, 5, 1)  # Ctrl-C is seen only between calls: so about 1 s each at most


def run(typed, how, trainer):
    """Do what the flags ask (read_flags' two answers) with the trainer's own five functions.

    train_step(params, moments, n_done, batches, flags, evaluate): -> the loss; changes params and
    moments, {name: array}, in place, with gradients from evaluate(tokens, n_tokens=n).
    loss_and_gradients(params, tokens, n_head, n_tokens). cross_entropy(logits, targets): -> nats,
    and something that is not used here. scheduled_rate(n_done, flags); generate: kv_cache.py's.
    """
    check_asked(typed, how)
    place = saved = model = None
    if how["resume"] is None:
        check_out(typed["out"], how["overwrite"])  # fail now rather than after the first steps
        if "init_from" in typed:
            check_data(typed.get("data"))  # before a download in vain
            model = load_encoder_hparams_and_params(typed["init_from"], how["models_dir"])
        flags = choose(ONLY | typed, "cpu", model and model[1])
    else:
        out = find_out(how["resume"], how["models_dir"])
        place, saved = find_checkpoint(out)
        flags = extend(check_saved(saved, place), saved["step"], typed.get("n_steps"))
        flags |= {"out": out}
    with contextlib.ExitStack() as stack:
        stopped = run_training(flags, how, model, place, saved, trainer, stack)
    if stopped == signal.SIGTERM:
        sys.exit(143)
    if stopped:
        raise KeyboardInterrupt
    if saved and saved["step"] == flags["n_steps"]:
        print(f"all {saved['step']} steps were done: --n_steps goes on, with a larger number")
    print(f"the best model is in {flags['out']}")


def check_asked(typed, how):
    """ValueError for what only train_jax.py can do."""
    asked = {name: typed[name] for name in ONLY if typed.get(name, ONLY[name]) != ONLY[name]}
    asked |= {name: how[name] for name in ALONE if how[name] is not None}
    asked |= {
        name: typed[name]
        for name in ("eval_tasks", "eval_tasks_every", "lora_rank")
        if name in typed
    }
    if is_examples(typed.get("data", "")):
        asked["data"] = typed["data"]
    for name, value in asked.items():
        only = f": here it is {ONLY[name]}" if name in ONLY else ""
        raise ValueError(f"--{name} {value} is train_jax.py's{only}")


def start_sharing(loss_and_gradients, params, moments, flags):  # moments: None for zeros
    """engine/sharing.py's, for a model's tree and a checkpoint's moments."""

    def evaluate(arrays, tokens, n_tokens):  # {name: array} -> loss, {name: array}
        params = nest(arrays)
        loss, gradients = loss_and_gradients(params, tokens, flags["n_head"], n_tokens)
        return loss, leaves(gradients)

    if moments is None:
        shapes = moment_shapes(params)
        moments = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    return sharing.share(evaluate, leaves(params), moments, flags["batch_size"])


def run_training(flags, how, model, place, saved, trainer, stack):
    """Train from the beginning, from (tokenizer, sizes, parameters), or from a checkpoint.

    place, saved: find_checkpoint's answers. stack: ends the other processes when it is closed.
    -> the signal that ended the run early, or 0.
    """
    train_step, loss_and_gradients, cross_entropy, scheduled_rate, generate = trainer
    out, n_ctx, n_head = flags["out"], flags["n_ctx"], flags["n_head"]
    shards, windows, text, (encoder, hparams, params), moments = load_start(
        flags, moment_shapes, new_model, model, place, saved, how["models_dir"]
    )
    shared = stack.enter_context(start_sharing(loss_and_gradients, params, moments, flags))
    arrays, moments = shared.by_name
    params = nest(arrays)
    n_params, n_val = sum(x.size for x in leaves(params).values()), windows[:, 1:].size
    print(f"{n_params} parameters, {text['n_train']} training and {n_val} validation tokens")
    n_done, peak = saved["step"] if saved else 0, measure_peak()
    flops = progress.flops_per_token(hparams, n_ctx)
    schedule = functools.partial(scheduled_rate, flags=flags)
    run = saved.get("run") if saved else secrets.randbits(48)
    speed = ("NumPy", flops, peak, "measured")
    log = progress.make_log(out, run, n_done, *speed, schedule, how["tensorboard"])
    clear_away(out)  # no other run is at work there, or make_log would have refused
    about = text, run, place, generate, {"numpy": np.__version__}
    keep, checkpoint = make_savers(flags, encoder, hparams, *about)
    shape = flags["n_accumulate"], flags["batch_size"], n_ctx + 1
    seconds = math.prod(shape) * flops / peak  # per step, at best
    n_steps = next((n for n in STEPS_PER_CALL if n * seconds < 0.5), 1)

    def read(n_done):  # -> [n_steps, n_accumulate, batch_size, n_ctx + 1]
        steps = range(n_done, n_done + n_steps)
        return [draw(shards["train"], flags["seed"], step, shape) for step in steps]

    def train_steps(state, batches, n):
        params, moments, n_done = state
        losses = [
            train_step(
                shared.params, shared.moments, n_done + i, batches[i], flags, shared.evaluate
            )
            for i in range(n)
        ]
        return (params, moments, n_done + n), math.fsum(losses) / n

    def validate(params):  # -> nats per token
        n = flags["batch_size"]
        batches = (windows[i : i + n] for i in range(0, len(windows), n))
        return sum(nats(params, batch, n_head, cross_entropy) for batch in batches) / n_val

    best = saved and saved["best"]
    if model is not None:  # the model that it starts with is the best so far
        best = validate(params)
        log({"step": 0, "validation": best})
        tqdm.write(f"step 0: validation {best:.4f}")
        keep(params, is_best=True)
    start = {
        "place": place,
        "best": best,
        "worst": 2 * max(math.log(len(params["wte"])), best or 0),
    }
    state = params, moments, n_done
    return train(state, flags, train_steps, read, validate, keep, checkpoint, log, start)


def nats(params, tokens, n_head, cross_entropy):  # [n, n_seq + 1] -> the sum over all tokens
    def work(mine):
        logits = gpt2(tokens[mine, :-1], **params, n_head=n_head)
        logits = logits.reshape(-1, logits.shape[-1])
        return cross_entropy(logits, tokens[mine, 1:].ravel())[0].sum(dtype=np.float64)

    with own_threads(len(tokens)):
        return float(sum(in_threads(work, len(tokens))))


def new_model(flags, n_vocab):  # -> hparams, parameters
    """GPT-2's initialisation, as in training/state.py, drawn by NumPy."""
    rng, params = np.random.default_rng(flags["seed"]), {}
    hparams = {"n_vocab": n_vocab} | {n: flags[n] for n in ("n_ctx", "n_embd", "n_head", "n_layer")}
    for name, shape in tensor_shapes(hparams):
        params[name] = np.full(shape, name.endswith(".g"), np.float32)
        if len(shape) == 2:
            scale = (2 * flags["n_layer"]) ** -0.5 if name.endswith("c_proj.w") else 1
            params[name] = rng.standard_normal(shape, np.float32) * np.float32(0.02 * scale)
    return hparams, nest(params)


def moment_shapes(params):  # -> {"m.wte": (shape, dtype), ..., "v.wte": ...}, AdamW's moments
    arrays = leaves(params).items()
    return {f"{kind}.{name}": (x.shape, np.dtype("<f4")) for kind in "mv" for name, x in arrays}


def draw(shards, seed, step, shape):  # -> [*shape], ids
    """Stretches from random places. The places depend on the seed and the step alone."""
    *many, n = shape
    places = count_ids(shards) - n + 1
    starts = np.random.default_rng([seed, step]).integers(0, places, math.prod(many))
    return read_stretches(shards, starts, n).reshape(shape)


def measure_peak():  # -> the FLOP/s of one large product
    n, seconds = 2048, []
    x = np.ones((n, n), np.float32)
    for _ in range(5):
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)
