"""Numbers under stress: odd weights and texts, in every path; ties; distributions with holes."""

import warnings

import numpy as np
import pytest
from conftest import TINY, random_params, tree_map

import gpt2
import gpt2_pico
import kv_cache

N_HEAD = TINY["n_head"]


def jax_gpt2(ids, params):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    compiled = jax.jit(gpt2.gpt2, static_argnames="n_head")
    return np.asarray(compiled(np.array(ids), **params, n_head=N_HEAD))


def cached(ids, params):  # -> every position's logits, from a cache that grows by one token
    cache = kv_cache.new_cache(params, N_HEAD)
    return np.stack([kv_cache.step([cache], [id], params, N_HEAD)[0] for id in ids])


PATHS = {
    "gpt2": lambda ids, params: gpt2.gpt2(ids, **params, n_head=N_HEAD),
    "pico": lambda ids, params: gpt2_pico.gpt2(ids, **params, n_head=N_HEAD),
    "jax": jax_gpt2,
    "cache": cached,
}

WEIGHTS = {
    "as they are": lambda a: a,
    "tenfold": lambda a: a * np.float32(10),
    "a tenth": lambda a: a / np.float32(10),
    "a millionfold": lambda a: a * np.float32(1e6),
    "denormal": lambda a: a * np.float32(1e-40),
    "zero": np.zeros_like,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n_vocab", [257, 1])
@pytest.mark.parametrize("text", ["any", "one token again and again"])
def test_logits_are_as_good_as_their_weights(rng, path, weights, n_vocab, text):
    """Against a float64 pass, n_ctx full. Large weights make attention jump between tokens, so that
    rounding grows; how much is seen from float64 passes whose weights differ by a last float32 bit.
    """
    params = tree_map(WEIGHTS[weights], random_params(rng, TINY | {"n_vocab": n_vocab}))
    ids = rng.integers(n_vocab, size=TINY["n_ctx"]) if text == "any" else np.zeros(48, int)
    ids = ids.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no overflow, no 0 / 0, not even on the way
        logits = PATHS[path](ids, params)
    assert logits.dtype == np.float32 and np.all(np.isfinite(logits))
    exact_params = tree_map(lambda a: a.astype(np.float64), params)
    exact = gpt2.gpt2(ids, **exact_params, n_head=N_HEAD)
    noise = np.zeros(len(ids))  # of each position
    for _ in range(16):
        near = tree_map(lambda a: a * (1 + 2.0**-23 * rng.choice([-1, 1], a.shape)), exact_params)
        change = np.abs(gpt2.gpt2(ids, **near, n_head=N_HEAD) - exact).max(-1)
        noise = np.maximum(noise, change)
    error = np.abs(logits - exact).max(-1)
    print((error / np.maximum(noise, 1e-30)).max(), "times the noise")
    assert np.all(error <= 30 * noise + 1e-30)


def test_every_path_takes_the_first_of_equals(rng):
    """A vocabulary in which every token has doubles: whatever is chosen must be the lowest id.

    Equal tokens get equal logits only if BLAS adds their terms in one order, and at a matrix's edge
    it uses another. So each token has one number that is not 0: then every order gives one sum.
    """
    n_vocab, n_embd = int(rng.choice([257, 1000, 5003])), int(rng.choice([16, 64, 192]))
    params = random_params(rng, TINY | {"n_vocab": n_vocab, "n_embd": n_embd})
    kind = rng.integers(n_vocab // 3, size=n_vocab)
    one_number = np.arange(n_embd) == rng.integers(n_embd, size=n_vocab)[:, None]
    params["wte"] = np.where(one_number, params["wte"], np.float32(0))[kind]
    _, firsts = np.unique(kind, return_index=True)
    prompts = [rng.integers(n_vocab, size=n).tolist() for n in (1, 2, 9, 17, 20)]
    texts = {}
    for module in (gpt2, gpt2_pico):
        texts[module] = [module.generate(ids, params, N_HEAD, 20) for ids in prompts]
    for size in (1, 3, 8):
        texts[size] = kv_cache.generate(prompts, params, N_HEAD, 20, batch_size=size)
    texts["jax"] = [jax_gpt2(ids, params).argmax(-1) for ids in prompts]
    for path, rows in texts.items():
        assert np.isin(np.concatenate(rows), firsts).all(), path


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("others", [-np.inf, -3e38])
def test_one_legal_token_is_always_drawn(rng, temperature, others):
    for n_vocab in (1, 2, 257, 50257):
        logits = np.full(n_vocab, others, np.float32)
        logits[legal := int(rng.integers(n_vocab))] = rng.normal()
        for top_k, top_p in ((0, 1.0), (1, 1.0), (40, 0.9), (n_vocab, 1e-9)):
            assert gpt2.sample(logits, rng, temperature, top_k, top_p) == legal


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(rng, temperature, value):
    params = random_params(rng, TINY)
    params["wte"][7] = value
    for generate in (
        gpt2.generate,
        lambda ids, *args, **how: kv_cache.generate([ids], *args, **how),
    ):
        with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="not finite"):
            generate([1, 2], params, N_HEAD, 5, temperature=temperature)
