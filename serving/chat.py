"""OpenAI's chat protocol, where it differs from completions: it turns messages into the next one.

See https://platform.openai.com/docs/api-reference/chat. Missing fields have vLLM's defaults: an
answer may be as long as the context allows, and the temperature is 1.
"""

import sys
from dataclasses import replace

from corpus.chat import NEXT_TURN, check_messages, encode_conversation
from serving.answers import REASONS
from serving.protocol import (
    MOST_LOGPROBS,
    TOO_LONG,
    Refusal,
    check_entries,
    check_model,
    flag,
    number,
    read_settings,
)

# --- Reading a request ----------------------------------------------------------------------------


def read_chat(data, names, encoder, n_ctx):  # the body's object -> Asked
    """Reads a chat's request. Its only prompt is the end of the conversation, as much as fits."""
    check_model(data, names)
    refuse_what_is_not_text(data)
    n_most = read_most(data)
    translated = {"logprobs": read_logprobs(data), "max_tokens": None}
    settings = read_settings(data | translated, encoder, more_stops=[NEXT_TURN])
    ids = read_messages(data.get("messages"), encoder, n_ctx, n_most)
    n_most = min(n_most or n_ctx, n_ctx - len(ids))
    asked = replace(settings, prompts=(ids,), max_tokens=n_most, strip=True)
    check_entries(asked, n_ctx)
    return asked


def refuse_what_is_not_text(data):
    if data.get("echo"):
        raise Refusal("echo is not supported in a chat; leave it out", param="echo")
    form = data.get("response_format") or {"type": "text"}
    if not isinstance(form, dict) or form.get("type") != "text":
        raise Refusal("response_format must be text, if it is given", param="response_format")


def read_most(data):  # -> the most tokens of an answer, None for as many as fit
    newer = number(data, "max_completion_tokens", None, 1, sys.maxsize)
    return newer or number(data, "max_tokens", None, 1, sys.maxsize)


def read_logprobs(data):  # -> how many of the likeliest tokens to name, or None, as in completions
    n = number(data, "top_logprobs", None, 0, MOST_LOGPROBS)
    if flag(data, "logprobs"):
        return n or 0
    if n:
        raise Refusal("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


def read_messages(messages, encoder, n_ctx, n_most):  # -> ids
    """Encodes as much of the conversation's end as leaves room for an answer of n_most tokens.

    Without such a limit, or with one that can never fit, a quarter of the positions is left for the
    answer. If the last message by itself is too long for that, the answer gets the rest.
    """
    try:
        messages = check_messages(messages)
    except ValueError as error:
        raise Refusal(str(error), param="messages") from None
    n_answer = n_most if n_most is not None and n_most < n_ctx else n_ctx // 4
    try:
        return encode_conversation(messages, encoder, n_ctx - n_answer)
    except ValueError:
        pass
    try:
        return encode_conversation(messages, encoder, n_ctx - 1)
    except ValueError as error:
        raise Refusal(str(error), param="messages", code=TOO_LONG) from None


# --- The shapes of answers ------------------------------------------------------------------------


def message_of(part, asked, encoder):
    message = {"role": "assistant", "content": part.text, "refusal": None}
    return choice_with({"message": message}, part, asked, encoder)


def delta_of(part, asked, encoder):
    delta = {"content": part.text} if part.text else {}
    return choice_with({"delta": delta}, part, asked, encoder)


def role_of(index):  # the first chunk of each answer in a stream, before its text
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def choice_with(said, part, asked, encoder):
    known = None
    if asked.logprobs is not None:
        tokens = [token_of(*entry[:4], encoder) for entry in part.entries]
        known = {"content": tokens, "refusal": None}
    reason = part.end and REASONS[part.end]
    return {"index": part.index, **said, "logprobs": known, "finish_reason": reason}


def token_of(id, log_prob, best_ids, best, encoder):
    tops = zip(best_ids.tolist(), best.tolist(), strict=True)
    likeliest = [describe(other, value, encoder) for other, value in tops]
    return describe(id, float(log_prob), encoder) | {"top_logprobs": likeliest}


def describe(id, log_prob, encoder):
    own = list(encoder.decode_bytes([id]))
    return {"token": encoder.decode([id]), "logprob": log_prob, "bytes": own}
