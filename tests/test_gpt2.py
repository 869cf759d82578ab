"""The forward pass, sampling and generation against transformers, torch, JAX and plain loops."""

import ast
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import REPO, call, hugging_face, random_params, tree_map

import gpt2
import gpt2_pico
from model_files import hub, weights
from pages.recording import watch

SMALL = {"n_vocab": 97, "n_ctx": 23, "n_embd": 30, "n_head": 3, "n_layer": 2}
LONG = {"n_vocab": 61, "n_ctx": 150, "n_embd": 12, "n_head": 2, "n_layer": 2}  # > 64: halves
SHAPE_124M = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
HEAVY = ["jax", "jaxlib", "optax", "tensorflow", "torch", "transformers", "safetensors", "tqdm"]
OURS = [name[:-3] for name in os.listdir(REPO) if name.endswith(".py")]


@pytest.fixture
def jax():
    """JAX on the CPU: elsewhere its float32 products are rounded to fewer bits."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    with jax.default_device(jax.devices("cpu")[0]):
        yield jax


@pytest.fixture
def params(rng):
    return random_params(rng, SMALL)


def float64(params):
    return tree_map(lambda array: array.astype(np.float64), params)


def random_ids(rng, *shape, hparams=SMALL):
    return rng.integers(0, hparams["n_vocab"], size=shape)


def assert_close(ours, theirs, atol, dtype=np.float32):
    assert ours.dtype == dtype and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def hugging_face_logits(model, ids):
    torch = sys.modules["torch"]
    with torch.no_grad():
        return model(torch.tensor(np.atleast_2d(ids))).logits.numpy()


# --- the same function, written as plainly as possible, in float64 --------------------------------


def plain_gelu(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + math.tanh(inner))


def plain_layer_norm(row, g, b):
    mean = sum(row) / len(row)
    variance = sum((number - mean) ** 2 for number in row) / len(row)
    return (row - mean) / math.sqrt(variance + 1e-5) * g + b


def plain_linear(x, w, b):
    return np.einsum("si,io->so", x, w) + b


def plain_attention(q, k, v):
    """Of one head: q [n_q, d_head], k and v [n_seq, d_head]."""
    rows = []
    for i, query in enumerate(q, len(k) - len(q)):
        weights = [math.exp(sum(query * k[j]) / math.sqrt(len(query))) for j in range(i + 1)]
        rows.append(sum(weight * v[j] for j, weight in enumerate(weights)) / sum(weights))
    return np.array(rows)


def plain_gpt2(ids, params, n_head):
    x = np.array([params["wte"][i] + params["wpe"][at] for at, i in enumerate(ids)])
    n_embd = x.shape[-1]
    d_head = n_embd // n_head
    for block in params["blocks"]:
        normed = np.array([plain_layer_norm(row, **block["ln_1"]) for row in x])
        qkv = plain_linear(normed, **block["attn"]["c_attn"])
        heads = []
        for start in range(0, n_embd, d_head):
            q, k, v = (qkv[:, part + start :][:, :d_head] for part in (0, n_embd, 2 * n_embd))
            heads.append(plain_attention(q, k, v))
        x = x + plain_linear(np.concatenate(heads, axis=1), **block["attn"]["c_proj"])
        normed = np.array([plain_layer_norm(row, **block["ln_2"]) for row in x])
        wide = np.vectorize(plain_gelu)(plain_linear(normed, **block["mlp"]["c_fc"]))
        x = x + plain_linear(wide, **block["mlp"]["c_proj"])
    x = np.array([plain_layer_norm(row, **params["ln_f"]) for row in x])
    return np.einsum("se,ve->sv", x, params["wte"])


def plain_softmax(row):
    top = max(row)
    e = np.array([math.exp(number - top) for number in row.tolist()])
    return e / math.fsum(e)


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-13)])
def test_gelu_is_torchs_tanh_form(rng, dtype, tolerance):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = np.concatenate([rng.normal(size=1000) * 3, [0, -0.0, 9, -9, 30, -30]]).astype(dtype)
    theirs = torch.nn.functional.gelu(torch.tensor(x), approximate="tanh").numpy()
    np.testing.assert_allclose(gpt2.gelu(x), theirs, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gpt2_pico.gelu(x), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [0.1, 3, 1e4, 1.7e38])
def test_softmax_of_any_size(rng, scale):
    x = (rng.uniform(-1, 1, size=(40, 9)) * scale).astype(np.float32)
    if scale < 10:  # whole rows far from 0, on both sides
        x = np.concatenate([x, x + 1e4, x - 1e4])
    wanted = np.array([plain_softmax(row) for row in x])
    np.testing.assert_allclose(gpt2.softmax(x), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gpt2.softmax(x).sum(-1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(gpt2_pico.softmax(x), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("error")
def test_softmax_gives_nothing_to_minus_infinity(rng):
    x = rng.normal(size=(4, 3, 8)).astype(np.float32)
    x[..., [0, 5, 7]] = -np.inf
    x[2, 1, 1:] = -np.inf
    x[2, 1, 0] = -3e38
    ours = gpt2.softmax(x)
    wanted = [[plain_softmax(row) for row in rows] for rows in x]
    np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=0)
    assert (ours[x == -np.inf] == 0).all() and ours[2, 1, 0] == 1


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("scale, shift", [(1, 0), (1e-3, 0), (1, 3), (50, 0)])
def test_layer_norm_is_torchs(rng, dtype, tolerance, scale, shift):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = (rng.normal(size=(2, 5, 30)) * scale + shift).astype(dtype)
    g, b = rng.normal(size=(2, 30)).astype(dtype)
    theirs = torch.nn.functional.layer_norm(
        torch.tensor(x), (30,), *map(torch.tensor, (g, b))
    ).numpy()
    assert_close(gpt2.layer_norm(x, g, b), theirs, tolerance, dtype)
    assert_close(gpt2_pico.layer_norm(x, g, b), theirs, tolerance, dtype)


def one_shot_attention(q, k, v):
    """Without halves: the whole square of scores at once, in torch's layout and arithmetic."""
    n_q, n_seq = q.shape[-2], k.shape[-2]
    scores = np.einsum("...id,...jd->...ij", q, k) / q.shape[-1] ** 0.5
    e = np.exp(scores) * np.tri(n_seq, dtype=q.dtype)[n_seq - n_q :]
    return np.einsum("...ij,...jd->...id", e / e.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    "n_q, n_seq",
    [
        (1, 1),
        (2, 2),
        (1, 9),
        (2, 9),
        (3, 9),
        (9, 9),
        (127, 130),
        (128, 128),
        (129, 129),
        (129, 140),
        (257, 257),
    ]
    + [(64, 64), (65, 65), (65, 70), (131, 300), (300, 301), (517, 517)],
)
def test_attention_in_halves_is_attention(rng, n_q, n_seq):
    q, k, v = rng.normal(size=(3, 2, n_seq, 5))
    q = q[:, -n_q:]
    wanted = one_shot_attention(q, k, v)
    assert_close(gpt2.attention(q, k, v), wanted, 1e-12, np.float64)
    if n_seq < 10:
        assert_close(plain_attention(q[0], k[0], v[0]), wanted[0], 1e-12, np.float64)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    assert_close(gpt2.attention(q, k, v), wanted, 1e-5)


