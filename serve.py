"""A server that speaks OpenAI's protocol, completions, chats and responses: one batch for all.

    python serve.py --model_size shakespeare
    curl localhost:8000/v1/completions -d '{"prompt": "ROMEO:", "max_tokens": 40}'

Two threads. The first is asyncio's: it reads requests, checks them and sends answers (the routes,
below). The second is the engine's, which does all the arithmetic. Each text that is asked for is a
Choice, written by a row, and the batch is kv_cache.py's: between two passes, rows that wait join
it, rows that have ended leave it, and rows whose client has gone are taken out; a pass then writes
a token of each. So nobody waits for another's text to end, and one reading of the weights serves
all.

What passes between the threads: Choices into a deque, their Parts out by call_soon_threadsafe.
"""

import asyncio
import contextlib
import itertools
import os
import sys
import threading
import time
from collections import Counter, deque
from functools import partial

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from serving.connections import Server, listen  # with uvicorn
except ModuleNotFoundError as missing:  # nothing else needs them, so they may not be there
    if __name__ != "__main__":
        raise
    from plumbing.cli import end_without_packages, main_of

    end_without_packages(missing, "requirements/serve.txt", main_of(__file__))

import kv_cache
from engine.threads import own_threads
from generation.prefix_cache import PrefixCache
from pages.explanation import explain
from serving import about, play
from serving import metrics as figures
from serving.answers import Answer
from serving.chat import delta_of, message_of, read_chat, role_of
from serving.guard import Cors, Guard, read_allowed
from serving.protocol import Refusal, new_answer, read_completion, read_object
from serving.responses import Response, read_response
from serving.weights import copied, watch, weight_files

# --------------------------------------------------------------------------------------------------
# The engine
# --------------------------------------------------------------------------------------------------


