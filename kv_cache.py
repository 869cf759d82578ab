"""Generation with a key-value cache: every token goes through the model once.

    python kv_cache.py "Alan Turing theorized" --n_tokens_to_generate 40

gpt2.py writes each new token by running the whole text again. Nearly all of that repeats the step
before: attention only looks back, so appending a token changes nothing that was computed for the
earlier ones. The new token needs only their keys and values, in every layer. If we keep these, a
step runs one token: the matrices multiply 1 row instead of n_seq.

The cache holds 2 (a key and a value) * n_layer * n_embd numbers per token. In float32, for GPT-2
124M: 2 * 12 * 768 * 4 bytes = 72 KiB per token, 72 MiB for a full context of 1024, beside 475 MiB
of weights. The room doubles as a text grows, so that short texts do not pay for long ones.

Many texts at once. A step reads all the weights, whether it writes one token or eight, and reading
them is most of its time; so several texts ("rows") take their steps together. Their lengths differ,
and there is no padding: the new tokens of all rows stand one after the other in one flat sequence,
and `gpt2.hidden_state` sees nothing else. Embeddings, layer norms and matrices treat each token by
itself; its position comes from its own row's length; and attention, the one part in which tokens
meet, is passed in from here: it cuts the sequence into rows and gives each its own cache. So the
same function reads prompts ("prefill", many new tokens a row) and writes (one new token a row).
"""

import json
import math
import sys
from functools import partial
from itertools import islice

import numpy as np

from corpus.chat import NEXT_TURN, converse
from engine import products, slices
from engine.rows import admit, choose, drawing, n_read, n_to_copy, new_row, write
from engine.stops import up_to
from gpt2 import (
    attention,
    attention_in_blocks,
    check_length,
    check_sampling,
    hidden_state,
    latest,
)

CHUNK = 512  # tokens that a pass runs at most, which bounds its scratch memory

# --------------------------------------------------------------------------------------------------
# The idea: keep the keys and values, attend to all of them, and shift the positions
# --------------------------------------------------------------------------------------------------


def one_text(params, n_head):  # -> a function that takes the next ids, [n], and returns [n, n_embd]
    """The idea in its simplest form. All code below does the same, faster and for many texts.

    Only a test calls this: it compares the two.
    """
    kept, n_seq = {}, 0  # {layer: (keys, values)}, and of how many tokens

    def run(ids):
        nonlocal n_seq

        def attend(q, k, v, layer):  # three of [n_head, n, d_head]
            if n_seq > 0:
                k = np.concat([kept[layer][0], k], axis=-2)  # [n_head, n_seq + n, d_head]
                v = np.concat([kept[layer][1], v], axis=-2)
            kept[layer] = k, v
            return attention(q, k, v)  # q belongs to the last positions, as attention expects

        blocks = [b | {"attend": partial(attend, layer=i)} for i, b in enumerate(params["blocks"])]
        later = params | {"blocks": blocks, "wpe": params["wpe"][n_seq:]}
        x = hidden_state(ids, **later, n_head=n_head)
        n_seq += len(ids)
        return x

    return run


# --------------------------------------------------------------------------------------------------
# The cache of one row: {"kv": [n_layer, 2, n_head, capacity, d_head], "n_seq": tokens in it}
# --------------------------------------------------------------------------------------------------


