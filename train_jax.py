"""Train a GPT-2 with JAX and Optax: the functions of gpt2.py, compiled and differentiated.

    python train_jax.py                                        # tiny Shakespeare, 2-3 minutes
    python train_jax.py --data my_novel.txt --out models/novel # any text, byte by byte
    python train_jax.py --init_from 124M --data my_novel.txt   # or go on with a released GPT-2
    python train_jax.py --recipe gpt2-124M --data shards/web   # what prepare.py made, of any size
    python train_jax.py --resume models/novel                  # go on exactly where it stopped
    python gpt2.py "It was" --model_size novel                 # then write with it, in NumPy

There is no second model here: `losses` calls `gpt2.hidden_state` on JAX arrays, `jax.jit` compiles
it and `jax.grad` differentiates it. A training step is a pure function, state in, state out, and
the state is three things: the parameters, the optimizer's moments, and the number of steps done,
from which everything random follows (which stretches of text, which weights to drop). A checkpoint
is this state and the flags: a run that goes on from it ends with the bits of one never stopped.

Several devices, or machines, share the work by the sharding of the arrays alone: each step's
sequences are spread over them, and with --fsdp the parameters and moments, too. JAX's compiler
derives from that what has to be sent where; no function below knows how many there are.
"""

import contextlib
import functools
import hashlib
import inspect
import math
import operator
import os
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

try:
    import jax
    import jax.numpy as jnp
    import optax
