"""Train a GPT-2 with JAX and Optax: the functions of gpt2.py, compiled and differentiated.

    python train_jax.py                                        # tiny Shakespeare, 2-3 minutes
    python train_jax.py --data my_novel.txt --out models/novel # any text, byte by byte
    python train_jax.py --init_from 124M --data my_novel.txt   # or go on with a released GPT-2
    python train_jax.py --init_from 124M --data my_novel.txt --lora_rank 8   # adapters of it alone
    python train_jax.py --recipe gpt2-124M --data shards/web   # what prepare.py made, of any size
    python train_jax.py --resume models/novel                  # go on exactly where it stopped
    python gpt2.py "It was" --model_size novel                 # then write with it, in NumPy

There is no second model here: `losses` calls `gpt2.hidden_state` on JAX arrays, `jax.jit` compiles
it and `jax.grad` differentiates it. A training step is a pure function, state in, state out. The
state is three things: the parameters, the optimizer's moments, and the number of steps done, which
decides everything random (which stretches of text, which weights to drop). A checkpoint
is this state and the flags: a resumed run ends with the same bits as one that never stopped.

Several devices, or machines, share the work only through the sharding of the arrays: each step's
sequences are spread over them, and with --fsdp so are the parameters and moments. From that, JAX's
compiler works out what to send where; no function below knows how many devices there are.
"""

import functools
import math
import operator
import secrets
import signal
import sys

from tqdm import tqdm

try:
    import jax
    import jax.numpy as jnp
    import optax
