"""The routes about the server: its model, its tokenizer, its health and its metrics."""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from serving.answers import unless_gone
from serving.metrics import render
from serving.protocol import Refusal, check_model, read_object, read_prompt

MOST_CHARACTERS = 100_000  # of a text to tokenize, which takes about a tenth of a second


def model_of(state):
    model = {"id": state.name, "object": "model", "created": state.created}
    return model | {"owned_by": "sixtygpt", "max_model_len": state.n_ctx}


async def models(request):
    return JSONResponse({"object": "list", "data": [model_of(request.app.state)]})


async def model(request):
    state = request.app.state
    check_model({"model": request.path_params["name"]}, state.names)
    return JSONResponse(model_of(state))


async def health(request):
    return JSONResponse({"status": "ok"})


async def metrics(request):
    state = request.app.state
    kind = "text/plain; version=0.0.4"  # Prometheus's text format
    return PlainTextResponse(render(state.metrics | state.engine.gauges()), media_type=kind)


async def tokenizer_info(request):
    encoder = request.app.state.encoder
    text = None if encoder.endoftext is None else encoder.decode([encoder.endoftext])
    names = ("bos_token", "eos_token", "pad_token")
    return JSONResponse(dict.fromkeys(names, text) | {"chat_template": encoder.chat_template})


# Tokenizing has a thread of its own, so a client with large texts delays no completions. Work that
# is still queued is cancelled when its client goes.
TOKENIZING = ThreadPoolExecutor(1, thread_name_prefix="tokenize")


async def tokenize(request):
    """Turns <|endoftext|> and other special texts into their ids.

    GPT-2's tokenizer adds no tokens of its own, so add_special_tokens has no effect.
    """
    state, data = request.app.state, read_object(await request.body())
    text = data.get("prompt", data.get("content"))
    if not isinstance(text, str):
        raise Refusal("prompt, or content, must be a string", param="prompt")
    if len(text) > MOST_CHARACTERS:
        words = f"the text has {len(text)} characters, but at most {MOST_CHARACTERS} are allowed"
        raise Refusal(words, 413, param="prompt", code="too_large")
    loop = asyncio.get_running_loop()
    encode = functools.partial(state.encoder.encode, text, allow_endoftext=True)
    ids = await unless_gone(request.receive, loop.run_in_executor(TOKENIZING, encode))
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": state.n_ctx})


async def detokenize(request):
    state, ids = request.app.state, read_object(await request.body()).get("tokens")
    if not isinstance(ids, list):
        raise Refusal("tokens must be a list of ids", param="tokens")
    text = state.encoder.decode(read_prompt(ids, state.encoder, state.n_ctx, "tokens"))
    return JSONResponse({"prompt": text})


ROUTES = [
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/tokenizer_info", tokenizer_info),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]
