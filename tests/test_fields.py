"""What a request's fields do, beside transformers' logits processors and OpenAI's definitions."""

import inspect
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, TINY, exclaiming, serving

import gpt2
import kv_cache
from encoder import Encoder

pytest.importorskip("starlette", reason="starlette is not installed")
from starlette.testclient import TestClient  # noqa: E402

import serve  # noqa: E402
from serving import choices, fields  # noqa: E402
from serving.choices import Choice, choices_of  # noqa: E402
from serving.protocol import read_completion, server_sent  # noqa: E402

COMMANDS = gpt2.main, kv_cache.main  # which sample
ENCODER = Encoder([])
N_HEAD, N_CTX, END = TINY["n_head"], TINY["n_ctx"], 256


def ask(client, prompt, **asked):
    response = client.post("/v1/completions", json={"prompt": prompt, "logprobs": 0} | asked)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def token_ids(choice):
    return choice["logprobs"]["token_ids"]


def a_choice(prompt, **asked):
    body = json.dumps({"prompt": prompt} | asked).encode()
    state = SimpleNamespace(encoder=ENCODER, n_ctx=N_CTX, engine=SimpleNamespace(logits_of=None))
    return Choice(read_completion(body, ["tiny"], ENCODER, N_CTX), 0, state, None)


# --- Sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_repetition_penalty_is_transformers(rng, penalty):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(20):
        logits = rng.standard_normal(50).astype(np.float32)
        ids = rng.integers(0, 50, rng.integers(1, 30)).tolist()
        wanted = processor(torch.tensor([ids]), torch.tensor(logits)[None])[0].numpy()
        before = logits.copy()
        assert np.allclose(gpt2.penalize_repetition(logits, ids, penalty), wanted, rtol=1e-6)
        assert (logits == before).all()


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.2, 0.9, 1.0])
def test_min_p_is_transformers(rng, min_p):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    for _ in range(20):
        logits = rng.standard_normal(50) * 3
        temperature, top_k, top_p = rng.uniform(0.5, 2), int(rng.integers(1, 60)), 0.9
        scores = torch.tensor(logits)[None]
        processors = [
            logits_process.TemperatureLogitsWarper(temperature),
            logits_process.TopKLogitsWarper(top_k),
            logits_process.TopPLogitsWarper(top_p),
            logits_process.MinPLogitsWarper(min_p),
        ]
        for processor in processors:
            scores = processor(None, scores)
        wanted = torch.softmax(scores, -1)[0].numpy()
        ours = gpt2.probabilities(logits, temperature, top_k, top_p, min_p)
        assert np.allclose(ours, wanted, atol=1e-12)


def test_a_cached_text_is_penalized_like_a_plain_one(params, rng):
    sampling = {"repetition_penalty": 1.4, "min_p": 0.05, "temperature": 0.9, "seed": 5}
    for lookup in (0, 3):
        prompts = [rng.integers(0, 256, n).tolist() for n in (3, 9)]
        ours = kv_cache.generate(prompts, params, N_HEAD, 20, lookup=lookup, **sampling)
        assert ours[0] == gpt2.generate(prompts[0], params, N_HEAD, 20, **sampling)
    how = {"repetition_penalty": 1.2, "slide": True}
    [ours] = kv_cache.generate(prompts[:1], params, N_HEAD, 2 * N_CTX, **how)
    assert ours == gpt2.generate(prompts[0], params, N_HEAD, 2 * N_CTX, **how)


def test_a_penalty_ends_a_loop():
    params = exclaiming(TINY)
    loop = gpt2.generate([65], params, N_HEAD, 20)
    assert len(set(loop)) == 1
    assert len(set(gpt2.generate([65], params, N_HEAD, 20, repetition_penalty=2.0))) > 3


def test_presence_and_frequency_penalties_are_openais(rng):
    """A logit loses n * frequency + (n > 0) * presence, if its token was generated n times."""
    for _ in range(10):
        presence, frequency = rng.uniform(-2, 2, 2)
        choice = a_choice("aab", presence_penalty=presence, frequency_penalty=frequency)
        counts = np.zeros(257)
        for _ in range(30):
            logits = rng.standard_normal(257).astype(np.float32)
            wanted = logits - counts * frequency - (counts > 0) * presence
            assert np.allclose(choice.adjust(logits, choice.row), wanted, atol=1e-5)
            counts[choice.sample(logits, choice.row)] += 1


