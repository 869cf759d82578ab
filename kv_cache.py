"""Generation with a key-value cache: every token goes through the model only once.

    python kv_cache.py "Alan Turing theorized" --n_tokens_to_generate 40

gpt2.py generates each new token by running the whole text again. Nearly all of that work repeats
the previous step. Attention only looks back, so a new token changes nothing that was computed for
the earlier ones. All it needs from them is their keys and values, in every layer. If we keep these,
a step runs a single token, and the matrices multiply 1 row instead of n_seq.

The cache holds 2 * n_layer * n_embd numbers per token: a key and a value in every layer. For GPT-2
124M in float32, that is 2 * 12 * 768 * 4 bytes = 72 KiB per token, or 72 MiB for a full context of
1024 tokens. The weights take 475 MiB. The capacity doubles as a text grows, so short texts don't
pay for long ones.

Many texts at once. A step reads all the weights, whether it generates one token or eight, and most
of its time goes into reading them. So several texts ("rows") take their steps together. Their
lengths differ, but there is no padding. The new tokens of all rows stand one after the other in one
flat sequence, and that is all that `gpt2.hidden_state` sees. Embeddings, layer norms and matrices
treat each token by itself, and its position comes from the length of its own row. Only in attention
do tokens meet, so this file passes in its own `attend`, which cuts the sequence into rows and gives
each row its own cache. That way the same function reads prompts ("prefill", with many new tokens
per row) and generates (with one new token per row).
"""

import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from engine import products, slices
from generation import terminal
from generation.rows import Event, Row, ids_of, plan_pass
from generation.sampling import Sampler, Sampling
from generation.stops import stops_with
from gpt2 import (
    attention,
    attention_in_blocks,
    check_length,
    check_sampling,
    hidden_state,
    latest,
)
from plumbing.memory import n_that_fit

CHUNK = 512  # the most tokens in one pass, which limits its scratch memory
FIRST_CAPACITY = 32  # tokens that a new cache has room for
MAX_ROWS = 64  # the most rows in a batch, unless the caller sets batch_size
LOOKUP = 4  # guesses per pass, by default, if rows are generated one at a time
N_TOKENS = 40  # the most tokens that the command line adds to a text by default

# --------------------------------------------------------------------------------------------------
# The idea: keep the keys and values, attend to all of them, and shift the positions
# --------------------------------------------------------------------------------------------------


def one_text(params, n_head):  # -> a function that takes the next ids, [n], and returns [n, n_embd]
    """The idea in its simplest form. The rest of the file does the same, faster and for many texts.

    Only a test calls this, to compare the two.
    """
    cache = {}  # {layer: (keys, values)}
    n_seq = 0  # tokens in it

    def extend(ids):
        nonlocal n_seq

        def attend(q, k, v, layer):  # three of [n_head, n, d_head]
            if n_seq > 0:
                k = np.concat([cache[layer][0], k], axis=-2)  # [n_head, n_seq + n, d_head]
                v = np.concat([cache[layer][1], v], axis=-2)
            cache[layer] = k, v
            return attention(q, k, v)  # q belongs to the last positions, as attention expects

        blocks = [b | {"attend": partial(attend, layer=i)} for i, b in enumerate(params["blocks"])]
        shifted = params | {"blocks": blocks, "wpe": params["wpe"][n_seq:]}
        x = hidden_state(ids, **shifted, n_head=n_head)
        n_seq += len(ids)
        return x

    return extend


# --------------------------------------------------------------------------------------------------
# The cache of one row
# --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False, weakref_slot=True)
class Cache:
    """The keys and values of one row's tokens, in every layer."""

    kv: np.ndarray  # [n_layer, 2, n_head, capacity, d_head], float32
    n_seq: int  # tokens in it

    def make_room(self, n_seq, n_ctx):
        """Doubles the capacity, up to n_ctx, until n_seq tokens fit.

        Raises ValueError if n_seq is above n_ctx.
        """
        if n_seq > n_ctx:
            raise ValueError(f"{n_seq} tokens, but this model has only {n_ctx} positions (n_ctx)")
        *before, capacity, d_head = self.kv.shape
        if n_seq > capacity:
            kv = np.zeros((*before, grown(capacity, n_seq, n_ctx), d_head), np.float32)
            kv[..., : self.n_seq, :] = self.kv[..., : self.n_seq, :]
            self.kv = kv

    def append(self, layer, heads, k, v):  # two of [n_heads, n_new, d_head] -> [.., n_seq, ..]
        """Adds the new tokens' keys and values, which must fit. Returns all keys and all values.

        It does not change n_seq. The caller does, once every layer has its keys and values.
        """
        start = self.n_seq
        stop = start + k.shape[-2]
        keys, values = self.kv[layer][:, heads]
        keys[:, start:stop] = k
        values[:, start:stop] = v
        return keys[:, :stop], values[:, :stop]


