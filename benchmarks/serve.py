"""How does the server do under load, beside kv_cache.py alone and beside transformers?

usage: python benchmarks/serve.py load [SECONDS [CLIENTS]]   # the shipped model; 60 and 64
       python benchmarks/serve.py fairness                   # a small request beside a large one
       python benchmarks/serve.py peers                      # 124M's shape, beside transformers

load: a crowd of clients with prompts of all lengths, of which many begin alike, whole answers and
streams, and some that go away half-way. Every text is compared with gpt2.generate's. Then the same
texts by the server and by kv_cache.generate, turn by turn, and the time to a first token.

fairness: while one client has 128 texts of 200 tokens written, another asks for one token at a
time. How long does it wait for it, in passes of the engine and in milliseconds?

peers: the same requests to serve.py and to a plain server of transformers: starlette, and a loop
that pads the requests that wait into a batch, generates, and answers them. Each is its own process,
and they take turns. Linux only: it reads /proc.
"""

import asyncio
import json
import subprocess
import sys
import time
from functools import partial
from statistics import median

import numpy as np
from common import HPARAMS, ROOT, alternate, hugging_face, machine, model_folder, print_table
from endurance import report
from threadpoolctl import threadpool_limits

import gpt2
import kv_cache
import utils

N_CLIENTS, N_PROMPTS, LONGEST = 64, 32, 40
TIE = 1e-3  # two logits this close may change places: a batch sums in another order


# --- A client, with as little work of its own as can be -------------------------------------------


async def post(port, data, leave_after=None):  # -> (seconds to the first event or answer, text)
    """One request on a connection of its own. leave_after: events, after which the client goes."""
    start, first, texts = time.perf_counter(), None, []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(data).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        status = await reader.readline()
        assert status.split()[1] == b"200", status + await reader.read()
        while line := await reader.readline():
            line = line.removeprefix(b"data: ").strip()
            if line.startswith(b"{"):
                texts.append(json.loads(line)["choices"][0]["text"])
                first = first or time.perf_counter() - start
                if leave_after is not None and len(texts) >= leave_after:
                    return first, None
    finally:
        writer.close()
    return first, "".join(texts)


def start(*command):  # -> the process and the port that its first line names
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE)
    begun = time.perf_counter()
    port = int(process.stdout.readline().decode().rpartition(":")[2])
    print(f"{command[0]} is ready after {time.perf_counter() - begun:.2f} s", flush=True)
    return process, port


def stop(process):
    process.terminate()
    process.wait(30)


def request(prompt, n_tokens, **others):
    return {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True} | others


# --- The shipped model under load -----------------------------------------------------------------


def load(seconds=60.0, n_clients=N_CLIENTS):
    encoder, hparams, params = utils.load_encoder_hparams_and_params("shakespeare")
    rng = np.random.default_rng(0)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prompts = [prompt_of(text, rng) for _ in range(N_PROMPTS)]
    print(machine())
    process, port = start(ROOT / "serve.py", "--model_size", "shakespeare", "--port", 0)
    try:
        answers = asyncio.run(crowd(port, process.pid, prompts, seconds, n_clients))
        compare(answers, encoder, hparams, params)
        many = [prompt_of(text, rng) for _ in range(4 * N_CLIENTS)]
        throughput(port, many, encoder, hparams, params)
        for n in (1, 8, N_CLIENTS):
            rounds = [median(asyncio.run(first_tokens(port, many[-n:], n))) for _ in range(7)]
            words = f"time to the first token, {n} clients at once"
            print(f"{words}: {median(rounds) * 1e3:.0f} ms ({min(rounds) * 1e3:.0f} at best)")
    finally:
        stop(process)


def prompt_of(text, rng):  # of 1 to 190 characters; half of them begin alike
    n, start = int(rng.integers(1, 150)), int(rng.integers(len(text) - 200))
    return (text[:40] if rng.random() < 0.5 else "") + text[start : start + n]


