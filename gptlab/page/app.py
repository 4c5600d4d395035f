"""The page's addresses, what answers each, and the server. guard.py decides who may ask, views.py what is shown.

The server runs until Ctrl-C; a client that is slow loses its connection.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gptlab.errors import ConfigError, GptlabError
from gptlab.page.guard import AccessPolicy, Guard
from gptlab.page.run_index import RunIndex, key_of
from gptlab.page.views import Missing, Models, View, Views, prepare, static

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

    from gptlab.interpret.generate import OpenedModel

T = TypeVar("T")

READ, WRITE = "/read", "/write"
"""The addresses that take POST, of the lens and of generation: a prompt is no part of an address, which browsers
remember. Text is generated for this machine alone."""

DRAWERS = 16
"""Pages that are drawn at a time, so that none waits for a slow one."""

VIEWS_WAITING, PROMPTS_WAITING = 256, 8
"""Requests that may wait for a page to be drawn, and for a model; of more, each is asked to come again."""

VIEW_SECONDS, PROMPT_SECONDS = 60.0, 120.0
"""How long a request waits for a page, and for a model, which may have to be opened."""

MOST_CONNECTIONS = 400
"""Open at once; more are answered 503 and closed, so that they do not use up the process's files."""

HEAD_SECONDS, ANSWER_SECONDS = 10.0, 180.0
"""How long a connection may take to send a request's head, and from there to have taken the answer."""

PATIENCE = 2
"""Seconds that answers under way are waited for when the page ends."""


class Busy(Exception):
    """The queue is full."""


class Late(Exception):
    """The answer took longer than a request waits."""


class WorkerQueue:
    """Calls served by a few threads: at most `most` of them wait or are computed, and none longer than `patience` s."""

    def __init__(
        self, name: str, workers: int, most: int, patience: float, first: Callable[[], object] = lambda: None
    ) -> None:
        """first: done before the first call is served, whatever comes of it."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._pool.submit(first)
        self._under_way: set[Future[Any]] = set()
        self._most, self._patience, self._waiting = most, patience, 0

    async def call(self, work: Callable[[], T]) -> T:
        """What `work()` gives, computed by a worker; raises Busy at once where the queue is full, Late after a while.

        Work that is late is finished nevertheless, so that what it keeps is there for the next request.
        """
        if self._waiting >= self._most:
            raise Busy
        self._waiting += 1
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._submit(work)), self._patience)
        except TimeoutError:
            raise Late from None
        finally:
            self._waiting -= 1

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        future = self._pool.submit(work)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    @property
    def busy(self) -> bool:
        """Whether a call is still being computed, whoever still waits for it."""
        return bool(self._under_way)

    def close(self) -> None:
        """Let go of all that waits; what is being computed ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Queues(NamedTuple):
    """Those who wait for a page to be drawn, and those who wait for a model; run_index: reads runs for the list."""

    drawing: WorkerQueue
    computing: WorkerQueue
    run_index: RunIndex

    @property
    def busy(self) -> bool:
        return self.drawing.busy or self.computing.busy or self.run_index.pending != (0, 0)


def create_app(
    root: Path, model: str | None, open_model: Callable[[str], OpenedModel], policy: AccessPolicy
) -> tuple[ASGIApp, Queues]:
    """The page over the runs below `root`, behind its guard. model: another one that the lens offers."""
    extra = {key_of(f"model {model}"): Path(model)} if model else {}
    views = Views(index := RunIndex(root), {key: str(path) for key, path in extra.items()}, writes=policy.local)
    drawing = WorkerQueue("page", DRAWERS, VIEWS_WAITING, VIEW_SECONDS, prepare)
    queues = Queues(drawing, WorkerQueue("model", 1, PROMPTS_WAITING, PROMPT_SECONDS), index)
    return Guard(_routes(views, Models(open_model), extra, queues), policy), queues


