"""Train a GPT-2 with JAX and Optax: the functions of gpt2.py, compiled and differentiated.

    python train_jax.py                                        # tiny Shakespeare, 2-3 minutes
    python train_jax.py --data my_novel.txt --out novel        # any text, byte by byte
    python train_jax.py --init_from 124M --data my_novel.txt   # or finetune a released GPT-2
    python train_jax.py --init_from 124M --data my_novel.txt --lora_rank 8   # or only adapters
    python train_jax.py --recipe gpt2-124M --data shards/web   # shards from prepare.py, any size
    python train_jax.py --resume novel                         # continue exactly where it stopped
    python gpt2.py "It was" --model_size novel                 # then write with it, in NumPy

There is no second model here. `losses` calls `gpt2.hidden_state` on JAX arrays, `jax.jit` compiles
it, and `jax.grad` differentiates it. A training step is a pure function, state in, state out. The
state consists of the parameters, the optimizer's moments, and the number of steps done, which
decides everything random: which sequences to take from the text and which numbers to drop. A
checkpoint holds this state and the flags, so a resumed run ends with the same bits as a run that
never stopped.

Several devices, or machines, share the work only through the sharding of the arrays. Each step's
sequences are spread over the devices and, with --fsdp, so are the parameters and moments. From
that, JAX's compiler works out what to send where. No function below knows how many devices there
are.
"""

import contextlib
import dataclasses
import functools
import math
import operator
import os
import sys

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

try:
    import jax
    import jax.numpy as jnp
    import optax
except ModuleNotFoundError as missing:  # generating doesn't need them, so they may be missing
    if __name__ != "__main__":
        raise
    from plumbing.cli import end_without_packages
    from training.flags import read_flags

    end_without_packages(missing, "requirements/train.txt", read_flags)

from corpus.examples import is_examples
from evaluation.tasks import TASKS, accuracy, encode_item, load_items
from gpt2 import hidden_state
from kv_cache_jax import generate
from plumbing.cli import either, run_cli
from training.attention import fused_attention, learned_share, unpack
from training.batches import fill_batches, read_batches, step_keys
from training.checkpoints import State
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
from training.dropout import with_dropout
from training.flags import OPTIMIZERS, read_flags, read_tasks
from training.progress import Machine, Stats
from training.run import run
from training.scoring import make_scorer, score_items
from training.state import (
    combine,
    count_rows,
    init_params,
    moment_shapes,
    name_leaves,
    partition,
    resize_vocab,
    start_state,
)

LOGITS_BYTES = 2**30  # the most float32 logits that one device holds at a time


# --- The model ----------------------------------------------------------------------------------


def losses(params, tokens, n_head, packed=False, **options):
    """[n_batch, n_seq + 1] -> [n_batch], the mean of -log p(next token), in nats per token.

    Each token is predicted from the tokens before it.

    packed: the rows are packed examples (corpus/examples.py), of which only the tokens to be
        learned count.
    options: those of `row_nats`.
    """
    nats = row_nats(params, tokens, n_head, packed=packed, **options)
    n_targets = tokens.shape[1] - 1
    return nats / n_targets / learned_share(tokens, packed)


def mean_loss(params, tokens, n_head, share=None, packed=False, **options):
    """[n_batch, n_seq + 1] -> [], the mean over all tokens to be learned.

    share: the share of targets that are learned, by default in these rows. With the share in all
        batches of a step, every learned token of the step has the same weight.
    """
    nats = row_nats(params, tokens, n_head, packed=packed, **options)
    n_targets = tokens.shape[1] - 1
    if share is None:
        share = learned_share(tokens, packed).mean()
    return (nats / n_targets).mean() / share


def row_nats(params, tokens, n_head, n_vocab=None, n_chunks=1, attend=None, packed=False):
    """[n_batch, n_seq + 1] -> [n_batch], the sum of -log p(next token) over a row.

    n_vocab: how many rows of wte are tokens, if the rest are padding.
    n_chunks: compute the logits in this many parts. Only one part is in memory at a time, and each
        is computed again for the gradient. The result is the same, up to rounding.
    attend: replaces gpt2.attention. The result is the same, up to rounding.
    packed: the rows are packed examples, in which targets that are not learned count as 0.

    The logits and everything after them are float32, even if the parameters are not.
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
        return nats(x, targets)
    sums = jax.lax.map(lambda a: jax.checkpoint(nats)(*a), (chunks(x), chunks(targets)))
    return sums.sum(0)


def narrow(params, dtype):
    """Returns a copy with the blocks' weights in `dtype`.

    Embeddings and norms stay float32, and so do the residual stream and layer_norm's means and
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


