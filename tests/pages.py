"""Pages for tests: one that is served on loopback, one taken apart, and hostile names. No tests here."""

from __future__ import annotations

import http.client
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gptlab.cli.model import open_model
from gptlab.page.app import READ, WRITE, create_app, listen, serve
from gptlab.page.guard import AccessPolicy

IMAGE = "<img src=x onerror=alert(1)>"
ARM = "tried"
"""The arm of the hostile experiment: what a file may call an arm is checked where it is read."""
HOSTILE = (IMAGE, '"><script>alert(1)<!--', "$\\frac{1$ & 日本 {{ 7 * 7 }}", "'; }</style><b>")


class Page(HTMLParser):
    """tags: the elements; attributes: (element, name, value); text: all that is read; style: the style sheet."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = self.style = ""
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.style += data
        else:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


TOKEN = "the-token-of-the-test"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Served:
    """A served page. `get` and `ask` send what its own pages would, unless told otherwise."""

    port: int

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/{TOKEN}/"

    def get(self, path: str = "", *, token: str = TOKEN, method: str = "GET", **headers: str) -> Answer:
        return self.ask(method, f"/{token}/{path}", None, headers)

    def post(self, body: bytes, path: str = "read", **headers: str) -> Answer:
        return self.ask("POST", f"/{TOKEN}/{path}", body, {"Content_Type": "application/json", **headers})

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()


@pytest.fixture(scope="session")
def served() -> Iterator[Callable[..., Served]]:
    """`served(root, model=None)` serves what lies below a folder until the tests have ended."""
    ended, threads = threading.Event(), []

    def start(root: Path, model: Path | None = None) -> Served:
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        policy = AccessPolicy("127.0.0.1", port, TOKEN, frozenset({READ, WRITE}))
        opened = partial(open_model, device="cpu", dtype="fp32", threads=1)
        app, _ = create_app(root, str(model) if model else None, opened, policy)
        thread = threading.Thread(target=serve, args=(app, listening, ended.is_set))
        thread.start()
        threads.append((thread, listening))
        return Served(port)

    yield start
    ended.set()
    for thread, listening in threads:
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def page(served: Callable[..., Served], finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A page over a folder with a finished run, "one"; beside the folder lies secret.txt."""
    outside = tmp_path_factory.mktemp("page")
    (outside / "secret.txt").write_text("the secret")
    shutil.copytree(finished_run, outside / "runs" / "one")
    return served(outside / "runs")