def _routes(views: Views, models: Models, extra: dict[str, Path], queues: Queues) -> ASGIApp:
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    drawing, computing, index = queues

    async def shown(request: Request, view: Callable[[], View]) -> Response:
        page = await drawing.call(view)
        etag = f'"{page.mark}"'
        known = request.headers.get("if-none-match") == etag and page.status == 200
        return Response(b"" if known else page.html, 304 if known else page.status, {"etag": etag}, "text/html")

    async def runs(request: Request) -> Response:
        return await shown(request, views.runs)

    async def run(request: Request) -> Response:
        return await shown(request, partial(views.run, request.query_params.get("key", "")))

    async def compare(request: Request) -> Response:
        asked = request.query_params
        if "experiment" in asked:
            return await shown(request, partial(views.experiment, asked["experiment"]))
        return await shown(request, partial(views.compare, sorted(set(asked.getlist("run")))))

    async def lens(request: Request) -> Response:
        return await shown(request, partial(views.lens, request.query_params.get("model", "")))

    async def overlay(request: Request) -> Response:
        return await shown(request, partial(views.overlay, sorted(set(request.query_params.getlist("run")))))

    async def of_model(request: Request, answer: Callable[[Path, Asked], object]) -> Response:
        """What a model says of the text that was posted; one text is computed at a time."""
        asked = _asked(await request.body())
        if asked is None:
            return _json({"error": f"expected {EXPECTED}"}, 400)
        source = extra.get(asked.model) or await drawing.call(partial(_source, views, asked.model))
        try:
            return await computing.call(lambda: _json(answer(source, asked)))
        except (GptlabError, OSError) as error:
            return _json({"error": str(error)}, 422)

    async def read(request: Request) -> Response:
        return await of_model(request, lambda source, asked: models.read(source, asked.prompt))

    async def write(request: Request) -> Response:
        def answer(source: Path, asked: Asked) -> object:
            return models.write(source, asked.prompt, asked.tokens, asked.temperature)

        return await of_model(request, answer)

    def fixed(content: bytes, kind: str) -> Callable[[Request], Response]:
        return lambda request: Response(content, media_type=kind)

    @asynccontextmanager
    async def open_queues(app: Starlette) -> AsyncIterator[None]:
        yield
        drawing.close()
        computing.close()
        index.close()

    pages = {"/": runs, "/run": run, "/compare": compare, "/overlay": overlay, "/lens": lens}
    routes = [Route(path, endpoint) for path, endpoint in pages.items()]
    routes += [Route(path, fixed(*file)) for path, file in static().items()]
    routes += [Route(READ, read, methods=["POST"])]
    routes += [Route(WRITE, write, methods=["POST"])] if views.writes else []
    return Starlette(routes=routes, exception_handlers=_handlers(), lifespan=open_queues)


def _handlers() -> dict[Any, Callable[..., Any]]:
    """What is answered where a page cannot be had, by the exception that says so."""
    from starlette.responses import PlainTextResponse

    def busy(request: Request, error: Exception) -> Response:
        return PlainTextResponse("too many ask at once; try again in a moment\n", 429, {"retry-after": "1"})

    def late(request: Request, error: Exception) -> Response:
        return PlainTextResponse("this takes too long just now; try again in a minute\n", 503, {"retry-after": "60"})

    def missing(request: Request, error: Exception) -> Response:
        return PlainTextResponse("no such run, experiment or model here; go back to the list of runs\n", 404)

    def unreadable(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"the folder cannot be read just now: {error}\n", 503)

    return {Busy: busy, Late: late, Missing: missing, OSError: unreadable}


class Asked(NamedTuple):
    """A question to a model; tokens, temperature: of text that is generated."""

    model: str
    prompt: str
    tokens: int
    temperature: float


EXPECTED = '{"model": KEY, "prompt": TEXT}, and for text "tokens" from 1 on and "temperature" from 0 to 10'


def _asked(body: bytes) -> Asked | None:
    """The question in a body that may be anything; None where it is none."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict):
        return None
    found = Asked(
        asked.get("model", 0), asked.get("prompt", 0), asked.get("tokens", 128), asked.get("temperature", 0.8)
    )
    words = isinstance(found.model, str) and isinstance(found.prompt, str)
    numbers = type(found.tokens) is int and type(found.temperature) in (int, float)
    return found if words and numbers and found.tokens > 0 and 0 <= found.temperature <= 10 else None


def _source(views: Views, key: str) -> Path:
    """Where a run's model lies; raises Missing."""
    if key not in views.sources():
        raise Missing
    return views.index.look().runs[key]


def _json(content: object, status: int = 200) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


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