async def crowd(port, pid, prompts, seconds, n_clients):
    """{prompt: the longest text} of all answers; how many there were is printed."""
    rng, answers, counts = np.random.default_rng(1), [], {"whole": 0, "streamed": 0, "left": 0}
    end = time.perf_counter() + seconds

    async def client():
        while time.perf_counter() < end:
            prompt, n = prompts[rng.integers(len(prompts))], int(rng.integers(1, LONGEST + 1))
            kind = rng.choice(["whole", "streamed", "left"], p=[0.45, 0.45, 0.1])
            leave = int(rng.integers(1, 9)) if kind == "left" else None
            data = request(prompt, n, stream=str(kind) != "whole")
            _, answer = await post(port, data, leave)
            counts[kind] += 1
            if answer is not None:
                answers.append((prompt, n, answer))

    async def watch():
        for tenth in range(11):
            report(f"  {tenth * seconds / 10:g} s", pid)
            await asyncio.sleep(seconds / 10 if tenth < 10 else 0)

    await asyncio.gather(watch(), *(client() for _ in range(n_clients)))
    n_tokens = sum(n for _, n, _ in answers)
    print(f"{len(answers)} answers {counts}, {n_tokens / seconds:.0f} tokens a second")
    return answers


def compare(answers, encoder, hparams, params):
    """Every text beside gpt2.generate's: wrong ones, and ties that fell the other way."""
    n_head, twins, n_ties, n_wrong = hparams["n_head"], {}, 0, 0
    for prompt, n, answer in answers:
        ids = encoder.encode(prompt)
        if prompt not in twins:
            with threadpool_limits(1):  # so small a model's products are faster on one thread
                twins[prompt] = gpt2.generate(ids, params, n_head, LONGEST)
        if answer != encoder.decode(twins[prompt][:n]):
            is_tie = differs_by_a_tie(ids, answer, twins[prompt], encoder, n_head, params)
            n_ties, n_wrong = n_ties + is_tie, n_wrong + (not is_tie)
    print(f"{len(answers)} texts compared: {n_wrong} wrong, {n_ties} ties fell the other way")


def differs_by_a_tie(ids, answer, twin, encoder, n_head, params):
    """Are the two likeliest tokens about equal where the texts part?"""
    for n in range(len(twin)):
        if not answer.startswith(encoder.decode(twin[: n + 1]).rstrip("\ufffd")):
            logits = np.sort(gpt2.gpt2(ids + twin[:n], **params, n_head=n_head)[-1])
            return bool(logits[-1] - logits[-2] < TIE)
    return False


def throughput(port, prompts, encoder, hparams, params):
    ids = [encoder.encode(prompt) for prompt in prompts]
    options = {"batch_size": N_CLIENTS}

    async def all_of_them():
        gate = asyncio.Semaphore(N_CLIENTS)

        async def one(prompt):
            async with gate:
                await post(port, request(prompt, LONGEST))

        await asyncio.gather(*map(one, prompts))

    seconds = alternate(
        7,
        server=lambda: asyncio.run(all_of_them()),
        kv_cache=lambda: kv_cache.generate(ids, params, hparams["n_head"], LONGEST, **options),
    )
    print_table(f"{len(ids)} texts of {LONGEST} tokens, 64 at a time", seconds, "server")


async def first_tokens(port, prompts, n):
    posts = [post(port, request(prompt, 8, stream=True)) for prompt in prompts[:n]]
    return [first for first, _ in await asyncio.gather(*posts)]


# --- A small request beside a large one -----------------------------------------------------------

N_SMALL = 20


def fairness():
    print(machine())
    for n_large in (32, 128):  # there is room for 64
        process, port = start(ROOT / "serve.py", "--model_size", "shakespeare", "--port", 0)
        try:
            waits = asyncio.run(waits_beside(port, n_large))
        finally:
            stop(process)
        passes, seconds = zip(*waits, strict=True)
        print(f"beside {n_large} texts, {N_SMALL} small requests waited for their first token")
        print(f"  passes: median {median(passes):.0f}, at most {max(passes):.0f}")
        print(f"  ms: median {median(seconds) * 1e3:.0f}, at most {max(seconds) * 1e3:.0f}")


