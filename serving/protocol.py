"""OpenAI's completions protocol: reads and checks requests, and formats answers and errors.

See https://platform.openai.com/docs/api-reference/completions. Some fields, such as top_k and
ignore_eos, are vLLM's. fields.py lists all of them.
"""

import json
import sys
import time
import uuid
from dataclasses import dataclass, replace

import numpy as np

from generation.sampling import Sampling
from generation.stops import sort_stops
from gpt2 import check_length
from serving.fields import find_refused

MOST_CHOICES = 1024  # the most texts that one request may ask for
MOST_LOGPROBS = 20
MOST_N = 128
MOST_STOPS = 1024
MOST_STOP_CHARACTERS = 10_000  # of all stops together
MOST_ENTRIES = 2**19  # the most log-probabilities: texts * positions * (1 + logprobs)
TOO_LONG = "context_length_exceeded"
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
KINDS |= {404: "invalid_request_error", 405: "invalid_request_error", 408: "timeout_error"}
KINDS |= {413: "invalid_request_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """The error that a client gets instead of an answer. param: the name of the wrong field."""

    def __init__(self, message, status=400, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = KINDS.get(status, "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# --- Reading a request ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A checked request. Fields that it left out have the protocol's defaults."""

    max_tokens: int
    n: int  # texts for each prompt
    sampling: Sampling
    presence_penalty: float
    frequency_penalty: float
    seed: int | None  # 0 or more
    logprobs: int | None  # how many of the likeliest tokens to name
    stops: tuple  # sorted by generation.stops.sort_stops
    stop_ids: frozenset  # tokens that end a text
    min_tokens: int
    bias: np.ndarray | None  # [n_vocab], added to the logits
    echo: bool
    stream: bool
    ignore_eos: bool
    include_usage: bool
    prompts: tuple[list[int], ...] = ()
    strip: bool = False  # whether to drop the space at the beginning of a chat's answer

    @property
    def n_choices(self):
        return len(self.prompts) * self.n

    @property
    def is_scored(self):  # whether the answer has the prompts' log-probabilities
        return self.echo and self.logprobs is not None

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


def read_completion(body, names, encoder, n_ctx):  # bytes -> Asked
    """Reads a completions request. Raises Refusal, which names the wrong field."""
    data = read_object(body)
    check_model(data, names)
    settings = read_settings(data, encoder)
    asked = replace(settings, prompts=read_prompts(data.get("prompt"), encoder, n_ctx))
    if asked.n_choices > MOST_CHOICES:
        words = f"at most {MOST_CHOICES} texts per request (prompts times n) are allowed"
        raise Refusal(words, param="prompt")
    for ids in asked.prompts:
        check_room(ids, min(1, asked.max_tokens), n_ctx, "prompt")
    check_entries(asked, n_ctx)
    return asked


def check_entries(asked, n_ctx):
    """Raises Refusal if there are too many log-probabilities for one answer."""
    if asked.logprobs is None:
        return
    n_new = [min(asked.max_tokens, n_ctx - len(ids)) for ids in asked.prompts]
    n_positions = sum(n_new) + (asked.n_prompt_tokens if asked.echo else 0)
    if n_positions * asked.n * (1 + asked.logprobs) > MOST_ENTRIES:
        count = "texts times tokens times (1 + logprobs)"
        words = f"at most {MOST_ENTRIES} log-probabilities are allowed: {count}"
        raise Refusal(words, param="logprobs")


def check_model(data, names):  # names: those of the server's model
    wanted = data.get("model")
    if wanted is not None and not isinstance(wanted, str):
        raise Refusal("model must be a string", param="model")
    if wanted is not None and wanted not in names:
        words = f"no model {wanted[:100]!r}; this server has {names[0]!r}"
        raise Refusal(words, 404, "model", "model_not_found")


def read_settings(data, encoder, more_stops=()):  # -> Asked, all but its prompts
    largest_int = sys.maxsize
    largest_float = sys.float_info.max
    found = find_refused(data)
    if found is not None:
        name, words = found
        raise Refusal(words, param=name)
    temperature = number(data, "temperature", 1.0, 0, largest_float, float)
    top_p = number(data, "top_p", 1.0, 0, 1, float)
    if top_p == 0:  # only the likeliest token is left, which is greedy
        temperature, top_p = 0.0, 1.0
    asked = Asked(
        max_tokens=number(data, "max_tokens", 16, 0, largest_int),
        n=number(data, "n", 1, 1, MOST_N),
        sampling=Sampling(
            temperature=temperature,
            top_k=max(0, number(data, "top_k", 0, -1, largest_int)),  # -1 means all in vLLM
            top_p=top_p,
            min_p=number(data, "min_p", 0.0, 0, 1, float),
            repetition_penalty=number(data, "repetition_penalty", 1.0, 0.01, 100, float),
        ),
        presence_penalty=number(data, "presence_penalty", 0.0, -2, 2, float),
        frequency_penalty=number(data, "frequency_penalty", 0.0, -2, 2, float),
        seed=read_seed(data),
        logprobs=number(data, "logprobs", None, 0, MOST_LOGPROBS),
        stops=sort_stops([*read_stops(data), *more_stops]),
        stop_ids=read_stop_ids(data, encoder),
        min_tokens=number(data, "min_tokens", 0, 0, largest_int),
        bias=read_bias(data, encoder),
        echo=flag(data, "echo"),
        stream=flag(data, "stream"),
        ignore_eos=flag(data, "ignore_eos"),
        include_usage=read_include_usage(data),
    )
    if asked.max_tokens == 0 and not asked.echo:
        raise Refusal("max_tokens must be 1 or more, except with echo", param="max_tokens")
    if data.get("best_of") not in (None, asked.n):
        raise Refusal("best_of must equal n, because all texts are returned", param="best_of")
    return asked


def read_seed(data):  # -> as NumPy takes it
    seed = number(data, "seed", None, -sys.maxsize, sys.maxsize)
    return None if seed is None else seed % 2**64


def read_include_usage(data):
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refusal("stream_options must be an object", param="stream_options")
    return flag(options, "include_usage")


def number(data, name, default, least, most, kind=int):
    """Returns a number from least to most, a whole one if kind is int. null means the default."""
    value = data.get(name)
    if value is None:
        return default
    kinds, noun = ((int, float), "a number") if kind is float else (int, "a whole number")
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 8.0, which some clients send
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
    if len(stops) > MOST_STOPS or sum(map(len, stops)) > MOST_STOP_CHARACTERS:
        words = f"stop may have at most {MOST_STOPS} strings, of {MOST_STOP_CHARACTERS} characters"
        raise Refusal(words, param="stop")
    return [stop for stop in stops if stop]


def read_stop_ids(data, encoder):  # -> frozenset
    ids = data.get("stop_token_ids") or []
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise Refusal("stop_token_ids must be a list of token ids", param="stop_token_ids")
    check_ids(ids, encoder, "stop_token_ids")
    return frozenset(ids)


def read_bias(data, encoder):  # {"id": number} -> [n_vocab], or None if there is nothing to add
    """Returns the bias, which also prevents ids that are not tokens from being sampled."""
    bias = data.get("logit_bias") or {}
    if not isinstance(bias, dict):
        raise Refusal("logit_bias must be an object of token ids", param="logit_bias")
    for id, value in bias.items():
        if not (id.isascii() and id.isdigit() and len(id) < 10):
            raise Refusal(f"logit_bias: {id[:20]!r} is not a token id", param="logit_bias")
        number({"a bias of logit_bias": value}, "a bias of logit_bias", 0, -100, 100, float)
    check_ids([int(id) for id in bias], encoder, "logit_bias")
    gaps = []
    if len(encoder.piece_of_id) < encoder.n_vocab:
        gaps = [id for id in range(encoder.n_vocab) if id not in encoder.piece_of_id]
    if not bias and not gaps:
        return None
    added = np.zeros(encoder.n_vocab, np.float32)
    for id, value in bias.items():
        added[int(id)] = value or 0
    added[gaps] = -np.inf
    return added


def check_ids(ids, encoder, name):
    """Raises Refusal for an id that is not a token. name: the field that it comes from."""
    for id in ids:
        if id not in encoder.piece_of_id:
            words = f"{name}: {id} is not a token; ids are in 0 .. {encoder.n_vocab - 1}"
            raise Refusal(words, param=name)


def read_prompts(prompt, encoder, n_ctx):  # a string, strings, ids or lists of ids -> lists of ids
    if prompt is None or prompt == []:
        prompt = ""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if isinstance(prompt, list) and all(type(id) is int for id in prompt):
        prompts = [prompt]
    if [] in prompts:
        words = f"prompt {prompts.index([]) + 1} of {len(prompts)} is an empty list of ids"
        raise Refusal(words, param="prompt")
    return tuple(read_prompt(prompt, encoder, n_ctx) for prompt in prompts)


def read_prompt(prompt, encoder, n_ctx, name="prompt"):  # str or ids -> ids
    """name: the field that it comes from, for error messages."""
    if isinstance(prompt, str):
        try:
            return encoder.encode_prompt(prompt, n_ctx)
        except ValueError as error:
            raise Refusal(str(error), param=name, code=TOO_LONG) from None
    if not isinstance(prompt, list) or not all(type(id) is int for id in prompt):
        words = f"{name} must be a string, a list of strings, token ids, or lists of token ids"
        raise Refusal(words, param=name)
    check_ids(prompt, encoder, name)
    return prompt


def check_room(ids, n_new, n_ctx, name):
    """Raises Refusal if there are no ids, or they and n_new more don't fit. name: their field."""
    if not n_new and len(ids) > n_ctx:
        words = f"{len(ids)} tokens, but this model has only {n_ctx} positions (n_ctx)"
        raise Refusal(words, param=name, code=TOO_LONG)
    try:
        check_length(len(ids), n_new, n_ctx)
    except ValueError as error:
        raise Refusal(str(error), param=name, code=TOO_LONG) from None


# --- The shapes of answers ------------------------------------------------------------------------


def new_answer(name, kind="text_completion", prefix="cmpl"):  # the fields that all chunks repeat
    id = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": id, "object": kind, "created": int(time.time()), "model": name}


def usage(n_prompt, n_completion):
    total = n_prompt + n_completion
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": total}


def server_sent(data, kind=None):  # a dict, or "[DONE]" -> one event of a stream
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    for character in "\u0085\u2028\u2029":  # httpx and requests would end a line here
        text = text.replace(character, f"\\u{ord(character):04x}")
    name = f"event: {kind}\n" if kind else ""
    return f"{name}data: {text}\n\n".encode()
