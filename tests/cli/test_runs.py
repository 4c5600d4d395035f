"""`gptlab runs` over folders written by hand: what is listed, and that nothing outside can be deleted."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptlab.cli.main import main

Capture = pytest.CaptureFixture[str]


def write_run(folder: Path, *rows: dict[str, Any], **options: Any) -> Path:
    folder.mkdir(parents=True)
    options = {"seed": 1, "steps": 10, "learning_rate": 1e-3, "out": str(folder), **options}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    (folder / "environment.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def val(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "kind": "val", "loss": loss, "bits_per_byte": loss * 1.5}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    root = tmp_path / "log"
    end = {"step": 10, "kind": "event", "event": "finished", "bits_per_byte": 3.5, "clipped_share": 0.1}
    write_run(root / "plain", val(5, 3.0), val(10, 2.5), end)
    dosed = {"step": 1, "kind": "train", "dose": 0.4}
    write_run(root / "exp" / "conf" / "seed_2", dosed, val(5, 2.75), seed=2, **{"signal.name": "confidence"})
    failed = {"step": 3, "kind": "event", "event": "DivergedError", "text": "not finite"}
    write_run(root / "hot", failed, learning_rate=9.0)
    write_run(root / "torn").joinpath("config.json").write_text("{")
    write_run(root / ".trash" / "gone", val(1, 1.0))
    return root


def listing(capsys: Capture, *words: object) -> list[dict[str, Any]]:
    assert main(["runs", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


def names(runs: list[dict[str, Any]]) -> list[str]:
    return [run["run"] for run in runs]


def test_runs_are_listed_with_their_last_figures_and_differences(log: Path, capsys: Capture) -> None:
    conf, hot, plain, torn = listing(capsys, log)
    assert names([conf, hot, plain, torn]) == ["exp/conf/seed_2", "hot", "plain", "torn"]
    assert (plain["state"], plain["step"], plain["loss"], plain["bits_per_byte"]) == ("finished", 10, 2.5, 3.5)
    assert (conf["state"], conf["step"], conf["loss"], conf["bits_per_byte"]) == ("unfinished", 5, 2.75, 4.125)
    assert (conf["dose"], plain["dose"]) == (0.4, None)
    assert (hot["state"], hot["loss"]) == ("diverged", None)
    assert torn["state"] == "damaged"
    assert "config.json is damaged" in torn["problem"]
    assert conf["differences"] == {"seed": 2, "learning_rate": 1e-3, "signal.name": "confidence"}
    assert plain["differences"] == {"seed": 1, "learning_rate": 1e-3, "signal.name": "none"}


def test_runs_are_sorted_and_filtered(log: Path, capsys: Capture) -> None:
    assert names(listing(capsys, log, "--sort", "loss")) == ["plain", "exp/conf/seed_2", "hot", "torn"]
    assert names(listing(capsys, log, "--sort", "loss", "--reverse"))[:2] == ["exp/conf/seed_2", "plain"]
    assert names(listing(capsys, log, "--sort", "learning_rate", "--reverse"))[0] == "hot"
    for condition, found in (
        ("loss<2.6", ["plain"]), ("loss>=2.5", ["exp/conf/seed_2", "plain"]), ("state=diverged", ["hot"]),
        ("signal.name!=none", ["exp/conf/seed_2"]), ("seed=2", ["exp/conf/seed_2"]), ("state<a", []),
    ):  # fmt: skip
        assert names(listing(capsys, log, "--where", condition)) == found, condition
    assert names(listing(capsys, log, "--where", "loss<9", "--where", "seed=1")) == ["plain"]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Three arms of five seeds in an experiment, one of them killed, and two loose runs of the same signal."""
    root = tmp_path / "many"
    end = {"step": 10, "kind": "event", "event": "finished"}
    for arm, options in {"baseline": {}, "weak": {"signal.weight": 0.1}, "strong": {"signal.weight": 0.9}}.items():
        options = {"signal.name": "confidence", **options} if options else {}
        for seed in range(1, 6):
            ended = [] if (arm, seed) == ("weak", 3) else [end]
            write_run(root / "exp" / arm / f"seed_{seed}", val(10, 2.0 + seed / 10), *ended, seed=seed, **options)
    (root / "exp" / "experiment.toml").write_text("")
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        write_run(root / name, val(10, 2.0), end, learning_rate=rate, **{"signal.name": "confidence"})
    return root


