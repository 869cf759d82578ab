"""Batch and Row under random admissions, passes, interruptions, drops and pauses, beside gpt2.py.

`BATCH_EXAMPLES=5000 pytest tests/test_batch_machine.py` searches for longer.
"""

import os

import numpy as np
from conftest import random_params
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import gpt2
import kv_cache
from engine import slices
from generation.prefix_cache import PrefixCache
from generation.rows import Row
from generation.sampling import Sampler, Sampling

N_HEAD = 3
HPARAMS = {"n_vocab": 31, "n_ctx": 29, "n_embd": 24, "n_head": N_HEAD, "n_layer": 2}
TIE = 1e-4  # two logits this close may change places, because a batch sums in another order


class Interrupted(Exception):
    pass


def is_written_by(params, row):
    """Is the row's text what gpt2.generate writes, up to a tie?"""
    expected = gpt2.generate(row.prompt, params, N_HEAD, row.n_tokens, slide=True)
    for i, (ours, theirs) in enumerate(zip(row.ids, expected, strict=True)):
        if ours != theirs:
            seen = gpt2.latest(row.prompt + expected[:i], HPARAMS["n_ctx"])
            logits = np.sort(gpt2.gpt2(seen, **params, n_head=N_HEAD)[-1])
            return logits[-1] - logits[-2] < TIE
    return True


class BatchMachine(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**32 - 1), batch_size=st.integers(1, 6), chunk=st.integers(1, 40)
    )
    def begin(self, seed, batch_size, chunk):
        self.rng = np.random.default_rng(seed)
        self.params = random_params(self.rng, HPARAMS)
        self.batch = kv_cache.Batch(self.params, N_HEAD, batch_size, chunk)
        self.prefixes = PrefixCache()
        self.waiting = []
        self.rows = []
        self.dropped = []

    @rule(
        n=st.integers(1, 45),
        shared=st.booleans(),
        n_tokens=st.integers(0, 50),
        lookup=st.integers(0, 4),
    )
    def submit(self, n, shared, n_tokens, lookup):
        prompt = self.rng.integers(0, HPARAMS["n_vocab"], n).tolist()
        if shared and self.rows:
            text = self.rows[self.rng.integers(len(self.rows))].text
            prompt = text[: self.rng.integers(1, len(text) + 1)] + prompt[: n // 4]
        prompt = prompt[: HPARAMS["n_ctx"]]
        number = len(self.rows)
        row = Row(prompt, n_tokens, Sampler(Sampling()), number, lookup=lookup)
        self.rows.append(row)
        self.waiting.append(row)

    def arrivals(self):
        while self.waiting:
            yield self.waiting.pop(0)

    @rule(n=st.integers(1, 12))
    def step(self, n):
        for _ in range(n):
            events = self.batch.step(self.arrivals(), self.prefixes.rows)
            for event in events:
                if event.end and self.rng.random() < 0.7:
                    self.prefixes.add(self.rows[event.row])

    @precondition(lambda self: self.batch.rows)
    @rule(
        place=st.sampled_from(["slices.run", "next_logits", "attention"]), after=st.integers(0, 4)
    )
    def interrupt(self, place, after):
        """A pass ends early: before, in or after its layers."""
        owner, name = {
            "slices.run": (slices, "run"),
            "next_logits": (kv_cache, "next_logits"),
            "attention": (slices, "attention_of_rows"),
        }[place]
        plain = getattr(owner, name)
        n_calls = 0

        def fail(*args, **rest):
            nonlocal n_calls
            n_calls += 1
            if n_calls > after // 2:
                if after % 2:
                    plain(*args, **rest)
                raise Interrupted
            return plain(*args, **rest)

        setattr(owner, name, fail)
        try:
            self.batch.advance()
        except Interrupted:
            pass
        finally:
            setattr(owner, name, plain)

    @precondition(lambda self: self.batch.rows)
    @rule()
    def drop(self):
        """A client has gone, as in serve.py."""
        row = self.batch.rows[self.rng.integers(len(self.batch.rows))]
        row.end = "dropped"
        row.cache = None
        self.dropped.append(row)
        self.batch.rows = [other for other in self.batch.rows if other.end != "dropped"]

    @precondition(lambda self: self.batch.rows)
    @rule()
    def pause(self):
        """A row makes room for another request, as in serve.py, and reads its text again later."""
        row = self.batch.rows[self.rng.integers(len(self.batch.rows))]
        row.cache = None
        self.batch.rows = [other for other in self.batch.rows if other is not row]
        for other in self.batch.rows:
            if other.source is row:
                other.source = None
        self.waiting.insert(0, row)

    def teardown(self):
        while self.batch.rows or self.waiting:
            self.step(1)
        for row in self.rows:
            if row not in self.dropped:
                assert len(row.ids) == row.n_tokens and row.end == "length"
                assert is_written_by(self.params, row)


n_examples = int(os.environ.get("BATCH_EXAMPLES", 30))
TestBatch = BatchMachine.TestCase
TestBatch.settings = settings(
    max_examples=n_examples, stateful_step_count=25, deadline=None, database=None, print_blob=True
)
