"""kv_cache.py: the same text as without a cache, alone or in any company, within its memory."""

import contextlib
import inspect
import io
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import weakref

import conftest
import numpy as np
import pytest
from conftest import REPO, TINY, call, exclaiming, hugging_face, on_linux, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2
import kv_cache
import utils
from encoder import Encoder
from engine import slices, threads
from generation import lookup, terminal
from generation import rows as generation_rows
from generation.rows import Event, Row
from generation.sampling import Sampler, Sampling
from generation.stops import stops_with, up_to
from model_files import weights
from plumbing import memory

with contextlib.suppress(ImportError):  # Windows has none of them
    import fcntl
    import pty
    import termios

N_HEAD = 2
HPARAMS = {"n_vocab": 61, "n_ctx": 37, "n_embd": 24, "n_head": N_HEAD, "n_layer": 3}


@pytest.fixture(autouse=True)
def our_products(monkeypatch):
    """Where NumPy's own would serve such small models better."""
    monkeypatch.setattr(kv_cache.products, "NARROWEST", 1)
    monkeypatch.setattr(kv_cache.products, "SIZE_OF_A_ROW", 1)


@pytest.fixture
def params(rng):
    return random_params(rng, HPARAMS)


def random_prompts(rng, lengths, n_vocab=HPARAMS["n_vocab"]):
    return [rng.integers(0, n_vocab, n).tolist() for n in lengths]


def alone(prompts, params, n_tokens, **options):
    """The slow twin: each prompt by itself, every step over the whole text."""
    return [gpt2.generate(ids, params, N_HEAD, n_tokens, **options) for ids in prompts]


