"""Where a run begins, asked of `begin` itself; what a user sees of it is in tests/cli/test_train.py."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptlab.data.corpus import Corpus, open_corpus
from gptlab.errors import CheckpointError
from gptlab.runs import folder as run_folder
from gptlab.runs.folder import RunFolder
from gptlab.runs.session import begin
from gptlab.training.config import TrainingConfig


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path) -> Corpus:
    return open_corpus(tiny_corpus)


def config_of(run: Path) -> TrainingConfig:
    return replace(RunFolder(run).config(), out=str(run))


def without_summary(run: Path) -> str:
    """Take the summary off a run's records, and give it."""
    path = run / "metrics.jsonl"
    *kept, summary = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept))
    return summary


def test_a_new_run_is_set_up_and_locked(corpus: Corpus, tmp_path: Path) -> None:
    config = TrainingConfig(out=str(tmp_path / "run"))
    folder, beginning = begin(config, corpus, {"torch": "x"})
    assert (beginning.checkpoint, beginning.finished, beginning.notes) == (None, None, ())
    assert folder.config() == config
    assert folder.recorded("environment.json") == {"torch": "x"}
    assert folder.recorded("config.json")["data"] == corpus.identity()
    with pytest.raises(CheckpointError, match="is being written by process"):
        RunFolder(tmp_path / "run").lock(patience=0)
    folder.close()


def test_an_unfinished_run_goes_on_from_its_newest_checkpoint(run: Path, corpus: Corpus) -> None:
    without_summary(run)
    folder, beginning = begin(config_of(run), corpus, {})
    folder.close()
    assert beginning.checkpoint == str(run / "checkpoints" / "step_00000006")
    assert [row["step"] for row in folder.rows() if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_who_waited_for_the_lock_of_a_run_that_then_finished_gets_its_summary(run: Path, corpus: Corpus) -> None:
    summary = without_summary(run)
    writer = RunFolder(run)
    writer.lock()

    def finish() -> None:
        time.sleep(0.3)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(summary)
        writer.close()

    thread = threading.Thread(target=finish)
    thread.start()
    folder, beginning = begin(config_of(run), corpus, {})
    thread.join()
    assert beginning.finished == list(folder.rows())[-1]
    again = RunFolder(run)
    again.lock(patience=0)  # it did not keep the lock
    again.close()


def test_a_run_that_is_being_written_is_refused_and_left_alone(
    run: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_summary(run)
    monkeypatch.setattr(run_folder.RunFolder.lock, "__defaults__", (0.2,))
    before = (run / "metrics.jsonl").read_bytes()
    writer = RunFolder(run)
    writer.lock()
    with pytest.raises(CheckpointError, match="is being written by process"):
        begin(config_of(run), corpus, {})
    writer.close()
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_error_lets_go_of_the_lock(run: Path, corpus: Corpus) -> None:
    without_summary(run)
    for manifest in run.glob("checkpoints/*/MANIFEST.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*step_00000006/MANIFEST\.json: missing"):
        begin(config_of(run), corpus, {})
    folder = RunFolder(run)
    folder.lock(patience=0)
    folder.close()


def test_must_refuses_a_run_without_a_checkpoint(run: Path, corpus: Corpus) -> None:
    without_summary(run)
    for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=r"--resume must: .* has no checkpoint yet; use --resume auto"):
        begin(replace(config_of(run), resume="must"), corpus, {})
    folder, beginning = begin(config_of(run), corpus, {})
    folder.close()
    assert beginning.checkpoint is None
    assert list(folder.rows()) == []


@pytest.mark.parametrize(
    ("launch", "attempt", "finished", "name"),
    [("a", 1, False, "run"), ("a", 1, True, "run-2"), ("b", 1, False, "run-2"), ("a", 0, False, "run-2")],
    ids=["started anew", "finished", "another start", "first attempt"],
)
def test_never_goes_on_only_with_what_this_start_of_torchrun_began(
    launch: str, attempt: int, finished: bool, name: str, run: Path, corpus: Corpus
) -> None:
    (run / "environment.json").write_text('{"launch": "a"}')
    if not finished:
        without_summary(run)
    config = replace(config_of(run), resume="never")
    folder, beginning = begin(config, corpus, {"launch": launch}, attempt=attempt)
    folder.close()
    assert Path(beginning.folder).name == name
    assert (beginning.checkpoint is not None) == (name == "run")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"config.json": '{"model_type": "gpt2"}'}, "a config.json that is no run's"),
        ({"log.txt": "1 train 2.5\n", "metrics.jsonl": "mine\n"}, "metrics.jsonl and log.txt without a config.json"),
        ({"checkpoints": "a file"}, "checkpoints without a config.json"),
    ],
)
def test_a_folder_that_is_no_runs_is_left_as_it_is(
    files: dict[str, str], found: str, corpus: Corpus, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"expected a new folder or a run's, found {found} in .*another --out"):
        begin(TrainingConfig(out=str(tmp_path)), corpus, {})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_finished_run_without_checkpoints_does_not_begin_again(run: Path, corpus: Corpus) -> None:
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    longer = replace(config_of(run), steps=9)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"finished at step 6 and has no checkpoint to continue from; "):
            begin(longer, corpus, {})
        assert (run / "metrics.jsonl").read_bytes() == before
    _, beginning = begin(config_of(run), corpus, {})
    assert beginning.finished is not None


def test_what_made_a_run_before_stands_beside_what_goes_on(run: Path, corpus: Corpus) -> None:
    def go_on(**environment: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        without_summary(run) if list(RunFolder(run).rows())[-1].get("event") == "finished" else None
        folder, beginning = begin(config_of(run), corpus, environment)
        folder.close()
        return folder.recorded("environment.json"), beginning.notes

    said = RunFolder(run).recorded("environment.json")
    same = {key: value for key, value in said.items() if key != "reasons"}
    assert go_on(**same) == (same, ())
    found, notes = go_on(**same | {"torch": "x"})
    version = RunFolder(run).recorded("config.json")["gptlab"]
    assert found["earlier"] == [{"until_step": 6, **same, "gptlab": version}]
    assert "by other software or elsewhere" in notes[0]
    again, notes = go_on(**same | {"torch": "x"})
    assert (again, notes) == (found, notes)
    (run / "environment.json").unlink()
    lost, _ = go_on(torch="y")
    assert lost["earlier"] == [{"until_step": 6, "gptlab": version}]
