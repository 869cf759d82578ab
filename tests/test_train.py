"""train_jax.py against plain restatements, PyTorch, and a run from text to a model folder."""

import functools
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import safetensors.numpy
import torch
from conftest import REPO, SHAKESPEARE, TINY, hugging_face, random_params, slow
from test_utils import assert_same
from transformers import GPT2LMHeadModel

import train_jax
import training.flags
import training.run
import training.text
import utils
from encoder import Encoder
from gpt2 import attention, gpt2, hidden_state
from model_files import weights
from plumbing.cli import note_signals
from training import batches, checkpoints, progress, recipes
from training.attention import fused_attention
from training.batches import fill_batches, step_keys
from training.checkpoints import State
from training.devices import make_mesh, make_sharding
from training.dropout import drop, with_dropout
from training.run import take_steps
from training.state import init_params, moment_shapes, name_leaves, resize_vocab, start_state
from training.text import cut_windows, load_text
from utils import load_encoder_hparams_and_params

SIZES = {"n_vocab": 257, "n_ctx": 16, "n_embd": 24, "n_layer": 1}


@pytest.fixture
def seed():
    seed = int(np.random.SeedSequence().entropy % 2**31)
    print("seed", seed)
    return seed


run = functools.partial(conftest.run, "train_jax.py")


def names(tree):
    paths = jax.tree.leaves_with_path(tree)
    return {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in p): x for p, x in paths}


def test_initial_parameters_have_the_right_sizes_and_deviations(seed):
    tree = init_params(jax.random.key(seed), 257, 64, 128, 2)
    params = names(jax.tree.map(np.asarray, tree))
    assert {x.dtype for x in params.values()} == {jnp.dtype("float32")}
    for name, x in params.items():
        if name.endswith(".b"):
            assert (x == 0).all()
        elif name.endswith(".g"):
            assert (x == 1).all()
        else:
            wanted = 0.02 / 2 if name.endswith("c_proj.w") else 0.02  # sqrt(2 * 2 layers) is 2
            assert abs(x.std() / wanted - 1) < 0.05, name
    tokens = jax.random.randint(jax.random.key(seed), (4, 65), 0, 257)
    losses = jax.jit(train_jax.losses, static_argnums=2)(tree, tokens, 4)
    assert abs(losses.mean() - np.log(257)) < 0.1  # it knows nothing yet


def test_the_initial_numbers_are_drawn_in_the_trees_order(seed):
    """So that a seed means the same model for ever: wte, wpe, and four matrices in each block."""
    params = init_params(jax.random.key(seed), 257, 16, 8, 2)
    keys = iter(jax.random.split(jax.random.key(seed), 10))
    assert (params["wte"] == 0.02 * jax.random.normal(next(keys), (257, 8))).all()
    assert (params["wpe"] == 0.02 * jax.random.normal(next(keys), (16, 8))).all()
    for block in params["blocks"]:
        for part, name, shape, scale in (
            ("attn", "c_attn", (8, 24), 0.02),
            ("attn", "c_proj", (8, 8), 0.01),
            ("mlp", "c_fc", (8, 32), 0.02),
            ("mlp", "c_proj", (32, 8), 0.01),
        ):
            wanted = scale * jax.random.normal(next(keys), shape)
            assert (block[part][name]["w"] == wanted).all(), (part, name)


def test_loss_is_the_mean_surprise(seed):
    params = init_params(jax.random.key(seed), **SIZES)
    params = jax.tree.map(lambda x: x * 5, params)
    tokens = jax.random.randint(jax.random.key(seed + 1), (3, 17), 0, 257)
    as_numpy = jax.tree.map(np.asarray, params)
    logits = gpt2(np.asarray(tokens[:, :-1]), **as_numpy, n_head=3).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    surprise = [np.mean([-np.log(p[i, t, tokens[i, t + 1]]) for t in range(16)]) for i in range(3)]
    losses = jax.jit(train_jax.losses, static_argnums=2)(params, tokens, 3)
    assert np.allclose(losses, surprise, rtol=1e-5)


HPARAMS = {"n_vocab": 257, "n_ctx": 32, "n_embd": 24, "n_head": 3, "n_layer": 2}
WAYS = {
    "plain": {},
    "in chunks": {"n_chunks": 4},
    "fused": {"attend": fused_attention},
    "padded": {"n_vocab": 257},
    "all": {"n_chunks": 2, "attend": fused_attention, "n_vocab": 257},
}


def gradients(params, tokens, **how):
    how = {"n_head": HPARAMS["n_head"]} | how
    function = jax.value_and_grad(lambda p: train_jax.losses(p, tokens, **how).mean())
    return jax.jit(function)(params)


def close(a, b, tolerance=1e-4):  # the distance of two trees' arrays, as a share of their length
    a, b = names(a), names(b)
    return a.keys() == b.keys() and all(
        np.linalg.norm(a[n] - b[n]) <= tolerance * np.linalg.norm(b[n]) for n in a
    )


