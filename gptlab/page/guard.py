"""Who is answered: the rules that every request meets before anything else of the page sees it.

The token is part of the path. A browser sends a cookie to every port of a host, other people's servers among them, and
along with requests that other pages make; a path it sends only to who made it up, so that without the link no request
can be made, and none forged. What a link gives away by being seen, `no-referrer` and a new token at each start limit.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import Callable
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
class AccessPolicy:
    """Where the page listens, and the token that opens it. posts: the paths that take POST; all others take GET."""

    host: str
    port: int
    token: str
    posts: frozenset[str] = frozenset()

    def method(self, path: str) -> str:
        return "POST" if path in self.posts else "GET"

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


@dataclass(frozen=True)
class Asked:
    """A request's head; headers: names in small letters."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[str, str], ...]

    def header(self, name: str, otherwise: str = "") -> str:
        return next((value for key, value in self.headers if key == name), otherwise)

    @property
    def token(self) -> str:
        return self.path.removeprefix("/").partition("/")[0]

    @property
    def rest(self) -> str:
        """The path behind the token, which begins with a slash."""
        return "/" + self.path.removeprefix("/").partition("/")[2]


def unambiguous(policy: AccessPolicy, asked: Asked) -> None:
    """A header that decides occurs once, so that nobody reads another one."""
    names = [name for name, _ in asked.headers]
    if any(names.count(name) > 1 for name in DECIDING):
        raise Refused(400, f"expected each of {', '.join(DECIDING)} once")


def own_host(policy: AccessPolicy, asked: Asked) -> None:
    """Host names this page: against names of others that were made to lead here (DNS rebinding)."""
    if not _is_ours(asked.header("host"), policy):
        raise Refused(403, f"expected this page's own address as Host, with port {policy.port}; open the printed link")


def own_origin(policy: AccessPolicy, asked: Asked) -> None:
    """Origin, where a browser sends it, is this page's: against other pages in the same browser."""
    host = asked.header("host")
    if asked.header("origin", f"http://{host}") != f"http://{host}":
        raise Refused(403, "a page of another origin may not ask")


def right_token(policy: AccessPolicy, asked: Asked) -> None:
    if not secrets.compare_digest(asked.token.encode("utf-8", "replace"), policy.token.encode()):
        raise Refused(403, "expected the token of the link that gptlab page printed")


def right_method(policy: AccessPolicy, asked: Asked) -> None:
    if asked.method != (wanted := policy.method(asked.rest)):
        raise Refused(405, f"expected {wanted}")


def short_query(policy: AccessPolicy, asked: Asked) -> None:
    if len(asked.query) > LONGEST_QUERY:
        raise Refused(414, f"expected a query of at most {LONGEST_QUERY} bytes")


def of_json(policy: AccessPolicy, asked: Asked) -> None:
    """A posted body says that it is JSON, which a form of another page cannot."""
    kind = asked.header("content-type").partition(";")[0].strip().lower()
    if asked.method == "POST" and kind != "application/json":
        raise Refused(415, "expected a body of application/json")


def small_body(policy: AccessPolicy, asked: Asked) -> None:
    """The length that is announced; `_body` counts what comes."""
    length, most = asked.header("content-length", "0"), LARGEST_BODY if asked.method == "POST" else 0
    if not length.isdecimal() or len(length) > 9 or int(length) > most:
        raise Refused(413, f"expected a body of at most {most} bytes")


RULES: tuple[Callable[[AccessPolicy, Asked], None], ...] = (
    unambiguous, own_host, own_origin, right_token, right_method, short_query, of_json, small_body,
)  # fmt: skip
"""In their order, so that without the token nothing else is revealed. Each raises Refused."""


def _is_ours(host: str, policy: AccessPolicy) -> bool:
    """On loopback its three names. Elsewhere also any address as such, which no name server made up."""
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port:
        name, port = host, "80"
    if port != str(policy.port):
        return False
    name = name.removeprefix("[").removesuffix("]").lower()
    if policy.local:
        return name in {"localhost", "127.0.0.1", "::1", policy.host}
    return name == policy.host.lower() or _address(name) is not None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Guard:
    """ASGI: lets through what keeps to the rules, its path without the token; answers the rest with a line.

    What is behind it gets a body whole, and never a long one.
    """

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        # else a websocket: the server closes what nobody answers

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            await self._pass_on(scope, receive, guarded_send)
        except Refused as refused:
            await _refuse(refused, guarded_send)
        except asyncio.CancelledError:  # the page ends before its answer is there
            await _refuse(Refused(503, "gptlab page has ended"), guarded_send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To what is behind it, if the rules are kept; raises Refused."""
        headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        asked = Asked(scope["method"], scope["path"], scope["query_string"], headers)
        for rule in RULES:
            rule(self.policy, asked)
        body = await _body(receive)

        async def receive_body() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        behind = {"path": asked.rest, "raw_path": asked.rest.encode("utf-8", "replace")}
        await self.app({**scope, **behind}, receive_body, send)


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


async def _refuse(refused: Refused, send: Send) -> None:
    body = f"{refused}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # a body that was not read is not waited for
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