@pytest.mark.parametrize("n_q, n_seq", [(1, 12), (5, 12), (100, 200), (129, 131), (200, 263)])
def test_the_last_queries_alone_see_what_they_see_among_all(rng, n_q, n_seq):
    q, k, v = rng.normal(size=(3, 2, 3, n_seq, 4)).astype(np.float32)
    every = gpt2.attention(q, k, v)
    assert_close(gpt2.attention(q[..., -n_q:, :], k, v), every[..., -n_q:, :], 2e-6)


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_vocab, n_ctx, n_embd, n_head, n_layer, n_seq",
    [
        (50, 8, 8, 2, 1, 1),
        (50, 1, 12, 1, 2, 1),
        (97, 13, 30, 3, 2, 13),
        (31, 9, 7, 1, 3, 5),
        (33, 129, 24, 8, 1, 129),
        (64, 300, 30, 3, 2, 257),
        (29, 521, 10, 2, 2, 521),
    ],
)
def test_logits_are_transformers(rng, n_vocab, n_ctx, n_embd, n_head, n_layer, n_seq):
    hparams = dict(zip(SMALL, (n_vocab, n_ctx, n_embd, n_head, n_layer), strict=True))
    params = random_params(rng, hparams)
    ids = random_ids(rng, 3, n_seq, hparams=hparams)
    theirs = hugging_face_logits(hugging_face(params, hparams), ids)
    assert 0.5 < theirs.std() < 10  # so that the tolerance means something
    assert_close(gpt2.gpt2(ids, **params, n_head=n_head), theirs, 1e-4)
    assert_close(gpt2.gpt2(ids[0], **params, n_head=n_head), theirs[0], 1e-4)
    assert_close(gpt2_pico.gpt2(ids[0], **params, n_head=n_head), theirs[0], 1e-4)


@pytest.mark.slow
def test_a_model_of_124ms_shape_is_transformers(rng):
    params = random_params(rng, SHAPE_124M)
    model = hugging_face(params, SHAPE_124M)
    ids = random_ids(rng, 21, hparams=SHAPE_124M)
    theirs = hugging_face_logits(model, ids)[0]
    assert 0.5 < theirs.std() < 10
    assert_close(gpt2.gpt2(ids, **params, n_head=12), theirs, 1e-4)
    assert_greedy(model, ids.tolist(), gpt2.generate(ids.tolist(), params, 12, 4), 4)


@pytest.mark.parametrize("n_head", [1, 3, 5])
def test_logits_are_those_of_plain_loops(rng, params, n_head):
    ids = random_ids(rng, 9)
    params64 = float64(params)
    wanted = plain_gpt2(ids, params64, n_head)
    for ours in (gpt2, gpt2_pico):
        assert_close(ours.gpt2(ids, **params64, n_head=n_head), wanted, 1e-11, np.float64)
        assert_close(ours.gpt2(ids, **params, n_head=n_head), wanted, 1e-4)


