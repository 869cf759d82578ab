"""serve.py: gpt2.py's texts and probabilities for every client, whatever the others do."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import (
    REPO,
    TINY,
    call,
    exclaiming,
    hugging_face,
    on_a_port,
    on_linux,
    random_params,
    serving,
)
from hypothesis import given
from hypothesis import strategies as st

import gpt2
import kv_cache
import utils
from corpus.chat import NEXT_TURN, encode_conversation
from encoder import Encoder
from generation import prefix_cache
from generation.rows import Row
from generation.stops import sort_stops, until_stop

pytest.importorskip("starlette", reason="starlette is not installed")

import serve  # noqa: E402
from serving import answers as answers_module  # noqa: E402
from serving import connections, guard  # noqa: E402
from serving import weights as server_weights  # noqa: E402
from serving.choices import Choice, log_probs_of  # noqa: E402
from serving.metrics import new_metrics  # noqa: E402
from serving.protocol import read_settings  # noqa: E402

N_HEAD, N_CTX, END = TINY["n_head"], TINY["n_ctx"], 256
ENCODER = Encoder([])  # every byte a token
LETTERS = {str(id): 100 for id in ENCODER.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")}  # a bias to them


def ask(client, prompt, **fields):
    response = client.post("/v1/completions", json={"prompt": prompt} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(client, prompt, **fields):  # of a stream, without the last
    response = client.post("/v1/completions", json={"prompt": prompt, "stream": True} | fields)
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *parts, done, rest = response.content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def drawn(params, ids, n_tokens, bias=None, **sampling):
    """gpt2.generate_stream, with a bias, and without an end: what the server is to write."""
    ids, rng = list(ids), np.random.default_rng(sampling.pop("seed", None))
    new = []
    for _ in range(n_tokens):
        logits = gpt2.gpt2(ids + new, **params, n_head=N_HEAD)[-1]
        for id, value in (bias or {}).items():
            logits[int(id)] += value
        new.append(gpt2.sample(logits, rng, **sampling))
    return new


def log_probs(params, ids):  # [n_seq, n_vocab], float64
    logits = gpt2.gpt2(ids, **params, n_head=N_HEAD).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# --------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------


def test_greedy_answers_are_what_gpt2_generates(client, params):
    prompts = ["One", "A second, longer one", "", "ünï"]
    ids = [ENCODER.encode(prompt) or [END] for prompt in prompts]
    new = [gpt2.generate(row, params, N_HEAD, 12, endoftext=END) for row in ids]
    texts = [ENCODER.decode(row) for row in new]
    how = {"max_tokens": 12, "temperature": 0}
    for asked in (prompts, ids):
        answer = ask(client, asked, **how)
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        reasons = ["length" if len(row) == 12 else "stop" for row in new]
        assert [choice["finish_reason"] for choice in answer["choices"]] == reasons
        n_drawn = sum(min(12, len(row) + 1) for row in new)
        counts = {"prompt_tokens": sum(map(len, ids)), "completion_tokens": n_drawn}
        assert answer["usage"] == counts | {"total_tokens": sum(counts.values())}
    for asked in ("One", ids[0]):
        (choice,) = ask(client, asked, **how)["choices"]
        assert choice["text"] == texts[0]
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"


def test_what_is_left_out_has_the_protocols_defaults(client, params):
    """16 tokens at temperature 1, and null is the same as nothing."""
    answer = ask(client, "One", seed=5, ignore_eos=True, n=None, stop=None, logprobs=None)
    ids = drawn(params, ENCODER.encode("One"), 16, temperature=1.0, seed=5)
    assert answer["choices"][0]["text"] == ENCODER.decode(ids)
    assert answer["choices"][0]["logprobs"] is None


def settings_of(rng):  # at random: the fields, and gpt2.py's names for them
    how = {"temperature": float(rng.choice([0, 0.7, 1])), "seed": int(rng.integers(1000))}
    how |= {"top_k": int(rng.choice([0, 5])), "top_p": float(rng.choice([1, 0.9]))}
    bias = {str(rng.integers(257)): float(rng.integers(-100, 100)) for _ in range(3)}
    return how, bias if rng.random() < 0.5 else None


def test_rows_of_one_batch_each_have_their_own_settings(client, params, rng):
    """Many requests at once, whole and streamed, each beside a loop over gpt2.gpt2."""

    def one(prompt, n_tokens, how, bias, stream):
        fields = how | {"max_tokens": n_tokens, "ignore_eos": True, "logit_bias": bias}
        if not stream:
            return ask(client, prompt, **fields)["choices"][0]["text"]
        return "".join(e["choices"][0]["text"] for e in events(client, prompt, **fields))

    requests = []
    for _ in range(40):
        n = int(rng.integers(1, 20))
        prompt = rng.integers(0, 257, rng.integers(1, N_CTX - n + 1)).tolist()
        requests.append((prompt, n, *settings_of(rng), bool(rng.integers(2))))
    with ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(lambda request: one(*request), requests))
    for (prompt, n, how, bias, _), text in zip(requests, texts, strict=True):
        assert text == ENCODER.decode(drawn(params, prompt, n, bias, **how)), (prompt, how, bias)


def test_samples_are_kv_caches_samples(client, params):
    prompts = [ENCODER.encode(text) for text in ("One", "Two more")]
    how = {"temperature": 1.0, "seed": 7, "endoftext": END, "n_samples": 3}
    rows = kv_cache.generate(prompts, params, N_HEAD, 9, **how)
    answer = ask(client, prompts, max_tokens=9, n=3, seed=7, best_of=3)
    assert [c["text"] for c in answer["choices"]] == [ENCODER.decode(row) for row in rows]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    first, second = (ask(client, "One", seed=-3)["choices"] for _ in "ab")
    assert first == second


def test_a_seed_is_any_whole_number(client, params):
    """A negative one stands for the one that has the same 64 bits."""
    seeds = [5, 5 + 128, 5 + 2**32, 2**63 - 1, -1, 1 - 2**63]
    how = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.5, "logprobs": 0}
    answers = [ask(client, "One", seed=seed, **how)["choices"][0] for seed in seeds]
    found = [tuple(answer["logprobs"]["token_ids"]) for answer in answers]
    ids = ENCODER.encode("One")
    for seed, new in zip(seeds, found, strict=True):
        rng_seed = seed if seed > 0 else 2**64 + seed
        assert list(new) == drawn(params, ids, 20, temperature=1.5, seed=rng_seed), seed
    assert len(set(found)) == len(seeds)


def test_the_end_of_text_ends_a_text_unless_it_is_ignored(client):
    """The bias makes it the likeliest."""
    how = {"max_tokens": 3, "temperature": 0, "logit_bias": {"256": 100}, "logprobs": 0}
    choice = ask(client, "One", **how)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>"]
    choice = ask(client, "One", ignore_eos=True, **how)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("<|endoftext|>" * 3, "length")


def test_echo_puts_the_prompt_before_its_text(client):
    plain = ask(client, ["One", "Two"], max_tokens=5, temperature=0)["choices"]
    echoed = ask(client, ["One", "Two"], max_tokens=5, temperature=0, echo=True)["choices"]
    assert [c["text"] for c in echoed] == ["One" + plain[0]["text"], "Two" + plain[1]["text"]]
    answer = ask(client, "ünï", max_tokens=0, echo=True)
    assert answer["choices"][0]["text"] == "ünï" and answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["finish_reason"] == "length"
    parts = events(client, "One", max_tokens=5, temperature=0, echo=True)
    assert "".join(part["choices"][0]["text"] for part in parts) == echoed[0]["text"]


# --------------------------------------------------------------------------------------------------
# Log-probabilities
# --------------------------------------------------------------------------------------------------


def test_log_probabilities_are_the_raw_models(client, params, rng):
    """Whatever the temperature, top_k and bias; token by token beside float64."""
    prompt = rng.integers(0, 257, 9).tolist()
    how = {"temperature": 0.7, "top_k": 50, "seed": 3, "logit_bias": {"70": 5, "71": -3}}
    answer = ask(client, prompt, max_tokens=12, logprobs=4, ignore_eos=True, **how)
    bias = how.pop("logit_bias")
    ids = drawn(params, prompt, 12, bias, **how)
    expected = log_probs(params, prompt + ids)[len(prompt) - 1 :]
    lists = answer["choices"][0]["logprobs"]
    assert lists["tokens"] == [ENCODER.decode([id]) for id in ids]
    for id, row, value, tops in zip(
        ids, expected, lists["token_logprobs"], lists["top_logprobs"], strict=False
    ):
        assert value == pytest.approx(row[id], abs=1e-4)
        best = np.argsort(-row)[:4]
        wanted = {}
        for other in [*best.tolist(), id]:
            text = ENCODER.decode([other])
            wanted[text] = max(row[other], wanted.get(text, -np.inf))
        assert tops == {text: pytest.approx(value, abs=1e-4) for text, value in wanted.items()}


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
def test_an_echoed_prompt_is_scored_from_its_second_token_on(client, params, rng, max_tokens):
    prompts = [rng.integers(0, 257, n).tolist() for n in (1, 40, 2, 41 - max_tokens)]
    fields = {"max_tokens": max_tokens, "echo": True, "logprobs": 1, "temperature": 0}
    answer = ask(client, prompts, **fields, ignore_eos=True)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        ids = prompt + gpt2.generate(prompt, params, N_HEAD, max_tokens)
        lists = choice["logprobs"]
        assert {len(values) for values in lists.values()} == {len(ids)}
        assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
        rows = log_probs(params, ids)
        for i in range(1, len(ids)):
            value, tops = lists["token_logprobs"][i], lists["top_logprobs"][i]
            assert value == pytest.approx(rows[i - 1, ids[i]], abs=1e-4)
            assert max(tops.values()) == pytest.approx(rows[i - 1].max(), abs=1e-4)
            assert (value == max(tops.values())) == (rows[i - 1].argmax() == ids[i])
        assert lists["text_offset"][0] == 0 and lists["text_offset"] == sorted(lists["text_offset"])


def test_prompts_are_scored_as_hugging_face_scores_them(client, params, rng):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model, prompt = hugging_face(params, TINY), rng.integers(0, 257, 30).tolist()
    with torch.inference_mode():
        rows = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    wanted = rows[torch.arange(29), torch.tensor(prompt[1:])].tolist()
    lists = ask(client, prompt, max_tokens=0, echo=True, logprobs=2)["choices"][0]["logprobs"]
    assert lists["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)


def test_harnesses_get_one_entry_more_than_the_prompt_has(client):
    """Even where the new token is the end; and no other row's prompt shares the reading away."""
    fields = {"max_tokens": 1, "echo": True, "logprobs": 1, "logit_bias": {"256": 100}}
    prompt = list(range(40))
    for _ in range(2):
        choice = ask(client, [prompt, prompt], **fields, seed=1234, unknown={"a": 1})["choices"][1]
        assert len(choice["logprobs"]["token_logprobs"]) == 41
        assert choice["logprobs"]["tokens"][-1] == "<|endoftext|>"
        assert choice["finish_reason"] == "stop"


