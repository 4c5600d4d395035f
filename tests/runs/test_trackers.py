"""`--log`: TensorBoard's files read back with its own reader; other trackers as fakes that keep what they are given."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptlab.cli import progress as trackers
from gptlab.cli.main import main
from gptlab.cli.progress import figures, tracking
from gptlab.errors import ConfigError
from gptlab.runs.folder import RunFolder
from gptlab.training.config import FREE_ON_RESUME, TrainingConfig
from gptlab.training.loop import Record

Words = Callable[..., list[str]]
Capture = pytest.CaptureFixture[str]


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{scalar: (step, value) of every event} as TensorBoard sees them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl, in the precision that event files have."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in RunFolder(folder).rows():
        if row["kind"] in ("train", "val"):
            values = {key: value for key, value in row.items() if key not in ("step", "kind")}
            for name, value in figures(row["kind"], values).items():
                found.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6, abs=1e-12)))
    return found


def digest(folder: Path, capsys: Capture) -> str:
    capsys.readouterr()
    assert main(["digest", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["sha256"]


def test_tensorboard_holds_every_figure_once_also_after_a_resume_and_changes_no_run(
    tiny: Words, finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    words = tiny(out, signal_name="confidence", sample_every=3, checkpoint_every=3, log="tensorboard")
    assert main(words) == 0
    assert digest(out, capsys) == digest(finished_run, capsys), "watched or not, the run is the same"
    seen = read_back(out)
    assert seen == recorded(out)
    assert {"train/loss", "train/signal_by_judge/1", "val/loss", "val/block_loss/2"} <= seen.keys()
    assert [step for step, _ in seen["train/loss"]] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(out / "checkpoints" / "step_00000006")  # as if it was killed in its last step
    assert main([*words, "--steps=8"]) == 0
    assert len(list(out.glob("events.out.tfevents.*"))) == 2
    assert [step for step, _ in read_back(out)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert read_back(out) == recorded(out)


class Fake(types.ModuleType):
    """A tracker's module: keeps what `init`, `log` and `finish` are given. chosen: what its own settings say."""

    def __init__(self, chosen: set[str]) -> None:
        super().__init__("fake")
        self.chosen, self.asked, self.rows, self.finished = chosen, {}, [], False

    def setup(self) -> Any:
        return types.SimpleNamespace(settings=types.SimpleNamespace(model_fields_set=self.chosen))

    def Settings(self, **asked: Any) -> dict[str, Any]:
        return asked

    def init(self, **asked: Any) -> Fake:
        print("a greeting")
        self.asked = asked
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if values.get("train/loss") == 13:
            raise RuntimeError("no room\nat all")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_project_and_a_name_are_what_was_asked(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(set())
    monkeypatch.setitem(sys.modules, tracker, fake)
    config = TrainingConfig(log=tracker, log_project="sure", log_name="first try")
    with tracking(config, tmp_path / "run", 0, print):
        pass
    assert (fake.asked["project"], fake.asked["name"]) == ("sure", "first try")


@pytest.mark.parametrize(("chosen", "mode"), [(set(), "offline"), ({"mode"}, None)])
def test_wandb_is_offline_unless_the_user_chose(
    chosen: set[str], mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake = Fake(chosen)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    config = TrainingConfig(log="wandb", seed=7)
    with tracking(config, tmp_path / "run", 0, print) as track:
        track(Record("train", 1, {"loss": 2.0, "clipped": True, "signal_by_judge": [None, 0.5]}))
        track(Record("sample", 1, {"tokens": [1, 2]}))
        track(Record("val", 1, {"loss": 3.0}))
    assert (fake.asked["project"], fake.asked["mode"], fake.asked["config"]["seed"]) == ("gptlab", mode, 7)
    expected = {"train/loss": 2.0, "train/clipped": 1.0, "train/signal_by_judge/2": 0.5}
    assert fake.rows == [(1, expected), (1, {"val/loss": 3.0})]
    assert fake.asked["name"] == "run"
    assert fake.finished
    assert capsys.readouterr().out == "", "standard output is for --json"


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {name: Fake(set()) for name in ("wandb", "trackio")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(fakes["trackio"], "log", lambda values, step: fakes["trackio"].rows.append(step))
    notes: list[str] = []
    with tracking(TrainingConfig(log="wandb, trackio"), tmp_path, 0, notes.append) as track:
        for step, loss in enumerate((2.0, 13.0, 2.0), start=1):
            track(Record("train", step, {"loss": loss}))
    assert notes == ["wandb logs no more: RuntimeError: no room"]
    assert ([step for step, _ in fakes["wandb"].rows], fakes["trackio"].rows) == ([1], [1, 2, 3])

    def refuse(**asked: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(fakes["wandb"], "init", refuse)
    with pytest.raises(ConfigError, match="--log wandb cannot begin: RuntimeError: not logged in; leave it out"):
        tracking(TrainingConfig(log="trackio,wandb"), tmp_path, 0, print).__enter__()
    assert fakes["trackio"].finished, "what had begun is ended"


@pytest.mark.parametrize(
    ("log", "code", "line"),
    [
        ("tensorbord", 2, "log: expected none, tensorboard, wandb, trackio or several with commas, found 'tensorbord'; "
                          "did you mean 'tensorboard'?"),
        ("tensorboard,", 2, "found ''"),
        ("wandb", 3, "--log wandb needs the package wandb, which is not installed; pip install wandb"),
        ("tensorboard", 3, "the package tensorboard, which is not installed; pip install 'tensorboard>="),
    ],
)  # fmt: skip
def test_what_cannot_log_is_said_before_anything_begins(
    log: str, code: int, line: str, tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert main(tiny(tmp_path / "run", log=log)) == code
    assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_log_is_no_part_of_a_run_and_no_prefix_of_log_every(tiny: Words, tmp_path: Path, capsys: Capture) -> None:
    assert "log" in FREE_ON_RESUME
    assert main([*tiny(tmp_path / "run"), "--log_ever", "2"]) == 2
    assert "unknown argument '--log_ever'; did you mean '--log_every'?" in capsys.readouterr().err