@pytest.mark.parametrize("hparams", [SMALL, LONG], ids=["small", "long"])
def test_pico_is_gpt2(rng, hparams):
    params, n_head, n_ctx = random_params(rng, hparams), hparams["n_head"], hparams["n_ctx"]
    ids = random_ids(rng, n_ctx, hparams=hparams)
    ours, pico = (f.gpt2(ids, **params, n_head=n_head) for f in (gpt2, gpt2_pico))
    assert_close(pico, ours, 1e-5)
    prompt = ids[:-10].tolist()
    before = list(prompt)
    params64 = float64(params)  # so that no rounding decides between two tokens
    new = gpt2_pico.generate(prompt, params64, n_head, 10)
    assert new == gpt2.generate(prompt, params64, n_head, 10) and len(new) == 10
    assert prompt == before and {type(token) for token in new} == {int}
    with pytest.raises(AssertionError, match=rf"{n_ctx - 10} \+ 11 .*{n_ctx}"):
        gpt2_pico.generate(prompt, params, n_head, 11)


@pytest.mark.parametrize("n_ctx", [1, 5])
def test_more_tokens_than_positions_are_refused(rng, jax, n_ctx):
    """Of a single position, NumPy's sum would give every token the same, without a word."""
    params = random_params(rng, SMALL | {"n_ctx": n_ctx})
    one_more = f"{n_ctx + 1} tokens, but this model has only {n_ctx} positions"
    for inputs in (random_ids(rng, n_ctx + 1), random_ids(rng, n_ctx + 1).tolist()):
        with pytest.raises(ValueError, match=one_more):
            gpt2.gpt2(inputs, **params, n_head=3)
    with pytest.raises(ValueError, match=one_more):
        jax.jit(gpt2.gpt2, static_argnames="n_head")(
            random_ids(rng, 2, n_ctx + 1), **params, n_head=3
        )
    assert gpt2.gpt2(random_ids(rng, 2, n_ctx), **params, n_head=3).shape == (2, n_ctx, 97)


@pytest.mark.parametrize("n_q", [1, 2, 63, 64, 65, 130, 150])
def test_blocks_of_queries_give_what_the_plain_formula_gives(rng, n_q):
    q, k, v = rng.standard_normal((3, 2, 5, 150, 8), dtype=np.float32)
    q = q[..., -n_q:, :]  # the last ones
    wanted = gpt2.attention(*(x.astype(np.float64) for x in (q, k, v)))
    assert_close(gpt2.attention(q, k, v), wanted, 1e-5)
    assert_close(gpt2.attention_in_blocks(q, k, v), wanted, 1e-5)


def test_pico_is_sixty_lines():
    with open(gpt2_pico.__file__, encoding="utf-8") as f:
        lines = f.read().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 60
    assert max(map(len, lines)) <= 100
    tree = ast.parse("\n".join(lines))
    imports = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert imports == ["import numpy as np"]


def test_the_example_in_picos_docstring_prints_what_it_says():
    command, printed = re.search(
        r"^    python (.*)  # prints (.*)$", gpt2_pico.__doc__, re.M
    ).groups()
    code, out, err = call(*shlex.split(command), models_dir=REPO / "models")
    assert (code, out.strip(), err) == (0, printed, "")


@pytest.mark.parametrize("prompt, n, words", [([], 1, "no tokens"), ([1], -1, "0 or more")])
def test_pico_says_which_of_two_things_is_wrong(params, prompt, n, words):
    with pytest.raises(AssertionError, match=words):
        gpt2_pico.generate(prompt, params, 3, n)


@pytest.mark.parametrize("module", ["gpt2", "gpt2_pico"])
def test_importing_is_importing_numpy(module):
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "numpy" in loaded and loaded.intersection(
        [*HEAVY, *OURS, "requests", "fire", "regex"]
    ) == {module}


# --- JAX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hparams", [SMALL, LONG], ids=["small", "long"])
def test_jax_compiles_the_same_function(rng, jax, hparams):
    params = random_params(rng, hparams)
    ids = random_ids(rng, 2, hparams["n_ctx"] - 1, hparams=hparams)
    compiled = jax.jit(functools.partial(gpt2.gpt2, n_head=hparams["n_head"]))
    for some in (ids, ids[0]):
        theirs = compiled(some, **params)
        assert isinstance(theirs, jax.Array)
        assert_close(gpt2.gpt2(some, **params, n_head=hparams["n_head"]), np.array(theirs), 1e-4)
        assert theirs.dtype == np.float32