def test_of_two_ids_with_one_text_the_likelier_is_shown(params):
    """Bytes of a character are all the same sign where each stands alone."""
    ids = ENCODER.encode("中")
    rows, lists = log_probs(params, ids), []
    with serving(params) as client:
        for n in (20, 1):
            lists.append(ask(client, ids, max_tokens=0, echo=True, logprobs=n))
    tops = [answer["choices"][0]["logprobs"]["top_logprobs"][1] for answer in lists]
    best = np.argsort(-rows[0])[:20]
    signs = [rows[0][id] for id in [*best, ids[1]] if ENCODER.decode([id]) == "\ufffd"]
    assert tops[0]["\ufffd"] == pytest.approx(max(signs), abs=1e-4)
    assert set(tops[1]) == {ENCODER.decode([best[0]]), "\ufffd"}


def test_offsets_lead_to_the_tokens(client):
    answer = ask(client, "Two words", max_tokens=0, echo=True, logprobs=0)["choices"][0]
    lists = answer["logprobs"]
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert answer["text"][offset:].startswith(token)


def test_the_likeliest_are_sorted_and_from_the_same_floats(rng):
    logits = rng.standard_normal((7, 500), dtype=np.float32) * 9
    ids = rng.integers(0, 500, 7)
    expected = logits.astype(np.float64)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    for n in (0, 1, 2, 20, 499, 500):
        chosen, best, values = log_probs_of(logits, ids, n)
        np.testing.assert_allclose(chosen, expected[np.arange(7), ids], atol=1e-4)
        np.testing.assert_allclose(values, -np.sort(-expected)[:, :n], atol=1e-4)
        for row, i in np.argwhere(best == ids[:, None]):
            assert values[row, i] == chosen[row]


# --------------------------------------------------------------------------------------------------
# Streams and stops
# --------------------------------------------------------------------------------------------------


def test_a_stream_is_the_whole_answer_in_parts(client):
    how = {"max_tokens": 20, "temperature": 1, "seed": 3, "logprobs": 2, "echo": True}
    how |= {"n": 2, "ignore_eos": True}
    answer = ask(client, ["One", "Two"], **how)
    parts = events(client, ["One", "Two"], stream_options={"include_usage": True}, **how)
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == answer["usage"]
    assert len({part["id"] for part in parts}) == 1
    assert all(part["usage"] is None for part in parts[:-1])
    for whole in answer["choices"]:
        mine = [p["choices"][0] for p in parts[:-1] if p["choices"][0]["index"] == whole["index"]]
        assert "".join(choice["text"] for choice in mine) == whole["text"]
        *others, last = [choice["finish_reason"] for choice in mine]
        assert last == whole["finish_reason"] and set(others) == {None}
        for name, values in whole["logprobs"].items():
            assert sum((choice["logprobs"][name] for choice in mine), []) == values
    assert "usage" not in events(client, "One")[0]


def a_choice(strip=False, **fields):
    asked = replace(read_settings(fields, ENCODER), prompts=([65],), strip=strip)
    engine = SimpleNamespace(logits_of=None)
    return Choice(asked, 0, SimpleNamespace(encoder=ENCODER, n_ctx=N_CTX, engine=engine), None)


def written_by(ids, stops, **fields):  # -> the parts of a text, its entries, what was sampled
    choice = a_choice(stop=stops, logprobs=1, temperature=0, **fields)
    parts, entries, why = [], [], None
    for n, id in enumerate(ids, 1):
        assert choice.sample(np.eye(257, dtype=np.float32)[id], choice.row) == id
        why = "endoftext" if id == END else "stop" if choice.is_complete(ids[:n]) else None
        why = why or ("length" if n == len(ids) else None)
        part = choice.take(why)
        parts.append(part.text)
        entries += part.entries
        if why:
            break
    return parts, entries, choice.n_sampled


