"""Rows of examples that corpus/examples.py has packed, as train_jax.losses needs them."""

import functools

import jax
import jax.numpy as jnp

from corpus.examples import BEGINS, READ, is_learned
from training.attention import fused_attention


def unpack(params, tokens):  # [n_batch, n_seq + 1] -> params, inputs, targets, attend
    """Each example as if it stood alone: its positions from 0, its attention within itself.

    Targets that are not to be learned are -1. The result's wpe is [n_batch, n_seq, n_embd], with
    a row for every token; gpt2.hidden_state takes it as it takes any other.
    """
    ids = tokens & (READ - 1)
    place = jnp.arange(tokens.shape[1] - 1)
    begins = jnp.where(tokens[:, :-1] & BEGINS > 0, place, 0)
    start = jax.lax.cummax(begins, axis=1)  # [n_batch, n_seq], the place where an example begins
    targets = jnp.where(is_learned(tokens[:, 1:]), ids[:, 1:], -1)
    params = params | {"wpe": params["wpe"][place - start]}
    return params, ids[:, :-1], targets, functools.partial(attend_within, start)


def attend_within(start, q, k, v):  # [n_batch, n_seq], [n_batch, n_head, n_seq, d_head] each
    """Causal attention within each example: tokens with the same start are of one example."""
    return fused_attention(q, k, v, mask=start[:, None, :, None] == start[:, None, None, :])


def learned_share(tokens, packed=False, **_):  # [..., n_seq + 1] -> [...], the share of the targets
    """In a plain text all targets are learned, so the share is 1."""
    return is_learned(tokens[..., 1:]).mean(-1) if packed else jnp.ones(tokens.shape[:-1])