@pytest.mark.parametrize("hparams", [SMALL, LONG], ids=["small", "long"])
def test_jaxs_gradients_are_torchs_of_transformers(rng, jax, hparams):
    params = random_params(rng, hparams)
    ids = random_ids(rng, 2, hparams["n_ctx"], hparams=hparams)
    model = hugging_face(params, hparams)
    torch = sys.modules["torch"]
    logits = model(torch.tensor(ids[:, :-1])).logits.flatten(0, 1)
    torch_loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[:, 1:]).flatten())
    torch_loss.backward()

    def loss(params):
        logits = gpt2.gpt2(ids[:, :-1], **params, n_head=hparams["n_head"])
        chosen = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
        return -chosen.mean()

    jax_loss, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert float(jax_loss) == pytest.approx(torch_loss.item(), rel=1e-5)
    named = dict(model.named_parameters())
    for name, shape in weights.tensor_shapes(hparams):
        theirs = named["transformer." + weights.hugging_face_name(name)].grad.numpy()
        ours = np.array(weights.leaf(gradients, name))
        assert ours.shape == shape and np.isfinite(ours).all() and ours.any()
        assert_close(ours, theirs, 1e-4 * np.abs(theirs).max())


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hparams", [SMALL, LONG], ids=["small", "long"])
def test_a_token_changes_no_logits_before_it_and_all_after(rng, hparams):
    params, n_head, n_seq = random_params(rng, hparams), hparams["n_head"], hparams["n_ctx"]
    ids = random_ids(rng, n_seq, hparams=hparams)
    before = gpt2.gpt2(ids, **params, n_head=n_head)
    for t in (0, n_seq - 1, *rng.integers(1, n_seq - 1, size=3)):
        other = ids.copy()
        other[t] = (other[t] + rng.integers(1, hparams["n_vocab"])) % hparams["n_vocab"]
        change = np.abs(gpt2.gpt2(other, **params, n_head=n_head) - before).max(-1)
        assert (change[:t] <= 1e-6).all() and (change[t:] > 1e-4).all(), f"token {t}"


def test_leading_axes_are_independent_rows(rng, params):
    ids = random_ids(rng, 2, 3, 9)
    logits = gpt2.gpt2(ids, **params, n_head=3)
    assert logits.shape == (2, 3, 9, 97)
    for i, j in itertools.product(range(2), range(3)):
        assert_close(logits[i, j], gpt2.gpt2(ids[i, j], **params, n_head=3), 1e-5)
    other = ids.copy()
    other[1, 0] = (other[1, 0] + 1) % 97
    change = np.abs(gpt2.gpt2(other, **params, n_head=3) - logits).max((-1, -2))
    assert change[1, 0] > 1e-2
    change[1, 0] = 0
    assert (change <= 1e-6).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, list])
def test_ids_come_in_any_integer_type(rng, params, dtype):
    ids = random_ids(rng, 9)
    some = ids.tolist() if dtype is list else ids.astype(dtype)
    wanted = gpt2.gpt2(ids, **params, n_head=3)
    np.testing.assert_array_equal(gpt2.gpt2(some, **params, n_head=3), wanted)


def test_more_tokens_than_positions_are_an_error(rng, params):
    gpt2.gpt2(random_ids(rng, 23), **params, n_head=3)
    for ids in (random_ids(rng, 24), random_ids(rng, 2, 24)):
        with pytest.raises(ValueError):
            gpt2.gpt2(ids, **params, n_head=3)


def test_a_blocks_own_attend_takes_the_place_of_attention(rng, params):
    calls = []

    def watched(q, k, v):
        calls.append((q.shape, k.shape, v.shape))
        return gpt2.attention(q, k, v)

    def with_attend(attend, *layers):
        blocks = [{**b, "attend": attend} if i in layers else b for i, b in enumerate(blocks_)]
        return gpt2.gpt2(ids, **params | {"blocks": blocks}, n_head=3)

    ids, blocks_ = random_ids(rng, 4, 9), params["blocks"]
    plain = gpt2.gpt2(ids, **params, n_head=3)
    np.testing.assert_array_equal(with_attend(watched, 0, 1), plain)
    assert calls == [((4, 3, 9, 10),) * 3] * 2
    np.testing.assert_array_equal(with_attend(watched, 1), plain)
    assert len(calls) == 3
    for layer in (0, 1):  # looking only at itself, or into the future, is another model
        assert np.abs(with_attend(lambda q, k, v: v, layer) - plain).max() > 1e-2


def test_a_cache_plugs_in_through_attend_and_wpe(rng, params):
    """In pieces, each at its offset in wpe and with the earlier pieces' keys and values at hand."""

    def cached():
        seen = []

        def attend(q, k, v):
            seen.append((k, v))
            return gpt2.attention(q, *(np.concatenate(x, axis=-2) for x in zip(*seen, strict=True)))

        return attend

    blocks = [{**block, "attend": cached()} for block in params["blocks"]]
    ids = random_ids(rng, 2, 23)
    pieces = []
    for start, stop in itertools.pairwise((0, 1, 2, 9, 10, 22, 23)):
        here = params | {"blocks": blocks, "wpe": params["wpe"][np.arange(start, stop)]}
        pieces.append(gpt2.gpt2(ids[:, start:stop], **here, n_head=3))
    wanted = gpt2.gpt2(ids, **params, n_head=3)
    assert_close(np.concatenate(pieces, axis=1), wanted, 1e-5)


