"""A server that speaks OpenAI's protocol, completions and chats: many clients, one batch.

    python serve.py --model_size shakespeare
    curl localhost:8000/v1/completions -d '{"prompt": "ROMEO:", "max_tokens": 40}'

Two threads. The first is asyncio's: it reads requests, checks them and sends answers (the routes,
below). The second is the engine's, which does all the arithmetic. Each text that is asked for is a
row, and the loop is kv_cache.py's: between two passes, rows that wait join the batch, rows that
have ended leave it, and rows whose client has gone are taken out; a pass then writes a token of
each. So nobody waits for another's text to end, and one reading of the weights serves all.

What passes between the threads: rows into a deque, events out by call_soon_threadsafe.
"""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import deque
from functools import partial

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ModuleNotFoundError as missing:  # nothing else needs them, so they may not be there
    if __name__ != "__main__":
        raise
    print(f"error: {missing}: pip install -r requirements/serve.txt", file=sys.stderr)
    sys.exit(2)

import kv_cache
from engine import products
from engine.kept import keep, touch
from engine.rows import drawing, new_row
from engine.threads import own_threads
from pages.explanation import explain
from serving import about, play
from serving import metrics as figures
from serving.answers import answer_stream, answer_whole, choice_of
from serving.chat import delta_of, message_of, read_chat, role_of
from serving.choices import Choice
from serving.connections import Server, listen
from serving.guard import Cors, Guard, read_allowed
from serving.protocol import Refusal, new_answer, read_completion

# --------------------------------------------------------------------------------------------------
# The engine
# --------------------------------------------------------------------------------------------------


class Engine:
    """The thread that owns the arithmetic. Other threads call submit, drop and stop only."""

    def __init__(self, params, n_head, batch_size, max_waiting):
        self.params, self.n_head = products.wrap(params), n_head
        self.batch_size, self.max_waiting = batch_size, max_waiting
        self.inbox, self.wake = deque(), threading.Event()  # what others touch
        self.waiting, self.rows, self.begun, self.kept = deque(), [], [], []
        self.is_stopped, self.is_late, self.loop = False, False, None
        self.metrics = figures.new_metrics()

    def start(self, loop):
        self.loop = loop
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def stop(self):
        self.is_stopped = True
        self.wake.set()
        self.thread.join(timeout=5)

    def stop_late(self):
        """Ends whatever is still asked for: the server has waited long enough to shut down."""
        self.is_late = True
        self.wake.set()

    def submit(self, rows):
        """Queues new rows; Refusal if too many wait. row["deliver"] is given what they write."""
        if self.n_waiting() >= self.max_waiting:
            words = f"{self.n_waiting()} texts wait already (--max_waiting): try again later"
            raise Refusal(words, 429, code="queue_full", headers={"retry-after": "1"})
        self.inbox.extend(rows)
        self.wake.set()

    def n_waiting(self):
        return len(self.inbox) + len(self.waiting)

    def drop(self, rows):
        """Their client has gone: they leave before the next pass."""
        for row in rows:
            row["is_dropped"] = True

    def run(self):
        """The thread's loop. Whatever goes wrong ends the rows it concerns, and nothing else."""
        self.warm_up()
        while not self.is_stopped:
            self.wake.clear()
            if self.is_late:
                self.end_all(Refusal("the server is shutting down", 503, code="shutting_down"))
            if not (self.rows or self.n_waiting()):
                self.wake.wait()
            try:
                self.turn()
            except Exception as error:
                self.fail(error)

    def warm_up(self):
        """A pass of two rows, so that libraries and threads are ready for the first client."""
        caches = [kv_cache.new_cache(self.params, self.n_head) for _ in "ab"]
        kv_cache.step(caches, [0, 0], self.params, self.n_head)

    def turn(self):
        """A pass of all rows; then what they wrote goes to those who wait for it."""
        self.sort_out()
        n_rows, n_begun, start = len(self.rows), len(self.begun), time.perf_counter()
        written = kv_cache.turn(
            self.rows, self.arrivals(), self.batch_size, self.params, self.n_head, kept=self.kept
        )
        if n_rows:
            self.measure(len(written), time.perf_counter() - start)
        for row in self.begun[n_begun:]:
            touch(self.kept, row)
        heard = [(row, why) for row, _, why in written if why or row["is_streamed"]]
        events = [(row["deliver"], event_of(row, why)) for row, why in heard]
        for row, why in heard:
            if why:
                keep(self.kept, row)
        self.send(events)
        self.begun = [row for row in self.begun if not row["end"]]

    def sort_out(self):
        """Takes in the rows that have arrived; takes out those whose client has gone."""
        while self.inbox:
            self.waiting.append(self.inbox.popleft())
        if any(row["is_dropped"] for row in (*self.rows, *self.waiting)):
            for row in self.rows:
                row["end"] = "dropped" if row["is_dropped"] else None
            self.rows[:] = [row for row in self.rows if not row["is_dropped"]]
            self.begun = [row for row in self.begun if not row["is_dropped"]]
            self.waiting = deque(row for row in self.waiting if not row["is_dropped"])

    def arrivals(self):  # the rows that wait, as long as there are any
        while self.waiting:
            self.begun.append(self.waiting.popleft())
            yield self.begun[-1]

    def fail(self, error):
        """Ends all rows whose end nobody has heard of, with the error."""
        rows, self.begun = self.begun, []
        for row in rows:
            row["end"] = "failed"
        self.rows.clear()
        self.kept.clear()  # memory may be what is missing
        self.send([(row["deliver"], error) for row in rows])

    def end_all(self, refusal):
        """Ends all rows, those that wait included."""
        self.sort_out()
        self.begun += self.waiting
        self.waiting.clear()
        self.fail(refusal)

    def send(self, events):
        """All events of a pass, handed to asyncio's thread at once."""
        if events:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
                self.loop.call_soon_threadsafe(deliver, events)

    def measure(self, n_written, seconds):
        figures.count(self.metrics, "passes_total")
        figures.count(self.metrics, "pass_seconds_total", seconds)
        figures.count(self.metrics, "completion_tokens_total", n_written)
        if n_written:
            figures.observe(self.metrics, "seconds_per_token", seconds, n_written)


