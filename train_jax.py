"""Train a GPT-2 with JAX and Optax: the functions of gpt2.py, compiled and differentiated.

    python train_jax.py                                        # tiny Shakespeare, 2-3 minutes
    python train_jax.py --data my_novel.txt --out models/novel # any text, byte by byte
    python train_jax.py --data shards/corpus                   # what prepare.py made, of any size
    python train_jax.py --resume models/novel                  # go on exactly where it stopped
    python gpt2.py "It was" --model_size novel                 # then write with it, in NumPy

There is no second model here: `loss` calls `gpt2.gpt2` on JAX arrays, `jax.jit` compiles it and
`jax.grad` differentiates it. A training step is a pure function, state in, state out, and the state
is three things: the parameters, the optimizer's moments, and the number of steps done, from which
everything random follows (which stretches of text, which weights to drop). A checkpoint is this
state and the flags: a run that goes on from one ends with the bits of a run that never stopped.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from encoder import Encoder, get_encoder, write_whole
from gpt2 import generate, gpt2
from shards import check_ids, count_ids, open_shards, read_stretches
from utils import (
    check_target,
    download_shakespeare,
    find_model,
    load_encoder_hparams_and_params,
    parse_json,
    run_cli,
    save_model,
    write_safetensors,
)

MOST_VALIDATION = 2**20  # tokens that one look at the validation text takes
STEPS_PER_CALL = 20  # steps of the compiled loop before Python sees a loss, or Ctrl-C, again


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


def load_tokens(data, tokenizer):  # -> {"train": [arrays], "val": [arrays]}, Encoder
    """Token shards from a folder, or a text, whose last tenth is for validation."""
    encoder = None
    if tokenizer is not None:
        encoder = get_encoder("", find_model(tokenizer, only_tokenizer=True))
    if not os.path.isdir(data):
        encoder = encoder or Encoder([])
        ids = np.array(encoder.encode(load_text(data)), np.int32)
        n_train = len(ids) * 9 // 10
        return {"train": [ids[:n_train]], "val": [ids[n_train:]]}, encoder
    shards, own = open_shards(data)
    if not (encoder or own):
        raise ValueError(f"{data}: shards without a tokenizer: name theirs with --tokenizer")
    if encoder or not os.path.exists(os.path.join(data, "meta.json")):  # it may be another's
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
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), n_done))


def read_batches(shards, seed, n_done, n, batch_size, n_ctx):  # -> [n, batch_size, n_ctx + 1]
    """Stretches of the text from random places, for the n steps after n_done."""
    n_places = count_ids(shards) - n_ctx
    stride = -(-n_places // 2**31)  # random numbers have 31 bits: of more places, not all are used
    steps = jnp.arange(n_done, n_done + n)
    starts = np.asarray(draw_starts(seed, steps, n_places // stride, batch_size), np.int64) * stride
    return read_stretches(shards, starts.ravel(), n_ctx + 1).reshape(n, batch_size, n_ctx + 1)


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


def loss(params, tokens, n_head):  # [n_batch, n_seq + 1] -> [], nats a token
    """Cross-entropy: the mean of -log p(next token), each predicted from the tokens before it."""
    logits = gpt2(tokens[:, :-1], **params, n_head=n_head)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def is_hidden_matrix(params):
    """A tree like params, True at the blocks' matrices: not at embeddings, biases and gains."""
    return jax.tree.map_with_path(lambda path, x: path[0].key == "blocks" and x.ndim == 2, params)


