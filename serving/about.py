"""The routes that say what there is: the model, its tokenizer, how the server is doing."""

import asyncio

from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from serving.metrics import render
from serving.protocol import Refusal, read_object, read_prompt


async def models(request):
    state = request.app.state
    model = {"id": state.name, "object": "model", "created": state.created}
    model |= {"owned_by": "sixtygpt", "max_model_len": state.n_ctx}
    return JSONResponse({"object": "list", "data": [model]})


async def health(request):
    return JSONResponse({"status": "ok"})


async def metrics(request):
    state = request.app.state
    kind = "text/plain; version=0.0.4"  # Prometheus's, of this way to write them
    return PlainTextResponse(render(state.metrics | state.engine.gauges()), media_type=kind)


async def tokenizer_info(request):
    encoder = request.app.state.encoder
    text = None if encoder.endoftext is None else encoder.decode([encoder.endoftext])
    names = ("bos_token", "eos_token", "pad_token")
    return JSONResponse(dict.fromkeys(names, text) | {"chat_template": None})


async def tokenize(request):
    """<|endoftext|> and other special texts become their ids.

    GPT-2's tokenizer adds none of its own, whatever add_special_tokens says.
    """
    state, data = request.app.state, read_object(await request.body())
    text = data.get("prompt", data.get("content"))
    if not isinstance(text, str):
        raise Refusal("prompt, or content, must be a string", param="prompt")
    ids = await asyncio.to_thread(state.encoder.encode, text, allow_endoftext=True)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": state.n_ctx})


async def detokenize(request):
    state, ids = request.app.state, read_object(await request.body()).get("tokens")
    if not isinstance(ids, list):
        raise Refusal("tokens must be a list of ids", param="tokens")
    text = state.encoder.decode(read_prompt(ids, state.encoder, state.n_ctx, "tokens"))
    return JSONResponse({"prompt": text})


ROUTES = [
    Route("/v1/models", models),
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/tokenizer_info", tokenizer_info),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]
