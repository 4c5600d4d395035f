"""Ideas and commands that fail in every way: one clear line, the right exit code, nothing left, a whole ledger."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_lab import Run, Site  # pyright: ignore[reportMissingImports]

from gptlab.judge.lab import Ledger

COMMANDS = {
    "prints no metric": ("print('val_los: 1')", 13, "no metric"),
    "prints nothing": ("", 13, "printed nothing"),
    "prints NaN": ("print('val_loss: nan')", 4, "nan"),
    "prints NaN after numbers": ("print('val_loss: 1.0'); print('val_loss: nan')", 4, "nan"),
    "prints infinity": ("print('val_loss: inf')", 4, "inf"),
    "crashes": ("raise RuntimeError('out of memory')", 13, "RuntimeError: out of memory"),
    "crashes after its metric": ("print('val_loss: 1.0'); raise SystemExit(7)", 13, "exit code 7"),
    "kills itself": ("import os; os.kill(os.getpid(), 9)", 13, "SIGKILL"),
    "hangs": ("import time; print('hm', flush=True); time.sleep(1000)", 13, "time limit"),
    "hangs and hears nothing": (
        "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(1000)", 13, "time limit"
    ),
    "closes its output and hangs": ("import os, time; os.close(1); os.close(2); time.sleep(1000)", 13, "time limit"),
    "writes a large file": ("f = open('x', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))", 13, "x"),
    "writes many files": (
        "import time\nfor k in range(999):\n    open(f'x{k}', 'wb').write(bytes(1 << 20)); time.sleep(0.02)", 13, "disk"
    ),
    "prints without end": ("while True: print('x' * 1000)", 13, "time limit"),
    "prints bytes that are no text": ("import os; os.write(1, bytes(range(256)))", 13, "no metric"),
}  # fmt: skip


@pytest.mark.usefixtures("known_site")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_fails_ends_in_a_verdict(name: str, site: Site, run: Run) -> None:
    body, expected, reason = COMMANDS[name]
    lab = site.lab / "lab.toml"
    limit = 1 if reason == "time limit" else 5
    lab.write_text(lab.read_text().replace("time_limit = 20", f"time_limit = {limit}"))
    whole = f"if rate > 0.5:\n    exec({body!r})\n    raise SystemExit\n"
    idea = site.edit("rate = 0.1\n", f"rate = 0.9\n{whole}")
    code, found = run(idea)
    assert code == expected, found
    assert reason in found["reason"], found
    assert found["verdict"] == {13: "broken", 4: "diverged"}[expected]
    assert found["level_spent"] == 0
    assert "\n" not in found["reason"]
    assert len(Ledger(site.lab).read()[0]) == 1
    assert sum(path.stat().st_size for path in site.lab.rglob("*") if path.is_file()) < 12e6
    assert not list(site.lab.rglob("work"))


FORKS = {
    "a child": "subprocess.Popen(sleep)",
    "a child in a session of its own": "subprocess.Popen(sleep, start_new_session=True)",
    "a daemon, forked twice": "subprocess.Popen(['setsid', 'sh', '-c', 'setsid sleep 1000 & '])",
    "a child without an environment": "subprocess.Popen(sleep, start_new_session=True, env={}, close_fds=True)",
}


@pytest.mark.usefixtures("known_site")
@pytest.mark.parametrize("name", FORKS)
@pytest.mark.parametrize("hangs", [False, True])
def test_children_that_are_left_are_ended(name: str, hangs: bool, site: Site, run: Run) -> None:
    before = sleepers()
    head, seconds = "import subprocess, time\nsleep = ['/bin/sleep', '1000']", 1000 if hangs else 0.2
    text = f"{head}\n{FORKS[name]}\ntime.sleep({seconds})\n"
    lab = site.lab / "lab.toml"
    if hangs:
        lab.write_text(lab.read_text().replace("time_limit = 20", "time_limit = 2"))
    idea = site.edit("rate = 0.1\n", f"rate = -0.9\n{text}")
    code, found = run(idea)
    assert code == (13 if hangs else 10), found
    assert sleepers() <= before


def sleepers() -> set[int]:
    """Processes of this user that sleep 1000 seconds."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().endswith(b"sleep\0001000\0"):
                found.add(int(folder.name))
        except OSError:
            pass
    return found


def new_file(name: str, mode: str = "100644", line: str = "x") -> str:
    return f"diff --git a/{name} b/{name}\nnew file mode {mode}\n--- /dev/null\n+++ b/{name}\n@@ -0,0 +1 @@\n+{line}\n"


