"""A server that speaks OpenAI's protocol (completions, chats and responses) with one shared batch.

    python serve.py --model_size shakespeare
    curl localhost:8000/v1/completions -d '{"prompt": "ROMEO:", "max_tokens": 40}'

There are two threads. asyncio's thread reads requests, checks them and sends answers (see the
routes below). The engine's thread does all the arithmetic. Each requested text is a Choice, which a
row generates, and all rows belong to one kv_cache.Batch. Between two passes, waiting rows join the
batch, and rows leave it if they have ended or their client has gone. A pass then generates one
token for each row. So no client waits for another's text to end, and the weights are read once for
all of them.

The threads exchange two things. Choices reach the engine through a deque, and their Parts return
through call_soon_threadsafe.
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
except ModuleNotFoundError as missing:  # nothing else needs them, so they may be missing
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
    """The thread that does the arithmetic, with a kv_cache.Batch. Its rows' samplers are Choices.

    Other threads call start, submit, drop, gauges, stop and stop_late, and read params and
    logits_of. A lock guards the waiting choices. Each of the metrics is counted by one thread only.
    """

    def __init__(self, params, n_head, batch_size, max_waiting, metrics, prefix_cache=True):
        self.batch = kv_cache.Batch(params, n_head, batch_size)
        self.params = self.batch.params
        self.logits_of = partial(kv_cache.next_logits, params=self.params)
        self.max_waiting = max_waiting
        self.metrics = metrics
        self.lock = threading.Lock()
        self.waiting = {}  # {request: its waiting choices}, in the order of their turns
        self.wake = threading.Event()
        self.is_stopped = False
        self.is_late = False
        self.loop = None
        self.begun = {}  # {row's number: its choice}, until its end has been sent
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
        """Ends all texts that are still unfinished when the server must shut down."""
        self.is_late = True
        self.wake.set()

    def submit(self, asked, choices):
        """Queues a request's choices. Raises Refusal if too many are waiting.

        However many texts a request asks for, it takes up at most half of the queue.
        """
        most = max(1, self.max_waiting // 2)
        with self.lock:
            n_waiting = sum(min(most, len(queue)) for queue in self.waiting.values())
            n_new = min(most, len(choices))
            is_full = n_waiting > 0 and n_waiting + n_new > self.max_waiting
            if not is_full:
                self.waiting[asked] = deque(choices)
        if is_full:
            words = f"{self.n_waiting()} texts are already waiting (--max_waiting); try again later"
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
        """Marks choices whose client has gone. They leave before the next pass."""
        for choice in choices:
            choice.is_dropped = True

    def run(self):
        """The thread's loop. An error ends the texts that are running, but not the server."""
        self.warm_up()
        while True:
            self.wake.clear()  # first, so a wake-up from here on ends the wait below
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
        """Makes a pass of two rows, to have libraries and threads ready for the first client."""
        caches = [self.batch.new_cache() for _ in "ab"]
        kv_cache.step(caches, [0, 0], self.params, self.batch.n_head)

    def step(self):
        """Makes a pass of all rows, and sends the new tokens to the clients."""
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
        """Frees the cache of an ended row, or keeps it for texts with the same beginning.

        The answer holds the row until its other texts have ended, so the row must not hold the
        cache.
        """
        if self.prefixes is None:
            row.cache = None
        else:
            self.prefixes.add(row)

    def sort_out(self):
        """Removes the choices whose client has gone."""
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
        """If the batch is full, pauses one row for each request that has none.

        So no client waits for another's text to end. The row is taken from the request with the
        most rows. Later it reads its text again and continues.
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
        """Takes a row out of the batch and puts it first among its request's waiting choices."""
        row = choice.row
        row.cache = None
        self.batch.rows = [other for other in self.batch.rows if other is not row]
        for other in self.batch.rows:
            if other.source is row:  # otherwise it would wait for this row to read more
                other.source = None
        del self.begun[row.number]
        with self.lock:
            self.waiting.setdefault(choice.asked, deque()).appendleft(choice)

    def arrivals(self):  # yields the rows of waiting choices
        while (choice := self.next_choice()) is not None:
            choice.row.number = next(self.numbers)
            self.begun[choice.row.number] = choice
            choice.begin()
            yield choice.row

    def next_choice(self):  # -> the next choice to begin, or None
        """Requests take turns. Those without a row come first.

        While others wait, no request gets more than half of the batch.
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
        """Ends all running texts with the error."""
        choices = list(self.begun.values())
        self.begun.clear()
        for choice in choices:
            choice.row.end = "failed"
            choice.row.cache = None
        self.batch.rows = []
        if self.prefixes is not None:
            self.prefixes.clear()  # the error may be a lack of memory
        self.send([(choice.deliver, error) for choice in choices])

    def end_all(self, refusal):
        """Ends all texts, including those that are waiting."""
        with self.lock:
            for choice in itertools.chain(*self.waiting.values()):
                choice.row.number = next(self.numbers)
                self.begun[choice.row.number] = choice
            self.waiting.clear()
        self.fail(refusal)

    def send(self, parts):
        """Hands all parts of a pass to asyncio's thread at once."""
        if parts:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so no client is left
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


