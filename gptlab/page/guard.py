"""Who is answered: the rules that every request meets before anything else of the page sees it.

The token stands in the path. A browser sends a cookie to every port of a host, other people's servers among them, and
along with requests that other pages make; a path it sends only to who made it up, so that without the link no request
can be made, and none forged. What a link gives away by being seen, `no-referrer` and a new token at each start limit.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 64 * 1024
"""Bytes of a request's body. A longer one is refused before it is read whole."""

LONGEST_QUERY = 4096

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""Of every answer, refusals too."""

DECIDING = ("host", "origin", "content-length", "content-type")
"""Headers that a decision rests on."""


@dataclass(frozen=True)
class Door:
    """Where the page listens, and the token that opens it. posts: the paths that take POST; all others take GET."""

    host: str
    port: int
    token: str
    posts: frozenset[str] = frozenset()

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.host)


class Refused(Exception):
    """A request that is not answered: its status, and why, in a line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def check(door: Door, method: str, path: str, query: bytes, headers: dict[str, str]) -> str:
    """The path behind the token, "/" at least; raises Refused. headers: by their names in small letters."""
    host = headers.get("host", "")
    if not _is_ours(host, door):
        raise Refused(403, f"expected this page's own address as Host, with port {door.port}; open the printed link")
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        raise Refused(403, "a page of another origin may not ask")
    token, slash, rest = path.removeprefix("/").partition("/")
    if not secrets.compare_digest(token.encode("utf-8", "replace"), door.token.encode()) or not slash:
        raise Refused(403, "expected the token of the link that gptlab page printed")
    rest = f"/{rest}"
    wanted = "POST" if rest in door.posts else "GET"
    if method != wanted:
        raise Refused(405, f"expected {wanted}")
    if len(query) > LONGEST_QUERY:
        raise Refused(414, f"expected a query of at most {LONGEST_QUERY} bytes")
    _check_body(wanted, headers)
    return rest


def _check_body(method: str, headers: dict[str, str]) -> None:
    length = headers.get("content-length", "0")
    if method == "GET":
        if length != "0" or "transfer-encoding" in headers:
            raise Refused(413, "expected no body")
        return
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "expected a body of application/json")  # a form of another page cannot send that
    if not length.isdecimal() or int(length) > LARGEST_BODY:
        raise Refused(413, f"expected a body of at most {LARGEST_BODY} bytes")


def _is_ours(host: str, door: Door) -> bool:
    """Whether Host names this page: against names of others that were made to lead here (DNS rebinding).

    On loopback these are its three names. Elsewhere also any address as such, which no name server made up.
    """
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port:
        name, port = host, "80"
    if port != str(door.port):
        return False
    name = name.removeprefix("[").removesuffix("]").lower()
    if door.local:
        return name in {"localhost", "127.0.0.1", "::1", door.host}
    return name == door.host.lower() or _address(name) is not None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Guard:
    """ASGI: lets through what keeps to the rules, its path without the token; answers the rest with a line.

    What is behind it gets a body whole, and never a long one.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # a websocket: the server closes what nobody answers

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
            path = check(self.door, scope["method"], scope["path"], scope["query_string"], _once(pairs))
            body = await _body(receive)
        except Refused as refused:
            await _answer(refused, guarded_send)
            return

        async def receive_body() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app({**scope, "path": path, "raw_path": path.encode()}, receive_body, guarded_send)


def _once(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Headers by name; raises Refused where one that decides stands twice, so that nobody reads the other one."""
    names = [name for name, _ in pairs]
    if any(names.count(name) > 1 for name in DECIDING):
        raise Refused(400, f"expected each of {', '.join(DECIDING)} once")
    return dict(pairs)


async def _body(receive: Receive) -> bytes:
    """A request's body; raises Refused once it is longer than it may be, whatever its header said."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"expected a body of at most {LARGEST_BODY} bytes")
    return body


async def _answer(refused: Refused, send: Send) -> None:
    body = f"{refused}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # a body that was not read is not waited for
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
