"""How a row's tokens are sampled: its settings as one value, and its own random generator."""

from typing import NamedTuple

import numpy as np

from gpt2 import sample


class Sampling(NamedTuple):
    """The settings that gpt2.sample takes after its rng. Hashable, so JAX takes it as static."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def new_rng(seed, number):
    """Returns a row's random generator. Row 0 has the same one as gpt2.py for that seed.

    Every other row's generator depends on the seed and the row's number, and so a row's text
    doesn't depend on its neighbours.
    """
    return np.random.default_rng([seed, number] if seed is not None and number > 0 else seed)


class Sampler:
    """Samples a row's tokens. In the server, serving.choices.Choice takes its place."""

    needs_states = False  # must read_states be called? Then the row's whole prompt is run

    def __init__(self, sampling, seed=None, number=0, stop=None):
        self.sampling = sampling
        self.rng = new_rng(seed, number)
        self.stop = stop  # ids -> bool; None for never

    def sample(self, logits, row):  # [n_vocab] -> the row's next token id
        ids = row.seen if self.sampling.repetition_penalty != 1 else ()  # the list is made anew
        return sample(logits, self.rng, *self.sampling, ids=ids)

    def is_complete(self, ids):  # the row's new ids, never empty -> does the last of them end it?
        return self.stop is not None and self.stop(ids)

    def read_states(self, x):
        """x: [n, n_embd], the hidden states of the prompt's next n tokens."""
