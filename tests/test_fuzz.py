"""Hostile input for five parsers: each answers with a result, or with an error in one clear line.

A seed is a list of changes to good documents: to the files of an adapter or a tokenizer, to lines
of examples, to a request, to what the Hub answers.

    ["vocab.json", ["low"], 7]          7 for what is there, in the document's JSON
    ["vocab.json", ["low"]]             without what is there; [] is the whole document
    ["vocab.json", 12, 15, "\\u00ff"]   this byte for those from 12 to 15

tests/seeds/ keeps, a seed a line, what fuzzing found to lead to different places. tests/fuzz.py
goes on from there.
"""

import asyncio
import atexit
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import random
import secrets
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, random_params

import encoder as encoder_module
import utils
from corpus import chat, examples
from encoder import Encoder, get_encoder
from model_files import adapters, hub, weights
from plumbing import cli

SEEDS = Path(__file__).parent / "seeds"
PARAMS = random_params(np.random.default_rng(1), TINY)
ENCODER = encoder_module.train("low lower lowest " * 3, 262)
END = {"content": "<|endoftext|>", "lstrip": False}

# --- Good documents, as JSON or as text ---------------------------------------------------------


def factors():  # -> an adapter's file
    tensors = {}
    for name in ("blocks.0.attn.c_attn.w", "blocks.1.mlp.c_proj.w"):
        n_in, n_out = weights.leaf(PARAMS, name).shape
        start = "base_model.model.transformer." + weights.hugging_face_name(name)[: -len(".weight")]
        tensors[start + ".lora_A.weight"] = np.ones((2, n_in), np.float32)
        tensors[start + ".lora_B.weight"] = np.ones((n_out, 2), np.float32)
    return safetensors.numpy.save(tensors, metadata={"format": "pt"})


def files():  # -> {name: bytes}, of a model's folder
    with tempfile.TemporaryDirectory() as folder:
        utils.save_model(folder, Encoder([]), TINY, PARAMS)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


FACTORS, FILES = factors(), files()
N_HEADER = 8 + int.from_bytes(FACTORS[:8], "little")
MESSAGES = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "Hello!"}]
WRITING = {"max_tokens": 2, "logprobs": 2, "stop": ["x"], "seed": 3, "n": 1, "temperature": 1}
WRITING |= {"top_p": 0.9, "top_k": 2, "logit_bias": {"5": 3}, "echo": True, "ignore_eos": True}
BODIES = {
    "/v1/completions": {"prompt": "It", **WRITING},
    "/v1/chat/completions": {"messages": MESSAGES, "stream": True, "max_tokens": 2, "n": 2},
    "/predictions": {"text": "It was", "without": [[0, 1]], "positions": [0, 1], "n_shown": 5},
    "/tokenize": {"prompt": "It", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
BODIES |= dict.fromkeys(["/", "/explain", "/metrics", "/tokenizer_info", "/v1/models"], {})
HEADERS = {"host": "localhost", "origin": "http://localhost", "content-type": "application/json"}
HEADERS |= {"access-control-request-method": "GET"}
REQUEST = {"method": "POST", "path": "/v1/completions", "query": "text=It", "headers": HEADERS}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWER = ["status", "cut", "error", "etag", "x-repo-commit", "x-linked-etag", "location"]
ANSWER += ["content-length", "x-error-code", "x-linked-size"]
GOOD = {
    "adapters": {
        "config": adapters.peft_config("base", 2, 4, ["c_attn"]) | {"rank_pattern": {"c_fc": 2}},
        "header": json.loads(FACTORS[8:N_HEADER]),
        "length": "",  # of the header: the right one
    },
    "tokenizer": {
        "vocab.json": ENCODER.vocab,
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ENCODER.merges),
        "tokenizer_config.json": {"added_tokens_decoder": {str(ENCODER.endoftext): END}},
        "tokenizer.json": {
            "added_tokens": [END | {"id": ENCODER.endoftext, "special": True}],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "model": {
                "type": "BPE",
                "vocab": ENCODER.vocab,
                "merges": [*map(list, ENCODER.merges)],
            },
        },
    },
    "examples": {"1": {"prompt": "The", "completion": " end."}, "2": {"messages": ANSWERED}},
    "http": {"request": REQUEST, **BODIES},
    "hub": {
        "listing": {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]},
        "config.json": json.loads(FILES["config.json"]),
        "answers": [dict.fromkeys(ANSWER) for _ in range(16)],  # none: as it should be
    },
}
ODD = [
    None, True, -1, 0.5, 2**63, 10**400, float("nan"), float("inf"), 1e-320, 302, 404, 500,
    "", "a", "é", "\0", "\n", "\ud800", "x" * 300, "../x", ".*", "(.|.)*!", "<|endoftext|>",
    [], {}, [[]], [1, 2],
]  # fmt: skip


