"""kv_cache_jax.py: kv_cache.py's ids, gpt2.probabilities' distribution, and each row by itself."""

import json
import math
import secrets

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

import gpt2
import kv_cache
import kv_cache_jax
from generation.rows import Event
from generation.sampling import Sampling
from plumbing import memory

N_HEAD, N_VOCAB, N_CTX = 2, 61, 37
HPARAMS = {"n_vocab": N_VOCAB, "n_ctx": N_CTX, "n_embd": 24, "n_head": N_HEAD, "n_layer": 2}
SAMPLED = {"temperature": 3.0, "top_k": 40, "top_p": 0.98}  # so that no two rows are alike


@pytest.fixture(scope="module")
def params():
    seed = secrets.randbits(32)
    print("seed", seed)
    return random_params(np.random.default_rng(seed), HPARAMS)


def random_prompts(rng, lengths):
    return [rng.integers(0, N_VOCAB, n).tolist() for n in lengths]


def same_up_to_ties(ours, theirs, prompts, params):
    """Whether greedy ids are the same; where they part, two tokens must be equally likely."""
    for mine, other, prompt in zip(ours, theirs, prompts, strict=True):
        if mine != other:
            n = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
            logits = gpt2.gpt2(prompt + mine[:n], **params, n_head=N_HEAD)[-1]
            assert abs(logits[mine[n]] - logits[other[n]]) < 1e-4
    return True


# --- Greedy ---------------------------------------------------------------------------------------


def test_greedy_is_what_the_cache_in_numpy_writes(rng, params):
    """Ragged rows, in one batch and in several, the last of which is not full."""
    prompts = random_prompts(rng, [3, 13, 1, 9, 5])
    theirs = kv_cache.generate(prompts, params, N_HEAD, 18)
    for batch_size in (8, 2):
        ours = kv_cache_jax.generate(prompts, params, N_HEAD, 18, batch_size=batch_size)
        assert same_up_to_ties(ours, theirs, prompts, params)
        assert all(type(token) is int for row in ours for token in row)


@pytest.mark.parametrize("n_prompt", [1, 17, 36])
def test_a_text_may_fill_all_positions(rng, params, n_prompt):
    """After one token it takes two calls: more than STEPS_PER_CALL."""
    [prompt] = prompts = random_prompts(rng, [n_prompt])
    n = N_CTX - n_prompt
    assert (n - 1 > kv_cache_jax.STEPS_PER_CALL) == (n_prompt == 1)
    ours = kv_cache_jax.generate(prompts, params, N_HEAD, n)
    theirs = [gpt2.generate(prompt, params, N_HEAD, n)]
    assert same_up_to_ties(ours, theirs, prompts, params)


def test_rows_that_pad_the_vocabulary_are_never_written(rng, params):
    """The trainer's wte has them; here each is three times as likely as a token."""
    prompts = random_prompts(rng, [3, 7])
    padded = params | {"wte": np.concatenate([params["wte"], params["wte"] * 3])}
    assert gpt2.gpt2(prompts[0], **padded, n_head=N_HEAD)[-1].argmax() >= N_VOCAB
    ours = kv_cache_jax.generate(prompts, padded, N_HEAD, 9, n_vocab=N_VOCAB)
    theirs = kv_cache.generate(prompts, params, N_HEAD, 9)
    assert same_up_to_ties(ours, theirs, prompts, params)


def test_float32_all_through(params):
    how = {"n_head": N_HEAD, "n_vocab": N_VOCAB, "sampling": Sampling(**SAMPLED)}
    ids, n_seq, rows = np.zeros((2, 16), np.int32), np.ones(2, int), np.arange(2)
    tree = jax.tree.map(jnp.asarray, params)
    batch = kv_cache_jax.read_prompts(tree, ids, n_seq, np.uint32(0), rows, capacity=16, **how)
    for keys, values in batch["kv"]:
        assert keys.shape == values.shape == (2, 16, N_HEAD, 12)
        assert keys.dtype == values.dtype == jnp.float32
    assert batch["tokens"].dtype == jnp.int32


def test_a_batch_has_as_many_rows_as_there_are_texts_and_memory(rng, params, monkeypatch):
    sizes, plain = [], kv_cache_jax.read_prompts

    def note(params, ids, *rest, **static):
        sizes.append(len(ids))
        return plain(params, ids, *rest, **static)

    monkeypatch.setattr(kv_cache_jax, "read_prompts", note)
    prompts = random_prompts(rng, [3] * 35)
    ours = kv_cache_jax.generate(prompts, params, N_HEAD, 2, n_samples=2)
    assert sizes == [64, 64]  # the second one's last rows are dummies
    sizes.clear()
    n_bytes = kv_cache_jax.row_bytes(3, 2, params, N_HEAD)
    assert n_bytes == 2 * 2 * 24 * 16 * 4 + 2 * N_HEAD * 16 * 16 * 4
    monkeypatch.setattr(memory, "free_bytes", lambda: 2 * 35 * n_bytes)
    again = kv_cache_jax.generate(prompts, params, N_HEAD, 2, n_samples=2)
    assert sizes == [35, 35] and same_up_to_ties(ours[:35], again[:35], prompts, params)


