"""What the page asks the server for: predictions, with heads switched off; explain.py's page."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import TINY, exclaiming, random_params, serving

import gpt2
from encoder import Encoder
from pages.predictions import predictions

pytest.importorskip("starlette", reason="starlette is not installed")

N_HEAD = TINY["n_head"]


def silenced(params, heads, n_head):
    """The same heads mute in another way: c_proj's rows that read them are 0."""
    blocks = list(params["blocks"])
    for block, head in heads:
        attn = blocks[block]["attn"]
        w = attn["c_proj"]["w"].copy()
        d_head = len(w) // n_head
        w[head * d_head : (head + 1) * d_head] = 0
        attn = attn | {"c_proj": attn["c_proj"] | {"w": w}}
        blocks[block] = blocks[block] | {"attn": attn}
    return params | {"blocks": blocks}


def softmax_of(found, row):  # its tokens one by one, and the whole that the groups add
    total = np.logaddexp(
        np.logaddexp.reduce(found["top_logits"][row].astype(np.float64)),
        np.logaddexp.reduce(found["tail_logits"][row] + np.log(found["tail_counts"]))
        if len(found["tail_counts"])
        else -np.inf,
    )
    return np.exp(found["top_logits"][row] - total)


@pytest.mark.parametrize("heads", [[], [(0, 1)], [(0, 0), (1, 1), (1, 0), (1, 0)]])
@pytest.mark.parametrize("n_seq", [1, 5, 100])
def test_predictions_are_gpt2s_with_those_heads_mute(rng, heads, n_seq):
    params = random_params(rng, TINY | {"n_ctx": 100})
    ids = rng.integers(257, size=n_seq).tolist()
    logits = gpt2.gpt2(ids, **silenced(params, heads, N_HEAD), n_head=N_HEAD)
    found = predictions(ids, params, N_HEAD, heads)
    assert found["positions"].tolist() == list(range(n_seq))
    assert found["top_ids"].shape == (n_seq, 50) and found["tail_counts"].sum() == 207
    for i, row in enumerate(logits):
        probs = gpt2.probabilities(row, 1)
        np.testing.assert_allclose(softmax_of(found, i), -np.sort(-probs)[:50], rtol=1e-3)
        np.testing.assert_allclose(found["top_logits"][i], row[found["top_ids"][i]], atol=1e-3)
        if i + 1 < n_seq:
            p = probs[ids[i + 1]]
            assert found["bits"][i] == pytest.approx(-np.log2(p), abs=2e-3)
    assert "attend" not in params["blocks"][0]


def test_a_head_is_switched_off_in_a_block_with_an_attention_of_its_own(rng):
    params = random_params(rng, TINY)
    backwards = {"attend": lambda q, k, v: gpt2.attention_in_blocks(q, k, -v)}
    own = params | {"blocks": [block | backwards for block in params["blocks"]]}
    ids, heads = rng.integers(257, size=9).tolist(), [(0, 1)]
    logits = gpt2.gpt2(ids, **silenced(own, heads, N_HEAD), n_head=N_HEAD)
    found = predictions(ids, own, N_HEAD, heads)
    np.testing.assert_allclose(found["top_logits"], -np.sort(-logits)[:, :50], atol=1e-3)


def test_a_large_vocabularys_tail_keeps_its_sum_under_any_temperature(rng):
    params = random_params(rng, TINY | {"n_vocab": 20000})
    ids = rng.integers(20000, size=40).tolist()
    logits = gpt2.gpt2(ids, **params, n_head=N_HEAD)
    found = predictions(ids, params, N_HEAD, positions=[3, 39])
    for row, i in enumerate((3, 39)):
        for temperature in (0.5, 1, 2):
            hot = {n: found[n] / temperature for n in ("top_logits", "tail_logits")}
            probs = gpt2.probabilities(logits[i], temperature)[found["top_ids"][row]]
            np.testing.assert_allclose(softmax_of(found | hot, row), probs, rtol=0.01)