def test_the_examples_in_the_docstring_do_what_it_says(rng, params, jax):
    """One switches a head off, as zeros in its rows of c_proj do; the other is a cache."""
    ids, token = random_ids(rng, 9), int(rng.integers(97))
    names = vars(gpt2) | {"params": params, "ids": ids, "token": token, "n_head": 3}
    doc = inspect.getdoc(gpt2.transformer_block)
    exec(textwrap.dedent("".join(re.findall(r"^(?:    .*)?\n", doc + "\n", re.M))), names)
    plain = gpt2.gpt2(np.append(ids, token), **params, n_head=3)
    assert_close(names["first"], plain[:-1], 1e-5)
    assert_close(names["second"], plain[-1:], 1e-5)

    silenced = tree_map(np.copy, params)
    silenced["blocks"][0]["attn"]["c_proj"]["w"][20:] = 0  # d_head is 10: these are head 2's rows
    wanted = gpt2.gpt2(ids, **silenced, n_head=3)
    assert_close(names["logits"], wanted, 1e-5)
    assert np.abs(wanted - plain[:-1]).max() > 1e-2

    @jax.jit
    def on_jax(params):
        first, *others = params["blocks"]
        blocks = [first | {"attend": names["without_head_2"]}, *others]
        return gpt2.gpt2(ids, **params | {"blocks": blocks}, n_head=3)

    assert_close(np.array(on_jax(params)), wanted, 1e-4)


def test_every_row_may_have_positions_of_its_own(rng, params):
    ids, positions = random_ids(rng, 8, 6), rng.integers(0, 23, size=(8, 7))  # one to spare
    ours = gpt2.gpt2(ids, **params | {"wpe": params["wpe"][positions]}, n_head=3)
    for row, at, logits in zip(ids, positions, ours, strict=True):
        alone = gpt2.gpt2(row, **params | {"wpe": params["wpe"][at]}, n_head=3)
        assert_close(logits, alone, 1e-5)


# --- dtypes and purity ----------------------------------------------------------------------------


def every_function(ids, params, n_head, prepare=lambda x: x):
    """{name: result} of each function of the forward pass."""
    block = params["blocks"][0]
    x = prepare(params["wte"][ids])
    qkv = [x, prepare(x[..., ::-1]), prepare(x * 2)]
    return {
        "gelu": gpt2.gelu(x),
        "softmax": gpt2.softmax(x),
        "layer_norm": gpt2.layer_norm(x, **block["ln_1"]),
        "linear": gpt2.linear(x, **block["mlp"]["c_fc"]),
        "ffn": gpt2.ffn(x, **block["mlp"]),
        "attention_weights": gpt2.attention_weights(*qkv[:2]),
        "attention": gpt2.attention(*qkv),
        "attention_in_blocks": gpt2.attention_in_blocks(*qkv),
        "mha": gpt2.mha(x, **block["attn"], n_head=n_head),
        "transformer_block": gpt2.transformer_block(x, **block, n_head=n_head),
        "hidden_state": gpt2.hidden_state(ids, **params, n_head=n_head),
        "gpt2": gpt2.gpt2(ids, **params, n_head=n_head),
    }


def everything(call):  # of pages.recording.watch -> what the functions that were called returned
    yield call["out"]
    for inner in call["calls"]:
        yield from everything(inner)


@pytest.mark.parametrize("n_seq", [9, 140])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_numpy_keeps_the_dtype(rng, dtype, n_seq):
    params = tree_map(lambda a: a.astype(dtype), random_params(rng, LONG))
    ids = random_ids(rng, n_seq, hparams=LONG)
    results = every_function(ids, params, 2)
    inside = list(everything(watch(gpt2.gpt2, ids, **params, n_head=2)))
    assert len(inside) > 20 and {array.dtype.name for array in inside} == {dtype}
    assert {name: (type(r), r.dtype.name) for name, r in results.items()} == dict.fromkeys(
        results, (np.ndarray, dtype)
    )
    assert all(np.isfinite(result).all() for result in results.values())


@pytest.mark.parametrize("n_seq", [9, 140])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_keeps_the_dtype(rng, jax, dtype, n_seq):
    params = tree_map(lambda a: jax.numpy.asarray(a, dtype), random_params(rng, LONG))
    ids = random_ids(rng, n_seq, hparams=LONG)
    results = jax.eval_shape(functools.partial(every_function, n_head=2), ids, params)
    assert {name: r.dtype.name for name, r in results.items()} == dict.fromkeys(results, dtype)


def test_pico_keeps_float32(rng, params):
    assert gpt2_pico.gpt2(random_ids(rng, 9), **params, n_head=3).dtype == np.float32


