"""Run folders as damage or ill will would leave them, made from a real one, and every command that reads a run.

What tests/security/test_fuzz.py and benchmarks/hostile.py share. No assertions.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import numpy as np
from mutations import other_json, other_lines  # pyright: ignore[reportMissingImports]
from readers import sign  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main
from gptlab.cli.model import open_model

NEWEST = "checkpoints/step_00000006"
MISSING = object()
DEEP: Any = 0
for _ in range(60):
    DEEP = [DEEP]
VALUES: dict[str, Any] = {
    "missing": MISSING, "null": None, "text": "x", "five": 5, "negative": -1, "zero": 0, "half": 0.5,
    "beyond 64 bits": 10**30, "int of 400 digits": 10**400, "2**62": 2**62, "denormal": 1e-320, "1e308": 1e308,
    "-1e308": -1e308, "NaN": float("nan"), "Infinity": float("inf"), "true": True, "empty list": [], "empty": {},
    "nested": DEEP, "3 MB of text": "x" * 3_000_000, "100,000 numbers": [1.5] * 100_000,
    "100,000 texts": ["a"] * 100_000, "control characters": "\x1b[2J\u202e\0\r\ud800", "empty text": "",
    "path": "../../../etc/passwd", "name too long": "y" * 4000, "objects": [{"a": 1}, None, "x"],
}  # fmt: skip


@dataclass(frozen=True)
class Hostile:
    """A way to spoil a run: its name and what it does to the folder."""

    name: str
    spoil: Callable[[Path], object]


def _edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the value of a JSON file; a checkpoint's is signed anew, as whoever wrote it would."""

    def spoil(run: Path) -> None:
        path = run / file
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        if "checkpoints" in file and not file.endswith("MANIFEST.json"):
            sign(path.parent)

    return spoil


def _edit_rows(kind: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [change(row) if row["kind"] == kind else row for row in rows]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return spoil


def _put(keys: tuple[str, ...], value: Any) -> Callable[[Any], Any]:
    """The object with another value under its keys, one within the other."""

    def change(content: Any) -> Any:
        if not keys:
            return value
        inner = dict(content)
        if value is MISSING and len(keys) == 1:
            inner.pop(keys[0], None)
        else:
            inner[keys[0]] = _put(keys[1:], value)(inner.get(keys[0], {}))
        return inner

    return change


def _paths(content: Any, depth: int = 3) -> Iterator[tuple[str, ...]]:
    """Every key of an object, and of those within it."""
    for key, inner in content.items() if isinstance(content, dict) and depth else ():
        yield (key,)
        yield from ((key, *rest) for rest in _paths(inner, depth - 1))


def _write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / file).write_bytes(content)