def drop_weights(key, params, drop_rate):
    """A copy of params with a share of the blocks' weights zeroed and the others scaled up.

    DropConnect (Wan et al. 2013) keeps a model from learning a small text by heart, as dropout
    does, but it acts on the parameters, so that the model's functions stay as they are.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
    n_dropped = round(256 * drop_rate)  # one random byte a weight decides, which is quick to make

    def drop(key, x, is_matrix):
        if not is_matrix:
            return x
        kept = jax.random.bits(key, x.shape, jnp.uint8) >= n_dropped
        return x * kept * (256 / (256 - n_dropped))

    return jax.tree.map(drop, keys, params, is_hidden_matrix(params))


# --- Training -----------------------------------------------------------------------------------


def make_schedule(n_steps, learning_rate, n_warmup):  # -> a function of the steps done
    """Linear warmup, then half a cosine down to a hundredth of the learning rate."""
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / n_warmup,  # not 0: the first step should learn something
        peak_value=learning_rate,
        warmup_steps=min(n_warmup, n_steps // 2),
        decay_steps=n_steps,
        end_value=learning_rate / 100,
    )


def make_optimizer(schedule, weight_decay, grad_clip):
    """Muon for the blocks' matrices, Adam for the rest; weight decay for the matrices only.

    Muon (Jordan 2024) replaces a matrix's momentum by the orthogonal matrix nearest to it, so that
    all directions learn at one pace. `consistent_rms` gives its steps the size of Adam's (Liu et
    al. 2025, arXiv:2502.16982), so that one learning rate serves both.
    """
    muon = optax.contrib.MuonDimensionNumbers()

    def for_muon(params):
        return jax.tree.map(lambda is_matrix: muon if is_matrix else None, is_hidden_matrix(params))

    return optax.chain(
        optax.clip_by_global_norm(grad_clip),
        optax.contrib.muon(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=is_hidden_matrix,
            muon_weight_dimension_numbers=for_muon,
            consistent_rms=0.2,
            adam_b2=0.99,
        ),
    )


def make_train_steps(optimizer, n_head, drop_rate, seed):
    """The compiled function (state, batches, n) -> (state after n more steps, their mean loss).

    batches: [n or more, batch_size, n_ctx + 1].
    """

    def batch_loss(params, batch, n_done):
        if drop_rate:
            params = drop_weights(step_keys(seed, n_done)[1], params, drop_rate)
        return loss(params, batch, n_head)

    def step(batch, state):
        params, moments, n_done = state
        value, gradients = jax.value_and_grad(batch_loss)(params, batch, n_done)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments, n_done + 1), value

    @jax.jit
    def train_steps(state, batches, n):
        def add_step(i, carry):
            state, value = step(batches[i], carry[0])
            return state, carry[1] + value

        state, total = jax.lax.fori_loop(0, n, add_step, (state, 0.0))
        return state, total / n

    return train_steps


@functools.partial(jax.jit, static_argnums=2)
def evaluate(params, windows, n_head):  # [n_windows, n_ctx + 1] -> [], nats a token
    """The loss on all of the validation text, 16 windows at a time."""
    return jax.lax.map(lambda w: loss(params, w[None], n_head), windows, batch_size=16).mean()


def train(state, train_steps, read, windows, n_head, n_steps, every, best, keep, checkpoint):
    """Run the steps that are left, with the batches of read(n_done, n), and show progress.

    every: {"eval": n, "checkpoint": n} steps. `keep(params)` gets all parameters that are the best
    on the validation text so far. `checkpoint(state, best)` gets the state at intervals, at the
    end and when the run is interrupted, and returns where it has it. ValueError, with the last of
    these places, where the loss is no number any more.
    """
    n_done, place = int(state[2]), None
    with tqdm(total=n_steps, initial=n_done, unit="step", disable=None) as bar:
        try:
            while n_done < n_steps:
                n = min(STEPS_PER_CALL, n_steps - n_done, *(k - n_done % k for k in every.values()))
                after, train_loss = train_steps(state, read(n_done, STEPS_PER_CALL), n)
                if not math.isfinite(train_loss):
                    last = f"the last checkpoint is {place}" if place else "there is no checkpoint"
                    raise ValueError(f"the loss is {train_loss} at step {n_done + n}: {last}")
                state, n_done = after, n_done + n
                bar.set_postfix(loss=f"{train_loss:.3f}", refresh=False)
                bar.update(n)
                if n_done % every["eval"] == 0 or n_done == n_steps:
                    validation = float(evaluate(state[0], windows, n_head))
                    tqdm.write(
                        f"step {n_done}: train {train_loss:.4f}, validation {validation:.4f}"
                    )
                    if validation < best:
                        keep(state[0])
                        best = validation
                if n_done % every["checkpoint"] == 0 or n_done == n_steps:
                    place = checkpoint(state, best)
        except (KeyboardInterrupt, SystemExit):
            if int(state[2]):
                if best == math.inf:
                    keep(state[0])
                place = checkpoint(state, best)
                tqdm.write(f"stopped after step {int(state[2])}, which is saved in {place}")
            raise


# --- Checkpoints --------------------------------------------------------------------------------
# out/checkpoints/00000400 is a model folder with two files more: optimizer.safetensors, and the
# flags in run.json. It is written under another name and renamed as a whole.


def save_checkpoint(out, saved, state, run, encoder, hparams):  # -> where
    """Write the state as a checkpoint; of this run's others, which `saved` lists, keep the last."""
    params, moments, n_done = state
    folder = os.path.join(out, "checkpoints")
    place = os.path.join(folder, f"{int(n_done):08d}")
    if place in saved:
        return place
    os.makedirs(folder, exist_ok=True)
    others = {os.path.join(folder, name) for name in os.listdir(folder)}
    for other in others - set(saved):  # an earlier run's, or half written
        shutil.rmtree(other)
    stage = tempfile.mkdtemp(prefix=".saving-", dir=folder)
    try:
        save_model(stage, encoder, hparams, params)
        write_safetensors(os.path.join(stage, "optimizer.safetensors"), name_leaves(moments))
        write_whole(Path(stage, "run.json"), json.dumps({"step": int(n_done)} | run, indent=1))
        os.rename(stage, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    for old in saved[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    saved[:-1] = []
    saved.append(place)
    return place


def name_leaves(tree):  # -> {where it is in the tree: array}
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


def find_checkpoint(out):  # -> its path, what run.json says
    """The last checkpoint of a run. ValueError or OSError, one clear line, if there is none."""
    folder = os.path.join(out, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    place = os.path.join(folder, max(filter(str.isdigit, names), default="00000000"))
    path = os.path.join(place, "run.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{out}: nothing to resume: there is no {path}")
    return place, parse_json(Path(path).read_bytes(), path)


def load_checkpoint(place, optimizer, n_done):  # -> state
    """The state that save_checkpoint wrote. ValueError if it is not this optimizer's."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    _, _, params = load_encoder_hparams_and_params(place, ".")
    params = jax.tree.map(jnp.array, params)
    empty = optimizer.init(params)
    path = os.path.join(place, "optimizer.safetensors")
    try:
        leaves = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: cut short or corrupt ({error})") from None
    wanted = {name: (x.shape, x.dtype) for name, x in name_leaves(empty).items()}
    if {name: (x.shape, x.dtype) for name, x in leaves.items()} != wanted:
        raise ValueError(f"{path}: is of another optimizer, or of another version of optax")
    moments = jax.tree.unflatten(jax.tree.structure(empty), [jnp.array(leaves[n]) for n in wanted])
    return params, moments, jnp.int32(n_done)


def check_flags(flags):
    """Raises ValueError, one clear line, for a model or a run that cannot be."""
    for name, value in flags.items():
        if name == "seed":
            right, wanted = 0 <= value < 2**32, "from 0 to 4294967295"
        elif name == "drop_rate":
            right, wanted = 0 <= value <= 0.9, "from 0 to 0.9"
        elif name == "weight_decay":
            right, wanted = 0 <= value < math.inf, "0 or more"
        elif name == "dtype":
            right, wanted = value in ("float32", "float16"), "float32 or float16"
        elif isinstance(value, float):
            right, wanted = 0 < value < math.inf, "more than 0"
        else:
            right, wanted = not isinstance(value, int) or value >= 1, "1 or more"
        if not right:
            raise ValueError(f"{name} must be {wanted}, not {value}")
    if flags["n_embd"] % flags["n_head"]:
        raise ValueError("n_embd {n_embd} must be a multiple of n_head {n_head}".format(**flags))


def main(
    data: str = "shakespeare",
    out: str = "models/mine",
    n_layer: int = 4,
    n_head: int = 4,
    n_embd: int = 128,
    n_ctx: int = 64,
    batch_size: int = 12,
    n_steps: int = 2000,
    learning_rate: float = 5e-3,
    n_warmup: int = 100,
    weight_decay: float = 0.1,
    grad_clip: float = 1.0,
    drop_rate: float = 0.0,
    eval_every: int = 200,
    checkpoint_every: int = 200,
    seed: int = 1337,
    tokenizer: str | None = None,
    dtype: str = "float32",
    resume: str | None = None,
):
    """Train a GPT-2 on a text or on token shards, and save it as a model folder.

    The last tenth of a text is kept for validation. Losses, in nats a token, are printed as they
    are measured, and whenever the validation loss is the best so far the model is saved to `out`,
    in place of what was there: whatever happens later, the best one is kept. Ctrl-C and SIGTERM
    leave a checkpoint; so does every 200th step.

    Args:
        data: a text file, shakespeare (downloaded once), python-docs (on every machine), or a
            folder of token shards: prepare.py's, nanoGPT's or llm.c's.
        out: the folder to write; `python gpt2.py "..." --model_size mine` then reads models/mine.
        n_layer: transformer blocks.
        n_head: attention heads in each; n_embd must be a multiple of it.
        n_embd: width of the model.
        n_ctx: the longest stretch of text it sees at once.
        batch_size: stretches a step.
        n_steps: steps in all.
        learning_rate: the highest, reached after n_warmup steps.
        n_warmup: steps of linear warmup, at most half of all; a cosine follows.
        weight_decay: of the matrices in the blocks.
        grad_clip: longest gradient allowed.
        drop_rate: share of the blocks' weights left out at random in every step, in 256ths.
        eval_every: steps between two looks at the validation text.
        checkpoint_every: steps between two checkpoints in out/checkpoints; the last two are kept.
        seed: the same seed gives the same run.
        tokenizer: 124M (GPT-2's), a folder in models, or a path; by default that of the shards, and
            bytes for a text.
        dtype: float32 or float16, of the best model's weights on the disk.
        resume: the `out` of a run that was stopped: go on, with its flags and no others.
    """
    flags = {name: value for name, value in locals().items() if name != "resume"}
    if resume is None:
        check_flags(flags)
        check_target(out)  # better now than after the first steps
        run(flags)
    else:
        default = {p.name: p.default for p in inspect.signature(main).parameters.values()}
        if typed := [name for name, value in flags.items() if value != default[name]]:
            raise ValueError(f"--resume takes the run's own flags: leave out --{typed[0]}")
        place, saved = find_checkpoint(resume)
        run(saved["flags"] | {"out": resume}, place, saved)


def run(flags, place=None, saved=None):
    """Train from the beginning, or go on from the checkpoint at `place`, and show a sample."""
    shards, encoder = load_tokens(flags["data"], flags["tokenizer"])
    n_ctx, n_head, seed, out = (flags[name] for name in ("n_ctx", "n_head", "seed", "out"))
    check_enough(shards, n_ctx, flags["data"])
    windows = cut_windows(shards["val"], n_ctx)
    n_train, n_val = count_ids(shards["train"]), windows[:, 1:].size
    text = {"n_train": n_train, "validation": hashlib.sha256(windows.tobytes()).hexdigest()}
    if saved and saved["text"] != text:
        raise ValueError(f"{flags['data']}: is not the text that {place} was trained on")

    schedule = make_schedule(flags["n_steps"], flags["learning_rate"], flags["n_warmup"])
    optimizer = make_optimizer(schedule, flags["weight_decay"], flags["grad_clip"])
    sizes = {"n_vocab": encoder.n_vocab, "n_ctx": n_ctx}
    sizes |= {name: flags[name] for name in ("n_embd", "n_layer")}
    if place:
        state = load_checkpoint(place, optimizer, saved["step"])
    else:
        params = init_params(jax.random.key(seed), **sizes)
        state = params, optimizer.init(params), jnp.int32(0)
    n_params = sum(x.size for x in jax.tree.leaves(state[0]))
    print(f"{n_params} parameters, {n_train} training and {n_val} validation tokens")
    hparams, places = {**sizes, "n_head": n_head}, [place] if place else []
    if os.path.exists(flags["data"]):
        flags |= {"data": os.path.abspath(flags["data"])}  # a run may be resumed from elsewhere

    def read(n_done, n):
        return read_batches(shards["train"], seed, n_done, n, flags["batch_size"], n_ctx)

    def keep(params):
        save_model(out, encoder, hparams, params, flags["dtype"])

    def checkpoint(state, best):
        about = {"flags": flags, "best": best if best < math.inf else None, "text": text}
        about |= {"versions": {"jax": jax.__version__, "optax": optax.__version__}}
        return save_checkpoint(out, places, state, about, encoder, hparams)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C, but for the exit code
    every = {"eval": flags["eval_every"], "checkpoint": flags["checkpoint_every"]}
    train_steps = make_train_steps(optimizer, n_head, flags["drop_rate"], seed)
    best = saved["best"] if saved and saved["best"] is not None else math.inf
    try:
        train(
            state, train_steps, read, windows, n_head, flags["n_steps"], every, best, keep,
            checkpoint,
        )  # fmt: skip
    except jax.errors.JaxRuntimeError as error:  # out of memory, as a rule
        raise MemoryError(str(error)) from None
    print(f"the best model is in {out}; a sample of it:\n")
    encoder, hparams, params = load_encoder_hparams_and_params(out, ".")
    sampling = {"temperature": 0.8, "seed": seed, "endoftext": encoder.endoftext}
    print(encoder.decode(generate(encoder.encode("\n"), params, n_head, n_ctx - 1, **sampling)))


if __name__ == "__main__":
    run_cli(main)
