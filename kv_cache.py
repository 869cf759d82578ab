"""Generation with a key-value cache: every token goes through the model once.

    python kv_cache.py "Alan Turing theorized" --n_tokens_to_generate 40

gpt2.py writes each new token by running the whole text again. Nearly all of that repeats the step
before: attention only looks back, so appending a token changes nothing that was computed for the
earlier ones. What the new one needs of them is their keys and values, in every layer. Keep those,
and a step runs one token: the matrices multiply 1 row instead of n_seq.

What is kept is 2 (a key and a value) * n_layer * n_embd numbers a token. In float32 and for GPT-2
124M: 2 * 12 * 768 * 4 bytes = 72 KiB a token, 72 MiB for a full context of 1024, beside 475 MiB of
weights. The room doubles as a text grows, so that short texts do not pay for long ones.

Many texts at once. A step reads all the weights, whether it writes one token or eight, and reading
them is most of its time; so several texts ("rows") take their steps together. Their lengths differ,
and there is no padding: the new tokens of all rows stand one after the other in one flat sequence,
and `gpt2.hidden_state` sees nothing else. Embeddings, layer norms and matrices treat each token by
itself; its position comes from its own row's length; and attention, the one part in which tokens
meet, is handed in here: it cuts the sequence into the rows and gives each its own cache. The same
function thus reads prompts ("prefill", many new tokens a row) and writes (one new token a row).
"""

import contextlib
import json
import sys
from collections import deque
from functools import partial

import numpy as np

from engine import products, threads
from gpt2 import attention, check_length, check_sampling, hidden_state, sample

CHUNK = 512  # tokens that a pass runs at most, which bounds its scratch memory

# --------------------------------------------------------------------------------------------------
# The cache of one row: {"kv": [n_layer, 2, n_head, capacity, d_head], "n_seq": tokens in it}
# --------------------------------------------------------------------------------------------------


def new_cache(params, n_head, capacity=32):
    """An empty cache, float32, with room for `capacity` tokens until it grows."""
    n_ctx, n_embd = params["wpe"].shape
    capacity = max(1, min(capacity, n_ctx))
    shape = (len(params["blocks"]), 2, n_head, capacity, n_embd // n_head)
    return {"kv": np.zeros(shape, np.float32), "n_seq": 0}


def copy_cache(cache):
    """A second row that goes on from the same tokens, independently."""
    return {"kv": cache["kv"].copy(), "n_seq": cache["n_seq"]}


def make_room(cache, n_seq, n_ctx):
    """Doubles the capacity, up to n_ctx, until n_seq tokens fit. ValueError where they never do."""
    if n_seq > n_ctx:
        raise ValueError(f"{n_seq} tokens, but this model has only {n_ctx} positions (n_ctx)")
    *before, capacity, d_head = cache["kv"].shape
    if n_seq > capacity:
        while n_seq > capacity:
            capacity = min(2 * capacity, n_ctx)
        kv = np.zeros((*before, capacity, d_head), np.float32)
        kv[..., : cache["n_seq"], :] = cache["kv"][..., : cache["n_seq"], :]
        cache["kv"] = kv


def extend(caches, new_ids, params, n_head):  # n_rows caches and id lists -> [n_rows, n_embd]
    """extend_all, for which only the hidden state of each row's last token is of interest."""
    x = extend_all(caches, new_ids, params, n_head)
    return x[np.cumsum([len(ids) for ids in new_ids]) - 1]


def extend_all(caches, new_ids, params, n_head):  # the same -> [n_tokens, n_embd]
    """Runs each row's new ids, one or more; their keys and values join its cache, in place.

    Returns the hidden states of all new tokens, those of the first row first. ValueError where a
    row has no new id or outgrows n_ctx, and where two rows have the same cache (see copy_cache).
    """
    if len({id(cache) for cache in caches}) < len(caches):
        raise ValueError("two rows have the same cache: give the second a copy_cache of it")
    if not all(len(ids) for ids in new_ids):
        raise ValueError("every row needs at least one new id")
    params = products.wrap(params)
    starts = [cache["n_seq"] for cache in caches]
    stops = [start + len(ids) for start, ids in zip(starts, new_ids, strict=True)]
    for cache, stop in zip(caches, stops, strict=True):
        make_room(cache, stop, n_ctx=len(params["wpe"]))
    tokens = np.concatenate(new_ids)  # [n_tokens], all rows' in one flat sequence
    positions = np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)])
    borders = np.cumsum([len(ids) for ids in new_ids])  # where each row ends in that sequence
    pieces = share_attention(len(caches), len(tokens), n_head)
    n_scores = sum(stop * len(ids) for stop, ids in zip(stops, new_ids, strict=True))

    def attend(q, k, v, layer):  # [n_head, n_tokens, d_head] each -> [n_head, n_tokens, d_head]
        # Laid out by tokens, so that what mha does with it next copies nothing.
        out = np.empty((q.shape[1], n_head, q.shape[2]), q.dtype).swapaxes(0, 1)

        def work(mine):
            for i, some in pieces[mine]:
                start, stop = starts[i], stops[i]
                row = slice(borders[i] - (stop - start), borders[i])
                keys, values = caches[i]["kv"][layer][:, some]  # [n_heads, capacity, d_head] each
                keys[:, start:stop], values[:, start:stop] = k[some, row], v[some, row]
                out[some, row] = attention(q[some, row], keys[:, :stop], values[:, :stop])

        if len(pieces) > 1 and n_scores > 64 * len(pieces):  # else waking a thread takes longer
            threads.in_threads(work, len(pieces))
        else:
            work(slice(None))
        return out

    blocks = [b | {"attend": partial(attend, layer=i)} for i, b in enumerate(params["blocks"])]
    here = {"wpe": params["wpe"][positions], "blocks": blocks}
    with threads.own_threads(len(tokens)):
        x = hidden_state(tokens, **params | here, n_head=n_head)
    for cache, stop in zip(caches, stops, strict=True):
        cache["n_seq"] = stop  # only now: a pass that was interrupted leaves the row as it was
    return x


