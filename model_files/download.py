"""Downloads files. They resume after a kill, are checked, and are either complete or absent.

download("124M")                       # the missing files of a released model
download_file(url, path, sha256=None)  # any file
"""

import base64
import contextlib
import hashlib
import json
import os
import time

from plumbing.files import close_before_renaming, open_locked, open_no_link, read_json, remove

SIZES = ("124M", "355M", "774M", "1558M")
RELEASED = "https://openaipublic.blob.core.windows.net/gpt-2/models"
TEXT_FILES = ("encoder.json", "vocab.bpe", "hparams.json")
CKPT_FILES = tuple(f"model.ckpt.{end}" for end in ("meta", "index", "data-00000-of-00001"))
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NO_NETWORK = "--model_size shakespeare needs no network"
ATTEMPTS = 5  # the most attempts in a row without a new byte
PATIENCE = 30  # seconds that a server may stay silent
BACKOFF = 0.25  # seconds before the first retry, doubled for every further one


def download(model_size, models_dir="models", only_tokenizer=False):
    """Downloads the missing files of a released model (0.5 GB for 124M, 1.5 MB for a tokenizer).

    SIXTYGPT_DOWNLOAD_URL may name another server that holds {model_size}/{file}.
    """
    if model_size not in SIZES:
        raise ValueError(f"no released model {model_size!r}; choose one of {', '.join(SIZES)}")
    folder = os.path.join(models_dir, model_size)
    have = os.listdir(folder) if os.path.isdir(folder) else []
    if "config.json" in have:  # the folder holds Hugging Face's files
        return
    names = [*TEXT_FILES, "checkpoint", *CKPT_FILES]
    if only_tokenizer or "model.safetensors" in have:
        names = TEXT_FILES
    server = os.environ.get("SIXTYGPT_DOWNLOAD_URL", RELEASED).rstrip("/")
    try:
        for name in names:
            url = f"{server}/{model_size}/{name}"
            download_file(url, os.path.join(folder, name), SHA256.get(name))
    except ConnectionError as error:
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # if it is empty
        advice = NO_NETWORK.replace("--model_size", "--tokenizer") if only_tokenizer else NO_NETWORK
        raise ConnectionError(f"{error}; {advice}") from None


