"""Token shards: folders of ids for the trainer. Files are mapped into memory, not read.

    shards, encoder = open_shards("shards/corpus")
    read_sequences(shards["train"], [0, 12345], n=65)    # 65 ids from each of these positions

The shards of a split are one long sequence; where it is cut into files makes no difference. Three
kinds of folders open: prepare.py's own (its docstring describes them), nanoGPT's `train.bin` and
`val.bin` (nothing but uint16), and those of llm.c and modded-nanogpt. These have `train` or `val`
in their names (the last one counts) and a header of 256 int32 before the ids: its first two numbers
say whether the ids are uint16 or Llama 3's uint32, the third how many there are. Only prepare.py's
folders name their tokenizer.
"""

import re
from pathlib import Path

import numpy as np

from corpus.documents import notice
from encoder import get_encoder
from model_files.tokenizer import find_tokenizer
from plumbing.files import read_json

SHARD = re.compile(r"(train|val)_\d{6,}\.bin")  # prepare.py's names
# The headers of llm.c's files, {first number: (version, type of the ids)}: GPT-2's and Llama 3's.
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
N_HEADER = 256  # int32


def open_shards(folder):  # -> {"train": [arrays], "val": [arrays]}, Encoder or None
    """Opens a folder. Every array is a read-only memory map, [n_ids] of uint16 or uint32.

    Raises ValueError or OSError, one clear line, if the folder has no shards or is incomplete, or
    if a file's size is not what its header or meta.json says.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.bin"))
    allow_open_files(len(files))
    if (folder / "meta.json").exists():
        return open_prepared(folder), get_encoder("", folder)
    if any(SHARD.fullmatch(file.name) for file in files):
        raise ValueError(
            f"{folder}: no meta.json; prepare.py has not finished there, so run it again"
        )
    shards = {"train": [], "val": []}
    for file in files:
        splits = re.findall("train|val", file.name)
        if splits:
            shards[splits[-1]].append(open_foreign(file))
    if not shards["train"]:
        raise FileNotFoundError(
            f"{folder}: no token shards; expected prepare.py's meta.json, or .bin files of nanoGPT "
            "or llm.c with train and val in their names"
        )
    try:
        find_tokenizer(folder)
    except FileNotFoundError:
        if (folder / "meta.pkl").exists():
            notice(f"{folder}: nanoGPT's tokenizer, meta.pkl, is not read; prepare the text again")
        return shards, None
    return shards, get_encoder("", folder)


def allow_open_files(n):
    """Raises the limit of open files, often 1024, because each map keeps its file open."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + 256
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_prepared(folder):  # -> {"train": [arrays], "val": [arrays]}
    """Maps the shards that meta.json lists. Raises ValueError if one is not as it says."""
    shards = {"train": [], "val": []}
    file = folder / "meta.json"
    meta = read_json(file, n_most=2**30)  # it can be large: it names every source
    dtype = {"uint16": "<u2", "uint32": "<u4"}.get(str(meta.get("dtype")))
    sizes = meta.get("shards")
    if dtype is None or not isinstance(sizes, dict):
        raise ValueError(f"{file}: not written by prepare.py")
    for name, n_ids in sizes.items():
        if not SHARD.fullmatch(name) or type(n_ids) is not int or n_ids < 1:
            raise ValueError(f"{file}: {name!r} with {n_ids!r} ids is not a shard")
        path = folder / name
        if path.stat().st_size != n_ids * np.dtype(dtype).itemsize:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, but meta.json has {n_ids} ids")
        shards[name.split("_")[0]].append(np.memmap(path, dtype, mode="r"))
    return shards


def open_foreign(path):  # -> [n_ids] uint16 or uint32, mapped
    """Maps nanoGPT's bare uint16, or a file of llm.c, which begins with a header."""
    n_bytes = path.stat().st_size
    if n_bytes == 0 or n_bytes % 2:
        raise ValueError(f"{path}: {n_bytes} bytes, which cannot be uint16 ids")
    header = np.fromfile(path, "<i4", 3).tolist()
    if len(header) < 3 or header[0] not in LLM_C:
        return open_bare(path, header)
    version, dtype = LLM_C[header[0]]
    if header[1] != version or n_bytes != 4 * N_HEADER + np.dtype(dtype).itemsize * header[2]:
        raise ValueError(
            f"{path}: {n_bytes} bytes, but its header says version {header[1]}, {header[2]} ids"
        )
    return np.memmap(path, dtype, mode="r", offset=4 * N_HEADER)


def open_bare(path, header):  # -> [n_ids] of uint16, uint32 or int64, mapped
    """Maps ids without a header. If there are zeros between them, they are wider than uint16.

    Raises ValueError for a file that begins like one of llm.c's, with an unknown number.
    """
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise ValueError(
                f"{path}: is NumPy's .npy, but should be bare ids; write it with x.tofile()"
            )
    if len(header) == 3 and 20200101 <= header[0] <= 20991231 and 0 <= header[1] < 100:
        raise ValueError(f"{path}: its header begins with {header[0]}, an unknown format")
    shard = np.memmap(path, "<u2", mode="r")
    start = np.array(shard[: 2**20])
    if len(start) < 16 or start[1::2].max() > 3 or start[::2].max() <= 3:
        return shard  # otherwise the upper halves of ids below 2**18
    n_bytes = 2 * len(shard)
    if n_bytes % 8 == 0 and not start[2::4].any() and not start[3::4].any():
        return np.memmap(path, "<i8", mode="r")
    if n_bytes % 4 == 0:
        return np.memmap(path, "<u4", mode="r")
    return shard


def count_ids(shards):  # [arrays] -> their length together
    return sum(map(len, shards))


def read_sequences(shards, starts, n):  # [arrays], [n_starts] -> [n_starts, n] int32
    """Reads n ids from each start, across the borders of the shards."""
    shard_starts = np.cumsum([0, *map(len, shards)])
    sequences = np.empty((len(starts), n), np.int32)
    for sequence, start in zip(sequences, starts, strict=True):
        i = int(np.searchsorted(shard_starts, start, side="right")) - 1
        n_read = 0
        while n_read < n:
            piece = shards[i][max(0, start - shard_starts[i]) :][: n - n_read]
            sequence[n_read : n_read + len(piece)] = piece
            n_read += len(piece)
            i += 1
    return sequences


def check_ids(shards, n_vocab):  # mapped files
    """Raises ValueError, which names the file and the place, for an id beyond the vocabulary.

    Reads everything once, part by part, about as fast as the disk can.
    """
    for shard in shards:
        for start in range(0, len(shard), 2**20):
            part = shard[start : start + 2**20]
            if part.min() < 0 or part.max() >= n_vocab:
                is_wrong = (part < 0) | (part >= n_vocab)
                i = start + int(is_wrong.argmax())
                raise ValueError(
                    f"{shard.filename}: id {shard[i]} at position {i}, but the tokenizer has only "
                    f"{n_vocab}; the file is damaged, or was made with another tokenizer"
                )
