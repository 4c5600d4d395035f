"""The page over real HTTP: every rule of guard.py broken by itself, and clients and runs that are slow."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import TOKEN, Page, Served, wait

from gptlab.page import app, guard, run_index, views
from gptlab.page.guard import HEADERS, LARGEST_BODY, LONGEST_QUERY, RULES, AccessPolicy, Asked, Refused
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


QUESTION = b'{"model": "none", "prompt": "a"}'
"""It keeps to the rules, and is answered 404: no model has that key."""


def raw(served: Served, head: str, body: bytes = b"", *, patience: float = 60.0) -> int:
    """The status that a request is answered with; "HOST" in its head stands for the page's own."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=patience) as connection:
        connection.sendall(head.replace("HOST", served.host).replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return int(connection.recv(4096).split()[1])


ASKS = f"POST /{TOKEN}/read HTTP/1.1\nHost: HOST\nContent-Type: application/json"
BROKEN = [
    ("own_host", f"GET /{TOKEN}/ HTTP/1.1\nHost: evil.example", 403),
    ("own_host", f"GET /{TOKEN}/ HTTP/1.1\nHost: 127.0.0.1:1", 403),
    ("own_host", f"GET /{TOKEN}/ HTTP/1.1\nHost: 127.0.0.1.evil.example", 403),
    ("own_origin", f"GET /{TOKEN}/ HTTP/1.1\nHost: HOST\nOrigin: http://evil.example", 403),
    ("own_origin", f"GET /{TOKEN}/ HTTP/1.1\nHost: HOST\nOrigin: null", 403),
    ("own_origin", f"GET /{TOKEN}/ HTTP/1.1\nHost: HOST\nOrigin: http://127.0.0.1:1", 403),
    ("right_token", "GET /wrong/ HTTP/1.1\nHost: HOST", 403),
    ("right_token", f"GET /{TOKEN[:-1]}/ HTTP/1.1\nHost: HOST", 403),
    ("right_token", f"GET /{TOKEN}x/ HTTP/1.1\nHost: HOST", 403),
    ("unambiguous", f"GET /{TOKEN}/ HTTP/1.1\nHost: HOST\nOrigin: http://HOST\nOrigin: http://evil.example", 400),
    ("right_method", f"HEAD /{TOKEN}/ HTTP/1.1\nHost: HOST", 405),
    ("short_query", f"GET /{TOKEN}/?{'x' * (LONGEST_QUERY + 1)} HTTP/1.1\nHost: HOST", 414),
]


@pytest.mark.parametrize(("rule", "head", "status"), BROKEN)
def test_a_rule_refuses_what_all_others_let_through(
    rule: str, head: str, status: int, page: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert raw(page, head) == status
    monkeypatch.setattr(guard, "RULES", tuple(one for one in RULES if one.__name__ != rule))
    assert raw(page, head) == 200


def test_a_form_of_another_page_cannot_ask(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert page.post(QUESTION, Content_Type="text/plain").status == 415
    monkeypatch.setattr(guard, "RULES", tuple(one for one in RULES if one.__name__ != "of_json"))
    assert page.post(QUESTION, Content_Type="text/plain").status == 404


def test_no_token_is_no_answer_whatever_else_is_asked(page: Served) -> None:
    for path in ("/", "/lens", "/style.css", "/page.js", "/run?key=x", "//", f"/x/{TOKEN}/", f"/?{TOKEN}"):
        assert page.ask("GET", path, None, {}).status == 403
    assert page.ask("POST", "/read", QUESTION, {"Content-Type": "application/json"}).status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"])
def test_pages_are_only_got(method: str, page: Served) -> None:
    assert page.get(method=method, Content_Type="application/json").status == 405
    assert page.get("read").status == 405


def test_a_large_body_is_refused_before_it_is_read(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = f"{ASKS}\nContent-Length: {10 * 2**20}"
    assert raw(page, announced) == 413  # not a byte of it was sent
    assert raw(page, f"GET /{TOKEN}/ HTTP/1.1\nHost: HOST\nContent-Length: 1") == 413
    monkeypatch.setattr(guard, "RULES", tuple(one for one in RULES if one.__name__ != "small_body"))
    with pytest.raises(TimeoutError):
        raw(page, announced, patience=0.5)


def test_a_body_of_no_announced_length_is_counted(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    chunked, chunk = f"{ASKS}\nTransfer-Encoding: chunked", b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    assert raw(page, chunked, 3 * chunk) == 413
    assert raw(page, chunked, b"%x\r\n%s\r\n0\r\n\r\n" % (len(QUESTION), QUESTION)) == 404
    monkeypatch.setattr(guard, "LARGEST_BODY", 10 * LARGEST_BODY)
    assert raw(page, chunked, 3 * chunk + b"0\r\n\r\n") == 400  # it was read, and is no JSON


def test_every_answer_has_the_headers(page: Served) -> None:
    answers = [page.get(), page.get("page.js"), page.get("nothing"), page.get(token="wrong"), page.post(QUESTION)]
    assert [answer.status for answer in answers] == [200, 200, 404, 403, 404]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
        assert "server" not in answer.headers
        assert "set-cookie" not in answer.headers
    assert "unsafe" not in HEADERS["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    ["../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "page.js/../../secret.txt", "run?key=../secret",
     "run?key=%2e%2e%2f", "compare?experiment=..", "compare?run=..&run=/", "//secret.txt", "static/page.js",
     "run?key=%00", "run?key=%ff"],
)  # fmt: skip
def test_no_path_leads_out_of_the_folder(path: str, page: Served) -> None:
    answer = page.get(path)
    assert answer.status == 404
    assert b"the secret" not in answer.body


def test_a_link_to_elsewhere_is_not_followed(served: Serve, run: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(run)
    assert b"None yet" in served(tmp_path / "inside").get().body


def test_a_thousand_requests_at_once_leave_the_page_as_it_was(page: Served) -> None:
    before = page.get().body
    found: Counter[int] = Counter()

    def ask(number: int) -> None:
        for _ in range(10):
            heads = (f"GET /{TOKEN}/ HTTP/1.1\nHost: HOST", "GET / HTTP/1.1\nHost: HOST", f"{ASKS}\nContent-Length: 9")
            found[raw(page, heads[number % 3], b"[[[[[[[[[" if number % 3 == 2 else b"")] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.total() == 1000
    assert found.keys() <= {200, 400, 403, 429, 503}
    assert found[403] > 0
    assert page.get().body == before


def test_more_than_may_wait_for_a_model_are_told_to_come_again(
    served: Serve, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def read(self: object, source: Path, prompt: str) -> dict[str, str]:
        begun.set()
        assert go_on.wait(60)
        return {"prompt": prompt}

    monkeypatch.setattr(app.Models, "read", read)
    monkeypatch.setattr(app, "PROMPTS_WAITING", 2)
    page = served(run)
    key = page.get("lens").body.split(b'<option value="')[1][:16].decode()
    statuses: list[int] = []
    question = json.dumps({"model": key, "prompt": "a"}).encode()
    threads = [threading.Thread(target=lambda: statuses.append(page.post(question).status)) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    wait(lambda: statuses.count(429) == 4)  # the others wait for the model
    assert page.get().status == 200
    go_on.set()
    for thread in threads:
        thread.join()
    assert Counter(statuses) == {200: 2, 429: 4}


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b"null", b'{"model": 1, "prompt": "a"}', b'{"model": "a"}',
                                  b"[" * 60_000, b"\xff", b'{"model": "\\ud800", "prompt": ""}'])  # fmt: skip
def test_a_question_that_is_none_is_refused(body: bytes, page: Served) -> None:
    assert page.post(body).status in (400, 404)
    assert page.get().status == 200


@pytest.mark.parametrize(
    ("bound", "host", "ours"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "LocalHost:8000", True),
        ("127.0.0.1", "localhost", False),
        ("127.0.0.1", "192.168.0.7:8000", False),
        ("127.0.0.1", "evil.example:8000", False),
        ("::1", "[::1]:8000", True),
        ("::1", "[::1]", False),
        ("127.0.0.1", "", False),
        ("0.0.0.0", "192.168.0.7:8000", True),
        ("0.0.0.0", "evil.example:8000", False),
        ("box.example", "box.example:8000", True),
    ],
)
def test_whose_name_a_host_is(bound: str, host: str, ours: bool) -> None:
    asked = Asked("GET", "/t/", b"", (("host", host),))
    if ours:
        guard.own_host(AccessPolicy(bound, 8000, "t"), asked)
    else:
        with pytest.raises(Refused):
            guard.own_host(AccessPolicy(bound, 8000, "t"), asked)