# --- The optimizer ------------------------------------------------------------------------------


def make_schedule(n_steps, learning_rate, min_learning_rate, n_warmup):
    """Returns the learning rate as a function of the steps done: linear warmup, cosine decay."""
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / n_warmup,  # not 0: the first step should learn something
        peak_value=learning_rate,
        warmup_steps=min(n_warmup, n_steps // 2),
        decay_steps=n_steps,
        end_value=min_learning_rate,
    )


def make_optimizer(schedule, optimizer, weight_decay, grad_clip, adam_b2):
    """Returns the optimizer of that name, one of OPTIMIZERS. Raises ValueError for any other name.

    adamw: Adam, with weight decay for all matrices, but not for biases and gains.

    muon: Muon with weight decay for the blocks' matrices, and Adam without it for everything else.
    Muon (Jordan 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so all
    directions learn at the same pace. `consistent_rms` makes its steps as large as Adam's (Liu et
    al. 2025, arXiv:2502.16982), so one learning rate suits both.
    """
    clip = optax.clip_by_global_norm(grad_clip)
    if optimizer == "adamw":
        rule = optax.adamw(schedule, b2=adam_b2, weight_decay=weight_decay, mask=is_matrix)
        return optax.chain(clip, rule)
    if optimizer == "muon":
        rule = optax.contrib.muon(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=is_hidden_matrix,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
            adam_b2=adam_b2,
        )
        return on_stacked_blocks(optax.chain(clip, rule))
    raise ValueError(f"unknown optimizer {optimizer!r}; choose {either(OPTIMIZERS)}")


def muon_dimensions(params):
    """Marks the arrays that Muon updates, whose last two axes are a matrix. The others get None."""
    layers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda is_hidden: layers if is_hidden else None, is_hidden_matrix(params))


