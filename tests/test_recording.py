"""What explain.py records, against the model itself and transformers."""

import sys

import numpy as np
import pytest
from conftest import TINY, hugging_face, random_params

import gpt2
from pages.recording import lens, record, watch


@pytest.fixture(params=[1, 5, 48, 200], ids=lambda n: f"{n} tokens")
def case(request, rng):
    """(inputs, params, n_head) of a random model; above 64 tokens attention halves its square."""
    hparams = TINY | {"n_ctx": 200, "n_layer": 3}
    return rng.integers(257, size=request.param).tolist(), random_params(rng, hparams), 2


def test_recording_changes_nothing(case):
    inputs, params, n_head = case
    recording = record(*case)
    assert np.array_equal(recording["logits"], gpt2.gpt2(inputs, **params, n_head=n_head))
    assert {a.dtype for a in recording.values() if isinstance(a, np.ndarray)} == {np.dtype("f4")}


def test_attention_rows_sum_to_one_and_see_no_future(case):
    weights = record(*case)["attention"]
    n_seq = len(case[0])
    assert weights.shape == (3, 2, n_seq, n_seq)
    assert np.all(weights >= 0)
    assert np.all(np.triu(weights, 1) == 0)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_the_stream_is_the_sum_of_what_was_added(case):
    inputs, params, n_head = case
    r = record(*case)
    assert np.array_equal(r["stream"][0], params["wte"][inputs] + params["wpe"][: len(inputs)])
    assert np.array_equal(r["stream"][:-1] + r["mha"] + r["ffn"], r["stream"][1:])
    assert np.array_equal(r["final"], gpt2.hidden_state(inputs, **params, n_head=n_head))


def test_the_lens_reads_a_model_cut_off_after_each_block(case):
    inputs, params, n_head = case
    r = record(*case)
    for i, x in enumerate(r["stream"]):
        cut = params | {"blocks": params["blocks"][:i]}
        assert np.array_equal(lens(x, params), gpt2.gpt2(inputs, **cut, n_head=n_head))
    assert np.array_equal(lens(r["stream"][-1], params), r["logits"])


def test_everything_equals_what_transformers_says(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    params = random_params(rng, TINY)
    inputs = rng.integers(257, size=20).tolist()
    model = hugging_face(params, TINY)
    model.set_attn_implementation("eager")  # the only one that tells its weights
    with torch.no_grad():
        theirs = model(torch.tensor([inputs]), output_attentions=True, output_hidden_states=True)
    r = record(inputs, params, 2)
    np.testing.assert_allclose(r["logits"], theirs.logits[0], atol=1e-4)
    for layer, looks in enumerate(theirs.attentions):
        np.testing.assert_allclose(r["attention"][layer], looks[0], atol=1e-5)
    *stream, final = theirs.hidden_states  # theirs ends with ln_f's output
    for ours, x in zip(r["stream"][:-1], stream, strict=True):
        np.testing.assert_allclose(ours, x[0], atol=1e-4)
    np.testing.assert_allclose(r["final"], final[0], atol=1e-4)


def test_watching_ends_with_the_function(rng):
    before = sys.getprofile()
    with pytest.raises(IndexError):
        watch(gpt2.gpt2, np.array([99999]), **random_params(rng, TINY), n_head=2)
    assert sys.getprofile() is before
