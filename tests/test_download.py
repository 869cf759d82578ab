"""Downloads from a server on this machine that misbehaves in every way we could think of."""

import base64
import gzip
import hashlib
import http.server
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import GPT2_FILES, REPO

import utils
from encoder import Encoder
from model_files import download, weights

pytest.importorskip("requests", reason="requests is not installed")
FILE = "/124M/model.ckpt.meta"


ANSWERS = {  # instead of a file
    "hang up": b"",
    "half a header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "no HTTP": b"<html>Please log in to this network</html>",
    "empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "206 unasked": b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-2/9\r\nContent-Length: 3\r\n\r\nabc",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3, 4\r\n\r\nabc",
    "endless length": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nabc",
}
HALVED = {"drop", "no etag", "weak", "slow then stop", "gzip, halved", "no length, halved"}
HALVED |= {"chunks, then none"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files with ranges; server.faults holds one fault per request, "" for none."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        with server.lock:
            server.seen.append((self.path, self.headers.get("Range")))
            fault = server.faults.pop(0) if server.faults else server.always
        if fault == "silence":
            return server.stop.wait(20)
        if fault in ANSWERS:
            self.wfile.write(ANSWERS[fault])
            self.close_connection = True
            return None
        data = server.files.get(self.path)
        if fault.startswith("3"):
            status, _, place = fault.partition(" ")
            self.send_response(int(status))
            self.send_header(
                "Location", place or server.url.replace("127.0.0.1", "localhost") + FILE
            )
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "refuse" or data is None:
            return self.send_error(int(server.status) if data is not None else 404)
        etag = f'"{server.version}"'
        start = 0
        asked = self.headers.get("Range")
        if asked and fault != "no ranges" and self.headers.get("If-Range") in (None, etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if fault == "416":
            return self.send_error(416)
        body = data[start:]
        if "gzip" in fault:
            body = gzip.compress(body)
        self.send_response(206 if start else 200)
        if "gzip" in fault:
            self.send_header("Content-Encoding", "gzip")
        if start:
            first = start - 1 if fault == "wrong range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if fault != "no etag":
            self.send_header("ETag", "W/" + etag if fault == "weak" else etag)
        if server.md5 and not start:
            digest = hashlib.md5(data).digest()
            self.send_header("Content-MD5", base64.b64encode(digest).decode())
        extra = {"long": 1000, "short": -1000}.get(fault, 0)
        if fault == "chunks, then none":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"1000\r\n" + body
        elif "no length" not in fault:
            self.send_header("Content-Length", str(len(body) + extra))
        self.end_headers()
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault in HALVED:
            body = body[: len(body) // 2]
        self.wfile.write(body[: len(body) + min(extra, 0)])
        if fault == "slow then stop":
            self.wfile.flush()
            server.stop.wait(20)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.lock, server.stop, server.seen = threading.Lock(), threading.Event(), []
    server.faults, server.always, server.status, server.md5 = [], "", 503, True
    server.version = "one"
    server.files = {FILE: secrets.token_bytes(300_000)}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setenv("SIXTYGPT_DOWNLOAD_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


def fetched(server, path, **how):
    """Download FILE to `path`; True if it is whole and alone in its folder."""
    download.download_file(server.url + FILE, str(path), **how)
    return path.read_bytes() == server.files[FILE] and os.listdir(path.parent) == [path.name]


def resumed_at(server):
    """Where each request began, in multiples of the 16 KiB chunks that are kept."""
    return [0 if asked is None else int(asked[6:-1]) // 2**14 for _, asked in server.seen]


def failure(server, path, **how):
    with pytest.raises(ConnectionError) as caught:
        download.download_file(server.url + FILE, str(path), **how)
    assert not path.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_arrives_whole_and_only_once(server, tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    assert fetched(server, path, sha256=hashlib.sha256(server.files[FILE]).hexdigest())
    assert fetched(server, path) and len(server.seen) == 1


@pytest.mark.parametrize(
    "faults",
    [
        ["drop"] * 8,
        ["refuse"] * 4,
        ["corrupt", "corrupt"],
        ["drop", "no ranges"],
        ["drop", "416"],
        ["drop", "wrong range"],
        ["no etag", ""],
        ["weak", ""],
        ["long", ""],
        ["short", ""],
        ["drop", "refuse", "corrupt", "drop", "", ""],
        ["302", "drop", "307", ""],
        ["gzip"],
        ["drop", "gzip", ""],  # a range of what is packed is not a range of the file
        ["gzip, halved", "gzip, halved", "drop", ""],
        ["drop", "corrupt", ""],  # a right header, and other bytes
        ["chunks, then none", ""],
        ["no length, halved", "no length"],
        *([answer, "drop", answer, ""] for answer in ANSWERS if "length" not in answer),
    ],
    ids=str,
)
def test_a_bad_line_is_overcome(server, tmp_path, faults):
    server.faults = list(faults)
    assert fetched(server, tmp_path / "file")


def test_a_broken_download_resumes_where_it_stopped(server, tmp_path):
    server.faults = ["drop", "drop"]
    assert fetched(server, tmp_path / "file")
    assert resumed_at(server) == [0, 9, 13]  # 150000 and 225000, rounded down


def test_a_busy_server_does_not_cost_what_is_there(server, tmp_path):
    server.faults = ["drop", "refuse", "refuse"]
    assert fetched(server, tmp_path / "file")
    assert resumed_at(server) == [0, 9, 9, 9]


def test_a_file_that_changed_on_the_server_starts_over(server, tmp_path):
    server.always = "drop"
    server.status = 404
    server.faults = ["drop", "refuse"]
    assert "404" in failure(server, tmp_path / "file")
    assert (tmp_path / "file.part").stat().st_size == 9 * 2**14
    server.always, server.version = "", "two"
    server.files[FILE] = secrets.token_bytes(300_000)  # as long as before, but another
    assert fetched(server, tmp_path / "file")
    assert resumed_at(server)[-1] == 9  # asked to resume, was given all


STRANGE_NOTES = [
    '{"version": "\\"one\\"", "length": "300000", "md5": null}',
    '{"version": ["one"], "length": 300000, "md5": null}',
    '{"version": "\\"one\\"", "length": 1000, "md5": 5}',
    '{"version": null, "length": 2000, "md5": null}',
]


@pytest.mark.parametrize("note", ["", "{", "[" * 10**5, None, *STRANGE_NOTES])
def test_a_part_of_unknown_origin_starts_over(server, tmp_path, note):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    if note is not None:
        (tmp_path / "file.part.json").write_text(note)
    assert fetched(server, tmp_path / "file")


def test_a_complete_part_needs_only_its_name(server, tmp_path):
    data = server.files[FILE]
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    note = {"version": '"one"', "length": len(data), "md5": md5}
    (tmp_path / "file.part").write_bytes(data)
    (tmp_path / "file.part.json").write_text(json.dumps(note))
    assert fetched(server, tmp_path / "file") and server.seen == []
    os.unlink(tmp_path / "file")
    (tmp_path / "file.part").write_bytes(data[:-1] + b"?")  # complete, but wrong
    (tmp_path / "file.part.json").write_text(json.dumps(note))
    assert fetched(server, tmp_path / "file")


@pytest.mark.parametrize(
    "always, words",
    [
        ("refuse", "answered 503"),
        ("corrupt", "checksum"),
        ("short", "checksum"),
        ("long", "broke off"),
        ("silence", "did not answer in time"),
        ("301", "answered 301"),
        ("302 /a", "answered 302"),
        ("302 file:///etc/passwd", "file:///etc/passwd"),
        ("302 http://[::1", "cannot download"),
        ("302 http://" + "a" * 70 + "..b/", "cannot download"),
        ("302 http://127.0.0.1:9/", "the connection failed"),
        ("hang up", "the connection failed or broke off"),
        ("no HTTP", "the connection failed or broke off"),
        ("empty", "sent nothing"),
        ("half a header", "does not say how long"),
        ("two lengths", "Content-Length"),
        ("endless length", "cannot download"),
        ("206 unasked", "could not resume"),
        ("gzip, halved", "broke off"),
        ("no length, halved", "checksum"),
    ],
)
def test_a_hopeless_server_ends_in_one_line(server, tmp_path, monkeypatch, always, words):
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    server.always = always
    assert words in failure(server, tmp_path / "file")


@pytest.mark.parametrize("fault", ["gzip, halved", "chunks, then none", "no length, halved"])
def test_half_a_file_is_none_though_no_length_and_no_checksum_is_sent(server, tmp_path, fault):
    server.md5, server.always = False, fault
    assert failure(server, tmp_path / "file")
    server.always = fault.removesuffix(", halved") if "gzip" in fault else ""
    assert fetched(server, tmp_path / "file")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_download_is_resumed_through_a_redirect_to_another_host(server, tmp_path, status):
    server.faults = [f"{status}", "drop", f"{status}", ""]
    assert fetched(server, tmp_path / "file")
    assert resumed_at(server) == [0, 0, 9, 9]


def test_a_stall_in_the_middle_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    server.faults = ["slow then stop", "slow then stop"]
    assert fetched(server, tmp_path / "file")
    assert resumed_at(server) == [0, 9, 13]


def test_the_checksums_are_those_of_openais_files():
    if not GPT2_FILES.is_dir():
        pytest.skip(f"no GPT-2 tokenizer files in {GPT2_FILES} (SIXTYGPT_DATA)")
    for name, wanted in download.SHA256.items():
        with open(GPT2_FILES / name, "rb") as f:
            assert hashlib.file_digest(f, "sha256").hexdigest() == wanted


def test_wrong_content_is_thrown_away(server, tmp_path):
    assert "checksum" in failure(server, tmp_path / "file", sha256="0" * 64)
    assert os.listdir(tmp_path) == []


def test_what_cannot_get_better_is_not_retried(server, tmp_path):
    server.always, server.status = "refuse", 403
    assert "answered 403" in failure(server, tmp_path / "file")
    assert len(server.seen) == 1 and os.listdir(tmp_path) == []
    with pytest.raises(ConnectionError, match="nonsense"):
        download.download_file("nonsense", str(tmp_path / "file"))


def test_no_network_names_the_model_that_needs_none(server, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "has_tensorflow", lambda: True)
    monkeypatch.setenv("SIXTYGPT_DOWNLOAD_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConnectionError) as caught:
        utils.load_encoder_hparams_and_params("124M", str(tmp_path))
    message = str(caught.value)
    assert "http://127.0.0.1:9/124M/encoder.json" in message and "\n" not in message
    assert "--model_size shakespeare" in message and os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file/x: "):
        download.download_file(server.url + FILE, str(tmp_path / "file" / "x"))
    assert server.seen == []


DOWNLOAD = "import sys; from model_files import download; download.download_file(*sys.argv[1:])"


def start(server, path):
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, server.url + FILE, str(path)], cwd=REPO
    )


def test_a_killed_process_is_resumed_by_the_next(server, tmp_path):
    server.faults = ["slow then stop"]
    process = start(server, tmp_path / "file")
    part = tmp_path / "file.part"
    for _ in range(1000):
        if part.exists() and part.stat().st_size > 0:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = part.stat().st_size
    assert size > 0 and not (tmp_path / "file").exists()
    assert fetched(server, tmp_path / "file") and server.seen[-1][1] == f"bytes={size}-"


def test_many_processes_at_once_do_no_harm(server, tmp_path):
    server.faults = ["drop"] * 3
    processes = [start(server, tmp_path / "file") for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert fetched(server, tmp_path / "file")
    assert sum(asked is None for _, asked in server.seen) == 1  # one process did it all


def test_a_full_disk_keeps_no_broken_file(server, tmp_path):
    code = f"""if True:
        import resource
        from model_files import download
        from plumbing import cli
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            download.download_file({server.url + FILE!r}, {str(tmp_path / "file")!r})
        except OSError as error:
            print(cli.one_line(error))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == f"cannot write {tmp_path / 'file'}: File too large\n", done.stderr
    assert not (tmp_path / "file").exists()
    assert fetched(server, tmp_path / "file")  # and goes on, once there is room


def test_a_released_model_is_fetched_and_loads(server, tmp_path, monkeypatch):
    hparams = {"n_vocab": 257, "n_ctx": 4, "n_embd": 4, "n_head": 2, "n_layer": 1}
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    shapes = weights.tensor_shapes(hparams)
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes}
    names = (*download.TEXT_FILES, "checkpoint", *download.CKPT_FILES)
    files = dict.fromkeys(names, b"x")
    files["encoder.json"] = json.dumps(Encoder([]).vocab).encode()
    files["vocab.bpe"], files["hparams.json"] = b"#version: 0.2\n", json.dumps(hparams).encode()
    server.files = {f"/355M/{name}": data for name, data in files.items()}
    with pytest.raises(ConnectionError, match=r"encoder\.json.* checksum"):
        download.download("355M", str(tmp_path))  # the real one's sha256 is expected
    monkeypatch.setattr(download, "SHA256", {})
    download.download("355M", str(tmp_path))
    folder = tmp_path / "355M"
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == files
    tensors = {weights.hugging_face_name(name): array for name, array in arrays.items()}
    weights.write_safetensors(folder / "model.safetensors", tensors)
    for name in names[3:]:
        os.unlink(folder / name)
    server.seen.clear()
    _, found, params = utils.load_encoder_hparams_and_params("355M", str(tmp_path))
    assert found == hparams and server.seen == []  # converted: the checkpoint is not needed again
    np.testing.assert_array_equal(params["wte"], arrays["wte"])