@pytest.mark.parametrize("way", ["plain", *map(slow, list(WAYS)[1:-1]), "all"])
def test_loss_and_gradients_are_pytorchs(rng, way):
    params = random_params(rng, HPARAMS)
    tokens = rng.integers(0, 257, (3, 33))
    model = hugging_face(params, HPARAMS)
    ids = torch.from_numpy(tokens)
    logits = model(ids[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    wanted.backward()
    theirs = {name: x.grad.numpy() for name, x in model.transformer.named_parameters()}

    n_rows = 384 if "n_vocab" in WAYS[way] else 257
    padded = resize_vocab(params, n_rows)
    value, ours = gradients(jax.tree.map(jnp.asarray, padded), jnp.asarray(tokens), **WAYS[way])
    assert abs(value / wanted.item() - 1) < 1e-4
    assert (ours["wte"][257:] == 0).all()  # rows that are not a token learn nothing
    ours = resize_vocab(jax.tree.map(np.asarray, ours), 257)
    for name, x in name_leaves(ours).items():
        name = weights.hugging_face_name(".".join(re.findall(r"\w+", name)))
        distance = np.linalg.norm(x - theirs[name]) / np.linalg.norm(theirs[name])
        assert distance < 1e-4, (name, distance)
        assert x.dtype == np.float32


def test_fused_attention_is_attention(rng):
    q, k, v = jnp.asarray(rng.standard_normal((3, 2, 4, 37, 8), dtype=np.float32))
    assert np.allclose(fused_attention(q, k, v), attention(q, k, v), atol=1e-5)


def test_bfloat16_rounds_the_blocks_weights_and_nothing_else(rng):
    params = jax.tree.map(jnp.asarray, random_params(rng, HPARAMS))
    narrow = names(train_jax.narrow(params, "bfloat16"))
    weights = {name for name, x in narrow.items() if x.dtype == jnp.bfloat16}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert weights == {f"blocks.{i}.{x}.{wb}" for i in range(2) for x in layers for wb in "wb"}
    assert all(x.dtype == jnp.float32 for name, x in narrow.items() if name not in weights)

    tokens = jnp.asarray(rng.integers(0, 257, (8, 33)))
    how = {"attend": fused_attention}
    value, ours = gradients(train_jax.narrow(params, "bfloat16"), tokens, **how)
    exact, wanted = gradients(params, tokens)
    assert value.dtype == jnp.float32 and 0 < abs(value / exact - 1) < 0.01
    assert close(jax.tree.map(lambda x: x.astype(jnp.float32), ours), wanted, tolerance=0.1)


def test_with_bfloat16_norms_softmax_and_loss_are_float32(rng):
    """Every mean, exponential and logarithm of the compiled step, in what precision it is made."""
    params = train_jax.narrow(jax.tree.map(jnp.asarray, random_params(rng, HPARAMS)), "bfloat16")
    tokens = jnp.asarray(rng.integers(0, 257, (2, 33)))
    how = {"n_head": 3, "attend": fused_attention}
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            found.extend((equation.primitive.name, v.aval.dtype.name) for v in equation.outvars)
            jax.tree.map(look, [p.jaxpr for p in equation.params.values() if hasattr(p, "jaxpr")])

    look(jax.make_jaxpr(lambda p: train_jax.losses(p, tokens, **how))(params).jaxpr)
    for name in ("exp", "log", "div", "sqrt", "pow", "reduce_sum", "reduce_max"):
        assert {dtype for n, dtype in found if n == name} <= {"float32"}, name
    assert {"exp", "log", "reduce_sum"} <= {name for name, _ in found}
    assert ("dot_general", "bfloat16") in found


@pytest.mark.parametrize(
    "n_batch, n_ctx, n_vocab, n_chunks",
    [(12, 64, 257, 1), (32, 1024, 50257, 8), (10**6, 100, 50257, 4)],  # 100: halved twice at most
)
def test_the_logits_are_made_in_parts_that_fit(n_batch, n_ctx, n_vocab, n_chunks):
    flags = {"n_ctx": n_ctx, "n_head": 2, "dtype": "float32", "data": "shakespeare"}
    assert train_jax.loss_options(flags, n_vocab, n_batch)["n_chunks"] == n_chunks


def test_only_the_matrices_of_the_blocks_decay_and_drop():
    params = init_params(jax.random.key(0), **SIZES)
    chosen = {
        name for name, is_matrix in names(train_jax.is_hidden_matrix(params)).items() if is_matrix
    }
    layers = ("attn.c_attn.w", "attn.c_proj.w", "mlp.c_fc.w", "mlp.c_proj.w")
    assert chosen == {f"blocks.0.{layer}" for layer in layers}


@pytest.mark.parametrize("name, also", [slow("adamw", ("wte", "wpe")), ("muon", ())])
def test_weight_decay_shrinks_matrices_only(name, also):
    params = jax.tree.map(jnp.ones_like, init_params(jax.random.key(0), **SIZES))
    optimizer = make_optimizer(name, lambda _: 0.5, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for name, update in names(updates).items():
        decays = name.endswith(".w") or name in also
        assert np.allclose(update, -0.05 if decays else 0, atol=1e-7), name


def test_schedule_warms_up_from_above_zero_and_ends_at_the_lowest_rate():
    schedule = train_jax.make_schedule(1000, 1.0, min_learning_rate=0.1, n_warmup=100)
    assert np.isclose(schedule(0), 0.01)
    assert np.isclose(schedule(50), 0.01 + 0.99 * 0.5)
    assert np.isclose(schedule(100), 1)
    assert np.isclose(schedule(550), (1 + 0.1) / 2)  # half of the cosine's way
    assert np.isclose(schedule(1000), 0.1) and np.isclose(schedule(2000), 0.1)
    assert train_jax.make_schedule(1, 1.0, 0.1, n_warmup=100)(0) > 0


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_says_everything(name):
    recipe = recipes.RECIPES[name]
    flags = training.flags.choose(
        {"recipe": name, "data": "x"}, "cpu", HPARAMS if name == "finetune" else None
    )
    asked = "n_layer n_head n_embd n_ctx batch_size n_steps learning_rate min_learning_rate "
    asked += "n_warmup weight_decay grad_clip n_accumulate optimizer dtype eval_every "
    asked += "checkpoint_every seed"
    assert all(flags[flag] is not None for flag in asked.split())
    assert recipe["min_learning_rate"] < recipe["learning_rate"]
    parameters = inspect.signature(train_jax.main).parameters
    assert recipe.keys() <= parameters.keys()
    limits = {flag.name: flag.limits for flag in training.flags.FLAGS}
    checked = {name for name in limits if limits[name] is not training.flags.ANY}
    assert recipe.keys() <= checked | {"data", "fsdp"}
    typed = {"n_steps": 7, "seed": 5, "data": "y", "grad_clip": 0.25}
    flags = training.flags.choose(
        {"recipe": name} | typed, "cpu", HPARAMS if name == "finetune" else None
    )
    assert typed.items() <= flags.items() and flags["recipe"] == name


@pytest.mark.parametrize(
    "name, n_params",
    [("gpt2-124M", 124439808), ("gpt2-1558M", 1557611200), ("gpt3-175B", 1.746e11)],
)
def test_the_larger_recipes_have_the_published_sizes(name, n_params):
    recipe = recipes.RECIPES[name]
    sizes = {size: recipe[size] for size in ("n_ctx", "n_embd", "n_layer")}
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: init_params(key, 50257, **sizes))
    total = sum(int(np.prod(x.shape, dtype=np.int64)) for x in jax.tree.leaves(params))
    assert total == n_params or abs(total / n_params - 1) < 1e-3
    tokens = recipe["batch_size"] * recipe["n_accumulate"] * recipe["n_ctx"]
    assert tokens == 2**19 and recipe["n_embd"] % recipe["n_head"] == 0
    if name == "gpt2-124M":
        assert progress.flops_per_token(sizes | {"n_vocab": 50257}, 1024) == 855166464


def test_dropped_numbers_are_the_asked_share_and_the_rest_is_scaled_up(rng, seed):
    """So that the mean stays. 0.25 is 64 of 256, exactly. 33 is no multiple of 4."""
    x = rng.uniform(1, 2, (7, 50, 33)).astype("f4")
    dropped = np.asarray(drop(jax.random.key(seed), jnp.asarray(x), 0.25))
    gone = dropped == 0
    assert abs(gone.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / x.size)
    assert np.allclose(dropped, np.where(gone, 0, x / 0.75), rtol=1e-6)
    assert dropped.dtype == np.float32
    for axis in range(3):  # no two rows lose the same numbers
        rows = np.moveaxis(gone, axis, 0).reshape(x.shape[axis], -1)
        assert len(np.unique(rows, axis=0)) == len(rows)


def test_dropout_is_rounded_to_256ths():
    dropped = drop(jax.random.key(0), jnp.ones((64, 64)), 0.1)
    assert set(np.unique(dropped)) == {0, np.float32(256 / 230)}  # 26 of 256


def test_dropout_acts_where_gpt2s_does(rng, seed):
    """On the embeddings' sum, and on what each half of a block adds to the stream.

    transformers' GPT-2 drops there, and after softmax too. With a rate of 0.5 and factors of 0 and
    2 found by hooks in ours, its own model without dropout, handed the same factors, agrees.
    """
    params = random_params(rng, HPARAMS)
    ids = rng.integers(0, HPARAMS["n_vocab"], (3, 11))
    key = jax.random.key(seed)
    dropping = with_dropout(key, jax.tree.map(jnp.asarray, params), 0.5)
    ours = np.asarray(hidden_state(ids, **dropping, n_head=HPARAMS["n_head"]))

    places = [dropping["wpe"]]
    for block in dropping["blocks"]:
        places += [block["attn"]["c_proj"]["b"], block["mlp"]["c_proj"]["b"]]
    shape = 3, 11, HPARAMS["n_embd"]
    masks = [np.asarray(drop(place.key, jnp.ones(shape), 0.5)) for place in places]
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    model = hugging_face(params, HPARAMS)
    dropouts = [model.transformer.drop]
    for block in model.transformer.h:
        dropouts += [block.attn.resid_dropout, block.mlp.dropout]
    for module, mask in zip(dropouts, masks, strict=True):
        factors = torch.from_numpy(mask.copy())
        module.register_forward_hook(lambda _, x, y, factors=factors: y * factors)
    with torch.no_grad():
        theirs = model.transformer(torch.from_numpy(ids)).last_hidden_state.numpy()
    assert np.allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_every_accumulated_batch_drops_other_numbers(seed):
    """Two batches that are the same, and their losses restated."""
    batch = jax.random.randint(jax.random.key(seed), (2, 17), 0, 257)
    key = step_keys(seed, 0)[1]

    def begin():  # with weights large enough to be missed
        params, *rest = start(make_optimizer(), seed)
        return jax.tree.map(lambda x: 8 * x, params), *rest

    losses = []
    for i in range(2):
        dropping = with_dropout(jax.random.fold_in(key, i), begin()[0], 0.5)
        losses.append(train_jax.losses(dropping, batch, 3).mean())
    steps = train_jax.make_train_steps(make_optimizer(), 0.5, seed, n_head=3)
    _, (loss, *_) = steps(begin(), jnp.stack([batch, batch])[None], 1)
    assert abs(losses[0] - losses[1]) > 1e-3 and abs(loss - np.mean(losses)) < 1e-4
    assert (step_keys(seed, 0)[0] != step_keys(seed, 0)[1]).any()


@pytest.mark.parametrize("name", ["adamw", slow("muon")])
def test_the_average_is_that_of_the_parameters_after_each_step(seed, name):
    """Beside the definition, in float64, from the parameters of a run that takes single steps."""
    ema, n = 0.9, 12
    batches = jax.random.randint(jax.random.key(seed), (n, 1, 4, 17), 0, 257)
    rule = make_optimizer(name, optax.constant_schedule(1e-2))
    optimizer = train_jax.with_average(rule, ema)
    steps = train_jax.make_train_steps(optimizer, 0.0, seed, n_head=3)
    state = start(optimizer, seed)
    wanted = {key: np.float64(x) for key, x in names(state.params).items()}
    for i in range(n):
        state, _ = steps(state, batches[i : i + 1], 1)
        kept = min(ema, (2 + i) / (11 + i))
        for key, x in names(state.params).items():
            wanted[key] = kept * wanted[key] + (1 - kept) * np.float64(x)
    average = names(state.moments["average"])
    assert all(np.allclose(average[key], wanted[key], rtol=0, atol=1e-6) for key in wanted)
    assert not np.allclose(average["wte"], state.params["wte"], rtol=0, atol=1e-4)

    plain = start(rule, seed)  # the parameters themselves are trained as without an average
    plain, _ = train_jax.make_train_steps(rule, seed=seed, n_head=3)(plain, batches, n)
    matrices = [{"wte": params["wte"], "wpe": params["wpe"]} for params in (plain[0], state[0])]
    assert close(*matrices, tolerance=1e-3)  # the gradient of keys' biases is 0, or noise


def find(moments, *words):  # the one array whose name has all of the words
    [x] = [x for name, x in name_leaves(moments).items() if all(w in name for w in words)]
    return np.asarray(x)


@pytest.mark.parametrize("name", ["adamw", slow("muon")])
def test_gradients_are_clipped_and_adams_moments_decay_as_asked(rng, name):
    params = jax.tree.map(jnp.asarray, random_params(rng, HPARAMS))
    schedule = train_jax.make_schedule(6, 1e-3, 1e-5, 2)
    optimizer = train_jax.make_optimizer(schedule, name, 0.1, grad_clip=0.25, adam_b2=0.75)
    large = jax.tree.map(lambda x: 1e4 * jnp.asarray(rng.standard_normal(x.shape)), params)
    _, moments = jax.jit(optimizer.update)(large, optimizer.init(params), params)
    length = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(large)))
    clipped = np.asarray(large["wte"]) * 0.25 / length
    assert np.allclose(find(moments, ".mu", "wte"), 0.1 * clipped, rtol=1e-3, atol=1e-9)
    assert np.allclose(find(moments, ".nu", "wte"), 0.25 * clipped**2, rtol=1e-3, atol=1e-12)


