"""Which sequences of the text a step sees, as a function of the seed and the step alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from corpus.shards import count_ids, read_sequences


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def draw_starts(seed, steps, n_places, batch_size):  # [n] -> [n, batch_size]
    """Random numbers below n_places: a function of the seed and the step."""

    def draw_step(step):
        key, _ = step_keys(seed, step)
        return jax.random.randint(key, (batch_size, 1), 0, n_places)[:, 0]

    return jax.vmap(draw_step)(steps)


def step_keys(seed, n_done):  # -> the key for the batch and the key for the weights to drop
    """The keys of the step after n_done. They depend on the seed and the step alone."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), n_done))


def read_batches(shards, seed, n_done, shape, n_ctx, sharding):  # -> [*shape, n_ctx + 1]
    """Stretches of the text from random places, for the steps after n_done.

    shape: [n steps, n_accumulate, batch_size]. The places do not depend on devices or processes,
    but a process reads only the sequences that its own devices will work on. Packed examples are
    one shard with two axes: then whole rows are read, each row once before any comes again.
    """
    if shards and shards[0].ndim == 2:
        rows = shards[0][draw_rows(seed, n_done, shape, len(shards[0]))]
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
    n_places = count_ids(shards) - n_ctx
    stride = -(-n_places // (2**31 - 1))  # places are drawn as int32; a longer text skips some
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # a GPU is busy computing
        steps = jnp.arange(n_done, n_done + shape[0])
        starts = draw_starts(seed, steps, n_places // stride, shape[1] * shape[2])
    starts = np.asarray(starts, np.int64).reshape(shape) * stride

    def read(index):
        local = starts[index[:3]]
        return read_sequences(shards, local.ravel(), n_ctx + 1).reshape(*local.shape, n_ctx + 1)

    return jax.make_array_from_callback((*shape, n_ctx + 1), sharding, read)


def draw_rows(seed, n_done, shape, n_rows):  # -> [*shape] numbers below n_rows
    """The rows for the steps after n_done. All rows are shuffled again after each pass."""
    first, n = n_done * math.prod(shape[1:]), math.prod(shape)
    packs = range(first // n_rows, -(-(first + n) // n_rows))
    shuffled = [np.random.default_rng([seed, pack]).permutation(n_rows) for pack in packs]
    return np.concatenate(shuffled)[first % n_rows :][:n].reshape(shape)


def fill_batches(windows, batch_size):  # [n_windows, n_ctx + 1] -> windows, counts
    """Full batches for validation_loss. counts are 1, and 0 for the padding of the last batch."""
    n_missing = -len(windows) % batch_size
    counts = np.append(np.ones(len(windows), np.float32), np.zeros(n_missing, np.float32))
    filled = np.concatenate([windows, np.repeat(windows[:1], n_missing, axis=0)])
    shape = len(filled) // batch_size, batch_size
    return filled.reshape(*shape, -1), counts.reshape(shape)
