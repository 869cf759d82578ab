"""OpenAI's responses protocol in its simplest form: one text in, one text out, whole or streamed.

See https://platform.openai.com/docs/api-reference/responses. A response is the next message of a
chat in a different format. Nothing is stored, so the whole conversation is sent each time.
"""

import sys

from starlette.responses import JSONResponse

from serving.answers import Answer
from serving.chat import read_chat
from serving.protocol import Refusal, new_answer, number, server_sent

CHATS_ALONE = ("max_tokens", "n", "logprobs", "top_logprobs", "response_format")
TEXT_PARTS = ("input_text", "output_text")
ALWAYS = {"error": None, "previous_response_id": None, "store": False, "truncation": "auto"}
ALWAYS |= {"parallel_tool_calls": False, "tool_choice": "none", "tools": []}
PLACE = {"output_index": 0, "content_index": 0}


def read_response(data, names, encoder, n_ctx):  # the body's object -> Asked
    if data.get("top_logprobs"):
        raise Refusal("top_logprobs is not supported here; use completions", param="top_logprobs")
    if data.get("text") not in (None, {}, {"format": {"type": "text"}}):
        raise Refusal("text.format must be text, if it is given", param="text")
    chat = data | dict.fromkeys(CHATS_ALONE)
    chat["messages"] = read_input(data.get("input"), data.get("instructions"))
    chat["max_completion_tokens"] = number(data, "max_output_tokens", None, 1, sys.maxsize)
    try:
        return read_chat(chat, names, encoder, n_ctx)
    except Refusal as refusal:
        if refusal.body["error"]["param"] == "messages":
            refusal.body["error"]["param"] = "input"
        raise


def read_input(items, instructions):  # -> messages, as in a chat
    if not isinstance(items, str | list):
        raise Refusal("input must be a string or a list of messages", param="input")
    if not isinstance(instructions, str | None):
        raise Refusal("instructions must be a string", param="instructions")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            raise Refusal("input: only messages are supported", param="input")
        content = item.get("content")
        if isinstance(content, list):
            content = [read_part(part) for part in content]
        messages.append({"role": item.get("role"), "content": content})
    return messages


def read_part(part):
    is_text = isinstance(part, dict) and part.get("type") in TEXT_PARTS
    return part | {"type": "text"} if is_text else part


class Response(Answer):
    """An Answer of one text in this protocol's format. data: the request, which it repeats."""

    def __init__(self, state, asked, data):
        super().__init__(state, asked, new_answer(state.name, "response", "resp"))
        repeated = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata")
        self.fields |= ALWAYS | {name: data.get(name) for name in repeated}
        self.fields["created_at"] = self.fields.pop("created")
        self.message_id = self.fields["id"].replace("resp", "msg")

    def respond(self, parts):
        return JSONResponse(self.response(parts[0].text, parts[0]))

    def response(self, text="", part=None):  # part: the last one, or None if there is none yet
        if part is None:
            return self.fields | {"status": "in_progress", "output": [], "usage": None}
        n_prompt, n_new = self.asked.n_prompt_tokens, part.n_sampled
        usage = {"input_tokens": n_prompt, "input_tokens_details": {"cached_tokens": 0}}
        usage |= {"output_tokens": n_new, "output_tokens_details": {"reasoning_tokens": 0}}
        usage |= {"total_tokens": n_prompt + n_new}
        is_cut = part.end == "length"
        status = "incomplete" if is_cut else "completed"
        message = self.message(status, text_part(text))
        found = {"status": status, "output": [message], "usage": usage}
        return self.fields | found | {
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None
        }  # fmt: skip

    def message(self, status, *content):
        message = {"type": "message", "id": self.message_id, "role": "assistant"}
        return message | {"status": status, "content": content}

    async def stream(self):
        """Yields numbered events. An error is also sent as an event."""
        text, n_sent = "", 0

        def event(kind, **fields):
            nonlocal n_sent
            n_sent += 1
            return server_sent({"type": kind, "sequence_number": n_sent - 1} | fields, kind)

        item = PLACE | {"item_id": self.message_id}
        try:
            yield event("response.created", response=self.response())
            message = self.message("in_progress")
            yield event("response.output_item.added", item=message, output_index=0)
            yield event("response.content_part.added", part=text_part(""), **item)
            async for part in self.parts():
                text += part.text
                if part.text:
                    yield event("response.output_text.delta", delta=part.text, logprobs=[], **item)
            response = self.response(text, part)
            yield event("response.output_text.done", text=text, logprobs=[], **item)
            yield event("response.content_part.done", part=text_part(text), **item)
            yield event("response.output_item.done", item=response["output"][0], output_index=0)
            yield event(f"response.{response['status']}", response=response)
        except Refusal as refusal:
            yield event("error", **refusal.body["error"])


def text_part(text):
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
