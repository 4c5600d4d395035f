"""A packed experiment: what compares from it, how small it is, and that a runner takes its cells for finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import write  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main

Capture = pytest.CaptureFixture[str]
ARMS = {"plain": {}, "sure": {"signal.name": "confidence"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished experiment: its file and its folder."""
    folder = tmp_path_factory.mktemp("packed")
    file, out = write(folder, ARMS), folder / "run"
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 0
    return file, out


def test_a_packed_experiment_compares_alike_and_counts_as_finished(
    run: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    file, out = run
    packed, back = tmp_path / "packed", tmp_path / "back"
    capsys.readouterr()
    assert main(["experiment", "pack", str(out), "--out", str(packed), "--json"]) == 0
    cells = ["plain/seed_1", "plain/seed_2", "sure/seed_1", "sure/seed_2"]
    assert sorted(json.loads(capsys.readouterr().out)["cells"]) == cells
    assert not list(packed.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in packed.rglob("*.*") if path.is_file()) < 60_000
    found = []
    for folder in (out, packed):
        assert main(["compare", str(folder), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert (folder / "report.html").is_file()
    times = [_without_clock(said) for said in found]
    assert found[0] == found[1]
    assert times[0] == pytest.approx(times[1])

    shutil.copytree(packed, back)
    shutil.rmtree(back / "sure" / "seed_2")
    assert main(["experiment", "run", str(file), "--out", str(back), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ran"] == ["sure/seed_2"]
    assert (back / "results.json").read_bytes() == (out / "results.json").read_bytes()


def _without_clock(said: dict[str, Any]) -> list[float]:
    """Takes what clocks say out of a comparison, and gives it: sums of seconds differ in their last digit."""
    times = [row.pop("equal_time") for row in said["arms"].values()]
    return [time["ratio"] for time in times if time]


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["{out}"], 2, "expected --out DIR"),
        (["{out}", "--out", "{out}"], 3, "expected another folder"),
        (["{out}", "--out", "{other}"], 3, "holds another experiment"),
        (["{out}", "--out", "{live}"], 3, "live/sure/seed_2 is a run, with checkpoints, which a copy would damage"),
        (["{file}", "--out", "{other}"], 3, "expected finished cells"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], code: int, line: str, run: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    file, out = run
    other = tmp_path / "other"
    if "{out}" in words:
        other.mkdir()
        (other / "experiment.toml").write_text("name = 'something else'\n")
    live = tmp_path / "live"
    (live / "sure" / "seed_2" / "checkpoints").mkdir(parents=True)
    given = [word.format(file=file, out=out, other=other, live=live) for word in words]
    assert main(["experiment", "pack", *given]) == code
    assert line in capsys.readouterr().err
    assert [path.name for path in live.rglob("*") if path.is_file()] == []
