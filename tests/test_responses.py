"""/v1/responses: a chat's next message in another shape, with openai's own client as judge."""

import json
import time

import pytest
from conftest import serving

import kv_cache

pytest.importorskip("starlette", reason="starlette is not installed")

TALK = [{"role": "system", "content": "Be"}, {"role": "user", "content": "ab"}]
HOW = {"max_output_tokens": 9, "temperature": 0, "ignore_eos": True}


def respond(client, **asked):
    response = client.post("/v1/responses", json=HOW | asked)
    assert response.status_code == 200, response.text
    return response.json()


def said(client, messages, **asked):  # the same by chats
    asked = {"messages": messages, "max_completion_tokens": 9} | HOW | asked
    answer = client.post("/v1/chat/completions", json=asked).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


@pytest.mark.parametrize(
    "asked",
    [
        {"instructions": "Be", "input": "ab"},
        {"input": TALK},
        {"input": [TALK[0] | {"role": "developer"}, TALK[1] | {"type": "message"}]},
        {"input": [TALK[0], {"role": "user", "content": [{"type": "input_text", "text": "ab"}]}]},
    ],
)
def test_a_response_is_a_chats_answer(client, asked):
    text, usage = said(client, TALK)
    response = respond(client, **asked)
    [message] = response["output"]
    assert message["content"][0]["text"] == text and message["role"] == "assistant"
    assert response["status"] == message["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"]["input_tokens"] == usage["prompt_tokens"]
    assert response["usage"]["output_tokens"] == usage["completion_tokens"] == 9


def test_a_response_that_ends_by_itself_is_completed(client):
    end = {"logit_bias": {"256": 100}, "ignore_eos": False}
    response = respond(client, input="a", **end)
    assert response["status"] == "completed" and response["incomplete_details"] is None


def test_openais_package_responds(openai_client, client):
    text, _ = said(client, TALK)
    how = {"model": "tiny", "max_output_tokens": 9, "temperature": 0}
    how |= {"extra_body": {"ignore_eos": True}}
    answer = openai_client.responses.create(instructions="Be", input="ab", **how)
    assert answer.output_text == text and answer.status == "incomplete"
    assert answer.usage.output_tokens == 9 and answer.id.startswith("resp-")
    talk = [
        *TALK,
        answer.output[0].model_dump(exclude_unset=True),
        {"role": "user", "content": "x"},
    ]
    again = openai_client.responses.create(input=talk, **how)
    plain = [*TALK, {"role": "assistant", "content": text}, {"role": "user", "content": "x"}]
    assert again.output_text == said(client, plain)[0]
    events = list(openai_client.responses.create(input=TALK, stream=True, **how))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == text
    stop = text[len(text) // 2]
    how["extra_body"]["stop"] = stop
    with openai_client.responses.stream(input=TALK, **how) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text.split(stop)[0]


def test_a_stream_that_fails_says_so(params, monkeypatch):
    """Each pass takes longer than the answer may."""
    step = kv_cache.Batch.step

    def slow_step(*args):
        time.sleep(0.05)
        return step(*args)

    monkeypatch.setattr(kv_cache.Batch, "step", slow_step)
    with serving(params, timeout=0.001) as client:
        response = client.post("/v1/responses", json={"input": "a", "stream": True})
        last = response.text.strip().split("\n\n")[-1]
        assert last.startswith("event: error\n")
        assert json.loads(last.partition("data: ")[2])["code"] == "timeout"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "input"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": "a" * 99}, "input"),
        ({"instructions": 3, "input": "a"}, "instructions"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "text": {"format": {"type": "json_object"}}}, "text"),
        ({"input": "a", "top_logprobs": 3}, "top_logprobs"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "a", "truncation": "disabled"}, "truncation"),
        ({"input": "a", "model": "gpt-4"}, "model"),
    ],
)
def test_what_makes_no_sense_is_refused(client, asked, param):
    response = client.post("/v1/responses", json=asked)
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["param"] == param and error["message"]
