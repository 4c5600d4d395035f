"""Where a run begins, asked of `begin` itself, and initial weights a hair off."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.cli.main import main
from gptlab.data.corpus import Corpus, open_corpus
from gptlab.errors import CheckpointError
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.runs import folder as run_folder
from gptlab.runs.checkpoint import digest
from gptlab.runs.folder import RunFolder
from gptlab.runs.init_weights import jitter, model_of
from gptlab.runs.session import begin
from gptlab.training.config import TrainingConfig


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path) -> Corpus:
    return open_corpus(tiny_corpus)


def config_of(run: Path) -> TrainingConfig:
    return replace(RunFolder(run).config(), out=str(run))


def without_command(environment: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in environment.items() if key not in ("command", "commit")}


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
    environment = folder.recorded("environment.json")
    assert environment.pop("command").startswith("gptlab train --preset shakespeare-tiny ")
    environment.pop("commit", None)  # of a clone
    assert environment == {"torch": "x"}
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
    ids=["started again", "finished", "another start", "first attempt"],
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
        return without_command(folder.recorded("environment.json")), beginning.notes

    said = RunFolder(run).recorded("environment.json")
    same = {key: value for key, value in without_command(said).items() if key != "reasons"}
    assert go_on(**same) == (same, ())
    found, notes = go_on(**same | {"torch": "x"})
    version = RunFolder(run).recorded("config.json")["gptlab"]
    assert list(map(without_command, found["earlier"])) == [{"until_step": 6, **same, "gptlab": version}]
    assert "by other software or elsewhere" in notes[0]
    again, notes = go_on(**same | {"torch": "x"})
    assert (again, notes) == (found, notes)
    (run / "environment.json").unlink()
    lost, _ = go_on(torch="y")
    assert lost["earlier"] == [{"until_step": 6, "gptlab": version}]


def train_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def arm(tiny: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a signal, with the norm of every update on record."""
    out = tmp_path_factory.mktemp("arm") / "run"
    assert main(tiny(out, signal_name="confidence", dose_every=1, signal_start=1)) == 0
    return out


def test_a_placebo_replays_the_norms_of_its_arm_also_when_it_is_resumed(
    arm: Path, tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"signal_name": "confidence", "signal_start": 1, "signal_control": "placebo",
                               "signal_placebo_of": arm, "checkpoint_every": 2}  # fmt: skip
    wanted = [row.get("signal_norm") for row in train_rows(arm)]
    assert wanted[0] is None
    for name in ("whole", "resumed"):
        assert main(tiny(tmp_path / name, **options)) == 0
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000006")
    without_summary(tmp_path / "resumed")
    assert main(tiny(tmp_path / "resumed", **options)) == 0
    for name in ("whole", "resumed"):
        found = [row.get("signal_norm") for row in train_rows(tmp_path / name)]
        assert found[0] is None
        assert found[1:] == pytest.approx(wanted[1:], rel=1e-4)
    ends = [RunFolder(tmp_path / name).newest_whole()[0] for name in ("whole", "resumed")]
    assert len({digest(end.folder) for end in ends if end}) == 1
    capsys.readouterr()
    norms = (arm / "metrics.jsonl").read_text()
    (arm / "metrics.jsonl").write_text(norms.replace('"signal_norm": ', '"signal_norm": 1'))
    try:
        assert main(tiny(tmp_path / "resumed", **options)) == 3
    finally:
        (arm / "metrics.jsonl").write_text(norms)
    assert "are not those that the run began with" in capsys.readouterr().err


def test_batch_noise_is_the_same_after_a_resume(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_noise": 0.5, "gradient_noise_shape": "batch", "checkpoint_every": 2}
    for name in ("whole", "resumed"):
        assert main(tiny(tmp_path / name, **options)) == 0
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000006")
    without_summary(tmp_path / "resumed")
    assert main(tiny(tmp_path / "resumed", **options)) == 0
    ends = [RunFolder(tmp_path / name).newest_whole()[0] for name in ("whole", "resumed")]
    assert len({digest(end.folder) for end in ends if end}) == 1
    figures = [[row.get("batch_noise") for row in train_rows(tmp_path / name)] for name in ("whole", "resumed")]
    assert figures[0] == figures[1]
    assert [figure is not None and 0 < figure < 2 for figure in figures[0]] == [True, False] * 3


@pytest.mark.parametrize(
    ("of", "found"),
    [("baseline", "found none of update 1 and 5 more"), ("shorter", "found none of update 5 and 1 more"),
     ("nothing", "found none of update 1 and 5 more")],
)  # fmt: skip
def test_a_placebo_of_a_run_that_lacks_norms_does_not_begin(
    of: str, found: str, arm: Path, finished_run: Path, tiny: Callable[..., list[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = {"baseline": tmp_path / "baseline", "shorter": tmp_path / "arm", "nothing": tmp_path / "none"}[of]
    if of == "baseline":
        assert main(tiny(source)) == 0
    if of == "shorter":
        assert main(tiny(source, signal_name="confidence", dose_every=1, steps=4)) == 0
    capsys.readouterr()
    options = {"signal_name": "confidence", "signal_control": "placebo", "signal_placebo_of": source}
    assert main(tiny(tmp_path / "placebo", **options)) == 3
    err = capsys.readouterr().err
    assert found in err
    assert "--dose_every 1" in err
    assert not list(tmp_path.glob("placebo/checkpoints/*"))


SHAPE = GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.parametrize("amount", [1e-6, 1e-2])
def test_jitter_is_relative_and_drawn_by_seed_and_parameter(amount: float) -> None:
    model, again, other = GPT(SHAPE, 1), GPT(SHAPE, 1), GPT(SHAPE, 1)
    for twin, seed in ((model, 1), (again, 1), (other, 2)):
        jitter(twin, amount, seed)
    shares = []
    for (name, drawn), p, q, r in zip(
        GPT(SHAPE, 1).named_parameters(), model.parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        if name.endswith("bias"):
            assert not p.any()
            continue
        assert not torch.equal(p, r)
        shares.append((p / drawn - 1).detach().flatten())
    share = torch.cat(shares)
    assert float(share.std()) == pytest.approx(amount, rel=0.02)
    assert abs(float(share.mean())) < amount / 50


def test_a_run_starts_jittered_and_goes_on_as_it_is(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """At a learning rate of 0 the weights stay what they were; a second sitting must not shake them again."""
    how = {"learning_rate": 0, "weight_decay": 0, "checkpoint_every": 2, "init_jitter": 1e-2}
    assert main(tiny(tmp_path / "run", steps=2, **how)) == 0
    assert main(tiny(tmp_path / "run", steps=4, **how)) == 0
    expected = GPT(SHAPE, 1)
    jitter(expected, 1e-2, 1)
    for p, q in zip(model_of(tmp_path / "run")[0].parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
