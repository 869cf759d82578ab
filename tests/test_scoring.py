"""training/scoring.py: evaluate.py's figures, compiled, on one device and on eight."""

import functools
import json
import math
import os
import secrets
from dataclasses import replace

import conftest
import jax
import numpy as np
import pytest
from conftest import TINY, random_params, slow
from test_evaluate import (
    HELLASWAG,
    LAMBADA,
    N_CTX,
    N_HEAD,
    accuracy,
    random_items,
    write,
    write_lines,
)

import evaluate
from evaluation import tasks
from training import devices, scoring
from training.attention import fused_attention
from training.state import resize_vocab

N_VOCAB = TINY["n_vocab"]


@pytest.fixture(scope="module")
def params():
    seed = secrets.randbits(32)
    print("seed", seed)
    return random_params(np.random.default_rng(seed), TINY)


@pytest.fixture(
    scope="module", params=[slow("one device"), slow("eight"), "eight, sharded and padded"]
)
def score_rows(request, params):
    """load_scorer's, and as the trainer has it: parameters spread, rows of wte that are no ids."""
    mesh = devices.make_mesh(1 if request.param == "one device" else 8)
    sharded = "sharded" in request.param
    tree = resize_vocab(params, 384) if sharded else params
    tree = devices.put(tree, devices.spread(tree, mesh, fsdp=sharded))
    attend = fused_attention if sharded else None
    scorer = scoring.make_scorer(mesh, N_HEAD, N_CTX, N_VOCAB, attend=attend)
    return functools.partial(scorer, tree)


@pytest.mark.parametrize("n_tokens, stride", [(1, None), (47, None), (131, 7), (400, 48)])
def test_perplexity_is_numpys(rng, params, score_rows, n_tokens, stride):
    ids = rng.integers(0, N_VOCAB, n_tokens + 1)
    theirs = evaluate.perplexity(ids, 10, 300, params, N_HEAD, stride)
    ours = evaluate.perplexity(ids, 10, 300, params, N_HEAD, stride, score_rows)
    assert (
        ours.keys() == theirs.keys()
        and abs(ours["nats_per_token"] - theirs["nats_per_token"]) < 1e-4
    )
    for key, value in theirs.items():
        assert math.isclose(ours[key], value, rel_tol=1e-4)


def test_endings_are_scored_as_in_numpy(rng, params, score_rows):
    items = random_items(rng, 9) + random_items(rng, 3, n_endings=2, longest=48)
    expected = evaluate.score_items(items, params, N_HEAD)
    found = list(scoring.score_items(items, score_rows))
    assert len(found) == 12
    for item, scores in found:
        theirs = expected[next(i for i, other in enumerate(items) if other is item)]
        for (log_probs, hits), (there, hits_there) in zip(scores, theirs, strict=True):
            np.testing.assert_allclose(log_probs, there, rtol=0, atol=2e-4)
            assert hits.tolist() == hits_there.tolist() and log_probs.dtype == np.float32


def test_accuracies_are_numpys(rng, params, score_rows):
    items = []
    for item in random_items(rng, 60):
        (scores,) = evaluate.score_items([item], params, N_HEAD)
        for f in (np.sum, np.mean):
            values = sorted(f(log_probs) for log_probs, _ in scores)
            if values[-1] - values[-2] < 1e-2:  # float32 might choose the other
                break
        else:
            sums = [log_probs.sum() for log_probs, _ in scores]
            items.append(
                replace(item, label=int(np.argmax(sums)) if len(items) % 2 else item.label)
            )
    theirs = accuracy(items, tasks.mark_hellaswag, params, N_HEAD)
    scored = scoring.score_items(items, score_rows)
    assert tasks.accuracy(items, tasks.mark_hellaswag, scored) == theirs
    assert 0.5 <= theirs["acc"] < 1

    words = [replace(item, endings=item.endings[:1]) for item in items]
    theirs = accuracy(words, tasks.mark_lambada, params, N_HEAD)
    scored = scoring.score_items(words, score_rows)
    assert tasks.accuracy(words, tasks.mark_lambada, scored) == theirs


def test_few_shapes_are_compiled_and_their_size_is_bounded(rng, params, monkeypatch):
    """Of 500 rows of any length: a power of two of tokens in each, and no pass above the limit."""
    monkeypatch.setattr(scoring, "TOKENS", 8 * 256)
    monkeypatch.setattr(scoring, "LOGITS", 100 * N_VOCAB)
    seen, chunks = set(), set()

    def look(params, tokens, n_head, n_vocab, n_chunks, attend):
        seen.add(tokens.shape)
        chunks.add((*tokens.shape, n_chunks))
        return np.zeros((len(tokens), tokens.shape[1] - 1)), tokens[:, 1:] == 0

    monkeypatch.setattr(scoring, "score_tokens", look)
    mesh = devices.make_mesh(2)
    items = random_items(rng, 125)
    scorer = scoring.make_scorer(mesh, N_HEAD, N_CTX, N_VOCAB)
    assert len(list(scoring.score_items(items, functools.partial(scorer, params)))) == 125
    most = {17: 2 * 16, 33: 2 * 8, 49: 2 * 5}  # fewer, where there are few of such a length
    assert 2 <= len(seen) <= 6 and {n for _, n in seen} <= most.keys()
    for n_rows, n in seen:
        assert n_rows == most[n] or n_rows < most[n] and n_rows.bit_count() == 1
    assert len(chunks) == len(seen)
    for n_rows, n, n_chunks in chunks:  # the fewest that leave a device 100 rows of logits a chunk
        assert n_rows // 2 * (n - 1) <= 100 * n_chunks and n_chunks.bit_count() == 1
        assert n_chunks == 1 or n_rows // 2 * (n - 1) > 100 * (n_chunks // 2)