def new_cache(params, n_head, capacity=FIRST_CAPACITY):
    """Returns an empty cache with room for `capacity` tokens. It grows when it is full."""
    n_ctx, n_embd = params["wpe"].shape
    capacity = max(1, min(capacity, n_ctx))
    shape = (len(params["blocks"]), 2, n_head, capacity, n_embd // n_head)
    return Cache(np.zeros(shape, np.float32), n_seq=0)


def copy_cache(cache, n_seq=None):
    """Returns a copy of the cache, or of its first n_seq tokens, for another row to continue."""
    if n_seq is None:
        return Cache(cache.kv.copy(), cache.n_seq)
    return Cache(cache.kv[..., :n_seq, :].copy(), n_seq)


def grown(capacity, n_seq, n_ctx):  # -> the capacity that makes room for n_seq tokens
    while capacity < n_seq:
        capacity = min(2 * capacity, n_ctx)
    return capacity


def extend(caches, new_ids, params, n_head):  # n_rows caches and id lists -> [n_rows, n_embd]
    """The same as extend_all, but returns only the hidden state of each row's last token."""
    x = extend_all(caches, new_ids, params, n_head)
    return x[np.cumsum([len(ids) for ids in new_ids]) - 1]


def extend_all(caches, new_ids, params, n_head):  # caches and id lists -> [n_tokens, n_embd]
    """Runs each row's new ids, one or more, and adds their keys and values to the row's cache.

    Returns the hidden states of all new tokens, row after row. Raises ValueError if a row has no
    new id or outgrows n_ctx, or if two rows have the same cache (see copy_cache).
    """
    if len({id(cache) for cache in caches}) < len(caches):
        raise ValueError("two rows have the same cache; give the second a copy_cache of it")
    if not all(len(ids) for ids in new_ids):
        raise ValueError("every row needs at least one new id")
    starts = [cache.n_seq for cache in caches]
    stops = [start + len(ids) for start, ids in zip(starts, new_ids, strict=True)]
    for cache, stop in zip(caches, stops, strict=True):
        cache.make_room(stop, n_ctx=len(params["wpe"]))
    tokens = np.concatenate(new_ids)  # [n_tokens], all rows' in one flat sequence
    positions = np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)])
    ends = np.cumsum([len(ids) for ids in new_ids])  # where each row ends in that sequence
    spans = [slice(end - len(ids), end) for end, ids in zip(ends, new_ids, strict=True)]

    def attend(layer, head_groups, q, k, v, out):  # [n_head, n_tokens, d_head] each
        attention_fn = params["blocks"][layer].get("attend", attention_in_blocks)
        is_shared = attention_fn is attention_in_blocks and len(caches) > 1
        together = []  # groups with one token each; a group is some heads of a row, or all of them
        for row, heads in head_groups:
            new = heads, spans[row]
            keys, values = caches[row].append(layer, heads, k[new], v[new])
            if is_shared and len(new_ids[row]) == 1:
                together.append((q[new], keys, values, out[new]))
            else:
                out[new] = attention_fn(q[new], keys, values)
        if together:
            slices.attention_of_rows(together)

    x = slices.run(tokens, positions, params, n_head, len(caches), attend)
    for cache, stop in zip(caches, stops, strict=True):
        cache.n_seq = stop  # only now, so an interrupted pass leaves the row as it was
    return x


def next_logits(x, params, n_run=1):  # [n_rows, n_embd] -> [n_rows, n_vocab]
    """Returns the logits of the token after each row's last. The pass ran n_run tokens."""
    # Use as many threads as the pass did, so no others wake up.
    with products.own_threads(max(len(x), n_run), x.shape[1]):
        return x @ products.wrap(params)["wte"].T


def step(caches, tokens, params, n_head):  # n_rows caches and ids -> [n_rows, n_vocab]
    """Appends one token to each row, and returns the logits of the next one, in float32.

    Raises ValueError if a row is full, or if two rows have the same cache.
    """
    return next_logits(extend(caches, [[token] for token in tokens], params, n_head), params)


def prefill(cache, ids, params, n_head, chunk=CHUNK):  # one row's prompt -> [n_vocab]
    """Reads a prompt, `chunk` tokens per pass. Returns the logits of the next token, in float32.

    Raises ValueError, and leaves the cache unchanged, if there are no ids or too many.
    """
    cache.make_room(cache.n_seq + len(ids), n_ctx=len(params["wpe"]))
    for start in range(0, max(1, len(ids)), chunk):
        x = extend([cache], [ids[start : start + chunk]], params, n_head)
    return next_logits(x, params, len(ids))[0]


