"""backprop.py against jax.grad, PyTorch, and slopes measured in float64."""

import math
import re
import textwrap

import numpy as np
import pytest
from conftest import forks, hugging_face, on_linux, random_params, tree_map

import backprop
import gpt2
from engine import processes, threads
from model_files import weights
from model_files.weights import leaves
from training.text import draw_sequences

SHAPES = {  # n_batch, n_seq, n_vocab, n_ctx, n_embd, n_head, n_layer
    "odd sizes": (3, 7, 13, 11, 15, 3, 2),
    "one head": (2, 9, 31, 9, 10, 1, 2),
    "one layer": (4, 5, 20, 8, 12, 2, 1),
    "a batch of one": (1, 17, 257, 20, 24, 4, 2),
    "one token": (2, 1, 9, 4, 6, 2, 1),
    "a number a head": (2, 6, 9, 6, 5, 5, 1),
    "attention in two blocks": (3, 67, 40, 80, 12, 2, 2),
    "attention in three blocks": (1, 131, 40, 131, 8, 2, 1),
}


def make(rng, shape):  # -> parameters, tokens, n_head
    n_batch, n_seq, *sizes = shape
    names = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
    hparams = dict(zip(names, sizes, strict=True))
    tokens = rng.integers(0, hparams["n_vocab"], (n_batch, n_seq + 1))
    return random_params(rng, hparams), tokens, hparams