def share_attention(n_rows, n_tokens, n_head):  # -> [(row, slice of its heads)]
    """The pieces of attention's work: a row each; of a lone prompt, some heads for each thread."""
    alone = n_rows == 1 and n_tokens > 1
    n = -(-n_head // threads.n_threads()) if alone else n_head  # heads a piece, rounded up
    heads = [slice(first, first + n) for first in range(0, n_head, n)]
    return [(row, some) for row in range(n_rows) for some in heads]


def next_logits(x, params):  # [n_rows, n_embd] -> [n_rows, n_vocab]
    """The logits of the token after each row's last."""
    with threads.own_threads(len(x)):
        return x @ products.wrap(params)["wte"].swapaxes(0, 1)


def step(caches, tokens, params, n_head):  # n_rows caches and ids -> [n_rows, n_vocab]
    """Appends one token to each row; returns the logits of the next, float32.

    ValueError where a row is full, or two have the same cache.
    """
    return next_logits(extend(caches, [[token] for token in tokens], params, n_head), params)


def prefill(cache, ids, params, n_head, chunk=CHUNK):  # one row's prompt -> [n_vocab]
    """Reads a prompt, `chunk` tokens a pass; returns the logits of the next token, float32.

    ValueError for no ids, or for more than fit; then the cache is as it was.
    """
    make_room(cache, cache["n_seq"] + len(ids), n_ctx=len(params["wpe"]))
    for start in range(0, max(1, len(ids)), chunk):
        x = extend([cache], [ids[start : start + chunk]], params, n_head)
    return next_logits(x, params)[0]


# --------------------------------------------------------------------------------------------------
# Many rows: the done leave the batch, the waiting take their places
# --------------------------------------------------------------------------------------------------


def generate_stream(
    prompts, params, n_head, n_tokens_to_generate,
    temperature=0.0, top_k=0, top_p=1.0, seed=None, endoftext=None,
    stop=None, n_samples=1, batch_size=8, chunk=CHUNK,
):  # fmt: skip
    """Yields (row, its new ids so far, None or why it ends), once for each token of each row drawn.

    Row i * n_samples + j is sample j of prompts[i]. Row 0 draws what gpt2.py draws with that seed,
    every other row from the seed and its own number. A row ends by its "length", by "endoftext"
    (which is not among its ids), or by "stop": where stop(ids) is true.

    Memory: batch_size rows have a cache, and one prompt that waits for its samples; so at most
    (batch_size + 1) * 8 * n_layer * n_embd * n_ctx bytes, half a cache more while one grows, and
    what a pass of `chunk` tokens needs (of batch_size tokens, if that is more). The first next()
    raises ValueError for what is wrong, and says in which prompt.
    """
    check_sampling(n_tokens_to_generate, temperature, top_k, top_p, seed)
    prompts = [list(ids) for ids in prompts]  # copies: the caller may change theirs meanwhile
    check_batch(prompts, n_tokens_to_generate, params, n_samples, batch_size, chunk)
    params, sampling = products.wrap(params), (temperature, top_k, top_p)
    waiting, rows, kept = deque(range(len(prompts) * n_samples)), [], None
    while waiting and n_tokens_to_generate == 0:
        yield waiting.popleft(), [], "length"
    while waiting or rows:
        while waiting and len(rows) < batch_size:
            prompt, number = divmod(waiting[0], n_samples)
            if number > 0 and kept is None:
                break  # the prompt's first sample is still reading it
            index = waiting.popleft()
            row = {"index": index, "ids": [], "rng": row_rng(seed, index)}
            if number > 0:
                row |= copy_of(kept)
            else:
                row |= {"cache": new_cache(params, n_head), "new": prompts[prompt], "logits": None}
            rows.append(row)
            kept = None if number == n_samples - 1 else kept
        advance(rows, params, n_head, max(chunk, batch_size))
        for row in rows:
            if row["logits"] is None:  # it has not read all of its prompt
                continue
            if n_samples > 1 and row["index"] % n_samples == 0 and not row["ids"]:
                kept = copy_of(row)
            row["end"] = write(row, n_tokens_to_generate, sampling, endoftext, stop)
            if row["end"]:
                del row["cache"]
            yield row["index"], list(row["ids"]), row["end"]
        rows = [row for row in rows if not row.get("end")]


def copy_of(row):
    """What a row that has read its prompt passes on to the prompt's next samples."""
    return {"cache": copy_cache(row["cache"]), "new": [], "logits": row["logits"]}


def write(row, n_tokens_to_generate, sampling, endoftext, stop):
    """Draws the row's next token. Returns why the row ends with it, or None."""
    token = sample(row["logits"], row["rng"], *sampling)
    row |= {"new": [token], "logits": None}
    if token == endoftext:
        return "endoftext"
    row["ids"].append(token)
    if stop and stop(row["ids"]):
        return "stop"
    return "length" if len(row["ids"]) == n_tokens_to_generate else None


def row_rng(seed, row):
    """A generator for each row, so that what one draws does not depend on its neighbours."""
    return np.random.default_rng([seed, row] if seed is not None and row > 0 else seed)


def advance(rows, params, n_head, chunk):
    """One pass: each row's new ids, at most `chunk` together; logits for the rows it completes."""
    batch = []
    for row in sorted(rows, key=lambda row: len(row["new"])):  # the writers first, with one each
        if n := min(len(row["new"]), chunk):
            batch.append((row, row["new"][:n]))
            row["new"] = row["new"][n:]
            chunk -= n
    if batch:
        x = extend([row["cache"] for row, _ in batch], [ids for _, ids in batch], params, n_head)
        complete = [i for i, (row, _) in enumerate(batch) if not row["new"]]
        for i, logits in zip(complete, next_logits(x[complete], params), strict=True):
            batch[i][0]["logits"] = logits


def check_batch(prompts, n_tokens_to_generate, params, n_samples, batch_size, chunk):
    """Raises ValueError, one clear line, for numbers below 1 and prompts that do not fit."""
    n_vocab, n_ctx = len(params["wte"]), len(params["wpe"])
    for name, value in {"n_samples": n_samples, "batch_size": batch_size, "chunk": chunk}.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    if not prompts:
        raise ValueError("no prompts: at least one is needed")
    for i, prompt in enumerate(prompts, 1):
        try:
            check_length(len(prompt), n_tokens_to_generate, n_ctx)
        except ValueError as error:
            raise ValueError(f"prompt {i} of {len(prompts)}: {error}") from None
        if prompt and not 0 <= min(prompt) <= max(prompt) < n_vocab:
            raise ValueError(f"prompt {i} of {len(prompts)}: an id is not in 0 .. {n_vocab - 1}")


def generate(prompts, params, n_head, n_tokens_to_generate, **options):
    """Ragged lists of ids -> one list of new ids a row; `options` as in generate_stream."""
    rows = {}
    for row, ids, _ in generate_stream(prompts, params, n_head, n_tokens_to_generate, **options):
        rows[row] = ids
    return [rows[row] for row in sorted(rows)]


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def main(
    *prompts: str,
    prompts_file: str | None = None,
    n_tokens_to_generate: int = 40,
    n_samples: int = 1,
    batch_size: int = 8,
    stop: str | None = None,
    jsonl: bool = False,
    model_size: str = "124M",
    models_dir: str = "models",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    backend: str = "numpy",
):
    """Continue one prompt, streaming, or many at once, with GPT-2 and a key-value cache.

    Args:
        prompts: the texts to continue; an empty one starts from nothing.
        prompts_file: a file with a prompt on each line; - reads them from standard input.
        n_tokens_to_generate: how many tokens to add to each at most.
        n_samples: how many continuations of each prompt (with a temperature above 0).
        batch_size: how many to write at the same time; each needs memory for its cache.
        stop: end a continuation before this text (the ids of --jsonl keep its tokens).
        jsonl: print a JSON object a line (prompt, text, ids, stop) instead.
        model_size: 124M, 355M, 774M or 1558M (downloaded once), a folder in models_dir, or a path.
        models_dir: the folder that holds the models.
        temperature: 0 always takes the likeliest token; around 0.8 writes livelier text.
        top_k: draw from the k likeliest tokens only; 0 for all.
        top_p: draw from the likeliest tokens that together reach this probability; 1 for all.
        seed: the same seed draws the same texts again.
        backend: numpy, or jax, which compiles the engine first: for a GPU or a TPU.
    """
    from utils import load_encoder_hparams_and_params

    check_sampling(n_tokens_to_generate, temperature, top_k, top_p, seed)  # before any download
    if stop == "":
        raise ValueError("stop must not be empty")
    if backend not in ("numpy", "jax"):
        raise ValueError(f"backend must be numpy or jax, not {backend!r}")
    stream = generate_stream
    if backend == "jax":
        from kv_cache_jax import generate_stream as stream
        from training.devices import keep_compiled

        keep_compiled()
    prompts = [*prompts, *([] if prompts_file is None else read_lines(prompts_file))]
    if not prompts:
        raise ValueError("no prompts: give one or more, or --prompts_file")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    rows = stream(
        [encoder.encode_prompt(prompt) for prompt in prompts],
        params, hparams["n_head"], n_tokens_to_generate,
        temperature, top_k, top_p, seed, encoder.endoftext,
        stop and (lambda ids: stop in encoder.decode(ids)), n_samples, batch_size,
    )  # fmt: skip
    if len(prompts) * n_samples == 1 and not jsonl:
        new_ids = (ids[-1] for _, ids, why in rows if why != "endoftext" and ids)
        for text in up_to(encoder.decode_stream(new_ids), stop):
            print(text, end="", flush=True)
        print()
    else:
        print_rows(
            rows, prompts, n_samples, n_tokens_to_generate, encoder, stop, jsonl,
            bar=prompts_file is not None,
        )  # fmt: skip


def read_lines(path):
    """The lines of a file, or of standard input for "-", without their ends."""
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        text = f.read().decode("utf-8", errors="replace")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def up_to(texts, stop):  # iterable of str -> iterable of str
    """The stream up to `stop`. What may be its beginning is held back until that is clear."""
    held = ""
    for text in texts:
        held += text
        if stop and stop in held:
            held = held[: held.index(stop)]
            break
        doubtful = next(
            (n for n in range(len(stop or "") - 1, 0, -1) if held.endswith(stop[:n])), 0
        )
        yield held[: len(held) - doubtful]
        held = held[len(held) - doubtful :]
    yield held


def print_rows(rows, prompts, n_samples, n_tokens_to_generate, encoder, stop, jsonl, bar):
    """Prints each row once it and all before it are complete; on Ctrl-C, what there is."""
    from tqdm import tqdm

    def show(row, ids, why):
        prompt, text = prompts[row // n_samples], "".join(up_to([encoder.decode(ids)], stop))
        title = json.dumps(prompt, ensure_ascii=False)
        if n_samples > 1:
            title += f" (sample {row % n_samples + 1} of {n_samples})"
        entry = {"prompt": prompt, "text": text, "ids": ids, "stop": why}
        line = json.dumps(entry, ensure_ascii=False) if jsonl else f"==> {title} <==\n{text}\n"
        tqdm.write(line, file=sys.stdout)

    begun, n_shown, n_rows = {}, 0, len(prompts) * n_samples
    total = n_rows * n_tokens_to_generate
    with tqdm(total=total, unit="token", disable=None if bar else True) as progress:
        try:
            for row, ids, why in rows:
                begun[row] = ids, why
                progress.update(why != "endoftext")
                if why:  # what it leaves unwritten is not to come
                    progress.total -= n_tokens_to_generate - len(ids)
                while n_shown in begun and begun[n_shown][1]:
                    show(n_shown, *begun[n_shown])
                    del begun[n_shown]
                    n_shown += 1
        except KeyboardInterrupt:
            for row, (ids, why) in sorted(begun.items()):
                show(row, ids, why or "interrupted")
            raise


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
