"""Compressed files, and standard input, as blocks of plain bytes."""

import gzip
import zlib


def read_blocks(file, name, n_block):  # yields bytes
    """Yield the plain content of an open file: compressed, if its name says so, or as it is.

    Raises ValueError, which names the file, if it is damaged or cut short.
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
    """Zstandard frames, one after the other.

    Few bytes are read at once, because four of them can unpack to 131072.
    """
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"{name}: reading it needs zstandard: pip install zstandard") from None
    frame = None
    try:
        while packed := file.read(512):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise ValueError(f"{name}: not zstd, or damaged ({error})") from None
    if frame:
        raise ValueError(f"{name}: cut short")


COMPRESSIONS = {".gz": unpack_gzip, ".zst": unpack_zst}  # by the ending of a file's name