def new_cache(params, n_head, capacity=32):
    """An empty cache, float32, with room for `capacity` tokens until it grows."""
    n_ctx, n_embd = params["wpe"].shape
    capacity = max(1, min(capacity, n_ctx))
    shape = (len(params["blocks"]), 2, n_head, capacity, n_embd // n_head)
    return {"kv": np.zeros(shape, np.float32), "n_seq": 0}


def copy_cache(cache, n_seq=None):
    """A second row that goes on from the same tokens, or the first n_seq of them, independently."""
    if n_seq is None:
        return {"kv": cache["kv"].copy(), "n_seq": cache["n_seq"]}
    return {"kv": cache["kv"][..., :n_seq, :].copy(), "n_seq": n_seq}


def make_room(cache, n_seq, n_ctx):
    """Doubles the capacity, up to n_ctx, until n_seq tokens fit. ValueError if they never do."""
    if n_seq > n_ctx:
        raise ValueError(f"{n_seq} tokens, but this model has only {n_ctx} positions (n_ctx)")
    *before, capacity, d_head = cache["kv"].shape
    if n_seq > capacity:
        while n_seq > capacity:
            capacity = min(2 * capacity, n_ctx)
        kv = np.zeros((*before, capacity, d_head), np.float32)
        kv[..., : cache["n_seq"], :] = cache["kv"][..., : cache["n_seq"], :]
        cache["kv"] = kv


def remember(cache, layer, heads, k, v):  # two of [n_heads, n_new, d_head] -> [.., n_seq, ..]
    """Adds the new tokens' keys and values, which must fit. Returns all keys and all values."""
    start, stop = cache["n_seq"], cache["n_seq"] + k.shape[-2]
    keys, values = cache["kv"][layer][:, heads]
    keys[:, start:stop], values[:, start:stop] = k, v
    return keys[:, :stop], values[:, :stop]


def extend(caches, new_ids, params, n_head):  # n_rows caches and id lists -> [n_rows, n_embd]
    """As extend_all, but returns only the hidden state of each row's last token."""
    x = extend_all(caches, new_ids, params, n_head)
    return x[np.cumsum([len(ids) for ids in new_ids]) - 1]


def extend_all(caches, new_ids, params, n_head):  # the same -> [n_tokens, n_embd]
    """Runs each row's new ids, one or more; their keys and values join its cache, in place.

    Returns the hidden states of all new tokens, row after row. ValueError if a row has no new id
    or outgrows n_ctx, or if two rows have the same cache (see copy_cache).
    """
    if len({id(cache) for cache in caches}) < len(caches):
        raise ValueError("two rows have the same cache: give the second a copy_cache of it")
    if not all(len(ids) for ids in new_ids):
        raise ValueError("every row needs at least one new id")
    starts = [cache["n_seq"] for cache in caches]
    stops = [start + len(ids) for start, ids in zip(starts, new_ids, strict=True)]
    for cache, stop in zip(caches, stops, strict=True):
        make_room(cache, stop, n_ctx=len(params["wpe"]))
    tokens = np.concatenate(new_ids)  # [n_tokens], all rows' in one flat sequence
    positions = np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)])
    ends = np.cumsum([len(ids) for ids in new_ids])  # where each row ends in that sequence
    places = [slice(end - len(ids), end) for end, ids in zip(ends, new_ids, strict=True)]

    def attend(layer, head_groups, q, k, v, out):  # [n_head, n_tokens, d_head] each
        work = []  # a group: some heads of a row, or all
        for row, heads in head_groups:
            new = heads, places[row]
            keys, values = remember(caches[row], layer, heads, k[new], v[new])
            work.append((q[new], keys, values, out[new]))
        look = params["blocks"][layer].get("attend", attention_in_blocks)
        if look is attention_in_blocks and len(tokens) == len(caches) > 1:  # each row has one token
            slices.attention_of_rows(work)
        else:
            for q_row, keys, values, out_row in work:
                out_row[...] = look(q_row, keys, values)

    x = slices.run(tokens, positions, params, n_head, len(caches), attend)
    for cache, stop in zip(caches, stops, strict=True):
        cache["n_seq"] = stop  # only now: a pass that was interrupted leaves the row as it was
    return x


def next_logits(x, params, n_run=1):  # [n_rows, n_embd] -> [n_rows, n_vocab]
    """The logits of the token after each row's last, in a pass that ran n_run tokens."""
    # The threads of such a pass, so that others do not wake now; one in slices has its own.
    with products.own_threads(max(len(x), n_run), x.shape[1]):
        return x @ products.wrap(params)["wte"].swapaxes(0, 1)


def step(caches, tokens, params, n_head):  # n_rows caches and ids -> [n_rows, n_vocab]
    """Appends one token to each row; returns the logits of the next, float32.

    ValueError if a row is full, or if two rows have the same cache.
    """
    return next_logits(extend(caches, [[token] for token in tokens], params, n_head), params)


def prefill(cache, ids, params, n_head, chunk=CHUNK):  # one row's prompt -> [n_vocab]
    """Reads a prompt, `chunk` tokens a pass; returns the logits of the next token, float32.

    ValueError for no ids, or for too many; then the cache is unchanged.
    """
    make_room(cache, cache["n_seq"] + len(ids), n_ctx=len(params["wpe"]))
    for start in range(0, max(1, len(ids)), chunk):
        x = extend([cache], [ids[start : start + chunk]], params, n_head)
    return next_logits(x, params, len(ids))[0]


