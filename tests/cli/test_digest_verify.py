"""`gptlab digest` and `gptlab verify` on a run that is whole and on one that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.cli.main import main

Capture = pytest.CaptureFixture[str]


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