def test_the_parameters_stay_where_they_are(params, monkeypatch):
    """Spread over eight devices, they are not put anywhere again, nor is a copy left."""
    mesh, sent, put = devices.make_mesh(8), [], scoring.put
    tree = devices.put(params, devices.spread(params, mesh, fsdp=True))
    monkeypatch.setattr(scoring, "put", lambda x, to: sent.append(x.shape) or put(x, to))
    scorer = scoring.make_scorer(mesh, N_HEAD, N_CTX, N_VOCAB)
    before = {id(x) for x in jax.live_arrays()}
    answers = list(scorer(tree, [(np.arange(17), 3)] * 9))
    assert sent == [(16, 17)] and len(answers) == 9
    assert {id(x) for x in jax.live_arrays()} <= before


def test_chunks_of_logits_change_nothing(rng, params):
    tokens = rng.integers(0, N_VOCAB, (3, 33))
    one, four = (
        scoring.score_tokens(params_on_device(params), tokens, N_HEAD, N_VOCAB, n) for n in (1, 4)
    )
    np.testing.assert_allclose(one[0], four[0], rtol=0, atol=1e-5)
    assert (one[1] == four[1]).all() and one[0].shape == (3, 32)


def params_on_device(params):
    return jax.tree.map(jax.numpy.asarray, params)


def test_of_equal_logits_the_first_is_the_likeliest(params):
    dull = jax.tree.map(jax.numpy.zeros_like, params)
    log_probs, hits = scoring.score_tokens(dull, np.array([[5, 0, 1, 0]]), N_HEAD, N_VOCAB)
    assert hits.tolist() == [[True, False, True]]
    np.testing.assert_allclose(log_probs, -math.log(257), rtol=1e-6)


def test_a_damaged_model_gets_no_result(params, score_rows):
    damaged = jax.tree.map(lambda x: x * np.float32(np.nan), score_rows.args[0])
    with pytest.raises(ValueError, match="not finite: its weights must be damaged"):
        list(score_rows.func(damaged, [(np.arange(17), 3)] * 9))


# --- The command line -----------------------------------------------------------------------------


def run(folder, *args, **options):
    return conftest.run("evaluate.py", *args, "--model_size", "tiny", models_dir=folder, **options)


@pytest.mark.parametrize("task", ["perplexity", slow("hellaswag"), slow("lambada")])
def test_both_backends_print_the_same(models, tmp_path, task):
    data = write(tmp_path / "text", "Wörter und Zahlen, 1 2 3. " * 9)
    if task != "perplexity":
        data = write_lines(tmp_path / "items", 5 * [HELLASWAG | LAMBADA])
    results = []
    for backend in ("numpy", "jax"):
        code, out, err = run(models[0], task, "--data", data, "--backend", backend)
        assert (code, err) == (0, "") and out.count("\n") == 1
        results.append(json.loads(out))
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert math.isclose(results[1][key], value, rel_tol=1e-4), key


def test_an_unknown_backend_is_refused_before_a_model_is_looked_for(tmp_path):
    code, out, err = run(tmp_path, "lambada", "--backend", "torch")
    assert (code, out, err) == (2, "", "error: backend must be numpy or jax, not 'torch'\n")


@pytest.mark.parametrize(
    "plugin, platform, wanted",
    [
        (None, "gpu", "numpy"),
        ("jax_plugins", "gpu", "jax"),
        ("libtpu", "tpu", "jax"),
        ("libtpu", "cpu", "numpy"),
    ],
)
def test_jax_is_the_default_where_it_finds_an_accelerator(monkeypatch, plugin, platform, wanted):
    """It is asked for one only where a plugin for one is installed, and started once at most."""
    asked = []
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: name == plugin or None)
    monkeypatch.setattr(scoring, "find_platform", lambda: asked.append(1) or platform)
    assert evaluate.choose_backend(None) == wanted and len(asked) == (plugin is not None)
    asked.clear()
    assert evaluate.choose_backend("numpy") == "numpy" and not asked
    assert evaluate.choose_backend("jax") == "jax" and len(asked) == 1


def test_a_plugin_without_a_device_leaves_it_to_numpy(models, tmp_path):
    (tmp_path / "jax_plugins").mkdir()
    data = write_lines(tmp_path / "items", [LAMBADA])
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    code, out, err = run(models[0], "lambada", "--data", data, env=env)
    assert (code, err) == (0, "") and json.loads(out)["n_items"] == 1