except ModuleNotFoundError as missing:  # generating needs neither, so they may be missing
    if __name__ != "__main__":
        raise
    print(f"error: {missing}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

from corpus.examples import is_examples
from evaluation.tasks import TASKS, accuracy, encode_item, load_items
from gpt2 import hidden_state
from kv_cache_jax import generate
from plumbing.cli import run_cli
from training import progress
from training.adapters import base_name
from training.attention import fused_attention
from training.batches import batches_shape, fill_batches, read_batches, step_keys
from training.checkpoints import check_out, clear_away, find_checkpoint, find_out
from training.devices import (
    any_process,
    check_agreement,
    end_together,
    make_mesh,
    make_sharding,
    peak_flops,
    put,
    start_jax,
    to_host,
)
from training.flags import check_saved, choose, extend, read_flags, read_tasks
from training.loop import load_start, make_savers, train
from training.packed import learned_share, unpack
from training.scoring import make_scorer, score_items
from training.state import (
    count_rows,
    join,
    moment_shapes,
    name_leaves,
    new_model,
    resize_vocab,
    split,
    start_state,
)
from training.text import check_data, describe
from utils import check_base, find_model, load_encoder_hparams_and_params

LOGITS_BYTES = 2**30  # float32 logits that one device holds at once


# --- The model ----------------------------------------------------------------------------------


def losses(params, tokens, n_head, n_vocab=None, n_chunks=1, attend=None, packed=False):
    """[n_batch, n_seq + 1] -> [n_batch], nats per token: each predicted from the tokens before it.

    The mean of -log p(next token). Most options do not change the result, up to rounding. n_vocab:
    how many rows of wte are tokens, if the rest are padding. The logits are computed in n_chunks
    parts, of which one is held at a time, and computed again for the gradient. `attend` replaces
    gpt2.attention. Logits and everything after are float32, whatever the parameters are.

    If the rows are packed examples (corpus/examples.py), targets not to be learned count as 0.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if packed:
        params, inputs, targets, attend = unpack(params, tokens)
    if attend:
        params = params | {"blocks": [block | {"attend": attend} for block in params["blocks"]]}
    x = hidden_state(inputs, **params, n_head=n_head)
    wte = params["wte"].astype(params["blocks"][0]["attn"]["c_attn"]["w"].dtype)

    def nats(x, targets):  # [n_batch, n, n_embd], [n_batch, n] -> [n_batch]
        logits = jnp.matmul(x.astype(wte.dtype), wte.T, preferred_element_type=jnp.float32)
        if n_vocab is not None and n_vocab < len(wte):
            logits = jnp.where(jnp.arange(len(wte)) < n_vocab, logits, -jnp.inf)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.where(targets < 0, 0, nats).sum(-1)

    def chunks(x):  # [n_batch, n_seq, ...] -> [n_chunks, n_batch, n_seq / n_chunks, ...]
        return x.reshape(len(x), n_chunks, -1, *x.shape[2:]).swapaxes(0, 1)

    if n_chunks == 1:
        return nats(x, targets) / targets.shape[1]
    sums = jax.lax.map(lambda a: jax.checkpoint(nats)(*a), (chunks(x), chunks(targets)))
    return sums.sum(0) / targets.shape[1]


def narrow(params, dtype):
    """A copy with the blocks' weights in `dtype`; embeddings and norms stay float32.

    The stream x that the blocks add to stays float32, too, and so do layer_norm's means and
    variances.
    """

    def convert(path, x):
        is_weight = path[0].key == "blocks" and path[2].key in ("attn", "mlp")
        return x.astype(dtype, copy=False) if is_weight else x

    return jax.tree.map_with_path(convert, params)


def is_matrix(params):
    """A tree like params: True for matrices, False for biases and gains."""
    return jax.tree.map(lambda x: x.ndim == 2, params)


def is_hidden_matrix(params):
    """A tree like params: True only for the blocks' matrices, not for the embeddings."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "w", params)


def drop_weights(key, params, drop_rate):
    """A copy of params with a share of the blocks' weights zeroed and the others scaled up.

    DropConnect (Wan et al. 2013) keeps a model from learning a small text by heart, as dropout
    does, but it acts on the parameters, so that the model's functions stay as they are.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
    n_dropped = round(256 * drop_rate)  # a random byte per weight decides: quick to make

    def drop(key, x, is_hidden):
        if not is_hidden:
            return x
        kept = jax.random.bits(key, x.shape, jnp.uint8) >= n_dropped
        return x * kept * (256 / (256 - n_dropped))

    return jax.tree.map(drop, keys, params, is_hidden_matrix(params))


# --- The optimizer ------------------------------------------------------------------------------


def make_schedule(n_steps, learning_rate, min_learning_rate, n_warmup, **_):
    """The learning rate, a function of the steps done: linear warmup, then half a cosine down."""
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / n_warmup,  # not 0: the first step should learn something
        peak_value=learning_rate,
        warmup_steps=min(n_warmup, n_steps // 2),
        decay_steps=n_steps,
        end_value=min_learning_rate,
    )


def make_optimizer(schedule, optimizer, weight_decay, grad_clip, adam_b2, **_):
    """adamw: Adam, with weight decay for all matrices, not for biases and gains.

    muon: Muon with weight decay for the blocks' matrices, Adam without it for all else. Muon
    (Jordan 2024) replaces a matrix's momentum by the orthogonal matrix nearest to it, so that all
    directions learn at one pace. `consistent_rms` gives its steps the size of Adam's (Liu et al.
    2025, arXiv:2502.16982), so that one learning rate serves both.

    Muon gets all blocks stacked into one, with the layers as the first axis of each array: that
    makes fewer and larger operations, and devices can share the work along this axis.
    """
    if optimizer == "adamw":
        rule = optax.adamw(schedule, b2=adam_b2, weight_decay=weight_decay, mask=is_matrix)
        return optax.chain(optax.clip_by_global_norm(grad_clip), rule)
    layers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def for_muon(params):
        return jax.tree.map(lambda hidden: layers if hidden else None, is_hidden_matrix(params))

    rule = optax.contrib.muon(
        schedule,
        weight_decay=weight_decay,
        weight_decay_mask=is_hidden_matrix,
        muon_weight_dimension_numbers=for_muon,
        consistent_rms=0.2,
        adam_b2=adam_b2,
    )
    rule = optax.chain(optax.clip_by_global_norm(grad_clip), rule)

    def stack(tree):
        return tree | {"blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *tree["blocks"])}

    def update(gradients, moments, params):
        updates, moments = rule.update(stack(gradients), moments, stack(params))
        n_layer = range(len(params["blocks"]))
        blocks = [jax.tree.map(operator.itemgetter(i), updates["blocks"]) for i in n_layer]
        return updates | {"blocks": blocks}, moments

    return optax.GradientTransformation(lambda params: rule.init(stack(params)), update)


# --- Training -----------------------------------------------------------------------------------


def make_train_steps(optimizer, drop_rate=0.0, seed=0, dtype="float32", shardings=None, **how):
    """The compiled function (state, batches, n) -> (state after n more steps, their mean loss).

    batches: [n or more, n_accumulate, batch_size, n_ctx + 1]. Do not use the old state again: the
    new one takes over its memory. shardings: a tree like the state, or None for one device.
    how: the options of `losses`.

    If the parameters hold adapters, only these have gradients and moments, and only they change.
    """

    def batch_loss(trained, frozen, batch, key, share):
        weights = join(trained, frozen)
        if drop_rate:
            weights = drop_weights(key, weights, drop_rate)
        return losses(weights, batch, **how).mean() / share

    def value_and_gradients(params, batch, key):  # [n_accumulate, batch_size, n_ctx + 1]
        weights = split(narrow(params, dtype))  # once a step; the sums below are float32 again
        share = learned_share(batch, **how).mean()  # so that every learned token has equal weight

        def one(i, total):
            key_i = jax.random.fold_in(key, i)
            result = jax.value_and_grad(batch_loss)(*weights, batch[i], key_i, share)
            return jax.tree.map(jnp.add, total, result)

        total = jnp.float32(0), jax.tree.map(jnp.zeros_like, split(params)[0])
        if len(batch) == 1:
            return one(0, total)
        total = jax.lax.fori_loop(0, len(batch), one, total)
        return jax.tree.map(lambda x: x / len(batch), total)

    def step(batch, state):
        params, moments, n_done = state
        _, key = step_keys(seed, n_done)
        value, gradients = value_and_gradients(params, batch, key)
        trained, frozen = split(params)
        updates, moments = optimizer.update(gradients, moments, trained)
        params = join(optax.apply_updates(trained, updates), frozen)
        return (params, moments, n_done + 1), value

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_steps(state, batches, n):
        def add_step(i, carry):
            state, value = step(batches[i], carry[0])
            return state, carry[1] + value

        state, total = jax.lax.fori_loop(0, n, add_step, (state, 0.0))
        return state, total / n

    return train_steps


@functools.partial(
    jax.jit, static_argnames=("dtype", "n_head", "n_vocab", "n_chunks", "attend", "packed")
)
def validation_loss(params, windows, counts, dtype="float32", **how):  # -> [], nats per token
    """The loss on all of the validation text, [n, batch_size, n_ctx + 1], a batch at a time.

    counts: [n, batch_size], 1 for a window, 0 for what only fills the last batch.
    """
    weights = narrow(params, dtype)
    nats = jax.lax.map(lambda w: losses(weights, w, **how), windows)
    return (nats * counts).sum() / (learned_share(windows, **how) * counts).sum()


# --- The command line ---------------------------------------------------------------------------


@functools.wraps(read_flags, assigned=["__doc__"])  # every flag is explained there
def main(*args, **kwargs):
    typed, how = read_flags(*args, **kwargs)
    resume, models_dir, tensorboard = how["resume"], how["models_dir"], how["tensorboard"]
    if tensorboard:
        progress.import_writer()
    place = saved = model = None
    if resume is None:
        is_adapter = "lora_rank" in typed
        check_out(typed["out"], how["overwrite"], is_adapter)  # fail before any steps
        if "init_from" in typed:
            check_data(typed.get("data"))  # before a download in vain
            folder = find_model(typed["init_from"], models_dir)
            if is_adapter:
                check_base(folder)  # before its weights are read
                typed["init_from"] = base_name(typed["init_from"], models_dir)
            model = load_encoder_hparams_and_params(folder, models_dir)
    else:
        out = find_out(resume, models_dir)
        place, saved = find_checkpoint(out)
        flags = extend(check_saved(saved, place), saved["step"], typed.get("n_steps"))
        flags |= {"out": out}
    start_jax(how["coordinator"], how["num_processes"], how["process_id"])
    with end_together():
        if resume is None:
            flags = choose(typed, jax.default_backend(), model and model[1])
        try:
            stopped = run_training(flags, tensorboard, model, place, saved, models_dir)
        except jax.errors.JaxRuntimeError as error:  # out of memory, as a rule
            raise MemoryError(str(error)) from None
    if stopped == signal.SIGTERM:
        sys.exit(143)
    if stopped:
        raise KeyboardInterrupt
    if jax.process_index() == 0:
        if saved and saved["step"] == flags["n_steps"]:
            print(f"all {saved['step']} steps were done: --n_steps goes on, with a larger number")
        print(f"the best model is in {flags['out']}")


# --- A run --------------------------------------------------------------------------------------


def run_training(flags, tensorboard=False, model=None, place=None, saved=None, models_dir="models"):
    """Train from the beginning, from (tokenizer, sizes, parameters), or from a checkpoint.

    place, saved: find_checkpoint's answers. -> the signal that ended the run early, or 0.
    """
    mesh, is_main = make_mesh(flags["batch_size"]), jax.process_index() == 0
    if flags["dtype"] == "float32":  # else accelerators would use fewer bits
        jax.config.update("jax_default_matmul_precision", "float32")
    schedule = make_schedule(**flags)
    optimizer, is_tuned = make_optimizer(schedule, **flags), model is not None
    shapes = functools.partial(moment_shapes, optimizer)
    shards, windows, text, (encoder, hparams, params), moments = load_start(
        flags, shapes, new_model, model, place, saved, models_dir
    )
    check_agreement([flags, text])
    measure = make_measure(flags, mesh, encoder, hparams, not is_main)
    if is_main:
        n_params, n_frozen = (sum(x.size for x in jax.tree.leaves(p)) for p in split(params))
        beside = f" beside {n_frozen} frozen ones" if n_frozen else ""
        print(f"{n_params} parameters{beside}, {describe(text, windows)}")
    n_done = saved["step"] if saved else 0
    each = 4 if "lora_rank" in flags else 6  # operations per parameter and token
    flops = progress.flops_per_token(hparams, flags["n_ctx"], each)
    state, train_steps, validate = set_up(flags, mesh, optimizer, params, moments, n_done, windows)
    model = params = moments = None  # their memory is free again
    peak, source = peak_flops(mesh.devices.ravel(), flags["dtype"])
    shape = batches_shape(flags, flops, peak)
    run = saved.get("run") if saved else secrets.randbits(48)
    log = progress.no_log
    if is_main:
        speed = f"{jax.device_count()} x {jax.devices()[0].device_kind}", flops, peak, source
        log = progress.make_log(flags["out"], run, n_done, *speed, schedule, tensorboard, each)
        if saved and n_done < flags["n_steps"]:
            now, last = float(schedule(n_done)), flags["min_learning_rate"]
            print(f"going on after step {n_done} of {flags['n_steps']}: ", end="")
            print(f"the learning rate is {now:.2g} now and {last:.2g} at the end")
        clear_away(flags["out"])  # no other run is at work there, or make_log would have refused
    write = functools.partial(generate, n_vocab=hparams["n_vocab"])  # without the padding's rows
    about = text, run, place, write, {"jax": jax.__version__, "optax": optax.__version__}
    whole = make_whole(hparams["n_vocab"])
    keep, checkpoint = make_savers(flags, encoder, hparams, *about, *whole, quiet=not is_main)

    def read(n_done):
        spec = make_sharding(mesh, None, None, "data")
        return read_batches(shards["train"], flags["seed"], n_done, shape, flags["n_ctx"], spec)

    best = saved and saved["best"]
    if is_tuned:  # the model that it starts with is the best so far
        best = validate(state[0])
        log({"step": 0, "validation": best})
        if is_main:
            tqdm.write(f"step 0: validation {best:.4f}")
        keep(state[0], is_best=True)
        if measure:
            measure(0, state[0], log)
    n_vocab = hparams["n_vocab"]  # on an unfamiliar text the loss may start above its logarithm
    start = {"place": place, "best": best, "worst": 2 * max(math.log(n_vocab), best or 0)}
    return train(
        state, flags, train_steps, read, validate, keep, checkpoint, log, start,
        quiet=not is_main, agree=any_process, measure=measure,
    )  # fmt: skip


def set_up(flags, mesh, optimizer, params, moments, n_done, windows):
    """-> the state on the devices, train_steps and validate(params), both compiled when called."""
    n_vocab, batch_size = len(params["wte"]), flags["batch_size"]
    n_rows = count_rows(n_vocab)
    trained, frozen = split(params)
    params = join(trained, narrow(frozen, flags["dtype"]))  # frozen weights need no float32
    state, shardings = start_state(params, moments, n_done, optimizer, n_rows, mesh, flags["fsdp"])
    how = loss_options(flags, n_vocab, batch_size // mesh.size)
    dropping = {"drop_rate": flags["drop_rate"], "seed": flags["seed"]}
    train_steps = make_train_steps(optimizer, **dropping, shardings=shardings, **how)
    windows = put(fill_batches(windows, batch_size), 2 * (make_sharding(mesh, None, "data"),))

    def validate(params):  # -> nats per token
        return float(validation_loss(params, *windows, **how))

    return state, train_steps, validate


def make_measure(flags, mesh, encoder, hparams, quiet):
    """-> measure(step, params, log), as `train` takes it, for --eval_tasks; or None without them.

    It runs on all devices and leaves the parameters where they are. Every process must call it.
    """
    tasks, items = read_tasks(flags.get("eval_tasks")), {}
    n_ctx, n_vocab = hparams["n_ctx"], hparams["n_vocab"]
    if not tasks:
        return None
    for task, path in tasks.items():
        texts = load_items(task, path, f"--eval_tasks {task}=")
        items[task] = [encode_item(*item, encoder, n_ctx) for item in texts]
    check_agreement(items)
    how = loss_options(flags, n_vocab, 1)
    to_dtype = functools.partial(narrow, dtype=flags["dtype"])
    score_rows = make_scorer(mesh, flags["n_head"], n_ctx, n_vocab, to_dtype, how["attend"])

    def measure(step, params, log):
        figures = {}
        for task, some in items.items():
            scored = score_items(some, functools.partial(score_rows, params))
            shown = {"desc": task, "leave": False, "disable": quiet or None}
            found = accuracy(some, TASKS[task][1], scored, **shown)
            figures |= {f"{task}_{name}": found[name] for name in found if name.startswith("acc")}
        log({"step": step} | figures)
        if not quiet:
            shares = ", ".join(f"{name} {share:.4f}" for name, share in figures.items())
            tqdm.write(f"step {step}: {shares}")

    return measure


def make_whole(n_vocab):
    """-> what brings home the parameters, and the state: make_savers' last two functions."""

    def whole_model(params):
        return resize_vocab(to_host(split(params)[0]), n_vocab)

    def whole_state(state):
        params, moments, n_done = state
        params, moments = resize_vocab(to_host((split(params)[0], moments)), n_vocab)
        return params, name_leaves(moments), int(n_done)

    return whole_model, whole_state


def loss_options(flags, n_vocab, n_batch):
    """The options of `losses`, and dtype, for batches of n_batch rows on each device."""
    n_chunks, n_bytes = 1, 4 * n_batch * flags["n_ctx"] * count_rows(n_vocab)
    while n_bytes > n_chunks * LOGITS_BYTES and flags["n_ctx"] % (2 * n_chunks) == 0:
        n_chunks *= 2
    attend = fused_attention if flags["dtype"] == "bfloat16" else None
    how = {"n_head": flags["n_head"], "n_vocab": n_vocab, "n_chunks": n_chunks, "attend": attend}
    return how | {"dtype": flags["dtype"], "packed": is_examples(flags["data"])}


if __name__ == "__main__":
    run_cli(main)