def keys(node):  # -> all keys, and texts, of a document
    if isinstance(node, dict):
        return {*node}.union(*map(keys, node.values()))
    if isinstance(node, list):
        return set().union(*map(keys, node))
    return {node} if isinstance(node, str) else set()


# --- Changes ------------------------------------------------------------------------------------


def changed(documents, changes):  # -> {name: bytes}; what is at no place of a document changes none
    trees = {"": copy.deepcopy(documents)}
    for name, *what in changes:
        if isinstance(what[0], list):
            with contextlib.suppress(LookupError, TypeError):
                put(trees[""], [name, *what[0]], *what[1:])
    texts = {
        name: (tree if isinstance(tree, str) else json.dumps(tree)).encode("utf-8", "replace")
        for name, tree in trees[""].items()
    }
    for name, *what in changes:
        if len(what) == 3 and name in texts:
            start, stop, text = what
            texts[name] = texts[name][:start] + text.encode("latin-1") + texts[name][stop:]
    return texts


def put(node, path, *value):
    *way, last = path
    for key in way:
        node = node[key]
    if value:
        node[last] = copy.deepcopy(value[0])
    else:
        del node[last]


def mutated(changes, documents, rng):  # -> changes, one of them new, gone or another
    changes = copy.deepcopy(changes)
    if changes and rng.random() < 0.5:
        del changes[rng.randrange(len(changes))]
        if rng.random() < 0.5:
            return changes
    name = rng.choice([*documents])
    if rng.random() < 0.25:
        start = rng.randrange(400)
        text = rng.choice(["", rng.randbytes(rng.randrange(9)).decode("latin-1")])
        return [*changes, [name, start, start + rng.randrange(20), text]]
    node, path = documents[name], []
    while isinstance(node, dict | list) and node and rng.random() < 0.9:
        path.append(rng.choice([*node] if isinstance(node, dict) else range(len(node))))
        node = node[path[-1]]
    words = sorted(keys(documents))
    if path and isinstance(path[-1], str) and rng.random() < 0.2:
        path[-1] = rng.choice(words)  # a new one
    value = rng.choice([*ODD, rng.choice(words), rng.randrange(300), {rng.choice(words): None}])
    return [*changes, [name, path, value] if rng.random() < 0.8 else [name, path]]


# --- The parsers --------------------------------------------------------------------------------


def write(folder, documents):
    for name, data in documents.items():
        Path(folder, name).write_bytes(data)


def read_adapter(documents, folder):
    config, header, length = (documents.get(name, b"") for name in GOOD["adapters"])
    start = (length or len(header).to_bytes(8, "little")) + header
    write(folder, {adapters.CONFIG: config, adapters.WEIGHTS: start + FACTORS[N_HEADER:]})
    found = adapters.read_adapter(folder, adapters.read_config(folder), TINY)
    merged = weights.leaves(adapters.merge(PARAMS, found))
    assert all(merged[name].shape == x.shape for name, x in weights.leaves(PARAMS).items())


def read_tokenizer(documents, folder):
    write(folder, documents)
    encoder = get_encoder("", folder)
    text = "low <|endoftext|> é"
    space = " " if encoder.add_prefix_space else ""
    assert encoder.decode(encoder.encode(text)) == space + text
    assert all(0 <= id < encoder.n_vocab for id in encoder.encode(text, allow_endoftext=True))
    utils.check_vocabulary(encoder, {"n_vocab": 300}, "x")


def read_examples(documents, folder):
    write(folder, {"a.jsonl": b"\n".join(documents.values())})
    found, *_ = examples.load_examples(f"{folder}/a.jsonl", ENCODER, 48)
    rows = examples.pack(found, 48)
    assert sum(map(len, found)) <= rows.size
    for line in documents.values():
        messages = chat.check_messages(json.loads(line).get("messages", ANSWERED))
        assert len(chat.encode_conversation(messages, ENCODER, 48)) <= 48


@functools.cache
def start_app():  # -> the application, and the loop in which it answers
    serve = pytest.importorskip("serve", reason="starlette is not installed")
    app, loop = serve.make_app("tiny", Encoder([]), TINY, PARAMS), asyncio.new_event_loop()
    app.state.engine.start(loop)
    atexit.register(app.state.engine.stop)
    return app, loop