def on_stacked_blocks(rule):
    """Returns the optimizer `rule`, applied to all blocks stacked into one.

    The layers are the first axis of each stacked array. That makes fewer and larger operations,
    which devices can divide along this axis.
    """

    def stack(tree):
        return tree | {"blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *tree["blocks"])}

    def init(params):
        return rule.init(stack(params))

    def update(gradients, moments, params):
        updates, moments = rule.update(stack(gradients), moments, stack(params))
        n_layer = range(len(params["blocks"]))
        blocks = [jax.tree.map(operator.itemgetter(i), updates["blocks"]) for i in n_layer]
        return updates | {"blocks": blocks}, moments

    return optax.GradientTransformation(init, update)


def with_average(rule, ema):
    """Returns the optimizer `rule`, which also keeps a moving average of the parameters.

    After each update the average becomes ema * average + (1 - ema) * parameters. It starts as a
    copy of the parameters. At first ema is smaller, (1 + n) / (10 + n) after n updates, so the
    average soon forgets the initial parameters. It is one of the optimizer's moments, so it is
    saved, resumed and spread over devices like the others. Polyak & Juditsky 1992, "Acceleration of
    Stochastic Approximation by Averaging".
    """

    def init(params):
        average = jax.tree.map(jnp.copy, params)
        return {"average": average, "n_done": jnp.int32(0), "rule": rule.init(params)}

    def update(gradients, moments, params):
        updates, of_rule = rule.update(gradients, moments["rule"], params)
        n_done = moments["n_done"] + 1
        share = 1 - jnp.minimum(ema, (1 + n_done) / (10 + n_done))

        def move(average, x, change):
            return average + share * (x + change - average)

        average = jax.tree.map(move, moments["average"], params, updates)
        return updates, {"average": average, "n_done": n_done, "rule": of_rule}

    return optax.GradientTransformation(init, update)


# --- Steps --------------------------------------------------------------------------------------


def make_train_steps(
    optimizer, dropout=0.0, seed=0, dtype="float32", shardings=None, packed=False,
    grad_clip=math.inf, **options,
):  # fmt: skip
    """Returns a compiled function: (state, batches, n) -> (State after n steps, their mean Stats).

    batches: [n or more, n_accumulate, batch_size, n_ctx + 1].
    shardings: a State of shardings, or None for one device.
    packed and options: those of `losses`.
    grad_clip: the optimizer's maximum gradient norm, which only the Stats need here.

    Don't use the old state again, because the new one takes over its memory. If the parameters hold
    adapters, only the adapters have gradients and moments, and only they change.
    """

    def batch_loss(trained, frozen, batch, key, share):
        weights = combine(trained, frozen)
        if dropout:
            weights = with_dropout(key, weights, dropout)
        return mean_loss(weights, batch, share=share, packed=packed, **options)

    def value_and_gradients(params, batch, key):  # [n_accumulate, batch_size, n_ctx + 1]
        weights = partition(narrow(params, dtype))  # once per step; the sums below are float32
        share = learned_share(batch, packed).mean()

        def add_batch(i, total):
            key_i = jax.random.fold_in(key, i)
            result = jax.value_and_grad(batch_loss)(*weights, batch[i], key_i, share)
            return jax.tree.map(jnp.add, total, result)

        total = jnp.float32(0), jax.tree.map(jnp.zeros_like, partition(params)[0])
        if len(batch) == 1:
            return add_batch(0, total)
        total = jax.lax.fori_loop(0, len(batch), add_batch, total)
        return jax.tree.map(lambda x: x / len(batch), total)

    def step(batch, state):
        params, moments, n_done = state
        _, key = step_keys(seed, n_done)
        value, gradients = value_and_gradients(params, batch, key)
        trained, frozen = partition(params)
        updates, moments = optimizer.update(gradients, moments, trained)
        norm = optax.tree.norm(gradients)
        update_size = optax.tree.norm(updates) / optax.tree.norm(trained)
        stats = Stats(value, norm, jnp.where(norm > grad_clip, 1.0, 0.0), update_size)
        params = combine(optax.apply_updates(trained, updates), frozen)
        return State(params, moments, n_done + 1), stats

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_steps(state, batches, n):
        def add_step(i, carry):
            state, stats = step(batches[i], carry[0])
            return state, jax.tree.map(jnp.add, carry[1], stats)

        nothing = Stats(0.0, 0.0, 0.0, 0.0)
        state, total = jax.lax.fori_loop(0, n, add_step, (State(*state), nothing))
        return state, jax.tree.map(lambda x: x / n, total)

    return train_steps


@functools.partial(
    jax.jit, static_argnames=("dtype", "n_head", "n_vocab", "n_chunks", "attend", "packed")
)
def validation_loss(params, windows, counts, dtype="float32", packed=False, **options):
    """[n, batch_size, n_ctx + 1] -> [], the nats per token of all validation windows.

    counts: [n, batch_size], 1 for a window, 0 for a row that only fills up the last batch.
    """
    weights = narrow(params, dtype)
    n_targets = windows.shape[-1] - 1

    def mean_nats(batch):  # [batch_size, n_ctx + 1] -> [batch_size]
        return row_nats(weights, batch, packed=packed, **options) / n_targets

    nats = jax.lax.map(mean_nats, windows)
    return (nats * counts).sum() / (learned_share(windows, packed) * counts).sum()


def loss_options(flags, n_vocab, n_batch):
    """Returns the options of `losses`, and dtype, for batches of n_batch rows on each device."""
    n_chunks, n_bytes = 1, 4 * n_batch * flags["n_ctx"] * count_rows(n_vocab)
    while n_bytes > n_chunks * LOGITS_BYTES and flags["n_ctx"] % (2 * n_chunks) == 0:
        n_chunks *= 2
    return {
        "n_head": flags["n_head"],
        "n_vocab": n_vocab,
        "n_chunks": n_chunks,
        "attend": fused_attention if flags["dtype"] == "bfloat16" else None,
        "dtype": flags["dtype"],
        "packed": is_examples(flags["data"]),
    }


# --- The trainer --------------------------------------------------------------------------------


class JaxTrainer:
    """What the loop in training/run.py needs from JAX. Each method is explained there."""

    versions = {"jax": jax.__version__, "optax": optax.__version__}
    steps_per_call = (20, 5, 1)
    seconds_per_call = 1.0  # Ctrl-C is seen only between calls
    agree = staticmethod(any_process)

    @staticmethod
    @contextlib.contextmanager
    def running(options):
        """Joins the other processes, if there are any. An error in one of them ends all of them."""
        start_jax(options.coordinator, options.num_processes, options.process_id)
        with end_together():
            try:
                yield jax.default_backend()
            except jax.errors.JaxRuntimeError as error:  # usually, the memory is full
                raise MemoryError(str(error)) from None

    def __init__(self, flags):
        self.flags = flags
        self.is_main = jax.process_index() == 0
        self.mesh = make_mesh(flags["batch_size"])
        if flags["dtype"] == "float32":  # otherwise accelerators would use fewer bits
            jax.config.update("jax_default_matmul_precision", "float32")
        self.schedule = make_schedule(
            flags["n_steps"],
            flags["learning_rate"],
            flags["min_learning_rate"],
            flags["n_warmup"],
        )
        self.optimizer = make_optimizer(
            self.schedule,
            flags["optimizer"],
            flags["weight_decay"],
            flags["grad_clip"],
            flags["adam_b2"],
        )
        if flags["ema"]:
            self.optimizer = with_average(self.optimizer, flags["ema"])

    def new_model(self, n_vocab):  # -> hparams, parameters
        flags = self.flags
        hparams = {"n_vocab": n_vocab}
        hparams |= {name: flags[name] for name in ("n_ctx", "n_embd", "n_head", "n_layer")}
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # it may not fit on one GPU
            return hparams, init_params(jax.random.key(flags["seed"]), **hparams)

    def moment_shapes(self, params):
        return moment_shapes(self.optimizer, params)

    def start(self, model, moments, n_done, text):
        """Puts everything on the devices. Functions are compiled when they are first called."""
        flags, mesh = self.flags, self.mesh
        check_agreement([flags, text.description])
        self.n_vocab, self.train = model.hparams["n_vocab"], text.train
        self.tasks = {}
        if "eval_tasks" in flags:
            self.load_tasks(model.encoder, model.hparams)
        params = model.params
        if "lora_rank" in flags:  # frozen weights don't need float32
            trained, frozen = partition(params)
            params = combine(trained, narrow(frozen, flags["dtype"]))
        n_rows = count_rows(self.n_vocab)
        state, shardings = start_state(
            params, moments, n_done, self.optimizer, n_rows, mesh, flags["fsdp"]
        )
        self.options = loss_options(flags, self.n_vocab, flags["batch_size"] // mesh.size)
        self.steps = make_train_steps(
            self.optimizer, flags["dropout"], flags["seed"], shardings=shardings,
            grad_clip=flags["grad_clip"], **self.options,
        )  # fmt: skip
        windows = fill_batches(text.windows, flags["batch_size"])
        self.windows = put(windows, 2 * (make_sharding(mesh, None, "data"),))
        return state

    def machine(self):
        name = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        return Machine(name, *peak_flops(self.mesh.devices.ravel(), self.flags["dtype"]))

    def read(self, n_done, n):
        flags = self.flags
        shape = n, flags["n_accumulate"], flags["batch_size"]
        sharding = make_sharding(self.mesh, None, None, "data")
        return read_batches(self.train, flags["seed"], n_done, shape, flags["n_ctx"], sharding)

    def learning_rate(self, n_done):
        return float(self.schedule(n_done))

    def averaged(self, state):
        if not self.flags["ema"]:
            return state.params
        return combine(state.moments["average"], partition(state.params)[1])

    def validate(self, params):
        return float(validation_loss(params, *self.windows, **self.options))

    def load_tasks(self, encoder, hparams):
        """Reads the tasks of --eval_tasks, and makes the function that scores them."""
        n_ctx = hparams["n_ctx"]
        for task, path in read_tasks(self.flags.get("eval_tasks")).items():
            items = load_items(task, path, f"--eval_tasks {task}=")
            self.tasks[task] = [encode_item(*item, encoder, n_ctx) for item in items]
        check_agreement(
            {
                task: [dataclasses.astuple(item) for item in items]
                for task, items in self.tasks.items()
            }
        )
        to_dtype = functools.partial(narrow, dtype=self.flags["dtype"])
        attend = loss_options(self.flags, self.n_vocab, 1)["attend"]
        self.score_rows = make_scorer(
            self.mesh, self.flags["n_head"], n_ctx, self.n_vocab, to_dtype, attend
        )

    def measure_tasks(self, params):
        shares = {}
        for task, items in self.tasks.items():
            scored = score_items(items, functools.partial(self.score_rows, params))
            shown = {"desc": task, "leave": False, "disable": None if self.is_main else True}
            found = accuracy(items, TASKS[task][1], scored, **shown)
            shares |= {f"{task}_{name}": found[name] for name in found if name.startswith("acc")}
        return shares

    def generate(self, prompts, params, n_head, n_tokens_to_generate, **options):
        options["n_vocab"] = self.n_vocab  # without the rows that are padding
        return generate(prompts, params, n_head, n_tokens_to_generate, **options)

    def gather_params(self, params):
        return resize_vocab(to_host(partition(params)[0]), self.n_vocab)

    def gather(self, state):
        trained = partition(state.params)[0]
        params, moments = resize_vocab(to_host((trained, state.moments)), self.n_vocab)
        return State(params, name_leaves(moments), int(state.n_done))

    def close(self):
        """Does nothing, because JAX's processes end by themselves."""


@functools.wraps(read_flags, assigned=["__doc__"])  # every flag is explained there
def main(*args, **kwargs):
    run(JaxTrainer, *read_flags(*args, **kwargs))


if __name__ == "__main__":
    run_cli(main)
