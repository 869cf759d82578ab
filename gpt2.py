"""GPT-2 in pure NumPy: the forward pass, sampling, generation, and a command line.

    python gpt2.py "Alan Turing theorized that computers would one day become"

A language model is one function: token ids in, and for every position a score (a logit) for each
token that could come next. The first half of this file is that function, built up from its smallest
part; the second half uses it again and again to write text. Checks and the command line come last.

Five conventions hold throughout the file:

*  Shapes. Comments give them as [what goes in] -> [what comes out], where
       n_seq    tokens in the sequence        n_embd  numbers that describe one token
       n_vocab  tokens in the vocabulary      n_head  attention heads
       n_ctx    longest sequence possible     d_head  n_embd / n_head, one head's share
   n_q is the number of queries, and `...` any number of leading axes, even zero: the functions of
   the first half work on the last axes only, so a batch of sequences takes the same path as one.

*  Parameters are dicts with the checkpoint's own names. A layer such as c_fc is {"w": array, "b":
   array}, and `linear(x, **c_fc)` means `linear(x, w=c_fc["w"], b=c_fc["b"])`.

*  Backends. Nothing in the first half needs to know whether an array is NumPy's or JAX's. Operators
   and methods (`@`, `x.mean`) belong to the array. For the few functions that are not methods, such
   as tanh, `x.__array_namespace__()` returns the array's own module: `numpy` (2 or newer) or
   `jax.numpy`. That method is part of the Python array API standard (data-apis.org/array-api). So
   train_jax.py can compile and differentiate these very functions.

*  Precision. The first half computes in the parameters' dtype, usually float32. A Python float such
   as `math.sqrt(2)` takes on the dtype of the array it meets. `np.sqrt(2)` and `np.arange(3) / 2`
   are float64, and would make everything computed from them float64: twice the memory, and several
   times slower. `x += y` keeps the dtype of x, whatever y is, in NumPy, though not in JAX. Only
   `probabilities`, in the second half, uses float64 on purpose.

*  In place. Lines such as `x /= 2` save memory in NumPy. They only ever change an array that the
   same function has just made, so no caller sees a change. In JAX they make a new array.

The architecture is Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
Parameter names are those of OpenAI's released checkpoints: `c_attn`, `c_proj`, `wte`, ...
"""

import math

import numpy as np

# --------------------------------------------------------------------------------------------------
# The forward pass
# --------------------------------------------------------------------------------------------------


