"""Headless Chromium under a test's hands: mouse, keys and touch as a person gives them, over its own protocol."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import websocket

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