BINARY = base64.b85encode(b"x").decode()
OUTSIDE = {
    "what evaluates": (
        "--- a/evaluate.py\n+++ b/evaluate.py\n@@ -1,2 +1,2 @@\n def report(loss):\n"
        '-    print(f"step 10\\nval_loss: {loss:.6f}", flush=True)\n+    print("val_loss: 0.1")\n', "evaluate.py"),
    "a denied file in an allowed folder": (
        "--- a/model/data.py\n+++ b/model/data.py\n@@ -1 +1 @@\n-SPLIT = 0.9\n+SPLIT = 0.1\n", "model/data.py"),
    "a new file elsewhere": (new_file("random.py"), "random.py"),
    "a parent folder": (new_file("../escaped.py"), "../escaped.py"),
    "a parent folder from within": (new_file("model/../../escaped.py"), "escaped.py"),
    "an absolute path": ("--- /dev/null\n+++ /tmp/escaped.py\n@@ -0,0 +1 @@\n+x\n", "escaped.py"),
    "git's own folder": (new_file(".git/hooks/post-checkout"), ".git/hooks"),
    "a link": (new_file("model/link", "120000", "/etc/passwd"), "model/link"),
    "a file through a link": (
        new_file("model/way", "120000", "..") + new_file("model/way/escaped.py"), "model/way"),
    "renaming a denied file": (
        "diff --git a/evaluate.py b/model/evaluate.py\nsimilarity index 100%\nrename from evaluate.py\n"
        "rename to model/evaluate.py\n", "evaluate.py"),
    "copying onto an allowed name and deleting": (
        "diff --git a/model/data.py b/model/data.py\ndeleted file mode 100644\n--- a/model/data.py\n+++ /dev/null\n"
        "@@ -1 +0,0 @@\n-SPLIT = 0.9\n", "model/data.py"),
    "a mode": ("diff --git a/evaluate.py b/evaluate.py\nold mode 100644\nnew mode 100755\n", "evaluate.py"),
    "an allowed file that is no text": (new_file("model/x.py", line="a\0b"), "model/x.py"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_diff_outside_of_the_allowed_paths_is_refused_with_the_path_named(name: str, site: Site, run: Run) -> None:
    text, path = OUTSIDE[name]
    before = {p: p.read_bytes() for p in site.repo.rglob("*") if p.is_file()}
    code, found = run(site.diff(text))
    assert (code, found["verdict"]) == (13, "broken"), found
    assert path in found["reason"], found
    assert {p: p.read_bytes() for p in site.repo.rglob("*") if p.is_file()} == before
    assert not list(site.root.rglob("*escaped*"))
    assert not Path("/tmp/escaped.py").exists()
    assert not (site.lab / "cells").exists()  # nothing was run
    assert len(Ledger(site.lab).read()[0]) == 1


@pytest.mark.parametrize("text", ["", "no diff\n", "--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n-x\n+y\n", "\0\1\2"])
def test_what_is_no_diff_or_does_not_apply_is_broken(text: str, site: Site, run: Run) -> None:
    code, found = run(site.diff(text))
    assert code == 13, found
    assert "idea.diff" in found["reason"]


def test_a_baseline_that_fails_is_no_verdict_and_is_tried_again_once_it_is_mended(site: Site, run: Run) -> None:
    lab = site.lab / "lab.toml"
    good = lab.read_text()
    lab.write_text(good.replace("time_limit = 20", "time_limit = 0.01"))
    idea = site.edit("rate = 0.1", "rate = -0.9")
    code, found = run(idea)
    assert code == 3
    assert "the baseline itself is broken" in found["error"]
    assert not (site.lab / "ledger.jsonl").exists()
    lab.write_text(good)
    assert run(idea)[0] == 10


SLOW = "import time; open(os.environ['COUNT'], 'a').write(f'{seed} {rate}\\n'); time.sleep(0.25)\n"


def start(site: Site, *words: str | Path) -> subprocess.Popen[bytes]:
    where = {**os.environ, "COUNT": str(site.root / "count")}
    command = [sys.executable, "-m", "gptlab", "judge", *map(str, words), "--lab", str(site.lab), "--json"]
    return subprocess.Popen(command, env=where, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def slow(site: Site) -> None:
    (site.repo / "train.py").write_text(
        (site.repo / "train.py").read_text().replace("loss = 3.0\n", f"{SLOW}loss = 3.0\n")
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_judge_that_is_ended_leaves_nothing_and_resumes(how: signal.Signals, site: Site) -> None:
    slow(site)
    idea = site.edit("rate = 0.1", "rate = 0.9")
    count = site.root / "count"
    ends = 0
    for runs in (2, 5, 9):
        judge = start(site, idea)
        while judge.poll() is None and (not count.exists() or count.read_text().count("\n") < runs):
            time.sleep(0.02)
        judge.send_signal(how)
        judge.communicate()
        ends += judge.returncode != 0
        time.sleep(0.5)  # the supervisors have ended what ran
        settled = count.read_text()
        time.sleep(0.7)
        assert count.read_text() == settled
        Ledger(site.lab).read()
    assert ends
    judge = start(site, idea)
    judge.communicate()
    assert judge.returncode == 0
    (line,) = Ledger(site.lab).read()[0]
    assert line["verdict"] == "keep"
    notes = [note for note in Ledger(site.lab).read()[1] if note["kind"] == "confirmation"]
    assert len(notes) == 1  # neither level nor seeds were taken twice
    finished = [tuple(run.split()) for run in count.read_text().splitlines()]
    assert len(finished) <= 16 + 3 * 2 + 2  # only what ran when it was ended ran twice


def test_judges_share_a_lab_and_no_cell(site: Site) -> None:
    slow(site)
    ideas = [site.edit("rate = 0.1", "rate = 0.9", "one.diff"), site.edit("rate = 0.1", "rate = 0.8", "two.diff")]
    judges = [start(site, idea) for idea in (*ideas, ideas[0])]
    for judge in judges:
        judge.communicate()
    assert [judge.returncode for judge in judges] == [0, 0, 0]
    runs = (site.root / "count").read_text().splitlines()
    assert len(runs) == len(set(runs))
    tries, journal = Ledger(site.lab).read()
    assert sorted(line["name"] for line in tries) == ["one.diff", "two.diff"]
    notes = [note for note in journal if note["kind"] == "confirmation"]
    assert len(notes) == 2
    assert not set(notes[0]["seeds"]) & set(notes[1]["seeds"])