def test_muon_steps_along_the_nearest_orthogonal_matrix(rng):
    """Of each layer's own matrix, with the size of a step of Adam's: 0.2 times the rate."""
    params = jax.tree.map(jnp.asarray, random_params(rng, HPARAMS))
    optimizer = make_optimizer("muon", lambda _: 0.5, weight_decay=0.0)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    for block, update in zip(gradients["blocks"], updates["blocks"], strict=True):
        for part, layer in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc")):
            g, w = np.asarray(block[part][layer]["w"]), np.asarray(update[part][layer]["w"])
            u, _, v = np.linalg.svd(g, full_matrices=False)
            cosine = -(w * (u @ v)).sum() / np.linalg.norm(w) / np.linalg.norm(u @ v)
            assert cosine > 0.95 and 0.07 < np.sqrt((w**2).mean()) < 0.13


def read_batches(text, seed, n_done, shape, n_ctx):
    one = make_sharding(make_mesh(1))
    return np.asarray(batches.read_batches(text, seed, n_done, shape, n_ctx, one))


def test_batches_are_sequences_of_the_text_from_anywhere_in_it(seed):
    text = [np.arange(7, dtype=np.uint16), np.arange(7, 20, dtype=np.uint16)]  # two shards
    batches = read_batches(text, seed, 0, (50, 2, 5), 16)
    assert batches.shape == (50, 2, 5, 17) and batches.dtype == np.int32
    assert (np.diff(batches) == 1).all()
    assert set(batches[..., 0].flat) == {0, 1, 2, 3}  # the last sequence ends with the last token


def test_a_steps_batch_depends_on_the_seed_and_the_step_only(seed):
    text = [np.arange(5000, dtype=np.uint16)]
    whole = read_batches(text, seed, 0, (8, 1, 3), 16)
    assert (read_batches(text, seed, 5, (3, 1, 3), 16) == whole[5:]).all()
    assert len(np.unique(whole[..., 0])) > 15
    assert (read_batches(text, seed + 1, 0, (8, 1, 3), 16) != whole).any()


def test_the_largest_seed_draws_too():
    assert read_batches([np.arange(99)], 2**32 - 1, 0, (1, 1, 2), 8).shape == (1, 1, 2, 9)


def test_places_beyond_31_bits_are_drawn(seed, monkeypatch):
    """9 * 10**9 ids, which no random number of 31 bits reaches by itself."""
    places = []
    monkeypatch.setattr(batches, "count_ids", lambda shards: 9 * 10**9)

    def read_sequences(shards, starts, n):
        places.extend(starts)
        return np.zeros((len(starts), n), np.int32)

    monkeypatch.setattr(batches, "read_sequences", read_sequences)
    read_batches([], seed, 0, (50, 1, 20), 64)
    assert 0 <= min(places) < 2 * 10**9 and 7 * 10**9 < max(places) < 9 * 10**9 - 64


def split_text(text, n_ctx):
    """As train_jax.main takes a text: training ids, and validation windows."""
    n_train = len(text) * 9 // 10
    return np.array(text[:n_train]), cut_windows([np.array(text[n_train:])], n_ctx)


def test_validation_predicts_each_token_once(monkeypatch):
    windows = cut_windows([np.arange(40), np.arange(40, 100)], n_ctx=16)
    assert list(windows[:, 1:].flat) == list(range(1, 1 + 6 * 16))
    assert (windows[:, :-1] + 1 == windows[:, 1:]).all()
    assert cut_windows([np.arange(17)], n_ctx=16).shape == (1, 17)
    monkeypatch.setattr(training.text, "MOST_VALIDATION", 32)  # of more, every third
    assert list(cut_windows([np.arange(100)], 16)[:, 0]) == [0, 48]


@pytest.mark.parametrize("batch_size", [3, 20, slow(1), slow(7)])
def test_validation_is_the_mean_over_all_windows(seed, batch_size):
    params = init_params(jax.random.key(seed), **SIZES)
    windows = np.asarray(jax.random.randint(jax.random.key(seed), (7, 17), 0, 257))
    wanted = jax.jit(train_jax.losses, static_argnums=2)(params, windows, 3).mean()
    filled, counts = fill_batches(windows, batch_size)
    assert filled.shape[1:] == (batch_size, 17) and counts.sum() == 7
    assert abs(train_jax.validation_loss(params, filled, counts, n_head=3) - wanted) < 1e-5


def make_optimizer(optimizer="muon", schedule=None, weight_decay=0.1):
    schedule = schedule or train_jax.make_schedule(6, 1e-3, 1e-5, 2)
    return train_jax.make_optimizer(schedule, optimizer, weight_decay, 1.0, 0.99)


def start(optimizer, seed, n_rows=257):
    params = init_params(jax.random.key(seed), **SIZES)
    return start_state(params, None, 0, optimizer, n_rows, make_mesh(1), False)[0]


def same_bits(a, b):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), a, b))