# --------------------------------------------------------------------------------------------------
# A batch: rows that take their steps together. engine/rows.py says what a row is, and who runs when
# --------------------------------------------------------------------------------------------------


def begin(row, params, n_head):
    """Gives the row its cache, unless it must wait for another row to read the part they share."""
    n = n_to_copy(row)
    if n is not None:
        row["cache"] = copy_cache(row["source"]["cache"], n) if n else new_cache(params, n_head)
        row |= {"to_run": row["prompt"][n:], "source": None}


def advance(rows, params, n_head, chunk=CHUNK):  # -> [(row, its ids so far, None or why it ends)]
    """One pass of at most `chunk` tokens; returns what was written. Rows that have ended leave."""
    for row in rows:
        if not row["cache"]:
            begin(row, params, n_head)
    batch = choose(rows, max(chunk, len(rows)))
    x = extend_all([row["cache"] for row, _ in batch], [ids for _, ids in batch], params, n_head)
    ends = np.cumsum([len(ids) for _, ids in batch])
    for (row, ids), end in zip(batch, ends, strict=True):
        if row["read"] and not row["ids"]:
            row["read"](x[end - len(ids) : end])
    writers = [(row, end) for (row, _), end in zip(batch, ends, strict=True) if not row["to_run"]]
    last = [np.arange(end - 1 - len(row["guesses"]), end) for row, end in writers]
    few = x[np.concatenate(last or [ends[:0]])]  # none, if no row may write yet
    logits = next_logits(few, params, len(x))
    written = []
    for (row, _), n in zip(writers, map(len, last), strict=True):
        written += write(row, logits[:n])
        logits = logits[n:]
        if not row["end"]:
            fit(row, params, n_head)
    rows[:] = [row for row in rows if not row["end"]]
    return written


def turn(rows, waiting, batch_size, params, n_head, chunk=CHUNK, kept=()):  # -> as advance
    """Makes a pass; then rows from the iterator `waiting` join, as many as there is room for.

    generate_stream and serve.py call it in a loop. kept: ended rows whose caches may be copied.
    """
    written = advance(rows, params, n_head, chunk) if rows else []
    ended = [row for row, _, why in written if why]
    for row in islice(waiting, max(0, batch_size - len(rows))):
        admit(rows, row, [*kept, *ended])
    return written


def fit(row, params, n_head):
    """A row that is full slides: it reads the end of its text again, into a new cache."""
    n_ctx = len(params["wpe"])
    room = n_ctx - n_read(row)
    if room == 0:
        row |= {"cache": new_cache(params, n_head), "guesses": [], "has_slid": True}
        row["to_run"] = latest(row["prompt"] + row["ids"], n_ctx)
    else:  # guesses must not outgrow the context
        row["to_run"], row["guesses"] = row["to_run"][:room], row["guesses"][: room - 1]


