"""serve.py as other people's clients use it: litellm and LangChain, beside plain requests."""

import pytest
from conftest import TINY

pytest.importorskip("starlette", reason="starlette is not installed")
pytestmark = pytest.mark.slow
TALK = [{"role": "system", "content": "Be"}, {"role": "user", "content": "ab"}]
PLAIN = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def base(address):
    return "http://{}:{}/v1".format(*address)


def completions(client, prompt, **asked):  # -> texts
    answer = client.post("/v1/completions", json=PLAIN | {"prompt": prompt} | asked).json()
    return [choice["text"] for choice in answer["choices"]]


def chats(client, **asked):  # -> texts
    answer = client.post("/v1/chat/completions", json=PLAIN | {"messages": TALK} | asked).json()
    return [choice["message"]["content"] for choice in answer["choices"]]


# --- litellm --------------------------------------------------------------------------------------


@pytest.fixture
def litellm(monkeypatch, base):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # asks no other server
    monkeypatch.setenv("OPENAI_API_BASE", base)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return pytest.importorskip("litellm", reason="litellm is not installed")


def test_litellm_completes(litellm, client):
    def ask(**asked):
        asked = {"extra_body": {"ignore_eos": True}, "max_retries": 0, "temperature": 0} | asked
        return litellm.text_completion(model="text-completion-openai/tiny", **asked)

    prompts = ["One", "Two"]
    answer = ask(prompt=prompts, max_tokens=9)
    assert [choice.text for choice in answer.choices] == completions(client, prompts, max_tokens=9)
    how = {"n": 3, "seed": 5, "temperature": 1, "max_tokens": 9}
    answer = ask(prompt="One", **how)
    assert [choice.text for choice in answer.choices] == completions(client, "One", **how)
    parts = ask(prompt="One", max_tokens=9, stream=True)
    [text] = completions(client, "One", max_tokens=9)
    assert "".join(part.choices[0].text or "" for part in parts) == text
    answer = ask(prompt="One", max_tokens=9, stop=[text[1]])
    assert answer.choices[0].text == text.split(text[1])[0]
    assert answer.choices[0].finish_reason == "stop"
    answer = ask(prompt="One", max_tokens=5000)
    assert answer.usage.completion_tokens == TINY["n_ctx"] - len("One")
    assert answer.choices[0].finish_reason == "length"


def test_litellm_chats(litellm, client):
    def ask(**asked):
        asked = {"extra_body": {"ignore_eos": True}, "max_retries": 0, "temperature": 0} | asked
        return litellm.completion(model="openai/tiny", messages=TALK, **asked)

    [text] = chats(client, max_tokens=9)
    assert ask(max_tokens=9).choices[0].message.content == text
    how = {"n": 3, "seed": 5, "temperature": 1, "max_tokens": 9}
    choices = ask(**how).choices
    assert [choice.message.content for choice in choices] == chats(client, **how)
    parts = ask(max_tokens=9, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    choice = ask(max_tokens=9, stop=[text[1]]).choices[0]
    assert choice.message.content == text.split(text[1])[0] and choice.finish_reason == "stop"
    assert ask(max_tokens=99999).choices[0].finish_reason == "length"
    with pytest.raises(litellm.BadRequestError, match="there is room for"):
        litellm.completion(model="openai/tiny", messages=[TALK[1] | {"content": "x" * 99}])


# --- LangChain ------------------------------------------------------------------------------------


@pytest.fixture
def langchain(base):
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    how = {"base_url": base, "api_key": "none", "max_retries": 0, "model": "tiny"}
    how |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    return module, how


def test_langchain_completes(langchain, client):
    module, how = langchain
    text = module.OpenAI(**how).invoke("One")  # its default of 256 tokens does not fit
    assert [text] == completions(client, "One", max_tokens=256)
    sampled = {"n": 2, "seed": 5, "temperature": 1, "max_tokens": 9}
    result = module.OpenAI(**how | sampled, best_of=2).generate(["One", "Two"])
    texts = [generation.text for row in result.generations for generation in row]
    assert texts == completions(client, ["One", "Two"], **sampled)
    assert "".join(module.OpenAI(**how).stream("One")) == text
    assert module.OpenAI(**how).invoke("One", stop=[text[1]]) == text.split(text[1])[0]


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain_chats(langchain, client, use_responses_api):
    module, how = langchain
    chat = module.ChatOpenAI(**how, max_tokens=9, use_responses_api=use_responses_api)
    [text] = chats(client, max_tokens=9)
    talk = [("system", "Be"), ("user", [{"type": "text", "text": "ab"}])]
    answer = chat.invoke(talk)
    assert answer.text == text and answer.usage_metadata["output_tokens"] == 9
    assert "".join(part.text for part in chat.stream(talk)) == text
    turns = [*talk, ("ai", "c"), ("user", "d")]
    plain = [*TALK, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    assert [chat.invoke(turns).text] == chats(client, messages=plain, max_tokens=9)
    if not use_responses_api:
        stopped = chat.bind(stop=[text[1]]).invoke(talk)
        assert stopped.text == text.split(text[1])[0]
        assert module.ChatOpenAI(**how, max_tokens=9999).invoke(talk).text.startswith(text)
