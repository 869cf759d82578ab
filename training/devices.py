"""One device or thousands: which devices there are, and where each array is.

Nothing here computes. A mesh lists the devices, and a sharding says how an array is spread over
them. JAX's compiler does the rest, and its runtime moves data between processes and machines.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engine.threads import usable_cores
from plumbing.cli import one_line


def start_jax(coordinator, num_processes, process_id):
    """Joins the other processes, if there are any, and sets up the compilation cache."""
    cluster_options = [coordinator, num_processes, process_id]
    if any(x is not None for x in cluster_options) and None in cluster_options:
        raise ValueError("--coordinator, --num_processes and --process_id go together")
    if coordinator is not None:
        if not re.fullmatch(r".+:\d{1,5}", coordinator):
            raise ValueError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id: expected 0 to {num_processes - 1}, got {process_id}")
    env = os.environ
    cluster = int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env
    cluster |= int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    cluster |= "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env
    cluster |= "," in env.get("TPU_WORKER_HOSTNAMES", "")
    if coordinator or cluster:
        if sys.stderr.isatty():
            print("waiting for the other processes ...", file=sys.stderr)
        jax.distributed.initialize(*cluster_options)
    elif "JAX_NUM_CPU_DEVICES" not in env:  # one device per core is faster than one with threads
        jax.config.update("jax_num_cpu_devices", usable_cores())
    platforms = env.get("JAX_PLATFORMS") or "cpu"
    if "cpu" not in platforms:  # where parameters are made and batches are drawn
        jax.config.update("jax_platforms", platforms + ",cpu")
    keep_compiled()
    try:
        found = jax.devices()[0].platform
    except (RuntimeError, AssertionError):
        found = "cpu"
    if "cpu" not in platforms and found == "cpu":
        raise ValueError(f"JAX_PLATFORMS is {platforms}, but JAX finds no such device")


def keep_compiled():
    """Keeps compiled programs for the next run.

    Programs for a CPU run only on that kind of CPU, so every machine has its own folder. Only this
    user may write to it, because we run whatever programs are in it.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches, "sixtygpt", f"jax-{platform.node()}")
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            warnings.showwarning = functools.partial(mend_cache, folder, warnings.showwarning)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def mend_cache(folder, show, message, *rest):
    """Deletes a damaged file of JAX's cache (after a kill or on a full disk) instead of warning.

    JAX writes its files in place. It would warn about this one at every start and never replace
    it.
    """
    text = r"Error \w+ing persistent compilation cache entry for '(\w+)'"
    if found := re.match(text, str(message)):
        with contextlib.suppress(OSError):
            for path in folder.glob(f"{found[1]}-*"):
                path.unlink()
    else:
        show(message, *rest)


# FLOP/s of one device for dense bfloat16 products, as its maker states, by a part of its name.
KNOWN_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(devices, dtype):  # -> total FLOP/s, "known" or "measured"
    """Returns the makers' figure for bfloat16, otherwise that of one large product, measured now.

    All processes get the figure that the first one measures.
    """
    kind = devices[0].device_kind
    for name, peak in KNOWN_PEAKS.items():
        if name in kind and dtype == "bfloat16":
            return peak * len(devices), "known"
    n = 2048
    x = jax.device_put(jnp.ones((n, n), dtype), jax.local_devices()[0])
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # The CPU's devices are one processor, all of whose cores already work on a single product.
    n_devices = 1 if devices[0].platform == "cpu" else len(devices)
    return n_devices * 2 * n**3 / from_first(min(seconds)), "measured"


def make_sharding(mesh, *axes):
    """Returns a sharding. axes: one per axis, "data" to spread it over the mesh, or None."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def make_mesh(batch_size):
    """Returns all devices as one axis, "data". On a CPU, only as many as divide the batch."""
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        n = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
        devices = devices[:n]
    if batch_size % len(devices):
        raise ValueError(
            f"batch_size {batch_size} must be a multiple of the {len(devices)} devices"
        )
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def spread(tree, mesh, fsdp):
    """Returns a tree of shardings. With fsdp, matrices are split evenly; otherwise they are copied.

    Fully sharded (Rajbhandari et al. 2019, arXiv:1910.02054, stage 3) means that the longest axis
    that the number of devices divides is split, and XLA fetches the rest of a matrix when it is
    needed. An array with three axes has a matrix per layer, and is always split between layers
    (stage 1).
    """

    def axis(x):
        if x.ndim == 3 and x.shape[0] % mesh.size == 0:
            return 0
        axes = [i for i in range(x.ndim) if x.ndim > 1 and fsdp and x.shape[i] % mesh.size == 0]
        return max(axes, key=lambda i: x.shape[i], default=None)

    def shard(x):
        chosen = axis(x)
        return make_sharding(mesh, *("data" if i == chosen else None for i in range(x.ndim)))

    return jax.tree.map(shard, tree)


def put(tree, shardings):
    """Copies NumPy arrays to the devices. Every process copies the shares of its own devices."""

    def put_one(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put_one, tree, shardings)


def to_host(tree):
    """Returns complete NumPy arrays, wherever their parts are. Every process must call this."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def any_process(caught):  # -> the signal that this or any other process has caught, or 0
    if jax.process_count() == 1:
        return max(caught, default=0)
    return int(multihost_utils.process_allgather(np.int32(max(caught, default=0))).max())


def from_first(number):  # -> the first process's number, in all of them
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def check_agreement(value):  # of what JSON can hold
    """Raises ValueError in every process unless all of them have the same value."""
    if jax.process_count() > 1:
        text = json.dumps(value, sort_keys=True).encode()
        digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
        if (multihost_utils.process_allgather(digest) != digest).any():
            raise ValueError("the processes were started with different flags or texts")


@contextlib.contextmanager
def end_together():
    """Ends this process at once if it fails and is one of several, and so ends all of them.

    Otherwise it would wait for the others at its exit, while they wait for it in their next sum.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        os._exit(2)