def generate_stream(
    prompts, params, n_head, n_tokens_to_generate,
    temperature=0.0, top_k=0, top_p=1.0, seed=None, endoftext=None,
    stop=None, n_samples=1, batch_size=8, chunk=CHUNK, lookup=0, slide=False,
):  # fmt: skip
    """Yields (row, its new ids so far, None or why it ends), once for each token that is drawn.

    Row i * n_samples + j is sample j of prompts[i]. Row 0 draws what gpt2.py draws with that seed,
    every other row from the seed and its own number. A row ends by its "length", by "endoftext"
    (which is not among its ids), or by "stop", when stop(ids) is true. With `slide`, texts may be
    longer than n_ctx: a full row reads the last half of its context again, into a new cache.

    With `lookup`, a pass also checks that many guesses for each row, see engine/lookup.py: the same
    ids, sooner where a text repeats itself. (A pass of several tokens adds numbers in another order
    than a pass of one. If the rounding makes two logits change places, another token wins.)

    Memory: batch_size rows have a cache, and so has an ended row while the next one copies it. That
    is at most (batch_size + 1) * 8 * n_layer * n_embd * n_ctx bytes, half a cache more while one
    grows, and what a pass of `chunk` tokens needs (or of batch_size tokens, if that is more). The
    first next() raises ValueError if anything is wrong, and names the prompt.
    """
    check_sampling(n_tokens_to_generate, temperature, top_k, top_p, seed)
    prompts = [list(ids) for ids in prompts]  # copies: the caller may change the lists meanwhile
    n_ctx = len(params["wpe"])
    counts = {"n_samples": n_samples, "batch_size": batch_size, "chunk": chunk}
    check_batch(prompts, n_tokens_to_generate, params, counts, lookup, math.inf if slide else n_ctx)
    prompts = [latest(ids, n_ctx) for ids in prompts]
    params, sampling = products.wrap(params), (temperature, top_k, top_p)
    numbers = range(len(prompts) * n_samples)
    if n_tokens_to_generate == 0:
        yield from ((number, [], "length") for number in numbers)
        return
    row_of = partial(new_row, endoftext=endoftext, stop=stop, lookup=lookup)
    waiting = (
        row_of(prompts[number // n_samples], n_tokens_to_generate, drawing(seed, number, sampling))
        | {"number": number}
        for number in numbers
    )
    rows = []
    while True:
        written = turn(rows, waiting, batch_size, params, n_head, chunk)
        written = [(row["number"], ids, why) for row, ids, why in written]  # frees the rows
        yield from written
        if not rows:
            return


def check_batch(prompts, n_tokens_to_generate, params, counts, lookup, n_ctx):
    """Raises ValueError, one clear line, for numbers below 1 and prompts that do not fit."""
    n_vocab = len(params["wte"])
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    if lookup < 0:
        raise ValueError(f"lookup must be a number of guesses, or 0 for none, not {lookup}")
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
    interactive: bool = False,
    n_tokens_to_generate: int = 40,
    n_samples: int = 1,
    batch_size: int = 8,
    lookup: int = 0,
    stop: tuple[str, ...] | None = None,
    echo: bool = False,
    jsonl: bool = False,
    chat: bool = False,
    model_size: str = "124M",
    models_dir: str = "models",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    slide: bool = False,
    backend: str = "numpy",
):
    """Continue one prompt, streaming, or many at once, with GPT-2 and a key-value cache.

    Args:
        prompts: the texts to continue; an empty one starts from nothing.
        prompts_file: a file with one prompt per line; - reads them from standard input.
        interactive: continue each line that is typed, until Ctrl-D; Ctrl-C stops a text. This is
            what happens on a terminal without prompts.
        n_tokens_to_generate: how many tokens to add to each text at most.
        n_samples: how many continuations of each prompt; they differ if temperature is above 0.
        batch_size: how many texts to write at the same time; each needs memory for its cache.
        lookup: guess this many tokens at a time from the text so far; the result is the same, and
            comes sooner where the text repeats itself.
        stop: end a continuation before this text, in which \\n is a new line, \\t a tab and \\\\ a
            backslash; may be repeated, for several (the ids of --jsonl keep its tokens).
        echo: print each prompt before its continuation.
        jsonl: print one JSON object per line (prompt, text, ids, stop, index, sample) instead.
        chat: hold a conversation; answer each line that is typed, with the earlier ones in mind,
            until Ctrl-D; Ctrl-C stops an answer. For models that have been finetuned on
            conversations.
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. What is not here yet is downloaded once.
        models_dir: the folder that holds the models.
        temperature: 0 always takes the likeliest token; around 0.8 writes livelier text.
        top_k: draw from the k likeliest tokens only; 0 for all.
        top_p: draw from the likeliest tokens that together reach this probability; 1 for all.
        seed: the same seed draws the same texts again.
        slide: go on beyond the model's n_ctx, forgetting the beginning of a text; whenever n_ctx
            is full, the last half of it is read again.
        backend: numpy, or jax, which compiles the engine first: for a GPU or a TPU.
    """
    from plumbing.cli import notice
    from plumbing.prompts import find_prompts, interact, unescape
    from utils import load_encoder_hparams_and_params

    check_sampling(n_tokens_to_generate, temperature, top_k, top_p, seed)  # before any download
    if temperature == 0 and (top_k > 0 or top_p < 1 or n_samples > 1):
        notice("at temperature 0, top_k and top_p change nothing, and all samples are the same")
    stops = [unescape(text) for text in stop or ()]
    if "" in stops:
        raise ValueError("stop must not be empty")
    if chat:
        check_chat(n_samples=n_samples > 1, echo=echo, jsonl=jsonl, slide=slide)
        stops.append(NEXT_TURN)
    stream = choose_stream(backend, lookup=lookup, slide=slide)
    prompts = find_prompts(prompts, prompts_file, interactive or chat)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)

    def rows_of(batch):
        return stream(
            batch,
            params, hparams["n_head"], n_tokens_to_generate,
            temperature, top_k, top_p, seed, encoder.endoftext,
            stops and (lambda ids: any(text in encoder.decode(ids) for text in stops)),
            n_samples, batch_size,
        )  # fmt: skip

    def show(prompts):
        rows = rows_of(encode_prompts(prompts, encoder, None if slide else hparams["n_ctx"]))
        if len(prompts) * n_samples == 1 and not jsonl:
            print_stream(rows, prompts[0] if echo else "", encoder, stops)
        else:
            print_rows(
                rows, prompts, n_samples, n_tokens_to_generate, encoder, stops, jsonl,
                bar=prompts_file is not None, echo=echo,
            )  # fmt: skip

    if chat:
        room = hparams["n_ctx"] - n_tokens_to_generate
        interact(converse(lambda ids: texts_of(rows_of([ids]), encoder, stops), encoder, room))
    elif prompts is None:
        interact(show)
    else:
        show(prompts)