def frozen(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("writeable", [True, False])
@pytest.mark.parametrize("model", [gpt2, gpt2_pico], ids=["gpt2", "pico"])
def test_nothing_the_caller_can_see_changes(rng, params, model, writeable):
    ids, logits = random_ids(rng, 9), rng.normal(size=97)
    prompt = ids.tolist()
    copies = tree_map(np.copy, [params, ids, logits])
    if not writeable:
        tree_map(frozen, [params, ids, logits])
    model.gpt2(ids, **params, n_head=3)
    model.generate(prompt, params, 3, 3)
    if model is gpt2:
        every_function(ids, params, 3, prepare=frozen)
        gpt2.generate(prompt, params, 3, 3, temperature=1.0, top_k=5, top_p=0.9)
        gpt2.sample(logits, rng, 0.7, 5, 0.9)
    assert prompt == ids.tolist()
    tree = [params, ids, logits]
    assert str(tree_map(np.shape, tree)) == str(tree_map(np.shape, copies))
    flat, flat_copies = [], []
    tree_map(flat.append, tree)
    tree_map(flat_copies.append, copies)
    for array, copy in zip(flat, flat_copies, strict=True):
        np.testing.assert_array_equal(array, copy)


# --- sampling -------------------------------------------------------------------------------------


def assert_drawn_from(counts, wanted):
    """No count is further off than chance takes one in 30 million (Bernstein's inequality)."""
    n = counts.sum()
    deviation = np.sqrt(n * wanted * (1 - wanted))
    assert (np.abs(counts - n * wanted) <= 6 * deviation + 12).all()
    assert (counts[wanted == 0] == 0).all()


def draws(logits, rng, n=20_000, **how):
    return np.bincount([gpt2.sample(logits, rng, **how) for _ in range(n)], minlength=len(logits))


def test_greedy_takes_the_first_of_the_best(rng):
    logits = rng.normal(size=50).astype(np.float32)
    assert gpt2.sample(logits, None) == logits.argmax()  # which needs no luck
    logits[[7, 20, 33]] = logits.max() + 1
    picks = [gpt2.sample(logits, rng), gpt2.sample(logits, None, 0, top_k=3, top_p=0.5)]
    assert picks == [7, 7] and {type(pick) for pick in picks} == {int}


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_temperature_divides_the_logits(rng, temperature):
    logits = rng.normal(size=12).astype(np.float32) * 2
    wanted = plain_softmax(logits.astype(np.float64) / temperature)
    ours = gpt2.probabilities(logits, temperature)
    assert_close(ours, wanted, 1e-12, np.float64)
    assert_drawn_from(draws(logits, rng, temperature=temperature), wanted)
    assert type(gpt2.sample(logits, rng, temperature)) is int


def test_draws_keep_to_what_top_k_and_top_p_leave(rng):
    logits = rng.permutation(np.linspace(-2, 2, 12))
    wanted = plain_softmax(np.where(logits < np.sort(logits)[-6], -np.inf, logits) / 0.8)
    wanted[wanted < np.sort(wanted)[-4]] = 0
    total = np.sort(plain_softmax(np.sort(logits)[-6:] / 0.8))[::-1].cumsum()
    how = {"temperature": 0.8, "top_k": 6, "top_p": (total[2] + total[3]) / 2}  # 4 cross p
    assert_drawn_from(draws(logits, rng, **how), wanted / wanted.sum())


@pytest.mark.parametrize("k, kept", [(1, 1), (3, 3), (11, 11), (12, 12), (13, 12), (10**9, 12)])
def test_top_k_keeps_the_likeliest(rng, k, kept):
    logits = rng.permutation(np.linspace(-2, 2, 12))
    everything = gpt2.probabilities(logits, 1)
    probs = gpt2.probabilities(logits, 1, top_k=k)
    best = np.argsort(-logits)[:kept]
    assert sorted(np.flatnonzero(probs)) == sorted(best)
    np.testing.assert_allclose(probs[best], everything[best] / everything[best].sum(), rtol=1e-12)


def test_what_is_left_out_filters_nothing(rng):
    logits = rng.normal(size=50)
    assert_close(gpt2.probabilities(logits, 1), plain_softmax(logits), 1e-14, np.float64)


def test_top_k_0_keeps_all_and_equals_are_not_told_apart():
    logits = np.array([1.0, 3, 2, 2, 0, 2, 1])
    assert (gpt2.probabilities(logits, 1, top_k=0) == gpt2.probabilities(logits, 1)).all()
    assert np.flatnonzero(gpt2.probabilities(logits, 1, top_k=1)).tolist() == [1]
    for k in (2, 3, 4):
        assert np.flatnonzero(gpt2.probabilities(logits, 1, top_k=k)).tolist() == [1, 2, 3, 5]
    assert np.flatnonzero(gpt2.probabilities(logits, 1, top_p=0.5)).tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize(
    "p, kept",
    [(1e-300, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.74, 2), (0.75, 2), (0.76, 3), (0.9, 4)]
    + [(0.96, 5), (math.nextafter(1, 0), 5), (1.0, 5)],
)
def test_top_p_keeps_the_token_that_crosses_p(monkeypatch, p, kept):
    exact = np.array([1 / 16, 0.5, 3 / 64, 0.25, 9 / 64])  # no rounding at the edges
    monkeypatch.setattr(gpt2, "softmax", lambda x: exact)
    probs = gpt2.probabilities(np.zeros(5), 1, top_p=p)
    wanted = np.where(exact >= np.sort(exact)[-kept], exact, 0)
    assert_close(probs, wanted / wanted.sum(), 1e-15, np.float64)


BORDERS = [  # shares, p, and how many tokens are the shortest list whose sum is at least p
    ([0.5, 0.3, 0.2], 0.8, 2),  # in float64, 0.5 + 0.3 may be less than 0.8
    ([0.6, 0.3, 0.1], 0.9, 2),
    ([0.4, 0.3, 0.2, 0.1], 0.9, 3),
    ([0.4, 0.3, 0.2, 0.1], 0.7, 2),
    ([0.5, 0.3, 0.2], 0.81, 3),
    ([0.5, 0.3, 0.2], 0.5, 1),
    ([0.4, 0.2, 0.2, 0.2], 0.6, 4),  # two would do, but equals are not told apart
    ([0.1] * 10, 0.3, 10),
]


@pytest.mark.parametrize("shares, p, kept", BORDERS)
def test_top_p_keeps_the_shortest_list_whose_sum_is_at_least_p(rng, shares, p, kept):
    """Rounding does not count, here or in kv_cache_jax.py."""
    order = rng.permutation(len(shares))
    logits = np.log(np.array(shares))[order] + rng.normal()
    wanted = np.where(order < kept, np.array(shares)[order], 0)
    ours = gpt2.probabilities(logits, 1, top_p=p)
    assert_close(ours, wanted / wanted.sum(), 1e-12, np.float64)
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
    from kv_cache_jax import mask

    masked = mask(jnp.asarray(logits, np.float32), 1.0, 0, p)
    assert ((masked > -math.inf) == (wanted > 0)).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 500])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 0.99, 1.0])