@given(
    text=st.text(st.sampled_from("aé中🙂\n"), min_size=1, max_size=20),
    stops=st.lists(st.text(st.sampled_from("aé中🙂\n"), min_size=1, max_size=4), max_size=4),
)
def test_parts_are_whole_characters_and_nothing_of_a_stop(text, stops):
    """The stop that is complete first ends the text, at its earliest beginning."""
    parts, entries, n_drawn = written_by(ENCODER.encode(text), stops)
    ends = [n for n in range(1, len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    wanted = text
    if ends:
        wanted = text[: min(text[: ends[0]].index(s) for s in stops if s in text[: ends[0]])]
        assert n_drawn == len(text[: ends[0]].encode())
    shown = ""
    for part in parts:
        shown += part
        assert wanted.startswith(shown) and "\ufffd" not in shown
    assert shown == wanted
    assert len(entries) == len(wanted.encode())


def test_a_text_that_ends_within_a_character_says_so():
    parts, _, _ = written_by(ENCODER.encode("né")[:-1], [])
    assert parts == ["n", "\ufffd"]
    parts, entries, _ = written_by([*ENCODER.encode("né")[:-1], END], [])
    assert "".join(parts) == "n\ufffd" and len(entries) == 3


@given(
    text=st.text("ab", max_size=30),
    n_new=st.integers(0, 30),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=5),
)
def test_the_search_for_stops_finds_what_a_plain_one_finds(text, n_new, stops):
    n_old = max(0, len(text) - n_new)
    if any(stop in text[:n_old] for stop in stops):
        return
    shown, held, found = until_stop(text, len(text) - n_old, sort_stops(stops))
    if any(stop in text for stop in stops):
        assert found and shown == text[: min(text.index(stop) for stop in stops if stop in text)]
    else:
        assert not found and shown + held == text
        begun = [n for n in range(len(text) + 1) if any(
            stop.startswith(text[len(text) - n :]) for stop in stops)]  # fmt: skip
        assert len(held) == max(begun, default=0)


def test_only_stops_that_end_among_the_new_characters_are_looked_for():
    stops = sort_stops(["END"])
    assert until_stop("END of", 3, stops) == ("END of", "", False)
    assert until_stop("END of", 4, stops) == ("", "", True)


def test_a_stop_ends_the_answer_and_never_shows(client, params):
    ids = drawn(params, ENCODER.encode("One"), 30, LETTERS, temperature=1.0, seed=3)
    text = ENCODER.decode(ids)
    stop = text[9:11]
    how = {"max_tokens": 30, "seed": 3, "logit_bias": LETTERS}
    wanted = text[: text.index(stop)]
    for stops in (stop, [stop], ["nowhere", stop], [stop, *map(str, range(1000))]):
        choice = ask(client, "One", stop=stops, **how)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (wanted, "stop")
        parts = [part["choices"][0] for part in events(client, "One", stop=stops, **how)]
        assert "".join(part["text"] for part in parts) == wanted
        assert parts[-1]["finish_reason"] == "stop"


# --------------------------------------------------------------------------------------------------
# Chats
# --------------------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "Hi"}]
LONG_TALK = [  # of which not all fits TINY's positions
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "Two"},
    {"role": "user", "content": "Three"},
]


def post_chat(client, messages, **fields):
    return client.post("/v1/chat/completions", json={"messages": messages} | fields)


def chat(client, messages=TALK, **fields):  # -> the answer, or a stream's events without the last
    response = post_chat(client, messages, **fields)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return response.json()
    *parts, done, rest = response.content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def said(parts, index=0):  # the text of one answer of a stream
    choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize("messages", [TALK, LONG_TALK])
def test_a_chat_is_what_gpt2_generates_after_the_conversation(client, params, messages):
    ids = encode_conversation(messages, ENCODER, N_CTX - 12)
    text = ENCODER.decode(gpt2.generate(ids, params, N_HEAD, 12, endoftext=END))
    how = {"temperature": 0, "max_tokens": 12}
    answer = chat(client, messages, **how)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == text.split(NEXT_TURN)[0].lstrip()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    parts = chat(client, messages, stream=True, stream_options={"include_usage": True}, **how)
    assert parts[-1]["usage"] == answer["usage"] and parts[-1]["choices"] == []
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in part["choices"][0]["delta"] for part in parts[1:-1])
    assert said(parts) == choice["message"]["content"]
    reasons = [part["choices"][0]["finish_reason"] for part in parts[:-1]]
    assert set(reasons[:-1]) == {None} and reasons[-1] == choice["finish_reason"]


def test_several_answers_are_drawn_as_completions_are(client):
    how = {"n": 3, "seed": 5, "max_tokens": 9, "top_p": 0.9, "top_k": 50, "temperature": 0.8}
    prompt = encode_conversation(TALK, ENCODER, N_CTX)
    plain = ask(client, prompt, stop=[NEXT_TURN], **how)["choices"]
    answer, parts = chat(client, **how), chat(client, stream=True, **how)
    for i, choice in enumerate(answer["choices"]):
        assert choice["index"] == i
        assert choice["message"]["content"] == plain[i]["text"].lstrip() == said(parts, i)


def test_an_answer_ends_where_the_next_turn_begins_and_its_first_space_is_not_shown():
    """Also with what looks like a turn's beginning at the end, and where there is only space."""
    for text, shown in (
        (" Paris.\nUser: And", "Paris."),
        (" Paris.\nUs", "Paris.\nUs"),
        ("\n \n Paris and\n more", "Paris and\n more"),
        ("\nUser: And", ""),
        (" \n", ""),
        (" é", "é"),
    ):
        parts, entries, n_drawn = written_by(ENCODER.encode(text), [NEXT_TURN], strip=True)
        assert "".join(parts) == shown
        for i in range(len(parts)):
            assert shown.startswith("".join(parts[:i]))
        has_stopped = NEXT_TURN in text
        n_seen = text.index(NEXT_TURN) + len(NEXT_TURN) if has_stopped else len(text.encode())
        assert n_drawn == n_seen
        if not has_stopped:
            assert len(entries) == n_drawn  # the space is a token like any other


def test_the_server_stops_a_chat_at_the_next_turn(client, monkeypatch):
    """At two letters that TINY writes when it is biased so: it would hardly write a real turn."""
    how = {"logit_bias": LETTERS, "seed": 3, "max_tokens": 20}
    text = chat(client, **how)["choices"][0]["message"]["content"]
    turn = text[9:11]
    monkeypatch.setattr("serving.chat.NEXT_TURN", turn)
    for stop in (None, "nowhere"):
        (choice,) = chat(client, stop=stop, **how)["choices"]
        assert choice["message"]["content"] == text[: text.index(turn)]
        assert choice["finish_reason"] == "stop"