def download_shakespeare():  # -> its path
    """Downloads tiny Shakespeare (1.1 MB) to data/shakespeare.txt, unless the file exists.

    If that fails, raises ConnectionError, which says where to put a copy.
    """
    path = os.path.join("data", "shakespeare.txt")
    try:
        download_file(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    except ConnectionError as error:
        place = os.path.abspath(path)
        raise ConnectionError(f"{error}; put a copy at {place}, or name your own text") from None
    return path


def download_file(url, path, sha256=None):
    """Downloads `url` to `path`, unless the file exists. Raises ConnectionError if that fails.

    The bytes are collected in `path.part`, which survives a kill, and the next call resumes it. The
    file is locked, so only one of several processes downloads and the others wait. `path` is either
    complete or absent.
    """
    if os.path.exists(path):
        return
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open_locked(path + ".part") as f:
            gather(url, f, path, sha256)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def gather(url, f, path, sha256):
    """Downloads until `f`, which is `path.part`, is complete and correct. Renames it to `path`."""
    from requests import RequestException

    part, note = path + ".part", path + ".part.json"
    most = failures = 0
    while not os.path.exists(path):  # another process may have been faster
        try:
            verify(f, fetch(url, f, note), sha256)
            os.fsync(f.fileno())
            close_before_renaming(f)
            os.replace(part, path)  # before the note is removed, without which the part is useless
            remove(note)
            return
        except (RequestException, ConnectionError, ValueError) as error:  # redirects: ValueError
            size = f.seek(0, os.SEEK_END)
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            words, can_help = reason(error)
            if failures == ATTEMPTS or not can_help:
                if size == 0:
                    close_before_renaming(f)
                    remove(part, note)
                raise ConnectionError(f"cannot download {url}: {words}") from None
            time.sleep(BACKOFF * 2 ** (failures - 1))
    close_before_renaming(f)
    remove(part, note)


def fetch(url, f, note):
    """Appends the rest of `url` to `f`, with one request. Returns the file's Content-MD5, or None.

    The file `note` says which version of the remote file the bytes in `f` belong to. If that
    version has changed, or the server cannot resume, the download starts over.
    """
    import requests

    known, n_have = read_note(note), f.seek(0, os.SEEK_END)
    if n_have and n_have == known["length"]:
        return known["md5"]  # we were killed after the last byte, before renaming the file
    headers = {"Accept-Encoding": "identity"}  # so that Content-Length counts the file's bytes
    if known["version"] and 0 < n_have < (known["length"] or 0):
        headers |= {"Range": f"bytes={n_have}-", "If-Range": known["version"]}
    with requests.get(url, headers=headers, stream=True, timeout=(10, PATIENCE)) as response:
        sent = response.headers
        version = sent.get("ETag") or sent.get("Last-Modified") or ""
        packed = sent.get("Content-Encoding", "identity") != "identity"  # in spite of our request
        if response.status_code == 200:
            f.truncate(0)
            n_have, length = 0, "" if packed else sent.get("Content-Length", "")
            known = {
                "version": "" if version.startswith("W/") else version,  # weak: cannot be resumed
                "length": int(length) if length.isdecimal() else None,
                "md5": sent.get("Content-MD5"),
            }
            with open(note, "w", encoding="utf-8", opener=open_no_link) as g:
                json.dump(known, g)
            ends = "Content-Length" in sent or "Transfer-Encoding" in sent
            if not (ends or known["md5"]):  # a part would look like the whole
                raise ConnectionError("the server does not say how long the file is")
        elif response.status_code in (206, 416):
            rest = f"bytes {n_have}-{(known['length'] or 0) - 1}/{known['length']}"
            same = sent.get("Content-Range") == rest and version in ("", known["version"])
            if packed or not same:
                f.truncate(0)
                raise ConnectionError("the server could not resume the download")
        else:
            response.raise_for_status()
            raise ConnectionError(f"the server answered {response.status_code}")
        copy_body(response, f, os.path.basename(url), n_have, known["length"])
    return known["md5"]


def copy_body(response, f, name, n_have, length):
    """Appends a response's body to `f`. Raises ConnectionError if that is not `length` bytes."""
    from tqdm import tqdm

    with tqdm(
        desc=name, total=length, initial=n_have, unit="B", unit_scale=True, disable=None
    ) as bar:  # disable=None: no bar if stderr is not a terminal
        for chunk in response.iter_content(2**14):  # a broken connection loses at most one chunk
            f.write(chunk)
            bar.update(len(chunk))
    size = f.seek(0, os.SEEK_END)
    if size == 0:
        raise ConnectionError("the server sent nothing")
    if length not in (None, size):
        raise ConnectionError("the connection broke off")


def read_note(note):  # -> {"version": str, "length": int or None, "md5": str or None}
    """Reads the note about a `.part` file. The values are empty if it is missing or damaged."""
    types = {"version": str, "length": int | None, "md5": str | None}
    with contextlib.suppress(OSError, ValueError):
        found = read_json(note)
        if all(isinstance(found.get(key), type) for key, type in types.items()):
            return {key: found.get(key) for key in types}
    return {"version": "", "length": None, "md5": None}


def verify(f, md5, sha256):  # md5: base64, as in a Content-MD5 header; sha256: hexadecimal
    """Empties `f` and raises ConnectionError if its bytes do not have these checksums."""
    f.seek(0)
    wrong = md5 and base64.b64encode(hashlib.file_digest(f, "md5").digest()).decode() != md5
    f.seek(0)
    if wrong or (sha256 and hashlib.file_digest(f, "sha256").hexdigest() != sha256):
        f.truncate(0)
        raise ConnectionError("the downloaded file does not match its checksum")


def reason(error):
    """Returns a few words instead of urllib3's many, and whether another attempt can help."""
    from requests import Timeout

    response = getattr(error, "response", None)
    if response is not None:
        code = response.status_code
        return f"the server answered {code} {response.reason}", code >= 500 or code in (408, 429)
    if isinstance(error, ValueError):  # a malformed address, or header
        return str(error), False
    if isinstance(error, Timeout):
        return "the server did not answer in time", True
    if isinstance(error, ConnectionError):  # Python's own, raised by this file
        return str(error), True
    return f"the connection failed or broke off ({type(error).__name__})", True