def test_probabilities_are_those_of_transformers_warpers(rng, temperature, top_k, top_p):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    logits = rng.normal(size=3000) * 2  # np.partition sorts a short array throughout
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)]
    scores = torch.tensor(logits)[None]
    for warper in warpers:
        scores = warper(None, scores)
    ours = gpt2.probabilities(logits, temperature, top_k, top_p)
    assert_close(ours, scores.softmax(-1)[0].numpy(), 1e-12, np.float64)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.5}])
def test_extreme_temperatures(rng, filters):
    logits = rng.permutation(np.linspace(-30, 30, 11)).astype(np.float32)
    logits[logits == 0] = -np.inf
    for temperature in (5e-324, 1e-320, 1e-10):
        probs = gpt2.probabilities(logits, temperature, **filters)
        assert probs.tolist() == np.eye(11)[logits.argmax()].tolist()
        assert gpt2.sample(logits, rng, temperature, **filters) == logits.argmax()
    hot = gpt2.probabilities(logits, 1e10, **filters)
    n_kept = np.count_nonzero(hot)
    assert n_kept == {(): 10, ("top_k",): 5, ("top_p",): 5, ("top_k", "top_p"): 3}[tuple(filters)]
    np.testing.assert_allclose(hot[hot > 0], 1 / n_kept, rtol=1e-7)
    assert logits[gpt2.sample(logits, rng, 1e10, **filters)] > -np.inf


class Loaded:
    """A die that shows what it is told to."""

    def __init__(self, value):
        self.random = lambda: value


@pytest.mark.parametrize("value", [0.0, 5e-324, 0.5, math.nextafter(1, 0)])
def test_tokens_of_no_probability_are_never_drawn(rng, value):
    for _ in range(100):
        logits = rng.normal(size=20)
        banned = rng.permutation([0, 19, *rng.integers(0, 20, size=rng.integers(0, 15))])
        logits[banned] = -np.inf
        for how in ({}, {"top_k": 3}, {"top_p": 0.7}):
            assert logits[gpt2.sample(logits, Loaded(value), 1.0, **how)] > -np.inf
    assert gpt2.sample(np.array([-np.inf, 0, -np.inf]), Loaded(value), 1.0) == 1


def test_a_seed_repeats_its_draws(params):
    def text(seed):
        return gpt2.generate([1, 2, 3], params, 3, 20, temperature=2.0, seed=seed)

    seven = text(7)
    assert text(7) == seven and len(seven) == 20
    assert text(8) != seven and text(None) != text(None)


# --- generation -----------------------------------------------------------------------------------


