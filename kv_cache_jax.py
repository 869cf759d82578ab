"""Generation compiled by JAX, with a key-value cache: kv_cache.py for a GPU or a TPU.

    python kv_cache.py "Alan Turing theorized" --backend jax

The idea and the forward pass are the same: `gpt2.hidden_state`, with an `attend` that keeps the
keys and values. Only the shapes differ.

Why static shapes? XLA, JAX's compiler, makes a program for arrays of given shapes, and takes
seconds to make another. If the cache grew, the step would be compiled again for every token. So a
batch gets all of its capacity at once, rounded up to a power of two, and prompts are padded on the
right. The padding is never seen, because the tokens of a prompt only look back, and a step sees
only a row's true length and overwrites the padding. Rows that have ended keep running, for nothing,
until the whole batch has ended. In return, many steps run in one call. On a GPU, returning to
Python after each step would take longer than the step.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from generation.rows import Event, ids_of
from generation.sampling import Sampling
from gpt2 import (
    attention,
    check_length,
    check_sampling,
    end_ids_of,
    hidden_state,
    softmax,
)
from plumbing.memory import n_that_fit
from training.devices import to_host

MAX_ROWS = 64  # the most rows in a batch, unless the caller sets batch_size
STEPS_PER_CALL = 32  # Python sees the new tokens only between calls
STATIC = ("n_head", "n_vocab", "sampling")  # each new value means another compilation


def mask(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):  # [..., n_vocab] -> the same
    """Returns the logits whose softmax is gpt2.probabilities, with -inf for excluded tokens.

    float32 rounds more coarsely than float64, so a sum that is below p by less than 1e-6 counts as
    p.
    """
    temperature = min(max(temperature, 1e-30), 1e30)  # float32's range
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.sort(logits, descending=True)
        sums = jnp.cumsum(softmax(descending), -1)  # of the first token, the first two, ...
        n_below = (sums < top_p - 1e-6).sum(-1, keepdims=True)  # this many of them are below p
        last = jnp.minimum(n_below, logits.shape[-1] - 1)
        least = jnp.take_along_axis(descending, last, -1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if min_p > 0:  # the largest logit is 0
        logits = jnp.where(logits < math.log(min_p), -jnp.inf, logits)
    return logits


def sample(logits, keys, n_sampled, sampling, seen=None):  # -> [n_rows] ids
    """gpt2.sample for [n_rows, n_vocab], with a key for each row.

    seen: [n_rows, n_vocab], which tokens a row's text has, or None without repetition_penalty.

    If a row's logits are not finite, its token is -1. Compiled code cannot raise an error, so
    add_token raises it.
    """
    *settings, penalty = sampling
    is_finite = jnp.isfinite(logits.max(-1))
    if seen is not None:
        penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, penalized, logits)
    tokens = logits.argmax(-1)
    if sampling.temperature > 0:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, n_sampled)
        tokens = jax.vmap(jax.random.categorical)(keys, mask(logits, *settings))
    return jnp.where(is_finite, tokens, -1)


# A batch: {"kv": a pair of [n_rows, capacity, n_head, d_head] for each layer, "n_seq": [n_rows]
# tokens in "kv", "tokens": [n_rows] the next ones, not in it yet, "keys": [n_rows],
# "n_sampled": [], "seen": [n_rows, n_vocab] or None}


@functools.partial(jax.jit, static_argnames=("capacity", *STATIC))
def read_prompts(params, ids, n_seq, seed, rows, n_head, n_vocab, capacity, sampling):
    """Turns prompts, [n_rows, n_longest], into a batch.

    n_seq: [n_rows]. The first n_seq ids of a row are tokens, the rest is padding.
    rows: [n_rows], the rows' numbers. With the seed they decide which tokens are sampled.
    """
    kv, keys = [], jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows)

    def attend(q, k, v):  # [n_rows, n_head, n_longest, d_head] each -> the same
        room = (0, 0), (0, capacity - k.shape[2]), (0, 0), (0, 0)
        kv.append([jnp.pad(x.swapaxes(1, 2), room) for x in (k, v)])
        return attention(q, k, v)

    model = params | {"blocks": [block | {"attend": attend} for block in params["blocks"]]}
    with jax.default_matmul_precision("float32"):  # otherwise a GPU would round to 10 bits
        x = hidden_state(ids, **model, n_head=n_head)[jnp.arange(len(ids)), n_seq - 1]
        logits = (x @ params["wte"].T)[:, :n_vocab]  # the trainer pads wte
    seen = None
    if sampling.repetition_penalty != 1:
        is_token = jnp.arange(ids.shape[1]) < n_seq[:, None]  # not padding
        numbers = jnp.arange(len(ids))[:, None]
        seen = jnp.zeros((len(ids), n_vocab), bool).at[numbers, ids].max(is_token)
    tokens = sample(logits, keys, 0, sampling, seen)
    batch = {"kv": kv, "n_seq": n_seq, "tokens": tokens, "keys": keys}
    return batch | {"n_sampled": 1, "seen": seen}


def step(params, batch, n_head, n_vocab, sampling):  # -> the batch, each row one token longer
    kv, n_seq = [], batch["n_seq"]

    def attend(q, k, v, pair):  # [n_rows, n_head, 1, d_head] each -> the same
        ends = jnp.arange(len(n_seq)), n_seq
        kv.append([x.at[ends].set(new[:, :, 0]) for x, new in zip(pair, (k, v), strict=True)])
        seen = {"key_value_seq_lengths": n_seq + 1}
        return jax.nn.dot_product_attention(q.swapaxes(1, 2), *kv[-1], **seen).swapaxes(1, 2)

    attends = [functools.partial(attend, pair=pair) for pair in batch["kv"]]
    blocks = [b | {"attend": a} for b, a in zip(params["blocks"], attends, strict=True)]
    model = params | {"wpe": params["wpe"][n_seq][:, None], "blocks": blocks}
    with jax.default_matmul_precision("float32"):
        x = hidden_state(batch["tokens"][:, None], **model, n_head=n_head)[:, 0]
        logits = (x @ params["wte"].T)[:, :n_vocab]
    seen, n_sampled = batch["seen"], batch["n_sampled"]
    if seen is not None:
        seen = seen.at[jnp.arange(len(n_seq)), batch["tokens"]].set(True)
    tokens = sample(logits, batch["keys"], n_sampled, sampling, seen)
    new = {"tokens": tokens, "seen": seen, "n_sampled": n_sampled + 1}
    return batch | new | {"kv": kv, "n_seq": n_seq + 1}


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="batch")
def write_steps(params, batch, alive, n, end_ids, n_head, n_vocab, sampling):
    """Takes n steps, or fewer if all rows have ended. Returns the batch, and the new tokens.

    alive: [n_rows], false for rows that have ended.
    end_ids: [n_end_ids].
    The new tokens are [STEPS_PER_CALL, n_rows]. Only the first n of a row count, and only those up
    to one of end_ids.
    """

    def one_step(carry):
        i, batch, alive, tokens = carry
        batch = step(params, batch, n_head, n_vocab, sampling)
        new = batch["tokens"]
        return i + 1, batch, alive & ~jnp.isin(new, end_ids), tokens.at[i].set(new)

    tokens = jnp.zeros((STEPS_PER_CALL, len(alive)), batch["tokens"].dtype)
    _, batch, _, tokens = jax.lax.while_loop(
        lambda carry: (carry[0] < n) & carry[2].any(), one_step, (0, batch, alive, tokens)
    )
    return batch, tokens


def generate_stream(
    prompts, params, n_head, n_tokens_to_generate, seed=None, endoftext=None,
    stop=None, n_samples=1, batch_size=None, n_vocab=None, **sampling,
):  # fmt: skip
    """kv_cache.generate_stream, compiled, with the same arguments and the same Events.

    At temperature 0 it generates the same tokens. Otherwise, what a row samples depends only on the
    seed and the row's number, as in kv_cache.py, but the random numbers are JAX's.

    params: arrays of NumPy or JAX, on any device.
    n_vocab: how many rows of wte are tokens, if not all.
    batch_size: see default_batch_size and, for the memory, row_bytes.

    Raises ValueError for wrong arguments.
    """
    sampling = Sampling(**sampling)
    check_sampling(n_tokens_to_generate, seed=seed, **sampling._asdict())
    n_vocab, n_ctx = n_vocab or len(params["wte"]), len(params["wpe"])
    if not prompts or n_samples < 1 or batch_size is not None and batch_size < 1:
        raise ValueError("n_samples, batch_size and the number of prompts must be 1 or more")
    for i, ids in enumerate(prompts, 1):
        check_length(len(ids), n_tokens_to_generate, n_ctx)
        if not 0 <= min(ids) <= max(ids) < n_vocab:
            raise ValueError(f"prompt {i} of {len(prompts)}: an id is not in 0 .. {n_vocab - 1}")
    texts = [list(ids) for ids in prompts for _ in range(n_samples)]
    if n_tokens_to_generate == 0:
        yield from (Event(row, None, "length") for row in range(len(texts)))
        return
    params = jax.tree.map(jnp.asarray, params)
    seed = np.random.SeedSequence(seed).generate_state(1)[0]
    static = {"n_head": n_head, "n_vocab": n_vocab, "sampling": sampling}
    if batch_size is None:
        n_longest = max(map(len, texts))
        batch_size = default_batch_size(len(texts), n_longest, n_tokens_to_generate, params, n_head)
    batch_size = min(batch_size, len(texts))
    for first in range(0, len(texts), batch_size):
        rows = np.arange(first, first + batch_size)
        group = texts[first : first + batch_size]
        begun = {row: [] for row in rows[: len(group)].tolist()}
        group += [[0]] * (batch_size - len(group))  # dummy rows fill the last batch
        n_seq = [len(ids) for ids in group]
        n_longest = round_up(max(n_seq), n_ctx)
        ids = np.array([ids + [0] * (n_longest - len(ids)) for ids in group])
        capacity = round_up(max(n_seq) + n_tokens_to_generate, n_ctx)
        batch = read_prompts(params, ids, np.array(n_seq), seed, rows, capacity=capacity, **static)
        yield from write_all(
            params, batch, rows, begun, n_tokens_to_generate, endoftext, stop, static
        )


def default_batch_size(n_rows, n_longest, n_tokens, params, n_head):
    """Returns n_rows, or less: at most 64, and only as many as fit into half of the free memory.

    More rows are better, because a batch costs an accelerator little more than a single row. (A
    different number of rows needs another compilation, but so does a different length.) The device
    says how much memory is free or, if it doesn't, the host does. Rows of similar length are best
    put together, because all have the capacity of the longest, and all run until the last one has
    ended.
    """
    n_bytes = row_bytes(n_longest, n_tokens, params, n_head)
    stats = jax.local_devices()[0].memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else None
    return n_that_fit(min(n_rows, MAX_ROWS), n_bytes, free)


def row_bytes(n_longest, n_tokens, params, n_head):
    """Returns the bytes that a row needs: its cache and twice the scores of all heads of one layer.

    Because of the scores, a batch of long prompts must be smaller. For 1024 tokens and 12 heads
    they take 48 MiB.
    """
    n_ctx, n_embd = params["wpe"].shape
    n_read = round_up(n_longest, n_ctx)
    capacity = round_up(n_longest + n_tokens, n_ctx)
    return 8 * len(params["blocks"]) * n_embd * capacity + 2 * 4 * n_head * n_read**2


def write_all(params, batch, rows, begun, n_tokens, endoftext, stop, static):
    """Yields the Events of one batch. begun: {row: its ids}, for the rows that have not ended."""
    tokens = batch["tokens"][None]  # [n, n_rows]
    n = 1  # of these, the tokens that count
    n_done = 0
    while True:
        for new in to_host(tokens)[:n].tolist():
            for row, token in zip(rows.tolist(), new, strict=True):
                if row in begun:
                    event = add_token(row, begun[row], token, n_tokens, endoftext, stop)
                    yield event
                    if event.end:
                        del begun[row]
        if not begun:
            return
        n_done += n
        n = min(STEPS_PER_CALL, n_tokens - n_done)
        alive = np.isin(rows, list(begun))
        end_ids = np.array(end_ids_of(endoftext) or [-1])
        batch, tokens = write_steps(params, batch, alive, n, end_ids, **static)


def add_token(row, ids, token, n_tokens, endoftext, stop):  # -> Event
    """Adds the token to the row's ids. Raises ValueError if the token says the logits are bad."""
    if token < 0:
        raise ValueError("the logits are not finite: the model's weights must be damaged")
    if token in end_ids_of(endoftext):
        return Event(row, None, "endoftext")
    ids.append(token)
    if stop and stop(ids):
        return Event(row, token, "stop")
    return Event(row, token, "length" if len(ids) == n_tokens else None)


def round_up(n, n_ctx):  # -> a power of two from 16 on, or n_ctx
    return min(max(16, 1 << (n - 1).bit_length()), n_ctx)


def generate(prompts, params, n_head, n_tokens_to_generate, **options):
    """Returns one list of new ids per row. `options` are those of generate_stream."""
    return ids_of(generate_stream(prompts, params, n_head, n_tokens_to_generate, **options))