def test_an_answer_may_be_as_long_as_fits(client):
    """Old messages go where the answer would have less than what was asked, or a quarter."""
    n_prompt = len(encode_conversation(TALK, ENCODER, N_CTX))
    how = {"logit_bias": {str(*ENCODER.encode("A")): 100}, "temperature": 0}
    (choice,) = chat(client, **how)["choices"]
    assert choice["message"]["content"] == "A" * (N_CTX - n_prompt)
    assert choice["finish_reason"] == "length"
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 9}):
        assert chat(client, **how, **fields)["choices"][0]["message"]["content"] == "A" * 5
    for fields, n_left in (({}, N_CTX // 4), ({"max_tokens": 20}, 20)):
        n_prompt = len(encode_conversation(LONG_TALK, ENCODER, N_CTX - n_left))
        answer = chat(client, LONG_TALK, **how, **fields)
        assert answer["usage"]["prompt_tokens"] == n_prompt < N_CTX - n_left


def test_log_probabilities_of_a_chat_are_a_completions(client):
    prompt = encode_conversation(TALK, ENCODER, N_CTX)
    how = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    plain = ask(client, prompt, logprobs=2, **how)["choices"][0]["logprobs"]
    answer = chat(client, logprobs=True, top_logprobs=2, **how)["choices"][0]
    parts = chat(client, logprobs=True, top_logprobs=2, stream=True, **how)[1:]
    entries = answer["logprobs"]["content"]
    assert sum((part["choices"][0]["logprobs"]["content"] for part in parts), []) == entries
    assert [entry["token"] for entry in entries] == plain["tokens"]
    assert [entry["logprob"] for entry in entries] == plain["token_logprobs"]
    for entry in entries:
        assert [top["logprob"] for top in entry["top_logprobs"]][0] == entry["logprob"]
        assert len(entry["top_logprobs"]) == 2 and entry["top_logprobs"][0] | entry == entry
    (first, *_) = chat(client, logprobs=True, **how)["choices"][0]["logprobs"]["content"]
    assert first["top_logprobs"] == [] and bytes(first["bytes"]).decode(errors="replace")
    assert chat(client, **how)["choices"][0]["logprobs"] is None


WRONG_CHATS = {
    "none": ({"messages": None}, "messages"),
    "an empty list": ({"messages": []}, "messages"),
    "a text": ({"messages": "Hi"}, "messages"),
    "a text in a list": ({"messages": ["Hi"]}, "messages"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages"),
    "no content": ({"messages": [{"role": "user"}]}, "messages"),
    "a picture": ({"messages": [{"role": "user", "content": [{"image_url": ""}]}]}, "messages"),
    "a message too long": ({"messages": [{"role": "user", "content": "x" * 99}]}, "messages"),
    "no tokens": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "a number for a flag": ({"logprobs": 3}, "logprobs"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "a form": ({"response_format": {"type": "json_object"}}, "response_format"),
    "another model": ({"model": "gpt-4"}, "model"),
    "a penalty": ({"frequency_penalty": 2.5}, "frequency_penalty"),
    "calls of tools": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]},
        "messages",
    ),
}


@pytest.mark.parametrize("case", WRONG_CHATS)
def test_a_chat_that_makes_no_sense_is_an_error_of_openais_shape(client, case):
    fields, param = WRONG_CHATS[case]
    response = post_chat(client, **({"messages": TALK} | fields))
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert (error["code"] == "context_length_exceeded") == (case == "a message too long")


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------

WRONG = {
    "a number": ({"prompt": 7}, 400, "prompt"),
    "an empty list of ids": ({"prompt": [[]]}, 400, "prompt"),
    "a mixture": ({"prompt": ["a", 1]}, 400, "prompt"),
    "true is no id": ({"prompt": [True]}, 400, "prompt"),
    "an id too large": ({"prompt": [257]}, 400, "prompt"),
    "a negative id": ({"prompt": [-1]}, 400, "prompt"),
    "half an id": ({"prompt": [1.5]}, 400, "prompt"),
    "a long text": ({"prompt": "x" * 40000}, 400, "prompt"),
    "too many": ({"prompt": ["a"] * 100, "n": 100}, 400, "prompt"),
    "another model": ({"model": "gpt-4"}, 404, "model"),
    "a model that is no name": ({"model": 4}, 400, "model"),
    "max_tokens": ({"max_tokens": -1}, 400, "max_tokens"),
    "no tokens and no echo": ({"max_tokens": 0}, 400, "max_tokens"),
    "a text for a number": ({"max_tokens": "7"}, 400, "max_tokens"),
    "true for a number": ({"max_tokens": True}, 400, "max_tokens"),
    "temperature": ({"temperature": -0.5}, 400, "temperature"),
    "top_p": ({"top_p": 1.5}, 400, "top_p"),
    "top_k": ({"top_k": -2}, 400, "top_k"),
    "n": ({"n": 0}, 400, "n"),
    "logprobs": ({"logprobs": 21}, 400, "logprobs"),
    "logprobs of chats": ({"logprobs": True}, 400, "logprobs"),
    "stop": ({"stop": 5}, 400, "stop"),
    "stops": ({"stop": ["a", 5]}, 400, "stop"),
    "a seed": ({"seed": "x"}, 400, "seed"),
    "stream": ({"stream": "yes"}, 400, "stream"),
    "stream_options": ({"stream_options": 3}, 400, "stream_options"),
    "best_of": ({"best_of": 2}, 400, "best_of"),
    "suffix": ({"suffix": "end"}, 400, "suffix"),
    "a penalty": ({"presence_penalty": -2.5}, 400, "presence_penalty"),
    "min_p": ({"min_p": 1.5}, 400, "min_p"),
    "repetition_penalty": ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    "a tiny one": ({"repetition_penalty": 1e-300}, 400, "repetition_penalty"),
    "a huge one": ({"repetition_penalty": 1e308}, 400, "repetition_penalty"),
    "min_tokens": ({"min_tokens": -1}, 400, "min_tokens"),
    "stop_token_ids": ({"stop_token_ids": [257]}, 400, "stop_token_ids"),
    "too many stops": ({"stop": ["a"] * 1025}, 400, "stop"),
    "stops too long": ({"stop": ["a" * 10_001]}, 400, "stop"),
    "too many log-probabilities": (
        {"prompt": ["x" * 40] * 128, "n": 8, "echo": True, "logprobs": 20, "max_tokens": 8},
        400,
        "logprobs",
    ),
    "a bias of no id": ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    "a bias of an id too large": ({"logit_bias": {"257": 1}}, 400, "logit_bias"),
    "a large bias": ({"logit_bias": {"1": 101}}, 400, None),
    "biases": ({"logit_bias": [1]}, 400, "logit_bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_an_error_of_openais_shape(client, case):
    fields, status, param = WRONG[case]
    response = client.post("/v1/completions", json={"prompt": "a"} | fields)
    error = response.json()["error"]
    assert (response.status_code, set(response.json())) == (status, {"error"})
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == "invalid_request_error"
    if param:
        assert error["param"] == param


def test_a_prompt_beyond_n_ctx_is_told_both_numbers(client):
    response = client.post("/v1/completions", json={"prompt": "x" * 48, "max_tokens": 4})
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    assert "48 prompt tokens + 1 to generate = 49" in error["message"] and "48" in error["message"]
    for n in (3, 4, 2**40):  # what does not fit is clipped, as vLLM does
        answer = ask(client, "x" * 45, max_tokens=n, ignore_eos=True)
        assert answer["usage"]["total_tokens"] == 48
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"7", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": 1' + b"0" * 9999]
)
def test_bodies_that_are_no_json_objects(client, body):
    response = client.post("/v1/completions", content=body)
    assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("name", ["temperature", "top_p", "max_tokens", "seed", "n"])
def test_numbers_that_are_none(client, name, number):
    body = b'{"prompt": "a", "%s": %s}' % (name.encode(), number.encode())
    response = client.post("/v1/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == name


def test_surrogates_and_odd_names_are_no_trouble(client):
    body = rb'{"prompt": "\ud800", "model": "\udfff", "max_tokens": 1}'
    assert client.post("/v1/completions", content=body).status_code == 404
    body = rb'{"prompt": "\ud800", "stop": "\udfff", "max_tokens": 1, "echo": true}'
    assert client.post("/v1/completions", content=body).status_code == 200


def test_a_query_that_is_no_utf_8(client):
    """TestClient would quote it, and a stranger does not."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/nowhere", "query_string": b"\xce"}
    asyncio.run(client.app(scope | {"headers": [(b"host", b"localhost")]}, receive, send))
    assert sent[0]["status"] == 404


def test_nobody_gets_a_web_socket(address, capfd):
    """Even where a package for them is installed: its errors would be tracebacks in the log."""
    asked = b"Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Version: 13\r\n"
    for host, status in ((b"\x86", b"403"), (b"localhost", b"200")):
        with socket.create_connection(address, timeout=30) as line:
            line.sendall(b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\n" + asked + b"\r\n")
            assert line.recv(2**16).split()[1] == status
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_not_there_has_the_same_shape(client):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)):
        response = client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


# --------------------------------------------------------------------------------------------------
# What there is
# --------------------------------------------------------------------------------------------------


def test_the_model_is_listed_and_the_server_well(client):
    data = client.get("/v1/models").json()
    assert data["object"] == "list" and [model["id"] for model in data["data"]] == ["tiny"]
    assert client.get("/health").status_code == 200


def test_the_figures_are_prometheus(params):
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus is not installed")
    start = time.perf_counter()
    with serving(params) as client:
        ask(client, ["One", "Three"], max_tokens=7, ignore_eos=True)
        client.post("/v1/completions", content=b"{")
        text = client.get("/metrics").text
    families = list(parser.text_string_to_metric_families(text))
    found = {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}
    assert found["sixtygpt_completion_tokens_total",] == 14
    assert found["sixtygpt_prompt_tokens_total",] == 8
    assert found["sixtygpt_requests_total", "200"] == 1
    assert found["sixtygpt_requests_total", "400"] == 1
    assert found["sixtygpt_rows_waiting",] == found["sixtygpt_rows_running",] == 0
    assert found["sixtygpt_seconds_per_token_count",] == 14
    assert found["sixtygpt_seconds_per_token_bucket", "+Inf"] == 14
    kinds = {f.name: f.type for f in families}
    assert kinds["sixtygpt_seconds_per_token"] == "histogram"
    assert found["sixtygpt_passes_total",] >= 7
    assert 0 < found["sixtygpt_pass_seconds_total",] < time.perf_counter() - start


def test_texts_become_ids_and_ids_texts(client):
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
    for field in ("prompt", "content"):
        asked = {field: "né<|endoftext|>", "add_special_tokens": True}
        tokens = client.post("/tokenize", json=asked).json()["tokens"]
        assert tokens == [*ENCODER.encode("né"), END]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {
        "prompt": "né<|endoftext|>"
    }
    for path, data in (("/tokenize", {}), ("/detokenize", {"tokens": 3}), ("/tokenize", [])):
        assert client.post(path, json=data).status_code == 400
    response = client.post("/detokenize", json={"tokens": [257]})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tokens"


# --------------------------------------------------------------------------------------------------
# Who may ask
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "10.0.0.1"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://localhost"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_ask(client, headers, status):
    """A Host that is not ours (DNS rebinding), or an Origin that is not the page's own."""
    response = client.get("/v1/models", headers=headers)
    assert response.status_code == status
    response = client.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers
    )
    assert response.status_code == status
    if status == 403:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_allowed_may_ask(params):
    allow = ("my.host", "https://page.example")
    with serving(params, allow=allow) as client:
        assert client.get("/health", headers={"host": "my.host:80"}).status_code == 200
        response = client.get("/health", headers={"origin": "https://page.example"})
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        assert client.get("/health", headers={"origin": "http://page.example"}).status_code == 403
    with serving(params, host="0.0.0.0") as client:
        assert client.get("/health", headers={"host": "10.0.0.1:8000"}).status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 403


def test_a_key_is_asked_for(params):
    with serving(params, api_key="sécret") as client:
        for given, status in (
            (None, 401),
            ("Bearer wrong", 401),
            ("Bearer ", 401),
            ("sécret", 401),
            ("Bearer sécret", 200),
        ):
            headers = {} if given is None else {"authorization": given.encode()}
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == status, given
        assert response.json()["object"] == "list" and client.get("/health").status_code == 200
        error = client.get("/v1/models").json()["error"]
        assert error["code"] == "invalid_api_key"


def test_a_large_body_is_refused(client):
    for body in (
        b"x" * (guard.MOST_BYTES + 1),
        iter([b"x" * 600_000] * 2),
    ):  # without a length, too
        response = client.post("/v1/completions", content=body)
        assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * (guard.MOST_BYTES - 100)})
    assert client.post("/v1/completions", content=body).status_code == 200