except ModuleNotFoundError as missing:  # generating does not need them, so they may not be there
    if __name__ != "__main__":
        raise
    print(f"error: {missing}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

import progress
from checkpoints import (
    check_folder,
    clear_away,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from cli import run_cli
from devices import (
    any_process,
    check_agreement,
    end_together,
    from_first,
    make_mesh,
    make_sharding,
    put,
    spread,
    start_jax,
    to_host,
)
from encoder import Encoder, get_encoder
from gpt2 import hidden_state
from kv_cache import generate
from recipes import RECIPES, check_saved, choose
from shards import check_ids, count_ids, open_shards, read_stretches
from utils import (
    check_target,
    download_shakespeare,
    find_model,
    load_encoder_hparams_and_params,
    save_model,
)

NAMED_TEXTS = ("shakespeare", "python-docs")
MOST_VALIDATION = 2**20  # tokens that one look at the validation text takes
STEPS_PER_CALL = (20, 5, 1)  # before Python sees a loss, or Ctrl-C, again: what takes about 1 s
LOGITS_BYTES = 2**30  # float32 logits that one device holds at once


# --- The text -----------------------------------------------------------------------------------


def load_text(data):  # the --data flag -> str
    """`shakespeare` (1.1 MB, downloaded once), `python-docs`, or the text file of that path."""
    if data == "python-docs":  # the language reference that every Python carries: no network needed
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    path = data
    if data == "shakespeare":
        try:
            path = download_shakespeare()
        except ConnectionError as error:
            raise ConnectionError(f"{error}; --data python-docs needs no network") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no text at {path}: --data takes a text file's path, shakespeare or python-docs"
        )
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read()


def load_tokens(data, encoder=None):  # -> {"train": [arrays], "val": [arrays]}, Encoder
    """Token shards from a folder, or a text in bytes or `encoder`'s tokens, its last tenth for val.

    `encoder` is the model's own or --tokenizer's; shards that were made with another are refused.
    """
    if data in NAMED_TEXTS or not os.path.isdir(data):
        encoder = encoder or Encoder([])
        ids = np.array(encoder.encode(load_text(data)), np.int32)
        n_train = len(ids) * 9 // 10
        return {"train": [ids[:n_train]], "val": [ids[n_train:]]}, encoder
    shards, own = open_shards(data)
    if not (encoder or own):
        raise ValueError(f"{data}: shards without a tokenizer: name theirs with --tokenizer")
    if encoder and own and encoder.vocab != own.vocab:
        raise ValueError(f"{data}: shards of another tokenizer: prepare them with the model's")
    if not os.path.exists(os.path.join(data, "meta.json")):  # the tokenizer may be another's
        for split in shards.values():
            check_ids(split, (encoder or own).n_vocab, data)
    return shards, encoder or own


def check_enough(shards, n_ctx, data):
    """ValueError if there is not one stretch to train on, or to validate with."""
    for split, arrays in shards.items():
        if count_ids(arrays) <= n_ctx:
            raise ValueError(
                f"{data}: too few tokens, {count_ids(arrays)} of {split}: n_ctx + 1 is {n_ctx + 1}"
            )


def cut_windows(shards, n_ctx):  # [arrays] -> [n_windows, n_ctx + 1]
    """The validation text in windows side by side.

    A window is one token longer than n_ctx, because its inputs and its targets are one apart; the
    next begins with its last token. What is left at the end, less than a window, is not used. Of
    more than MOST_VALIDATION tokens at most so many are, from all over the text.
    """
    n_windows = (count_ids(shards) - 1) // n_ctx
    step = -(-n_windows * n_ctx // MOST_VALIDATION)
    return read_stretches(shards, np.arange(0, n_windows, step) * n_ctx, n_ctx + 1)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def draw_starts(seed, steps, n_places, batch_size):  # [n] -> [n, batch_size]
    """Random numbers below n_places: a function of the seed and the step."""

    def draw(step):
        key, _ = step_keys(seed, step)
        return jax.random.randint(key, (batch_size, 1), 0, n_places)[:, 0]

    return jax.vmap(draw)(steps)


def step_keys(seed, n_done):  # -> the key for the batch and the key for the weights to drop
    """Those of the step after n_done: nothing but the seed and the step decides."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), n_done))


def read_batches(shards, seed, n_done, shape, n_ctx, sharding):  # -> [*shape, n_ctx + 1]
    """Stretches of the text from random places, for the steps after n_done.

    shape: [n steps, n_accumulate, batch_size]. Where the places are depends on neither devices nor
    processes, but a process reads only those stretches that its own devices will work on.
    """
    n_places = count_ids(shards) - n_ctx
    stride = -(-n_places // (2**31 - 1))  # int32 draws them: of more places, not all are used
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # a GPU is busy with the last
        steps = jnp.arange(n_done, n_done + shape[0])
        starts = draw_starts(seed, steps, n_places // stride, shape[1] * shape[2])
    starts = np.asarray(starts, np.int64).reshape(shape) * stride

    def read(index):
        mine = starts[index[:3]]
        return read_stretches(shards, mine.ravel(), n_ctx + 1).reshape(*mine.shape, n_ctx + 1)

    return jax.make_array_from_callback((*shape, n_ctx + 1), sharding, read)


# --- The model ----------------------------------------------------------------------------------


def init_params(key, n_vocab, n_ctx, n_embd, n_layer):
    """GPT-2's initialisation: normal with deviation 0.02, biases 0, gains 1, all float32.

    What writes into the residual stream is scaled by 1 / sqrt(2 * n_layer), so that the stream has
    the same variance however many layers add to it (Radford et al. 2019, section 2.3).
    """
    keys = iter(jax.random.split(key, 2 + 4 * n_layer))
    residual = 0.02 / math.sqrt(2 * n_layer)

    def normal(*shape, scale=0.02):
        return scale * jax.random.normal(next(keys), shape)

    def linear(n_in, n_out, scale=0.02):
        return {"w": normal(n_in, n_out, scale=scale), "b": jnp.zeros(n_out)}

    def layer_norm():
        return {"g": jnp.ones(n_embd), "b": jnp.zeros(n_embd)}

    def block():
        return {
            "attn": {
                "c_attn": linear(n_embd, 3 * n_embd),
                "c_proj": linear(n_embd, n_embd, residual),
            },
            "mlp": {
                "c_fc": linear(n_embd, 4 * n_embd),
                "c_proj": linear(4 * n_embd, n_embd, residual),
            },
            "ln_1": layer_norm(),
            "ln_2": layer_norm(),
        }

    return {
        "wte": normal(n_vocab, n_embd),
        "wpe": normal(n_ctx, n_embd),
        "blocks": [block() for _ in range(n_layer)],
        "ln_f": layer_norm(),
    }


def losses(params, tokens, n_head, n_vocab=None, n_chunks=1, attend=None):
    """[n_batch, n_seq + 1] -> [n_batch], nats a token: each predicted from the tokens before it.

    The mean of -log p(next token). All of the options leave the result as it is, up to rounding:
    n_vocab says how many rows of wte are tokens, if others pad it; in n_chunks > 1, no more than
    this part of the logits is held at once, and made again for the gradient; `attend` replaces
    gpt2.attention. Logits and everything after are float32, whatever the parameters are.
    """
    if attend:
        params = params | {"blocks": [block | {"attend": attend} for block in params["blocks"]]}
    x = hidden_state(tokens[:, :-1], **params, n_head=n_head)
    wte = params["wte"].astype(params["blocks"][0]["attn"]["c_attn"]["w"].dtype)

    def nats(x, targets):  # [n_batch, n, n_embd], [n_batch, n] -> [n_batch]
        logits = jnp.matmul(x.astype(wte.dtype), wte.T, preferred_element_type=jnp.float32)
        if n_vocab is not None and n_vocab < len(wte):
            logits = jnp.where(jnp.arange(len(wte)) < n_vocab, logits, -jnp.inf)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum(-1)

    def chunks(x):  # [n_batch, n_seq, ...] -> [n_chunks, n_batch, n_seq / n_chunks, ...]
        return x.reshape(len(x), n_chunks, -1, *x.shape[2:]).swapaxes(0, 1)

    targets = tokens[:, 1:]
    if n_chunks == 1:
        return nats(x, targets) / targets.shape[1]
    sums = jax.lax.map(lambda a: jax.checkpoint(nats)(*a), (chunks(x), chunks(targets)))
    return sums.sum(0) / targets.shape[1]


def fused_attention(q, k, v):  # [n_batch, n_head, n_seq, d_head] each -> the same
    """gpt2.attention for narrow numbers: its softmax is float32 even so.

    One kernel of cuDNN's where there is one for it, else XLA's own, which holds all the scores.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # JAX wants [n_batch, n_seq, n_head, d_head]
    device, d_head = jax.devices()[0], q.shape[-1]
    has_cudnn = device.platform == "gpu" and "cuda" in device.client.platform_version
    has_cudnn = has_cudnn and float(device.compute_capability) >= 8  # Ampere, Hopper and later
    fits = d_head % 8 == 0 and d_head <= 128 and q.dtype != jnp.float32
    kernel = "cudnn" if has_cudnn and fits else "xla"
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kernel)
    return out.swapaxes(1, 2)


def narrow(params, dtype):
    """A copy with the blocks' weights in `dtype`; embeddings and norms stay float32.

    So does the stream x that the blocks add to, and with it layer_norm's means and variances.
    """

    def is_weight(path):
        return path[0].key == "blocks" and path[2].key in ("attn", "mlp")

    return jax.tree.map_with_path(lambda p, x: x.astype(dtype) if is_weight(p) else x, params)


def resize_vocab(tree, n_rows):  # NumPy's wte, [n_vocab, n_embd], -> [n_rows, n_embd]
    """Pads every wte in a tree of parameters or moments with zeros, or cuts these off again."""

    def resize(path, x):
        if "['wte']" not in jax.tree_util.keystr(path) or x.ndim != 2:
            return x
        return np.pad(x[:n_rows], ((0, max(0, n_rows - len(x))), (0, 0)))

    return jax.tree.map_with_path(resize, tree)


def is_matrix(params):
    """A tree like params, True at the matrices: not at biases and gains."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("w", "wte", "wpe"), params)


def is_hidden_matrix(params):
    """True at the blocks' matrices only: not at the embeddings."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "w", params)


def drop_weights(key, params, drop_rate):
    """A copy of params with a share of the blocks' weights zeroed and the others scaled up.

    DropConnect (Wan et al. 2013) keeps a model from learning a small text by heart, as dropout
    does, but it acts on the parameters, so that the model's functions stay as they are.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
    n_dropped = round(256 * drop_rate)  # one random byte a weight decides, which is quick to make

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
    """adamw: Adam, with weight decay for all matrices, so not for biases and gains.

    muon: Muon for the blocks' matrices, which decay, Adam for all else, which does not. Muon
    (Jordan 2024) replaces a matrix's momentum by the orthogonal matrix nearest to it, so that all
    directions learn at one pace. `consistent_rms` gives its steps the size of Adam's (Liu et al.
    2025, arXiv:2502.16982), so that one learning rate serves both.

    Muon sees the blocks as one, each of its arrays with an axis for the layers in front: fewer and
    larger operations, and an axis along which devices can share the work.
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