# --------------------------------------------------------------------------------------------------
# A batch of rows that take their steps together. generation/rows.py explains rows and their order
# --------------------------------------------------------------------------------------------------


class Batch:
    """Rows that take their steps together. generate_stream and the server call `step` in a loop."""

    def __init__(self, params, n_head, batch_size=MAX_ROWS, chunk=CHUNK):
        self.params = products.wrap(params)
        self.n_head = n_head
        self.batch_size = batch_size
        self.chunk = chunk  # the most tokens in a pass; batch_size if that is more
        self.rows = []

    def step(self, waiting, ended=()):  # -> [Event]
        """Makes a pass, and then lets rows from the iterator `waiting` join while there is room.

        ended: rows that have ended, whose caches may be copied.
        """
        before = list(self.rows)
        events = self.advance() if self.rows else []
        ended = [*ended, *(row for row in before if row.end)]
        for row in islice(waiting, max(0, self.batch_size - len(self.rows))):
            self.admit(row, ended)
        return events

    def admit(self, row, ended=()):
        """Adds a row. If another row, running or ended, has the same beginning, it copies that."""
        row.find_source([*self.rows, *ended])
        self.rows.append(row)

    def advance(self):  # -> [Event]
        """Makes one pass, of at most `chunk` tokens, and removes the rows that have ended.

        An interrupted pass leaves the rows as they were. The next pass runs the same ids again.
        """
        for row in self.rows:
            if row.cache is None:
                self.begin(row)
            else:
                row.rewind()
        shares = plan_pass(self.rows, max(self.chunk, len(self.rows)))
        rows = [row for row, _ in shares]
        new_ids = [ids for _, ids in shares]
        x = extend_all([row.cache for row in rows], new_ids, self.params, self.n_head)
        ends = np.cumsum([len(ids) for ids in new_ids])
        for row, ids, end in zip(rows, new_ids, ends, strict=True):
            if row.sampler.needs_states and not row.ids:
                row.sampler.read_states(x[end - len(ids) : end])
        # A row needs the logits after the last token of its text, and after each guess.
        counts = [max(0, 1 + row.n_ahead()) for row in rows]
        positions = [i for n, end in zip(counts, ends, strict=True) for i in range(end - n, end)]
        logits = next_logits(x[np.array(positions, int)], self.params, len(x))
        events = []
        for row, n in zip(rows, counts, strict=True):
            if n > 0:
                events += row.write(logits[:n])
                logits = logits[n:]
                if not row.end:
                    self.fit(row)
        self.rows = [row for row in self.rows if not row.end]
        return events

    def begin(self, row):
        """Gives the row a cache, unless another row must first read the part that they share."""
        n = row.n_to_copy()
        if n is not None:
            row.cache = copy_cache(row.source.cache, n) if n else self.new_cache()
            row.source = None

    def fit(self, row):
        """Gives a full row a new cache, into which it reads the end of its text again."""
        n_ctx = len(self.params["wpe"])
        room = n_ctx - row.n_read
        if room == 0:
            row.cache = self.new_cache()
            row.n_forgotten = len(row.text) - len(latest(row.text, n_ctx))
            row.guesses = []
        else:
            row.guesses = row.guesses[: room - 1]  # they must not outgrow the context

    def new_cache(self):
        return new_cache(self.params, self.n_head)


