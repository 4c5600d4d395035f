"""Pages for tests: served on loopback, taken apart, in headless Chromium, and hostile names. No tests here."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
import time
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import websocket

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


PATIENCE = 60.0
"""Seconds after which anything that does not happen is an error."""

KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}


class Browser:
    """One page of Chromium. messages: what its console said; requests: the addresses that it asked for."""

    def __init__(self, program: str, profile: Path) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._socket = websocket.create_connection(self._address(profile), PATIENCE, suppress_origin=True)
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _address(self, profile: Path) -> str:
        """Where the page listens, once Chromium has written it down."""
        file = profile / "DevToolsActivePort"
        wait(lambda: file.exists() and file.read_text().count("\n") >= 1)
        port = file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE) as answer:
            pages = [target for target in json.load(answer) if target["type"] == "page"]
        return pages[0]["webSocketDebuggerUrl"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()
        self.close()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its result; what happens meanwhile is written down."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv())
            if told.get("id") == self._number:
                assert "error" not in told, told
                return told["result"]
            self._note(told.get("method"), told.get("params", {}))

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str([argument.get("value") for argument in told["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(told["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(told["entry"]["text"])

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait for an expression to become true."""
        wait(lambda: self.value(expression))

    def arrives(self, expression: str) -> None:
        """Wait for a page of which an expression is true, with its style and scripts."""
        self.until(f"document.readyState === 'complete' && {expression}")

    def go(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.arrives(f"location.href === {json.dumps(url)}")

    def text(self, selector: str) -> str:
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def place(self, selector: str, share: float = 0.5) -> tuple[float, float]:
        """The point of an element's first line that lies at `share` of its width, once it is in view."""
        left, top, width, height = self.value(
            "(e => { e.scrollIntoView({block: 'center', inline: 'center'}); const r = e.getClientRects()[0];"
            f"return [r.left, r.top, r.width, r.height] }})(document.querySelector({json.dumps(selector)}))"
        )
        return left + share * width, top + height / 2

    def mouse(self, kind: str, at: tuple[float, float], **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **more)

    def hover(self, selector: str) -> None:
        self.mouse("mouseMoved", self.place(selector))

    def click(self, selector: str) -> None:
        self.drag(selector, [0.5])

    def drag(self, selector: str, shares: list[float]) -> None:
        """Press the button at the first of the shares of an element's width, and let go at the last."""
        points = [self.place(selector, share) for share in shares]
        button = {"button": "left", "buttons": 1, "clickCount": 1}
        self.mouse("mouseMoved", points[0])
        self.mouse("mousePressed", points[0], **button)
        for point in points[1:]:
            self.mouse("mouseMoved", point, **button)
        self.mouse("mouseReleased", points[-1], **{**button, "buttons": 0})

    def tap(self, selector: str) -> None:
        x, y = self.place(selector)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        for character in text:
            self.send("Input.dispatchKeyEvent", type="keyDown", text=character)
            self.send("Input.dispatchKeyEvent", type="keyUp")

    def key(self, name: str, modifiers: int = 0) -> None:
        """A key that writes nothing; modifiers: 2 is Ctrl."""
        for kind in ("rawKeyDown", "keyUp"):
            code = KEYS[name]
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                      modifiers=modifiers)  # fmt: skip

    def window(self, width: int, height: int = 900, *, dark: bool = False, touch: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, *, whole: bool = False) -> None:
        shown = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(b64decode(shown["data"]))


def wait(happened: Callable[[], Any]) -> None:
    """Wait for something; raises TimeoutError after PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)