@pytest.mark.parametrize(
    "name, dropout, same",
    [
        ("adamw", 0.1, functools.partial(close, tolerance=1e-3)),  # XLA's flags of `make test`
        *(slow(*how, same_bits) for how in [("adamw", 0.1), ("muon", 0.1), ("muon", 0.0)]),
    ],
)
def test_many_steps_a_call_are_the_same_as_one_a_call(seed, name, dropout, same):
    batches = jax.random.randint(jax.random.key(seed), (8, 2, 4, 17), 0, 257)
    optimizer = make_optimizer(name)
    steps = train_jax.make_train_steps(optimizer, dropout, seed, n_head=3)

    together, (mean, *_) = steps(start(optimizer, seed), batches, 6)
    alone, losses = start(optimizer, seed), []
    for i in range(6):
        alone, (value, *_) = steps(alone, batches[i : i + 1], 1)
        losses.append(float(value))
    assert same(together, alone)
    assert np.isclose(mean, np.mean(losses), rtol=1e-6) and len(set(losses)) == 6
    assert {x.dtype.name for x in jax.tree.leaves(together)} == {"float32", "int32"}


def test_the_stats_are_means_over_the_steps(seed):
    """Beside their definitions, in NumPy, from the parameters before and after each step."""
    batches = jax.random.randint(jax.random.key(seed), (6, 2, 4, 17), 0, 257)
    optimizer = make_optimizer("adamw", optax.constant_schedule(1e-2))
    norms = []
    state = start(optimizer, seed)
    for batch in batches:
        mean = functools.partial(train_jax.mean_loss, tokens=batch.reshape(8, 17), n_head=3)
        norms.append(float(optax.tree.norm(jax.grad(mean)(state.params))))
        state, _ = train_jax.make_train_steps(optimizer, n_head=3)(state, batch[None], 1)
    clip = float(np.median(norms))

    steps = train_jax.make_train_steps(optimizer, n_head=3, grad_clip=clip)
    sizes, state = [], start(optimizer, seed)
    for i in range(6):
        before = np.concat([np.ravel(x) for x in jax.tree.leaves(state.params)])
        state, _ = steps(state, batches[i : i + 1], 1)
        after = np.concat([np.ravel(x) for x in jax.tree.leaves(state.params)])
        sizes.append(np.linalg.norm(after - before) / np.linalg.norm(before))
    _, stats = steps(start(optimizer, seed), batches, 6)
    assert np.isclose(stats.gradient_norm, np.mean(norms), rtol=1e-3)
    assert np.isclose(stats.update_size, np.mean(sizes), rtol=1e-3)
    assert np.isclose(stats.clipped, 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", slow("muon")])
def test_accumulated_batches_are_one_large_batch(seed, optimizer):
    batches = jax.random.randint(jax.random.key(seed), (3, 4, 2, 17), 0, 257)
    optimizer = make_optimizer(optimizer)
    steps = train_jax.make_train_steps(optimizer, n_head=3, n_vocab=257)
    (ours, _, _), (loss, *_) = steps(start(optimizer, seed), batches, 3)
    (whole, _, _), (wanted, *_) = steps(start(optimizer, seed), batches.reshape(3, 1, 8, 17), 3)
    assert abs(loss / wanted - 1) < 1e-5 and close(ours, whole, 1e-3)


@pytest.mark.slow
def test_accumulation_sums_in_float32(seed):
    """64 batches that are the same, in bfloat16: the mean gradient is that of one of them."""
    batch = jax.random.randint(jax.random.key(seed), (1, 1, 2, 17), 0, 257)
    optimizer = optax.sgd(1.0)
    how = {"dtype": "bfloat16", "n_head": 3}
    steps = train_jax.make_train_steps(optimizer, **how)
    (one, _, _), _ = steps(start(optimizer, seed), batch, 1)
    (many, _, _), _ = steps(start(optimizer, seed), jnp.repeat(batch, 64, axis=1), 1)
    before = start(optimizer, seed)[0]
    change = jax.tree.map(lambda a, b: a - b, one, before)
    assert close(jax.tree.map(lambda a, b: a - b, many, before), change, 1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", slow("muon")])
def test_a_padded_vocabulary_changes_nothing_and_stays_zero(seed, optimizer):
    batches = jax.random.randint(jax.random.key(seed), (3, 1, 8, 17), 0, 257)
    optimizer = make_optimizer(optimizer)
    steps = train_jax.make_train_steps(optimizer, n_head=3, n_vocab=257)
    (plain, _, _), (loss, *_) = steps(start(optimizer, seed), batches, 3)
    state, (padded_loss, *_) = steps(start(optimizer, seed, 384), batches, 3)
    assert state[0]["wte"].shape == (384, 24) and (state[0]["wte"][257:] == 0).all()
    cut_off, moments = resize_vocab(jax.tree.map(np.asarray, state[:2]), 257)
    assert abs(loss - padded_loss) < 1e-5 and close(cut_off, plain, 1e-3)
    shapes = moment_shapes(optimizer, plain)
    moments = name_leaves(moments)
    assert {name: (x.shape, x.dtype) for name, x in moments.items()} == shapes


BAD = {
    "heads": (["--n_embd", "100", "--n_head", "3"], "multiple of n_head"),
    "no steps": (["--n_steps", "0"], "n_steps must be from 1 to"),
    "drop": (["--dropout", "1"], "dropout must be"),
    "ema": (["--ema", "1"], "ema must be 0 or more, and less than 1"),
    "dtype": (["--dtype", "float16"], "dtype must be float32 or bfloat16"),
    "saved dtype": (["--saved_dtype", "bfloat16"], "saved_dtype must be float32 or float16"),
    "optimizer": (["--optimizer", "sgd"], "optimizer must be adamw or muon"),
    "lowest rate": (["--min_learning_rate", "-1"], "min_learning_rate must be 0 or more"),
    "beta": (["--adam_b2", "1"], "adam_b2 must be more than 0 and less than 1"),
    "recipe": (["--recipe", "gpt5"], "unknown recipe 'gpt5'; choose one of shakespeare-cpu, "),
    "half a model": (["--recipe", "finetune", "--n_layer", 1], "recipe finetune needs --init_from"),
    "huge": (["--n_accumulate", 10**10], "n_accumulate must be from 1 to"),
    "large": (["--n_embd", 2**21], "n_embd must be from 1 to 1048576, not 2097152"),
    "nowhere": (["--out", ""], "--out is empty"),
    "one of several": (["--process_id", 1], "--num_processes and --process_id go together"),
    "address": (
        ["--coordinator", "here", "--num_processes", 2, "--process_id", 0],
        "--coordinator: expected HOST:PORT, got 'here'",
    ),
    "number": (
        ["--coordinator", "here:1", "--num_processes", 2, "--process_id", 2],
        "--process_id: expected 0 to 1, got 2",
    ),
    "no model": (["--recipe", "finetune"], "recipe finetune needs --init_from"),
    "two tokenizers": (["--init_from", "x", "--tokenizer", "124M"], "leave out --tokenizer"),
    "no such model": (["--init_from", "9M"], "no model '9M'"),
    "seed": (["--seed", "-1"], "seed must be from 0"),
    "rate": (["--learning_rate", "nan"], "learning_rate must be more than 0"),
    "decay": (["--weight_decay", "-0.1"], "weight_decay must be 0 or more"),
    "out": (["--out", "/dev/null/model"], "cannot write /dev/null/model"),
    "no text": (["--data", "nowhere.txt"], "no text at nowhere.txt"),
    "no text for it": (["--init_from", "9M", "--data", "nowhere.txt"], "no text at nowhere.txt"),
    "a folder": (["--data", "."], ".: no token shards; expected"),
    "no tokenizer": (["--tokenizer", "9M"], "no model '9M'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_ends_in_one_line_before_any_training(tmp_path, case):
    args, words = BAD[case]
    data = [] if "--data" in args else ["--data", "python-docs"]
    to = [] if "--out" in args else ["--out", tmp_path / "out"]
    code, out, err = conftest.call_trainer(*args, *data, *to)
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_text_is_refused_before_its_download(tmp_path):
    code, out, err = conftest.call_trainer("--init_from", "124M", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and err.startswith("error: recipe finetune needs --data, a text")


@pytest.mark.parametrize("text", ["", "too short"])
def test_too_little_text_is_refused(tmp_path, text):
    (tmp_path / "text").write_text(text)
    code, out, err = conftest.call_trainer("--data", tmp_path / "text", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "too few" in err


@pytest.mark.slow
def test_ctrl_c_keeps_the_model(tmp_path):
    args = ["--data", "python-docs", "--out", tmp_path / "out", "--n_layer", 1, "--n_embd", 8]
    command = [sys.executable, str(REPO / "train_jax.py"), *map(str, [*args, "--eval_every", 20])]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
    assert "parameters" in process.stdout.readline()
    while "step 20:" not in (line := process.stdout.readline()):
        assert line, "the first validation was not printed"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out").config.n_embd == 8


class StandInTrainer:
    """steps(state, batches, n) is the function that it gets; the validation losses, too."""

    is_main = True

    def __init__(self, steps, validations=()):
        self.steps = steps
        self.validations = iter(validations)

    def read(self, n_done, n):
        return range(n)

    def agree(self, signals):
        return max(signals, default=0)

    def averaged(self, state):
        return state.params

    def validate(self, params):
        return next(self.validations)

    def measure_tasks(self, params):
        return {}

    def gather_params(self, params):
        return params

    def gather(self, state):
        return state

    generate = None


class StandInOutput:
    """Lists what it is told to save: best has parameters, saved has (state, best)."""

    def __init__(self):
        self.best, self.checkpoint, self.expected = np.inf, None, {}
        self.kept, self.saved, self.n_samples = [], [], 0

    def log(self, values):
        return {}

    def show(self, text):
        pass

    def show_sample(self, generate, params):
        self.n_samples += 1

    def steps_to_snapshot(self, n_done):
        return np.inf

    def save_snapshot(self, trainer, state, n_done):
        pass

    def save_best(self, params):
        self.kept.append(params)

    def save_checkpoint(self, state):
        self.saved.append((state, self.best))
        self.checkpoint = f"place {state.n_done}"


SMALL = {"n_accumulate": 1, "batch_size": 1, "n_ctx": 1}


def train_until(number, n_before):
    """take_steps() with stand-ins, and a signal after n_before steps: what it keeps and saves."""

    def steps(state, batches, n):
        if state.n_done + n == n_before:
            os.kill(os.getpid(), number)
        return State(state.params + n, None, state.n_done + n), progress.Stats(1.0, 0.0, 0.0, 0.0)

    trainer, output = StandInTrainer(steps), StandInOutput()
    if n_before == 0:
        trainer.read = lambda n_done, n: os.kill(os.getpid(), number)
    flags = {"n_steps": 10**6, "eval_every": 10**6, "checkpoint_every": 10**6} | SMALL
    stopped = take_steps(trainer, State(0, None, 0), flags, output, 1, 9)
    assert stopped == number
    return output.kept, [(state.params, best) for state, best in output.saved]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_first_evaluation_keeps_the_model_too(number):
    assert train_until(number, n_before=2) == ([2], [(2, np.inf)])


def test_a_stop_before_the_first_step_keeps_nothing():
    assert train_until(signal.SIGINT, n_before=0) == ([], [])


def test_a_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), note_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def drive(
    losses, validations=(), eval_every=10**6, checkpoint_every=10**6, stop_at=None, n_steps=40
):
    """take_steps() with stand-ins, 20 steps a call -> [is_best of each], [(step, best) saved]."""
    output, is_best = StandInOutput(), []

    def steps(state, batches, n):
        if stop_at is not None and state.n_done + n >= stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        stats = progress.Stats(losses(state.n_done + n), 0.0, 0.0, 0.0)
        return State(None, None, state.n_done + n), stats

    def show_sample(generate, params):  # it follows each validation, and what that saves
        is_best.append(len(output.kept) > sum(is_best))

    output.show_sample = show_sample
    flags = {"n_steps": n_steps, "eval_every": eval_every, "checkpoint_every": checkpoint_every}
    trainer, start = StandInTrainer(steps, validations), State(None, None, 0)
    take_steps(trainer, start, flags | SMALL, output, 20, 9.0)
    return is_best, [(state.n_done, best) for state, best in output.saved]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 9.0, 10.0])
def test_no_number_and_a_number_too_large_stop_the_run(bad):
    with pytest.raises(ValueError, match=r"at step 30; .* \(the last checkpoint is place 20\)"):
        drive(lambda n: bad if n > 20 else 8.9, [1.0] * 9, checkpoint_every=10, eval_every=20)


def test_the_best_is_kept_and_the_rest_is_shown():
    kept, saved = drive(lambda n: 1.0, [3.0, 2.0, 2.5, 2.2], eval_every=10, checkpoint_every=7)
    assert kept == [True, True, False, False]
    assert [step for step, _ in saved] == [7, 14, 21, 28, 35, 40]
    assert [best for _, best in saved] == [np.inf, 3, 2, 2, 2, 2]


def test_a_stop_after_an_evaluation_keeps_what_was_best():
    kept, saved = drive(lambda n: 1.0, [3.0], eval_every=25, stop_at=45, n_steps=100)
    assert kept == [True] and saved == [(45, 3.0)]


TINY_RUN = ["--data", "python-docs", "--n_layer", 1, "--n_embd", 8, "--n_ctx", 16, "--n_steps", 600]
TINY_RUN += ["--eval_every", 100, "--checkpoint_every", 40, "--dropout", 0.1, "--ema", 0.9]
TINY_RUN += ["--snapshots", 12]


begin = functools.partial(runs.begin, "train_jax.py")


def ends(out):
    """All bytes that a run leaves, but for the folder's name and the run's number in run.json."""
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    lines = files.pop(Path("metrics.jsonl")).splitlines()
    del files[Path("loss.png")]
    losses = [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]
    assert losses == sorted(losses, key=lambda pair: pair[0])
    for name in files:
        if name.name == "run.json":
            saved = json.loads(files[name].replace(os.fsencode(out.name), b"OUT"))
            assert saved.pop("run") == json.loads(lines[0])["run"]
            files[name] = saved
    return files


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "never_stopped"
    code, printed, err = run(*TINY_RUN, "--out", out)
    assert (code, err) == (0, "")
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tenth of it in this process, where it is its last files that count."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    short = ["--n_steps", 60, "--eval_every", 60, "--checkpoint_every", 60]
    code, printed, err = conftest.call_trainer(*TINY_RUN, *short, "--out", out)
    assert (code, err) == (0, "") and "step 60:" in printed
    return out


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_goes_on_to_the_same_bits(never_stopped, sign):
    out = never_stopped.parent / sign
    runs.stop_and_go_on("train_jax.py", TINY_RUN, out, sign, step=120, n_steps=600)
    assert ends(out) == ends(never_stopped)


@pytest.mark.parametrize("steps", [[240], [40, 240, 480]])
@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bits(never_stopped, steps):
    out, rng = never_stopped.parent / f"killed{len(steps)}", np.random.default_rng()
    process = begin(*TINY_RUN, "--out", out)
    for step in steps:
        runs.wait_for_step(out, step, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        places = sorted((out / "checkpoints").glob("0*"))
        assert 1 <= len(places) <= 3
        load_encoder_hparams_and_params(str(places[-1]), ".")
        process = begin("--resume", out)
    assert process.wait(120) == 0, process.stderr.read()
    assert ends(out) == ends(never_stopped)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["00000560", "00000600"]


def test_jax_arrays_save(rng, tmp_path):
    params = random_params(rng, TINY)
    arrays = jax.tree.map(jnp.asarray, params)
    arrays["wpe"] = arrays["wpe"].astype(jnp.bfloat16)
    utils.save_model(tmp_path, Encoder([]), TINY, arrays)
    _, _, loaded = load_encoder_hparams_and_params(str(tmp_path), ".")
    params["wpe"] = np.asarray(arrays["wpe"]).astype(np.float32)
    assert_same(loaded, params, TINY)


def test_a_checkpoint_opens_in_transformers(finished):
    place = finished / "checkpoints" / "00000060"
    assert GPT2LMHeadModel.from_pretrained(place).config.n_embd == 8


def test_what_cannot_be_resumed_is_said_in_one_line(finished, tmp_path):
    def refused(*args):
        code, out, err = conftest.call_trainer(*args)
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    assert "nothing to resume: no checkpoint in" in refused("--resume", tmp_path)
    assert "leave out --seed" in refused("--resume", finished, "--seed", 9, "--n_steps", 900)
    assert "60 steps are done already" in refused("--resume", finished, "--n_steps", 60)
    assert "leave out --overwrite" in refused("--resume", finished, "--overwrite")
    assert "--resume is empty" in refused("--resume", "")
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    place = out / "checkpoints" / "00000060"
    (tmp_path / "text").write_text("another text " * 999)
    plan = json.loads((place / "run.json").read_text())
    plan["flags"]["data"] = str(tmp_path / "text")
    (place / "run.json").write_text(json.dumps(plan))
    assert "is not the text that" in refused("--resume", out)
    (tmp_path / "text").write_text("".join(topics[name] + "\n" for name in sorted(topics))[:-1])
    assert conftest.call_trainer("--resume", out)[0] == 0  # the same text from another place
    changed = (tmp_path / "text").read_text().replace("a", "b", 1)  # of the same length
    (tmp_path / "text").write_text(changed)
    assert "is not the text that" in refused("--resume", out)
    shutil.copy(finished / "checkpoints" / "00000060" / "run.json", place)
    data = (place / "optimizer.safetensors").read_bytes()
    (place / "optimizer.safetensors").write_bytes(data[:-9])
    assert "optimizer.safetensors is incomplete or damaged" in refused("--resume", out)
    (place / "run.json").write_text("{")
    assert "run.json: not JSON" in refused("--resume", out)


@pytest.mark.slow
def test_a_finished_run_says_so_and_can_be_extended(never_stopped, tmp_path):
    """--resume takes a name in models_dir, too, as --init_from does."""
    shutil.copytree(never_stopped, tmp_path / "longer")
    code, out, err = run("--resume", "longer", models_dir=tmp_path)
    assert (code, err) == (0, "") and "step 600:" not in out
    last = "all 600 steps were done already; a larger --n_steps continues the run\n"
    last += "the best model is in "
    assert out.endswith(f"{last}{tmp_path}/longer\n")
    code, out, err = run("--resume", "longer", "--n_steps", 700, models_dir=tmp_path)
    assert (code, err) == (0, "") and "step 700:" in out
    recipe = training.flags.choose({"data": "x", "n_steps": 700}, "cpu")
    sizes = ("n_steps", "learning_rate", "min_learning_rate", "n_warmup")
    schedule = train_jax.make_schedule(*(recipe[name] for name in sizes))
    now = float(schedule(600))  # on the cosine of 700 steps
    lowest = recipe["min_learning_rate"]
    rates = f"{now:.2g} now and {lowest:.2g} at the end"
    assert f"after step 600 of 700: the learning rate is {rates}" in out
    lines = progress.read_log(tmp_path / "longer" / "metrics.jsonl")
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert max(rates) == 700 and rates[600] == pytest.approx(lowest, rel=0.01)
    assert rates[620] > 1.2 * lowest
    place, saved = checkpoints.find_checkpoint(tmp_path / "longer")
    assert place.endswith("00000700") and saved["flags"]["n_steps"] == 700


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_training_replaces_nothing_without_being_told_so(finished, tmp_path):
    """Not a run, not a model without one, not a stranger's folder, not the shipped model."""
    code, out, err = conftest.call_trainer(*TINY_RUN, "--n_steps", 20, "--out", finished)
    assert (code, out) == (2, "") and err == (
        f"error: {finished} holds a model, which training would replace: "
        f"--resume {finished} continues its run, "
        "--out names another folder, --overwrite replaces it\n"
    )
    (tmp_path / "foreign" / "checkpoints" / "00000007").mkdir(parents=True)
    (tmp_path / "foreign" / "checkpoints" / "00000007" / "a").write_text("precious")
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "loss.png").write_text("precious")
    for folder in (REPO / "models" / "shakespeare", tmp_path / "foreign", tmp_path / "paper"):
        before = snapshot(folder)
        with pytest.raises(ValueError, match=r"^[^\n]*holds .*--out names another[^\n]*$"):
            checkpoints.check_out(str(folder))
        assert snapshot(folder) == before
        assert checkpoints.check_out(str(folder), overwrite=True) is None
    left = tmp_path / "left"  # of a run that was stopped before it kept anything
    (left / "checkpoints").mkdir(parents=True)
    (left / ".saving-abc").mkdir()
    (left / "metrics.jsonl").write_text('{"step": 0, "run": 7}\n')
    for folder in (left, tmp_path / "new"):
        assert checkpoints.check_out(str(folder)) is None


@pytest.mark.slow
def test_a_run_does_not_resume_another_ones_checkpoints(never_stopped, tmp_path):
    """A new run over a finished one, killed before its first checkpoint; then a whole one."""
    out = tmp_path / "out"
    shutil.copytree(never_stopped, out)
    before = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["run"]
    process = begin(*TINY_RUN, "--out", out, "--overwrite")
    while json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["run"] == before:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    if not (out / "checkpoints" / "00000040").exists():  # it was not too fast for us
        code, printed, err = run("--resume", out)
        assert (code, printed) == (2, "") and err.count("\n") == 1
        assert "its run was stopped before its first checkpoint, and those in" in err
    code, _, err = run(*TINY_RUN, "--n_steps", 20, "--out", out, "--overwrite")
    assert (code, err) == (0, "")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["00000020"]
    assert checkpoints.find_checkpoint(out)[1]["step"] == 20


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(run="1"),
        lambda plan: plan.pop("step"),
        lambda plan: plan.update(step="40"),
        lambda plan: plan.pop("text"),
        lambda plan: plan.pop("flags"),
        lambda plan: plan["flags"].update(n_steps="90"),
        lambda plan: plan["flags"].update(optimizer="sgd"),
        lambda plan: plan["flags"].update(recipe="old"),
        lambda plan: plan["flags"].pop("n_embd"),
        lambda plan: plan["flags"].pop("saved_dtype"),
        lambda plan: plan["flags"].update(recipe=["shakespeare"]),
        lambda plan: plan["flags"].update(n_layer=True),
        lambda plan: plan["flags"].update(n_ctx=10**400),
        lambda plan: plan["flags"].update(learning_rate=float("nan")),
        lambda plan: plan["flags"].update(grad_clip=float("inf")),
        lambda plan: plan["flags"].update(data=["a"]),
        lambda plan: plan["flags"].update(fsdp=1),
        lambda plan: plan["flags"].update(schedule="a value for make_optimizer"),
        lambda plan: plan["flags"].update(coordinator="evil.example:1"),
        lambda plan: plan["flags"].update(resume="/"),
        lambda plan: plan.update(step=-1),
        lambda plan: plan.update(step=True),
        lambda plan: plan.update(step=61),
        lambda plan: plan.update(step=10**400),
        lambda plan: plan.update(best="1.5"),
        lambda plan: plan.update(flags=[1]),
        lambda plan: plan.update(text=None),
    ],
)
def test_a_damaged_run_json_is_refused(finished, change):
    place, plan = checkpoints.find_checkpoint(finished)
    assert training.flags.check_saved(plan, place) == plan["flags"]
    change(plan)
    with pytest.raises(ValueError, match=r"run.json: damaged, or written by another program"):
        training.flags.check_saved(plan, place)


def test_a_run_json_without_the_runs_number_is_damaged_not_an_earlier_runs(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    checkpoint = checkpoints.find_checkpoint(out)
    earlier = Path(checkpoint.folder).with_name("00000030")
    shutil.copytree(checkpoint.folder, earlier)
    del checkpoint.metadata["run"]
    Path(checkpoint.folder, "run.json").write_text(json.dumps(checkpoint.metadata))
    problem = rf"run.json: damaged, .*: delete .*60, and --resume continues from {earlier}"
    with pytest.raises(ValueError, match=problem):
        checkpoints.find_checkpoint(out)


@pytest.mark.parametrize("name", ["dropout", "ema", "fsdp", "n_accumulate"])
def test_a_run_json_without_a_flag_that_has_a_default_gets_it(finished, name):
    place, plan = checkpoints.find_checkpoint(finished)
    default = {"dropout": 0.0, "ema": 0.0, "fsdp": False, "n_accumulate": 1}[name]
    wanted = plan["flags"] | {name: default}
    del plan["flags"][name]
    assert training.flags.check_saved(plan, place) == wanted


def test_a_run_is_resumed_by_a_trainer_that_has_a_newer_flag(finished, monkeypatch):
    """The row of the table is all it takes, if the flag has a default or need not be there."""
    place, plan = checkpoints.find_checkpoint(finished)
    flag = training.flags.Flag("z_loss", float, training.flags.RECIPE, "its weight.", default=0.5)
    monkeypatch.setattr(training.flags, "FLAGS", [*training.flags.FLAGS, flag])
    assert training.flags.check_saved(plan, place) == plan["flags"] | {"z_loss": 0.5}
    assert training.flags.choose({"data": "x"}, "cpu")["z_loss"] == 0.5
    assert training.flags.choose({"data": "x", "z_loss": 0.25}, "cpu")["z_loss"] == 0.25
    plan["flags"]["z_loss"] = 1
    with pytest.raises(ValueError, match=r"run.json: damaged, or written by another program"):
        training.flags.check_saved(plan, place)


@pytest.mark.parametrize(
    "call",
    [
        lambda: train_jax.main(resum="mine"),
        lambda: train_jax.make_schedule(9, 1e-3, 1e-4, 2, n_warm=3),
        lambda: make_optimizer(weight_dekay=0.1),
        lambda: train_jax.make_optimizer(None, "adamw", 0.1, 1.0, 0.9, adam_b1=0.8),
        lambda: train_jax.losses({}, jnp.zeros((1, 9), int), 2, n_chunk=2),
        lambda: train_jax.validation_loss({"blocks": []}, jnp.zeros((1, 1, 9)), 1, n_haed=2),
    ],
)
def test_a_misspelt_name_fails(call):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        call()


def test_an_optimizer_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; choose adamw or muon"):
        make_optimizer("sgd")
    for name in training.flags.OPTIMIZERS:
        assert callable(make_optimizer(name).update)


def test_dropout_that_would_be_rounded_to_nothing_is_rejected():
    for dropout in (0.0, 0.002, 0.9):
        typed = {"recipe": "shakespeare-cpu", "dropout": dropout}
        assert training.flags.choose(typed, "cpu")["dropout"] == dropout
    with pytest.raises(ValueError, match="dropout is rounded to 256ths, and 0.001 would be 0"):
        training.flags.choose({"recipe": "shakespeare-cpu", "dropout": 0.001}, "cpu")


def test_a_run_with_a_retired_flag_is_resumed_only_if_the_flag_did_nothing(finished):
    place, plan = checkpoints.find_checkpoint(finished)
    wanted = dict(plan["flags"])
    plan["flags"]["drop_rate"] = 0.0
    assert training.flags.check_saved(plan, place) == wanted
    plan["flags"]["drop_rate"] = 0.1
    with pytest.raises(ValueError, match="trained with --drop_rate, which this version doesn't"):
        training.flags.check_saved(plan, place)


def test_the_model_that_a_run_starts_from_does_not_stay_in_memory(models, tmp_path, monkeypatch):
    n_left = runs.count_arrays_left(monkeypatch, train_jax.JaxTrainer)
    flags = ["--init_from", models[0] / "tiny", "--data", REPO / "gpt2.py", "--n_ctx", 16]
    flags += ["--n_steps", 3, "--eval_every", 1, "--out", tmp_path / "out"]
    code, _, err = conftest.call_trainer(*flags)
    assert (code, err) == (0, "")
    assert len(n_left) == 4 and n_left[2:] == [0, 0]  # the first step may use NumPy's memory


def test_only_the_flag_resume_says_where_to_write(finished, tmp_path, monkeypatch):
    """run.json has an `out`, too: that of the first run, on another machine perhaps."""
    place, plan = checkpoints.find_checkpoint(finished)
    plan["flags"]["out"] = str(tmp_path / "elsewhere")
    checkpoint = checkpoints.Checkpoint(place, plan)
    monkeypatch.setattr(training.run, "find_checkpoint", lambda out: checkpoint)
    monkeypatch.setattr(train_jax, "start_jax", lambda *_: None)
    runs = []

    def begin(trainer, flags):
        runs.append(flags["out"])
        raise InterruptedError

    monkeypatch.setattr(train_jax.JaxTrainer, "__init__", begin)
    with pytest.raises(InterruptedError):
        train_jax.main(resume="here")
    assert runs == ["here"]


@pytest.mark.parametrize("change", [{"n_head": 8}, {"n_layer": 2}, {"n_embd": 16}, {"n_ctx": 17}])
def test_a_run_json_of_another_model_is_refused(finished, tmp_path, change):
    out = shutil.copytree(finished, tmp_path / "out")
    place, plan = checkpoints.find_checkpoint(out)
    plan["flags"] |= change
    Path(place, "run.json").write_text(json.dumps(plan))
    code, printed, err = conftest.call_trainer("--resume", out)
    assert (code, printed) == (2, "") and err.count("\n") == 1
    assert "the sizes in run.json are not the model's" in err


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F4", "C64", "BOOL", "I64", "F64"])
def test_moments_of_another_kind_are_refused(models, tmp_path, dtype):
    """Of some, NumPy has no type: not a reason for a traceback."""
    place = shutil.copytree(models[0] / "tiny", tmp_path / "00000005")
    shapes = {"a": ((8,), np.dtype("float32"))}
    n_bytes = {"F4": 4, "F8_E4M3": 8, "BOOL": 8, "F64": 64, "C64": 64, "I64": 64}.get(dtype, 16)
    header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, n_bytes]}})
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(n_bytes)
    (place / "optimizer.safetensors").write_bytes(data)
    # Older versions of safetensors do not know all of these.
    wanted = "optimizer.safetensors: (is of another optimizer|.*unknown variant)"
    with pytest.raises(ValueError, match=wanted) as caught:
        checkpoints.load_checkpoint(str(place), lambda params: shapes)
    assert "\n" not in str(caught.value)
    os.unlink(place / "optimizer.safetensors")
    os.mkfifo(place / "optimizer.safetensors")
    with pytest.raises(ValueError, match="optimizer.safetensors: not an ordinary file"):
        checkpoints.load_checkpoint(str(place), lambda params: shapes)


