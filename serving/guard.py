"""Who may ask, and how much: Host, Origin, key and size of a request, before any route sees it.

A page of any site can send requests to a server on its reader's own machine. Browsers say where
such a request comes from (Origin) and, where a name was bent to lead here, which name that was
(Host): both must be ours, or allowed.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
from urllib.parse import urlsplit

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.protocol import Refusal

MOST_BYTES = 1 << 20  # of a body
HEAD_SECONDS, BODY_SECONDS = 10, 20  # that a client has for sending a request's
OPEN_TO_ALL = {"/", "/health"}  # need no key: a browser cannot send one with a page's address


class Guard:
    """ASGI middleware: answers what is refused, and hands on the rest with its body read whole."""

    def __init__(self, app, host="127.0.0.1", allow=(), api_key=None, most_seconds=None):
        self.app, self.api_key, self.most_seconds = app, api_key, most_seconds
        self.any_address = host in ("0.0.0.0", "::")
        self.allowed = {"localhost", "127.0.0.1", "::1", host, *allow}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            headers = read_headers(scope)
            self.check_sender(headers)
            self.check_key(headers, scope["path"])
            body = await read_body(headers, receive)
        except Refusal as refusal:
            return await send_refusal(refusal, send)
        if body is not None:  # else the client has gone
            with contextlib.suppress(TimeoutError):  # one who does not read what it asked for
                async with asyncio.timeout(self.most_seconds):
                    await self.app(scope, replay(body, receive), send)

    def check_sender(self, headers):
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host_name(host)
        if not (name in self.allowed or self.any_address and is_address(name)):
            raise Refusal(f"the host {host!r} is not this server's: see --allow", 403)
        if (
            origin is not None
            and origin not in self.allowed
            and origin not in (f"http://{host}", f"https://{host}")
        ):
            raise Refusal(f"the origin {origin!r} is not allowed: see --allow", 403)

    def check_key(self, headers, path):
        if self.api_key is None or path in OPEN_TO_ALL:
            return
        _, _, given = headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
            headers = {"www-authenticate": "Bearer"}
            raise Refusal("a wrong API key, or none", 401, code="invalid_api_key", headers=headers)


def read_headers(scope):  # -> {name: value}; Refusal for two hosts, which could be read either way
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    if [name for name, _ in pairs].count("host") > 1:
        raise Refusal("more than one Host")
    return dict(pairs)


def host_name(host):  # "[::1]:8000" -> "::1"
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


async def read_body(headers, receive):  # -> bytes, or None where the client has gone
    too_large = Refusal(f"the body has more than {MOST_BYTES} bytes", 413, code="too_large")
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MOST_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(f"the body took more than {BODY_SECONDS} seconds", 408) from None


def replay(body, receive):
    """receive() for the app: the body in one message, then what the client does next."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_next():
        return messages.pop() if messages else await receive()

    return receive_next


async def send_refusal(refusal, send):
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= {"connection": "close"} | refusal.headers
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class Connection(H11Protocol):
    """uvicorn's, but closed where the head of a request does not come in time."""

    closing = None  # the timer

    def connection_made(self, transport):
        super().connection_made(transport)
        self.watch()

    def data_received(self, data):
        super().data_received(data)
        self.watch()

    def watch(self):
        is_waiting = self.conn.their_state is h11.IDLE
        if is_waiting and self.closing is None:
            self.closing = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not is_waiting and self.closing is not None:
            self.closing.cancel()
            self.closing = None
