"""One flipped byte in any file of a checkpoint: found, named, and trained on from the checkpoint before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Trainer, outcome

from gptlab.cli.main import main
from gptlab.runs import checkpoint

FILES = (checkpoint.WEIGHTS, checkpoint.MOMENTS, checkpoint.STATE, checkpoint.MANIFEST)


def flip(file: Path, at: int, mask: int = 0x01) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= mask
    file.write_bytes(content)


def newest_of(run: Path) -> Path:
    return checkpoint.complete(run / "checkpoints")[0]


@pytest.mark.fault(number=5)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_named_by_verify(
    name: str, killed: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = killed()
    assert main(["verify", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": []}
    file = newest_of(run) / name
    flip(file, file.stat().st_size // 2)
    assert main(["verify", str(run), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert [problem["file"] for problem in found["problems"]] == [str(file)]
    assert main(["digest", str(run)]) == 3
    assert str(file) in capsys.readouterr().err


@pytest.mark.fault(number=5)
def test_every_byte_of_a_manifest_counts(killed: Callable[[], Path]) -> None:
    """Whatever it becomes: another letter, white space for white space, a carriage return, no UTF-8."""
    folder = newest_of(killed())
    file = folder / checkpoint.MANIFEST
    content = file.read_bytes()
    assert checkpoint.verify(folder) == []
    for at in range(len(content)):
        for other in {content[at] ^ 0x01, content[at] ^ 0x80, ord("\r"), ord(" ")} - {content[at]}:
            file.write_bytes(content[:at] + bytes([other]) + content[at + 1 :])
            assert [p.file for p in checkpoint.verify(folder)] == [str(file)], (at, other)


@pytest.mark.slow
@pytest.mark.fault(number=5)
@pytest.mark.parametrize("name", [checkpoint.MOMENTS, checkpoint.MANIFEST])
def test_training_falls_back_and_says_so(
    name: str, trainer: Trainer, killed: Callable[[], Path], uninterrupted: Path
) -> None:
    run = killed()
    newest, before = checkpoint.complete(run / "checkpoints")
    flip(newest / name, 100, 0x10)
    ended = trainer.train(run)
    assert ended.code == 0, ended.err
    said = "".join(ended.err.split())  # as the terminal may break it
    assert f"{newest / name}:" in said
    assert "fallingbacktothecheckpointbeforeit" in said
    assert f"resumingfrom{before}" in said
    assert outcome(run) == outcome(uninterrupted)


@pytest.mark.slow
@pytest.mark.fault(number=5)
def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(trainer: Trainer, killed: Callable[[], Path]) -> None:
    run = killed()
    saved = checkpoint.complete(run / "checkpoints")
    for folder in saved:
        flip(folder / checkpoint.WEIGHTS, 2000)
    ended = trainer.train(run)
    assert ended.code == 3
    (line,) = ended.ours
    assert str(saved[0] / checkpoint.WEIGHTS) in line
    assert "Traceback" not in ended.err
    assert checkpoint.complete(run / "checkpoints") == saved