def random_shape(rng):
    n_head, n_seq = int(rng.integers(1, 6)), int(rng.integers(1, 140))
    n_embd = n_head * int(rng.integers(-(-8 // n_head), 12))
    n_ctx = n_seq + int(rng.integers(0, 5))
    sizes = int(rng.integers(2, 300)), n_ctx, n_embd, n_head, int(rng.integers(1, 4))
    return int(rng.integers(1, 6)), n_seq, *sizes


def assert_close(ours, theirs, tolerance=1e-4):
    """The distance of each array, as a share of its length (of the longest one's, for noise)."""
    ours, theirs = leaves(ours), leaves(theirs)
    floor = 1e-3 * max(np.linalg.norm(x) for x in theirs.values())
    for name, x in theirs.items():
        distance = np.linalg.norm(ours[name] - x) / max(np.linalg.norm(x), floor)
        assert ours[name].shape == x.shape and distance <= tolerance, (name, distance)


def jax_gradients(params, tokens, n_head):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    train_jax = pytest.importorskip("train_jax", reason="optax is not installed")
    function = jax.value_and_grad(lambda p: train_jax.losses(p, tokens, n_head).mean())
    with jax.default_matmul_precision("float32"):
        value, gradients = jax.jit(function)(params)
    return float(value), tree_map(np.asarray, gradients)


def torch_gradients(params, tokens, hparams):
    model = hugging_face(params, hparams)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    ids = torch.from_numpy(tokens)
    logits = model(ids[:, :-1]).logits.flatten(0, 1)
    value = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    value.backward()
    found = {name: weights.hugging_face_name(name) for name in leaves(params)}
    found = {n: model.transformer.get_parameter(key).grad.numpy() for n, key in found.items()}
    return value.item(), weights.nest(found)


def assert_right(wanted, params, tokens, n_head):
    loss, ours = backprop.loss_and_gradients(params, tokens, n_head)
    assert type(loss) is float and abs(loss / wanted[0] - 1) < 1e-4
    assert {x.dtype for x in leaves(ours).values()} == {np.dtype("float32")}
    assert_close(ours, wanted[1])


@pytest.mark.parametrize("name", ["odd sizes", "attention in two blocks"])
def test_gradients_are_those_of_jax(rng, name):
    params, tokens, hparams = make(rng, SHAPES[name])
    wanted = jax_gradients(params, tokens, hparams["n_head"])
    assert_right(wanted, params, tokens, hparams["n_head"])


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_pytorch(rng, name):
    params, tokens, hparams = make(rng, SHAPES[name])
    wanted = torch_gradients(params, tokens, hparams)
    assert_right(wanted, params, tokens, hparams["n_head"])


@pytest.mark.parametrize("_", range(20))
def test_gradients_are_those_of_pytorch_for_any_shape(rng, _):
    shape = random_shape(rng)
    print("shape", shape)
    params, tokens, hparams = make(rng, shape)
    wanted = torch_gradients(params, tokens, hparams)
    assert_right(wanted, params, tokens, hparams["n_head"])


# --- Slopes, measured in float64 ------------------------------------------------------------------


def slopes(f, x, step=1e-5):  # f() -> a number that depends on the float64 array x -> x's shape
    """(f(x + step) - f(x - step)) / (2 step) for each number of x, which is put back."""
    found = np.empty_like(x)
    for i in np.ndindex(x.shape):
        before, values = x[i], []
        for x[i] in (before + step, before - step):
            values.append(f())
        x[i], found[i] = before, (values[0] - values[1]) / (2 * step)
    return found


def agree(ours, measured):
    assert ours.shape == measured.shape and ours.dtype == np.float64
    assert np.allclose(ours, measured, rtol=1e-6, atol=1e-8 + 1e-6 * np.abs(measured).max())


def test_every_parameters_slope_is_its_gradient(rng):
    params, tokens, hparams = make(rng, (3, 4, 7, 5, 6, 2, 2))
    params = tree_map(lambda x: x.astype(np.float64), params)
    rows, columns = np.indices(tokens[:, 1:].shape)

    def loss():
        logits = gpt2.gpt2(tokens[:, :-1], **params, n_head=2)
        right = logits[rows, columns, tokens[:, 1:]]
        return (np.log(np.exp(logits).sum(-1)) - right).mean()

    value, ours = backprop.loss_and_gradients(params, tokens, 2)
    assert math.isclose(value, loss(), rel_tol=1e-12)
    for name, x in leaves(params).items():
        agree(weights.leaf(ours, name), slopes(loss, x))


def check(rng, f, arrays, backward):
    """backward(dy) -> what f's sum, weighed by dy, changes by when each of the arrays does."""
    y = f()
    dy = rng.standard_normal(y.shape)
    kept = dy.copy()
    found = backward(dy)
    assert (dy == kept).all()  # the caller's gradient is not used as scratch
    for x, gradient in zip(arrays, found, strict=True):
        agree(gradient, slopes(lambda: (f() * dy).sum(), x))


def flat(gradients):  # (dx, a tree of dicts) -> dx, then the leaves in the tree's order
    dx, tree = gradients
    found = [dx]
    tree_map(found.append, tree)
    return found


def affine(rng, n_in, n_out):
    return {"w": rng.standard_normal((n_in, n_out)), "b": rng.standard_normal(n_out)}


def norm(rng, n):
    return {"g": rng.standard_normal(n), "b": rng.standard_normal(n)}


def test_gelus_gradient(rng):
    x = np.concatenate([rng.standard_normal(40) * 3, [0.0, 1e-30, -1e-30, 9, -9, 40, -40]])
    check(rng, lambda: gpt2.gelu(x), [x], lambda dy: [backprop.gelu_backward(dy, x, gpt2.gelu(x))])
    x = x.astype(np.float32)
    found = backprop.gelu_backward(np.ones_like(x), x, gpt2.gelu(x))
    assert found.dtype == np.float32 and found[40] == 0.5 and found[-2] == 1 and found[-1] == 0


def test_softmaxs_gradient(rng):
    x = rng.standard_normal((3, 2, 5))
    check(
        rng,
        lambda: gpt2.softmax(x),
        [x],
        lambda dy: [backprop.softmax_backward(dy, gpt2.softmax(x))],
    )


def test_layer_norms_gradient(rng):
    x, p = rng.standard_normal((4, 7)), norm(rng, 7)
    check(
        rng,
        lambda: gpt2.layer_norm(x, **p),
        [x, p["g"], p["b"]],
        lambda dy: flat(backprop.layer_norm_backward(dy, x, **p)),
    )


def test_linears_gradient(rng):
    x, p = rng.standard_normal((4, 3)), affine(rng, 3, 5)
    check(
        rng,
        lambda: gpt2.linear(x, **p),
        [x, p["w"], p["b"]],
        lambda dy: flat(backprop.linear_backward(dy, x, **p)),
    )


def test_ffns_gradient(rng):
    x, p = rng.standard_normal((4, 3)), {"c_fc": affine(rng, 3, 8), "c_proj": affine(rng, 8, 3)}
    y, backward = backprop.ffn_forward(x, **p)
    assert (y == gpt2.ffn(x, **p)).all()
    check(rng, lambda: gpt2.ffn(x, **p), flat((x, p)), lambda dy: flat(backward(dy)))


@pytest.mark.parametrize("n_seq, d_head", [(5, 3), (1, 2), (66, 1)])
def test_attentions_gradient(rng, n_seq, d_head):
    q, k, v = rng.standard_normal((3, 2, n_seq, d_head))
    y, backward = backprop.attention_in_blocks_forward(q, k, v)
    assert np.allclose(y, gpt2.attention(q, k, v))
    check(rng, lambda: gpt2.attention(q, k, v), [q, k, v], backward)


def block(rng, n):
    attn = {"c_attn": affine(rng, n, 3 * n), "c_proj": affine(rng, n, n)}
    mlp = {"c_fc": affine(rng, n, 4 * n), "c_proj": affine(rng, 4 * n, n)}
    return {"mlp": mlp, "attn": attn, "ln_1": norm(rng, n), "ln_2": norm(rng, n)}


def test_the_gradient_of_multi_head_attention(rng):
    """For sequences one after the other, which gpt2.mha takes as a batch."""
    x, p = rng.standard_normal((6, 4)), block(rng, 4)["attn"]

    def run():
        return gpt2.mha(x.reshape(2, 3, 4), **p, n_head=2).reshape(6, 4)

    y, backward = backprop.mha_forward(x, **p, n_head=2, n_seq=3)
    assert np.allclose(y, run())
    check(rng, run, flat((x, p)), lambda dy: flat(backward(dy)))


def test_the_gradient_of_a_block(rng):
    x, p = rng.standard_normal((6, 4)), block(rng, 4)

    def run():
        return gpt2.transformer_block(x.reshape(2, 3, 4), **p, n_head=2).reshape(6, 4)

    y, backward = backprop.transformer_block_forward(x, **p, n_head=2, n_seq=3)
    assert np.allclose(y, run())
    check(rng, run, flat((x, p)), lambda dy: flat(backward(dy)))


def test_cross_entropys_gradient(rng):
    logits, targets = 3 * rng.standard_normal((5, 7)), rng.integers(0, 7, 5)

    def nats():
        return -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[range(5), targets]

    ours, gradient = backprop.cross_entropy(logits, targets)
    assert np.allclose(ours, nats())
    agree(gradient, slopes(lambda: nats().sum(), logits))


def test_what_is_thought_impossible_costs_as_much_as_it_is_far_off():
    logits = np.array([[0, 500, -3000]], np.float32)  # whose probability is 0 in float32
    nats, gradient = backprop.cross_entropy(logits, np.array([2]))
    assert nats == [3500] and (gradient == [[0, 1, -1]]).all()


# --- The whole ------------------------------------------------------------------------------------


def test_the_forward_pass_is_gpt2s(rng):
    params, tokens, hparams = make(rng, SHAPES["attention in two blocks"])
    logits, _ = backprop.gpt2_forward(tokens[:, 1:], **params, n_head=2)
    wanted = gpt2.gpt2(tokens[:, 1:], **params, n_head=2).reshape(logits.shape)
    assert logits.dtype == np.float32 and np.allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize("n_seq", [6, 70])
def test_nothing_is_sent_to_positions_that_come_later(rng, n_seq):
    """Of what one position's output asks for, the later ones and other sequences get nothing."""
    params, tokens, hparams = make(rng, (2, n_seq, 9, n_seq, 6, 2, 2))
    t = int(rng.integers(0, n_seq - 1))
    logits, backward = backprop.gpt2_forward(tokens[:, :-1], **params, n_head=2)
    d = np.zeros_like(logits)
    d[t] = rng.standard_normal(9)
    found = backward(d)["wpe"]
    assert (found[t + 1 :] == 0).all() and (found[: t + 1] != 0).any(-1).all()
    dy = np.zeros((2 * n_seq, 6))
    dy[t] = rng.standard_normal(6)
    x = rng.standard_normal(dy.shape)
    _, backward = backprop.transformer_block_forward(
        x, **params["blocks"][0], n_head=2, n_seq=n_seq
    )
    dx, _ = backward(dy)
    assert (dx[t + 1 :] == 0).all() and (dx[: t + 1] != 0).any(-1).all()


def test_ids_that_come_again_add_up(rng):
    ids, dx = rng.integers(0, 5, 40), rng.standard_normal((40, 3))
    wanted = np.zeros((5, 3))
    np.add.at(wanted, ids, dx)
    found, sums = backprop.sum_by_id(ids, dx)
    assert list(found) == sorted(set(ids.tolist())) and np.allclose(sums, wanted[found])


def test_positions_and_ids_that_no_text_has_get_nothing(rng):
    params, tokens, _ = make(rng, (2, 5, 20, 9, 6, 2, 1))
    _, gradients = backprop.loss_and_gradients(params, tokens % 10, 2)
    assert (gradients["wpe"][5:] == 0).all() and (gradients["wpe"][:5] != 0).any(-1).all()
    assert (gradients["wte"] != 0).any(-1).all()  # rows that are no input are wrong answers


def test_neither_parameters_nor_tokens_are_changed_and_bits_come_again(rng):
    params, tokens, hparams = make(rng, (5, 33, 50, 40, 32, 4, 2))
    before, kept = tree_map(np.copy, params), tokens.copy()
    tree_map(lambda x: x.setflags(write=False), params)
    loss, first = backprop.loss_and_gradients(params, tokens, 4)
    for _ in range(3):
        again, second = backprop.loss_and_gradients(params, tokens, 4)
        assert again == loss
        for name, x in leaves(first).items():
            assert (x == weights.leaf(second, name)).all()
    assert (tokens == kept).all()
    assert all((x == weights.leaf(before, n)).all() for n, x in leaves(params).items())


def test_how_the_batch_is_cut_does_not_matter(rng):
    params, tokens, _ = make(rng, (5, 9, 50, 10, 8, 2, 2))
    loss, whole = backprop.loss_and_gradients(params, tokens, 2)
    parts = [backprop.loss_and_gradients(params, row[None], 2) for row in tokens]
    assert math.isclose(np.mean([value for value, _ in parts]), loss, rel_tol=1e-5)
    mean = tree_map(lambda *x: x, parts[0][1])
    mean = {n: np.mean([weights.leaf(g, n) for _, g in parts], 0) for n in leaves(whole)}
    assert_close(whole, weights.nest(mean))


# --- Training -------------------------------------------------------------------------------------

SCHEDULE = {"n_steps": 200, "learning_rate": 3e-3, "min_learning_rate": 3e-4, "n_warmup": 20}
ADAMW = SCHEDULE | {"grad_clip": 1.0, "weight_decay": 0.1, "adam_b2": 0.99, "ema": 0.0}


def update(params, gradients, moments, n_done):
    """train_step, with these gradients."""

    def evaluate(tokens, n_tokens):
        return 0.0, leaves(gradients)

    backprop.train_step(leaves(params), moments, n_done, np.zeros((1, 1, 2)), ADAMW, evaluate)


def zeros(params):
    return {
        f"{kind}.{name}": np.zeros_like(x) for kind in "mv" for name, x in leaves(params).items()
    }


@pytest.mark.parametrize("n_steps, n_warmup", [(200, 20), (10, 100), (7, 3), (1, 100), (2, 1)])
def test_the_learning_rate_is_train_jaxs(n_steps, n_warmup):
    train_jax = pytest.importorskip("train_jax", reason="jax or optax is not installed")
    flags = SCHEDULE | {"n_steps": n_steps, "n_warmup": n_warmup}
    schedule = train_jax.make_schedule(**flags)
    for n_done in range(n_steps + 3):
        ours = backprop.learning_rate(n_done, **flags)
        assert math.isclose(ours, float(schedule(n_done)), rel_tol=1e-5), n_done


def test_200_steps_have_the_losses_of_train_jaxs_adamw(rng):
    """The same beginning and the same batches. The longer half of the gradients is clipped."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    train_jax = pytest.importorskip("train_jax", reason="optax is not installed")
    hparams = {"n_vocab": 60, "n_ctx": 12, "n_embd": 24, "n_head": 3, "n_layer": 2}
    flags = hparams | {"seed": int(rng.integers(2**31))}
    _, params = backprop.NumpyTrainer(flags).new_model(hparams["n_vocab"])
    text = np.cumsum(rng.integers(0, 3, 4000)) % 60  # each id follows from the one before, almost
    starts = rng.integers(0, len(text) - 13, (200, 1, 8))
    batches = text[starts[..., None] + np.arange(13)].astype(np.int32)

    schedule = train_jax.make_schedule(**SCHEDULE)
    optimizer = train_jax.make_optimizer(schedule, "adamw", 0.1, 1.0, 0.99)
    steps = train_jax.make_train_steps(optimizer, n_head=3)
    theirs = jax.tree.map(jax.numpy.array, params)
    state = theirs, optimizer.init(theirs), 0
    moments, gaps, losses, clipped = zeros(params), [], [], 0
    for n_done in range(200):
        state, (wanted, *_) = steps(state, batches[n_done : n_done + 1], 1)
        loss, gradients = backprop.loss_and_gradients(params, batches[n_done, 0], 3)
        clipped += math.hypot(*(np.linalg.norm(x) for x in leaves(gradients).values())) > 1
        update(params, gradients, moments, n_done)
        losses.append(loss)
        gaps.append(abs(loss - float(wanted)))
    print("losses", losses[0], losses[-1], "largest gap", max(gaps), "clipped", clipped)
    assert max(gaps) < 1e-3 and losses[-1] < losses[0] - 2
    assert 0 < clipped < 200  # both ways were gone


def test_adamw_is_pytorchs(rng):
    """Matrices decay, the others do not; leaves of more than one piece; the moments are float32."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    params, _, hparams = make(rng, (1, 1, 2801, 9, 48, 3, 1))
    twins = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in leaves(params).items()}
    groups = [
        {"params": [x for x in twins.values() if x.ndim == 2], "weight_decay": 0.1},
        {"params": [x for x in twins.values() if x.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer, moments = torch.optim.AdamW(groups, 1.0, betas=(0.9, 0.99)), zeros(params)
    for n_done in range(5):
        gradients = random_params(rng, hparams)
        gradients["ln_f"]["b"] *= 1e-5  # so small that 1e-8 beside the root counts
        for name, x in leaves(gradients).items():
            twins[name].grad = torch.tensor(x)
        torch.nn.utils.clip_grad_norm_(twins.values(), ADAMW["grad_clip"], error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = backprop.learning_rate(n_done, **SCHEDULE)
        optimizer.step()
        update(params, gradients, moments, n_done)
    assert {x.dtype for x in [*leaves(params).values(), *moments.values()]} == {np.dtype("float32")}
    for name, x in leaves(params).items():
        assert np.allclose(x, twins[name].detach().numpy(), rtol=1e-5, atol=1e-6), name


def test_a_parameter_in_any_memory_order_is_updated(rng):
    """A view of it as one row of numbers would be a copy, whose update is lost."""
    params, _, hparams = make(rng, (1, 1, 300, 9, 48, 3, 1))
    gradients = random_params(rng, hparams)
    for x in leaves(gradients).values():
        x *= 1e-4  # too small to be clipped: the norm's sum has another order
    ours = {name: np.array(x, order="F") for name, x in leaves(params).items()}
    wanted = {name: x.copy() for name, x in leaves(params).items()}
    for arrays in (ours, wanted):
        update(weights.nest(arrays), gradients, zeros(params), 0)
    assert not ours["wte"].flags.c_contiguous
    for name, x in wanted.items():
        assert (ours[name] == x).all() and (x != leaves(params)[name]).any(), name


def test_accumulated_batches_are_one_large_batch(rng):
    params, _, hparams = make(rng, (1, 1, 30, 9, 8, 2, 1))
    batches, flags = rng.integers(0, 30, (3, 2, 10)), ADAMW | {"n_head": 2}
    ours, whole = zeros(params), zeros(params)
    wanted, _ = backprop.loss_and_gradients(params, batches.reshape(6, 10), 2)

    def step(params, moments, batches):
        def evaluate(tokens, n_tokens):
            loss, gradients = backprop.loss_and_gradients(params, tokens, 2, n_tokens)
            return loss, leaves(gradients)

        return backprop.train_step(leaves(params), moments, 0, batches, flags, evaluate).loss

    a = step(tree_map(np.copy, params), ours, batches)
    b = step(params, whole, batches.reshape(1, 6, 10))
    assert math.isclose(a, b, rel_tol=1e-5) and math.isclose(a, wanted, rel_tol=1e-5)
    first = {name.removeprefix("m."): x for name, x in whole.items() if name.startswith("m.")}
    assert_close(weights.nest({name: ours["m." + name] for name in first}), weights.nest(first))


def test_the_average_is_that_of_the_parameters_after_each_step(rng):
    """Beside the definition, in float64. Its beginning is the parameters before the first step."""
    params, _, _ = make(rng, (1, 1, 30, 9, 24, 3, 2))
    flags = ADAMW | {"ema": 0.7, "learning_rate": 0.1}
    moments = zeros(params) | {f"a.{name}": x.copy() for name, x in leaves(params).items()}
    wanted = {name: np.float64(x) for name, x in leaves(params).items()}
    for n_done in range(12):

        def evaluate(tokens, n_tokens):
            loss, gradients = backprop.loss_and_gradients(params, tokens, 3, n_tokens)
            return loss, leaves(gradients)

        batch = rng.integers(0, 30, (1, 4, 10))
        backprop.train_step(leaves(params), moments, n_done, batch, flags, evaluate)
        kept = min(0.7, (2 + n_done) / (11 + n_done))
        for name, x in leaves(params).items():
            wanted[name] = kept * wanted[name] + (1 - kept) * x
    for name, x in wanted.items():
        assert np.allclose(moments[f"a.{name}"], x, rtol=0, atol=1e-5), name
    assert abs(moments["a.wte"] - params["wte"]).max() > 0.01


def test_the_stats_of_a_step_are_those_of_their_definitions(rng):
    """Large arrays are updated in pieces, by threads; the stats are those of all of them."""
    params, _, hparams = make(rng, (1, 1, 2801, 9, 48, 3, 1))
    for norm, grad_clip, clipped in ((3.0, 4.0, 0.0), (3.0, 2.0, 1.0)):
        gradients = random_params(rng, hparams)
        scale = norm / np.linalg.norm([np.linalg.norm(x) for x in leaves(gradients).values()])
        gradients = {name: x * np.float32(scale) for name, x in leaves(gradients).items()}
        before = np.concat([x.ravel() for x in leaves(params).values()]).astype("f8")

        def evaluate(tokens, n_tokens, gradients=gradients):
            return 2.5, gradients

        flags = ADAMW | {"grad_clip": grad_clip}
        batches = np.zeros((1, 1, 2))
        stats = backprop.train_step(leaves(params), zeros(params), 7, batches, flags, evaluate)
        after = np.concat([x.ravel() for x in leaves(params).values()])
        wanted = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert (stats.loss, stats.clipped) == (2.5, clipped)
        assert math.isclose(stats.gradient_norm, norm, rel_tol=1e-5)
        assert math.isclose(stats.update_size, wanted, rel_tol=1e-4)


def example(part):  # -> the code that the docstring of a function or module ends with
    return textwrap.dedent(re.search(r"\n\n( +(?:for|with) .*)", part.__doc__, re.DOTALL)[1])


@forks
@pytest.mark.parametrize("part", [backprop, backprop.start_sharing])
def test_the_loops_in_the_docstrings_have_the_bits_of_train_step(rng, part):
    """A rate that stays the same, no clipping, no decay. The second loop changes copies."""
    start, _, hparams = make(rng, (1, 1, 30, 9, 24, 3, 2))
    batches = rng.integers(0, 30, (5, 12, 10))
    flags = ADAMW | {"n_head": 3, "batch_size": 12, "grad_clip": 1e9, "weight_decay": 0.0}
    flags |= {"learning_rate": 1e-3, "min_learning_rate": 1e-3, "n_warmup": 1}
    losses, wanted, _ = some_steps(start, flags, batches[:, None])

    params, moments = tree_map(np.copy, start), zeros(start)
    m, v = ({name: moments[f"{kind}.{name}"] for name in leaves(params)} for kind in "mv")
    names = vars(backprop) | {"params": params, "batches": batches, "n_head": 3, "batch_size": 12}
    names |= {"m": m, "v": v, "moments": moments}
    exec(example(part), names)
    assert names["loss"] == losses[-1]
    if part is backprop:
        found = leaves(params) | moments
    else:
        found = {name: x for arrays in names["shared"].by_name for name, x in arrays.items()}
    assert found.keys() == wanted.keys()
    assert all((x == wanted[name]).all() for name, x in found.items())


def some_steps(start, flags, batches):
    """-> the losses, the parameters and the moments by name, how many arrays train_step got."""
    with backprop.start_sharing(start, zeros(start), 3, flags["batch_size"]) as shared:
        arrays = shared.params, shared.moments
        losses = [
            backprop.train_step(*arrays, n_done, batch, flags, shared.evaluate).loss
            for n_done, batch in enumerate(batches)
        ]
        params, moments = shared.by_name
    assert list(moments) == list(zeros(start)) and len(set(losses)) == len(losses)
    assert (params["wte"] != start["wte"]).any()  # a copy was trained
    return losses, params | moments, len(shared.params)


def alone(n_rows, n_bytes):
    return 1


@on_linux
@forks
@pytest.mark.parametrize("n_batch, n_threads", [(12, 2), (7, 3), (2, 4)])
def test_processes_have_the_bits_of_threads(rng, monkeypatch, n_batch, n_threads):
    """Some steps, of two batches each: the loss, the parameters, the moments."""
    monkeypatch.setattr(threads, "n_threads", lambda: n_threads)
    threads.start_workers.cache_clear()
    start, _, hparams = make(rng, (1, 1, 30, 9, 24, 3, 2))
    flags = ADAMW | {"n_head": 3, "batch_size": n_batch}
    batches = rng.integers(0, 30, (4, 2, n_batch, 10))
    assert processes.count(n_batch, 1) == min(n_batch, n_threads)
    ours, arrays, _ = some_steps(start, flags, batches)
    monkeypatch.setattr(processes, "count", alone)
    theirs, others, _ = some_steps(start, flags, batches)
    assert ours == theirs and all((x == others[name]).all() for name, x in arrays.items())
    threads.start_workers.cache_clear()


def turned_round(node):
    if isinstance(node, dict):
        return {name: turned_round(child) for name, child in reversed(node.items())}
    return [turned_round(child) for child in node] if isinstance(node, list) else node


def test_arrays_that_stand_joined_are_trained_like_those_of_large_models(rng, monkeypatch):
    """To the bit, where nothing is clipped: the norm's sum has another order.

    A checkpoint may name its arrays in another order than the gradient does.
    """
    monkeypatch.setattr(processes, "count", alone)
    start, _, hparams = make(rng, (1, 1, 30, 9, 24, 3, 2))
    flags = ADAMW | {"n_head": 3, "batch_size": 4, "grad_clip": 1e9}
    batches = rng.integers(0, 30, (4, 2, 4, 10))
    ours, arrays, n_joined = some_steps(turned_round(start), flags, batches)
    monkeypatch.setattr(processes, "LARGEST", 0)
    theirs, others, n_apart = some_steps(start, flags, batches)
    assert (n_joined, n_apart) == (2, len(leaves(start)))
    assert ours == theirs and all((x == others[name]).all() for name, x in arrays.items())


def test_the_beginning_has_gpt2s_deviations(rng):
    flags = {"n_ctx": 64, "n_embd": 128, "n_head": 4, "n_layer": 8, "seed": int(rng.integers(99))}
    hparams, params = backprop.NumpyTrainer(flags).new_model(257)
    for name, x in leaves(params).items():
        assert x.dtype == np.float32
        if x.ndim == 1:
            assert (x == name.endswith(".g")).all()
        else:
            wanted = 0.02 / 4 if name.endswith("c_proj.w") else 0.02  # sqrt(2 * 8 layers) is 4
            assert abs(x.std() / wanted - 1) < 0.05 and abs(x.mean()) < 0.002, name
    tokens = rng.integers(0, 257, (4, 65))
    assert abs(backprop.loss_and_gradients(params, tokens, 4)[0] - math.log(257)) < 0.1


def test_batches_are_sequences_from_anywhere_that_the_seed_and_the_step_decide(rng):
    text, seed = [np.arange(7, dtype=np.uint16), np.arange(7, 20, dtype=np.uint16)], 5
    found = np.array([draw_sequences(text, seed, step, (2, 5, 17)) for step in range(50)])
    assert found.shape == (50, 2, 5, 17) and (np.diff(found) == 1).all()
    assert set(found[..., 0].flat) == {0, 1, 2, 3}  # the last sequence ends with the last token
    assert (draw_sequences(text, seed, 7, (2, 5, 17)) == found[7]).all()
    assert (draw_sequences(text, seed + 1, 7, (2, 5, 17)) != found[7]).any()
