"""Protects a running server from changes to its weight files.

Large weights stay in their file, and the system reads them when they are needed. If somebody
truncates the file in the meantime, reading it ends the process without a message (SIGBUS). So small
weights are copied, and the files of large ones are watched. To replace a model while the server is
running, write the new file under another name and rename it.
"""

import asyncio
import os
import sys
from pathlib import Path

import numpy as np

from model_files.weights import leaves, nest

MOST_COPIED = 256 << 20  # bytes
WATCH_SECONDS = 1


def copied(params):  # -> a tree whose arrays are in memory, or None for large ones
    arrays = leaves(params)
    if sum(x.nbytes for x in arrays.values()) > MOST_COPIED:
        return None
    return nest({name: np.array(x) for name, x in arrays.items()})


def weight_files(folder):
    return sorted(Path(folder).glob("*.safetensors"))


async def watch(paths):
    """Ends the process, with one line of error, if one of the files has changed."""
    before = {path: signature(path) for path in paths}
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        for path in paths:
            if signature(path) != before[path]:
                words = f"error: {path} was changed while the server was using it; start it again"
                print(words, file=sys.stderr, flush=True)
                os._exit(1)


def signature(path):
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_ino
