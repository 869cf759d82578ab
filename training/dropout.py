"""Dropout without changing the model: an object that replaces an array that is added.

In training, GPT-2 drops a tenth of the numbers in three places: the sum of the two embeddings, and
the outputs of attention and ffn. Each of these is the last sum of its function, x + wpe or
x @ w + b. So an object in the place of wpe, or of a c_proj's b, can add and then drop, and gpt2.py
stays as it is.

Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, eq=False)
class AddAndDrop:
    """Replaces an array that is added to x: x + this is x + array, with some numbers set to 0."""

    array: object
    key: object
    rate: float

    @property
    def shape(self):
        return self.array.shape

    def __getitem__(self, index):  # hidden_state takes wpe[..., :n_seq, :]
        return dataclasses.replace(self, array=self.array[index])

    def __radd__(self, x):
        return drop(self.key, x + self.array, self.rate)


def drop(key, x, rate):  # [..., n] -> [..., n]
    """Sets a share of the numbers to 0 and scales the others up, so that the mean stays the same.

    A random byte decides for each number, so the rate is rounded to a multiple of 1/256.
    """
    n = x.shape[-1]
    n_dropped = round(256 * rate)
    words = jax.random.bits(key, (*x.shape[:-1], -(-n // 4)), jnp.uint32)  # four bytes each
    chance = jax.lax.bitcast_convert_type(words, jnp.uint8)  # [..., n / 4, 4]
    is_kept = chance.reshape(*x.shape[:-1], -1)[..., :n] >= n_dropped
    return x * is_kept * (256 / (256 - n_dropped))


def with_dropout(key, params, rate):  # -> params, with AddAndDrop in the places above
    keys = iter(jax.random.split(key, 1 + 2 * len(params["blocks"])))

    def dropping(layer):  # a c_proj
        return layer | {"b": AddAndDrop(layer["b"], next(keys), rate)}

    def dropping_block(block):
        attn = block["attn"] | {"c_proj": dropping(block["attn"]["c_proj"])}
        mlp = block["mlp"] | {"c_proj": dropping(block["mlp"]["c_proj"])}
        return block | {"attn": attn, "mlp": mlp}

    wpe = AddAndDrop(params["wpe"], next(keys), rate)
    return params | {"wpe": wpe, "blocks": [dropping_block(block) for block in params["blocks"]]}