def test_the_server_penalizes_like_gpt2(client, params):
    ids = ENCODER.encode("One")
    for penalty in (1.0, 1.3):
        choice = ask(client, "One", max_tokens=20, temperature=0, repetition_penalty=penalty,
                     ignore_eos=True)  # fmt: skip
        assert token_ids(choice) == gpt2.generate(
            ids, params, N_HEAD, 20, repetition_penalty=penalty
        )


def test_top_p_0_is_greedy(client, params):
    wanted = gpt2.generate(ENCODER.encode("One"), params, N_HEAD, 9)
    choice = ask(client, "One", max_tokens=9, temperature=1.0, top_p=0, ignore_eos=True)
    assert token_ids(choice) == wanted


def test_a_stop_token_ends_a_text_and_is_not_shown(client, params):
    ids = gpt2.generate(ENCODER.encode("One"), params, N_HEAD, 20)
    stop = ids[5]
    n = ids.index(stop)
    asked = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "stop_token_ids": [stop]}
    choice = ask(client, "One", **asked)
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == ENCODER.decode(ids[:n])


@pytest.mark.parametrize("n", [0, 1, 7])
def test_before_min_tokens_nothing_ends_a_text(client, n):
    a, b = ENCODER.encode("AB")
    biases = {str(a): 50, str(b): 90, str(END): 100}
    asked = {"max_tokens": 20, "temperature": 0, "logit_bias": biases}
    choice = ask(client, "One", min_tokens=n, stop_token_ids=[b], **asked)
    assert choice["text"] == "A" * n and choice["finish_reason"] == "stop"
    asked = {"max_tokens": 20, "temperature": 0, "logit_bias": {str(a): 100}}
    choice = ask(client, "One", min_tokens=n, stop="A", **asked)
    assert choice["text"] == "A" * n and choice["finish_reason"] == "stop"


def scripted(monkeypatch, text):  # the tokens that every choice samples next
    ids = iter([*ENCODER.encode(text), *[END] * 9])
    monkeypatch.setattr(choices, "sample", lambda *args, **rest: next(ids))