async def waits_beside(port, n_large):  # -> [(passes, seconds)] of the small requests
    large = asyncio.create_task(post(port, request("ROMEO:", 200, n=n_large)))
    while await figure(port, "rows_running") < min(n_large, N_CLIENTS):
        await asyncio.sleep(0.01)
    waits = []
    for i in range(N_SMALL):
        n_passes = await figure(port, "passes_total")
        first, _ = await post(port, request(f"JULIET {i}:", 1))
        waits.append((await figure(port, "passes_total") - n_passes, first))
    assert not large.done(), "the large request ended too early to be felt"
    large.cancel()
    return waits


async def figure(port, name):  # one of GET /metrics
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith(f"sixtygpt_{name} ")
    )


# --- 124M's shape, beside transformers ------------------------------------------------------------

N_PEERS, N_NEW = 16, 40


def peers():
    print(machine())
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 200, N_PEERS)
    prompts = [rng.integers(0, 256, n).tolist() for n in lengths]  # bytes, in any tokenizer
    with model_folder() as folder:
        ours, our_port = start(ROOT / "serve.py", "--model_size", folder, "--port", 0)
        theirs, their_port = start(__file__, "transformers", folder)
        try:
            for n in (1, N_PEERS):
                sides = {"serve.py": our_port, "transformers": their_port}
                runs = {name: partial(ask_all, port, prompts[:n]) for name, port in sides.items()}
                seconds = alternate(3, **runs)
                print_table(f"{n} clients, {N_NEW} tokens each", seconds, "serve.py")
                for name, value in seconds.items():
                    print(f"{name}: {n * N_NEW / value:.0f} tokens a second")
        finally:
            stop(ours)
            stop(theirs)


def ask_all(port, prompts):
    async def all_of_them():
        await asyncio.gather(*(post(port, request(ids, N_NEW)) for ids in prompts))

    asyncio.run(all_of_them())


def serve_transformers(folder):
    """What one would write first: the requests that wait are padded, generated and answered."""
    import socket

    import torch
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    _, _, params = utils.load_encoder_hparams_and_params(folder)
    model, waiting = hugging_face(params, HPARAMS), asyncio.Queue()

    @torch.inference_mode()
    def generate(batch):
        longest = max(len(ids) for ids, _, _ in batch)
        padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _, _ in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _, _ in batch])
        n_new = max(n for _, n, _ in batch)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out = model.generate(padded, attention_mask=mask, max_new_tokens=n_new, **options)
        return out[:, longest:].tolist()

    async def write_all():
        while True:
            batch = [await waiting.get()]
            await asyncio.sleep(0.01)  # for those that come together
            while not waiting.empty():
                batch.append(waiting.get_nowait())
            texts = await asyncio.to_thread(generate, batch)
            for (_, n, answer), ids in zip(batch, texts, strict=True):
                answer.set_result(ids[:n])

    async def completions(request):
        data, answer = await request.json(), asyncio.get_running_loop().create_future()
        waiting.put_nowait((data["prompt"], data["max_tokens"], answer))
        return JSONResponse({"choices": [{"text": str(await answer)}]})

    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])

    async def run():
        with socket.create_server(("127.0.0.1", 0)) as listening:
            print(f"transformers at http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
            work = asyncio.ensure_future(write_all())
            await server.serve(sockets=[listening])
            work.cancel()

    asyncio.run(run())


if __name__ == "__main__":
    works = {"load": lambda: load(*map(int, sys.argv[2:])), "fairness": fairness, "peers": peers}
    works["transformers"] = lambda: serve_transformers(sys.argv[2])  # what `peers` starts
    if sys.argv[1:2] not in [[what] for what in works]:
        sys.exit(__doc__)
    works[sys.argv[1]]()