def request_of(documents):  # -> an ASGI scope, and the body
    request = json.loads(documents["request"])
    headers = [(k.encode("ascii"), str(v).encode()) for k, v in request["headers"].items()]
    scope = {"type": "http", "method": request["method"].upper(), "path": str(request["path"])}
    scope |= {"query_string": request["query"].encode(errors="surrogateescape"), "headers": headers}
    scope["method"].encode("ascii"), scope["path"].encode()  # an error for what cannot come
    return scope, documents.get(scope["path"], b"")


def answer_request(case, folder):
    app, loop = start_app()
    try:
        status, kind, said = loop.run_until_complete(ask(app, *case))
    except Exception as error:
        raise AssertionError("the application should have answered") from error
    assert status < 500, (status, said)
    if status >= 400 and said:
        raise ValueError(json.loads(said)["error"]["message"])
    if "event-stream" in kind:
        *parts, end, rest = said.split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        assert not any("server_error" in part for part in parts)


async def ask(app, scope, body):  # -> the status, the content's type, the answer
    received, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive():
        return received.pop() if received else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 60)
    kind = dict(sent[0]["headers"]).get(b"content-type", b"").decode()
    return sent[0]["status"], kind, b"".join(m.get("body", b"") for m in sent[1:]).decode()


def answers_of(documents):  # -> the Hub's files, and what is odd about its first answers
    odd = [{name: answer[name] for name in ANSWER} for answer in json.loads(documents["answers"])]
    for answer in odd:
        status, cut = (int(answer[name] or 0) for name in ("status", "cut"))
        answer |= {"status": status if 200 <= status < 600 else None, "cut": cut}
    return FILES | documents, odd


def fetch(case, folder):
    """What is written, is written into the library's cache."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from huggingface_hub import constants
    from huggingface_hub import utils as hub_utils

    httpx = sys.modules[type(hub_utils.get_session()).__module__]
    (files, odd), numbers = case, itertools.count()

    def answer(request):
        n, path = next(numbers), request.url.path
        here = odd[n] if n < len(odd) else dict.fromkeys(ANSWER)
        if here["error"]:
            raise httpx.ReadError("broken\noff")
        body = files.get("listing" if "/api/" in path else path.rpartition("/")[2])
        status = here["status"] or (404 if body is None else 200)
        headers = {} if body else {"x-error-code": "EntryNotFound"}
        body = body or b""
        headers |= {"etag": f'"{hashlib.sha256(body).hexdigest()}"', "x-repo-commit": COMMIT}
        headers |= {"content-length": len(body)}
        headers |= {k: v for k, v in here.items() if k in ANSWER[3:] and v is not None}
        headers = {k: str(v).encode("utf-8", "replace") for k, v in headers.items()}
        body = body[: here["cut"] or None] if request.method == "GET" else b""
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))

    cache = f"{folder}/a/b/c/d/cache"
    with (
        mock.patch.object(httpx.HTTPTransport, "handle_request", lambda _, asked: answer(asked)),
        mock.patch.object(constants, "HF_HUB_CACHE", cache),
        mock.patch("time.sleep"),  # the library tries again
    ):
        try:
            found = hub.fetch_repository("a/b")
            utils.load_encoder_hparams_and_params(found, ".")
        finally:
            there = [path for path in Path(folder).rglob("*") if path.is_file()]
            assert all(path.is_relative_to(cache) for path in there), there


PARSERS = {
    "adapters": read_adapter,
    "tokenizer": read_tokenizer,
    "examples": read_examples,
    "http": answer_request,
    "hub": fetch,
}
CASES = {"http": request_of, "hub": answers_of}


def check(parser, changes):  # -> what was said, or "" for a result
    """Any other error than one in a clear line goes on to the caller."""
    case = changed(GOOD[parser], changes)
    if parser in CASES:
        try:
            case = CASES[parser](case)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            return "no case"
    with tempfile.TemporaryDirectory() as folder:
        try:
            PARSERS[parser](case, folder)
        except (ValueError, OSError) as error:
            said = cli.one_line(error)
            assert said not in ("", type(error).__name__)
            return said.replace(folder, "")
    return ""


@pytest.mark.parametrize("parser", PARSERS)
def test_every_seed_and_its_like_give_a_result_or_one_line(parser):
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    for line in (SEEDS / f"{parser}.jsonl").read_text().splitlines():
        for changes in (json.loads(line), mutated(json.loads(line), GOOD[parser], rng)):
            print(changes)
            check(parser, changes)