# --------------------------------------------------------------------------------------------------
# The engine: rows come, go and fail
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held_up(client):
    """Inside, the engine's thread waits, so that nothing is written."""
    engine, gate, has_begun = client.app.state.engine, threading.Event(), threading.Event()
    sort_out = engine.sort_out

    def wait():
        has_begun.set()
        gate.wait(60)
        sort_out()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "sort_out", wait)
        until(lambda: engine.wake.set() or has_begun.is_set())  # it may be warming up
        try:
            yield engine
        finally:
            gate.set()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def test_a_full_queue_refuses_and_disturbs_nobody(params):
    ids = ENCODER.encode("One")
    text = ENCODER.decode(drawn(params, ids, 9))
    how = {"max_tokens": 9, "temperature": 0, "ignore_eos": True}
    with serving(params, max_waiting=3, batch_size=2) as client, ThreadPoolExecutor(3) as pool:
        with held_up(client) as engine:
            waiting = [pool.submit(ask, client, "One", **how) for _ in range(3)]
            until(lambda: engine.n_waiting() == 3)
            response = client.post("/v1/completions", json={"prompt": "One"})
        assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert [one.result()["choices"][0]["text"] for one in waiting] == [text] * 3
        assert ask(client, "One", **how)["choices"][0]["text"] == text


def test_a_request_that_takes_too_long_is_ended(params):
    with serving(params, timeout=1.5) as client:
        with held_up(client):
            response = client.post("/v1/completions", json={"prompt": "One"})
            assert response.status_code == 408 and "1.5 seconds" in response.text
            *_, last = events(client, "One")
            assert last["error"]["code"] == "timeout"
        until(lambda: not client.app.state.engine.n_waiting())
        assert ask(client, "One")["usage"]["completion_tokens"] > 0
        until(lambda: not client.app.state.engine.begun)


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("not finite"), OSError()])
def test_a_pass_that_fails_ends_its_rows_and_no_more(params, monkeypatch, error):
    calls, plain = [], kv_cache.extend_all

    def stumble(*args):
        calls.append(1)
        if len(calls) % 4 == 3:
            raise error
        return plain(*args)

    with serving(params) as client:
        until(lambda: client.app.state.engine.prefixes.rows == [])
        good = ask(client, "One", max_tokens=2, temperature=0, ignore_eos=True)["choices"]
        with monkeypatch.context() as patch:
            patch.setattr(kv_cache, "extend_all", stumble)
            response = client.post("/v1/completions", json={"prompt": "One", "ignore_eos": True})
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"
            calls.clear()
            *_, last = events(client, "One", ignore_eos=True)
            assert last["error"]["code"] == "engine_failed"
        assert ask(client, "One", max_tokens=2, temperature=0, ignore_eos=True)["choices"] == good


def test_what_cannot_join_fails_alone(params, monkeypatch):
    """An error while rows are admitted: they are in no batch yet, and hear of it all the same."""
    with serving(params) as client:
        with monkeypatch.context() as patch:
            patch.setattr(kv_cache.Batch, "admit", lambda *_: 1 / 0)
            assert client.post("/v1/completions", json={"prompt": "One"}).status_code == 500
        assert ask(client, "One")


def test_an_error_in_a_route_is_an_error_of_the_same_shape(params, monkeypatch):
    with serving(params) as client:
        monkeypatch.setattr(serve, "Answer", lambda *_: 1 / 0)
        response = client.post("/v1/completions", json={"prompt": "One"})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert client.get("/health").status_code == 200


def test_a_common_beginning_is_read_once(params, monkeypatch, rng):
    """By later requests, too: their answers are those of requests that come alone."""
    common = rng.integers(0, 256, 25).tolist()
    prompts = [common + rng.integers(0, 256, 3).tolist() for _ in range(5)]
    n_run, plain = [], kv_cache.extend_all
    monkeypatch.setattr(
        kv_cache,
        "extend_all",
        lambda caches, new, *rest: n_run.append(sum(map(len, new))) or plain(caches, new, *rest),
    )
    with serving(params) as client:
        ask(client, [1])  # after the first, which warms up
        n_run.clear()
        for prompt in prompts:
            choice = ask(client, prompt, max_tokens=4, temperature=0, ignore_eos=True)["choices"][0]
            assert choice["text"] == ENCODER.decode(gpt2.generate(prompt, params, N_HEAD, 4))
    assert sum(n_run) <= 25 + 5 * (3 + 3)


