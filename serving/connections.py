"""The network side of the server: the listening socket, connections, and signals to shut down.

A server without file descriptors for new connections answers nobody. So the number of connections
is limited. When all are taken, the one that has waited longest for its client is closed. A client
that opens many connections and sends nothing loses those first.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
import time

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10  # the time that a client has to send a request's head
DRAIN_SECONDS = 10  # the time after SIGTERM for requests that are running or waiting
MOST_CONNECTIONS = 4096
MOST_BACKLOG = 128  # connections that the system accepts for us until we take them
SPARE_DESCRIPTORS = 24  # for files and for the event loop
LOG_SECONDS = 10  # the time between two reports that a connection could not be accepted
PROBE_SECONDS = 0.2  # the time between two interim responses to a client that has closed its side


def limits():  # -> the most connections, and the backlog
    """Both depend on the number of descriptors that the process may open (`ulimit -n`)."""
    try:
        from resource import RLIMIT_NOFILE, getrlimit
    except ImportError:  # Windows has no such limit
        return MOST_CONNECTIONS, MOST_BACKLOG
    n_descriptors, _ = getrlimit(RLIMIT_NOFILE)
    if n_descriptors < 0:  # no limit
        return MOST_CONNECTIONS, MOST_BACKLOG
    n_left = max(2, n_descriptors - SPARE_DESCRIPTORS)
    backlog = max(1, min(MOST_BACKLOG, n_left // 4))  # all of it may be accepted at once
    return min(MOST_CONNECTIONS, n_left - backlog), backlog


def listen(host, port):  # -> a socket
    _, backlog = limits()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=backlog)
    # Connections inherit this. Without it, a short answer waits 40 ms for a reader's delayed ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class Connection(H11Protocol):
    """uvicorn's connection, with time limits. Clients may close their side after asking."""

    closing = None  # the timer for a request's head
    waiting_since = None  # when it began to wait for its client

    def connection_made(self, transport):
        super().connection_made(transport)
        self.watch()
        most, _ = limits()
        if len(self.connections) > most:
            make_room(self.connections)

    def data_received(self, data):
        super().data_received(data)
        self.watch()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self.stop_timer()

    def watch(self):
        """Starts the clock when the client must send something, and stops it when it has."""
        is_idle = self.conn.their_state is h11.IDLE
        if not is_idle and self.conn.their_state is not h11.SEND_BODY:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = time.monotonic()
        if not is_idle:
            self.stop_timer()
        elif self.closing is None:
            self.closing = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def stop_timer(self):
        if self.closing is not None:
            self.closing.cancel()
            self.closing = None

    def eof_received(self):  # -> whether the transport stays open
        """The client has closed its side. It may still wait for its answer, or it may be gone.

        TCP does not say which. If we send something to a client that is gone, its system answers
        with a reset. So we send an interim response, which any other client must be able to read
        (RFC 9110, section 15.2). The first one causes the reset, and the second one notices it.
        """
        is_asked = self.cycle is not None and not self.cycle.response_complete
        if not is_asked or self.conn.their_state is h11.SEND_BODY:
            return False
        self.probe()
        self.loop.call_later(PROBE_SECONDS, self.probe)
        return True

    def probe(self):
        is_open = not self.transport.is_closing()
        knows_interim = self.scope["http_version"] != "1.0"
        if is_open and knows_interim and self.conn.our_state is h11.SEND_RESPONSE:
            interim = h11.InformationalResponse(status_code=100, headers=[])
            self.transport.write(self.conn.send(interim))


def make_room(connections):
    """Closes the connection that has waited longest for its client, or the newest if none has."""
    waiting = [
        connection
        for connection in connections
        if connection.waiting_since is not None and not connection.transport.is_closing()
    ]
    if waiting:
        min(waiting, key=lambda connection: connection.waiting_since).transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server. The first signal lets requests end, for a while. A second one ends at once.

    on_late() is called after DRAIN_SECONDS, to end the requests that are still running.
    """

    def __init__(self, app, on_late):
        _, backlog = limits()
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_config=None,  # warnings go to stderr; uvicorn's configuration needs a stdout
                access_log=False,
                server_header=False,
                lifespan="on",
                backlog=backlog,
                timeout_graceful_shutdown=DRAIN_SECONDS + 2,
            )
        )
        self.on_late = on_late

    async def startup(self, sockets=None):
        asyncio.get_running_loop().set_exception_handler(report_seldom())
        self.capture_hangup()
        await super().startup(sockets)

    def capture_hangup(self):
        """A closed terminal ends the server like SIGTERM, unless it was started with nohup."""
        if not hasattr(signal, "SIGHUP"):  # Windows
            return
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self.handle_exit)

    async def shutdown(self, sockets=None):
        timer = asyncio.get_running_loop().call_later(DRAIN_SECONDS, self.on_late)
        await super().shutdown(sockets)
        timer.cancel()

    def handle_exit(self, number, frame):
        if self.should_exit:
            os._exit(128 + number)  # a server has nothing to save
        super().handle_exit(number, frame)


def report_seldom():  # -> an exception handler for asyncio's loop
    """asyncio reports every connection that it cannot accept. One line per LOG_SECONDS will do."""
    logger = logging.getLogger("uvicorn.error")
    reported = -LOG_SECONDS

    def report(loop, context):
        nonlocal reported
        now = time.monotonic()
        if now - reported >= LOG_SECONDS:
            reported = now
            error = context.get("exception")
            logger.error("%s%s", context["message"], f": {error}" if error else "")

    return report
