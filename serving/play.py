"""The page for playing with the model, and the predictions that it shows: / and /predictions."""

import asyncio

import numpy as np
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from engine.threads import own_threads
from pages.predictions import bytes_of, predictions
from pages.templates import template
from serving.protocol import Refusal, check_room, number, read_object, read_prompt

MOST_SHOWN = 257  # all tokens of a byte model
# Injected code could load nothing, send nothing away, and the page can't be put into another one.
POLICY = "; ".join([
    "default-src 'none'", "script-src 'unsafe-inline'", "style-src 'unsafe-inline'",
    "img-src data:", "connect-src 'self'", "form-action 'none'", "base-uri 'none'",
    "frame-ancestors 'none'",
])  # fmt: skip
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
HEADERS |= {"cache-control": "no-store"}


async def play(request):
    """GET /"""
    return page_response(template("play.html"))


def page_response(text):
    return HTMLResponse(text, headers=HEADERS)


def check_link(request):
    """Raises Refusal for other sites' pages. A GET has no Origin, but browsers say who sent it."""
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise Refusal("only this server's own pages may link here; type the address instead", 403)


async def predict(request):
    """POST /predictions takes "text" or "ids", and optionally "without", "positions", "n_shown"."""
    state, body = request.app.state, await request.body()
    async with state.room:
        return JSONResponse(await asyncio.to_thread(answer, body, state))


def answer(body, state):  # bytes -> a dict for JSON
    data, hparams = read_object(body), state.hparams
    ids = read_ids(data, state.encoder, state.n_ctx)
    without = read_heads(data.get("without") or [], hparams)
    positions = read_positions(data.get("positions"), len(ids))
    n_shown = number(data, "n_shown", 50, 1, MOST_SHOWN)
    with own_threads(len(ids)):  # like the engine's passes
        found = predictions(
            ids, state.engine.params, hparams["n_head"], without, positions, n_shown
        )
    if not np.isfinite(found["top_logits"]).all():
        raise Refusal("the logits are not finite: the model's weights must be damaged", 500)
    found["tail_logits"] = np.maximum(found["tail_logits"], -1e30)  # JSON has no -inf
    named = {*ids, *found["top_ids"].ravel().tolist()}
    lists = {name: array.tolist() for name, array in found.items()}
    return {"ids": ids, "bytes": bytes_of(named, state.encoder)} | lists


def read_ids(data, encoder, n_ctx):
    asked = data.get("text", data.get("ids"))
    name = "text" if "text" in data else "ids"
    if not isinstance(asked, str if name == "text" else list):
        raise Refusal("text must be a string, or ids a list of token ids", param=name)
    ids = read_prompt(asked, encoder, n_ctx, name)
    check_room(ids, 0, n_ctx, name)
    return ids


def read_link(asked, encoder, n_ctx):  # a link's "text", or "ids" with commas between -> ids
    if "ids" not in asked:
        return read_ids({"text": asked.get("text", "")}, encoder, n_ctx)
    words = asked["ids"].split(",")
    ids = [
        int(word) if word.isascii() and word.isdigit() and len(word) < 10 else word
        for word in words
    ]
    return read_ids({"ids": ids}, encoder, n_ctx)


def read_heads(pairs, hparams):  # -> a list of (block, head)
    words = "without must be a list of [block, head], such as [[0, 1]]"
    if not isinstance(pairs, list) or not all(is_whole(pair, 2) for pair in pairs):
        raise Refusal(words, param="without")
    for block, head in pairs:
        if not (0 <= block < hparams["n_layer"] and 0 <= head < hparams["n_head"]):
            there = f"{hparams['n_layer']} blocks of {hparams['n_head']} heads, counted from 0"
            words = f"without: there is no head [{block}, {head}]; the model has {there}"
            raise Refusal(words, param="without")
    return [(block, head) for block, head in pairs]


def read_positions(positions, n_seq):  # None means all positions
    if positions is None:
        return None
    if not is_whole(positions) or not all(0 <= i < n_seq for i in positions):
        raise Refusal(f"positions must be a list of numbers below {n_seq}", param="positions")
    return sorted(set(positions))


def is_whole(items, n=None):  # whether it is a list of n whole numbers, or of any number of them
    right = isinstance(items, list) and all(type(item) is int for item in items)
    return right and n in (None, len(items))


ROUTES = [Route("/", play), Route("/predictions", predict, methods=["POST"])]