def test_equal_prompts_are_scored_once(params, monkeypatch, rng):
    """The answers are those of requests that come alone, also while others are written."""
    n_run, n_scored = [], []
    run, score = kv_cache.extend_all, Choice.read_states
    prompts = [rng.integers(0, 256, n).tolist() for n in (20, 3, 30)]
    asked = [prompts[i] for i in (0, 1, 0, 2, 1, 1, 0)]
    how = {"echo": True, "logprobs": 3, "temperature": 0, "ignore_eos": True, "max_tokens": 4}
    with serving(params, batch_size=4) as client:
        alone = [ask(client, prompt, **how)["choices"][0] for prompt in prompts]
        monkeypatch.setattr(
            Choice, "read_states", lambda self, x: n_scored.append(len(x)) or score(self, x)
        )
        for choice in ask(client, asked, n=2, **how)["choices"]:
            wanted = alone[prompts.index(asked[choice["index"] // 2])]
            assert choice["text"] == wanted["text"]
            ours, theirs = choice["logprobs"], wanted["logprobs"]
            assert ours["token_ids"] == theirs["token_ids"]
            assert ours["text_offset"] == theirs["text_offset"]
            for got, want in zip(ours["token_logprobs"], theirs["token_logprobs"], strict=True):
                assert got == pytest.approx(want, abs=1e-4)
        assert sum(n_scored) == 20 + 3 + 30
        n_scored.clear()
        monkeypatch.setattr(
            kv_cache,
            "extend_all",
            lambda caches, new, *rest: n_run.append(sum(map(len, new))) or run(caches, new, *rest),
        )
        choices = ask(client, [prompts[2]] * 1024, **how | {"max_tokens": 0})["choices"]
        assert sum(n_scored) == 30
        assert sum(n_run) <= 30 + 1023
        assert len(choices) == 1024
        assert all(choice["logprobs"] == choices[0]["logprobs"] for choice in choices)


@pytest.mark.parametrize("stream", [True, False])
def test_large_answers_are_built_off_the_loop(params, monkeypatch, stream):
    """So that it can meanwhile tell a load balancer that all is well."""
    loops, builders = set(), set()
    build, pass_on, begin = answers_module.logprobs_of, serve.deliver, answers_module.choices_of

    def note(where, work):
        def work_and_note(*args):
            where.add(threading.get_ident())
            return work(*args)

        return work_and_note

    hparams = TINY | {"n_ctx": 200}
    wide = params | {"wpe": np.resize(params["wpe"], (200, hparams["n_embd"]))}
    monkeypatch.setattr(serve, "deliver", note(loops, pass_on))
    monkeypatch.setattr(answers_module, "logprobs_of", note(builders, build))
    monkeypatch.setattr(answers_module, "choices_of", note(builders, begin))
    with serving(wide, hparams) as client:
        asked = {"prompt": [[1] * 150] * 4, "echo": True, "logprobs": 5, "max_tokens": 0, "n": 17}
        response = client.post("/v1/completions", json=asked | {"stream": stream})
        assert response.status_code == 200 and response.text.count('"token_logprobs"') == 68
    assert len(loops) == 1 and builders and not loops & builders


def test_an_error_of_a_score_reaches_equal_prompts(params, monkeypatch):
    def broken(self, id, log_prob=None, *best):
        if log_prob is not None and self.asked.echo:
            raise RuntimeError("no luck")
        return note(self, id, log_prob, *best)

    note = Choice.note
    monkeypatch.setattr(Choice, "note", broken)
    with serving(params) as client:
        asked = {"prompt": ["One two three"] * 4, "echo": True, "logprobs": 1, "max_tokens": 0}
        response = client.post("/v1/completions", json=asked)
        assert response.status_code == 500 and "no luck" in response.text
        assert ask(client, "One")


def test_kept_caches_stay_within_their_bound(params, rng):
    def ended(ids):
        cache = kv_cache.new_cache(params, N_HEAD)
        kv_cache.prefill(cache, ids, params, N_HEAD)
        return Row(ids, 0, None, cache=cache, end="length")

    prefixes = prefix_cache.PrefixCache()
    first = ended([7, 8, 9])
    prefixes.add(first)
    for i in range(3 * prefix_cache.MAX_ROWS):
        prefixes.add(ended([i, *rng.integers(0, 256, 9).tolist()]))
        prefixes.touch(next(row for row in prefixes.rows if row.prompt == [7, 8, 9]))
    assert len(prefixes.rows) == prefix_cache.MAX_ROWS
    assert prefixes.rows[-1].prompt == [7, 8, 9]
    prefixes.add(ended([7, 8, 9, 10]))
    assert [row.text for row in prefixes.rows if row.text[:1] == [7]] == [[7, 8, 9, 10]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "MAX_BYTES", 3 * prefixes.rows[-1].cache.kv.nbytes)
        assert first.cache is None  # it was dropped, and holds no memory
        prefixes.add(ended([1]))
        assert len(prefixes.rows) == 3


# --------------------------------------------------------------------------------------------------
# On a port: clients that leave, dawdle, or talk nonsense
# --------------------------------------------------------------------------------------------------

SLOW = TINY | {"n_ctx": 16384, "n_embd": 128, "n_layer": 6}
ENDLESS = {"prompt": "One", "max_tokens": 16000, "temperature": 0}  # half a minute of "!"


@pytest.fixture(scope="module")
def slow():
    """A server whose texts, of thousands of "!", take a while."""
    app = serve.make_app("slow", ENCODER, SLOW, exclaiming(SLOW), batch_size=4)
    with on_a_port(app) as address:
        yield address, app.state.engine


def connect(address):
    return contextlib.closing(socket.create_connection(address, timeout=60))


def head(length, path="/v1/completions"):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def post(address, data):  # -> a socket, to read the answer from
    body = json.dumps(data).encode()
    connection = socket.create_connection(address, timeout=60)
    connection.sendall(head(len(body)) + body)
    return connection


def answers(address, prompt="One", **fields):
    connection = http.client.HTTPConnection(*address, timeout=60)
    body = json.dumps({"prompt": prompt, "max_tokens": 3, "temperature": 0} | fields)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", body)
        return json.loads(connection.getresponse().read())["choices"][0]["text"] == "!!!"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(slow, stream):
    address, engine = slow
    fields = ENDLESS | {"stream": stream}
    connections = [post(address, fields) for _ in range(8)]  # 4 run, 4 wait
    until(lambda: len(engine.batch.rows) == 4 and engine.n_waiting() == 4)
    if stream:
        assert b"data: " in connections[0].makefile("rb").read(500)
    for connection in connections:
        connection.close()
    until(lambda: not engine.batch.rows and not engine.n_waiting(), seconds=10)
    assert answers(address)


def test_rows_whose_client_has_gone_leave_and_no_others(params):
    engine = serve.Engine(params, N_HEAD, batch_size=4, max_waiting=9, metrics=new_metrics())
    choices = [a_choice() for _ in range(8)]
    engine.submit(choices[0].asked, choices[:4])
    engine.batch.rows = list(engine.arrivals())
    engine.submit(choices[4].asked, choices[4:])
    engine.drop(choices[1::2])
    engine.sort_out()
    assert engine.batch.rows == [choices[0].row, choices[2].row]
    assert list(engine.begun.values()) == [choices[0], choices[2]]
    assert list(engine.waiting[choices[4].asked]) == [choices[4], choices[6]]
    assert [choice.row.end for choice in choices[:4]] == [None, "dropped", None, "dropped"]


@pytest.mark.parametrize("moment", ["clear", "wait"])
def test_a_stop_at_any_moment_ends_the_engine_at_once(params, moment):
    """Even just before `wake` is cleared, or just before the thread waits for it."""
    engine = serve.Engine(params, N_HEAD, batch_size=4, max_waiting=9, metrics=new_metrics())

    class Wake(threading.Event):
        def stop_first(self):
            if threading.current_thread() is engine.thread and not engine.is_stopped:
                engine.is_stopped = True  # as engine.stop does, in another thread
                self.set()

        def clear(self):
            if moment == "clear":
                self.stop_first()
            super().clear()

        def wait(self, timeout=None):
            if moment == "wait":
                self.stop_first()
            return super().wait(timeout)

    engine.wake = Wake()
    engine.start(None)
    engine.thread.join(3)
    has_ended = not engine.thread.is_alive()
    engine.stop()
    assert has_ended


def test_other_threads_touch_only_what_the_engine_lets_them(params, monkeypatch):
    """Whatever a request does with the engine from asyncio's thread is named in its docstring."""
    touched, read = set(), serve.Engine.__getattribute__

    def watched(engine, name):
        caller = sys._getframe(1).f_locals.get("self")
        in_thread = threading.current_thread() is not read(engine, "__dict__").get("thread")
        if caller is not engine and in_thread and not name.startswith("__"):
            touched.add(name)
        return read(engine, name)

    with serving(params) as client:
        monkeypatch.setattr(serve.Engine, "__getattribute__", watched)
        ask(client, "One", echo=True, logprobs=2)
        events(client, "One")
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        for path in ("/", "/metrics", "/health", "/v1/models", "/explain?text=One"):
            assert client.get(path).status_code == 200
        assert client.post("/predictions", json={"text": "One"}).status_code == 200
        monkeypatch.undo()
    said = serve.Engine.__doc__.partition("Other threads")[2].partition(".")[0]
    assert touched and touched <= set(re.findall(r"\w+", said)), touched


def test_one_who_does_not_read_holds_nobody_up(slow):
    address, engine = slow
    with contextlib.closing(post(address, ENDLESS | {"stream": True})):
        until(lambda: engine.batch.rows)
        assert answers(address)
    until(lambda: not engine.batch.rows, seconds=10)


def test_half_a_request_is_closed_in_time(slow, monkeypatch):
    address, _ = slow
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    for start in (b"", b"POST /v1/comp", head(50)[:-2]):
        with connect(address) as connection:
            connection.sendall(start)
            assert connection.recv(1000) == b""  # closed, without a word
    with connect(address) as connection:
        connection.sendall(head(50) + b'{"prompt"')
        answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408") and b"the body took more" in answer
    assert answers(address)


def test_nonsense_is_answered_or_closed(slow, rng):
    address, _ = slow
    for start in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", rng.bytes(2000),
                  b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
                  b"GET /v1/models HTTP/1.0\r\n\r\n",
                  head(5).replace(b"5", b"-5"), b"A" * 100_000):  # fmt: skip
        with connect(address) as connection:
            connection.sendall(start + b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                answer = connection.recv(1000)
                assert answer.startswith(b"HTTP/1.1 4") or answer == b""
    assert answers(address)


def test_each_client_gets_its_own_answer(address, params):
    """A connection of its own each, kept open for several requests, greedy and drawn."""

    def many(seed):
        rng = np.random.default_rng(seed)
        connection = http.client.HTTPConnection(*address, timeout=60)
        for _ in range(6):
            prompt = rng.integers(0, 257, rng.integers(1, 30)).tolist()
            how = {"temperature": float(rng.integers(2)), "seed": int(rng.integers(100))}
            body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True} | how
            connection.request("POST", "/v1/completions", json.dumps(body))
            choice = json.loads(connection.getresponse().read())["choices"][0]
            assert choice["text"] == ENCODER.decode(drawn(params, prompt, 8, **how))
        connection.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(many, range(16)))


# --------------------------------------------------------------------------------------------------
# Programs that nobody here wrote
# --------------------------------------------------------------------------------------------------


def test_openais_package_completes(openai_client, params):
    prompts = ["One", "Two"]
    texts = [ENCODER.decode(drawn(params, ENCODER.encode(prompt), 9)) for prompt in prompts]
    how = {"model": "tiny", "max_tokens": 9, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = openai_client.completions.create(prompt=prompts, logprobs=3, **how)
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage.completion_tokens == 18
    lists = answer.choices[0].logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == 9
    assert [max(tops.values()) for tops in lists.top_logprobs] == lists.token_logprobs
    parts = list(openai_client.completions.create(
        prompt="One", stream=True, stream_options={"include_usage": True}, **how))  # fmt: skip
    assert "".join(part.choices[0].text for part in parts[:-1]) == texts[0]
    assert parts[-1].usage.total_tokens == 12
    assert [model.id for model in openai_client.models.list()] == ["tiny"]


def test_openais_package_chats(openai_client, params):
    ids = encode_conversation(TALK, ENCODER, N_CTX)
    text = ENCODER.decode(drawn(params, ids, 9)).split(NEXT_TURN)[0].lstrip()
    create = openai_client.chat.completions.create
    how = {"model": "tiny", "messages": TALK, "max_completion_tokens": 9, "temperature": 0}
    how |= {"extra_body": {"ignore_eos": True}}
    answer = create(logprobs=True, top_logprobs=3, **how)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == (
        "assistant", text)  # fmt: skip
    (entry, *_) = answer.choices[0].logprobs.content
    assert entry.logprob == entry.top_logprobs[0].logprob and len(entry.top_logprobs) == 3
    parts = list(create(stream=True, stream_options={"include_usage": True}, **how))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == text
    assert parts[-1].usage == answer.usage
    with pytest.raises(Exception, match="role is 'tool'") as raised:
        create(model="tiny", messages=[{"role": "tool", "content": "Hi", "tool_call_id": "1"}])
    assert raised.value.status_code == 400


def test_openais_package_understands_our_errors(openai_client):
    import openai

    create = openai_client.completions.create
    with pytest.raises(openai.BadRequestError, match="positions") as raised:
        create(model="tiny", prompt="x" * 99)
    assert raised.value.code == "context_length_exceeded" and raised.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as raised:
        create(model="gpt-4", prompt="x")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="suffix"):
        create(model="tiny", prompt="x", suffix="y")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_completes_and_streams(address, params):
    url = "http://{}:{}/v1/completions".format(*address)
    fields = {"prompt": "One", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    text = ENCODER.decode(drawn(params, ENCODER.encode("One"), 9))
    command = ["curl", "-sN", url, "-d"]
    out = subprocess.run([*command, json.dumps(fields)], capture_output=True).stdout
    assert json.loads(out)["choices"][0]["text"] == text
    out = subprocess.run([*command, json.dumps(fields | {"stream": True})], capture_output=True)
    *parts, done = out.stdout.decode().split("data: ")[1:]
    assert done.strip() == "[DONE]"
    assert "".join(json.loads(part)["choices"][0]["text"] for part in parts) == text


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A server as a person starts it: (its process, its address, its models folder)."""
    folder = tmp_path_factory.mktemp("served")
    utils.save_model(folder / "slow", ENCODER, SLOW, exclaiming(SLOW))
    with started("--model_size", "slow", "--models_dir", folder, "--batch_size", 4) as started_one:
        yield *started_one, folder


@contextlib.contextmanager
def started(*args):  # -> the process, its address
    command = [sys.executable, REPO / "serve.py", "--port", 0, *args]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE)
    try:
        line = process.stdout.readline().decode()
        host, port = line.split("http://")[1].split(":")
        yield process, (host, int(port))
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_shipped_model_is_there_in_two_seconds():
    """The best of three starts, for the machine may have other work."""
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        with started("--model_size", "shakespeare") as (_, address):
            connection = http.client.HTTPConnection(*address, timeout=60)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            seconds.append(time.monotonic() - start)
    assert min(seconds) < 2


def test_a_port_in_use_is_one_line(models):
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        where = ["--model_size", "tiny", "--port", port]
        code, out, err = call("serve.py", *where, models_dir=models[0])
    assert (code, out) == (2, "") and "in use" in err and err.count("\n") == 1
    code, out, err = call("serve.py", "--model_size", "tiny", "--batch_size", 0)
    assert (code, out) == (2, "") and err.startswith("error: batch_size")


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--noprefix_cache"]], ids=str)
def test_texts_that_have_ended_hold_no_memory(rng, tmp_path, flags):
    """Of a request for a thousand long texts, only --batch_size and the kept ones hold caches."""
    hparams = TINY | {"n_ctx": 256, "n_embd": 64, "n_layer": 4}
    utils.save_model(tmp_path / "long", ENCODER, hparams, random_params(rng, hparams))
    flags = ["--model_size", tmp_path / "long", "--batch_size", 4, *flags]
    prompts = [bytes(row).decode() for row in rng.integers(97, 123, (1024, 255)).tolist()]
    sizes = []
    with started(*flags) as (server, address):
        with contextlib.closing(post(address, {"prompt": prompts[0], "max_tokens": 1})) as first:
            assert first.makefile("rb").readline().startswith(b"HTTP/1.1 200")
        before = resident(server)
        with contextlib.closing(post(address, {"prompt": prompts, "max_tokens": 1})) as whole:
            reader = ThreadPoolExecutor(1)
            done = reader.submit(lambda: whole.makefile("rb").readline())
            while not done.done():
                sizes.append(resident(server))
                time.sleep(0.05)
        assert done.result().startswith(b"HTTP/1.1 200")
    row_bytes = hparams["n_layer"] * 2 * hparams["n_embd"] * hparams["n_ctx"] * 4
    n_rows = 4 + prefix_cache.MAX_ROWS * ("--noprefix_cache" not in flags)
    assert max(sizes) - before < n_rows * row_bytes + 64 * 2**20 < 1024 * row_bytes / 4


def test_a_small_model_is_copied(models, tmp_path):
    """Whatever becomes of its file, for a map of a shortened file kills the process."""
    folder = tmp_path / "tiny"
    shutil.copytree(models[0] / "tiny", folder)
    params = server_weights.copied(utils.load_encoder_hparams_and_params(str(folder))[2])
    os.truncate(folder / "model.safetensors", 0)
    assert gpt2.generate([1], params, N_HEAD, 4) == gpt2.generate([1], models[1], N_HEAD, 4)


LARGE = """
import serve
from plumbing.cli import run_cli
from serving import weights

weights.MOST_COPIED = 0
run_cli(serve.main)
"""


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("is_large", [False, True])
def test_a_model_that_is_shortened_under_a_server(models, tmp_path, is_large):
    """A small one is served all the same; a large one ends the server, which says why."""
    folder = tmp_path / "tiny"
    shutil.copytree(models[0] / "tiny", folder)
    program = ["-c", LARGE] if is_large else [str(REPO / "serve.py")]
    command = [sys.executable, *program, "--model_size", str(folder), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    server = subprocess.Popen(command, cwd=REPO, **pipes)
    try:
        host, port = server.stdout.readline().decode().split("http://")[1].split(":")
        assert completes((host, int(port)))
        os.truncate(folder / "model.safetensors", 100)
        if is_large:
            _, err = server.communicate(timeout=20)
            assert server.returncode == 1
            assert err.startswith(b"error: ") and b"was changed" in err and err.count(b"\n") == 1
        else:
            time.sleep(3)
            assert completes((host, int(port)))
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_the_server_starts_without_a_stdout():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(REPO / "serve.py"), "--model_size", "shakespeare"]
    command += ["--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    try:
        until(lambda: is_open(("127.0.0.1", port)))
        assert completes(("127.0.0.1", port))
    finally:
        server.terminate()
        _, err = server.communicate(timeout=30)
    assert err == b""


def completes(address):
    with contextlib.closing(post(address, {"prompt": "One", "max_tokens": 3})) as connection:
        return connection.makefile("rb").readline().startswith(b"HTTP/1.1 200")


def is_open(address):
    with contextlib.suppress(OSError), connect(address):
        return True
    return False


@on_linux
@pytest.mark.slow
def test_sigterm_lets_what_runs_end(process):
    """A stream that is half-way comes to its end; nobody new is let in; then the process ends."""
    _, _, folder = process
    with started("--model_size", "slow", "--models_dir", folder) as (server, address):
        fields = {"prompt": "One", "max_tokens": 300, "stream": True, "temperature": 0}
        with contextlib.closing(post(address, fields)) as connection:
            reader = connection.makefile("rb")
            assert b"data: " in reader.read(500)
            server.send_signal(signal.SIGTERM)
            rest = reader.read()
        assert rest.count(b'"finish_reason": "length"') == 1 and b"data: [DONE]" in rest
        assert server.wait(20) in (0, -signal.SIGTERM)
        with pytest.raises(OSError):
            connect(address)
    with started("--model_size", "slow", "--models_dir", folder) as (server, address):
        fields |= {"max_tokens": 4000, "n": 8}  # it takes more than ten seconds
        with contextlib.closing(post(address, fields)) as connection:
            assert b"data: " in connection.makefile("rb").read(500)
            start = time.monotonic()
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            assert 8 < time.monotonic() - start < 25


STORM = """
import json, socket, sys
address, n = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
body = json.dumps({"prompt": "One", "max_tokens": 4000, "stream": n % 2 == 0, "n": 2}).encode()
head = "POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\n"
head += f"Content-Length: {len(body)}\\r\\n\\r\\n"
connections = [socket.create_connection(address) for _ in range(10)]
for connection in connections:
    connection.sendall(head.encode() + body[: None if n % 3 else 20])
print("sent", flush=True)
sys.stdin.read()
"""


@on_linux
@pytest.mark.slow
def test_clients_that_are_killed_leave_nothing_behind(process):
    """SIGKILL to processes that hold ten connections each, whole requests and half ones."""
    server, address, _ = process
    files = f"/proc/{server.pid}/fd"
    assert answers(address)
    before = len(os.listdir(files))
    for n in range(8):
        command = [sys.executable, "-c", STORM, *map(str, address), str(n)]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert client.stdout.readline() == b"sent\n"
        client.kill()
        client.communicate()
    until(lambda: figure(address, "rows_running") == figure(address, "rows_waiting") == 0)
    assert answers(address)
    until(lambda: len(os.listdir(files)) <= before + 3)


def figure(address, name):
    connection = http.client.HTTPConnection(*address, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    lines = [line.split() for line in text.splitlines()]
    return next(float(line[1]) for line in lines if line[0] == f"sixtygpt_{name}")


@pytest.mark.slow
def test_ten_thousand_requests_in_a_row(models):
    """Each answered right; the memory after the last is that after the first thousand."""
    folder, params = models
    prompts = [[i] for i in range(257)]
    texts = [ENCODER.decode(drawn(params, prompt, 2)) for prompt in prompts]
    memory = []
    with started("--model_size", "tiny", "--models_dir", folder) as (server, address):
        connection = http.client.HTTPConnection(*address, timeout=60)
        for i in range(10_000):
            how = {"temperature": 0, "max_tokens": 2, "ignore_eos": True, "stream": i % 5 == 0}
            connection.request(
                "POST", "/v1/completions", json.dumps({"prompt": prompts[i % 257]} | how)
            )
            body = connection.getresponse().read()
            if i % 5:
                assert json.loads(body)["choices"][0]["text"] == texts[i % 257]
            else:
                assert body.endswith(b"data: [DONE]\n\n")
            if i in (999, 9_999):
                memory.append(resident(server))
    assert memory[1] < memory[0] + 30 * 2**20


def resident(process):  # bytes of its memory
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/statm") as f:
        return int(f.read().split()[1]) * 4096
    return 0


TASK = """
task: ours
dataset_path: json
dataset_kwargs: {data_files: {test: TEST}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
def test_lm_eval_measures_what_evaluate_measures(tmp_path, rng):
    """EleutherAI's harness over HTTP, on questions of our own, beside evaluate.py's arithmetic."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    import evaluate

    lines = (REPO / "models" / "shakespeare" / "README.md").read_text("utf-8").split()
    items = []
    for _ in range(12):
        start = int(rng.integers(len(lines) - 12))
        choices = [" " + str(lines[int(i)]) for i in rng.integers(0, len(lines), 4)]
        items.append({"prompt": " ".join(lines[start : start + 6]), "choices": choices})
        items[-1]["answer"] = int(rng.integers(4))
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    (tmp_path / "ours.yaml").write_text(TASK.replace("TEST", json.dumps(str(data))), "utf-8")
    with started("--model_size", "shakespeare") as (_, address):
        where = "base_url=http://{}:{}/v1/completions".format(*address)
        how = "model=shakespeare,tokenizer_backend=remote,tokenized_requests=True,max_length=256"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks"]
        command += ["ours", "--include_path", ".", "--output_path", "out", "--log_samples"]
        command += ["--batch_size", "4", "--model_args", f"{where},{how},num_concurrent=1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = tmp_path.glob("out/**/samples_ours_*.jsonl")
    theirs = {s["doc_id"]: s for s in map(json.loads, samples.read_text().splitlines())}
    encoder, hparams, params = utils.load_encoder_hparams_and_params("shakespeare")
    for i, item in enumerate(items):
        for choice, (said, greedy) in zip(
            item["choices"], theirs[i]["filtered_resps"], strict=True
        ):
            context, ids = encoder.encode(item["prompt"]), encoder.encode(choice)
            row = context + ids, len(ids)
            sums, hits = evaluate.score_row(row, params, hparams["n_head"])
            assert float(said) == pytest.approx(float(sums.sum()), abs=1e-3)
            assert str(greedy) == str(bool(hits.all()))
