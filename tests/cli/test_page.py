"""`gptlab page` as a process: the link, Ctrl-C, and what it refuses or warns of."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.cli.main import main

Capture = pytest.CaptureFixture[str]


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_link_is_served_until_ctrl_c_and_nothing_is_written(finished_run: Path) -> None:
    before = files(finished_run)
    command = [sys.executable, "-m", "gptlab", "page", str(finished_run), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            with urllib.request.urlopen(url, timeout=60) as answer:
                assert b"<bdi>run</bdi>" in answer.read()
            start, token = url.rstrip("/").rsplit("/", 1)
            assert len(token) >= 43
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"{start}/{token[:-1]}/", timeout=60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert err == f"the runs in {finished_run}, until Ctrl-C\n"
    assert files(finished_run) == before


SLOW = """
import sys, time
from gptlab.cli import runs as page

page._open_model = lambda source, options: time.sleep(600)
sys.exit(page.page(sys.argv[1:]))
"""


def test_ctrl_c_does_not_wait_for_a_model_that_is_being_opened(finished_run: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(finished_run), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            with urllib.request.urlopen(f"{url}lens", timeout=60) as answer:
                key = answer.read().split(b'<option value="')[1][:16].decode()
            question = urllib.request.Request(
                f"{url}read", json.dumps({"model": key, "prompt": "a"}).encode(), {"Content-Type": "application/json"}
            )
            stop = threading.Timer(1.0, process.send_signal, [signal.SIGINT])
            stop.start()
            with pytest.raises(urllib.error.HTTPError, match="503") as refused:
                urllib.request.urlopen(question, timeout=60)
            assert refused.value.read() == b"gptlab page has ended\n"
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert err == f"the runs in {finished_run}, until Ctrl-C\n"


def test_a_taken_port_is_said_in_a_line(tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["page", str(tmp_path), "--port", str(port)]) == 3
    assert capsys.readouterr().err == f"gptlab: --port {port} is taken; give another, or none for any that is free\n"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["/nowhere"], 2, "expected a folder of runs"),
        ([".", "--port", "-1"], 2, "expected a number from 0 to 65535"),
        ([".", "--model", "/nowhere"], 2, "expected a run, a checkpoint or a Hugging Face folder"),
        ([".", "--host", "192.0.2.1"], 3, "cannot be listened at"),
        ([".", "--host", "no such name"], 3, "expected a name or address of this machine"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(words: list[str], code: int, told: str, capsys: Capture) -> None:
    assert main(["page", *words]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err


def test_a_host_that_others_reach_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Not really listened at: the test stays on loopback."""
    from gptlab.page import app

    def listen_on_loopback(host: str, port: int, listen: Callable[..., socket.socket] = app.listen) -> socket.socket:
        return listen("127.0.0.1", port)

    monkeypatch.setattr(app, "listen", listen_on_loopback)
    monkeypatch.setattr(app, "serve", lambda app, listening, asked_to_stop: None)
    assert main(["page", str(tmp_path), "--host", "0.0.0.0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"http://{socket.gethostname()}:")
    assert "warning: 0.0.0.0 is open to other machines: whoever has or overhears the link can read these runs" in err
    assert main(["page", str(tmp_path)]) == 0
    assert "warning" not in capsys.readouterr().err
