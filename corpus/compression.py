"""Compressed files, and standard input, as blocks of plain bytes."""

import gzip
import zlib


def read_blocks(file, name, n_block):  # yields bytes
    """Yields the content of an open file, unpacked if its name says that it is compressed.

    Raises ValueError, which names the file, if it is damaged or truncated.
    """
    for ending, unpack in COMPRESSIONS.items():
        if name.lower().endswith(ending):
            yield from unpack(file, name, n_block)
            return
    while block := file.read(n_block):
        yield block


def unpack_gzip(file, name, n_block):
    try:
        with gzip.GzipFile(fileobj=file) as plain:
            while block := plain.read(n_block):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}: not gzip, or cut short ({error})") from None


def unpack_zst(file, name, n_block):
    """Unpacks Zstandard frames, one after the other.

    Reads few bytes at once, because four of them can unpack to 131072.
    """
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"{name}: reading it needs zstandard: pip install zstandard") from None
    frame = None
    try:
        while packed := file.read(512):
            while packed:
                frame = frame or new_frame(zstandard)
                yield frame.decompress(packed)
                packed = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise ValueError(f"{name}: not zstd, or damaged ({error})") from None
    if frame:
        raise ValueError(f"{name}: cut short")


def new_frame(zstandard):
    """Allows the longest window, 2 GiB, as zstd --long=31 writes it.

    Only a frame that is itself that long needs that much memory.
    """
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


COMPRESSIONS = {".gz": unpack_gzip, ".zst": unpack_zst}  # by the ending of a file's name
