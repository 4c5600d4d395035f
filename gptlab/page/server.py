"""A socket of one's own and the server on it, until Ctrl-C."""

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
"""Open at once; more are told 503, so that they do not use up the process's files."""

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
    """Answer requests until SIGINT or SIGTERM, which whoever listened to it before is then told.

    asked_to_stop: whether that was before the server listened to it.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """What is still to be answered is told that the page has ended; uvicorn would print it as a fault."""
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
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,  # no header makes a stranger a neighbour
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=2 * PATIENCE,
        callback_notify=look,
        timeout_notify=0,
    )
    server = Server(config)
    server.run(sockets=[listening])
