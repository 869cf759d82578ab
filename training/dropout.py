"""Dropout without a line in the model: an object that stands where an array is added.

GPT-2 drops a tenth of the numbers at three kinds of places while it trains: in the sum of the two
embeddings, and in what attention and the ffn add to the stream. Each of these is the last sum of
its function, x + wpe or x @ w + b. What stands in the place of wpe, or of a c_proj's b, can
therefore add and then drop, and gpt2.py stays as it is.

Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, eq=False)
class AddAndDrop:
    """Stands where an array stood that is added to x: x + it is x + array, of which some is 0."""

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


def drop(key, x, rate):  # [..., n] -> the same, a share of its numbers 0 and the others scaled up
    """A random byte for each number decides, so the rate is rounded to 256ths.

    The scale keeps the mean as it was, so that nothing need change where nothing is dropped.
    """
    n = x.shape[-1]
    n_dropped = round(256 * rate)
    words = jax.random.bits(key, (*x.shape[:-1], -(-n // 4)), jnp.uint32)  # four bytes each
    chance = jax.lax.bitcast_convert_type(words, jnp.uint8)  # [..., n / 4, 4]
    is_kept = chance.reshape(*x.shape[:-1], -1)[..., :n] >= n_dropped
    return x * is_kept * (256 / (256 - n_dropped))


def with_dropout(key, params, rate):  # -> params that drop what their sums give
    keys = iter(jax.random.split(key, 1 + 2 * len(params["blocks"])))

    def dropping(layer):  # a c_proj
        return layer | {"b": AddAndDrop(layer["b"], next(keys), rate)}

    def dropping_block(block):
        attn = block["attn"] | {"c_proj": dropping(block["attn"]["c_proj"])}
        mlp = block["mlp"] | {"c_proj": dropping(block["mlp"]["c_proj"])}
        return block | {"attn": attn, "mlp": mlp}

    wpe = AddAndDrop(params["wpe"], next(keys), rate)
    return params | {"wpe": wpe, "blocks": [dropping_block(block) for block in params["blocks"]]}