def test_a_misspelt_option_fails(params):
    with pytest.raises(TypeError, match="temprature"):
        kv_cache_jax.generate([[1]], params, N_HEAD, 3, temprature=1.0)


# --- Ends -----------------------------------------------------------------------------------------


def test_events_are_those_of_the_cache_in_numpy(rng, params):
    """Every token of every row, and why it ends, with endoftext and a stop that both come."""
    prompts = random_prompts(rng, [2, 8, 5, 11])
    texts = kv_cache.generate(prompts, params, N_HEAD, 16)
    endoftext, last = texts[0][3], texts[1][5]

    def stop(ids):
        return ids[-1] == last

    for options in ({}, {"endoftext": endoftext}, {"endoftext": endoftext, "stop": stop}):
        options |= {"n_samples": 2, "batch_size": 3}
        ours, theirs = [
            sorted(module.generate_stream(prompts, params, N_HEAD, 16, **options), key=by_row)
            for module in (kv_cache_jax, kv_cache)
        ]
        assert ours == theirs


def by_row(event):  # sorting keeps the order of a row's events
    return event.row


def test_no_tokens_to_generate_are_none(params):
    events = kv_cache_jax.generate_stream([[1], [2]], params, N_HEAD, 0, n_samples=2)
    assert list(events) == [Event(row, None, "length") for row in range(4)]


def test_what_is_wrong_is_said(params):
    for prompts, options, words in (
        ([[1] * 30], {}, "30 prompt tokens . 8 to generate = 38, but this model has only 37"),
        ([[1], []], {}, "the prompt has no tokens"),
        ([[1], [61]], {}, "prompt 2 of 2: an id is not in 0 .. 60"),
        ([[-1]], {}, "prompt 1 of 1: an id is not in 0 .. 60"),
        ([], {}, "must be 1 or more"),
        ([[1]], {"batch_size": 0}, "must be 1 or more"),
        ([[1]], {"temperature": -1}, "temperature must be 0"),
    ):
        with pytest.raises(ValueError, match=words):
            kv_cache_jax.generate(prompts, params, N_HEAD, 8, **options)


def test_damaged_weights_write_nothing(params):
    damaged = params | {"wte": params["wte"] * np.float32(np.nan)}
    with pytest.raises(ValueError, match="not finite: the model's weights must be damaged"):
        kv_cache_jax.generate([[1, 2]], damaged, N_HEAD, 4)
    logits = jnp.zeros((3, 5)).at[1, 2].set(np.nan).at[2].set(-np.inf)
    for temperature in (0.0, 1.0):
        keys = jax.random.split(jax.random.key(0), 3)
        tokens = kv_cache_jax.sample(logits, keys, 0, Sampling(temperature))
        assert tokens[0] >= 0 and tokens[1:].tolist() == [-1, -1]


# --- Sampling -------------------------------------------------------------------------------------

SETTINGS = [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1e-40, 0, 1.0), (1e300, 0, 1.0), (1.0, 7, 1.0), (1.0, 61, 1.0),
    (1.0, 1000, 1.0), (1.0, 0, 0.8), (1.0, 0, 1e-9), (1.3, 9, 0.7), (0.9, 1, 0.5), (2.0, 30, 0.99),
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_kept_has_gpt2s_probabilities(rng, setting):
    logits = rng.standard_normal((5, N_VOCAB), dtype=np.float32) * 3
    kept = np.asarray(jax.nn.softmax(kv_cache_jax.mask(jnp.asarray(logits), *setting)))
    assert kept.dtype == np.float32
    for row, wanted in zip(kept, logits, strict=True):
        p = gpt2.probabilities(wanted, *setting)
        cumulative = np.cumsum(np.sort(gpt2.probabilities(wanted, *setting[:2]))[::-1])
        if setting[2] < 1 and abs(cumulative - setting[2]).min() < 1e-5:
            continue  # on the border, float32 may decide the other way
        np.testing.assert_allclose(row, p, rtol=0, atol=1e-5)
        assert ((row == 0) == (p == 0)).all() or setting[0] < 1e-3  # and there float32 ends sooner


