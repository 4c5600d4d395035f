"""Clients that are slow, and runs that are slow to draw: neither keeps the page from anyone else."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import wait
from pages import Page
from serving import TOKEN, Served

from gptlab.page import app, run_index, views
from gptlab.page.run_index import Cache

Serve = Callable[..., Served]


def connected(page: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", page.port), timeout=30)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    found = b""
    try:
        while more := connection.recv(65536):
            found += more
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize(
    "head", [b"", b"G", f"GET /{TOKEN}/ HTTP/1.1\r\nHost: ".encode(), f"GET /{TOKEN}/ HTTP/1.1\r\nX: y\r\n".encode()]
)
def test_a_head_that_does_not_end_is_not_waited_for(
    head: bytes, served: Serve, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HEAD_SECONDS", 1.0)
    page = served(run)
    with connected(page) as connection:
        connection.sendall(head)
        begun, sent, answer = time.monotonic(), 0, b""
        connection.settimeout(0.2)
        while time.monotonic() - begun < 20:  # a byte now and then does not make it last
            try:
                answer = connection.recv(4096)
                break
            except TimeoutError:
                connection.sendall(b"x" * bool(head))
                sent += 1
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert sent >= 2
    assert page.get().status == 200


def test_a_second_request_on_a_connection_is_not_waited_for_either(
    served: Serve, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HEAD_SECONDS", 1.0)
    page = served(run)
    with connected(page) as connection:
        connection.sendall(f"GET /{TOKEN}/style.css HTTP/1.1\r\nHost: {page.host}\r\n\r\nGET /".encode())
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in answer


def test_a_body_that_does_not_come_is_not_waited_for(served: Serve, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ANSWER_SECONDS", 1.0)
    page = served(run)
    with connected(page) as connection:
        head = f"POST /{TOKEN}/read HTTP/1.1\r\nHost: {page.host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert all_of(connection) == b""
    assert page.get().status == 200


def test_more_connections_than_may_be_are_closed_and_none_stays_half_open(
    served: Serve, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MOST_CONNECTIONS", 5)
    monkeypatch.setattr(app, "HEAD_SECONDS", 4.0)
    page = served(run)
    idle = [connected(page) for _ in range(5)]
    time.sleep(0.3)
    try:
        with connected(page) as connection:
            assert all_of(connection).startswith(b"HTTP/1.1 503 ")
        assert all(all_of(connection).startswith(b"HTTP/1.1 408 ") for connection in idle)
        assert page.get().status == 200
    finally:
        for connection in idle:
            connection.close()


def run_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"options": {"seed": 1, **options}}))
    (folder / "environment.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def links(page: Page, start: str) -> list[str]:
    return [value for value in page.values("href") if value.startswith(start)]


def of_run(page: Served, name: str) -> str:
    """The link to a run, as the list has it."""
    wait(lambda: name in page.get().body.decode())
    source = page.get().body.decode()
    return next(link for link in links(Page(source), "run?") if f'{link}"><bdi>{name}</bdi>' in source)


VAL = {"step": 1, "kind": "val", "loss": 2.5}


def test_no_request_waits_for_a_page_that_is_slow_to_draw(
    served: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("slow", "quick"):
        run_of(tmp_path / name, [VAL])
    drawing, enough = threading.Event(), threading.Event()
    content = views.run.content

    def slow(found: Any, history: Any) -> dict[str, Any]:
        if found.path.name == "slow":
            drawing.set()
            assert enough.wait(60)
        return content(found, history)

    monkeypatch.setattr(views.run, "content", slow)
    page = served(tmp_path)
    links_of = {name: of_run(page, name) for name in ("slow", "quick")}
    statuses: list[int] = []
    asking = [threading.Thread(target=lambda: statuses.append(page.get(links_of["slow"]).status)) for _ in range(3)]
    for thread in asking:
        thread.start()
    try:
        assert drawing.wait(60)
        assert page.get(links_of["quick"]).status == 200
        assert page.get().status == 200
        assert statuses == []
    finally:
        enough.set()
    for thread in asking:
        thread.join()
    assert statuses == [200] * 3


def test_a_run_that_takes_too_long_is_said_to_in_a_line(
    served: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"step": n, "kind": "train", "loss": 2.0, "tokens": n} for n in range(1, 20_000)]
    run_of(tmp_path / "long", rows)
    run_of(tmp_path / "short", [VAL])
    monkeypatch.setattr(views, "DRAWING_SECONDS", 0.02)
    page = served(tmp_path)
    answer = page.get(of_run(page, "long"))
    assert answer.status == 503
    assert "metrics.jsonl takes too long to read at line" in Page(answer.body.decode()).text
    assert page.get(of_run(page, "short")).status == 200


def test_the_list_does_not_wait_for_a_run_that_takes_long_to_read(
    served: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("slow", "quick"):
        run_of(tmp_path / name, [VAL])
    enough, listed = threading.Event(), run_index.listed

    def slow(root: Path, path: Path, until: float) -> Any:
        assert path.name != "slow" or enough.wait(60)
        return listed(root, path, until)

    monkeypatch.setattr(run_index, "listed", slow)
    monkeypatch.setattr(run_index, "LIST_SECONDS", 0.5)
    page = served(tmp_path)
    first = page.get()
    assert b'data-every="2"' in first.body  # it is asked for again soon
    assert b"unread" in first.body
    assert b"2.5000" in first.body  # of the other one
    enough.set()
    wait(lambda: b"unread" not in page.get().body)
    assert page.get().body.count(b"2.5000") == 3  # of both, and their mean


def test_of_a_thousand_blocks_and_of_many_samples_some_are_drawn(served: Serve, tmp_path: Path) -> None:
    blocks = 2000
    val = {**VAL, "block_loss": [3.0 + j / blocks for j in range(blocks)], "block_confidence": [0.5] * blocks}
    sample = {"kind": "sample", "prompt": "p", "text": "t", "written": ["w"] * 999, "blocks": [[["b", 0.5]] * 9] * 999}
    rows = [{**val, "step": n} for n in range(1, 40)] + [{**sample, "step": n} for n in range(40, 70)]
    run_of(tmp_path / "deep", rows, n_layer=blocks)
    run_of(tmp_path / "plain", [VAL])
    page = served(tmp_path)
    assert page.get(of_run(page, "plain")).status == 200  # what is loaded for the first page is no part of it
    link, begun = of_run(page, "deep"), time.process_time()
    body = page.get(link).body.decode()
    assert time.process_time() - begun < 20  # two on a machine with nothing else to do; every block drawn: minutes
    assert len(body) < 5_000_000
    assert f"block {blocks}" in body, "TEXT: " + " ".join(re.sub("<[^>]*>", " ", body).split())[-600:]
    assert "The newest 8 of 30." in body
    assert "step 69" in body
    assert "step 41" not in body


def test_threads_that_ask_for_one_result_make_it_once() -> None:
    cache, made, together = Cache(4), [], threading.Barrier(8)

    def make() -> int:
        time.sleep(0.05)
        made.append(1)
        return len(made)

    found: list[int] = []

    def ask() -> None:
        together.wait()
        found.append(cache.get("key", "mark", make)[0])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


def test_a_result_that_cannot_be_made_leaves_nothing_behind() -> None:
    cache = Cache(4)
    with pytest.raises(ZeroDivisionError):
        cache.get("key", "mark", lambda: 1 // 0)
    assert cache.get("key", "mark", lambda: 5) == (5, "mark")