def generate_stream(
    prompts, params, n_head, n_tokens_to_generate, seed=None, endoftext=None,
    stop=None, n_samples=1, batch_size=None, chunk=CHUNK, lookup=None, slide=False, **sampling,
):  # fmt: skip
    """Yields an Event (row, token, end) for each token that a row generates, and for each end.

    Row i * n_samples + j is sample j of prompts[i]. Row 0 samples the same tokens as gpt2.py with
    that seed. What any other row samples depends on the seed and the row's number. The end of a row
    is "length", "endoftext", or "stop" if stop(ids) is true of all ids that the row has generated.

    sampling: temperature, top_k, top_p, min_p and repetition_penalty, by name; greedy by default.
    batch_size: how many rows to generate at the same time. By default as many as there are, but at
        most 64, and at most as many as fit, with their caches, into half of the free memory.
    chunk: the most tokens in a pass.
    lookup: how many guesses a pass also checks for each row; see generation/lookup.py. The ids are
        the same, and come sooner if a text repeats itself. (A pass of several tokens adds numbers
        in a different order than a pass of one. If the rounding makes two logits change places,
        another token wins.) The default is 4 if rows are generated one at a time, when guesses cost
        next to nothing, and 0 if several are.
    slide: let texts outgrow n_ctx. A full row reads the last half of its context again, into a new
        cache.

    Memory: each of batch_size rows has a cache, and so does an ended row while the next one copies
    it. That is at most (batch_size + 1) * 8 * n_layer * n_embd * n_ctx bytes. Add half a cache
    while one grows, and what a pass of `chunk` tokens needs (or batch_size tokens, if that is
    more). The first next() raises ValueError if anything is wrong, and names the prompt.
    """
    sampling = Sampling(**sampling)
    check_sampling(n_tokens_to_generate, seed=seed, **sampling._asdict())
    prompts = [list(ids) for ids in prompts]  # copies, since the caller may change the lists
    n_ctx = len(params["wpe"])
    check_counts(lookup, n_samples=n_samples, batch_size=batch_size, chunk=chunk)
    check_prompts(prompts, n_tokens_to_generate, len(params["wte"]), math.inf if slide else n_ctx)
    prompts = [latest(ids, n_ctx) for ids in prompts]
    n_rows = len(prompts) * n_samples
    if batch_size is None:
        n_longest = max(len(ids) for ids in prompts) + n_tokens_to_generate
        batch_size = default_batch_size(n_rows, n_longest, params)
    if lookup is None:
        lookup = LOOKUP if min(n_rows, batch_size) == 1 else 0
    if n_tokens_to_generate == 0:
        yield from (Event(number, None, "length") for number in range(n_rows))
        return

    def new_row(number):
        prompt = prompts[number // n_samples]
        sampler = Sampler(sampling, seed, number, stop)
        return Row(prompt, n_tokens_to_generate, sampler, number, endoftext, lookup)

    waiting = map(new_row, range(n_rows))
    batch = Batch(params, n_head, batch_size, chunk)
    while True:
        yield from batch.step(waiting)
        if not batch.rows:
            return


def check_prompts(prompts, n_tokens_to_generate, n_vocab, n_ctx):
    """Raises ValueError, in one clear line, if there are no prompts, or if one does not fit."""
    if not prompts:
        raise ValueError("no prompts: at least one is needed")
    for i, prompt in enumerate(prompts, 1):
        try:
            check_length(len(prompt), n_tokens_to_generate, n_ctx)
        except ValueError as error:
            raise ValueError(f"prompt {i} of {len(prompts)}: {error}") from None
        if prompt and not 0 <= min(prompt) <= max(prompt) < n_vocab:
            raise ValueError(f"prompt {i} of {len(prompts)}: an id is not in 0 .. {n_vocab - 1}")


def check_counts(lookup, **counts):
    """Raises ValueError, in one clear line, for a count below 1. None stands for the default."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    if lookup is not None and lookup < 0:
        raise ValueError(f"lookup must be a number of guesses, or 0 for none, not {lookup}")


def default_batch_size(n_rows, n_longest, params):
    """Returns n_rows, or less: at most 64, and only as many as fit into half of the free memory.

    A step of 32 rows takes far less time than four steps of 8, because the weights are read once.
    Each row needs a cache for n_longest tokens (or n_ctx, if that is less), and half of that again
    while the cache grows.
    """
    n_ctx, n_embd = params["wpe"].shape
    capacity = grown(min(FIRST_CAPACITY, n_ctx), min(n_longest, n_ctx), n_ctx)
    row_bytes = 3 / 2 * len(params["blocks"]) * 2 * n_embd * capacity * 4
    return n_that_fit(min(n_rows, MAX_ROWS), row_bytes)


def generate(prompts, params, n_head, n_tokens_to_generate, **options):
    """Returns one list of new ids per row. `options` are those of generate_stream."""
    return ids_of(generate_stream(prompts, params, n_head, n_tokens_to_generate, **options))


# --------------------------------------------------------------------------------------------------
# The command line. generation/terminal.py reads the prompts and prints the texts
# --------------------------------------------------------------------------------------------------


def main(
    *prompts: str,
    prompts_file: str | None = None,
    prompt_file: str | None = None,
    interactive: bool = False,
    n_tokens_to_generate: int | None = None,
    n_samples: int = 1,
    batch_size: int | None = None,
    lookup: int | None = None,
    stop: tuple[str, ...] | None = None,
    echo: bool = False,
    jsonl: bool = False,
    chat: bool = False,
    model_size: str = "124M",
    models_dir: str = "models",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    slide: bool = False,
    backend: str = "numpy",
):
    """Continue one prompt or many at once, with GPT-2 and a key-value cache.

    A single text is printed as it is generated.

    Args:
        prompts: the texts to continue; an empty one starts from nothing.
        prompts_file: a file with one prompt per line; - reads them from standard input.
        prompt_file: a file whose whole text is one prompt, without the newline at its end; - reads
            it from standard input.
        interactive: continue each line you type, until Ctrl-D; Ctrl-C stops a text. This is the
            default on a terminal if there are no prompts.
        n_tokens_to_generate: the most tokens to add to each text. The default is 40 or, in a chat,
            as many as the rest of the context holds.
        n_samples: how many continuations of each prompt; they differ if temperature is above 0.
        batch_size: how many texts to generate at the same time. By default all, but at most 64, and
            at most as many as fit, with their caches, into half of the free memory.
        lookup: guess this many tokens at a time from the text so far. The result is the same, and
            comes sooner if the text repeats itself. The default is 4 for a single text, where
            guesses cost next to nothing, and 0 (no guesses) for several.
        stop: end a continuation before this text, in which \\n is a newline, \\t a tab and \\\\ a
            backslash. Repeat the flag for several texts. (The ids of --jsonl include its tokens.)
        echo: print each prompt before its continuation.
        jsonl: print one JSON object per line (prompt, text, ids, stop, index, sample) instead.
        chat: hold a conversation. Each line you type is answered in the light of the earlier ones,
            until Ctrl-D; Ctrl-C stops an answer. This needs a model that was finetuned on
            conversations.
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir, a path, or owner/name of
            the Hugging Face Hub. A missing model is downloaded once.
        models_dir: the folder that holds the models.
        temperature: 0 always takes the likeliest token; around 0.8 writes livelier text. (A
            server's requests default to 1, and its page starts at 0.8.)
        top_k: draw only from the k likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens that together reach this probability; 1 for all.
        min_p: draw from the tokens that have at least this share of the likeliest token's
            probability; 0 for all.
        repetition_penalty: above 1, tokens that are already in the text become less likely; 1.2
            ends the loops that greedy texts fall into.
        seed: the same seed draws the same texts again.
        slide: continue beyond the model's n_ctx and forget the beginning of a text. Whenever n_ctx
            is full, its last half is read again.
        backend: numpy, or jax, which compiles the engine first and is meant for a GPU or a TPU.
    """
    from plumbing.cli import notice
    from utils import load_encoder_hparams_and_params

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    n_tokens = N_TOKENS if n_tokens_to_generate is None else n_tokens_to_generate
    check_sampling(n_tokens, seed=seed, **sampling._asdict())  # before any download
    if temperature == 0 and (top_k > 0 or top_p < 1 or min_p > 0 or n_samples > 1):
        notice("at temperature 0, top_k, top_p and min_p change nothing, and all samples are equal")
    stops = terminal.read_stops(stop or (), chat)
    if chat:
        terminal.check_chat(n_samples=n_samples > 1, echo=echo, jsonl=jsonl, slide=slide)
    stream = find_backend(backend, lookup=lookup, slide=slide)
    prompts = terminal.find_prompts(prompts, prompts_file, interactive or chat, prompt_file)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)

    def write(batch, n_tokens):  # lists of ids -> their events
        return stream(
            batch, params, hparams["n_head"], n_tokens,
            seed=seed, endoftext=encoder.end_ids, stop=stops_with(stops, encoder),
            n_samples=n_samples, batch_size=batch_size, **sampling._asdict(),
        )  # fmt: skip

    def show(prompts):
        ids = terminal.encode_prompts(prompts, encoder, None if slide else hparams["n_ctx"])
        if len(prompts) * n_samples == 1 and not jsonl:
            terminal.print_stream(write(ids, n_tokens), prompts[0] if echo else "", encoder, stops)
        else:
            terminal.print_rows(
                write(ids, n_tokens), prompts, n_samples, n_tokens, encoder, stops, jsonl,
                bar=prompts_file is not None, echo=echo,
            )  # fmt: skip

    if chat:

        def answer(ids, n_tokens):
            return terminal.texts_of(write([ids], n_tokens), encoder, stops)

        say = terminal.converse(answer, encoder, hparams["n_ctx"], n_tokens_to_generate)
        terminal.interact(say)
    elif prompts is None:
        terminal.interact(show)
    else:
        show(prompts)


def find_backend(backend, **options):  # -> generate_stream, NumPy's or JAX's, with the options
    """Raises ValueError for an unknown backend, and for options that JAX's does not have."""
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


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