def check_chat(**asked):  # {a flag that excludes --chat: was it given?}
    if given := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(f"--chat gives one answer to each line: leave out --{given[0]}")


def choose_stream(backend, **options):  # -> generate_stream, NumPy's or JAX's, with the options
    """ValueError for an unknown backend, and for options that JAX's does not have."""
    if backend not in ("numpy", "jax"):
        raise ValueError(f"backend must be numpy or jax, not {backend!r}")
    if backend == "numpy":
        return partial(generate_stream, **options)
    if asked := [name for name, value in options.items() if value]:
        raise ValueError(f"--backend jax has no --{asked[0]}")
    import kv_cache_jax
    from training.devices import keep_compiled

    keep_compiled()
    return kv_cache_jax.generate_stream


def encode_prompts(prompts, encoder, n_ctx):  # list of str -> list of id lists
    """ValueError says which prompt is too long."""
    batch = []
    for i, prompt in enumerate(prompts, 1):
        try:
            batch.append(encoder.encode_prompt(prompt, n_ctx))
        except ValueError as error:
            raise ValueError(f"prompt {i} of {len(prompts)}: {error}") from None
    return batch


def texts_of(rows, encoder, stops):  # of one row -> its text in parts, as it is made
    new_ids = (ids[-1] for _, ids, why in rows if why != "endoftext" and ids)
    return up_to(encoder.decode_stream(new_ids), stops)


def print_stream(rows, before, encoder, stops):
    """Prints the one row's text as it is made, after the text `before`."""
    for text in texts_of(rows, encoder, stops):
        print(before + text, end="", flush=True)
        before = ""
    print()


def print_rows(
    rows, prompts, n_samples, n_tokens_to_generate, encoder, stops, jsonl, bar, echo=False
):
    """Prints each row once it and all rows before it are complete; on Ctrl-C, all text so far."""
    from tqdm import tqdm

    def show(row, ids, why):
        index, sample = divmod(row, n_samples)
        prompt, text = prompts[index], "".join(up_to([encoder.decode(ids)], stops))
        text = prompt + text if echo else text
        title = json.dumps(prompt, ensure_ascii=False)
        if n_samples > 1:
            title += f" (sample {sample + 1} of {n_samples})"
        entry = {"prompt": prompt, "text": text, "ids": ids, "stop": why}
        entry |= {"index": index, "sample": sample}
        line = json.dumps(entry, ensure_ascii=False) if jsonl else f"==> {title} <==\n{text}\n"
        tqdm.write(line, file=sys.stdout)

    begun, n_shown, n_rows = {}, 0, len(prompts) * n_samples
    total = n_rows * n_tokens_to_generate
    with tqdm(total=total, unit="token", disable=None if bar else True) as progress:
        try:
            for row, ids, why in rows:
                begun[row] = ids, why
                progress.update(why != "endoftext")
                if why:  # it ended early: the bar expects fewer tokens
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
