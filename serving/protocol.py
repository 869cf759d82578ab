"""OpenAI's completions protocol: a request read and checked, the shapes of answers and errors.

https://platform.openai.com/docs/api-reference/completions, and vLLM's reading of it: top_k and
ignore_eos are vLLM's. Unknown fields are taken, as there; what we cannot do is refused.
"""

import json
import sys
import time
import uuid
from dataclasses import dataclass, replace

from generation.sampling import Sampling
from gpt2 import check_length

MOST_CHOICES = 1024  # texts that one request may ask for
MOST_LOGPROBS = 20
MOST_N = 128
TOO_LONG = "context_length_exceeded"
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
KINDS |= {404: "invalid_request_error", 405: "invalid_request_error", 408: "timeout_error"}
KINDS |= {413: "invalid_request_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is not answered, as its client is to hear it. param: the wrong field."""

    def __init__(self, message, status=400, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = KINDS.get(status, "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# --- Reading a request ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been checked. What it left out has the protocol's default."""

    max_tokens: int
    n: int  # texts for each prompt
    sampling: Sampling
    seed: int | None  # 0 or more
    logprobs: int | None  # how many of the likeliest tokens to name
    stop: list[str]
    logit_bias: dict[int, float]
    echo: bool
    stream: bool
    ignore_eos: bool
    include_usage: bool
    prompts: tuple[list[int], ...] = ()
    strip: bool = False  # a chat's answer begins with a space that is none of it

    @property
    def n_choices(self):
        return len(self.prompts) * self.n

    @property
    def n_prompt_tokens(self):
        return sum(map(len, self.prompts))


def read_object(body):  # bytes -> dict
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refusal("the body must be a JSON object")
    return data


def read_completion(body, name, encoder, n_ctx):  # bytes -> Asked
    """A completions request. Raises Refusal, which says which field is wrong."""
    data = read_object(body)
    check_model(data, name)
    settings = read_settings(data, encoder.n_vocab)
    asked = replace(settings, prompts=read_prompts(data.get("prompt"), encoder, n_ctx))
    if asked.n_choices > MOST_CHOICES:
        raise Refusal(f"at most {MOST_CHOICES} texts a request: prompts times n", param="prompt")
    for ids in asked.prompts:
        check_room(ids, asked.max_tokens, n_ctx, "prompt")
    return asked


def check_model(data, name):
    wanted = data.get("model")
    if wanted is not None and not isinstance(wanted, str):
        raise Refusal("model must be a string", param="model")
    if wanted not in (None, name):
        words = f"the model {wanted[:100]!r} is not here, only {name!r}"
        raise Refusal(words, 404, "model", "model_not_found")


def read_settings(data, n_vocab):  # -> Asked, all but its prompts
    whole = sys.maxsize
    real = sys.float_info.max
    asked = Asked(
        max_tokens=number(data, "max_tokens", 16, 0, whole),
        n=number(data, "n", 1, 1, MOST_N),
        sampling=Sampling(
            temperature=number(data, "temperature", 1.0, 0, real, float),
            top_k=max(0, number(data, "top_k", 0, -1, whole)),  # -1 is vLLM's word for all
            top_p=number(data, "top_p", 1.0, sys.float_info.min, 1, float),
        ),
        seed=read_seed(data),
        logprobs=number(data, "logprobs", None, 0, MOST_LOGPROBS),
        stop=read_stops(data),
        logit_bias=read_bias(data, n_vocab),
        echo=flag(data, "echo"),
        stream=flag(data, "stream"),
        ignore_eos=flag(data, "ignore_eos"),
        include_usage=read_include_usage(data),
    )
    if asked.max_tokens == 0 and not asked.echo:
        raise Refusal("max_tokens may be 0 only with echo", param="max_tokens")
    refuse_what_is_not_there(data, asked.n)
    return asked


def read_seed(data):  # -> as NumPy takes it
    seed = number(data, "seed", None, -sys.maxsize, sys.maxsize)
    return None if seed is None else seed % 2**64


def read_include_usage(data):
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refusal("stream_options must be an object", param="stream_options")
    return flag(options, "include_usage")


def refuse_what_is_not_there(data, n):
    if data.get("best_of") not in (None, n):
        raise Refusal("best_of must equal n: nothing is thrown away", param="best_of")
    if data.get("suffix"):
        raise Refusal("suffix is not supported: GPT-2 only goes forward", param="suffix")
    for name in ("presence_penalty", "frequency_penalty"):
        if data.get(name):
            raise Refusal(f"{name} is not supported: leave it out, or 0", param=name)


def number(data, name, default, least, most, kind=int):
    """A number in least .. most; a whole one, if kind is int. null stands for the default."""
    value = data.get(name)
    if value is None:
        return default
    kinds, noun = ((int, float), "a number") if kind is float else (int, "a whole number")
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise Refusal(f"{name} must be {noun}", param=name)
    if not least <= value <= most:
        span = f"{least} or more" if most >= sys.maxsize else f"from {least:.3g} to {most}"
        raise Refusal(f"{name} must be {span}, and finite", param=name)
    return value


def flag(data, name):
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"{name} must be true or false", param=name)
    return bool(value)


def read_stops(data):  # -> list of str
    stops = data.get("stop")
    stops = [stops] if isinstance(stops, str) else stops or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refusal("stop must be a string or a list of strings", param="stop")
    return [stop for stop in stops if stop]


def read_bias(data, n_vocab):  # {"id": number} -> {id: float}
    bias = data.get("logit_bias") or {}
    if not isinstance(bias, dict):
        raise Refusal("logit_bias must be an object of token ids", param="logit_bias")
    for id, value in bias.items():
        if not (id.isascii() and id.isdigit() and len(id) < 10 and int(id) < n_vocab):
            raise Refusal(f"logit_bias: {id!r} is no id below {n_vocab}", param="logit_bias")
        number({"a bias of logit_bias": value}, "a bias of logit_bias", 0, -100, 100, float)
    return {int(id): float(value or 0) for id, value in bias.items()}


def read_prompts(prompt, encoder, n_ctx):  # a string, strings, ids or lists of ids -> lists of ids
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        prompts = [prompt]
    if not prompts:
        raise Refusal("prompt is an empty list", param="prompt")
    return [read_prompt(prompt, encoder, n_ctx) for prompt in prompts]


def read_prompt(prompt, encoder, n_ctx, name="prompt"):  # str or ids -> ids
    """name: the field that it comes from, for what a Refusal says."""
    if isinstance(prompt, str):
        try:
            return encoder.encode_prompt(prompt, n_ctx)
        except ValueError as error:
            raise Refusal(str(error), param=name, code=TOO_LONG) from None
    if not isinstance(prompt, list) or not all(type(id) is int for id in prompt):
        words = f"{name} must be a string, a list of strings, token ids, or lists of token ids"
        raise Refusal(words, param=name)
    if prompt and not 0 <= min(prompt) <= max(prompt) < encoder.n_vocab:
        raise Refusal(f"{name}: an id is not in 0 .. {encoder.n_vocab - 1}", param=name)
    return prompt


def check_room(ids, n_new, n_ctx, name):
    """Refusal for no ids, and where these and n_new more do not fit. name: their field's."""
    if not n_new and len(ids) > n_ctx:
        words = f"{len(ids)} tokens, but this model has only {n_ctx} positions (n_ctx)"
        raise Refusal(words, param=name, code=TOO_LONG)
    try:
        check_length(len(ids), n_new, n_ctx)
    except ValueError as error:
        raise Refusal(str(error), param=name, code=TOO_LONG) from None


# --- The shapes of answers ------------------------------------------------------------------------


def new_answer(name, kind="text_completion", prefix="cmpl"):  # what all chunks of an answer repeat
    id = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": id, "object": kind, "created": int(time.time()), "model": name}


def usage(n_prompt, n_completion):
    total = n_prompt + n_completion
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": total}


def server_sent(data):  # a dict, or "[DONE]" -> one event of a stream
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