def start_state(params, moments, n_done, optimizer, n_rows, mesh, fsdp):
    """-> (parameters, moments, n_done) on the devices, and their shardings.

    params is a tree of NumPy's or JAX's; moments {name: array} of a checkpoint, or None: all new.
    """
    params = resize_vocab(jax.tree.map(np.asarray, params), n_rows)
    shapes = jax.eval_shape(optimizer.init, params)
    shardings = spread(params, mesh, fsdp), spread(shapes, mesh, fsdp), make_sharding(mesh)
    params = put(params, shardings[0])
    if moments is None:
        moments = jax.jit(optimizer.init, out_shardings=shardings[1])(params)
    else:
        moments = jax.tree.unflatten(jax.tree.structure(shapes), moments.values())
        moments = put(resize_vocab(moments, n_rows), shardings[1])
    return (params, moments, put(np.int32(n_done), shardings[2])), shardings


def name_leaves(tree):  # -> {where it is in the tree: array}
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def moment_shapes(optimizer, params):  # -> {name: (shape, dtype)}, in the tree's order
    moments = name_leaves(jax.eval_shape(optimizer.init, params))
    return {name: (x.shape, x.dtype) for name, x in moments.items()}


# --- Training -----------------------------------------------------------------------------------


def make_train_steps(optimizer, drop_rate=0.0, seed=0, dtype="float32", shardings=None, **how):
    """The compiled function (state, batches, n) -> (state after n more steps, their mean loss).

    batches: [n or more, n_accumulate, batch_size, n_ctx + 1]. The state that goes in is used up:
    its memory becomes that of the state that comes out. shardings: a tree of them like the state,
    None where there is one device. how: the options of `losses`.
    """

    def batch_loss(weights, batch, key):
        if drop_rate:
            weights = drop_weights(key, weights, drop_rate)
        return losses(weights, batch, **how).mean()

    def value_and_gradients(params, batch, key):  # [n_accumulate, batch_size, n_ctx + 1]
        weights = narrow(params, dtype)  # once a step; what is summed below is float32 again

        def one(i, total):
            result = jax.value_and_grad(batch_loss)(weights, batch[i], jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, result)

        total = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        if len(batch) == 1:
            return one(0, total)
        total = jax.lax.fori_loop(0, len(batch), one, total)
        return jax.tree.map(lambda x: x / len(batch), total)

    def step(batch, state):
        params, moments, n_done = state
        _, key = step_keys(seed, n_done)
        value, gradients = value_and_gradients(params, batch, key)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments, n_done + 1), value

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_steps(state, batches, n):
        def add_step(i, carry):
            state, value = step(batches[i], carry[0])
            return state, carry[1] + value

        state, total = jax.lax.fori_loop(0, n, add_step, (state, 0.0))
        return state, total / n

    return train_steps