def test_names_that_only_look_like_checkpoints(tmp_path):
    """int() does not take every digit, and a folder of photographs may be called 2024."""
    names = ["²", "2024", "0000001", "00000010x", "-0000010", "٠٠٠٠٠٠١٠"]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        checkpoints.find_checkpoint(tmp_path)
    params = init_params(jax.random.key(0), **SIZES)
    model = utils.Model(Encoder([]), {**SIZES, "n_head": 3}, None)
    checkpoints.save_checkpoint(tmp_path, model, State(params, {}, 5), {})
    assert set(os.listdir(tmp_path / "checkpoints")) == {*names, "00000005"}


def test_moments_are_those_of_the_optimizer_in_its_order(finished, tmp_path):
    place = tmp_path / "00000060"
    shutil.copytree(finished / "checkpoints" / place.name, place)
    moments = safetensors.numpy.load_file(place / "optimizer.safetensors")
    shapes = {name: (x.shape, x.dtype) for name, x in reversed(moments.items())}
    *_, loaded = checkpoints.load_checkpoint(str(place), lambda params: shapes)
    assert list(loaded) == list(shapes) != list(moments)
    assert all((loaded[name] == moments[name]).all() for name in moments)
    other = train_jax.make_optimizer(lambda _: 1.0, "adamw", 0.1, 1.0, 0.9)
    with pytest.raises(ValueError, match="of another optimizer"):
        checkpoints.load_checkpoint(str(place), lambda p: moment_shapes(other, p))