@pytest.mark.parametrize("setting", [(1.0, 3, 1.0), (1.0, 0, 0.5), (1.0, 3, 0.5), (0.5, 0, 0.74)])
def test_tokens_as_likely_as_the_last_one_kept_are_kept_too(rng, setting):
    """Equal logits at both borders: of these 0.4, 0.2, 0.2 and 0.2, top_k = 3 keeps all four."""
    logits = np.full(40, -50, np.float32)
    logits[rng.choice(40, 4, replace=False)] = np.log(np.float32([0.4, 0.2, 0.2, 0.2]))
    kept = np.asarray(jax.nn.softmax(kv_cache_jax.mask(jnp.asarray(logits), *setting)))
    p = gpt2.probabilities(logits, *setting)
    np.testing.assert_allclose(kept, p, rtol=0, atol=1e-6)
    assert ((kept > 0) == (p > 0)).all()


def assert_drawn_from(p, shares, n):
    """The total variation of n draws' shares from p, with a bound that fails once in 10 million.

    A token's |share - p| is sqrt(p (1 - p) / n) on average at most, and one draw more or less moves
    the total by at most 1 / n: above the mean by t but with a probability of exp(-2 n t^2)
    (McDiarmid 1989).
    """
    mean = np.sqrt(p * (1 - p) / n).sum() / 2
    assert abs(shares - p).sum() / 2 < mean + math.sqrt(math.log(1e7) / (2 * n))
    assert (shares[p == 0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (0.7, 9, 1.0), (1.2, 0, 0.8), (0.9, 20, 0.9)])
def test_draws_have_gpt2s_distribution(setting):
    seed, n = secrets.randbits(31), 200_000
    print("seed", seed)
    logits = np.random.default_rng(seed).standard_normal(N_VOCAB, dtype=np.float32) * 2
    keys = jax.random.split(jax.random.key(seed), 1000)
    rows, sampling = jnp.tile(logits, (1000, 1)), Sampling(*setting)
    sample = jax.jit(lambda i: kv_cache_jax.sample(rows, keys, i, sampling))
    tokens = np.concatenate([sample(i) for i in range(n // 1000)])
    p = gpt2.probabilities(logits, *setting)
    assert_drawn_from(p, np.bincount(tokens, minlength=N_VOCAB) / n, n)


def test_a_rows_draws_depend_on_the_seed_and_its_number_alone(rng, params):
    prompts = random_prompts(rng, [3, 4, 2])

    def write(prompts, seed=7, batch_size=2):
        how = SAMPLED | {"seed": seed, "n_samples": 2, "batch_size": batch_size}
        return kv_cache_jax.generate(prompts, params, N_HEAD, 12, **how)

    ours = write(prompts)
    assert ours == write(prompts, batch_size=8) and ours[:2] == write(prompts[:1])
    assert len({tuple(row) for row in ours}) == 6
    assert all(a != b for a, b in zip(ours, write(prompts, seed=8), strict=True))
    assert write(prompts, seed=None) != write(prompts, seed=None)
    assert write(prompts, seed=10**30) != ours  # of any size, as NumPy's


def test_the_second_token_is_drawn_from_what_the_first_one_makes_likely(params):
    """A pair of draws against the product of probabilities, by the whole way through the engine."""
    seed, n = secrets.randbits(31), 4000
    print("seed", seed)
    rows = kv_cache_jax.generate(
        [[5, 9]], params, N_HEAD, 2, temperature=0.5, seed=seed, n_samples=n, batch_size=500
    )
    first = gpt2.gpt2([5, 9], **params, n_head=N_HEAD)[-1]
    p = gpt2.probabilities(first, 0.5)
    pairs = np.zeros((N_VOCAB, N_VOCAB))
    for token in range(N_VOCAB):
        logits = gpt2.gpt2([5, 9, token], **params, n_head=N_HEAD)[-1]
        pairs[token] = p[token] * gpt2.probabilities(logits, 0.5)
    shares = np.zeros_like(pairs)
    np.add.at(shares, tuple(np.transpose(rows)), 1 / n)
    assert_drawn_from(pairs, shares, n)


# --- The command line -----------------------------------------------------------------------------


def test_the_command_line_writes_the_same_text(models):
    """Greedy, in rows and alone; a copy of kv_cache.py's other flags is not needed."""
    args = ["--model_size", "tiny", "--n_tokens_to_generate", 20, "--jsonl"]
    texts = ["First", "A second one", ""]
    lines = {}
    for backend in ("numpy", "jax"):
        code, out, err = conftest.run(
            "kv_cache.py", *texts, *args, "--backend", backend, models_dir=models[0]
        )
        assert (code, err) == (0, "")
        lines[backend] = [json.loads(line) for line in out.splitlines()]
    assert lines["jax"] == lines["numpy"] and len(lines["jax"]) == 3


def test_an_unknown_backend_is_refused(models):
    args = ["x", "--backend", "torch", "--model_size", "tiny"]
    code, out, err = conftest.run("kv_cache.py", *args, models_dir=models[0])
    assert (code, out) == (2, "")
    assert err == "error: backend must be numpy or jax, not 'torch'\n"