@functools.partial(jax.jit, static_argnames=("dtype", "n_head", "n_vocab", "n_chunks", "attend"))
def validation_loss(params, windows, counts, dtype="float32", **how):  # -> [], nats a token
    """The loss on all of the validation text, [n, batch_size, n_ctx + 1], a batch at a time.

    counts: [n, batch_size], 1 for a window, 0 for what fills the last batch up.
    """
    weights = narrow(params, dtype)
    return (jax.lax.map(lambda w: losses(weights, w, **how), windows) * counts).sum() / counts.sum()


def fill_batches(windows, batch_size):  # [n_windows, n_ctx + 1] -> windows, counts
    """validation_loss's: in batches, the last one filled up; and 1 or, for what fills it up, 0."""
    n_missing = -len(windows) % batch_size
    counts = np.append(np.ones(len(windows), np.float32), np.zeros(n_missing, np.float32))
    filled = np.concatenate([windows, np.repeat(windows[:1], n_missing, axis=0)])
    shape = len(filled) // batch_size, batch_size
    return filled.reshape(*shape, -1), counts.reshape(shape)


@contextlib.contextmanager
def note_signals():
    """Inside, the first Ctrl-C or SIGTERM only adds its number to the list; a second one acts."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(int(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(state, flags, train_steps, read, validate, keep, checkpoint, log, start, quiet=False):
    """Run the steps that are left and show progress. -> the signal that ended it early, or 0.

    read(n_done): batches for some steps, whose number is their first axis. validate(params): nats.
    keep(params, is_best) gets what has just been validated; checkpoint(state, best) the state at
    intervals, at the end and when a signal comes, and returns where it has it; log(values) what
    metrics.jsonl shall say, and returns what the bar shall show. start: {"place": the checkpoint
    that the run goes on from or None, "best": its best validation loss or None, "worst": a loss
    that says that all is lost}. ValueError, with the last checkpoint's place, for such a loss, or
    one that is no number.
    """
    n_done, n_steps = int(state[2]), flags["n_steps"]
    place, n_saved, best = start["place"], n_done, start["best"]
    best = math.inf if best is None else best
    every = flags["eval_every"], flags["checkpoint_every"]
    tokens_per_step = flags["n_accumulate"] * flags["batch_size"] * flags["n_ctx"]
    bar = tqdm(total=n_steps, initial=n_done, unit="step", disable=quiet or None)
    with bar, note_signals() as caught:
        batches, compiled = read(n_done), False
        while n_done < n_steps and not any_process(caught):
            began = time.perf_counter()
            n = min(len(batches), n_steps - n_done, *(k - n_done % k for k in every))
            state, loss = train_steps(state, batches, n)
            n_done += n
            batches = read(n_done)  # while the device is at work
            loss = float(loss)
            if not loss < start["worst"]:
                last = f"the last checkpoint is {place}" if place else "there is no checkpoint"
                raise ValueError(f"the loss is {loss:.4g} at step {n_done}: {last}")
            values = {"step": n_done, "loss": loss}
            if compiled:  # the first call's time is the compiler's
                values["tokens_per_second"] = n * tokens_per_step / (time.perf_counter() - began)
            compiled = True
            bar.set_postfix(log(values), refresh=False)
            bar.update(n)
            if n_done % every[0] == 0 or n_done == n_steps:
                validation = validate(state[0])
                log({"step": n_done, "validation": validation})
                if not quiet:
                    tqdm.write(f"step {n_done}: train {loss:.4f}, validation {validation:.4f}")
                keep(state[0], validation < best)
                best = min(best, validation)
            if n_done % every[1] == 0 or n_done == n_steps:
                place, n_saved = checkpoint(state, best), n_done
        stopped = any_process(caught)
        if stopped and n_done > n_saved:
            if best == math.inf:
                keep(state[0], True)
            place = checkpoint(state, best)
        if stopped and place and not quiet:
            tqdm.write(f"stopped after step {n_done}, which is saved in {place}")
    return stopped


# --- The command line ---------------------------------------------------------------------------


def main(
    data: str | None = None,
    out: str = "models/mine",
    recipe: str | None = None,
    init_from: str | None = None,
    resume: str | None = None,
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
    seed: int | None = None,
    saved_dtype: str = "float32",
    tensorboard: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
):
    """Train a GPT-2 on a text or on token shards, and save it as a model folder.

    The last tenth of a text is kept for validation. Losses, in nats a token, are printed as they
    are measured, with a sample, and whenever the validation loss is the best so far the model is
    saved to `out`, in place of what was there: whatever happens later, the best one is kept. Ctrl-C
    and SIGTERM end a run after the current steps, with a checkpoint. Beside the model are
    metrics.jsonl and loss.png, which show how it went.

    A recipe has a value for each of the flags from n_layer to seed, and maybe for data: those that
    are typed replace them. The recipes are in recipes.py.

    Args:
        data: a text file, shakespeare (downloaded once), python-docs (on every machine), or a
            folder of token shards (prepare.py's, nanoGPT's or llm.c's).
        out: the folder to write; `python gpt2.py "..." --model_size mine` then reads models/mine.
        recipe: shakespeare-cpu, shakespeare (the default on a GPU or TPU), tinystories, finetune
            (the default with init_from), gpt2-124M, -355M, -774M, -1558M, or gpt3-125M to -175B.
        init_from: start with this model, a name or a folder as in gpt2.py, and with its tokenizer.
        resume: the `out` of a run that was stopped: go on, with its flags and no others.
        tokenizer: 124M (GPT-2's), a folder in models_dir, or a path; by default that of the shards,
            and bytes for a text.
        models_dir: the folder that holds the models.
        n_layer: transformer blocks.
        n_head: attention heads in each; n_embd must be a multiple of it.
        n_embd: width of the model.
        n_ctx: the longest stretch of text it sees at once.
        batch_size: stretches at a time, on all devices together.
        n_accumulate: so many batches make one step, their gradients averaged.
        n_steps: steps in all.
        optimizer: adamw, or muon for the matrices in the blocks and Adam for the rest.
        learning_rate: the highest, reached after n_warmup steps.
        min_learning_rate: the last, to which it goes down along a cosine.
        n_warmup: steps of linear warmup, at most half of all.
        weight_decay: of the matrices (with muon: of those in the blocks).
        grad_clip: longest gradient allowed.
        adam_b2: Adam's second decay rate.
        drop_rate: share of the blocks' weights left out at random in every step, in 256ths.
        dtype: float32 (the default on CPUs) or bfloat16, of the products; the rest is float32.
        fsdp: spread parameters and moments over the devices, too, for models too large for one.
        eval_every: steps between two looks at the validation text.
        checkpoint_every: steps between two checkpoints in out/checkpoints; the last two are kept.
        seed: the same seed gives the same run.
        saved_dtype: float32 or float16, of the best model's weights on the disk.
        tensorboard: also write the losses to out/tensorboard (needs pip install tensorboard).
        coordinator: HOST:PORT of process 0, of a run in several processes. Each one is started
            with the same flags; on Slurm, Kubernetes, TPU and Open MPI they find each other.
        num_processes: how many there are.
        process_id: which one this is, from 0.
    """
    typed = {name: value for name, value in locals().items() if value is not None}
    default = {p.name: p.default for p in inspect.signature(main).parameters.values()}
    others = ("resume", "models_dir", "tensorboard")
    others += ("coordinator", "num_processes", "process_id")
    typed = {name: value for name, value in typed.items() if name not in others}
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}: there are {', '.join(RECIPES)}")
    if init_from is not None and tokenizer is not None:
        raise ValueError("--init_from brings its own tokenizer: leave out --tokenizer")
    if tensorboard:
        progress.import_writer()
    place = saved = model = None
    if resume is None:
        check_target(out)  # better now than after the first steps
        check_folder(out)
        if init_from is not None:
            model = load_encoder_hparams_and_params(init_from, models_dir)
    else:
        if more := [name for name, value in typed.items() if value != default[name]]:
            raise ValueError(f"--resume takes the run's own flags: leave out --{more[0]}")
        place, saved = find_checkpoint(resume)
        flags = check_saved(saved, place) | {"out": resume}
    start_jax(coordinator, num_processes, process_id)
    with end_together():
        if resume is None:
            flags = choose(recipe, typed, jax.default_backend(), model and model[1])
        try:
            stopped = run_training(flags, tensorboard, model, place, saved, models_dir)
        except jax.errors.JaxRuntimeError as error:  # out of memory, as a rule
            raise MemoryError(str(error)) from None
    if stopped == signal.SIGTERM:
        sys.exit(143)
    if stopped:
        raise KeyboardInterrupt
    if jax.process_index() == 0:
        print(f"the best model is in {flags['out']}")


# --- A run --------------------------------------------------------------------------------------


def run_training(flags, tensorboard=False, model=None, place=None, saved=None, models_dir="models"):
    """Train from the beginning, from (tokenizer, sizes, parameters), or from a checkpoint.

    place, saved: find_checkpoint's. -> the signal that ended the run early, or 0.
    """
    mesh, is_main = make_mesh(flags["batch_size"]), jax.process_index() == 0
    if flags["dtype"] == "float32":  # or accelerators would make its products in less
        jax.config.update("jax_default_matmul_precision", "float32")
    schedule = make_schedule(**flags)
    optimizer, is_tuned = make_optimizer(schedule, **flags), model is not None
    shards, windows, text, (encoder, hparams, params), moments = load_start(
        flags, optimizer, model, place, saved, models_dir
    )
    if is_main:
        n_params = sum(x.size for x in jax.tree.leaves(params))
        n_val = windows[:, 1:].size
        print(f"{n_params} parameters, {text['n_train']} training and {n_val} validation tokens")
    flops, n_done = progress.flops_per_token(params, flags["n_ctx"]), saved["step"] if saved else 0
    state, train_steps, validate = set_up(flags, mesh, optimizer, params, moments, n_done, windows)
    model = params = moments = None  # their memory is free again
    peak, source = progress.peak_flops(mesh.devices.ravel(), flags["dtype"])
    shape = batches_shape(flags, flops, peak)
    log = progress.make_log(flags["out"], n_done, flops, peak, source, schedule, tensorboard)
    if is_main:  # no other run is at work there, or make_log would have refused
        clear_away(flags["out"])
    keep, checkpoint = make_savers(flags, encoder, hparams, text, place)

    def read(n_done):
        spec = make_sharding(mesh, None, None, "data")
        return read_batches(shards["train"], flags["seed"], n_done, shape, flags["n_ctx"], spec)

    best = saved and saved["best"]
    if is_tuned:  # the best so far is what it was
        best = validate(state[0])
        log({"step": 0, "validation": best})
        if is_main:
            tqdm.write(f"step 0: validation {best:.4f}")
        keep(state[0], is_best=True)
    n_vocab = hparams["n_vocab"]  # an unfamiliar text may begin above its logarithm
    start = {"place": place, "best": best, "worst": 2 * max(math.log(n_vocab), best or 0)}
    return train(
        state, flags, train_steps, read, validate, keep, checkpoint, log, start, not is_main
    )


def load_start(flags, optimizer, model, place, saved, models_dir):
    """What a run starts from: -> shards, windows, what a checkpoint says of both, model, moments.

    model: (tokenizer, hparams, parameters), those given, else the checkpoint's, else new ones. The
    moments are the checkpoint's {name: array}, or None. ValueError if the flags or the text are not
    those that the checkpoint was made with, or other processes have others.
    """
    moments = encoder = None
    if place:
        *model, moments = load_checkpoint(place, functools.partial(moment_shapes, optimizer))
        same = all(flags[name] == model[1][name] for name in ("n_layer", "n_head", "n_embd"))
        if not same or flags["n_ctx"] > model[1]["n_ctx"]:
            raise ValueError(f"{place}: run.json has other sizes than the model")
    if model:
        encoder = model[0]
    elif flags.get("tokenizer"):
        folder = find_model(flags["tokenizer"], models_dir, only_tokenizer=True)
        encoder = get_encoder("", folder)
    shards, windows, text, encoder = open_text(flags["data"], encoder, flags["n_ctx"])
    if saved and saved["text"] != text:
        raise ValueError(f"{flags['data']}: is not the text that {place} was trained on")
    check_agreement([flags, text])
    return shards, windows, text, model or (encoder, *new_model(flags, encoder.n_vocab)), moments


def set_up(flags, mesh, optimizer, params, moments, n_done, windows):
    """-> the state on the devices, train_steps and validate(params), both compiled when called."""
    n_vocab, batch_size = len(params["wte"]), flags["batch_size"]
    n_rows = count_rows(n_vocab)
    state, shardings = start_state(params, moments, n_done, optimizer, n_rows, mesh, flags["fsdp"])
    how = loss_options(flags, n_vocab, batch_size // mesh.size)
    dropping = {"drop_rate": flags["drop_rate"], "seed": flags["seed"]}
    train_steps = make_train_steps(optimizer, **dropping, shardings=shardings, **how)
    windows = put(fill_batches(windows, batch_size), 2 * (make_sharding(mesh, None, "data"),))

    def validate(params):  # -> nats a token
        return float(validation_loss(params, *windows, **how))

    return state, train_steps, validate


def batches_shape(flags, flops, peak):  # -> the steps of a call, n_accumulate, batch_size
    """flops: a token's; peak: FLOP/s. Every process has the first one's, whatever it measured."""
    n_accumulate, batch_size = flags["n_accumulate"], flags["batch_size"]
    seconds = flops * n_accumulate * batch_size * flags["n_ctx"] / peak  # a step's, at best
    n_steps = next((n for n in STEPS_PER_CALL if n * seconds < 1), 1)
    return from_first(n_steps), n_accumulate, batch_size


def make_savers(flags, encoder, hparams, text, place):
    """-> keep(params, is_best) and checkpoint(state, best), as `train` wants them.

    text: what a checkpoint says of it; place: the checkpoint that the run goes on from, or None.
    Every process calls both, for its share of the parameters; the first one writes.
    """
    out, n_vocab, is_main = flags["out"], hparams["n_vocab"], jax.process_index() == 0
    places = [place] if place else []
    if flags["data"] not in NAMED_TEXTS:
        flags = flags | {"data": os.path.abspath(flags["data"])}  # to be resumed from anywhere

    def keep(params, is_best):
        params = resize_vocab(to_host(params), n_vocab)
        if is_main and is_best:
            save_model(out, encoder, hparams, params, flags["saved_dtype"])
        if is_main:
            tqdm.write(sample(params, encoder, hparams, flags["seed"]))

    def checkpoint(state, best):
        params, moments = resize_vocab(to_host(state[:2]), n_vocab)
        if not is_main:
            return out
        about = {"flags": flags, "best": best if best < math.inf else None, "text": text}
        about |= {"versions": {"jax": jax.__version__, "optax": optax.__version__}}
        step, moments = int(state[2]), name_leaves(moments)
        save_checkpoint(out, places, step, params, moments, about, encoder, hparams)
        with contextlib.suppress(ImportError, OSError):  # a picture is not worth a run
            progress.draw(out)
        return places[-1]

    return keep, checkpoint


def count_rows(n_vocab):  # -> the rows of wte while it trains
    """GPUs and TPUs prefer a multiple of 128: 50304 instead of 50257."""
    return n_vocab if jax.default_backend() == "cpu" else -(-n_vocab // 128) * 128


def loss_options(flags, n_vocab, n_batch):
    """The options of `losses`, and dtype, for batches of which a device has so many rows."""
    n_chunks, n_bytes = 1, 4 * n_batch * flags["n_ctx"] * count_rows(n_vocab)
    while n_bytes > n_chunks * LOGITS_BYTES and flags["n_ctx"] % (2 * n_chunks) == 0:
        n_chunks *= 2
    attend = fused_attention if flags["dtype"] == "bfloat16" else None
    how = {"n_head": flags["n_head"], "n_vocab": n_vocab, "n_chunks": n_chunks, "attend": attend}
    return how | {"dtype": flags["dtype"]}


def open_text(data, encoder, n_ctx):
    """-> shards, the validation windows, what a checkpoint says of both, and the tokenizer."""
    shards, encoder = load_tokens(data, encoder)
    check_enough(shards, n_ctx, data)
    windows = cut_windows(shards["val"], n_ctx)
    text = {"n_train": count_ids(shards["train"])}
    text["validation"] = hashlib.sha256(windows.tobytes()).hexdigest()
    return shards, windows, text, encoder


def new_model(flags, n_vocab):  # -> hparams, parameters
    """Of the flags' sizes, drawn from their seed, on the CPU."""
    sizes = {"n_vocab": n_vocab} | {name: flags[name] for name in ("n_ctx", "n_embd", "n_layer")}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # it may not fit on one GPU
        params = init_params(jax.random.key(flags["seed"]), **sizes)
    return sizes | {"n_head": flags["n_head"]}, params


def sample(params, encoder, hparams, seed):  # -> some lines of text, set in
    """What the model writes after a line's end, up to 100 tokens of it."""
    n, how = min(100, hparams["n_ctx"] - 1), {"temperature": 0.8, "seed": seed}
    prompts = [encoder.encode("\n")]
    ids = generate(prompts, params, hparams["n_head"], n, endoftext=encoder.endoftext, **how)[0]
    lines = [line for line in encoder.decode(ids).splitlines() if line.strip()]
    return "\n".join("    " + line for line in lines)


if __name__ == "__main__":
    run_cli(main)