class Engine:
    """The thread that owns the arithmetic: a kv_cache.Batch, whose rows' samplers are Choices.

    Other threads call start, submit, drop, gauges, stop and stop_late, and read params and
    logits_of. A lock guards what waits. Each figure in metrics is counted by one thread alone.
    """

    def __init__(self, params, n_head, batch_size, max_waiting, metrics, prefix_cache=True):
        self.batch = kv_cache.Batch(params, n_head, batch_size)
        self.params = self.batch.params
        self.logits_of = partial(kv_cache.next_logits, params=self.params)
        self.max_waiting = max_waiting
        self.metrics = metrics
        self.lock = threading.Lock()
        self.waiting = {}  # {request: its choices that wait}, the requests in turn
        self.wake = threading.Event()
        self.is_stopped = False
        self.is_late = False
        self.loop = None
        self.begun = {}  # {row's number: its choice}, of which nobody has heard the end
        self.numbers = itertools.count()
        self.prefixes = PrefixCache() if prefix_cache else None

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

    def submit(self, asked, choices):
        """Queues a request's choices, which get their parts. Raises Refusal if too many wait.

        However many texts a request asks for, it takes at most half of the places.
        """
        most = max(1, self.max_waiting // 2)
        with self.lock:
            n_waiting = sum(min(most, len(queue)) for queue in self.waiting.values())
            n_new = min(most, len(choices))
            is_full = n_waiting > 0 and n_waiting + n_new > self.max_waiting
            if not is_full:
                self.waiting[asked] = deque(choices)
        if is_full:
            words = f"{self.n_waiting()} texts wait already (--max_waiting): try again later"
            raise Refusal(words, 429, code="queue_full", headers={"retry-after": "1"})
        figures.count(self.metrics, "prompt_tokens_total", asked.n_prompt_tokens)
        self.wake.set()

    def n_waiting(self):
        with self.lock:
            return sum(map(len, self.waiting.values()))

    def gauges(self):
        running = len(self.batch.rows)
        return {("rows_waiting", ""): self.n_waiting(), ("rows_running", ""): running}

    def drop(self, choices):
        """Their client has gone: they leave before the next pass."""
        for choice in choices:
            choice.is_dropped = True

    def run(self):
        """The thread's loop. Whatever goes wrong ends the rows it concerns, and nothing else."""
        self.warm_up()
        while True:
            self.wake.clear()  # first: whatever is set from here on, ends the wait below
            if self.is_stopped:
                return
            if self.is_late:
                self.end_all(Refusal("the server is shutting down", 503, code="shutting_down"))
            if not (self.batch.rows or self.n_waiting()):
                self.wake.wait()
            try:
                self.step()
            except Exception as error:
                self.fail(error)

    def warm_up(self):
        """A pass of two rows, so that libraries and threads are ready for the first client."""
        caches = [self.batch.new_cache() for _ in "ab"]
        kv_cache.step(caches, [0, 0], self.params, self.batch.n_head)

    def step(self):
        """A pass of all rows; then what they wrote goes to those who wait for it."""
        self.sort_out()
        self.make_room()
        n_rows = len(self.batch.rows)
        start = time.perf_counter()
        ended = [] if self.prefixes is None else self.prefixes.rows
        events = self.batch.step(self.arrivals(), ended)
        if n_rows:
            self.measure(len(events), time.perf_counter() - start)
        for row in self.batch.rows:
            if row.source is not None and self.prefixes is not None:
                self.prefixes.touch(row.source)
        heard = [(self.begun[event.row], event.end) for event in events]
        heard = [(choice, end) for choice, end in heard if end or choice.asked.stream]
        parts = [(choice.deliver, choice.take(end)) for choice, end in heard]
        for choice, end in heard:
            if end:
                self.release(choice.row)
                del self.begun[choice.row.number]
        self.send(parts)

    def release(self, row):
        """Frees the cache of a row that has ended, or keeps it a while for texts that begin alike.

        The answer holds the row until its other texts have ended, so the cache must not hang on it.
        """
        if self.prefixes is None:
            row.cache = None
        else:
            self.prefixes.add(row)

    def sort_out(self):
        """Takes out the choices whose client has gone."""
        with self.lock:
            for asked, queue in list(self.waiting.items()):
                self.waiting[asked] = deque(choice for choice in queue if not choice.is_dropped)
                if not self.waiting[asked]:
                    del self.waiting[asked]
        for choice in list(self.begun.values()):
            if choice.is_dropped:
                choice.row.end = "dropped"
                choice.row.cache = None
                del self.begun[choice.row.number]
        self.batch.rows = [row for row in self.batch.rows if row.end != "dropped"]

    def make_room(self):
        """Pauses a row for each request that has none, where the batch is full.

        So nobody waits for another's text to end. The row is of the request that has most. Later
        it reads its text again and goes on.
        """
        n_running = Counter(choice.asked for choice in self.begun.values())
        with self.lock:
            n_without = sum(asked not in n_running for asked in self.waiting)
        for _ in range(n_without - (self.batch.batch_size - len(self.batch.rows))):
            asked = max(n_running, key=n_running.get, default=None)
            can_pause = [c for c in self.begun.values() if c.asked is asked and not c.is_scoring]
            if n_running[asked] < 2 or not can_pause:
                return
            self.pause(min(can_pause, key=lambda choice: choice.row.n_read))
            n_running[asked] -= 1

    def pause(self, choice):
        """Takes a row out of the batch, to go on as the first of its request that waits."""
        row = choice.row
        row.cache = None
        self.batch.rows = [other for other in self.batch.rows if other is not row]
        for other in self.batch.rows:
            if other.source is row:  # it would wait for what the row had read
                other.source = None
        del self.begun[row.number]
        with self.lock:
            self.waiting.setdefault(choice.asked, deque()).appendleft(choice)

    def arrivals(self):  # the rows of choices that wait, as long as there are any
        while (choice := self.next_choice()) is not None:
            choice.row.number = next(self.numbers)
            self.begun[choice.row.number] = choice
            choice.begin()
            yield choice.row

    def next_choice(self):  # -> the next choice to begin, or None
        """Requests take turns; those that have no row come first.

        While others wait, none gets more than half of the batch.
        """
        n_running = Counter(choice.asked for choice in self.begun.values())
        most = max(1, self.batch.batch_size // 2)
        with self.lock:
            for asked in sorted(self.waiting, key=lambda asked: n_running[asked] > 0):
                queue = self.waiting[asked]
                if not queue[0].may_begin:
                    continue
                if len(self.waiting) > 1 and n_running[asked] >= most:
                    continue
                del self.waiting[asked]
                choice = queue.popleft()
                if queue:  # its next turn comes after all others
                    self.waiting[asked] = queue
                return choice
        return None

    def fail(self, error):
        """Ends all rows whose end nobody has heard of, with the error."""
        choices = list(self.begun.values())
        self.begun.clear()
        for choice in choices:
            choice.row.end = "failed"
            choice.row.cache = None
        self.batch.rows = []
        if self.prefixes is not None:
            self.prefixes.clear()  # memory may be what is missing
        self.send([(choice.deliver, error) for choice in choices])

    def end_all(self, refusal):
        """Ends all texts, those that wait included."""
        with self.lock:
            for choice in itertools.chain(*self.waiting.values()):
                choice.row.number = next(self.numbers)
                self.begun[choice.row.number] = choice
            self.waiting.clear()
        self.fail(refusal)

    def send(self, parts):
        """All parts of a pass, handed to asyncio's thread at once."""
        if parts:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
                self.loop.call_soon_threadsafe(deliver, parts)

    def measure(self, n_written, seconds):
        figures.count(self.metrics, "passes_total")
        figures.count(self.metrics, "pass_seconds_total", seconds)
        figures.count(self.metrics, "completion_tokens_total", n_written)
        if n_written:
            figures.observe(self.metrics, "seconds_per_token", seconds, n_written)


def deliver(parts):
    for receive, part in parts:
        receive(part)


# --------------------------------------------------------------------------------------------------
# The routes
# --------------------------------------------------------------------------------------------------


def answering(read):  # read(body, state), -> an Answer -> a route
    """In a thread: a large body takes a while, and the loop could do nothing else meanwhile."""

    async def route(request):
        return await asyncio.to_thread(read, await request.body(), request.app.state)

    return route


def complete(body, state):  # POST /v1/completions
    asked = read_completion(body, state.names, state.encoder, state.n_ctx)
    return Answer(state, asked, new_answer(state.name))


def chat(body, state):  # POST /v1/chat/completions
    asked = read_chat(read_object(body), state.names, state.encoder, state.n_ctx)
    if asked.stream:
        fields = new_answer(state.name, "chat.completion.chunk", "chatcmpl")
        roles = [role_of(index) for index in range(asked.n_choices)]
        return Answer(state, asked, fields, delta_of, opening=roles)
    fields = new_answer(state.name, "chat.completion", "chatcmpl")
    return Answer(state, asked, fields, message_of)


def respond(body, state):  # POST /v1/responses
    data = read_object(body)
    asked = read_response(data, state.names, state.encoder, state.n_ctx)
    return Response(state, asked, data)


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
    Route("/v1/completions", answering(complete), methods=["POST"]),
    Route("/v1/chat/completions", answering(chat), methods=["POST"]),
    Route("/v1/responses", answering(respond), methods=["POST"]),
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
    words = f"{request.method} {path}: {error.detail}"
    if error.status_code == 404:
        words += "; there are " + ", ".join(sorted({route.path for route in ROUTES}))
    refusal = Refusal(words, error.status_code)
    return JSONResponse(refusal.body, refusal.status, error.headers)


async def failed(request, error):
    refusal = Refusal("something went wrong in the server", 500)
    return JSONResponse(refusal.body, refusal.status)


def make_app(name, encoder, hparams, params, host="127.0.0.1", allow=(), api_key=None,
             batch_size=64, max_waiting=256, timeout=600.0, names=None,
             prefix_cache=True, watched=()):  # fmt: skip
    """The ASGI application. Its engine starts and ends with its lifespan.

    names: what requests may call the model; name alone by default. watched: the files that the
    parameters are read from while it runs.
    """
    metrics = figures.new_metrics()
    engine = Engine(params, hparams["n_head"], batch_size, max_waiting, metrics, prefix_cache)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        engine.start(asyncio.get_running_loop())
        watching = asyncio.create_task(watch(watched))
        yield
        watching.cancel()
        engine.stop()

    allowed = read_allowed(allow, host)
    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[
            Middleware(figures.Counted, metrics=metrics),
            Middleware(Cors, allowed=allowed),
            Middleware(Guard, allowed=allowed, api_key=api_key, most_seconds=timeout + 10),
        ],
        exception_handlers={Refusal: refused, HTTPException: not_found, Exception: failed},
    )
    app.state.engine = engine
    app.state.metrics = metrics
    app.state.name, app.state.names = name, names or [name]
    app.state.encoder = encoder
    app.state.hparams = hparams
    app.state.n_ctx = hparams["n_ctx"]
    app.state.room = asyncio.Semaphore(2)  # for passes beside the engine's
    app.state.timeout = timeout
    app.state.created = int(time.time())
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
    prefix_cache: bool = True,
):
    """Serve a model over HTTP, as OpenAI's completions and chats.

    A request that names no temperature is answered at 1, as OpenAI's protocol has it. The page
    begins at 0.8. gpt2.py and kv_cache.py have 0, which is greedy.

    Args:
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. A missing model is downloaded once.
        host: the address to listen on; 0.0.0.0 for all addresses of this machine.
        port: the port to listen on; 0 takes any that is free.
        models_dir: the folder that holds the models.
        batch_size: how many texts to write at the same time; each needs memory for its cache.
        max_waiting: with this many texts waiting, a request is refused (429).
        timeout: seconds that a request may take (408).
        allow: another Host to accept, or an Origin such as https://example.org to accept requests
            from; may be repeated.
        api_key: a key that every client must send.
        prefix_cache: keep what was computed for recent texts, for texts that begin like them, which
            are then answered sooner. By that time a client can tell what others have sent;
            --noprefix_cache keeps nothing.
    """
    from utils import find_model, load_encoder_hparams_and_params

    if min(batch_size, max_waiting) < 1 or not timeout > 0:
        raise ValueError("batch_size and max_waiting must be 1 or more, timeout above 0")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    in_memory = copied(params)
    watched = weight_files(find_model(model_size, models_dir)) if in_memory is None else []
    name = os.path.basename(os.path.normpath(model_size))
    app = make_app(
        name, encoder, hparams, in_memory or params, host, allow or (), api_key,
        batch_size, max_waiting, timeout, [name, model_size], prefix_cache, watched,
    )  # fmt: skip
    with listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        print(f"{name} at http://{shown}:{listening.getsockname()[1]}", flush=True)
        server_of(app).run(sockets=[listening])


def server_of(app):
    return Server(app, app.state.engine.stop_late)


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