def test_many_runs_are_grouped_by_experiment_and_arm(many: Path, capsys: Capture) -> None:
    assert main(["runs", str(many)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.endswith("runs")] == ["exp: 15 runs", "other runs: 2 runs"]
    row = {line.split()[0]: line for line in lines if line and not line.endswith("runs")}
    assert row.keys() == {"arm", "baseline", "weak", "strong", "a", "b"}
    assert row["weak"] == (
        "weak 4 finished, 1 unfinished 10/10 2.3000 ±0.1581 3.4500 ±0.2372 – signal.name=confidence signal.weight=0.1"
    )
    assert row["baseline"] == "baseline 5 finished 10/10 2.3000 ±0.1581 3.4500 ±0.2372 –"
    assert row["b"] == "b finished 10/10 2.0000 3.0000 – learning_rate=0.002"
    assert main(["runs", str(many), "--each"]) == 0
    assert sum("seed_" in line for line in capsys.readouterr().out.splitlines()) == 15


@pytest.mark.parametrize(("condition", "count"), [("arm=weak", 5), ("arm=*a*", 10), ("experiment=exp", 15),
                                                  ("experiment!=exp", 2), ("run=exp/*/seed_2", 3)])  # fmt: skip
def test_filters_name_arms_and_experiments(condition: str, count: int, many: Path, capsys: Capture) -> None:
    assert len(listing(capsys, many, "--where", condition)) == count


@pytest.mark.parametrize("key", ["arm", "experiment"])
def test_a_filter_for_what_is_not_there_says_what_is(key: str, many: Path, capsys: Capture) -> None:
    assert main(["runs", str(many), "--where", f"{key}=strng"]) == 2
    assert f"no {key} 'strng'" in (line := capsys.readouterr().err)
    assert ("strong" if key == "arm" else "exp") in line


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_the_list_keeps_to_the_terminals_width(
    width: int, many: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["runs", str(many)]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= width
    assert "2.3000 ±0.1581" in shown
    assert {"baseline", "strong", "unfinished"} <= set(shown.split()) or width == 40
    assert ("bits/byte" in shown) == (width >= 120)


def test_a_run_that_is_being_written_is_running_and_stays(log: Path, capsys: Capture) -> None:
    with (log / "plain" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on here")
        lock.flush()
        assert {run["run"]: run["state"] for run in listing(capsys, log)}["plain"] == "running"
        assert main(["runs", str(log), "--delete", "plain", "--yes"]) == 3
        assert "is being written by process 7 on here" in capsys.readouterr().err
    assert (log / "plain" / "config.json").is_file()
    assert listing(capsys, log)[2]["state"] == "finished"


def test_deleted_runs_are_in_the_trash_whole(log: Path, capsys: Capture) -> None:
    before = (log / "plain" / "metrics.jsonl").read_bytes()
    shutil.copytree(log / "plain", log / "copy")
    words = ["--delete", "plain", str(log / "exp" / "conf" / "seed_2")]
    assert main(["runs", str(log), *words]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert main(["runs", str(log), *words, "--yes", "--json"]) == 0
    moved = json.loads(capsys.readouterr().out)["moved"]
    assert [Path(target).name for target in moved.values()] == ["plain", "exp-conf-seed_2"]
    assert (log / ".trash" / "plain" / "metrics.jsonl").read_bytes() == before
    assert names(listing(capsys, log)) == ["copy", "hot", "torn"]
    (log / "copy").rename(log / "plain")
    assert main(["runs", str(log), "--delete", "plain", "--yes"]) == 0
    assert (log / ".trash" / "plain-2").is_dir()


@pytest.mark.parametrize("answer", ["y", "n"])
def test_deleting_asks(answer: str, log: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.openpty()
    os.write(reading, f"{answer}\n".encode())
    with os.fdopen(writing, "r") as terminal, os.fdopen(reading, "rb"):
        monkeypatch.setattr("sys.stdin", terminal)
        assert main(["runs", str(log), "--delete", "plain"]) == 0
    assert "move 1 run into" in capsys.readouterr().err
    assert (log / "plain").exists() == (answer == "n")


def test_nothing_outside_and_nothing_else_is_deleted(log: Path, tmp_path: Path, capsys: Capture) -> None:
    outside = write_run(tmp_path / "outside", val(1, 1.0))
    (log / "link").symlink_to(outside)
    (log / "linked").symlink_to(log / "plain")
    (log / "sub").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in (
        "../outside", str(outside), "link", "linked", "sub/outside", ".", "", "..", "exp", ".trash/gone", "no",
    ):  # fmt: skip
        assert main(["runs", str(log), "--yes", "--delete", "hot", name]) == 2, name
        assert ("found none named no;" in capsys.readouterr().err) == (name == "no")
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_words_are_named(log: Path, capsys: Capture) -> None:
    for words, line in (
        (["--sort", "los"], "no figure or option 'los'; did you mean 'loss'?"),
        (["--where", "loss"], "--where: expected KEY=VALUE"),
        (["--where", "los=2"], "no figure or option 'los'"),
    ):
        assert main(["runs", str(log), *words]) == 2
        assert line in capsys.readouterr().err
    assert main(["runs", str(log / "nowhere")]) == 2
    capsys.readouterr()
    (log / "empty").mkdir()
    assert main(["runs", str(log / "empty")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_the_table_shows_hostile_names_as_text(log: Path, capsys: Capture) -> None:
    (log / "plain").rename(log / "pl\x1b[2Jain[red]")
    assert main(["runs", str(log)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[red]" in "".join(shown.split())