def test_only_checkpoints_are_put_away(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "mine").mkdir(parents=True)
    (folder / "notes.txt").write_text("x")
    (folder / ".saving-abc").mkdir()
    params = init_params(jax.random.key(0), **SIZES)
    model = utils.Model(Encoder([]), {**SIZES, "n_head": 3}, None)
    checkpoints.save_checkpoint(tmp_path, model, State(params, {}, 5), {})
    assert sorted(os.listdir(folder)) == ["00000005", "mine", "notes.txt"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoints").write_text("x")
    with pytest.raises(ValueError, match="is not a folder we may write to"):
        checkpoints.check_out(tmp_path / "b")


def test_the_lowest_rate_follows_the_highest():
    flags = training.flags.choose({"recipe": "shakespeare-cpu", "learning_rate": 1e-6}, "cpu")
    assert np.isclose(flags["min_learning_rate"], 1e-7)  # a tenth, as in the recipe
    with pytest.raises(ValueError, match="must not be more than learning_rate"):
        typed = {"learning_rate": 1e-3, "min_learning_rate": 2e-3}
        training.flags.choose({"recipe": "shakespeare-cpu"} | typed, "cpu")


def test_a_new_run_puts_an_older_ones_checkpoints_away(tmp_path):
    params = init_params(jax.random.key(0), **SIZES)
    old = tmp_path / "checkpoints" / "00000900"
    old.mkdir(parents=True)
    model, place = utils.Model(Encoder([]), {**SIZES, "n_head": 3}, None), None
    for step, names in ((7, ["00000007"]), (9, ["00000007", "00000009"])):
        state = State(params, {"x": np.ones(3)}, step)
        place = checkpoints.save_checkpoint(tmp_path, model, state, {}, place)
        assert sorted(os.listdir(tmp_path / "checkpoints")) == names
        assert checkpoints.find_checkpoint(tmp_path) == (place, {"step": step})


@pytest.mark.slow  # backprop.py, whose loop is the same one, has its own
def test_a_loss_that_explodes_ends_the_run_and_names_the_last_checkpoint(tmp_path):
    flags = ["--learning_rate", 1e9, "--n_warmup", 10**9, "--n_steps", 10**6, "--grad_clip", 1e30]
    flags += ["--optimizer", "adamw", "--checkpoint_every", 1, "--eval_every", 10**6]
    run_flags = [*TINY_RUN[:8], *flags, "--out", tmp_path / "out"]
    code, out, err = conftest.call_trainer(*run_flags)
    words = r"error: training diverged: the loss is (\S+) at step (\d+); lower --learning_rate "
    found = re.fullmatch(words + r"\(the last checkpoint is (\S+)\)\n", err)
    assert code == 2 and found, err
    step = int(found[2])
    assert not float(found[1]) < 2 * np.log(257) and step > 1
    assert found[3] == str(tmp_path / "out" / "checkpoints" / f"{step - 1:08d}")
    load_encoder_hparams_and_params(found[3], ".")
    code, out, err = conftest.call_trainer("--resume", tmp_path / "out")
    assert code == 2 and f" at step {step}; " in err and err.endswith(f" is {found[3]})\n")


@pytest.mark.slow
def test_finetuning_on_an_unfamiliar_text_is_no_explosion(models, tmp_path):
    text = "".join(chr(c) for c in np.random.default_rng(0).integers(0x4E00, 0x9FFF, 5000))
    (tmp_path / "text").write_text(text)
    folder, params = models
    loud = jax.tree.map(np.copy, params) | {"wte": params["wte"] * 8}  # sure of everything
    utils.save_model(tmp_path / "loud", Encoder([]), TINY, loud)
    flags = ["--data", tmp_path / "text", "--n_steps", 4, "--eval_every", 2, "--n_ctx", 16]
    code, out, err = conftest.call_trainer(
        "--init_from", tmp_path / "loud", *flags, "--out", tmp_path / "out"
    )
    assert (code, err) == (0, "")
    assert float(re.search(r"step 0: validation (\S+)", out)[1]) > 2 * np.log(257)
    _, first = progress.read_log(tmp_path / "out" / "metrics.jsonl")[:2]
    assert first["step"] == 0 and first["validation"] > 2 * np.log(257)


def test_finetuning_starts_at_the_models_own_loss(models, tmp_path):
    """And with its tokenizer and sizes; n_ctx may be less than the model's 48."""
    folder, params = models
    text = (REPO / "gpt2.py").read_text().replace("<|endoftext|>", "")  # it is one document
    (tmp_path / "text").write_text(text)
    flags = ["--data", tmp_path / "text", "--out", tmp_path / "out", "--n_ctx", 32, "--n_steps", 4]
    code, out, err = conftest.call_trainer(
        "--init_from", folder / "tiny", *flags, "--eval_every", 2
    )
    assert (code, err) == (0, "")
    _, windows = split_text(Encoder([]).encode(text), 32)
    windows = torch.from_numpy(windows).long()
    logits = hugging_face(params, TINY)(windows[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    losses = [float(x) for x in re.findall(r"validation (\d\S+)", out)]
    assert abs(losses[0] - theirs.item()) < 2e-4 and losses[-1] < losses[0]
    _, hparams, tuned = load_encoder_hparams_and_params(str(tmp_path / "out"), ".")
    assert hparams == TINY
    assert (tuned["wpe"][32:] == params["wpe"][32:]).all()  # positions that no text reached
    assert (tuned["wpe"][:32] != params["wpe"][:32]).any()

    def refused(*args):
        model = ["--init_from", folder / "tiny", "--data", tmp_path / "text"]
        code, out, err = conftest.call_trainer(*model, *args)
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    assert "n_layer is 2 in that model, so leave out --n_layer" in refused("--n_layer", 3)
    assert "n_ctx is at most 48 in that model" in refused("--n_ctx", 49)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--init_from", "tiny"], ["--tokenizer", "tiny", "--n_layer", 1, "--n_embd", 8]]
)
def test_models_are_looked_for_in_models_dir_and_not_at_all_by_a_resumed_run(
    models, tmp_path, flags
):
    (tmp_path / "text").write_text("some words " * 999)
    flags = [*flags, "--data", tmp_path / "text", "--n_ctx", 16, "--n_steps", 2]
    code, _, err = conftest.call_trainer(*flags, "--out", tmp_path / "out", models_dir=models[0])
    assert (code, err) == (0, "")
    _, plan = checkpoints.find_checkpoint(tmp_path / "out")
    assert plan["flags"][flags[0][2:]] == "tiny" and "models_dir" not in plan["flags"]
    code, _, err = conftest.call_trainer("--resume", tmp_path / "out")
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_the_shipped_model_has_the_validation_loss_that_its_readme_states():
    if not SHAKESPEARE.is_file():
        pytest.skip(f"tiny Shakespeare is not at {SHAKESPEARE} (set SIXTYGPT_DATA)")
    folder = REPO / "models" / "shakespeare"
    stated = float(re.search(r"\*\*([\d.]+)\*\* nats", (folder / "README.md").read_text())[1])
    encoder, hparams, params = load_encoder_hparams_and_params(str(folder), "models")
    _, windows = split_text(encoder.encode(SHAKESPEARE.read_text()), hparams["n_ctx"])
    filled = fill_batches(windows, 16)
    validation = train_jax.validation_loss(params, *filled, n_head=hparams["n_head"])
    assert abs(validation - stated) < 1e-3 and stated < 1.4697  # nanoGPT's
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_768_064
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6


def bigram_loss(train, validation):
    """Nats per token when only the one before is known: counts of pairs, each counted once more."""
    pairs, firsts = Counter(zip(train[:-1], train[1:], strict=True)), Counter(train[:-1])
    n_seen = len(set(train))
    p = [
        (pairs[pair] + 1) / (firsts[pair[0]] + n_seen)
        for pair in zip(validation[:-1], validation[1:], strict=True)
    ]
    return -np.mean(np.log(p))


@pytest.mark.slow
def test_a_run_on_python_docs_learns_more_than_pairs_and_opens_in_transformers(tmp_path):
    code, out, err = run("--data", "python-docs", "--out", tmp_path / "docs", "--n_steps", 400)
    assert (code, err) == (0, "")
    validation = float(re.findall(r"validation (\S+)", out)[-1])

    ids = Encoder([]).encode("".join(load_text("python-docs")))
    train, windows = split_text(ids, n_ctx=64)
    assert validation < bigram_loss(train.tolist(), ids[len(train) :]) - 0.1

    model = GPT2LMHeadModel.from_pretrained(tmp_path / "docs")
    windows = torch.from_numpy(windows).long()
    with torch.inference_mode():
        logits = model(windows[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert abs(theirs - validation) < 1e-3

    command = [
        sys.executable,
        str(REPO / "gpt2.py"),
        "The ",
        "--model_size",
        str(tmp_path / "docs"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 41)