def gelu(x):  # [...] -> [...]
    """A smooth bend: near 0 for very negative x, near x for very positive x.

    GPT-2 uses the tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415). The exact form, with erf,
    gives slightly different logits.
    """
    xp = x.__array_namespace__()  # numpy or jax.numpy
    # math.sqrt returns a Python float, np.sqrt a float64. x * x * x: x**3 is many times slower.
    return x * (0.5 + 0.5 * xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def softmax(x):  # [...] -> [...], no number negative, each row summing to 1
    """Turns scores into probabilities.

    Subtracting the same number from a whole row does not change the result. Here that number is the
    row's maximum, so that exp cannot overflow.
    """
    xp = x.__array_namespace__()
    largest = x.max(-1, keepdims=True)
    # floor is a stop_gradient that works in both libraries, since its derivative is 0. It is safe:
    # any number near the maximum prevents overflow, and none changes the result or its gradient.
    e = xp.exp(x - xp.floor(largest))
    e /= e.sum(-1, keepdims=True)
    return e


def layer_norm(x, g, b, eps=1e-5):  # [..., n_embd] -> [..., n_embd]
    """Gives every token's vector mean 0 and variance 1, then a learned gain g and bias b.

    eps avoids a division by 0. Ba et al. 2016, arXiv:1607.06450.
    """
    x = x - x.mean(-1, keepdims=True)
    x /= ((x * x).mean(-1, keepdims=True) + eps) ** 0.5  # divided by the standard deviation
    x *= g
    x += b
    return x


def linear(x, w, b):  # [..., n_in], [n_in, n_out], [n_out] -> [..., n_out]
    """Matrix product plus bias, computed in w's precision, which the trainer may lower."""
    y = x.astype(w.dtype, copy=False) @ w  # no copy where x has that precision already
    y += b
    return y


def ffn(x, c_fc, c_proj):  # [..., n_seq, n_embd] -> [..., n_seq, n_embd]
    """The feed-forward network works on each token by itself: widen, bend by gelu, narrow.

    Vaswani et al. 2017, section 3.3, with gelu in place of relu.
    """
    x = gelu(linear(x, **c_fc))  # [..., n_seq, 4 * n_embd]
    return linear(x, **c_proj)


def attention_weights(q, k):  # [..., n_q, d_head], [..., n_seq, d_head] -> [..., n_q, n_seq]
    """How much each query takes of the value at each position: rows that sum to 1.

    That depends on how well the position's key fits the query: their dot product, turned into
    weights by softmax. The dot product of two random vectors of variance 1 has variance d_head;
    dividing by the square root of d_head brings that back to 1.

    Usually n_q is n_seq. If it is less, the queries are those of the last n_q positions, as in a
    cached step, where only new tokens have queries.
    """
    xp = q.__array_namespace__()
    n_q, d_head = q.shape[-2:]
    n_seq = k.shape[-2]
    scores = (q / math.sqrt(d_head)) @ k.swapaxes(-1, -2)  # [..., n_q, n_seq]
    position = xp.arange(n_seq)
    query_position = position[n_seq - n_q :]
    future = position > query_position[:, None]  # [n_q, n_seq]: what a query may not see
    # NumPy's where makes float64 of two Python numbers, so cast it to the dtype of the scores.
    scores += xp.where(future, -math.inf, 0).astype(scores.dtype)
    return softmax(scores)  # exp(-inf) is 0


def attention(q, k, v):  # q [..., n_q, d_head], k and v [..., n_seq, d_head] -> the shape of q
    """Each query takes a weighted average of the values at its own position and before.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """
    return attention_weights(q, k) @ v


def attention_in_blocks(q, k, v):  # the shapes of attention
    """The same as attention, with less work on long texts: 64 queries at a time.

    The mask throws away nearly half of the scores. A block of queries need not be compared with the
    keys that come after the block, so most of that half is never computed. The scores that are
    computed fit into the processor's cache. 1024 tokens take less than half the time.
    """
    n_q, n_seq = q.shape[-2], k.shape[-2]
    if n_q <= 64:
        return attention(q, k, v)
    parts = []
    for start in range(0, n_q, 64):
        part = q[..., start : start + 64, :]
        n_seen = n_seq - n_q + start + part.shape[-2]  # keys up to the part's last position
        parts.append(attention(part, k[..., :n_seen, :], v[..., :n_seen, :]))
    return q.__array_namespace__().concat(parts, axis=-2)


def mha(x, c_attn, c_proj, n_head, attend=attention_in_blocks):  # [..., n_seq, n_embd] -> the same
    """Multi-head attention: n_head attentions side by side.

    Each works on a slice of d_head numbers of every token's query, key and value, so that heads can
    look for different things. Vaswani et al. 2017, section 3.2.2.

    In 124M, with 12 heads, 5 tokens take these shapes, one a line of the code:

        [5, 768] -> [5, 2304] -> [5, 36, 64] -> [36, 5, 64] -> three of [12, 5, 64]
        -> [12, 5, 64] -> [5, 12, 64] -> [5, 768] -> [5, 768]

    `attend` computes the attention of all heads. It gets q, k and v, [..., n_head, n_seq, d_head]
    each, and returns the shape of q. With a cache, q has only the last n_q of the n_seq positions:
    query i stands at position n_seq - n_q + i. No query may see later positions than its own.
    """
    xp = x.__array_namespace__()
    x = linear(x, **c_attn)  # [..., n_seq, 3 * n_embd]
    x = x.reshape(*x.shape[:-1], 3 * n_head, -1)  # [..., n_seq, 3 * n_head, d_head]
    x = x.swapaxes(-2, -3)  # [..., 3 * n_head, n_seq, d_head]
    q, k, v = xp.split(x, 3, axis=-3)  # three of [..., n_head, n_seq, d_head]
    x = attend(q, k, v)  # [..., n_head, n_seq, d_head]
    x = x.swapaxes(-2, -3)  # [..., n_seq, n_head, d_head]
    x = x.reshape(*x.shape[:-2], -1)  # [..., n_seq, n_embd]: the heads side by side
    return linear(x, **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, attend=attention_in_blocks):
    """Attention moves information between tokens, then the ffn works on each. x keeps its shape.

    Both add their result to x, the "residual stream": each finds in x what all blocks before it
    have written, and the gradient of x + f(x) reaches x directly as well as through f. GPT-2
    normalises before each of the two, not after them (Radford et al. 2019, section 2.3).

    `attend` is the one part that can be replaced. hidden_state calls transformer_block(x, **block),
    so a function that stands in a block's dict as "attend" arrives here beside the parameters. That
    is how GPUs get their own kernels. This one switches off the third head of the first block:

        def without_head_2(q, k, v):  # [..., n_head, n_seq, d_head] each; heads count from 0
            xp = q.__array_namespace__()
            is_on = xp.arange(q.shape[-3]) != 2  # [n_head]
            return attention(q, k, v) * is_on[:, None, None]

        blocks = list(params["blocks"])
        blocks[0] = blocks[0] | {"attend": without_head_2}
        logits = gpt2(ids, **params | {"blocks": blocks}, n_head=n_head)

    And this is a key-value cache: queries of new tokens only, keys and values of all tokens.

        def cached_attention(past):  # past: a list, empty at first, of a block's own
            def attend(q, k, v):
                past.append((k, v))
                keys, values = (np.concatenate(x, axis=-2) for x in zip(*past))
                return attention(q, keys, values)
            return attend

        blocks = [block | {"attend": cached_attention([])} for block in params["blocks"]]
        first = gpt2(ids, **params | {"blocks": blocks}, n_head=n_head)
        wpe = params["wpe"][len(ids) :]  # the next token's position comes first
        second = gpt2([token], **params | {"blocks": blocks, "wpe": wpe}, n_head=n_head)
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, attend=attend)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def hidden_state(inputs, wte, wpe, blocks, ln_f, n_head):  # [..., n_seq] -> [..., n_seq, n_embd]
    """All of GPT-2 except its last multiplication, float32 if the parameters are.

    `inputs` are token ids below n_vocab: an array or, with NumPy, a list. Token i stands at
    position i, row i of wpe. To start at position p, as a cache does, pass wpe[p:].

    Raises ValueError for more than n_ctx tokens, because wpe has no rows for them.
    """
    x = wte[inputs]  # what each token is ...
    n_seq, n_ctx = x.shape[-2], wpe.shape[-2]
    if n_seq > n_ctx:
        raise ValueError(f"{n_seq} tokens, but this model has only {n_ctx} positions (n_ctx)")
    x = x + wpe[..., :n_seq, :]  # ... and where it stands
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):  # [..., n_seq] -> [..., n_seq, n_vocab]
    """The logits of the token after every position, float32 if the parameters are.

    The token embedding wte is used twice: in hidden_state it turns ids into vectors, and here it
    turns vectors into a score for every id. Both directions need to know which tokens are alike, so
    what is learned about a token when it is predicted also helps when it is read. A second matrix
    would make 124M nearly a third larger (Press & Wolf 2017, arXiv:1608.05859).
    """
    return hidden_state(inputs, wte, wpe, blocks, ln_f, n_head) @ wte.T


# --------------------------------------------------------------------------------------------------
# From logits to text
# --------------------------------------------------------------------------------------------------


def probabilities(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):  # [n_vocab] -> float64
    """The distribution that `sample` draws from.

    temperature: 1 leaves the model's own; below 1 sharpens it, above 1 flattens it.
    top_k: keeps the k likeliest tokens; 0 keeps all (Fan et al. 2018, arXiv:1805.04833).
    top_p: keeps the shortest list of likeliest tokens whose sum is at least p (Holtzman et al.
        2019, arXiv:1904.09751).
    min_p: keeps the tokens that have at least this share of the likeliest one's probability; 0
        keeps all (Nguyen et al. 2024, arXiv:2407.01082).

    They apply in this order. A token that ties with the last one kept is also kept. A sum that is
    below p only by rounding counts as p: of 0.5, 0.3 and 0.2, top_p 0.8 keeps two, although 0.5 +
    0.3 may come out as 0.7999999999999999. float64 makes 50257 small numbers add up to 1.
    """
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all others to -inf, as it should
        logits = (logits - logits.max()) / temperature
    if 0 < top_k < len(logits):
        least = np.sort(logits)[-top_k]
        logits = np.where(logits < least, -np.inf, logits)
    probs = softmax(logits)
    if top_p < 1:
        descending = np.sort(probs)[::-1]
        sums = np.cumsum(descending)  # of the first token, the first two, ...
        n_below = np.searchsorted(sums, top_p - 1e-12)  # this many of them are below p
        n_kept = min(n_below + 1, len(probs))
        least = descending[n_kept - 1]
        probs = np.where(probs < least, 0.0, probs)
    probs = np.where(probs < min_p * probs.max(), 0.0, probs)
    return probs / probs.sum()


def penalize_repetition(logits, ids, penalty):  # [n_vocab], the text so far -> [n_vocab]
    """Makes the tokens that the text already has less likely, and so a greedy text less repetitive.

    A penalty above 1 divides their logits, or multiplies negative ones (Keskar et al. 2019,
    arXiv:1909.05858).
    """
    if penalty == 1:
        return logits
    ids = np.unique(ids)
    logits = logits.copy()
    logits[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return logits


def sample(
    logits, rng, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, ids=()
):  # [n_vocab] -> one token id
    """Returns the likeliest token at temperature 0 (the first if tied), otherwise one drawn by rng.

    repetition_penalty comes first, and acts on the tokens of the text so far, ids. Raises
    ValueError if the largest logit is not finite, as with damaged weights.
    """
    best = int(logits.argmax())  # if there are NaNs, argmax finds the first
    if not math.isfinite(logits[best]):
        raise ValueError("the logits are not finite: the model's weights must be damaged")
    logits = penalize_repetition(logits, ids, repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    cumulative = np.cumsum(probabilities(logits, temperature, top_k, top_p, min_p))
    # The first token whose cumulative sum exceeds a random number: a token of probability p is hit
    # with probability p.
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def latest(ids, n_ctx):  # list of ids -> its end, at most n_ctx ids
    """The ids that the model still sees: all if they fit, otherwise the last n_ctx // 2.

    Half, not n_ctx - 1: kv_cache.py, which does the same, must read them again after each cut, so
    cuts should be rare.
    """
    if len(ids) <= n_ctx:
        return ids
    n_kept = max(1, n_ctx // 2)
    return ids[-n_kept:]


def generate_stream(
    inputs, params, n_head, n_tokens_to_generate, seed=None, endoftext=None, slide=False, **sampling
):
    """Yields new token ids one at a time; ends early at `endoftext`, which is not yielded.

    Autoregression: run the model, choose a token from the last position's logits, append, repeat.
    Each step runs the whole sequence again, although only its last token is new.

    sampling: temperature, top_k, top_p, min_p and repetition_penalty, as `sample` takes them;
        greedy by default.
    endoftext: an id, or several of which any ends the text.
    slide: let the text outgrow n_ctx; then the model sees only its end.

    The first next() raises ValueError if check_sampling or check_length rejects an argument.
    """
    n_ctx = len(params["wpe"])
    check_sampling(n_tokens_to_generate, seed=seed, **sampling)
    check_length(len(inputs), n_tokens_to_generate, math.inf if slide else n_ctx)
    end_ids = end_ids_of(endoftext)
    inputs = list(inputs)  # a copy: the caller's list stays as it is
    rng = np.random.default_rng(seed)
    for _ in range(n_tokens_to_generate):
        inputs = latest(inputs, n_ctx)
        x = hidden_state(inputs, **params, n_head=n_head)
        logits = x[-1] @ params["wte"].T  # as in gpt2, but of the last position only
        token = sample(logits, rng, **sampling, ids=inputs)
        if token in end_ids:
            return
        inputs.append(token)
        yield token


def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """Returns the list of new ids. `options` are those of generate_stream; greedy by default."""
    return list(generate_stream(inputs, params, n_head, n_tokens_to_generate, **options))


# --------------------------------------------------------------------------------------------------
# Nothing is to be learned from here on: arguments are checked, and the command line is read
# --------------------------------------------------------------------------------------------------


def end_ids_of(endoftext):  # an id, several, or None -> a collection of ids
    """Returns the ids that end a text, since some models have more than one."""
    if endoftext is None:
        return ()
    return (endoftext,) if isinstance(endoftext, int | np.integer) else tuple(endoftext)


def check_sampling(
    n_tokens_to_generate, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
    seed=None,
):  # fmt: skip
    """Raises ValueError, in one clear line, for settings that make no sense for any model."""
    if n_tokens_to_generate < 0:
        raise ValueError(f"n_tokens_to_generate must be 0 or more, not {n_tokens_to_generate}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, and finite, not {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (keep every token) or more, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 (keep every token) to 1, not {min_p}")
    if not 0.01 <= repetition_penalty <= 100:
        raise ValueError(
            f"repetition_penalty must be from 0.01 to 100 (1 is none), not {repetition_penalty}"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")


def check_length(n_prompt, n_tokens_to_generate, n_ctx):
    """Raises ValueError, in one clear line, for an empty prompt or a text that would not fit."""
    if n_prompt == 0:
        raise ValueError("the prompt has no tokens, and there is no <|endoftext|> to start from")
    n_seq = n_prompt + n_tokens_to_generate
    if n_seq > n_ctx:
        raise ValueError(
            f"{n_prompt} prompt tokens + {n_tokens_to_generate} to generate = {n_seq}, "
            f"but this model has only {n_ctx} positions (n_ctx)"
        )


def main(
    prompt: str | None = None,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = "models",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    slide: bool = False,
    prompt_file: str | None = None,
):
    """Continue a prompt with GPT-2, as text on standard output.

    The prompt needs no flag: gpt2.py "Alan Turing theorized" -n 8

    Args:
        prompt: the text to continue; empty to start from nothing.
        n_tokens_to_generate: add at most this many tokens.
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
        seed: the same seed draws the same text again.
        slide: continue beyond the model's n_ctx and forget the beginning of the text.
        prompt_file: a file whose whole text is the prompt, without the newline at its end; - reads
            it from standard input.
    """
    from generation.terminal import find_prompt
    from plumbing.cli import notice
    from utils import load_encoder_hparams_and_params

    prompt = find_prompt(prompt, prompt_file)
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    check_sampling(n_tokens_to_generate, seed=seed, **sampling)  # before any download
    if temperature == 0 and (top_k > 0 or top_p < 1 or min_p > 0):
        notice(
            "top_k, top_p and min_p change nothing at temperature 0: it takes the likeliest token"
        )
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode_prompt(prompt, None if slide else hparams["n_ctx"])
    new_ids = generate_stream(
        inputs, params, hparams["n_head"], n_tokens_to_generate,
        seed, encoder.end_ids, slide, **sampling,
    )  # fmt: skip
    for text in encoder.decode_stream(new_ids):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out
    from plumbing.cli import run_cli

    run_cli(main)
