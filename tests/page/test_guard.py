"""The rules of guard.py over real HTTP. Each is broken by a request that keeps to all the others.

That a refusal is its own rule's is shown by taking that rule out: then the same request is answered.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import wait
from serving import TOKEN, Served

from gptlab.page import app, guard
from gptlab.page.guard import HEADERS, LARGEST_BODY, LONGEST_QUERY, RULES, AccessPolicy, Asked, Refused

Serve = Callable[..., Served]

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
