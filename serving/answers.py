"""Builds the answer to a request, as a whole or as a stream of events.

The engine delivers Parts of the request's choices, or an exception, into the request's queue.
"""

import asyncio
import time
from functools import partial

from starlette.responses import JSONResponse, StreamingResponse

from serving.choices import Part, choices_of, logprobs_of
from serving.protocol import Refusal, server_sent, usage

UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # for proxies and for nginx
MOST_BUILT_HERE = 64  # texts and log-probabilities; other requests wait while they are built
REASONS = {"endoftext": "stop", "stop": "stop", "length": "length"}


def choice_of(part, asked, encoder):  # a completion's; chat.py has a chat's
    known = None if asked.logprobs is None else logprobs_of(part.entries, encoder)
    reason = part.end and REASONS[part.end]
    return {"index": part.index, "text": part.text, "logprobs": known, "finish_reason": reason}


class Answer:
    """The response to a checked request, whose texts are waiting or being generated.

    fields: the fields that each piece of the answer repeats.
    shape: shape(part, asked, encoder) returns a choice of the answer.
    opening: choices that a stream sends before there is any text.
    """

    def __init__(self, state, asked, fields, shape=choice_of, opening=()):
        self.state = state
        self.asked = asked
        self.fields = fields
        self.shape = shape
        self.opening = opening
        self.queue = asyncio.Queue()
        self.choices = []

    async def __call__(self, scope, receive, send):  # as ASGI calls a response
        """Raises Refusal if too many texts are already waiting, or if no answer can be given."""
        begin = partial(choices_of, self.asked, self.state, self.queue.put_nowait)
        many = self.asked.n_choices > MOST_BUILT_HERE
        self.choices = await asyncio.to_thread(begin) if many else begin()
        self.state.engine.submit(self.asked, self.choices)
        try:
            if self.asked.stream:
                response = StreamingResponse(
                    self.stream(), headers=UNBUFFERED, media_type="text/event-stream"
                )
            else:
                response = await unless_gone(receive, self.whole())
            await response(scope, receive, send)
        finally:  # the client may have gone before the end, or before the beginning
            self.state.engine.drop(self.choices)

    async def whole(self):  # -> the response
        """Returns all choices once they are complete. A thread builds a large answer."""
        parts = [None] * len(self.choices)
        async for part in self.parts():
            parts[part.index] = part
        if len(parts) + sum(len(part.entries) for part in parts) <= MOST_BUILT_HERE:
            return self.respond(parts)
        return await asyncio.to_thread(self.respond, parts)

    def respond(self, parts):
        choices = [self.shape(part, self.asked, self.state.encoder) for part in parts]
        counts = usage(self.asked.n_prompt_tokens, sum(part.n_sampled for part in parts))
        return JSONResponse(self.fields | {"choices": choices, "usage": counts})

    async def stream(self):
        """Yields an event for each token as it is generated. An error is also sent as an event."""
        no_usage = {"usage": None} if self.asked.include_usage else {}
        n_sampled = 0

        def event(part):
            choice = self.shape(part, self.asked, self.state.encoder)
            return server_sent(self.fields | {"choices": [choice]} | no_usage)

        try:
            for choice in self.opening:
                yield server_sent(self.fields | {"choices": [choice]} | no_usage)
            async for part in self.parts():
                n_sampled += part.n_sampled if part.end else 0
                if len(part.entries) > MOST_BUILT_HERE:
                    yield await asyncio.to_thread(event, part)
                elif part.text or part.entries or part.end:
                    yield event(part)
            if self.asked.include_usage:
                counts = usage(self.asked.n_prompt_tokens, n_sampled)
                yield server_sent(self.fields | {"choices": [], "usage": counts})
        except Refusal as refusal:
            yield server_sent(refusal.body)
        yield server_sent("[DONE]")

    async def parts(self):
        """Yields the parts of all choices. Raises Refusal if the engine fails, or after a timeout.

        Parts of the same choice that have arrived in the meantime are merged, so a slow reader
        catches up.
        """
        deadline = time.monotonic() + self.state.timeout
        n_left = len(self.choices)
        while n_left:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    found = [await self.queue.get()]
            except TimeoutError:
                words = f"the request took longer than {self.state.timeout:g} seconds (--timeout)"
                raise Refusal(words, 408, code="timeout") from None
            while not self.queue.empty():
                found.append(self.queue.get_nowait())
            for part in merge(found) if len(found) > 1 else found:
                if isinstance(part, Refusal):
                    raise part
                if isinstance(part, Exception):
                    raise Refusal(f"the model failed: {part}", 500, code="engine_failed")
                n_left -= part.end is not None
                yield part


def merge(parts):  # -> one part for each choice, or only the first exception
    merged = {}
    for part in parts:
        if isinstance(part, Exception):
            return [part]
        before = merged.get(part.index, Part(part.index, "", [], None, 0))
        merged[part.index] = part._replace(
            text=before.text + part.text, entries=before.entries + part.entries
        )
    return list(merged.values())


async def unless_gone(receive, work):
    """Awaits the work and returns its result. Raises Refusal if the client goes away first."""
    work = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(receive())  # the body has been read, so this is a disconnect
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal("the client has gone", 499)
        return await work
    finally:
        work.cancel()
        gone.cancel()