def event_of(row, why):  # -> (index, new text, new entries, why it ended, tokens drawn)
    return row["index"], *row["choice"].take(why), why, row["choice"].n_drawn


def deliver(events):
    for receive, event in events:
        receive(event)


# --------------------------------------------------------------------------------------------------
# The routes
# --------------------------------------------------------------------------------------------------


async def completions(request):
    """POST /v1/completions"""
    state, body = request.app.state, await request.body()
    # In a thread: a large body takes a while, and the loop could do nothing else meanwhile.
    asked = await asyncio.to_thread(read_completion, body, state.name, state.encoder, state.n_ctx)
    return await begin(request, asked, new_answer(state.name))


async def chats(request):
    """POST /v1/chat/completions"""
    state, body = request.app.state, await request.body()
    asked = await asyncio.to_thread(read_chat, body, state.name, state.encoder, state.n_ctx)
    if not asked["stream"]:
        answer = new_answer(state.name, "chat.completion", "chatcmpl")
        return await begin(request, asked, answer, message_of)
    answer = new_answer(state.name, "chat.completion.chunk", "chatcmpl")
    return await begin(request, asked, answer, delta_of, map(role_of, range(asked["n"])))


async def begin(request, asked, answer, shape=choice_of, opening=()):  # -> the response
    """Submits the rows that a checked request asks for.

    answer: what each part of the answer repeats; shape: what makes its choices; opening: what a
    stream sends first.
    """
    engine, events = request.app.state.engine, asyncio.Queue()
    rows = rows_of(asked, request.app.state, events.put_nowait)
    engine.submit(rows)
    n_prompt = sum(map(len, asked["prompts"]))
    figures.count(engine.metrics, "prompt_tokens_total", n_prompt)
    if asked["stream"]:
        return answer_stream(request, asked, rows, events, answer, shape, opening)
    return await answer_whole(request, asked, rows, events, answer, shape)