SMALL_BODY = 2048  # bytes; to read one takes less time than to wake a thread for it


def answering(read):  # read(body, state), -> an Answer -> a route
    """Reads a large body in a thread, because it takes a while and would block the loop."""

    async def route(request):
        body = await request.body()
        if len(body) <= SMALL_BODY:
            return read(body, request.app.state)
        return await asyncio.to_thread(read, body, request.app.state)

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
    """GET /explain?text= or ?ids= returns explain.py's page, where heads can be switched off."""
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
    path = request.scope["path"]  # request.url fails if the query is not UTF-8
    words = f"{request.method} {path}: {error.detail}"
    if error.status_code == 404:
        words += "; the routes are " + ", ".join(sorted({route.path for route in ROUTES}))
    refusal = Refusal(words, error.status_code)
    return JSONResponse(refusal.body, refusal.status, error.headers)


async def failed(request, error):
    refusal = Refusal("something went wrong in the server", 500)
    return JSONResponse(refusal.body, refusal.status)


def make_app(name, encoder, hparams, params, host="127.0.0.1", allow=(), api_key=None,
             batch_size=64, max_waiting=256, timeout=600.0, names=None,
             prefix_cache=True, watched=()):  # fmt: skip
    """Returns the ASGI application. Its engine starts and ends with its lifespan.

    names: the names by which requests may call the model, by default only `name`.
    watched: the files from which the parameters are read while the server runs.
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
    """Serve a model over HTTP, with OpenAI's protocol for completions, chats and responses.

    A request without a temperature is answered at 1, the default of OpenAI's protocol. The page
    starts at 0.8. gpt2.py and kv_cache.py default to 0, which is greedy.

    Args:
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. A missing model is downloaded once.
        host: the address to listen on; 0.0.0.0 for all addresses of this machine.
        port: the port to listen on; 0 takes any free port.
        models_dir: the folder that holds the models.
        batch_size: how many texts to generate at the same time; each needs memory for its cache.
        max_waiting: when this many texts are waiting, further requests get an error (429).
        timeout: the most seconds that a request may take; after that it gets an error (408).
        allow: another Host to accept, or an Origin such as https://example.org whose pages may send
            requests. Repeat the flag for several.
        api_key: a key that every client must send.
        prefix_cache: keep the caches of recent texts, so texts with the same beginning are answered
            sooner. The response time then tells a client what others have sent; --noprefix_cache
            keeps nothing.
    """
    from utils import find_model, load_encoder_hparams_and_params

    if min(batch_size, max_waiting) < 1 or not timeout > 0:
        raise ValueError("batch_size and max_waiting must be 1 or more, and timeout above 0")
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