def assert_same_logits(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# The cache itself
# --------------------------------------------------------------------------------------------------


def test_every_step_has_the_logits_of_the_whole_text(rng, params):
    ids = rng.integers(0, 61, 37).tolist()  # as many as there are positions
    plain = gpt2.gpt2(ids, **params, n_head=N_HEAD)
    for n_prompt in range(1, 38):
        cache = kv_cache.new_cache(params, N_HEAD, capacity=1)
        logits = kv_cache.prefill(cache, ids[:n_prompt], params, N_HEAD)
        assert_same_logits(logits, plain[n_prompt - 1])
        for n, token in enumerate(ids[n_prompt : n_prompt + 3], n_prompt):
            logits = kv_cache.step([cache], [token], params, N_HEAD)
            assert_same_logits(logits[0], plain[n])


def test_chunks_of_every_size_read_the_same(rng, params):
    ids = rng.integers(0, 61, 37).tolist()
    first, *_, plain = gpt2.gpt2(ids, **params, n_head=N_HEAD)
    one = kv_cache.new_cache(params, N_HEAD)
    assert_same_logits(kv_cache.prefill(one, ids[:1], params, N_HEAD, chunk=1), first)
    whole = kv_cache.new_cache(params, N_HEAD)
    kv_cache.prefill(whole, ids, params, N_HEAD)
    for chunk in range(1, 39):
        cache = kv_cache.new_cache(params, N_HEAD)
        assert_same_logits(kv_cache.prefill(cache, ids, params, N_HEAD, chunk), plain)
        assert cache.n_seq == 37
        assert_same_logits(cache.kv, whole.kv)


def test_rows_of_one_pass_do_not_see_each_other(rng, params):
    """Reading and writing in one pass, rows of all lengths; each against the plain function."""
    for _ in range(20):
        n_rows = rng.integers(1, 8)
        texts = random_prompts(rng, rng.integers(1, 38, n_rows))
        cuts = [int(rng.integers(0, len(ids))) for ids in texts]
        caches = [kv_cache.new_cache(params, N_HEAD, capacity=2) for _ in texts]
        for cache, ids, cut in zip(caches, texts, cuts, strict=True):
            if cut:
                kv_cache.extend([cache], [ids[:cut]], params, N_HEAD)
        rest = [ids[cut:] for ids, cut in zip(texts, cuts, strict=True)]
        x = kv_cache.extend(caches, rest, params, N_HEAD)
        logits = kv_cache.next_logits(x, params)
        for row, ids in zip(logits, texts, strict=True):
            assert_same_logits(row, gpt2.gpt2(ids, **params, n_head=N_HEAD)[-1])


def test_every_new_token_has_its_state_in_the_order_of_the_rows(rng, params):
    texts = random_prompts(rng, [9, 1, 37, 4])
    caches = [kv_cache.new_cache(params, N_HEAD) for _ in texts]
    kv_cache.extend(caches[2:3], [texts[2][:30]], params, N_HEAD)
    new_ids = [*texts[:2], texts[2][30:], texts[3]]
    states = [gpt2.hidden_state(ids, **params, n_head=N_HEAD) for ids in texts]
    states[2] = states[2][30:]
    x = kv_cache.extend_all(caches, new_ids, params, N_HEAD)
    assert_same_logits(x, np.concatenate(states))
    assert x.dtype == np.float32 and [cache.n_seq for cache in caches] == [9, 1, 37, 4]


def test_float32_all_through(params):
    cache = kv_cache.new_cache(params, N_HEAD)
    x = kv_cache.extend([cache, kv_cache.copy_cache(cache)], [[1, 2], [3]], params, N_HEAD)
    logits = kv_cache.next_logits(x, params)
    assert x.dtype == logits.dtype == cache.kv.dtype == np.float32
    assert type(x) is type(logits) is np.ndarray


def test_room_doubles_up_to_n_ctx_and_costs_what_the_docstring_says(params):
    cache, sizes = kv_cache.new_cache(params, N_HEAD, capacity=4), []
    for n in range(1, 38):
        kv_cache.step([cache], [n], params, N_HEAD)
        sizes.append(cache.kv.shape[3])
        assert cache.kv.nbytes == 2 * 3 * 24 * 4 * sizes[-1]
    assert sizes == [4] * 4 + [8] * 4 + [16] * 8 + [32] * 16 + [37] * 5
    before = cache.kv.copy()
    with pytest.raises(ValueError, match=r"38 tokens, but this model has only 37 positions"):
        kv_cache.step([cache], [0], params, N_HEAD)
    assert cache.n_seq == 37 and np.array_equal(cache.kv, before)
    assert kv_cache.new_cache(params, N_HEAD, capacity=1000).kv.shape[3] == 37


def test_the_arithmetic_for_124m():
    sizes = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    shapes = dict(weights.tensor_shapes(sizes))
    wide = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    cache = kv_cache.new_cache(weights.nest(wide), 12, capacity=1024)
    assert cache.kv.nbytes == 72 * 2**20 == 72 * 1024 * 1024
    assert round(sum(array.nbytes for array in wide.values()) / 2**20) == 475
    words = " ".join(kv_cache.__doc__.split())
    assert "72 KiB per token, or 72 MiB for a full context of 1024" in words
    assert "The weights take 475 MiB" in words


def test_no_new_ids_are_refused(params):
    cache = kv_cache.new_cache(params, N_HEAD, capacity=0)
    for act in (
        lambda: kv_cache.prefill(cache, [], params, N_HEAD),
        lambda: kv_cache.extend([cache, kv_cache.copy_cache(cache)], [[1], []], params, N_HEAD),
    ):
        with pytest.raises(ValueError, match="every row needs at least one new id"):
            act()
    assert cache.n_seq == 0 and cache.kv.shape[3] == 1


def test_a_cache_serves_one_row(params):
    cache = kv_cache.new_cache(params, N_HEAD)
    with pytest.raises(ValueError, match="two rows have the same cache"):
        kv_cache.step([cache, cache], [1, 2], params, N_HEAD)


def test_a_prompt_that_does_not_fit_is_refused_before_its_first_chunk(params):
    cache = kv_cache.new_cache(params, N_HEAD)
    with pytest.raises(ValueError, match="38 tokens"):
        kv_cache.prefill(cache, [1] * 38, params, N_HEAD, chunk=5)
    assert cache.n_seq == 0


def test_the_plain_functions_use_the_fast_products_too(params, monkeypatch):
    kinds, plain = [], slices.hidden_state

    def look(tokens, wte, **rest):
        kinds.append(type(wte))
        return plain(tokens, wte, **rest)

    monkeypatch.setattr(slices, "hidden_state", look)
    kv_cache.prefill(kv_cache.new_cache(params, N_HEAD), [1, 2], params, N_HEAD)
    assert kinds == [kv_cache.products.Matrix]


def test_what_the_caller_does_with_its_lists_changes_nothing(rng, params):
    prompts = random_prompts(rng, [3, 4, 5])
    expected = alone(prompts, params, 4)
    rows = {0: [], 1: [], 2: []}
    for row, token, _ in kv_cache.generate_stream(prompts, params, N_HEAD, 4, batch_size=1):
        rows[row].append(token)
        for ids in prompts:
            ids.clear()
        prompts.clear()
    assert [rows[row] for row in range(3)] == expected
    arrays = rng.integers(0, 61, (2, 4))
    assert kv_cache.generate(arrays, params, N_HEAD, 4) == alone(arrays.tolist(), params, 4)


def test_wide_rows_and_long_prompts_take_the_fast_paths(rng, monkeypatch):
    """Sizes for which threads and slabs come into play, wherever this machine would use them."""
    monkeypatch.setattr(threads, "n_threads", lambda: 3)
    threads.start_workers.cache_clear()
    hparams = {"n_vocab": 401, "n_ctx": 300, "n_embd": 512, "n_head": 4, "n_layer": 2}
    params = random_params(rng, hparams)
    prompts = random_prompts(rng, [290, 3, 120, 64, 1], n_vocab=401)
    wrapped = kv_cache.products.wrap(params)
    caches = [kv_cache.new_cache(params, 4) for _ in prompts]
    for cache, ids in zip(caches, prompts, strict=True):
        logits = kv_cache.prefill(cache, ids, wrapped, 4, chunk=290)
        assert_same_logits(logits, gpt2.gpt2(ids, **params, n_head=4)[-1])
    tokens = rng.integers(0, 401, len(prompts)).tolist()
    logits = kv_cache.step(caches, tokens, wrapped, 4)
    for row, ids, token in zip(logits, prompts, tokens, strict=True):
        assert_same_logits(row, gpt2.gpt2([*ids, token], **params, n_head=4)[-1])
    threads.start_workers.cache_clear()


def cut_short_texts(monkeypatch, n_threads):
    """From now on into slices of four tokens, or more, for so many threads."""
    monkeypatch.setattr(threads, "n_threads", lambda: n_threads)
    monkeypatch.setattr(slices, "MIN_TOKENS", 4)
    monkeypatch.setattr(slices, "MIN_SIZE", 0)
    threads.start_workers.cache_clear()


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_slices_of_tokens_give_the_same_numbers(rng, n_threads, monkeypatch):
    """Threads that meet in attention, beside the plain function; rows of all lengths in a pass."""
    cut_short_texts(monkeypatch, n_threads)
    params, kinds, plain = random_params(rng, HPARAMS), [], slices.hidden_state
    monkeypatch.setattr(
        slices,
        "hidden_state",
        lambda tokens, **rest: kinds.append(len(tokens)) or plain(tokens, **rest),
    )
    for lengths in ([37], [20, 1, 16], [1] * 40, [2, 37, 1, 30], [5]):
        texts = random_prompts(rng, lengths)
        caches = [kv_cache.new_cache(params, N_HEAD) for _ in texts]
        half = [max(1, n // 2) for n in lengths]
        kv_cache.extend_all(
            caches, [t[:n] for t, n in zip(texts, half, strict=True)], params, N_HEAD
        )
        rest = [(c, t[n:]) for c, t, n in zip(caches, texts, half, strict=True) if t[n:]]
        if rest:
            kv_cache.extend_all(*zip(*rest, strict=True), params, N_HEAD)
        for cache, ids in zip(caches, texts, strict=True):
            logits = kv_cache.step([cache], [0], params, N_HEAD) if len(ids) < 37 else None
            if logits is not None:
                assert_same_logits(logits[0], gpt2.gpt2([*ids, 0], **params, n_head=N_HEAD)[-1])
    assert max(kinds) < 40 or n_threads == 1
    threads.start_workers.cache_clear()


@pytest.mark.parametrize(
    "n_tokens, n_embd, n_slices",
    [(191, 768, 1), (192, 768, 3), (383, 384, 1), (384, 384, 3), (127, 2048, 1), (128, 2048, 2)],
)
def test_only_long_texts_of_wide_models_are_cut(n_tokens, n_embd, n_slices, monkeypatch):
    monkeypatch.setattr(threads, "n_threads", lambda: 3)
    threads.start_workers.cache_clear()
    ones, lengths, plain = np.ones(n_embd, np.float32), [], slices.hidden_state
    monkeypatch.setattr(
        slices, "hidden_state", lambda ids, **rest: lengths.append(len(ids)) or plain(ids, **rest)
    )
    params = {"wte": np.ones((2, n_embd), np.float32), "wpe": np.ones((400, n_embd), np.float32)}
    params |= {"blocks": [], "ln_f": {"g": ones, "b": ones}}
    kv_cache.extend([kv_cache.new_cache(params, 2)], [[1] * n_tokens], params, 2)
    assert (len(lengths), sum(lengths)) == (n_slices, n_tokens)
    threads.start_workers.cache_clear()


LEFT, RIGHT, ALL = slice(0, 2), slice(2, 4), slice(0, 4)  # of four heads
BOTH, HALVES = [[(0, ALL), (1, ALL)]], [[(0, LEFT)], [(0, RIGHT)]]
ROW_BY_ROW = [[(0, ALL)], [(1, ALL)]]
ATTENTION = [  # positions of each row's new tokens, what is special, what each thread attends to
    ([[799]], None, [[(0, ALL)]]),
    ([[800]], None, HALVES),
    ([[800]], "own attention", [[(0, ALL)]]),
    ([[2000, 2001]], None, [[(0, ALL)]]),
    ([[2000, 2001]], "our threads", HALVES),
    ([[2000], [2001]], None, BOTH),
    ([[399], [399]], "our threads", BOTH),
    ([[400], [399]], "our threads", ROW_BY_ROW),
    ([[400, 401], [399]], "our threads", ROW_BY_ROW),
    ([range(8)], None, HALVES),  # from here in slices
    ([range(4), range(5)], None, [[(0, half), (1, half)] for half in (LEFT, RIGHT)]),
    ([range(4), range(5)], "own attention", ROW_BY_ROW),
    ([[9]] * 8, None, [[(i, ALL) for i in range(first, 8, 2)] for first in (0, 1)]),
]


@pytest.mark.parametrize("rows, special, wanted", ATTENTION)
def test_who_attends_to_which_heads(rng, rows, special, wanted, monkeypatch):
    """Two threads share a long text's heads, or take whole rows; short texts are left to one."""
    cut_short_texts(monkeypatch, 2)
    params = random_params(rng, HPARAMS | {"n_layer": 1, "n_ctx": 2002})
    if special == "own attention":
        params["blocks"][0]["attend"] = gpt2.attention
    seen, positions = [], np.concatenate(rows)

    def attend(layer, groups, q, k, v, out):
        seen.append([(row, slice(*heads.indices(4)[:2])) for row, heads in groups])
        out[...] = v

    with threads.own_threads(2 if special == "our threads" else 1):
        slices.run(positions % 7, positions, params, 4, len(rows), attend)
    assert sorted(seen, key=str) == wanted
    threads.start_workers.cache_clear()


def test_an_error_in_one_slice_ends_all(rng, monkeypatch):
    cut_short_texts(monkeypatch, 3)
    params, plain = random_params(rng, HPARAMS), slices.hidden_state
    for where in (0, 1, 2):

        def stumble(tokens, where=where, **rest):
            if tokens[0] == where:
                raise MemoryError("no room")
            return plain(tokens, **rest)

        cache = kv_cache.new_cache(params, N_HEAD)
        with monkeypatch.context() as m:
            m.setattr(slices, "hidden_state", stumble)
            ids = [0] * 10 + [1] * 10 + [2] * 10
            with pytest.raises(MemoryError, match="no room"):
                kv_cache.prefill(cache, ids, params, N_HEAD)
        assert cache.n_seq == 0
        expected = gpt2.gpt2(ids, **params, n_head=N_HEAD)[-1]
        assert_same_logits(kv_cache.prefill(cache, ids, params, N_HEAD), expected)
    threads.start_workers.cache_clear()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_blocks_own_attention_works_with_a_cache(rng, params, n_threads, monkeypatch):
    """It sees a row's queries, and all its keys and values; every head of them."""
    cut_short_texts(monkeypatch, n_threads)

    def own(q, k, v):  # heads looked at in another order: all must be there
        return gpt2.attention(q, k, v)[::-1] * 0.5

    blocks = [params["blocks"][0], params["blocks"][1] | {"attend": own}, params["blocks"][2]]
    params = params | {"blocks": blocks}
    prompts = random_prompts(rng, [20, 3, 25])
    assert kv_cache.generate(prompts, params, N_HEAD, 8) == alone(prompts, params, 8)
    threads.start_workers.cache_clear()


def test_a_copy_goes_its_own_way(params):
    cache = kv_cache.new_cache(params, N_HEAD)
    kv_cache.prefill(cache, [1, 2, 3], params, N_HEAD)
    other = kv_cache.copy_cache(cache)
    kv_cache.step([other], [4], params, N_HEAD)
    logits = kv_cache.step([cache], [5], params, N_HEAD)[0]
    assert_same_logits(logits, gpt2.gpt2([1, 2, 3, 5], **params, n_head=N_HEAD)[-1])
    logits = kv_cache.step([other], [6], params, N_HEAD)[0]
    assert_same_logits(logits, gpt2.gpt2([1, 2, 3, 4, 6], **params, n_head=N_HEAD)[-1])


def test_an_interrupted_pass_leaves_the_rows_as_they_were(params, monkeypatch):
    caches = [kv_cache.new_cache(params, N_HEAD, capacity=3) for _ in range(2)]
    for cache in caches:
        kv_cache.prefill(cache, [1, 2, 3], params, N_HEAD)
    calls, plain = [], slices.attention_of_rows

    def stumble(rows):
        calls.append(1)
        if len(calls) == 2:  # in the second layer
            raise KeyboardInterrupt
        plain(rows)

    with monkeypatch.context() as m:
        m.setattr(slices, "attention_of_rows", stumble)
        with pytest.raises(KeyboardInterrupt):
            kv_cache.step(caches, [7, 8], params, N_HEAD)
    logits = kv_cache.step(caches, [4, 5], params, N_HEAD)
    for row, token in zip(logits, (4, 5), strict=True):
        assert_same_logits(row, gpt2.gpt2([1, 2, 3, token], **params, n_head=N_HEAD)[-1])


def test_weights_are_used_where_they_lie(params, monkeypatch):
    """A model mapped from disk stays there: what reaches the forward pass shares its memory."""
    seen, plain = [], slices.hidden_state

    def look(tokens, wte, wpe, blocks, ln_f, n_head):
        seen.append(np.shares_memory(wte, params["wte"]))
        seen.append(np.shares_memory(blocks[0]["mlp"]["c_fc"]["w"], first["mlp"]["c_fc"]["w"]))
        return plain(tokens, wte, wpe, blocks, ln_f, n_head)

    first = params["blocks"][0]
    monkeypatch.setattr(slices, "hidden_state", look)
    kv_cache.generate([[1]], params, N_HEAD, 2)
    assert seen == [True] * 4


# --------------------------------------------------------------------------------------------------
# Many rows
# --------------------------------------------------------------------------------------------------


def test_greedy_rows_are_the_same_in_any_company_and_order(rng, params):
    prompts = random_prompts(rng, [1, 30, 7, 1, 12, 22, 3, 9, 29])
    expected = alone(prompts, params, 7)
    for batch_size in (1, 2, 3, 8, 9, 50):
        order = rng.permutation(len(prompts))
        chunk = int(rng.integers(1, 60))
        shuffled = [prompts[i] for i in order]
        ours = kv_cache.generate(shuffled, params, N_HEAD, 7, batch_size=batch_size, chunk=chunk)
        assert ours == [expected[i] for i in order]
    assert [kv_cache.generate([ids], params, N_HEAD, 7)[0] for ids in prompts] == expected


def test_as_hugging_face_generates(rng):
    torch = pytest.importorskip("torch")
    hparams = {"n_vocab": 301, "n_ctx": 64, "n_embd": 48, "n_head": 4, "n_layer": 2}
    params = random_params(rng, hparams)
    model = hugging_face(params, hparams)
    prompts = random_prompts(rng, [1, 40, 17, 5, 44], n_vocab=301)
    theirs = [
        model.generate(
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]  # fmt: skip
    assert kv_cache.generate(prompts, params, 4, 20, batch_size=3) == theirs


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mixture_is_like_one_by_one(data):
    """Lengths, batch, chunk, samples and stops at will; tokens are compared one by one."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    params = random_params(rng, HPARAMS)
    lengths = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=7), label="lengths")
    n_tokens = data.draw(st.integers(0, 12), label="n_tokens")
    n_samples = data.draw(st.integers(1, 3), label="n_samples")
    batch_size = data.draw(st.integers(1, 9), label="batch_size")
    chunk = data.draw(st.integers(1, 80), label="chunk")
    endoftext = data.draw(st.sampled_from([None, *range(61)]), label="endoftext")
    stop_at = data.draw(st.sampled_from([None, *range(61)]), label="stop_at")
    temperature = data.draw(st.sampled_from([0.0, 1.0]), label="temperature")
    prompts = random_prompts(rng, lengths)
    rows = {}
    for row, token, why in kv_cache.generate_stream(
        prompts, params, N_HEAD, n_tokens, temperature=temperature, seed=7, endoftext=endoftext,
        stop=lambda ids: ids[-1] == stop_at, n_samples=n_samples, batch_size=batch_size,
        chunk=chunk,
    ):  # fmt: skip
        assert rows.get(row, ([], None))[1] is None, "a row went on after its end"
        ids = rows.get(row, ([], None))[0]
        rows[row] = ids + [token] * (token is not None), why
    assert sorted(rows) == list(range(len(prompts) * n_samples))
    for row, (ids, why) in rows.items():
        plain = one_row(prompts[row // n_samples], params, n_tokens, temperature, row)
        expected, reason = [], "length"
        for token in plain:
            if token == endoftext:
                reason = "endoftext"
                break
            expected.append(token)
            if token == stop_at:
                reason = "stop"
                break
        assert (ids, why) == (expected, reason)


def one_row(prompt, params, n_tokens, temperature, row):
    """What the row draws by its own generator, without a cache."""
    rng, ids = np.random.default_rng([7, row] if row else 7), list(prompt)
    for _ in range(n_tokens):
        logits = gpt2.gpt2(ids, **params, n_head=N_HEAD)[-1]
        ids.append(gpt2.sample(logits, rng, temperature))
    return ids[len(prompt) :]


def test_a_pass_runs_at_most_a_chunk(rng, params, monkeypatch):
    """Of all rows together; those that write go first, so that no prompt keeps them waiting."""
    prompts, passes, extend = random_prompts(rng, [20, 30, 2, 9]), [], kv_cache.extend_all

    def note(caches, new_ids, *rest):
        passes.append([len(ids) for ids in new_ids])
        return extend(caches, new_ids, *rest)

    monkeypatch.setattr(kv_cache, "extend_all", note)
    rows = kv_cache.generate(prompts, params, N_HEAD, 5, batch_size=3, chunk=8)
    assert rows == alone(prompts, params, 5)
    assert max(map(sum, passes)) == 8 and all(sizes == sorted(sizes) for sizes in passes)
    assert sum(map(sum, passes)) == sum(map(len, prompts)) + 4 * len(prompts)


def test_a_sampled_row_depends_on_the_seed_and_its_number_alone(rng, params):
    sampling = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 7}
    prompts = random_prompts(rng, [3, 8, 1, 15, 4])
    params = params | {"wte": params["wte"] / 8}  # or it might be sure of what comes
    rows = kv_cache.generate(prompts, params, N_HEAD, 12, **sampling)
    assert rows[:1] == alone(prompts[:1], params, 12, **sampling)  # the first as gpt2.py draws
    for batch_size in (1, 2, 4):
        again = kv_cache.generate(prompts, params, N_HEAD, 12, batch_size=batch_size, **sampling)
        assert again == rows
    others = random_prompts(rng, [30, 1, 1, 15, 9])
    others[3] = prompts[3]
    assert kv_cache.generate(others, params, N_HEAD, 7, **sampling)[3] == rows[3][:7]
    same = kv_cache.generate([prompts[0]] * 6, params, N_HEAD, 12, **sampling)
    assert len(set(map(tuple, same))) == 6  # rows differ though prompts do not
    samples = kv_cache.generate(prompts[:1], params, N_HEAD, 12, n_samples=6, **sampling)
    assert samples == same
    unseeded = [kv_cache.generate(prompts, params, N_HEAD, 12, temperature=1.0) for _ in "ab"]
    assert unseeded[0] != unseeded[1]


def test_samples_share_one_reading_of_the_prompt(rng, params, monkeypatch):
    n_run, plain = [], kv_cache.extend_all
    monkeypatch.setattr(
        kv_cache,
        "extend_all",
        lambda c, new, *a: n_run.append(sum(map(len, new))) or plain(c, new, *a),
    )
    prompts = random_prompts(rng, [20, 11])
    kv_cache.generate(prompts, params, N_HEAD, 5, n_samples=4, temperature=1.0, batch_size=3)
    # A further sample runs the prompt's last token again, for its logits.
    assert sum(n_run) == 20 + 11 + 2 * 3 + 2 * 4 * (5 - 1)


def test_the_batch_stays_full_and_within_its_memory(rng, params, monkeypatch):
    """The bound on caches and on a pass; done rows leave; waiting ones do not wait for the rest."""
    alive, passes, plain = weakref.WeakSet(), [], kv_cache.extend_all

    def counting(function):
        def make(*args, **kwargs):
            cache = function(*args, **kwargs)
            alive.add(cache)
            return cache

        return make

    def extend(caches, new_ids, *args):
        passes.append((len(caches), sum(map(len, new_ids)), len(alive)))
        return plain(caches, new_ids, *args)

    monkeypatch.setattr(kv_cache, "new_cache", counting(kv_cache.new_cache))
    monkeypatch.setattr(kv_cache, "copy_cache", counting(kv_cache.copy_cache))
    monkeypatch.setattr(kv_cache, "extend_all", extend)
    prompts = random_prompts(rng, rng.integers(1, 30, 12))
    kv_cache.generate(prompts, params, N_HEAD, 7, n_samples=2, batch_size=4, chunk=16)
    n_rows, n_tokens, n_alive = map(max, zip(*passes, strict=True))
    assert n_rows == 4 and n_tokens <= 16 and n_alive <= 5
    passes.clear()
    kv_cache.generate([[1]] * 9, params, N_HEAD, 7, batch_size=4)
    # 4 rows read and write 7 tokens in 7 passes, 4 more the same, and the last one is alone.
    assert [rows for rows, _, _ in passes] == [4] * 14 + [1] * 7


def test_long_prompts_do_not_hold_up_those_that_write(rng, params):
    for lengths, first in [([1, 30], 0), ([30, 1], 1)]:
        prompts = random_prompts(rng, lengths)
        stream = kv_cache.generate_stream(prompts, params, N_HEAD, 7, batch_size=2, chunk=4)
        assert [row for row, _, _ in stream] == [first] * 7 + [1 - first] * 7


@pytest.mark.parametrize("where", ["hidden_state", "next_logits"])
def test_a_batch_goes_on_after_passes_that_were_interrupted(rng, params, monkeypatch, where):
    """Every third one is: of rows that read, write, check guesses, wait for others and slide."""
    n_calls, module = [], slices if where == "hidden_state" else kv_cache
    plain = getattr(module, where)

    def stumble(*args, **rest):
        n_calls.append(1)
        x = plain(*args, **rest)
        if len(n_calls) % 3 == 0:
            raise KeyboardInterrupt
        return x

    prompts = [[1, 2, 3] * 7, *random_prompts(rng, [1, 20, 33])]
    prompts.append(prompts[2][:15] + [5, 5])
    sampling = {"temperature": 0.5, "seed": 7}
    how = {"lookup": 3, "slide": True, "chunk": 8}
    expected = kv_cache.generate(prompts, params, N_HEAD, 25, **sampling, **how)
    batch = kv_cache.Batch(params, N_HEAD, chunk=8)
    samplers = [Sampler(Sampling(0.5), 7, number) for number in range(5)]
    rows = [Row(prompts[i], 25, samplers[i], i, lookup=3) for i in range(5)]
    for row in rows:
        batch.admit(row)
    monkeypatch.setattr(module, where, stumble)
    n_interrupted = 0
    while batch.rows:
        try:
            batch.advance()
        except KeyboardInterrupt:
            n_interrupted += 1
    assert [row.ids for row in rows] == expected and n_interrupted > 10


def test_rows_that_guess_share_a_small_pass_evenly(params, monkeypatch):
    """Two rows that repeat one token, so that all guesses are right; a pass has four tokens."""
    passes, plain = [], kv_cache.extend_all

    def note(caches, new_ids, *rest):
        passes.append([len(ids) for ids in new_ids])
        return plain(caches, new_ids, *rest)

    monkeypatch.setattr(kv_cache, "extend_all", note)
    still, how = exclaiming(HPARAMS), {"lookup": 4, "chunk": 4}
    one, two = kv_cache.generate([[1, 2], [3, 4]], still, N_HEAD, 20, **how)
    assert one == two and len(one) == 20
    assert max(map(sum, passes)) == 4 and [2, 2] in passes
    assert all(max(sizes) - min(sizes) <= 1 for sizes in passes if len(sizes) == 2)
    assert all(len(sizes) == 2 for sizes in passes)  # neither waits for the other


def test_a_batch_has_as_many_rows_as_there_are_prompts_and_memory(rng, params, monkeypatch):
    passes, plain = [], kv_cache.extend_all

    def note(caches, new_ids, *rest):
        passes.append((len(caches), max(cache.kv.nbytes for cache in caches)))
        return plain(caches, new_ids, *rest)

    monkeypatch.setattr(kv_cache, "extend_all", note)

    def most_rows(n_prompts, n_tokens=3, **options):
        passes.clear()
        kv_cache.generate(random_prompts(rng, [2] * n_prompts), params, N_HEAD, n_tokens, **options)
        return max(n_rows for n_rows, _ in passes)

    assert [most_rows(n) for n in (1, 8, 32, 70)] == [1, 8, 32, 64]
    assert most_rows(9, n_samples=4) == 36 and most_rows(32, batch_size=5) == 5
    for n_tokens in (3, 35):  # a cache for 32 tokens, and one for 37, half as much while it grows
        monkeypatch.setattr(memory, "free_bytes", lambda: None)
        assert most_rows(32, n_tokens) == 32
        cache_bytes = max(n_bytes for _, n_bytes in passes)
        for n_rows in (1, 5, 31):
            free = 2 * n_rows * 1.5 * cache_bytes
            monkeypatch.setattr(memory, "free_bytes", lambda free=free: free + 1)
            assert most_rows(32, n_tokens) == n_rows
    monkeypatch.setattr(memory, "free_bytes", lambda: 1)
    assert most_rows(32) == 1
    for text in (kv_cache.generate_stream.__doc__, kv_cache.main.__doc__):
        words = " ".join(text.split())
        assert (
            "at most 64, and at most as many as fit, with their caches, into half of the" in words
        )


@pytest.mark.parametrize(
    "generate", [gpt2.generate, lambda ids, *a, **o: kv_cache.generate([ids], *a, **o)]
)
def test_a_misspelt_option_fails(params, generate):
    with pytest.raises(TypeError, match="temprature"):
        generate([1], params, N_HEAD, 3, temprature=1.0)


def test_the_last_token_may_be_the_stop(params):
    stream = kv_cache.generate_stream([[1]], params, N_HEAD, 4, stop=lambda ids: len(ids) == 4)
    assert list(stream)[-1][2] == "stop"


def test_a_row_that_has_ended_holds_no_cache(params, monkeypatch):
    caches, plain = [], kv_cache.new_cache

    def make(*args):
        cache = plain(*args)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(kv_cache, "new_cache", make)
    ended = 0
    for _, _, why in kv_cache.generate_stream([[1], [2]], params, N_HEAD, 3, batch_size=1):
        assert (caches[-1]() is None) == (why is not None)
        ended += why is not None
    assert ended == 2


def test_nothing_to_write_is_legal_and_runs_nothing(params, monkeypatch):
    monkeypatch.setattr(kv_cache, "extend_all", None)
    assert kv_cache.generate([[1], [2, 3]], params, N_HEAD, 0, n_samples=2) == [[]] * 4
    stream = kv_cache.generate_stream([[1]], params, N_HEAD, 0)
    assert list(stream) == [Event(0, None, "length")]


def test_a_full_context_is_legal_and_the_callers_lists_stay(rng, params):
    prompts = random_prompts(rng, [30, 1])
    before = [list(ids) for ids in prompts]
    assert kv_cache.generate(prompts, params, N_HEAD, 7) == alone(prompts, params, 7)
    assert prompts == before
    tuples = [tuple(ids) for ids in prompts]
    assert kv_cache.generate(tuples, params, N_HEAD, 7) == alone(prompts, params, 7)


def test_the_idea_at_its_simplest_is_what_all_the_rest_computes(rng, params):
    """Any cuts of a text, even token by token: one_text, extend and the whole text at once."""
    ids = rng.integers(HPARAMS["n_vocab"], size=37).tolist()
    whole = gpt2.hidden_state(ids, **params, n_head=N_HEAD)
    for cuts in ([37], [1] * 37, [5, 1, 1, 20, 3, 7]):
        simple, cache, start = (
            kv_cache.one_text(params, N_HEAD),
            kv_cache.new_cache(params, N_HEAD),
            0,
        )
        for n in cuts:
            some = ids[start : start + n]
            x = simple(some)
            np.testing.assert_allclose(x, whole[start : start + n], atol=1e-5)
            theirs = kv_cache.extend_all([cache], [some], params, N_HEAD)
            np.testing.assert_allclose(x, theirs, atol=1e-5)
            assert x.dtype == np.float32
            start += n


def test_guesses_and_sliding_go_together(rng, params):
    ids = [1, 2, 3] * 10
    for n_ctx in (12, 37):
        short = params | {"wpe": params["wpe"][:n_ctx]}
        plain = kv_cache.generate([ids], short, N_HEAD, 70, slide=True)
        assert kv_cache.generate([ids], short, N_HEAD, 70, slide=True, lookup=4) == plain
        assert plain[0] == gpt2.generate(ids, short, N_HEAD, 70, slide=True)


@pytest.mark.parametrize("n_ctx", [1, 2, 5, 8])
def test_a_text_that_slides_is_the_same_with_and_without_a_cache(rng, n_ctx):
    """Prompts shorter and longer than the context; greedy and sampled; alone and in a batch."""
    params = random_params(rng, HPARAMS | {"n_ctx": n_ctx})
    prompts = random_prompts(rng, [1, n_ctx, n_ctx + 1, 3 * n_ctx, 2])
    expected = alone(prompts, params, 3 * n_ctx + 4, slide=True)
    for batch_size, chunk in ((1, 512), (2, 3), (8, 1)):
        how = {"batch_size": batch_size, "chunk": chunk, "slide": True}
        assert kv_cache.generate(prompts, params, N_HEAD, 3 * n_ctx + 4, **how) == expected
    sampling = {"temperature": 1.0, "seed": 7, "slide": True}
    for ids in prompts:
        samples = kv_cache.generate([ids], params, N_HEAD, 20, n_samples=2, **sampling)
        assert samples[0] == alone([ids], params, 20, **sampling)[0]
        assert len(samples[1]) == 20


def test_what_slides_keeps_half_a_context(rng, params):
    """By gpt2.gpt2 alone: the ids that the model sees, written out."""
    ids = rng.integers(0, 61, 30).tolist()
    seen, wanted = list(ids), []
    for _ in range(60):
        if len(seen) == 38:  # n_ctx is 37
            seen = seen[-18:]
        wanted.append(int(gpt2.gpt2(seen, **params, n_head=N_HEAD)[-1].argmax()))
        seen.append(wanted[-1])
    assert gpt2.generate(ids, params, N_HEAD, 60, slide=True) == wanted
    assert gpt2.generate(ids, params, N_HEAD, 7, slide=True) == alone([ids], params, 7)[0]
    with pytest.raises(ValueError, match="37 positions"):
        gpt2.generate(ids, params, N_HEAD, 60)


WRONG = {
    "no prompts": ([], {}, "no prompts"),
    "a long row": ([[1], [1] * 30, [1]], {}, "prompt 2 of 3: 30 prompt tokens + 8 to generate"),
    "an empty row": ([[1], [1], []], {}, "prompt 3 of 3: the prompt has no tokens"),
    "a negative id": ([[1], [-1]], {}, "prompt 2 of 2: an id is not in 0 .. 60"),
    "a large id": ([[1, 61]], {}, "prompt 1 of 1: an id is not in 0 .. 60"),
    "batch_size": ([[1]], {"batch_size": 0}, "batch_size must be 1 or more, not 0"),
    "n_samples": ([[1]], {"n_samples": 0}, "n_samples must be 1 or more"),
    "chunk": ([[1]], {"chunk": 0}, "chunk must be 1 or more"),
    "lookup": ([[1]], {"lookup": -1}, "lookup must be a number of guesses, or 0 for none, not -1"),
    "temperature": ([[1]], {"temperature": -1.0}, "temperature must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_clear_error_before_any_work(params, monkeypatch, case):
    monkeypatch.setattr(kv_cache, "extend_all", None)
    prompts, options, words = WRONG[case]
    with pytest.raises(ValueError) as raised:
        kv_cache.generate(prompts, params, N_HEAD, 8, **options)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("chunk", [5, 512])
def test_a_common_beginning_is_read_once(rng, params, monkeypatch, batch_size, chunk):
    """By rows that begin together, and by those that come when others write or have just ended."""
    common = rng.integers(0, 61, 18).tolist()
    prompts = [common + rest for rest in random_prompts(rng, [3, 1, 5, 2, 4, 3])]
    expected, n_run, plain = alone(prompts, params, 6), [], kv_cache.extend_all
    monkeypatch.setattr(
        kv_cache,
        "extend_all",
        lambda caches, new, *rest: n_run.append(sum(map(len, new))) or plain(caches, new, *rest),
    )
    how = {"batch_size": batch_size, "chunk": chunk, "lookup": 0}  # no guesses among what is run
    ours = kv_cache.generate(prompts, params, N_HEAD, 6, **how)
    assert ours == expected
    n_distinct = sum(len(set(map(tuple, (p[:n] for p in prompts)))) for n in range(1, 19))
    n_rest = sum(map(len, prompts)) - 6 * 18
    assert n_distinct == 18 and sum(n_run) <= 18 + n_rest + 6 * (6 - 1)


def test_what_another_row_has_written_is_not_read_again(rng, params, monkeypatch):
    """A conversation: the second prompt is the first, its answer, and more."""
    first = rng.integers(0, 61, 12).tolist()
    answer, n_run, plain = alone([first], params, 6)[0], [], kv_cache.extend_all
    second = first + answer + [1, 2]
    expected = alone([second], params, 5)
    batch = kv_cache.Batch(params, N_HEAD)
    batch.admit(greedy_row(first, 10))
    for _ in range(8):
        batch.advance()
    monkeypatch.setattr(
        kv_cache,
        "extend_all",
        lambda c, new, *a: n_run.append(list(map(len, new))) or plain(c, new, *a),
    )
    row = greedy_row(second, 5)
    batch.admit(row)
    batch.advance()
    assert n_run == [[1, 2]] and row.ids == expected[0][:1]


def greedy_row(prompt, n_tokens, **fields):
    return Row(prompt, n_tokens, Sampler(Sampling()), **fields)


def test_rows_join_and_leave_between_passes(rng, params):
    """As a server drives it: one comes while others write, one is taken out half-way."""
    prompts = random_prompts(rng, [20, 4, 20])
    prompts[2] = prompts[0][:15] + prompts[2][15:]
    expected, batch = alone(prompts, params, 8), kv_cache.Batch(params, N_HEAD, chunk=5)
    made = [greedy_row(p, 8) for p in prompts]
    batch.admit(made[0])
    batch.admit(made[2])  # waits for what made[0] is to read ...
    batch.advance()
    assert made[2].cache is None
    batch.rows.remove(made[0])
    made[0].end = "cancelled"  # ... and reads the rest itself
    batch.admit(made[1])
    while batch.rows:
        batch.advance()
    assert [row.ids for row in made[1:]] == expected[1:] and made[0].ids == []
    assert [row.end for row in made] == ["cancelled", "length", "length"]


def test_a_row_waits_for_its_source_no_longer_than_it_must():
    n = generation_rows.MIN_SHARED

    def source_with(n_read, end=None):
        cache = None if n_read is None else kv_cache.Cache(None, n_read)
        return greedy_row([*range(n), 50, 51, 52], 9, ids=[53], cache=cache, end=end)

    for n_read, end, n_copied in [
        (n - 1, None, None), (n, None, n), (n + 2, None, n), (n - 1, "stop", n - 1), (0, "stop", 0),
    ]:  # fmt: skip
        row = greedy_row([*range(n), 40], 1)
        row.find_source([source_with(n_read, end)])
        assert row.n_shared == n and row.n_to_copy() == n_copied
    row = greedy_row([*range(n), 40], 1)
    row.find_source([source_with(None, "dropped")])  # before it read anything
    assert row.n_to_copy() == 0
    source = source_with(n + 3)
    for prompt, n_copied in [
        ([*range(n - 1), 40, 41], 0),  # one token less in common is not worth it
        ([*range(n)], 0),  # its last one must run, whatever others have read
        ([*range(n), 50], n),
        ([*range(n), 50, 51, 52, 60], n + 3),
        ([*range(n), 50, 51, 52, 53, 60], None),  # 53 is written, but runs in the next pass
    ]:
        row = greedy_row(prompt, 1)
        row.find_source([source])
        assert row.n_to_copy() == n_copied
        assert row.source is (None if n_copied == 0 else source)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_lookup_changes_no_token(data):
    """Of few different tokens, so that guesses are made, right and wrong; greedy and drawn."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    params = random_params(rng, HPARAMS)
    n_tokens = data.draw(st.integers(0, 20), label="n_tokens")
    temperature = data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="temperature")
    lookup = data.draw(st.integers(1, 9), label="lookup")
    prompts = [rng.integers(0, 3, n).tolist() for n in data.draw(
        st.lists(st.integers(1, 17), min_size=1, max_size=4), label="lengths"
    )]  # fmt: skip
    options = {
        "temperature": temperature, "seed": 7, "endoftext": data.draw(st.integers(0, 60)),
        "stop": lambda ids: ids[-1] == 5, "chunk": data.draw(st.integers(1, 40)),
    }  # fmt: skip
    plain = list(kv_cache.generate_stream(prompts, params, N_HEAD, n_tokens, **options))
    fast = kv_cache.generate_stream(prompts, params, N_HEAD, n_tokens, **options, lookup=lookup)
    in_order = [sorted(events, key=lambda e: e[0]) for events in (plain, list(fast))]
    assert in_order[0] == in_order[1]


@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.8", "--seed", "5"]], ids=str)
def test_a_single_text_is_guessed_by_default_and_stays_the_same(monkeypatch, sampling):
    """Of the shipped model, which repeats itself if it is greedy."""
    passes, plain = [], kv_cache.extend_all

    def note(caches, new_ids, *rest):
        passes.append([len(ids) for ids in new_ids])
        return plain(caches, new_ids, *rest)

    monkeypatch.setattr(kv_cache, "extend_all", note)
    words = ["ROMEO:\nO, ", "--model_size", "shakespeare", "-n", "160", *sampling]
    wanted = call("kv_cache.py", *words, "--lookup", "0")
    assert wanted[0] == 0 and max(passes[1:]) == [1]
    n_plain = len(passes)
    assert call("kv_cache.py", *words) == wanted
    guessed = passes[n_plain + 1 :]
    assert [1 + kv_cache.LOOKUP] in guessed and len(guessed) < n_plain
    passes.clear()
    assert call("kv_cache.py", *words, "JULIET:")[0] == 0  # several texts: no guesses
    assert all(sizes in ([1], [1, 1]) for sizes in passes[2:])


def test_lookup_writes_a_text_that_repeats_in_fewer_passes(params, monkeypatch):
    passes, plain = [], kv_cache.extend_all
    monkeypatch.setattr(
        kv_cache, "extend_all", lambda c, new, *a: passes.append(len(new[0])) or plain(c, new, *a)
    )
    still = exclaiming(HPARAMS)  # always the same token
    (ids,) = kv_cache.generate([[1, 2]], still, N_HEAD, 30, lookup=4)
    n_lookup = len(passes)
    assert [ids] == kv_cache.generate([[1, 2]], still, N_HEAD, 30, lookup=0)
    assert len(set(ids)) == 1
    assert n_lookup <= 4 + 30 / 5 and max(passes[1:]) == 5 and len(passes) == n_lookup + 30


def test_lookup_gives_up_where_it_guesses_wrong(monkeypatch):
    """One guess at first, then one for 16 tokens at the most: a bound on what it costs."""
    trust, n_guesses = 1.0, 0
    for _ in range(160):
        guessed = 4 if trust >= 1 else 0
        n_guesses += guessed > 0
        trust = lookup.new_trust(trust, guessed, n_right=0)
    assert n_guesses == 1 + 160 // 17


# --------------------------------------------------------------------------------------------------
# Stop strings
# --------------------------------------------------------------------------------------------------


@given(pieces=st.lists(st.text("ab\n", max_size=4), max_size=12), stop=st.text("ab\n", min_size=1))
def test_cut_ends_before_the_stop_wherever_the_pieces_break(pieces, stop):
    text = "".join(pieces)
    shown = list(up_to(iter(pieces), [stop]))
    assert "".join(shown) == text.split(stop)[0]
    assert "".join(up_to(iter(pieces), [])) == text


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
)
def test_of_several_stops_the_one_that_is_there_first_counts(pieces, stops):
    text = wanted = ""
    for piece in pieces:
        text = wanted = text + piece
        if found := [text.index(stop) for stop in stops if stop in text]:
            wanted = text[: min(found)]
            break
    assert "".join(up_to(iter(pieces), stops)) == wanted


def test_up_to_shows_text_as_soon_as_it_is_sure():
    taken = []

    def pieces():
        for piece in ("Hel", "lo, E", "nough E", "ND of", " it"):
            taken.append(piece)
            yield piece

    stream = up_to(pieces(), ["END"])
    assert next(stream) == "Hel" and taken == ["Hel"]
    assert next(stream) == "lo, " and next(stream) == "Enough " and list(stream) == [""]
    assert taken[-1] == "ND of"  # nothing after the stop is even asked for


@given(
    text=st.text("aé中🙂\n", max_size=20), stops=st.lists(st.text("aé中\n", min_size=1), max_size=3)
)
def test_a_row_ends_with_the_token_that_completes_a_stop(text, stops):
    encoder = Encoder([])  # every byte a token, so that characters have several
    ids = encoder.encode(text)
    found = [any(s in encoder.decode(ids[:n]) for s in stops) for n in range(1, len(ids) + 1)]
    n_first = found.index(True) + 1 if True in found else len(ids)
    stop = stops_with(stops, encoder)
    assert stops or stop is None
    if stops:
        assert [stop(ids[:n]) for n in range(1, n_first + 1)] == found[:n_first]


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def command(models_dir, args, model="tiny"):
    where = ["--model_size", model, "--models_dir", str(models_dir)]
    return [sys.executable, str(REPO / "kv_cache.py"), *args, *where]


def run(models_dir, *args, stdin=b""):
    flags = ["--model_size", "tiny"]
    return conftest.call("kv_cache.py", *args, *flags, models_dir=models_dir, input=stdin)


def expected(params, prompt, n_tokens, **options):
    encoder = Encoder([])
    ids = encoder.encode(prompt) or [encoder.endoftext]
    options |= {"endoftext": encoder.endoftext}
    return gpt2.generate(ids, params, N_HEAD, n_tokens, **options)


@pytest.mark.parametrize("prompt", ["Alan Turing", "1984", "None", "", "-", "héllo 🙂"])
def test_one_prompt_prints_what_gpt2_prints(models, prompt):
    text = Encoder([]).decode(expected(models[1], prompt, 20)) + "\n"
    assert run(models[0], prompt, "--n_tokens_to_generate", "20") == (0, text, "")
    sampling = ["--temperature", "0.8", "--top_k", "40", "--top_p", "0.9", "--seed", "7"]
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 7}
    text = Encoder([]).decode(expected(models[1], prompt, 20, **options)) + "\n"
    assert run(models[0], prompt, "--n_tokens_to_generate", "20", *sampling) == (0, text, "")


def test_several_prompts_come_in_order_and_marked(models):
    prompts = ["One", "A second, longer one", "", 'a "third"\nof two lines']
    code, out, err = run(models[0], *prompts, "--n_tokens_to_generate", "9", "--batch_size", "2")
    texts = [Encoder([]).decode(expected(models[1], prompt, 9)) for prompt in prompts]
    titles = ['"One"', '"A second, longer one"', '""', '"a \\"third\\"\\nof two lines"']
    entries = [f"==> {title} <==\n{text}\n\n" for title, text in zip(titles, texts, strict=True)]
    assert (code, out, err) == (0, "".join(entries), "")


def test_jsonl_is_for_programs(models):
    prompts = ["One", "A second, longer one", "ünï"]
    code, out, err = run(models[0], *prompts, "--n_tokens_to_generate", "9", "--jsonl")
    entries = [json.loads(line) for line in out.splitlines()]
    assert (code, err, len(entries)) == (0, "", 3)
    for prompt, entry in zip(prompts, entries, strict=True):
        ids = expected(models[1], prompt, 9)
        why = "length" if len(ids) == 9 else "endoftext"
        text = Encoder([]).decode(ids)
        where = {"index": prompts.index(prompt), "sample": 0}
        assert entry == {"prompt": prompt, "text": text, "ids": ids, "stop": why} | where


def test_a_stop_string_ends_a_row_before_it():
    """With the shipped model, whose greedy text is made of letters; 3 of them end it."""
    where = ["--model_size", "shakespeare", "--n_tokens_to_generate", "60"]
    encoder, hparams, params = utils.load_encoder_hparams_and_params("shakespeare")
    full = encoder.decode(gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 60))
    stop = full[20:23]
    wanted = full[: full.index(stop)]
    command = [sys.executable, REPO / "kv_cache.py", "ROMEO:", *where, f"--stop={stop}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted + "\n", "")
    done = subprocess.run([*command, "--jsonl"], capture_output=True, text=True, timeout=120)
    entry = json.loads(done.stdout)
    assert (entry["text"], entry["stop"]) == (wanted, "stop")
    assert encoder.decode(entry["ids"]).endswith(stop)


def test_stops_may_be_several_and_have_escapes(models, monkeypatch, capsys):
    """A model that writes "!" alone, and so the text of its stops; then what escapes mean."""
    utils.save_model(models[0] / "loud", Encoder([]), TINY, exclaiming(TINY))
    where = ["--model_size", "loud", "-n", "9"]
    for stops, text in ((["!!!", "!!!!"], ""), (["?", "x!"], "!" * 9)):
        args = [f"--stop={stop}" for stop in stops]
        done = conftest.run("kv_cache.py", "Once", *where, *args, models_dir=models[0])
        assert done == (0, text + "\n", "")
    assert terminal.unescape(r"\n\t\\n\x \\\n") == "\n\t\\n\\x \\\n"
    seen = []
    monkeypatch.setattr(terminal, "print_stream", lambda *args: seen.append(args[-1]))
    how = {"model_size": "loud", "models_dir": str(models[0])}
    kv_cache.main("Once", stop=(r"\n\n", "é"), **how)
    kv_cache.main("Once", **how)
    assert seen == [["\n\n", "é"], []]


def test_an_echo_is_the_prompt_before_its_text(models):
    texts = [Encoder([]).decode(expected(models[1], prompt, 5)) for prompt in ("One ", "Two")]
    args = ["--echo", "-n", "5"]
    assert run(models[0], "One ", *args) == (0, f"One {texts[0]}\n", "")
    wanted = f'==> "One " <==\nOne {texts[0]}\n\n==> "Two" <==\nTwo{texts[1]}\n\n'
    assert run(models[0], "One ", "Two", *args) == (0, wanted, "")
    assert json.loads(run(models[0], "Two", *args, "--jsonl")[1])["text"] == "Two" + texts[1]


def test_jsonl_before_a_prompt_leaves_it_alone(models):
    code, out, err = run(models[0], "--jsonl", "One", "-n", "2")
    assert (code, json.loads(out)["prompt"], err) == (0, "One", "")


def test_flags_that_change_nothing_are_said_on_a_terminal(models, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    words = "notice: at temperature 0, top_k, top_p and min_p change nothing, "
    words += "and all samples are equal\n"
    for how, wanted in (
        ({"top_k": 5}, words),
        ({"top_p": 0.5}, words),
        ({"n_samples": 2}, words),
        ({"n_samples": 2, "temperature": 1.0}, ""),
        ({}, ""),
    ):
        where = {"model_size": "tiny", "models_dir": str(models[0])}
        kv_cache.main("a", n_tokens_to_generate=1, **how, **where)
        assert capsys.readouterr().err == wanted


# --------------------------------------------------------------------------------------------------
# Lines typed, one after the other
# --------------------------------------------------------------------------------------------------


def test_interactive_lines_are_continued_one_by_one(models):
    lines = ["One", "x" * 99, "", "ünï"]
    args = ["--interactive", "-n", "5", "--echo"]
    code, out, err = run(models[0], *args, stdin="\n".join(lines).encode())
    texts = [
        line + Encoder([]).decode(expected(models[1], line, 5)) for line in lines[:1] + lines[2:]
    ]
    assert (code, out) == (0, "".join(text + "\n" for text in texts))
    assert err == (
        "error: prompt 1 of 1: 99 prompt tokens + 5 to generate = 104, but this model has only 48 "
        "positions (n_ctx)\n"
    )


@on_linux
def test_a_terminal_without_prompts_is_interactive_and_ctrl_c_stops_one_text(tmp_path):
    """On a pseudo-terminal: a text that never ends by itself, stopped; a second one; Ctrl-D."""
    hparams = TINY | {"n_ctx": 4096, "n_embd": 64}
    utils.save_model(tmp_path / "slow", Encoder([]), hparams, exclaiming(hparams))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(tmp_path, ["-n", "4000"], "slow"), stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    try:
        for line in (b"One\n", b"Two\n"):
            read_until(ours, b"> ")
            os.write(ours, line)
            read_until(ours, b"!!!")
            os.write(ours, b"\x03")
        read_until(ours, b"> ")
        assert process.poll() is None
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal, wanted):
    """Waits, for a minute at most, for these bytes."""
    seen = b""
    while wanted not in seen:
        assert select.select([terminal], [], [], 60)[0], seen
        seen += os.read(terminal, 1024)


@pytest.mark.parametrize("where", ["a file", "standard input"])
def test_prompts_from_a_file_a_line_each(models, tmp_path, where):
    lines = "One\n\nA third, \r\nünï\u2028still one\n".encode()  # \u2028 does not end a line
    prompts = ["One", "", "A third, ", "ünï\u2028still one"]
    (tmp_path / "prompts.txt").write_bytes(lines)
    path = "-" if where == "standard input" else str(tmp_path / "prompts.txt")
    args = ["--prompts_file", path, "--n_tokens_to_generate", "4", "--jsonl"]
    code, out, err = run(models[0], *args, stdin=lines)
    assert (code, err) == (0, "")
    entries = [json.loads(line) for line in out.split("\n")[:-1]]
    assert [entry["prompt"] for entry in entries] == prompts and "ünï" in out
    assert [entry["ids"] for entry in entries] == [expected(models[1], p, 4) for p in prompts]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(models, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfOne\r\nTw\xef\xbb\xbfo\r\n")
    assert terminal.read_lines(tmp_path / "prompts.txt") == ["One", "Tw\ufeffo"]


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(models, tmp_path, monkeypatch):
    """Its ids would take many times its bytes. One that might fit is encoded to know."""
    lines, how = ["One", "x" * 10**6], {"model_size": "tiny", "models_dir": str(models[0])}
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    plain, encoded = Encoder.encode, []
    monkeypatch.setattr(Encoder, "encode", lambda *a: encoded.append(len(a[1])) or plain(*a))
    words = "prompt 2 of 2: a prompt of 1000000 characters, but this model has only 48 positions"
    with pytest.raises(ValueError, match=words):
        kv_cache.main(prompts_file=str(tmp_path / "prompts.txt"), **how)
    assert encoded == [3]
    with pytest.raises(ValueError, match="prompt 1 of 1: 100 prompt tokens"):
        kv_cache.main("x" * 100, **how)


@pytest.mark.parametrize("flag", ["--prompts_file=-", "--interactive"])
def test_a_closed_standard_input_is_one_line(models, flag):
    line = " ".join(map(str, command(models[0], [flag]))) + " <&-"
    done = subprocess.run(line, shell=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: standard input is closed\n"


def test_text_is_shown_as_it_is_produced(tmp_path, monkeypatch):
    utils.save_model(tmp_path / "loud", Encoder([]), TINY, exclaiming(TINY))
    shown, seen = io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(shown, "flush", lambda: seen.append(shown.getvalue()))
    kv_cache.main("Once", n_tokens_to_generate=5, model_size="loud", models_dir=str(tmp_path))
    assert sorted(set(seen)) == ["!" * n for n in range(1, 6)] and shown.getvalue() == "!!!!!\n"


def test_samples_of_one_prompt(models):
    args = ["Once", "--n_tokens_to_generate", "9", "--temperature", "1", "--seed", "3"]
    code, out, err = run(models[0], *args, "--n_samples", "3")
    texts = [
        Encoder([]).decode(ids)
        for ids in kv_cache.generate(
            [Encoder([]).encode("Once")], models[1], N_HEAD, 9, temperature=1.0, seed=3,
            endoftext=256, n_samples=3,
        )
    ]  # fmt: skip
    entries = [f'==> "Once" (sample {i} of 3) <==\n{text}\n\n' for i, text in enumerate(texts, 1)]
    assert (code, out, err) == (0, "".join(entries), "") and len(set(texts)) > 1


def test_samples_of_several_prompts_name_their_own(models):
    args = ["One", "Two", "--n_samples", "2", "--n_tokens_to_generate", "2", "--jsonl"]
    entries = [json.loads(line) for line in run(models[0], *args)[1].splitlines()]
    assert [entry["prompt"] for entry in entries] == ["One", "One", "Two", "Two"]
    assert [(entry["index"], entry["sample"]) for entry in entries] == [*np.ndindex(2, 2)]
    out = run(models[0], *args[:-1])[1]
    titles = [line for line in out.split("\n") if line.startswith("==> ")]
    assert titles == [
        f'==> "{word}" (sample {i} of 2) <==' for word in ("One", "Two") for i in "12"
    ]


def test_rows_that_end_out_of_order_are_all_printed(capsys):
    steps = [Event(1, 5, None), Event(0, 6, None), Event(2, 7, "stop")]
    steps += [Event(1, 5, "length"), Event(0, 6, "length")]
    terminal.print_rows(iter(steps), ["a", "b", "c"], 1, 2, Encoder([]), [], True, bar=False)
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["prompt"] for entry in entries] == ["a", "b", "c"]


def test_the_bar_counts_tokens_and_ends_full(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    steps = [Event(0, 6, None), Event(1, 7, "stop")]
    steps += [Event(0, 6, "length"), Event(2, None, "endoftext")]
    terminal.print_rows(iter(steps), ["a", "b", "c"], 1, 2, Encoder([]), [], True, bar=True)
    assert " 0/6 " in screen.getvalue() and " 3/3 " in screen.getvalue().split("\r")[-1]
    screen.truncate(0)
    terminal.print_rows(iter(steps), ["a", "b", "c"], 1, 2, Encoder([]), [], True, bar=False)
    assert screen.getvalue() == ""


def test_prompts_of_a_file_have_a_bar(models, tmp_path, monkeypatch):
    (tmp_path / "prompts").write_text("One\nTwo\n")
    bars, how = [], {"model_size": "tiny", "models_dir": str(models[0])}
    monkeypatch.setattr(terminal, "print_rows", lambda *_, bar, echo: bars.append(bar))
    kv_cache.main("One", "Two", **how)
    kv_cache.main(prompts_file=str(tmp_path / "prompts"), **how)
    assert bars == [False, True]


def test_a_title_is_the_prompt_as_it_was(capsys):
    terminal.print_rows(
        iter([Event(0, 0, "length")]), ['é "中"\n'], 1, 1, Encoder([]), [], False, bar=False
    )
    assert capsys.readouterr().out == '==> "é \\"中\\"\\n" <==\n!\n\n'


def test_no_tokens_are_legal(models):
    assert run(models[0], "Once", "--n_tokens_to_generate", "0") == (0, "\n", "")
    code, out, err = run(models[0], "Once", "--n_tokens_to_generate", "0", "--jsonl")
    entry = {"prompt": "Once", "text": "", "ids": [], "stop": "length", "index": 0, "sample": 0}
    assert (code, json.loads(out), err) == (0, entry, "")


BAD = {
    "no prompts": ([], "no prompts"),
    "too many prompts": (["One", "--interactive"], "--interactive reads prompts as you type"),
    "an empty file": (["--prompts_file", os.devnull], "no prompts"),
    "no such file": (["--prompts_file", "nowhere.txt"], "nowhere.txt"),
    "a folder": (["--prompts_file", "."], "."),
    "a long row": (["One", "x" * 45], "prompt 2 of 2: 45 prompt tokens"),
    "a long row alone": (["x" * 45], "45 prompt tokens"),
    "batch_size": (["One", "--batch_size", "0"], "batch_size must be"),
    "n_samples": (["One", "--n_samples", "-1"], "n_samples must be"),
    "stop": (["One", "--stop", ""], "--stop is empty"),
    "temperature": (["One", "--temperature", "nan"], "temperature must be"),
    "a number": (["One", "--batch_size", "many"], "--batch_size: expected a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_ends_in_one_line_and_exit_code_2(models, case):
    args, words = BAD[case]
    code, out, err = run(models[0], *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_what_is_left_out_means_the_same_everywhere():
    functions = (gpt2.generate_stream, gpt2.main, kv_cache.generate_stream, kv_cache.main)
    functions += (Sampling, gpt2.sample)
    defaults = [inspect.signature(function).parameters for function in functions]
    name = "n_tokens_to_generate"  # left out of a chat, it means another number
    defaults[3] = dict(defaults[3]) | {name: defaults[3][name].replace(default=kv_cache.N_TOKENS)}
    for mine, others in itertools.permutations(defaults, 2):
        for name in mine.keys() & others.keys():
            if others[name].default is not inspect.Parameter.empty:
                assert mine[name].default in (others[name].default, inspect.Parameter.empty), name


def test_sampling_is_checked_before_a_model_is_looked_for():
    code, out, err = conftest.call("kv_cache.py", "One", "--top_p=0", "--model_size=nowhere")
    assert (code, out) == (2, "") and err.startswith("error: top_p must be")


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.slow
def test_ctrl_c_prints_what_there_is(models, jsonl):
    """The model is big enough to be slow."""
    hparams = TINY | {"n_ctx": 4096, "n_embd": 256, "n_layer": 8}
    utils.save_model(models[0] / "slow", Encoder([]), hparams, exclaiming(hparams))
    args = ["One", "Two", "Three", "--n_tokens_to_generate", "4000", "--batch_size", "2"]
    args += ["--jsonl"] if jsonl else []
    process = subprocess.Popen(
        command(models[0], args, "slow"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    if jsonl:
        entries = [json.loads(line) for line in out.splitlines()]
        assert [entry["prompt"] for entry in entries] == ["One", "Two"]  # "Three" never began
        for entry in entries:
            assert entry["stop"] == "interrupted" and set(entry["text"]) == {"!"}
            assert 0 < len(entry["ids"]) == len(entry["text"]) < 4000
    else:
        assert out.startswith(b'==> "One" <==\n!!!') and b'\n==> "Two" <==\n!!!' in out
