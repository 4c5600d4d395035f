"""Reports in a real browser: the policy lets the style through, no script error, no request, no sideways scrolling.

All of Chromium's traffic goes through a proxy of the test's own, which knows three pages and writes down the rest.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pages import ARM, HOSTILE

from gptlab.analysis.load import read
from gptlab.analysis.report.comparison import write_comparison
from gptlab.analysis.report.run import write_run

HOST = "http://page.test"

HARNESS = """<!doctype html><title>harness</title><link rel=icon href=data:,><pre id=found></pre><script>
const names = ["comparison", "run", "guest"], widths = [390, 1200], found = {};
let waiting = names.length * widths.length;
for (const name of names) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.width = width;
  frame.onload = () => {
    const page = frame.contentDocument, style = element => frame.contentWindow.getComputedStyle(element);
    found[name + width] = {
      needs: page.documentElement.scrollWidth, window: frame.contentWindow.innerWidth,
      background: style(page.body).backgroundColor,
      line: [...page.querySelectorAll("svg path[stroke^='var']")].map(path => style(path).stroke)[0],
      scripts: page.scripts.length, images: page.images.length, alerted: frame.contentWindow.alerted === true,
    };
    if (--waiting === 0) document.getElementById("found").textContent = JSON.stringify(found);
  };
  frame.src = "/" + name + ".html";
  document.body.append(frame);
}
</script>"""
"""It loads each page into frames as wide as a phone and as a desk's screen, and measures them."""

GUEST = (
    "<!doctype html><p>x<img src=http://elsewhere.test/x.png><script>alerted = true; throw 'a script error'</script>"
)
"""A page that does all that a report must not do: what the test would see of it."""

OWN = re.compile(r"(http://)?(clients2|accounts|update|optimizationguide-pa)\.google(apis)?\.com[:/]")
"""What Chromium asks for by itself, whatever page it shows: the time, an account, updates."""


@pytest.fixture
def site(hostile_experiment: Path) -> Iterator[tuple[int, list[str]]]:
    """A proxy's port, and the requests it met for anything but the pages."""
    outcomes = read([hostile_experiment])
    comparison = write_comparison(outcomes, outcomes.verdicts(), hostile_experiment / "report.html")
    run = write_run(hostile_experiment / ARM / "seed_1")
    content = {f"{HOST}/harness.html": HARNESS.encode(), f"{HOST}/guest.html": GUEST.encode()}
    content |= {f"{HOST}/comparison.html": comparison.read_bytes(), f"{HOST}/run.html": run.read_bytes()}
    strange: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in content:
                strange.append(self.path)
            self.send_response(200 if self.path in content else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content.get(self.path, b""))

        def do_CONNECT(self) -> None:
            strange.append(self.path)
            self.send_error(403)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, strange
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(
    site: tuple[int, list[str]], requires_program: Callable[[str], str], tmp_path: Path
) -> Callable[[str], tuple[str, list[str], list[str]]]:
    """`visit(name)` opens a page: its document when it is loaded, console messages, and requests for other things."""
    port, strange = site

    def opened(name: str) -> tuple[str, list[str], list[str]]:
        command = [
            requires_program("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--proxy-server=127.0.0.1:{port}", "--enable-logging=stderr",
            "--virtual-time-budget=20000", "--window-size=1300,900", "--dump-dom", f"{HOST}/{name}.html",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=300, check=True)
        log = done.stderr.decode(errors="replace")
        messages = [line for line in log.splitlines() if "CONSOLE" in line]
        return done.stdout.decode(errors="replace"), messages, [url for url in strange if not OWN.match(url)]

    return opened


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_a_report_opens_without_an_error_or_a_request(name: str, visit: Any) -> None:
    document, messages, requests = visit(name)
    assert messages == []
    assert requests == []
    text = re.sub(r"<[^>]*>", "", document)
    assert HOSTILE[2].replace("&", "&amp;") in text
    if name == "comparison":
        assert re.search(r'<p class="verdict">worse</p>', document)


def test_reports_fit_a_phone_and_a_screen_and_show_their_colours(visit: Any) -> None:
    document, messages, requests = visit("harness")
    found = json.loads(re.findall(r'<pre id="found">(.*?)</pre>', document)[0])
    for name in ("comparison390", "comparison1200", "run390", "run1200"):
        page = found[name]
        assert page["needs"] <= page["window"] == int(re.sub(r"\D", "", name))
        assert page["background"] != "rgba(0, 0, 0, 0)"  # the policy's hash let the style sheet through
        assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", page["line"])  # the plot's variable has a colour
        assert (page["scripts"], page["images"], page["alerted"]) == (0, 0, False)
    # what a page looks like that keeps to none of this: the test would have seen it
    assert found["guest390"]["alerted"]
    assert any("a script error" in message for message in messages)
    assert "http://elsewhere.test/x.png" in requests