@pytest.mark.parametrize(("n", "text"), [(0, "ab"), (3, "ab"), (4, "abcdefg")])
def test_a_stop_may_begin_before_min_tokens_but_not_end_there(client, monkeypatch, n, text):
    scripted(monkeypatch, "abcdefg")
    choice = ask(client, "x", max_tokens=7, stop="cd", min_tokens=n)
    assert choice["text"] == text and choice["finish_reason"] == ("stop" if n < 4 else "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "tokens"),
    [
        ("\nB\nUser:", None, "\nB"),
        ("\n\n\nNo.\nUser:", "\n\n\n\n", "\n\n\nNo."),
        ("\n\nOK\n\nQ", "\n\nQ", "\n\nOK"),
    ],
)
def test_a_chats_log_probabilities_are_those_of_its_tokens(
    client, monkeypatch, text, stop, tokens, stream
):
    """Although the white space at its beginning is held back, and then stripped."""
    scripted(monkeypatch, text)
    asked = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "stop": stop}
    asked |= {"max_tokens": 20, "stream": stream}
    response = client.post("/v1/chat/completions", json=asked)
    lines = [response.text]
    if stream:
        lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: {")]
    parts = [json.loads(line)["choices"][0] for line in lines]
    shown = [part["logprobs"]["content"] for part in parts if part.get("logprobs")]
    assert [entry["token"] for content in shown for entry in content] == list(tokens)


# --- Fields that are refused or ignored -----------------------------------------------------------


@pytest.mark.parametrize("name", fields.REFUSED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_field_is_refused_unless_it_asks_for_nothing(client, path, name):
    asked = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "max_tokens": 1}
    for value in (None, *fields.REFUSED[name]):
        assert client.post(path, json=asked | {name: value}).status_code == 200, value
    response = client.post(path, json=asked | {name: "other"})
    assert response.status_code == 400 and response.json()["error"]["param"] == name


def test_fields_that_nobody_knows_are_welcome(client):
    ask(client, "a", max_tokens=1, user="me", metadata={"a": "b"}, store=True, whatever=[1])


def test_the_guide_lists_every_field():
    text = (REPO / "docs" / "guide.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M))
    done = {name: words for name, words in rows.items() if name in fields.DONE}
    assert done == fields.DONE
    refused = re.search(r"^These are rejected unless .*?: (.*?)\. All", text, re.M | re.S)[1]
    assert re.findall(r"`(\w+)`", refused) == list(fields.REFUSED)


def test_the_default_temperatures_are_said_where_people_look():
    """The server's in its own help and the guide; with the page's, in each command's help."""
    asked = read_completion(b'{"prompt": "a"}', ["tiny"], ENCODER, N_CTX)
    sliders = (REPO / "pages" / "sliders.html").read_text("utf-8")
    page = float(re.search(r'id="temperature" .* value="([\d.]+)"', sliders)[1])
    ours = {inspect.signature(main).parameters["temperature"].default for main in COMMANDS}
    assert (asked.sampling.temperature, page, ours) == (1.0, 0.8, {0.0})
    for main in COMMANDS:
        words = " ".join(main.__doc__.split())
        assert "temperature: 0 always takes the likeliest token" in words
        assert "(A server's requests default to 1, and its page starts at 0.8.)" in words
    words = " ".join(serve.main.__doc__.split())
    assert "without a temperature is answered at 1" in words and "page starts at 0.8" in words
    assert "gpt2.py and kv_cache.py default to 0, which is greedy" in words
    guide = " ".join((REPO / "docs" / "guide.md").read_text("utf-8").split())
    assert (
        "Temperature is 0 by default in `gpt2.py` and `kv_cache.py` (greedy), 1 in the server's "
        "protocol (as in OpenAI's) and 0.8 on the server's page." in guide
    )


# --- What clients send ----------------------------------------------------------------------------


def test_a_missing_prompt_is_the_empty_one(client):
    texts = [ask(client, prompt, max_tokens=5, temperature=0)["text"] for prompt in ("", None, [])]
    response = client.post("/v1/completions", json={"max_tokens": 5, "temperature": 0})
    assert {*texts, response.json()["choices"][0]["text"]} == {texts[0]}


def test_an_empty_list_of_ids_is_named(client):
    response = client.post("/v1/completions", json={"prompt": [[65], []]})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "prompt 2 of 2 is an empty list of ids"


def test_whole_floats_are_whole_numbers(client):
    assert len(token_ids(ask(client, "a", max_tokens=8.0, ignore_eos=True))) == 8
    assert client.post("/v1/completions", json={"max_tokens": 8.5}).status_code == 400


def test_messages_in_every_form_that_clients_send(client):
    def chat(*messages):
        asked = {"messages": messages, "max_tokens": 4, "temperature": 0}
        return client.post("/v1/chat/completions", json=asked)

    plain = chat({"role": "system", "content": "Be"}, {"role": "user", "content": "ab"})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    other = chat({"role": "developer", "content": "Be"}, {"role": "user", "content": parts})
    assert plain.status_code == 200
    assert plain.json()["choices"] == other.json()["choices"]
    nothing = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    assert chat(*nothing, nothing[0]).status_code == 200
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert chat({"role": "user", "content": image}).status_code == 400


def test_an_answer_gets_what_is_left_beside_its_conversation(client):
    """langchain's default of 256 tokens never fits a small model."""
    for n in (N_CTX - 3, N_CTX, 256, 10**9):
        asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": n}
        asked |= {"logit_bias": {str(END): -100, "10": -100}}
        answer = client.post("/v1/chat/completions", json=asked).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == N_CTX


@pytest.mark.parametrize("name", ["tiny", "owner/tiny"])
def test_a_model_may_be_asked_for_by_what_the_server_was_started_with(params, name):
    with serving(params, names=["tiny", "owner/tiny"]) as client:
        assert ask(client, "a", max_tokens=1, model=name)
        model = client.get(f"/v1/models/{name}")
        assert model.status_code == 200 and model.json()["object"] == "model"
        assert client.get("/v1/models/other").status_code == 404


def test_what_is_not_there_says_what_there_is(client):
    for path in ("/v1/embeddings", "/v1/audio/speech"):
        response = client.post(path, json={})
        assert response.status_code == 404
        assert "/v1/completions" in response.json()["error"]["message"]


# --- Streams --------------------------------------------------------------------------------------


def test_a_stream_passes_proxies_and_readers_of_lines(client):
    response = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    event = server_sent({"text": "a\u2028b\u2029c\u0085dé"})
    assert len(event.decode().splitlines()) == 2
    assert json.loads(event.decode().removeprefix("data: "))["text"] == "a\u2028b\u2029c\u0085dé"


# --- One request beside others --------------------------------------------------------------------


def test_an_error_in_one_text_ends_that_text_alone(params, monkeypatch):
    def broken(self, logits, row):
        if self.asked.seed == 666:
            raise RuntimeError("no luck")
        return plain(self, logits, row)

    plain = Choice.adjust
    monkeypatch.setattr(Choice, "adjust", broken)
    with serving(params) as client:
        good = ask(client, "One", max_tokens=9, temperature=0)
        response = client.post("/v1/completions", json={"prompt": "One", "seed": 666})
        assert response.status_code == 500 and "no luck" in response.text
        assert client.app.state.engine.prefixes.rows  # nothing of the others' is lost
        assert ask(client, "One", max_tokens=9, temperature=0) == good


def test_ids_without_a_token_are_refused_and_never_sampled(params):
    gap = 100
    encoder = Encoder([])
    del encoder.piece_of_id[gap]
    app = serve.make_app("tiny", encoder, TINY, params)
    with TestClient(app, base_url="http://localhost") as client:
        for asked in ({"prompt": [gap]}, {"logit_bias": {str(gap): 100}}):
            assert client.post("/v1/completions", json={"prompt": "a"} | asked).status_code == 400
        assert client.post("/detokenize", json={"tokens": [gap]}).status_code == 400
        asked = {"prompt": "a", "max_tokens": 40, "temperature": 2.0, "n": 8, "logprobs": 0}
        choices = client.post("/v1/completions", json=asked).json()["choices"]
        assert not any(gap in token_ids(choice) for choice in choices)


def engine_of(params, **options):
    return serve.Engine(params, N_HEAD, metrics={}, **options)


def queue(engine, n, prompt="a", **asked):  # a request for n texts
    body = json.dumps({"prompt": [prompt] * n} | asked).encode()
    asked = read_completion(body, ["tiny"], ENCODER, N_CTX)
    state = SimpleNamespace(encoder=ENCODER, n_ctx=N_CTX, engine=engine)
    engine.submit(asked, choices_of(asked, state, None))
    return asked


def test_requests_take_turns_and_none_gets_more_than_half_while_others_wait(params):
    engine = engine_of(params, batch_size=8, max_waiting=256)
    large, small = queue(engine, 100), queue(engine, 3)
    arrivals = engine.arrivals()
    asked = []
    for _ in range(8):
        next(arrivals)
        asked.append(list(engine.begun.values())[-1].asked)
    assert asked[:6] == [large, small] * 3
    assert asked[6:] == [large, large]  # nobody else waits


def test_a_large_request_leaves_places_for_others(params):
    engine = engine_of(params, batch_size=2, max_waiting=8)
    queue(engine, 100)  # one client's, which takes half of the places
    queue(engine, 1)
    queue(engine, 3)
    with pytest.raises(serve.Refusal, match="texts are already waiting"):
        queue(engine, 1)


LONG = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}


def running(engine, asked):
    return [choice for choice in engine.begun.values() if choice.asked is asked]


@pytest.mark.parametrize("prompt", ["One", "a common beginning, which is read once"])
@pytest.mark.parametrize("n_before", [1, 5])
@pytest.mark.parametrize("n_large", [4, 24])
def test_a_small_request_begins_within_two_passes(params, prompt, n_large, n_before):
    """Counted in passes: beside 4 texts, where there is room, and 24, where there is none."""
    engine = engine_of(params, batch_size=8, max_waiting=256)
    engine.send = lambda parts: None
    how = LONG | {"max_tokens": min(40, N_CTX - len(prompt))}
    large = queue(engine, n_large, prompt, **how)
    choices = list(engine.waiting[large])
    for _ in range(n_before):
        engine.step()
    for n_small in range(1, 4):
        small = queue(engine, 2, f"{n_small}", max_tokens=3, ignore_eos=True)
        engine.step()
        engine.step()
        assert any(choice.n_sampled for choice in running(engine, small))
        assert len(engine.batch.rows) <= 8
    ids = ENCODER.encode(prompt)
    wanted = gpt2.generate(ids, params, N_HEAD, how["max_tokens"])
    while engine.batch.rows or engine.n_waiting():
        engine.step()
    assert all(choice.row.ids == wanted for choice in choices)  # also those that were paused


def test_requests_with_few_rows_do_not_take_them_from_one_another(params):
    engine = engine_of(params, batch_size=4, max_waiting=256)
    engine.send = lambda parts: None
    asked = [queue(engine, 1, f"{n}", **LONG) for n in range(6)]
    for _ in range(10):
        engine.step()
        assert [len(running(engine, one)) for one in asked] == [1, 1, 1, 1, 0, 0]
    for n in (5, 6, 7):  # two rows each, and more that wait
        pair = engine_of(params, batch_size=4, max_waiting=256)
        pair.send = lambda parts: None
        rich = [queue(pair, n, "ab", **LONG) for _ in range(2)]
        pair.step()
        poor = [queue(pair, 1, "c", **LONG) for _ in range(2)]
        for _ in range(9):
            pair.step()
        counts = [len(running(pair, one)) for one in rich + poor]
        assert counts == [1, 1, 1, 1], n
