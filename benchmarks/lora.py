"""What do adapters save? Memory and time of a training step, beside finetuning all parameters.

usage: python benchmarks/lora.py [SHAPE ...]

GPT-2's shapes (124M and 355M by default) with random weights, float32, AdamW, one sequence of 64
tokens, one device: each case in a process of its own, whose largest memory is stated.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SHAPES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280)}
N_SEQ, N_STEPS, RANK = 64, 5, 8


def measure(shape, lora_rank):  # -> what one process prints
    import common
    import numpy as np

    import train_jax
    from training.adapters import adapt, new_adapters
    from training.devices import make_mesh
    from training.flags import choose
    from training.state import start_state

    n_layer, n_head, n_embd = SHAPES[shape]
    sizes = {"n_vocab": 50257, "n_ctx": 1024}
    sizes |= {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    flags = choose({"data": ""} | ({"lora_rank": lora_rank} if lora_rank else {}), "cpu", sizes)
    params = common.random_params(sizes)
    if lora_rank:
        params = adapt(params, new_adapters(params, flags))
    rule = train_jax.JaxTrainer(flags).optimizer
    state, shardings = start_state(params, None, 0, rule, 50257, make_mesh(1), False)
    del params
    steps = train_jax.make_train_steps(rule, shardings=shardings, n_head=n_head)
    tokens = np.random.default_rng(0).integers(0, 50257, (1, 1, 1, N_SEQ + 1), np.int32)
    seconds = []
    for _ in range(1 + N_STEPS):
        start = time.perf_counter()
        state, (loss, *_) = steps(state, tokens, 1)
        float(loss)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": median(seconds[1:]), "GiB": peak}))


def main(shapes):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    for shape in shapes:
        for rank in (0, RANK):
            command = [sys.executable, __file__, "--one", shape, str(rank)]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            name = f"{shape}, " + (f"LoRA of rank {rank}" if rank else "all parameters")
            print(f"{name:28}{found['GiB']:8.2f} GiB{found['seconds'] * 1e3:9.0f} ms a step")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main(sys.argv[1:] or ["124M", "355M"])
