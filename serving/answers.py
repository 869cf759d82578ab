"""Answers to a request: whole, or as a stream of events, from what the engine sends.

The engine delivers events into a request's queue: (index of the text, what is new of it, its new
entries of log-probabilities, why it ended or None, tokens drawn so far), or an exception.
"""

import asyncio
import time

from starlette.responses import JSONResponse, StreamingResponse

from serving.choices import logprobs_of
from serving.protocol import Refusal, server_sent, usage

REASONS = {"endoftext": "stop", "stop": "stop", "length": "length"}


def choice_of(index, text, entries, why, asked, encoder):  # a completion's; chat.py has a chat's
    known = None if asked["logprobs"] is None else logprobs_of(entries, encoder)
    reason = why and REASONS[why]
    return {"index": index, "text": text, "logprobs": known, "finish_reason": reason}


async def answer_whole(request, asked, rows, events, answer, shape=choice_of):
    """The response with all choices, once they are complete. The client may go away before."""
    state, choices, n_drawn = request.app.state, [None] * len(rows), 0

    async def collect():
        nonlocal n_drawn
        async for index, text, entries, why, n in until_all_end(state, rows, events):
            choices[index] = shape(index, text, entries, why, asked, state.encoder)
            n_drawn += n

    try:
        await unless_gone(request, collect())
    finally:
        state.engine.drop(rows)
    counts = usage(sum(map(len, asked["prompts"])), n_drawn)
    return JSONResponse(answer | {"choices": choices, "usage": counts})


def answer_stream(request, asked, rows, events, answer, shape=choice_of, opening=()):
    """The response that sends each token as it is written. It may end before it has begun.

    opening: choices to send before there is any text.
    """
    chunks = stream(request.app.state, asked, rows, events, answer, shape, opening)

    async def respond(scope, receive, send):
        try:
            await StreamingResponse(chunks, media_type="text/event-stream")(scope, receive, send)
        finally:
            request.app.state.engine.drop(rows)

    return respond


async def stream(state, asked, rows, events, answer, shape, opening):
    """The answer's events; an error, too, is an event."""
    n_drawn, more = 0, {"usage": None} if asked["include_usage"] else {}
    try:
        for choice in opening:
            yield server_sent(answer | {"choices": [choice]} | more)
        async for index, text, entries, why, n in until_all_end(state, rows, events):
            n_drawn += n if why else 0
            if text or entries or why:
                choice = shape(index, text, entries, why, asked, state.encoder)
                yield server_sent(answer | {"choices": [choice]} | more)
        if asked["include_usage"]:
            counts = usage(sum(map(len, asked["prompts"])), n_drawn)
            yield server_sent(answer | {"choices": [], "usage": counts})
    except Refusal as refusal:
        yield server_sent(refusal.body)
    yield server_sent("[DONE]")


async def until_all_end(state, rows, events):
    """The events of these rows. Refusal where the engine failed, or it took too long."""
    deadline, n_left = time.monotonic() + state.timeout, len(rows)
    while n_left:
        for event in await next_events(events, deadline, state.timeout):
            if isinstance(event, Refusal):
                raise event
            if isinstance(event, Exception):
                raise Refusal(f"the model failed: {event}", 500, code="engine_failed")
            n_left -= event[3] is not None
            yield event


async def next_events(events, deadline, timeout):
    """All that have come; those of one text are joined, so that a late reader catches up."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            found = [await events.get()]
    except TimeoutError:
        words = f"the request took longer than {timeout:g} seconds (--timeout)"
        raise Refusal(words, 408, code="timeout") from None
    while not events.empty():
        found.append(events.get_nowait())
    return join(found) if len(found) > 1 else found


def join(events):
    joined = {}
    for event in events:
        if isinstance(event, Exception):
            return [event]
        index, text, entries, why, n = event
        _, before, earlier, _, _ = joined.get(index, (index, "", [], None, 0))
        joined[index] = index, before + text, earlier + entries, why, n
    return list(joined.values())


async def unless_gone(request, work):
    """Awaits the work. Refusal where the client goes away first."""
    work = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body is read: only a goodbye can come
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refusal("the client has gone", 499)
        await work
    finally:
        work.cancel()
        gone.cancel()