def rows_of(asked, state, deliver):  # -> a row for each of n texts of each prompt, in this order
    rows, engine = [], state.engine
    logits_of = partial(kv_cache.next_logits, params=engine.params)
    sampling = asked["temperature"], asked["top_k"], asked["top_p"]
    seed = None if asked["seed"] is None else asked["seed"] % 2**64
    for index in range(len(asked["prompts"]) * asked["n"]):
        prompt = asked["prompts"][index // asked["n"]]
        draw = drawing(seed, index, sampling)
        choice = Choice(prompt, asked, state.encoder, draw, logits_of)
        row = new_row(prompt, asked["max_tokens"], choice.draw, choice.end, choice.stop)
        row |= {"choice": choice, "index": index, "deliver": deliver, "is_dropped": False}
        row |= {"is_streamed": asked["stream"], "read": choice.read if choice.is_scored else None}
        rows.append(row)
    return rows


async def explain_text(request):
    """GET /explain?text= or ?ids=: explain.py's page of it, in which heads can be switched off."""
    state = request.app.state
    play.check_link(request)

    def write():
        ids = play.read_link(request.query_params, state.encoder, state.n_ctx)
        with own_threads(len(ids)):
            model = state.encoder, state.hparams, state.engine.params, state.name
            return explain(ids, *model, is_served=True)

    try:
        async with state.room:
            return play.page_response(await asyncio.to_thread(write))
    except ValueError as error:
        raise Refusal(str(error), param="text") from None


ROUTES = [
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chats, methods=["POST"]),
    Route("/explain", explain_text),
    *play.ROUTES,
    *about.ROUTES,
]

# --------------------------------------------------------------------------------------------------
# The application, and the command line
# --------------------------------------------------------------------------------------------------


async def refused(request, refusal):
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def not_found(request, error):
    path = request.scope["path"]  # request.url fails where the query is no UTF-8
    refusal = Refusal(f"{request.method} {path}: {error.detail}", error.status_code)
    return JSONResponse(refusal.body, refusal.status, error.headers)


async def failed(request, error):
    refusal = Refusal("something went wrong in the server", 500)
    return JSONResponse(refusal.body, refusal.status)


def make_app(name, encoder, hparams, params, host="127.0.0.1", allow=(), api_key=None,
             batch_size=64, max_waiting=256, timeout=600.0):  # fmt: skip
    """The ASGI application. Its engine starts and ends with its lifespan."""
    engine = Engine(params, hparams["n_head"], batch_size, max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        engine.start(asyncio.get_running_loop())
        yield
        engine.stop()

    allowed = read_allowed(allow, host)
    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[
            Middleware(figures.Counted, metrics=engine.metrics),
            Middleware(Cors, allowed=allowed),
            Middleware(Guard, allowed=allowed, api_key=api_key, most_seconds=timeout + 10),
        ],
        exception_handlers={Refusal: refused, HTTPException: not_found, Exception: failed},
    )
    app.state.engine, app.state.encoder, app.state.name = engine, encoder, name
    app.state.hparams, app.state.n_ctx = hparams, hparams["n_ctx"]
    app.state.room = asyncio.Semaphore(2)  # for passes beside the engine's
    app.state.timeout, app.state.created = timeout, int(time.time())
    return app


def main(
    model_size: str = "124M",
    host: str = "127.0.0.1",
    port: int = 8000,
    models_dir: str = "models",
    batch_size: int = 64,
    max_waiting: int = 256,
    timeout: float = 600.0,
    allow: tuple[str, ...] | None = None,
    api_key: str | None = None,
):
    """Serve a model over HTTP, as OpenAI's completions and chats.

    Args:
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. What is not here yet is downloaded once.
        host: the address to listen on; 0.0.0.0 for all addresses of this machine.
        port: the port to listen on; 0 takes any that is free.
        models_dir: the folder that holds the models.
        batch_size: how many texts to write at the same time; each needs memory for its cache.
        max_waiting: with this many texts waiting, a request is refused (429).
        timeout: seconds that a request may take (408).
        allow: another Host to accept, or an Origin such as https://example.org to accept requests
            from; may be repeated.
        api_key: a key that every client must send.
    """
    from utils import load_encoder_hparams_and_params

    if api_key == "":
        raise ValueError("--api_key is empty: give a key, or leave it out to serve without one")
    if host == "":
        raise ValueError("--host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 all addresses")
    if min(batch_size, max_waiting) < 1 or not timeout > 0:
        raise ValueError("batch_size and max_waiting must be 1 or more, timeout above 0")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    name = os.path.basename(os.path.normpath(model_size))
    app = make_app(name, encoder, hparams, params, host, allow or (), api_key,
                   batch_size, max_waiting, timeout)  # fmt: skip
    with listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} at http://{shown}:{listening.getsockname()[1]}", flush=True)
        server_of(app).run(sockets=[listening])


def server_of(app):
    return Server(app, app.state.engine.stop_late)


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