def _replace(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """The file, or folder, gone, and something else in its place."""

    def spoil(run: Path) -> None:
        path = run / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return spoil


def _truncated(file: str) -> Callable[[Path], None]:
    return lambda run: os.truncate(run / file, (run / file).stat().st_size // 2)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def _of_files() -> Iterator[Hostile]:
    """What stands in a file's place, for every file of a run."""
    kinds: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "empty": Path.touch,
        "a folder": Path.mkdir,
        "a pipe": os.mkfifo,
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "a link to another's file": lambda path: path.symlink_to("/etc/passwd"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a terabyte of nothing": _sparse,
        "no text": lambda path: path.write_bytes(bytes(range(256)) * 9),
        "nested without end": lambda path: path.write_text("[" * 100_000),
        "UTF-16": lambda path: path.write_text('{"step": 1}\n', encoding="utf-16"),
        "an empty object": lambda path: path.write_text("{}\n"),
        "a list": lambda path: path.write_text("[]\n"),
    }
    files = ("config.json", "environment.json", "metrics.jsonl", f"{NEWEST}/state.json", f"{NEWEST}/MANIFEST.json",
             f"{NEWEST}/model.safetensors", f"{NEWEST}/optimizer.safetensors", "log.txt", "checkpoints")  # fmt: skip
    for file in files:
        for kind, make in kinds.items():
            if file != "checkpoints" or kind != "a folder":
                yield Hostile(f"{file}: {kind}", _replace(file, make))
        if file != "checkpoints":
            yield Hostile(f"{file}: cut in half", _truncated(file))


def _of_rows() -> Iterator[Hostile]:
    """What single fields do not show: rows as wholes, and fields that do not fit each other."""
    val = {"step": 6, "kind": "val", "loss": 3.0}
    huge = json.dumps({**val, "block_loss": [4.5] * 100_000, "block_confidence": [0.5] * 100_000}).encode() + b"\n"
    sample = {"step": 6, "kind": "sample", "prompt": "p", "text": "t", "tokens": [1] * 9000, "written": ["w"] * 9000,
              "blocks": [[["b", 0.5]] * 2] * 9000}  # fmt: skip
    contents = {
        "validations of 100,000 blocks": huge * 20,
        "validations of as many blocks as may be": json.dumps({**val, "block_loss": [4.5] * 10_000}).encode() + b"\n",
        "long samples": (json.dumps(sample).encode() + b"\n") * 20,
        "a row of 50 MB": b'{"step": 1, "kind": "val", "loss": 1, "x": "' + b"x" * 50_000_000 + b'"}\n',
        "100,000 rows": b"".join(
            json.dumps({"step": n, "kind": "val", "loss": 2.0, "block_loss": [2.0, 2.0]}).encode() + b"\n"
            for n in range(100_000)
        ),
        "a key twice": b'{"step": 1, "kind": "val", "loss": 1.0, "loss": 2.0}\n',
        "steps that fall": b'{"step": 9, "kind": "val", "loss": 1.0}\n{"step": 1, "kind": "val", "loss": 2.0}\n',
        "tokens that fall": b"".join(
            json.dumps({"step": n, "kind": "train", "tokens": t, "tokens_per_second": 1.0}).encode() + b"\n"
            for n, t in enumerate((9, 1))
        ),
        "no line end": b'{"step": 1, "kind": "val", "loss": 1.0}',
        "kinds that nobody knows": b'{"step": 1, "kind": "other", "loss": "x"}\n',
        "events alone": b'{"step": 1, "kind": "event", "event": "finished"}\n' * 1000,
        "speed without tokens": b'{"step": 1, "kind": "train", "tokens_per_second": 10}\n',
        "time without an end": b'{"step": 1, "kind": "train", "tokens": 5, "tokens_per_second": 1e-90, "loss": 1}\n',
        "losses at the ends": b"".join(
            json.dumps({"step": n, "kind": kind, "loss": loss, "block_loss": [loss, loss]}).encode() + b"\n"
            for n, loss in enumerate((1e99, -1e99, 1e-99, 0.0), 1) for kind in ("train", "val")
        ) + b'{"step": 4, "kind": "event", "event": "finished"}\n',
    }  # fmt: skip
    for name, content in contents.items():
        yield Hostile(f"metrics.jsonl: {name}", _write("metrics.jsonl", content))


def _of_checkpoints() -> Iterator[Hostile]:
    """Checkpoints that whoever signs them could make."""

    def tensors(file: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
        def spoil(run: Path) -> None:
            from safetensors.numpy import load_file, save_file

            path = run / NEWEST / file
            save_file(change(load_file(path)), path)
            sign(path.parent)

        return spoil

    def first(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda found: {**found, (name := min(found)): change(found[name])}

    for file in ("model.safetensors", "optimizer.safetensors"):
        yield Hostile(f"{file}: one tensor missing", tensors(file, lambda found: dict(islice(found.items(), 1, None))))
        yield Hostile(f"{file}: one tensor more", tensors(file, lambda found: {**found, "x": np.zeros(3, "f")}))
        yield Hostile(f"{file}: another shape", tensors(file, first(lambda t: np.zeros((3, 5), "f"))))
        yield Hostile(f"{file}: another type", tensors(file, first(lambda t: t.astype("i4"))))
        yield Hostile(f"{file}: not finite", tensors(file, first(lambda t: np.full_like(t, np.nan))))
    yield Hostile("checkpoints: of another step", lambda run: (run / NEWEST).rename(run / "checkpoints/step_99999999"))
    yield Hostile("checkpoints: none", lambda run: shutil.rmtree(run / "checkpoints"))
    yield Hostile("checkpoints: an empty one", lambda run: (run / "checkpoints/step_00000009").mkdir())
    yield Hostile("checkpoints: a link", lambda run: (run / "checkpoints/step_00000009").symlink_to("/"))


def _of_fields(run: Path, each: int) -> Iterator[Hostile]:
    """Every field of every file with `each` of VALUES, and those that once brought a command down."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = {row["kind"]: {} for row in rows}
    for row in rows:
        kinds[row["kind"]] |= row
    values = cycle(VALUES.items())
    files = ("config.json", "environment.json", f"{NEWEST}/state.json", f"{NEWEST}/MANIFEST.json")
    for file in files:
        for keys in _paths(json.loads((run / file).read_text())):
            for name, value in islice(values, each):
                yield Hostile(f"{file}: {'.'.join(keys)} {name}", _edit(file, _put(keys, value)))
    for kind, fields in kinds.items():
        for key in fields:
            for name, value in islice(values, each):
                yield Hostile(f"metrics.jsonl: {key} of {kind} {name}", _edit_rows(kind, _put((key,), value)))
    known: list[tuple[str, str, Any]] = [
        ("options", "tokenizer", "words"), ("options", "n_embd", 0), ("options", "also", 5), ("options", "also", [5]),
        ("options", "n_layer", 100_000), ("options", "share_blocks", 7), ("options", "total_batch_tokens", 0),
        ("data", "train", 5), ("data", "train", [5]), ("", "data", MISSING), ("", "patch", "0" * 64),
        ("options", "preset", "no such preset"), ("options", "signal.layers", [99]), ("options", "data", "a\0b"),
    ]  # fmt: skip
    for table, key, value in known:
        keys = (table, key) if table else (key,)
        yield Hostile(f"config.json: {key} is {str(value)[:20]}", _edit("config.json", _put(keys, value)))
    for kind, key, value in (
        ("train", "grad_norm", "x"), ("sample", "prompt", MISSING), ("val", "loss", 1e-320), ("val", "block_loss", 1),
        ("val", "block_loss", [1.0]), ("sample", "blocks", [[["a"]]]), ("train", "tokens_per_second", 1e-320),
    ):  # fmt: skip
        yield Hostile(f"metrics.jsonl: {key} of {kind} is {str(value)[:20]}", _edit_rows(kind, _put((key,), value)))
    patched = _put(("options", "tokenizer"), "words")
    yield Hostile("config.json: a patch's own tokenizer", _edit("config.json", lambda c: patched({**c, "patch": "0"})))


def _drawn(count: int, seed: int) -> Iterator[Hostile]:
    """Values and bytes drawn anywhere."""
    for number in range(count):
        for file in ("config.json", "environment.json", "metrics.jsonl", f"{NEWEST}/state.json"):

            def spoil(run: Path, number: int = number, file: str = file) -> None:
                path, rng = run / file, Random(f"{seed} {number} {file}")
                path.write_bytes((other_lines if file.endswith("l") else other_json)(path.read_bytes(), rng))
                if "checkpoints" in file:
                    sign(path.parent)

            yield Hostile(f"{file}: drawn {number}", spoil)


def hostile_runs(run: Path, each: int = 2, drawn: int = 25, seed: int = 1) -> list[Hostile]:
    """All of them, for a real run of six steps with a signal, samples and checkpoints at 3 and 6."""
    return [*_of_fields(run, each), *_of_rows(), *_of_files(), *_of_checkpoints(), *_drawn(drawn, seed)]


def some(found: list[Hostile], count: int) -> list[Hostile]:
    """So many of them, the same ones every time and of every kind."""
    return sorted(found, key=lambda one: crc32(one.name.encode()))[:count]


@dataclass(frozen=True)
class Outcome:
    """code: a command's exit code or an answer's status; text: what it printed, or the page."""

    code: int
    text: str


def commands(bad: Path, good: Path, train: list[str]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Every command over a run, the last one of which resumes it. train: words of `gptlab train` for that.

    good: a sound run, which becomes one of the baseline, so that comparing the two comes to a verdict.
    """
    config = json.loads((good / "config.json").read_text())
    config["options"]["signal.name"] = "none"
    (good / "config.json").write_text(json.dumps(config))
    words = {
        "compare": ["compare", str(bad)],
        "compare with a good run": ["compare", str(good), str(bad), "--despite", "--json"],
        "compare to a report": ["compare", str(good), str(bad), "--despite", "--html", str(bad.parent / "r.html")],
        "runs": ["runs", str(bad.parent)],
        "runs --json": ["runs", str(bad.parent), "--json", "--sort", "loss"],
        "verify": ["verify", str(bad)],
        "verify --json": ["verify", str(bad), "--json"],
        "digest": ["digest", str(bad)],
    }
    for name, argv in words.items():
        yield name, lambda argv=argv: _run(argv)
    yield "report", lambda: _report(bad)
    yield from _page(bad.parent)
    yield "resume", lambda: _run(train)


ALLOWED = {"resume": {0, 2, 3, 4}, "runs": {0}, "runs --json": {0}, "report": {0}}
"""Exit codes; of other commands 0 and 3. Answers of the page are 200, of `read` and `write` 422 too."""


def allowed(name: str) -> set[int]:
    return {200, 304, 404, 422, 503} if name.startswith("page") else ALLOWED.get(name, {0, 3})


def _run(argv: list[str]) -> Outcome:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(argv)
    return Outcome(code, said.getvalue())


def _report(run: Path) -> Outcome:
    from gptlab.analysis.report import after_run

    return Outcome(0, after_run(run))


def _page(root: Path) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """The page over a folder of runs: its list, and what it links to."""
    from starlette.testclient import TestClient

    from gptlab.page.app import READ, WRITE, create_app
    from gptlab.page.guard import AccessPolicy

    policy = AccessPolicy("127.0.0.1", 80, "t", frozenset({READ, WRITE}))
    app, _ = create_app(root, None, lambda source: open_model(source, "cpu", "fp32", 1), policy)
    with TestClient(app, base_url="http://127.0.0.1/t") as client:

        def get(path: str) -> Outcome:
            answer = client.get(path)
            return Outcome(answer.status_code, answer.text)

        runs = get("/")
        keys = re.findall(r'href="run\?key=(\w+)"', runs.text)
        yield "page", lambda: runs
        for number, key in enumerate(keys):
            yield f"page run {number}", lambda key=key: get(f"/run?key={key}")
        yield "page compare", lambda: get("/compare?" + "&".join(f"run={key}" for key in keys))
        yield "page overlay", lambda: get("/overlay?" + "&".join(f"run={key}" for key in keys))
        yield "page lens", lambda: get("/lens")
        for number, key in enumerate(keys):
            for name, more in {"read": {}, "write": {"tokens": 8}}.items():

                def ask(name: str = name, key: str = key, more: dict[str, int] = more) -> Outcome:
                    answer = client.post(f"/{name}", json={"model": key, "prompt": "a", **more})
                    return Outcome(answer.status_code, answer.text)

                yield f"page {name} {number}", ask
