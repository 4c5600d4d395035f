"""A packed experiment: one file that compares as its folder does, and holds nothing that is not a run's."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import train_here, write  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main
from gptlab.errors import CheckpointError, ConfigError, GptlabError
from gptlab.runs.archive import pack, read_pack
from gptlab.runs.experiment_spec import read_experiment
from gptlab.runs.records import read_rows

Capture = pytest.CaptureFixture[str]
ARMS = {"plain": {}, "sure": {"signal.name": "confidence"}, "held": {"signal.name": "confidence", "signal.dose": 0.1}}
CELLS = [f"{arm}/seed_{seed}" for arm in sorted(ARMS) for seed in (1, 2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished experiment: its file and its folder."""
    folder = tmp_path_factory.mktemp("packed")
    file, out = write(folder, ARMS), folder / "run"
    train_here(file, out)
    return file, out


@pytest.fixture(scope="module")
def packed(run: tuple[Path, Path]) -> Path:
    path = run[1].parent / "packed.json.gz"
    assert main(["experiment", "pack", str(run[1]), "--out", str(path)]) == 0
    return path


@pytest.fixture
def copy(run: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the experiment's folder, to damage."""
    return Path(shutil.copytree(run[1], tmp_path / "copy"))


def test_a_packed_experiment_compares_alike_and_nothing_is_written_next_to_it(
    run: tuple[Path, Path], packed: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert packed.stat().st_size < 10_000
    alone = Path(shutil.copy(packed, tmp_path))
    found = []
    for source in (run[1], alone):
        capsys.readouterr()
        assert main(["compare", str(source), "--json"]) == 0
        found.append(dict(_flat(json.loads(capsys.readouterr().out))))
    times = {key: found[0][key] for key in found[0] if "equal_time/ratio" in key}
    assert {key: found[1][key] for key in times} == pytest.approx(times, rel=1e-5), "speeds are rounded"
    assert {**found[0], **times} == {**found[1], **times}
    doses = [sum("dose" in row for row in cell.run.rows) for cell in read_pack(alone).cells if cell.arm == "held"]
    assert max(doses) < sum("dose" in row for row in read_rows(run[1] / "held" / "seed_1")), "a held dose repeats"
    assert os.listdir(tmp_path) == ["packed.json.gz"]
    assert main(["compare", str(alone), "--html", str(tmp_path / "report.html")]) == 0
    assert "confidence" in (tmp_path / "report.html").read_text()


def test_an_unpacked_experiment_counts_as_finished(
    run: tuple[Path, Path], packed: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it is laid out where the experiment itself would run."""
    file, out = run
    monkeypatch.chdir(tmp_path)
    back = read_experiment(file).folder
    capsys.readouterr()
    assert main(["experiment", "unpack", str(packed), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(back)
    assert sorted(said["cells"]) == CELLS
    assert main(["experiment", "unpack", str(packed)]) == 3, "never over what is there"
    shutil.rmtree(back / "sure" / "seed_2")
    assert main(["experiment", "run", str(file), "--out", str(back), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ran"] == ["sure/seed_2"]
    assert (back / "results.json").read_bytes() == (out / "results.json").read_bytes()


def test_a_verdict_says_at_how_many_rungs_of_the_ladder_its_sign_holds(
    copy: Path, tmp_path: Path, capsys: Capture
) -> None:
    """`gptlab experiment ladder` leaves this file in the experiment's folder; a pack takes it along."""
    ladder = {"experiment": "x", "depths": [2, 3, 4], "arms": {"sure": {"sign": "higher", "holds": 2, "of": 3}}}
    (copy / "ladder.json").write_text(json.dumps(ladder))
    pack(read_experiment(copy / "experiment.toml", copy=True), copy, tmp_path / "packed.json.gz")
    assert main(["experiment", "unpack", str(tmp_path / "packed.json.gz"), "--out", str(tmp_path / "back")]) == 0
    for source in (copy, tmp_path / "packed.json.gz", tmp_path / "back"):
        capsys.readouterr()
        assert main(["compare", str(source), "--json"]) == 0
        arms = json.loads(capsys.readouterr().out)["arms"]
        assert arms["sure"]["passport"]["rungs"] == {"holds": 2, "of": 3, "depths": [2, 3, 4]}
        assert main(["compare", str(source), "--markdown", str(tmp_path / "tables.md")]) == 0
        said = "its sign holds at 2 of 3 rungs of the ladder (2, 3, 4 blocks)"
        assert said in (tmp_path / "tables.md").read_text()


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value by their paths."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{key}/{name}")
    else:
        yield key, value


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["pack", "{out}"], 2, "expected --out NAME.json.gz"),
        (["pack", "{out}", "--out", "{out}"], 2, "expected --out NAME.json.gz"),
        (["pack", "{out}", "--out", "{other}"], 3, "holds another experiment"),
        (["pack", "{out}", "--out", "{text}"], 3, "text.json.gz is no packed experiment, or a damaged one"),
        (["pack", "{file}", "--out", "{new}.json.gz"], 3, "expected finished cells"),
        (["unpack", "{packed}", "--out", "{out}"], 3, "expected a new folder"),
        (["unpack", "{out}", "--out", "{new}"], 3, "expected a regular file, found a folder"),
        (["unpack", "{new}", "--out", "{new}"], 3, "found nothing; check the path"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    words: list[str], code: int, line: str, run: tuple[Path, Path], packed: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, out = run
    other, text, new = (tmp_path / name for name in ("other.json.gz", "text.json.gz", "new"))
    value = json.loads(gzip.decompress(packed.read_bytes()))
    other.write_bytes(gzip.compress(json.dumps({**value, "experiment": "name = 'something else'"}).encode()))
    text.write_text("notes of mine")
    before = {path: path.read_bytes() for path in (other, text)}
    given = [word.format(file=file, out=out, other=other, text=text, packed=packed, new=new) for word in words]
    assert main(["experiment", *given]) == code
    assert line in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


SECRET = "root:x:0:0:a secret"
SECRETS: dict[str, str] = {
    "a line of text": SECRET,
    "a JSON object": json.dumps(
        {"arms": {"plain": {"notes": [SECRET]}}, "cells": [{"arm": "plain", "secret": SECRET}]}
    ),
    "what looks like results": json.dumps(
        {"cells": [{"arm": "plain", "seed": 1, "loss": 2.0, "weights_sha256": SECRET, "note": SECRET}]}
    ),
    "a row": json.dumps({"step": 1, "kind": "val", "loss": 2.0, "text": SECRET}) + "\n",
}
NAMES = ("results.json", "tuning.json", "ladder.json", "plain/seed_1/config.json", "plain/seed_1/environment.json",
         "plain/seed_1/metrics.jsonl", "plain/seed_1", "plain")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", SECRETS)
def test_nothing_from_behind_a_link_is_packed(name: str, content: str, copy: Path, tmp_path: Path) -> None:
    path, secret = copy / name, tmp_path / "secret"
    if path.is_dir():
        shutil.move(path, secret)
        for found in secret.rglob("config.json"):
            found.write_text(json.dumps({**json.loads(found.read_text()), "note": SECRET}))
    else:
        secret.write_text(SECRETS[content])
        path.unlink(missing_ok=True)
    path.symlink_to(secret)
    out = tmp_path / "out.json.gz"
    try:
        pack(read_experiment(copy / "experiment.toml", copy=True), copy, out)
    except GptlabError:
        assert not out.exists()
    else:
        assert SECRET.encode() not in gzip.decompress(out.read_bytes())


@pytest.mark.parametrize("content", [*SECRETS, "pipe"])
def test_what_is_no_result_of_a_run_is_not_packed(content: str, copy: Path, tmp_path: Path) -> None:
    """Files that lie where results and choices do, but hold something else."""
    for name in ("results.json", "tuning.json", "ladder.json"):
        (copy / name).unlink(missing_ok=True)
        if content == "pipe":
            os.mkfifo(copy / name)
        else:
            (copy / name).write_text(SECRETS[content])
    out = tmp_path / "out.json.gz"
    for name in ("tuning.json", "ladder.json"):
        with pytest.raises(ConfigError, match=name):
            pack(read_experiment(copy / "experiment.toml", copy=True), copy, out)
        (copy / name).unlink()
    pack(read_experiment(copy / "experiment.toml", copy=True), copy, out)
    assert SECRET.encode() not in gzip.decompress(out.read_bytes())


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def made(content: bytes) -> bytes:
        value = json.loads(gzip.decompress(content))
        change(value)
        return gzip.compress(json.dumps(value).encode())

    return made


def _cell(value: dict[str, Any]) -> dict[str, Any]:
    return value["cells"]["plain/seed_1"]


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[:-300],
    "one byte": lambda content: content[:900] + bytes([content[900] ^ 64]) + content[901:],
    "not zipped": gzip.decompress,
    "a list": lambda _: gzip.compress(b"[1, 2]"),
    "too large": lambda _: gzip.compress(b" " * (1 << 27)),
    "nested deeply": lambda _: gzip.compress(b"[" * 100_000),
    "another version": _changed(lambda value: value.update(version=2)),
    "no TOML": _changed(lambda value: value.update(experiment="name = ")),
    "no text": _changed(lambda value: value.update(experiment=5)),
    "cells in a list": _changed(lambda value: value.update(cells=[1])),
    "a cell that is none": _changed(lambda value: value["cells"].update({"plain/seed_1": 5})),
    "a cell elsewhere": _changed(lambda value: value["cells"].update({"../seed_1": _cell(value)})),
    "a cell of another seed": _changed(lambda value: value["cells"].update({"plain/seed_7": _cell(value)})),
    "rows that are none": _changed(lambda value: _cell(value).update(rows=5)),
    "no rows": _changed(lambda value: _cell(value).update(rows=[])),
    "no columns": _changed(lambda value: value.update(columns=[])),
    "a row that is none": _changed(lambda value: _cell(value)["rows"].append(7)),
    "a row that is short": _changed(lambda value: _cell(value)["rows"].append([0])),
    "a row of no table": _changed(lambda value: _cell(value)["rows"].append(["0", 5, "val"])),
    "rows that fall back": _changed(lambda value: _cell(value)["rows"].reverse()),
    "a loss in words": _changed(lambda value: [row.__setitem__(3, "low") for row in _cell(value)["rows"]]),
    "no end": _changed(lambda value: _cell(value)["rows"].pop()),
    "a config that is none": _changed(lambda value: _cell(value).update(config=[])),
    "a machine that is none": _changed(lambda value: _cell(value).update(environment={"machine": 5})),
    "weights that are none": _changed(lambda value: _cell(value).update(weights_sha256="../x")),
    "a choice that is none": _changed(lambda value: value.update(tuning={"arms": {"plain": {"loss": 1}}})),
    "a ladder without its arms": _changed(lambda value: value.update(ladder={"depths": [2, 3], "arms": {"sure": 2}})),
    "a ladder without depths": _changed(lambda value: value.update(ladder={"depths": ["2"], "arms": {}})),
    "trials that are none": _changed(lambda value: value.update(trials=[1])),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_pack_is_refused_in_one_line(damage: str, packed: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "damaged.json.gz"
    path.write_bytes(DAMAGED[damage](packed.read_bytes()))
    with pytest.raises((ConfigError, CheckpointError), match=r"damaged.json.gz"):
        read_pack(path)
    assert main(["compare", str(path)]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("change", [{"seed": "1"}, {"n_layer": "four"}])
def test_a_packed_run_is_checked_as_a_run_folder_is(change: dict[str, Any], packed: Path, tmp_path: Path) -> None:
    from gptlab.analysis.load import read

    path = tmp_path / "changed.json.gz"
    path.write_bytes(_changed(lambda value: _cell(value)["config"]["options"].update(change))(packed.read_bytes()))
    with pytest.raises((ConfigError, CheckpointError)):
        read([path]).verdicts()
