"""A socket of one's own and the server on it, until Ctrl-C. A client that is slow loses its connection."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from gptlab.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

MOST_CONNECTIONS = 400
"""Open at once; more are answered 503 and closed, so that they do not use up the process's files."""

HEAD_SECONDS, ANSWER_SECONDS = 10.0, 180.0
"""How long a connection may take to send a request's head, and from there to have taken the answer."""

PATIENCE = 2
"""Seconds that answers under way are waited for when the page ends."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises ConfigError saying what is wrong with host or port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ConfigError(f"--host: expected a name or address of this machine, found {host!r}") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(socket.SOMAXCONN)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is taken; give another, or none for any that is free") from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"--port {port} needs rights that you lack; give one above 1023") from None
        raise ConfigError(f"--host: {host} cannot be listened at ({error.strerror}); 127.0.0.1 always can") from None
    return found


def serve(app: ASGIApp, listening: socket.socket, asked_to_stop: Callable[[], bool]) -> None:
    """Answer requests until SIGINT or SIGTERM, which is then passed to whoever listened to it before.

    asked_to_stop: whether that was before the server listened to it.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """What is not answered yet gets that the page has ended; uvicorn would print it as a fault."""
            asyncio.get_running_loop().call_later(PATIENCE, self.let_go)
            await super().shutdown(sockets)

        def let_go(self) -> None:
            for task in self.server_state.tasks:
                task.cancel()

    async def look() -> None:
        server.should_exit = server.should_exit or asked_to_stop()

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=_impatient_protocol(),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,  # no header makes a stranger a neighbour
        server_header=False,
        timeout_graceful_shutdown=2 * PATIENCE,
        callback_notify=look,
        timeout_notify=0,
    )
    server = Server(config)
    server.run(sockets=[listening])


def _impatient_protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, which itself waits without end for a request that was begun or an answer that is not read."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ImpatientProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        timed: object = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > MOST_CONNECTIONS:
                self.refuse(b"503 Service Unavailable")
            else:
                self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.timer:
                self.timer.cancel()
            super().connection_lost(exc)

        def watch(self) -> None:
            """Begin to wait: for a request's head, or, once for each request, for the end of its answer."""
            answering = self.cycle if self.cycle and not self.cycle.response_complete else None
            if self.timer and answering is self.timed:
                return
            if self.timer:
                self.timer.cancel()
            self.timed = answering
            if answering:
                self.timer = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)
            else:
                self.timer = self.loop.call_later(HEAD_SECONDS, self.refuse, b"408 Request Timeout")

        def refuse(self, status: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                self.transport.close()

    return ImpatientProtocol
