"""How many tokens a second does the trainer learn from, beside PyTorch?

usage: python benchmarks/train_step.py [RECIPE [BATCHxTOKENS]]

The model and the batch of a recipe (shakespeare-cpu by default), random tokens: train_jax.py's
own steps with each optimizer, and transformers' GPT-2 with fused AdamW, eager and compiled; on a
CPU also backprop.py's, in NumPy alone, and the loop of its docstring. `gpt2-124M 4x64` is llm.c's
example for CPUs, and runs with AdamW, uncompiled. All but that loop clip the gradients. On a GPU
PyTorch's products are bfloat16 by autocast, ours by the recipe. With the floor: the products of
one step, by the formula of progress.py, at the speed of one large product in the same moment.
"""

import contextlib
import sys

import jax
import numpy as np
import torch
from common import alternate, hugging_face, machine, print_table

import backprop
import train_jax
from model_files import weights
from training import devices, progress
from training.flags import choose
from training.state import count_rows, start_state

N_STEPS = 20  # a measurement; with a batch of one's own, 1


def ours(flags, params, tokens, optimizer):  # -> a function that trains N_STEPS steps
    flags = flags | {"optimizer": optimizer}
    mesh = devices.make_mesh(flags["batch_size"])
    rule = train_jax.JaxTrainer(flags).optimizer
    n_vocab = len(params["wte"])
    n_rows = count_rows(n_vocab)
    state, shardings = start_state(params, None, 0, rule, n_rows, mesh, flags["fsdp"])
    how = train_jax.loss_options(flags, n_vocab, flags["batch_size"] // mesh.size)
    steps = train_jax.make_train_steps(rule, flags["dropout"], 0, shardings=shardings, **how)
    batches = devices.put(tokens, devices.make_sharding(mesh, None, None, "data"))

    def train():
        nonlocal state
        state, (loss, *_) = steps(state, batches, len(tokens))
        return float(loss)

    return train


def by_hand(flags, params, tokens, stack):
    arrays = weights.leaves(params)
    moments = {f"{kind}.{name}": np.zeros_like(x) for kind in "mv" for name, x in arrays.items()}
    n_head, batch_size = flags["n_head"], flags["batch_size"]
    context = backprop.start_sharing(params, moments, n_head, batch_size)
    shared = stack.enter_context(context)
    n_done = 0

    def train():
        nonlocal n_done
        total = 0.0
        for batches in tokens:
            arrays = shared.params, shared.moments
            total += backprop.train_step(*arrays, n_done, batches, flags, shared.evaluate).loss
            n_done += 1
        return total / len(tokens)

    return train


def in_a_plain_loop(flags, params, tokens):
    """The loop of backprop.py's docstring: without processes, joined arrays, clipping and decay."""
    arrays = {name: x.copy() for name, x in weights.leaves(params).items()}
    params = weights.nest(arrays)
    m = {name: np.zeros_like(x) for name, x in arrays.items()}
    v = {name: np.zeros_like(x) for name, x in arrays.items()}
    n_done = 0

    def train():
        nonlocal n_done
        total = 0.0
        for batches in tokens:
            batch = batches.reshape(-1, batches.shape[-1])
            loss, gradients = backprop.loss_and_gradients(params, batch, flags["n_head"])
            gradients = weights.leaves(gradients)
            for name, p in arrays.items():
                backprop.adamw(p, gradients[name], m[name], v[name], n_done, rate=1e-3)
            total += loss
            n_done += 1
        return total / len(tokens)

    return train


def theirs(flags, params, tokens, compiled):
    """The same with PyTorch: one step after the other, as nanoGPT does it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {name: flags[name] for name in ("n_ctx", "n_embd", "n_head", "n_layer")}
    model = hugging_face(params, sizes | {"n_vocab": len(params["wte"])}).train().to(device)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), flags["learning_rate"], fused=True)
    tokens = torch.from_numpy(tokens).long().to(device)
    narrow = contextlib.nullcontext()
    if device == "cuda":
        narrow = torch.autocast(device, torch.bfloat16)

    def train():
        total = 0.0
        for micro_batches in tokens:
            for batch in micro_batches:
                with narrow:
                    logits = run(batch[:, :-1]).logits.flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())
                (loss / len(micro_batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), flags["grad_clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        return total / len(tokens)

    return train


def main(stack):
    recipe = sys.argv[1] if len(sys.argv) > 1 else "shakespeare-cpu"
    flags = choose({"recipe": recipe, "data": "", "ema": 0.0}, "cpu")  # PyTorch's has no average
    n_steps, small = N_STEPS, sys.argv[2:]
    if small:
        batch_size, n_ctx = map(int, small[0].split("x"))
        flags |= {"n_accumulate": 1, "batch_size": batch_size, "n_ctx": n_ctx}
        n_steps = 1
    n_vocab = 257 if "shakespeare" in recipe else 50257
    sizes = {name: flags[name] for name in ("n_ctx", "n_embd", "n_layer", "n_head")}
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in weights.tensor_shapes(sizes | {"n_vocab": n_vocab}):
        arrays[name] = np.full(shape, name.endswith(".g"), np.float32)
        if len(shape) == 2:
            arrays[name] = rng.normal(0, 0.02, shape).astype(np.float32)
    params = weights.nest(arrays)
    shape = n_steps, flags["n_accumulate"], flags["batch_size"], flags["n_ctx"] + 1
    tokens = rng.integers(0, n_vocab, shape, dtype=np.int32)

    numpy_s = by_hand(flags, params, tokens, stack)  # it forks, which must be before JAX starts
    devices.start_jax(None, None, None)
    flags["dtype"] = choose({"recipe": recipe, "data": ""}, jax.default_backend())["dtype"]
    sides = {"ours_AdamW": ours(flags, params, tokens, "adamw")}
    if jax.default_backend() == "cpu":
        sides["NumPy_AdamW"] = numpy_s
        sides["NumPy_plain_loop"] = in_a_plain_loop(flags, params, tokens)
    sides["PyTorch_eager"] = theirs(flags, params, tokens, compiled=False)
    if not small:
        sides["ours_Muon"] = ours(flags, params, tokens, "muon")
        sides["PyTorch_compiled"] = theirs(flags, params, tokens, compiled=True)
    first = {name: side() for name, side in sides.items()}
    assert all(abs(loss - np.log(n_vocab)) < 0.5 for loss in first.values()), first
    seconds = {name: value / n_steps for name, value in alternate(7, **sides).items()}
    n_tokens = int(np.prod(shape[1:3])) * flags["n_ctx"]
    all_devices = devices.make_mesh(flags["batch_size"]).devices.ravel()
    peak, source = devices.peak_flops(all_devices, flags["dtype"])
    floor = progress.flops_per_token(flags | {"n_vocab": n_vocab}, flags["n_ctx"]) * n_tokens / peak
    print(f"{machine()}, JAX {jax.__version__}, PyTorch {torch.__version__}")
    print_table(f"{recipe}: a step of {n_tokens} tokens", seconds, "ours_AdamW")
    print(f"floor at {peak / 1e12:.3g} TFLOP/s ({source}): {floor * 1e3:.1f} ms")
    for name, value in seconds.items():
        print(f"{name.replace('_', ' '):34}{n_tokens / value:9.0f} tokens/s")


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        main(stack)
