"""Checks Host, Origin, key and size of a request before any route sees it.

Any site's page can send requests to a server on its reader's own machine. Browsers send the site
that such a request comes from (Origin), and the name under which it reached the server (Host),
which an attacker may have pointed here. Both must be the server's own, or allowed.

There are two layers. The outer one, Cors, adds the headers that let a page of an allowed origin
read an answer, even an error. The inner one, Guard, rejects requests. A preflight, in which a
browser asks whether a page may send a request, ends in Cors, because it never carries a key.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import ipaddress
import json
import re
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from serving.protocol import Refusal

MOST_BYTES = 1 << 20  # of a body
BODY_SECONDS = 20  # the time that a client has to send a body
OPEN_TO_ALL = {"/", "/health"}  # need no key, since browsers can't send one with a page's address
FOR_MONITORS = {"/health", "/metrics"}  # HTTP/1.0 health checks send no Host
HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
DEFAULT_PORTS = {"http": 80, "https": 443}


# --- What is allowed ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The hosts that the server answers to, and the origins whose pages may use it."""

    hosts: frozenset
    origins: frozenset
    any_address: bool = False  # it listens on all addresses, so every address is its own
    everything: bool = False

    def has_host(self, host):
        """Returns whether this Host header, a name and perhaps a port, is the server's."""
        name = host_name(host)
        if name is None:
            return False
        return self.everything or name in self.hosts or self.any_address and is_address(name)

    def has_origin(self, origin, host):
        """Returns whether a page of this origin may send requests. The server's own pages may."""
        own = (f"http://{host}", f"https://{host}")
        return self.everything or origin in self.origins or origin in own


def read_allowed(words, host):  # the --allow flags, the --host flag -> Allowed
    """A word is a host's name, an origin such as https://example.org, "null", or "*" for all.

    "null" is the origin of a page that was opened from a file. Raises ValueError for other words.
    """
    hosts = {"localhost", "127.0.0.1", "::1", host}
    origins = set()
    for word in words:
        if "://" in word:
            origins.add(read_origin(word))
        elif word == "null":
            origins.add(word)
        elif word != "*":
            name = host_name(word)
            if name is None:
                raise ValueError(f"--allow {word!r} is not a host, an origin, null or *")
            hosts.add(name)
    any_address = host in ("0.0.0.0", "::")
    return Allowed(frozenset(hosts), frozenset(origins), any_address, "*" in words)


def read_origin(word):
    """Returns the origin as browsers send it: lower case, without a default port or final slash.

    >>> read_origin("HTTPS://Page.Example:443/")
    'https://page.example'
    """
    parts = urlsplit(word)
    scheme = parts.scheme.lower()
    is_bare = parts.path in ("", "/") and not parts.query and not parts.fragment
    if not HOST.fullmatch(parts.netloc) or not is_bare:
        raise ValueError(f"--allow {word!r}: an origin is SCHEME://HOST or SCHEME://HOST:PORT")
    netloc = parts.netloc.lower()
    port = DEFAULT_PORTS.get(scheme)
    return f"{scheme}://{netloc.removesuffix(f':{port}')}"


def host_name(host):  # "[::1]:8000" -> "::1"; None if it is not a host
    found = HOST.fullmatch(host)
    return found and found[1].strip("[]").lower()


def is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


# --- The layers -----------------------------------------------------------------------------------


class Cors(CORSMiddleware):
    """Starlette's layer for the allowed origins, even if they are not on this network.

    Chrome asks before a public page may reach a private address: Access-Control-Request-Private-
    Network, https://wicg.github.io/private-network-access.
    """

    def __init__(self, app, allowed):
        super().__init__(
            app,
            allow_origins=["*"] if allowed.everything else sorted(allowed.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["retry-after"],
        )


class Guard:
    """ASGI middleware that rejects requests, and passes on the rest with a complete body."""

    def __init__(self, app, allowed, api_key=None, most_seconds=None):
        self.app = app
        self.allowed = allowed
        self.api_key = api_key
        self.most_seconds = most_seconds

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            headers = read_headers(scope)
            scope = with_own_path(scope, headers)
            self.check_sender(scope, headers)
            self.check_key(scope, headers)
            body = await read_body(headers, receive)
        except Refusal as refusal:
            return await send_refusal(refusal, send)
        if body is not None:  # otherwise the client has gone
            with contextlib.suppress(TimeoutError):  # a client that does not read its answer
                async with asyncio.timeout(self.most_seconds):
                    await self.app(scope, replay(body, receive), send)

    def check_sender(self, scope, headers):
        host = headers.get("host", "")
        origin = headers.get("origin")
        is_monitor = "host" not in headers and scope.get("http_version") == "1.0"
        if is_monitor and scope["path"] in FOR_MONITORS and origin is None:
            return
        if not self.allowed.has_host(host):
            raise Refusal(f"the host {host!r} is not allowed; see --allow", 403)
        if origin is not None and not self.allowed.has_origin(origin, host):
            raise Refusal(f"the origin {origin!r} is not allowed; see --allow", 403)

    def check_key(self, scope, headers):
        if self.api_key is None or scope["path"] in OPEN_TO_ALL:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.encode("latin-1"), self.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            headers = {"www-authenticate": "Bearer"}
            words = "the API key is missing or wrong"
            raise Refusal(words, 401, code="invalid_api_key", headers=headers)


def read_headers(scope):  # -> {name: value}
    """Raises Refusal for two Host headers, which would be ambiguous."""
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    if [name for name, _ in pairs].count("host") > 1:
        raise Refusal("the request has more than one Host header")
    return dict(pairs)


def with_own_path(scope, headers):
    """Returns the scope with only a path, even if the request's target is a whole address.

    Proxies send whole addresses. Then the address names the host, and the Host header is ignored
    (RFC 9112, section 3.2.2).
    """
    if scope["path"].startswith("/") or "://" not in scope["path"]:
        return scope
    _, _, address = scope["path"].partition("://")
    headers["host"], slash, path = address.partition("/")
    return scope | {"path": "/" + path, "raw_path": ("/" + path).encode()}


async def read_body(headers, receive):  # -> bytes, or None if the client has gone
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
    """Returns a receive() for the app: the body in one message, then the client's messages."""
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