def assert_greedy(model, prompt, ours, n):
    """Transformers' own generate, up to a token that rounding may decide."""
    torch = sys.modules["torch"]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        how = {"max_new_tokens": n, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        theirs = model.generate(ids, **how)[0].tolist()
    assert theirs[: len(prompt)] == prompt
    logits = hugging_face_logits(model, theirs)[0, len(prompt) - 1 : -1]
    best, second = np.sort(logits)[:, :-3:-1].T
    n_sure = np.argmin(np.append(best - second > 1e-4, False))
    assert len(ours) == n == len(theirs) - len(prompt)
    assert ours[:n_sure] == theirs[len(prompt) :][:n_sure]


@pytest.mark.parametrize("n_prompt", [1, 5, 22])
def test_greedy_text_is_transformers(rng, n_prompt):
    for hparams in (SMALL, SMALL | {"n_head": 1, "n_layer": 1, "n_embd": 7}):
        params = random_params(rng, hparams)
        prompt, n_new = random_ids(rng, n_prompt).tolist(), 23 - n_prompt  # up to the very last
        ours = gpt2.generate(prompt, params, hparams["n_head"], n_new)
        assert len(ours) == n_new and {type(token) for token in ours} == {int}
        assert_greedy(hugging_face(params, hparams), prompt, ours, n_new)


def test_a_draw_depends_on_the_text_so_far(rng, params):
    """Each token of a drawn text is the one its own prefix and the same die give."""
    prompt = random_ids(rng, 4).tolist()
    how = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    new = gpt2.generate(prompt, params, 3, 15, **how, seed=5)
    die = np.random.default_rng(5)
    for i, token in enumerate(new):
        logits = gpt2.gpt2(prompt + new[:i], **params, n_head=3)[-1]
        assert token == gpt2.sample(logits, die, **how)


def test_none_to_the_last_position_and_no_further(rng, params):
    prompt = random_ids(rng, 20).tolist()
    before = list(prompt)
    assert gpt2.generate(prompt, params, 3, 0) == []
    assert gpt2.generate(prompt + [1, 2, 3], params, 3, 0) == []
    assert len(gpt2.generate(prompt, params, 3, 3)) == 3
    with pytest.raises(ValueError, match=r"^20 .* 4 .* 24, .* 23 [^\n]*$"):
        gpt2.generate(prompt, params, 3, 4)
    with pytest.raises(ValueError, match=r"^24 .* 0 .* 24, .* 23 [^\n]*$"):
        gpt2.generate(prompt + before[:4], params, 3, 0)
    assert prompt == before


@pytest.mark.parametrize(
    "wrong",
    [{"n_tokens_to_generate": n} for n in (-1, -(10**9))]
    + [{"temperature": t} for t in (-1e-9, -1.0, math.nan, math.inf)]
    + [{"top_k": -1}, {"seed": -1}]
    + [{"top_p": p} for p in (0, 0.0, -0.5, 1.5, math.nextafter(1, 2), math.nan)],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(params, wrong):
    [(name, value)] = wrong.items()
    how = {"n_tokens_to_generate": 3, "temperature": 1.0, "seed": 0}
    gpt2.generate([1], params, 3, **how)
    with pytest.raises(ValueError, match=name) as caught:
        gpt2.generate([1], params, 3, **how | wrong)
    message = str(caught.value)
    assert message.endswith(f"not {value}") and "\n" not in message
    with pytest.raises(ValueError, match=name):
        next(gpt2.generate_stream([1], params, 3, **how | wrong))


@pytest.mark.parametrize("n", [0, 1])
def test_a_prompt_of_nothing_is_refused(params, n):
    with pytest.raises(ValueError, match="no tokens"):
        gpt2.generate([], params, 3, n)


def test_endoftext_ends_the_text_and_is_not_part_of_it(params):
    how = {"temperature": 3.0, "seed": 1}
    new = gpt2.generate([1, 2], params, 3, 21, **how)
    for end in {*new}:
        wanted = new[: new.index(end)]
        assert gpt2.generate([1, 2], params, 3, 21, **how, endoftext=end) == wanted
    missing = min({*range(97)} - {*new})
    assert gpt2.generate([missing], params, 3, 0, endoftext=missing) == []
    assert gpt2.generate([1, 2], params, 3, 21, **how, endoftext=missing) == new


def test_endoftext_may_be_token_0(params):
    wte = params["wte"].copy()
    wte[0] *= 10
    ln_f = {"g": np.zeros_like(wte[0]), "b": wte[0]}  # whatever the text, token 0 comes next
    always_0 = params | {"wte": wte, "ln_f": ln_f}
    assert gpt2.generate([1, 2], always_0, 3, 4) == [0, 0, 0, 0]
    assert gpt2.generate([1, 2], always_0, 3, 4, endoftext=0) == []


def test_a_stream_runs_the_model_once_a_token_and_only_when_asked(params, monkeypatch):
    runs = []
    monkeypatch.setattr(
        gpt2,
        "hidden_state",
        lambda ids, *a, run=gpt2.hidden_state, **kw: runs.append(len(ids)) or run(ids, *a, **kw),
    )
    stream = gpt2.generate_stream([5, 6, 7], params, 3, 10)
    assert runs == []
    first = [next(stream), next(stream)]
    assert runs == [3, 4]
    assert first + list(stream) == gpt2.generate([5, 6, 7], params, 3, 10)
    assert runs == [*range(3, 13)] * 2


def test_only_the_last_position_meets_the_vocabulary(params):
    sizes = []

    class Watched(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **options):
            inputs = [np.asarray(x) for x in inputs]
            result = getattr(ufunc, method)(*inputs, **options)
            if ufunc is np.matmul:
                sizes.append(result.size)
            return result

    watched = params | {"wte": params["wte"].view(Watched)}
    new = gpt2.generate([1, 2, 3], watched, 3, 5)
    assert sizes == [97] * 5 and new == gpt2.generate([1, 2, 3], params, 3, 5)
    gpt2.gpt2([1, 2, 3], **watched, n_head=3)
    assert sizes[-1] == 3 * 97  # the watch works


# --- the released model ---------------------------------------------------------------------------

PROMPT = "Alan Turing theorized"
KNOWN = " that computers would one day become the most powerful machines on the planet."


def folder_of_124m():  # -> 124M's folder if its weights are on this machine, otherwise None
    """models/124M, once its checkpoint has been read, or the Hub's files in its cache."""
    folder = REPO / "models" / "124M"
    if (folder / weights.WEIGHTS).is_file():
        return folder
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    return hub.find_cached(hub.RELEASED["124M"], "main", only_tokenizer=False)


@pytest.mark.parametrize("script", ["gpt2.py", "gpt2_pico.py", "kv_cache.py"])
def test_124m_writes_the_known_text(script):
    folder = folder_of_124m()
    if folder is None:
        pytest.skip("124M's weights are neither in models/124M nor in the Hub's cache")
    flags = ["--n_tokens_to_generate", 14, "--model_size", folder]
    assert call(script, PROMPT, *flags) == (0, KNOWN + "\n", "")