def test_predictions_are_served(client, models):
    asked = {"text": "Oné", "without": [[1, 0]], "positions": [3, 1, 1], "n_shown": 3}
    answer = client.post("/predictions", json=asked).json()
    ids = Encoder([]).encode("Oné")
    found = predictions(ids, models[1], N_HEAD, [(1, 0)], [1, 3], 3)
    assert answer["ids"] == ids and answer["positions"] == found["positions"].tolist()
    assert answer["top_ids"] == found["top_ids"].tolist()
    assert answer["top_logits"] == found["top_logits"].astype(float).tolist()
    assert bytes.fromhex("".join(answer["bytes"][str(id)] for id in ids)) == "Oné".encode()
    assert {str(id) for row in answer["top_ids"] for id in row} <= answer["bytes"].keys()
    whole = client.post("/predictions", json={"ids": ids}).json()
    assert len(whole["top_ids"]) == len(ids) and len(whole["bits"]) == len(ids) - 1
    assert client.post("/predictions", json={"text": ""}).json()["ids"] == [256]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "ids"),
        ({"text": 3}, "text"),
        ({"ids": [257]}, "ids"),
        ({"ids": []}, "ids"),
        ({"text": "a" * 49}, "text"),
        ({"text": "a" * 4900000}, None),
        ({"text": "a", "without": [[2, 0]]}, "without"),
        ({"text": "a", "without": [[0, -1]]}, "without"),
        ({"text": "a", "without": [[0, True]]}, "without"),
        ({"text": "a", "without": [0]}, "without"),
        ({"text": "a", "positions": [1]}, "positions"),
        ({"text": "a", "n_shown": 0}, "n_shown"),
    ],
)
def test_a_mistake_says_which_field(client, asked, param):
    response = client.post("/predictions", json=asked)
    assert response.status_code in (400, 413)
    assert response.json()["error"]["param"] == param and response.json()["error"]["message"]


def test_damaged_weights_are_an_error():
    params = exclaiming(TINY)
    params["wte"][:] = np.nan
    with serving(params) as client:
        response = client.post("/predictions", json={"text": "a"})
    assert response.status_code == 500 and "not finite" in response.json()["error"]["message"]


def test_the_page_needs_no_key_and_its_predictions_do(models):
    with serving(models[1], api_key="secret") as client:
        assert client.get("/").status_code == 200
        for sent, status in (({}, 401), ({"authorization": "Bearer secret"}, 200)):
            answer = client.post("/predictions", json={"text": "a"}, headers=sent)
            assert answer.status_code == status
        foreign = {"authorization": "Bearer secret", "origin": "http://example.org"}
        assert client.post("/predictions", json={"text": "a"}, headers=foreign).status_code == 403


def test_completions_tell_ids_where_a_text_is_only_a_part_of_a_character(client, models):
    asked = {"prompt": "né", "max_tokens": 12, "echo": True, "logprobs": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=asked | {"temperature": 0}).json()
    ids = Encoder([]).encode("né")
    ids += gpt2.generate(ids, models[1], N_HEAD, 12)
    assert answer["choices"][0]["logprobs"]["token_ids"] == ids


def test_many_may_ask_at_once(client):
    """More than there is room for: they wait, and each gets its own text's answer."""
    with ThreadPoolExecutor(12) as pool:
        ask = functools.partial(client.post, "/predictions")
        answers = list(pool.map(lambda n: ask(json={"text": "a" * n}).json(), range(1, 30)))
    assert [len(answer["ids"]) for answer in answers] == list(range(1, 30))


def test_a_text_is_explained(client):
    response = client.get("/explain", params={"text": "O <script>alert(1)</script> né"})
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    data = response.text.split('<script id="data" type="application/json">')[1].split("<")[0]
    assert Encoder([]).decode(json.loads(data)["ids"]) == "O <script>alert(1)</script> né"
    assert json.loads(data)["model"] == "tiny" and json.loads(data)["is_served"]
    data = client.get("/explain", params={"ids": "256,65,195"}).text
    assert '"ids":[256,65,195]' in data  # no text has these ids
    for ids in ("", "1,,2", "1,x", "-1", "257", "1" * 5000, "٣", ",".join(49 * ["1"])):
        response = client.get("/explain", params={"ids": ids})
        assert response.status_code == 400 and response.json()["error"]["param"] == "ids"
    foreign = {"sec-fetch-site": "cross-site"}
    assert client.get("/explain", params={"text": "a"}, headers=foreign).status_code == 403
    response = client.get("/explain", params={"text": "a" * 49})
    assert (
        response.status_code == 400 and "only 48 positions" in response.json()["error"]["message"]
    )
