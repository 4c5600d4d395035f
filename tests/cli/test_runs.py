"""`gptlab runs`, `digest`, `verify` and `page`: what is listed, found damaged and served, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
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


def test_digest_is_one_number_and_its_step(run: Path, finished_run: Path, capsys: Capture) -> None:
    found = []
    for path in (run, finished_run, run / "checkpoints" / "step_00000006"):
        assert main(["digest", str(path), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]
    assert found[0].keys() == {"sha256", "step"}
    assert found[0]["step"] == 6
    assert main(["digest", str(run)]) == 0
    assert capsys.readouterr().out == f"{found[0]['sha256']}  step 6\n"
    assert main(["digest", str(run / "checkpoints" / "step_00000003"), "--json"]) == 0
    earlier = json.loads(capsys.readouterr().out)
    assert earlier["step"] == 3
    assert earlier["sha256"] != found[0]["sha256"]


def test_verify_finds_a_run_whole_and_a_checkpoint_of_it(run: Path, capsys: Capture) -> None:
    for path in (run, run / "checkpoints" / "step_00000003"):
        assert main(["verify", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": []}
    assert main(["verify", str(run)]) == 0
    whole, covered, _ = capsys.readouterr().out.split("\n")
    assert whole == f"{run}: every file is as it was written"
    assert covered.startswith("covered: checkpoints, by checksums; ")
    assert "Not covered: config.json, " in covered


def last_byte_changed(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def no_json(path: Path) -> None:
    path.write_text("{")


def bad_row(path: Path) -> None:
    path.write_text('{"step": 1\n' + path.read_text())


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("checkpoints/step_00000003/model.safetensors", last_byte_changed, "its content does not match its checksum"),
        ("checkpoints/step_00000006/optimizer.safetensors", cut, "found 100"),
        ("checkpoints/step_00000006/state.json", Path.unlink, "missing"),
        ("checkpoints/step_00000006/MANIFEST.json", no_json, "cannot be read"),
        ("metrics.jsonl", cut, "bytes, found 100"),
        ("metrics.jsonl", bad_row, "line 1: "),
        ("log.txt", Path.unlink, "bytes, found 0"),
        ("config.json", no_json, "is damaged"),
        ("config.json", Path.unlink, "expected a run folder, found no config.json"),
        ("environment.json", no_json, "is damaged"),
    ],
)
def test_verify_names_the_damaged_file(
    name: str, damage: Callable[[Path], None], problem: str, run: Path, capsys: Capture
) -> None:
    damage(run / name)
    assert main(["verify", str(run), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [entry["file"] for entry in found["problems"]] == [str(run / name)]
    assert problem in found["problems"][0]["problem"]
    assert main(["verify", str(run)]) == 3
    out, err = capsys.readouterr()
    assert out.startswith(f"{run / name}: ")
    assert err.startswith(f"gptlab: expected {run} as it was written, found 1 damaged file(s)")


def test_digest_of_a_damaged_checkpoint_is_refused(run: Path, capsys: Capture) -> None:
    path = run / "checkpoints" / "step_00000006" / "model.safetensors"
    last_byte_changed(path)
    assert main(["digest", str(run), "--json"]) == 3
    out, err = capsys.readouterr()
    assert f"damaged checkpoint: {path}: its content does not match" in err
    assert json.loads(out)["exit_code"] == 3


@pytest.mark.parametrize("command", ["digest", "verify"])
def test_where_there_is_no_run_it_says_so(command: str, tmp_path: Path, capsys: Capture) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert main([command, str(path)]) == 3
        assert f"expected a run or a checkpoint, found none at {path}" in capsys.readouterr().err


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
