"""What only a GPU can show: its kernels, its 16-bit numbers, several of them. `pytest -m gpu`"""

import functools
import json
import os
import shutil

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

import gpt2
import kv_cache
import kv_cache_jax
import train_jax
from training import devices, scoring
from training.attention import fused_attention
from training.devices import make_mesh
from training.state import init_params, start_state

pytestmark = pytest.mark.gpu
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the trainer of a test needs room, too
HPARAMS = {"n_vocab": 1000, "n_ctx": 256, "n_embd": 256, "n_head": 4, "n_layer": 4}
SIZES = {name: HPARAMS[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_layer")}


@pytest.fixture(autouse=True)
def on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU here")


def distance(ours, theirs):  # as a share of theirs' length
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("n_seq", [128, 1000, 1024])
def test_cudnns_attention_is_attention_and_so_is_its_gradient(rng, n_seq):
    """bfloat16 has 8 bits: numbers that are rounded once are within 1/256 of each other."""
    shape = 2, 12, n_seq, 64
    q, k, v, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(4))

    def weighed(attend, dtype):
        def loss(q, k, v):
            out = attend(*(x.astype(dtype) for x in (q, k, v)))
            return (out.astype(jnp.float32) * w.astype(jnp.float32)).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    with jax.default_matmul_precision("float32"):
        (_, wanted), slopes = weighed(gpt2.attention, jnp.float32)(q, k, v)
    fused = weighed(fused_attention, jnp.bfloat16)
    (_, out), ours = fused(q, k, v)
    assert out.dtype == jnp.bfloat16 and distance(out, wanted) < 1e-2
    assert all(distance(a, b) < 2e-2 for a, b in zip(ours, slopes, strict=True))
    platform = jax.devices()[0].client.platform_version
    if "cuda" in platform and float(jax.devices()[0].compute_capability) >= 8:
        assert "cudnn" in fused.lower(q, k, v).compile().as_text()


def train(seed, dtype, n_devices, fsdp=False, n_steps=30):  # -> the loss of every step, and wte
    """Steps on a text that can be learned: each token is the one before it plus 1, or plus 2."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 3, (n_steps, 1, 16, HPARAMS["n_ctx"] + 1)).cumsum(-1) % 1000
    mesh = jax.make_mesh(
        (n_devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:n_devices]
    )
    schedule = train_jax.make_schedule(n_steps, 3e-3, 3e-4, 5)
    rule = train_jax.make_optimizer(schedule, "adamw", 0.1, 1.0, 0.95)
    params = init_params(jax.random.key(seed), **SIZES)
    state, shardings = start_state(params, None, 0, rule, 1024, mesh, fsdp)
    flags = {"n_ctx": HPARAMS["n_ctx"], "n_head": HPARAMS["n_head"], "dtype": dtype, "data": ""}
    how = train_jax.loss_options(flags, HPARAMS["n_vocab"], 16 // n_devices)
    with jax.default_matmul_precision("float32" if dtype == "float32" else None):
        steps = train_jax.make_train_steps(rule, 0.0, seed, shardings=shardings, **how)
        losses = []
        for batch in tokens.astype(np.int32):
            batch = devices.put(batch[None], devices.make_sharding(mesh, None, None, "data"))
            state, (loss, *_) = steps(state, batch, 1)
            losses.append(float(loss))
    return np.array(losses), devices.to_host(state[0])["wte"]


def test_bfloat16_steps_are_float32_steps(rng):
    seed = int(rng.integers(2**31))
    exact, ours = (train(seed, dtype, 1)[0] for dtype in ("float32", "bfloat16"))
    assert np.allclose(ours, exact, rtol=0.03) and (ours != exact).any()
    assert exact[-1] < exact[0] - 1


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_gpus_compute_what_one_does(rng, dtype, fsdp):
    n = max(n for n in (1, 2, 4, 8, 16) if n <= len(jax.devices()))
    if n == 1:
        pytest.skip("there is one GPU only")
    seed = int(rng.integers(2**31))
    one, n_ones = train(seed, dtype, 1)[0], train(seed, dtype, n, fsdp)[0]
    assert np.allclose(n_ones, one, rtol=1e-4 if dtype == "float32" else 0.03)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    """Sums on a GPU come in any order, so that losses are alike, not the same."""
    flags = ["--data", "python-docs", "--recipe", "shakespeare", "--n_steps", 80]
    flags += ["--eval_every", 40, "--checkpoint_every", 40, "--dropout", 0.1]
    run = functools.partial(conftest.run, "train_jax.py", timeout=600)
    code, _, err = run(*flags, "--out", tmp_path / "whole")
    assert (code, err) == (0, "")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "00000080")
    code, _, err = run("--resume", tmp_path / "half")
    assert (code, err) == (0, "")
    ends = []
    for name in ("whole", "half"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        ends.append([line["validation"] for line in lines if "validation" in line])
    assert len(ends[0]) == len(ends[1]) == 2 and np.allclose(*ends, rtol=0.01)


def test_greedy_text_is_numpys(rng):
    params = random_params(rng, HPARAMS)
    prompts = [rng.integers(0, 1000, n).tolist() for n in (3, 60, 17)]
    ours = kv_cache_jax.generate(prompts, params, 4, 40)
    for prompt, mine, other in zip(
        prompts, ours, kv_cache.generate(prompts, params, 4, 40), strict=True
    ):
        if mine != other:  # where they part, two tokens must be equally likely
            n = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
            logits = gpt2.gpt2(prompt + mine[:n], **params, n_head=4)[-1]
            assert abs(logits[mine[n]] - logits[other[n]]) < 1e-3


def test_scores_are_numpys(rng):
    params = random_params(rng, HPARAMS)
    ids = rng.integers(0, 1000, 200)
    with jax.default_matmul_precision("float32"):
        scorer = scoring.make_scorer(make_mesh(len(jax.devices())), 4, 256, 1000)
        [(ours, _)] = scorer(jax.tree.map(jnp.asarray, params), [(ids, 199)])
    logits = gpt2.gpt2(ids[:-1], **params, n_head=4).astype(np.float64)
    wanted = logits[np.arange(199), ids[1:]] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-3)
    assert abs(ours.mean() - wanted.mean()) < 1e-4
