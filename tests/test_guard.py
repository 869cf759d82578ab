"""Who may ask the server, from where, and over how many connections."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPO, TINY, on_linux, serving

pytest.importorskip("starlette", reason="starlette is not installed")

import serve  # noqa: E402
from encoder import Encoder  # noqa: E402
from serving import guard  # noqa: E402

PAGE = "https://chat.example"
PREFLIGHT = {"access-control-request-method": "POST"}
PREFLIGHT |= {"access-control-request-headers": "authorization,content-type"}


# --- Pages of other origins -----------------------------------------------------------------------


def test_a_preflight_needs_no_key(params):
    with serving(params, allow=[PAGE], api_key="secret") as client:
        path, origin = "/v1/completions", {"origin": PAGE}
        answer = client.options(path, headers=origin | PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in answer.headers["access-control-allow-headers"]
        asked = {"prompt": "a", "max_tokens": 1}
        key = {"authorization": "Bearer secret"}
        answer = client.post(path, json=asked, headers=origin | key)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        answer = client.options(path, headers={"origin": "https://evil.example"} | PREFLIGHT)
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers


def test_a_public_page_may_reach_a_private_address(params):
    asked = {"origin": PAGE, "access-control-request-private-network": "true"} | PREFLIGHT
    with serving(params, allow=[PAGE]) as client:
        answer = client.options("/v1/completions", headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(
    ("status", "asked"),
    [
        (401, {}),
        (413, {"content": b"x" * (guard.MOST_BYTES + 1)}),
        (400, {"content": b"[]"}),
        (404, {"url": "/v1/nothing"}),
    ],
)
def test_an_allowed_page_can_read_a_refusal(params, status, asked):
    with serving(params, allow=[PAGE], api_key="secret") as client:
        headers = {"origin": PAGE}
        if status != 401:
            headers |= {"authorization": "Bearer secret"}
        answer = client.post(**{"url": "/v1/completions", "headers": headers} | asked)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        answer = client.post(
            **{"url": "/v1/completions"} | asked | {"headers": {"origin": "https://evil.example"}}
        )
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("allow", "origin", "status"),
    [
        ("https://chat.example/", PAGE, 200),
        ("HTTPS://Chat.Example:443", PAGE, 200),
        ("http://chat.example:80", "http://chat.example", 200),
        ("https://chat.example:8443", "https://chat.example:8443", 200),
        ("https://chat.example", "https://chat.example:8443", 403),
        ("https://chat.example", "http://chat.example", 403),
        ("null", "null", 200),
        ("https://chat.example", "null", 403),
        ("*", "https://anything.example", 200),
        ("*", "null", 200),
        ("[::1]", PAGE, 403),
    ],
)
def test_origins_are_compared_as_browsers_send_them(params, allow, origin, status):
    with serving(params, allow=[allow]) as client:
        answer = client.get("/health", headers={"origin": origin})
        assert answer.status_code == status
        shown = answer.headers.get("access-control-allow-origin")
        assert (shown in (origin, "*")) == (status == 200)


@pytest.mark.parametrize("word", ["https://chat.example/page", "https://", "a b", "evil@localhost",
                                  "https://a@b", "https://a?b", ""])  # fmt: skip
def test_what_is_no_host_and_no_origin_is_refused_at_the_start(params, word):
    with pytest.raises(ValueError, match="--allow"):
        serve.make_app("tiny", Encoder([]), TINY, params, allow=[word])


@pytest.mark.parametrize("host", ["evil@localhost", "localhost/", "localhost:80:80", "localhost?"])
def test_a_host_is_a_name_and_a_port(params, host):
    with serving(params) as client:
        assert client.get("/v1/models", headers={"host": host}).status_code == 403


def test_bearer_is_the_only_scheme(params):
    with serving(params, api_key="secret") as client:
        for scheme, status in (("Bearer", 200), ("bearer", 200), ("Basic", 401), ("Token", 401)):
            headers = {"authorization": f"{scheme} secret"}
            assert client.get("/v1/models", headers=headers).status_code == status, scheme


# --- Real connections -----------------------------------------------------------------------------


@contextlib.contextmanager
def running(*args, n_descriptors=None, **options):
    """serve.py as a process of its own: (the process, its port)."""
    command = [sys.executable, str(REPO / "serve.py"), "--model_size", "shakespeare", "--port", "0"]
    if n_descriptors is not None:
        command = ["prlimit", f"--nofile={n_descriptors}:{n_descriptors}", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, *args], **pipes | options, text=True)
    try:
        line = process.stdout.readline()
        yield process, int(re.search(r":(\d+)$", line)[1])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def port():
    with running() as (_, port):
        yield port


def sent(port, *parts, read=True):  # what comes back until the server closes
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        for part in parts:
            client.sendall(part)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while read and (data := client.recv(65536)):
            answer += data
    return answer


def post(path, **asked):
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def test_health_checks_of_http_1_0_send_no_host(port):
    for path in ("/health", "/metrics"):
        assert sent(port, f"GET {path} HTTP/1.0\r\n\r\n".encode()).startswith(b"HTTP/1.1 200")
    assert sent(port, b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403")


def test_a_target_may_be_a_whole_address(port):
    ask = "GET http://{}/health?a=1 HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n".format
    assert sent(port, ask("localhost", "localhost").encode()).startswith(b"HTTP/1.1 200")
    assert sent(port, ask("evil.example", "localhost").encode()).startswith(b"HTTP/1.1 403")
    assert sent(port, ask("localhost", "other.example").encode()).startswith(b"HTTP/1.1 200")


def test_a_client_that_closes_its_side_gets_its_answer(port):
    for asked in ({"stream": False}, {"stream": True}):
        answer = sent(port, post("/v1/completions", prompt="ROMEO:", max_tokens=200, **asked))
        interim, _, answer = answer.rpartition(b"HTTP/1.1 200 OK")
        assert set(re.findall(rb"HTTP/1.1 (\d+)", interim)) <= {b"100"}
        assert b'"finish_reason": "length"' in answer or b'"finish_reason":"length"' in answer


def test_a_client_that_is_gone_is_not_written_for(port):
    asked = post("/v1/completions", prompt="ROMEO:", max_tokens=240, n=128, ignore_eos=True)
    sent(port, asked, read=False)
    end = time.monotonic() + 30
    while "sixtygpt_rows_running 0" not in (found := metrics(port)):
        assert time.monotonic() < end
        time.sleep(0.05)
    n_written = int(re.search(r"completion_tokens_total (\d+)", found)[1])
    assert n_written < 128 * 240 / 2


def metrics(port):
    return sent(port, b"GET /metrics HTTP/1.0\r\n\r\n").decode()


@pytest.mark.slow
@on_linux
def test_silent_connections_do_not_keep_others_out():
    with running(n_descriptors=64) as (process, port), contextlib.ExitStack() as stack:
        for i in range(300):
            silent = stack.enter_context(socket.socket())
            silent.settimeout(10)
            silent.connect(("127.0.0.1", port))
            if i % 2:  # a head that never ends
                with contextlib.suppress(OSError):
                    silent.sendall(b"GET / HTTP/1.1\r\nHost: ")
        began = time.monotonic()
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        client.request("GET", "/health")
        assert client.getresponse().status == 200
        assert time.monotonic() - began < 5
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert len(err) < 2000, err


@pytest.mark.slow
def test_sigterm_ends_what_runs_with_503():
    with running() as (process, port):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            asked = {"prompt": "ROMEO:", "max_tokens": 249, "n": 128, "ignore_eos": True}
            client.sendall(post("/v1/completions", **asked))
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            answer = b""
            while data := client.recv(65536):
                answer += data
        _, err = process.communicate(timeout=60)
        assert err == "" and process.returncode == -signal.SIGTERM
        assert answer.startswith((b"HTTP/1.1 503", b"HTTP/1.1 200"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_at_once(name):
    with running() as (process, port), socket.create_connection(("127.0.0.1", port)) as client:
        asked = {"prompt": "ROMEO:", "max_tokens": 249, "n": 128, "ignore_eos": True}
        client.sendall(post("/v1/completions", **asked))
        time.sleep(1)
        number = getattr(signal, name)
        process.send_signal(number)
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 2
        assert err == "" and process.returncode == 128 + number


@on_linux
def test_a_closed_terminal_ends_it_like_sigterm():
    with running() as (process, port):
        metrics(port)  # it has begun to serve
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=60)
        assert err == "" and process.returncode == 128 + signal.SIGHUP
