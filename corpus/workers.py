"""Runs jobs in this process, in a pool of processes, or on a Ray cluster.

All three functions yield (job, result) as the jobs are done, in any order, and take a new job only
when one is done, so that unpacked files don't pile up.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

CAN_BLOCK = hasattr(signal, "pthread_sigmask")
PROJECT = Path(__file__).resolve().parent.parent


def run_here(jobs, work):
    for job in jobs:
        yield job, work(job)


def run_pool(jobs, work, n_workers):
    """Raises OSError if a worker is killed. However this ends, no worker outlives it."""
    context = multiprocessing.get_context("spawn")
    with (
        safe_path(),
        ProcessPoolExecutor(n_workers, context, initializer=follow_parent) as pool,
    ):
        try:
            running = {}
            for job in jobs:
                with delayed(signal.SIGINT):  # a worker that is starting would print a traceback
                    running[pool.submit(work, job)] = job
                if len(running) == 2 * n_workers:
                    yield from finished(running)
            while running:
                yield from finished(running)
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker was killed, perhaps for lack of memory: "
                "the same command continues where this one stopped"
            ) from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


@contextlib.contextmanager
def safe_path():
    """Starts processes that don't import from the current folder, which may be a stranger's."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def finished(running):
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


@contextlib.contextmanager
def delayed(signal_number):
    """Delays a signal until the end of the block, or until a process started in it unblocks it.

    On Windows, which can't do this, nothing is delayed.
    """
    if not CAN_BLOCK:
        yield
        return
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal_number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def follow_parent():
    """End this worker at once on Ctrl-C, and when its parent has ended, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_ray(jobs, work, address):
    """Run the jobs as Ray tasks. If a machine is lost, Ray runs its tasks again on another one.

    Every machine needs Python with numpy and regex, and must see the files under the same names.
    The code is sent with the jobs.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("--ray needs ray: pip install -r requirements/ray.txt") from None
    send_by_value(ray.cloudpickle)
    try:
        with contextlib.chdir(PROJECT):  # what starts here imports from the current folder
            ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        # Many retries: for some seconds Ray keeps sending jobs to a machine that has died.
        remote = ray.remote(max_retries=100)(lambda job: work(job))
        running = {}
        for job in itertools.chain(jobs, itertools.repeat(None)):
            if job:
                running[remote.remote(job)] = job
            elif not running:
                break
            if not job or len(running) >= 2 * ray.cluster_resources().get("CPU", 1):
                (done,), _ = ray.wait(list(running))
                yield running.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise ConnectionError(f"Ray: {error}") from None
    finally:
        ray.shutdown()


def send_by_value(cloudpickle):
    """Pickle this project's modules with the jobs, so that other machines need not have them."""
    for module in list(sys.modules.values()):
        folder = Path(getattr(module, "__file__", None) or "/").resolve().parent
        ours = PROJECT in (folder, folder.parent)  # the root, or a package
        if ours and module.__name__ != "__main__":  # __main__ is sent by value anyway
            cloudpickle.register_pickle_by_value(module)
