"""Runs a command as if this machine had another system: what that lacks is missing, or fails.

    python tests/imitation.py win32 gpt2.py "ROMEO:" --model_size shakespeare

win32 and darwin are imitated on Linux. It is the project's own code that is tested: libraries and
Python itself ask for the system when they are imported, so they are imported before.
"""

import builtins
import contextlib
import ctypes
import errno
import fcntl
import importlib
import io
import mmap
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = """
    asyncio asyncio.unix_events concurrent.futures concurrent.futures.process difflib fire
    fire.decorators glob gzip huggingface_hub huggingface_hub.utils json multiprocessing
    multiprocessing.connection multiprocessing.pool multiprocessing.popen_spawn_posix
    multiprocessing.resource_tracker multiprocessing.spawn multiprocessing.synchronize
    multiprocessing.util numpy pathlib queue regex requests safetensors safetensors.numpy selectors
    shutil socket subprocess tempfile threadpoolctl tqdm urllib.request
"""
MORE_LIBRARIES = {  # what only one command imports
    "serve.py": "uvicorn uvicorn.loops.asyncio uvicorn.protocols.http.h11_impl uvicorn.lifespan.on"
    " starlette.applications starlette.middleware.cors starlette.responses starlette.routing",
    "train_jax.py": "jax jax.numpy jax.experimental.multihost_utils optax matplotlib.figure"
    " matplotlib.backends.backend_agg",
    "backprop.py": "matplotlib.figure matplotlib.backends.backend_agg",
    "parity.py": "ast",
}
FUNCTIONS = """
    fork forkpty fchown getegid geteuid getgid getgroups getpgid getpgrp getuid killpg mkfifo nice
    openpty posix_fadvise posix_spawn pread preadv pwrite register_at_fork sched_getaffinity
    sched_setaffinity sched_yield setpgid setsid statvfs sysconf uname wait3 wait4 O_NOFOLLOW
"""
MODULES = "fcntl grp pwd readline resource termios tty"
SIGNALS = "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 alarm"
SIGNALS += " pthread_kill pthread_sigmask setitimer sigwait sigpending"
FORBIDDEN = set('<>:"|?*')  # in a file's name
ASK_LATER = ("multiprocessing.", "uvicorn.")  # modules that ask for sys.platform whenever they work


class TrueSystem:
    """sys, as it was."""

    platform = sys.platform

    def __getattr__(self, name):
        return getattr(sys, name)

    def __setattr__(self, name, value):
        setattr(sys, name, value)


def imitate(system, script):
    warnings.filterwarnings("ignore", "", EncodingWarning)  # theirs, not ours
    for name in f"{LIBRARIES} {MORE_LIBRARIES.get(script, '')}".split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith(ASK_LATER) and hasattr(module, "sys"):
            module.sys = TrueSystem()
    list_open = open_and_mapped()
    delete(os, "sched_getaffinity sched_setaffinity")
    hide_proc()
    if system == "win32":
        imitate_windows(list_open)
    sys.platform = system
    our_modules = "|".join(path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py")])
    our_modules += "|" + "|".join(path.parent.name for path in ROOT.glob("*/__init__.py"))
    warnings.filterwarnings("error", "", EncodingWarning, rf"({our_modules}|__main__)(\.|$)")


def delete(module, names):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)


def hide_proc():
    """Neither system has /proc."""
    open_file = io.open

    def open_no_proc(path, *args, **kwargs):
        if not isinstance(path, int) and str(path)[:6] == "/proc/" and "maps" not in str(path):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return open_file(path, *args, **kwargs)

    io.open = builtins.open = open_no_proc


def imitate_windows(list_open):
    for name in MODULES.split():
        sys.modules[name] = None  # importing it is an error now
    delete(os, FUNCTIONS)
    delete(mmap, "MAP_ANON MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED PROT_EXEC PROT_READ PROT_WRITE")
    sys.modules["multiprocessing.resource_tracker"]._HAVE_SIGMASK = False
    delete(signal, SIGNALS)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(newline="\r\n")
    lock_open_files(list_open)
    write_windows_lines()
    refuse_what_windows_refuses()


def open_and_mapped():  # -> a function that lists this process's open and mapped files
    open_file = io.open

    def list_open():
        paths = set()
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                paths.add(os.readlink(f"/proc/self/fd/{number}"))
        with open_file("/proc/self/maps", encoding="utf-8") as file:
            paths |= {line.split(maxsplit=5)[5].strip() for line in file if line.count("/")}
        return {path for path in paths if os.path.isfile(path)}

    return list_open


def lock_open_files(list_open):
    """A file that is open or mapped cannot be deleted, replaced or renamed, nor can its folder."""

    def locked(function):
        def call(*paths, **options):
            at = options.get("dir_fd")
            folder = os.readlink(f"/proc/self/fd/{at}") if at is not None else "."
            for path in paths:
                path = os.path.realpath(os.path.join(folder, os.fsdecode(path)))
                for other in list_open():
                    if other == path or other.startswith(path + "/"):
                        raise PermissionError(errno.EACCES, "The file is in use", path)
            return function(*paths, **options)

        return call

    for name in ("rename", "replace", "unlink", "remove"):
        setattr(os, name, locked(getattr(os, name)))


def write_windows_lines():
    """Text files get \\r\\n, and names that Windows has no room for are refused."""
    open_file = io.open

    def open_text(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest,
                  **options):  # fmt: skip
        writes = set(mode) & set("wax+")
        if writes and not isinstance(path, int) and FORBIDDEN & set(os.fsdecode(path)):
            raise OSError(errno.EINVAL, "Invalid argument", path)
        if writes and "b" not in mode and newline is None:
            newline = "\r\n"
        encoding = encoding if "b" in mode else io.text_encoding(encoding, 2)
        return open_file(path, mode, buffering, encoding, errors, newline, *rest, **options)

    io.open = builtins.open = open_text


def refuse_what_windows_refuses():
    fsync, kill, load = os.fsync, os.kill, ctypes.CDLL.__init__

    def fsync_writable(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR) == 0:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(number)

    def kill_with_a_signal(pid, number):
        assert number, f"os.kill({pid}, 0) ends the process on Windows"
        kill(pid, number)

    def load_by_name(self, name, *args, **options):
        if name is None:
            raise TypeError("expected a library's name")
        load(self, name, *args, **options)

    def refuse(*args, **options):
        raise OSError(errno.EPERM, "A required privilege is not held by the client")

    def not_implemented(*args, **options):
        raise NotImplementedError

    os.fsync = fsync_writable
    os.kill = kill_with_a_signal
    os.symlink = refuse
    ctypes.CDLL.__init__ = load_by_name
    loop = sys.modules["asyncio.unix_events"].SelectorEventLoop
    loop.add_signal_handler = loop.remove_signal_handler = not_implemented


if __name__ == "__main__":
    system, script, *words = sys.argv[1:]
    imitate(system, script)
    sys.argv = [str(ROOT / script), *words]
    sys.path[0] = str(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")
