"""A flipped byte, a full disk, a number that is not finite: named in one line, and nothing lost."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ROOT, Ended, Trainer, options, outcome, rows

from gptlab.cli.main import main
from gptlab.runs import checkpoint
from gptlab.runs.folder import newest

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


IN_A_SMALL_DISK = """
mount -t tmpfs -o size=$SIZE none "$DISK" && cp -a "$RUN" "$DISK/run" || exit 99
"$@"
code=$?
rm -rf "$RUN" && cp -a "$DISK/run" "$RUN" || exit 99
exit $code
"""


def check(ended: Ended, run: Path, named: str) -> None:
    """The fault was told, and what was saved before is whole."""
    assert ended.code == 3, ended.err
    (line,) = ended.ours
    assert named in line
    assert "make room and run" in line
    assert "Traceback" not in ended.err
    assert "Exception ignored" not in ended.err
    saved = checkpoint.complete(run / "checkpoints")
    assert saved
    assert [checkpoint.verify(folder) for folder in saved] == [[] for _ in saved]
    assert sorted(p.name for p in run.rglob(".*")) == [".lock"]
    assert all(row["kind"] for row in rows(run))  # every whole line is a row


@pytest.mark.slow
@pytest.mark.fault(number=4)
def test_a_save_beyond_a_file_size_limit(trainer: Trainer, killed: Callable[[], Path], uninterrupted: Path) -> None:
    """Weights fit under 200 kB, moments do not."""
    run = killed()
    ended = trainer.train(run, limit=200_000)
    check(ended, run, "could not save")
    assert "File too large" in ended.ours[0]
    assert rows(run)[-1]["event"] == "CheckpointError"
    assert rows(run)[-1]["text"] in ended.ours[0]
    assert trainer.train(run).code == 0
    assert outcome(run) == outcome(uninterrupted)


@pytest.mark.slow
@pytest.mark.fault(number=4)
def test_metrics_beyond_a_file_size_limit(trainer: Trainer, killed: Callable[[], Path], uninterrupted: Path) -> None:
    """Between two checkpoints, so that only rows are written."""
    run = killed()
    size = (run / "metrics.jsonl").stat().st_size
    ended = trainer.train(run, limit=size + 500, checkpoint_every=100)
    check(ended, run, str(run / "metrics.jsonl"))
    assert trainer.train(run).code == 0
    assert outcome(run) == outcome(uninterrupted)


def may_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.fault(number=4)
@pytest.mark.skipif(not may_mount(), reason="needs leave to mount a tmpfs (unshare -rm)")
@pytest.mark.parametrize(("room", "named"), [(400_000, "could not save"), (0, "metrics.jsonl")])
def test_a_disk_that_is_full(
    room: int,
    named: str,
    corpus: Path,
    trainer: Trainer,
    killed: Callable[[], Path],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    """A small file system of its own; `room` for one checkpoint more but not for two, or for hardly a row."""
    run, disk = killed(), tmp_path / "disk"
    disk.mkdir()
    pages = sum(-(-p.stat().st_size // 4096) for p in run.rglob("*") if p.is_file())
    size = pages * 4096 + 8_192 + room
    changes = {} if room else {"checkpoint_every": 100}
    training = [sys.executable, "train_gpt2_ben.py", *options(corpus, disk / "run", **changes)]
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", IN_A_SMALL_DISK, "bash", *training],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SIZE": str(size), "DISK": str(disk), "RUN": str(run)},
    )  # fmt: skip
    ended = Ended(done.returncode, done.stdout, done.stderr)
    check(ended, run, named)
    assert "disk is full" in ended.ours[0] or "No space left" in ended.ours[0]
    assert trainer.train(run).code == 0
    assert outcome(run) == outcome(uninterrupted)


ON_ONE_RANK = '''
"""The launcher, with a block that gives NaN on rank 1 from its update 6 on."""
import functools, os, sys
import torch
from gptlab.cli.main import guarded
from gptlab.cli.train import main

calls = 0

def spoil(module, arguments, output):
    global calls
    if type(module).__name__ == "MLP":
        calls += 1
        if calls > 40:
            return output * float("nan")

if os.environ["RANK"] == "1":
    torch.nn.modules.module.register_module_forward_hook(spoil)
sys.exit(guarded(functools.partial(main, defaults={"signal.name": "confidence"}), sys.argv[1:]))
'''


SPOILT = """
calls = 0

def nan(logits, targets):
    global calls
    calls += 1
    return logits[:, 0] * (float('nan') if calls == 3 else 1.0)
"""


@pytest.mark.slow
def test_an_infinite_weight_to_start_from(trainer: Trainer, killed: Callable[[], Path], tmp_path: Path) -> None:
    """`--init_from` a checkpoint whose second block overflows: nothing is learnt from it, nothing saved over it."""
    good = checkpoint.load(newest(killed()))
    weights = dict(good.weights)
    weights["transformer.h.1.mlp.c_fc.weight"] = weights["transformer.h.1.mlp.c_fc.weight"].clone()
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("inf")
    bad = checkpoint.save(tmp_path / "bad" / "checkpoints", weights, good.moments, good.state)
    run = tmp_path / "run"
    ended = trainer.train(run, init_from=bad)
    assert ended.code == 4, ended.err
    (line,) = ended.ours
    assert "diverged at step 0" in line
    assert "first in the output of block 2 (transformer.h.1)" in line
    assert "the weights were not changed" in line
    assert "Traceback" not in ended.err
    (row,) = rows(run)
    assert (row["kind"], row["event"], row["step"]) == ("event", "DivergedError", 0)
    assert row["text"] in line
    assert not checkpoint.complete(run / "checkpoints")


@pytest.mark.slow
def test_too_large_a_learning_rate(trainer: Trainer, tmp_path: Path) -> None:
    """The last checkpoint before the fault is whole and finite; the rows say how far it went."""
    run = tmp_path / "run"
    ended = trainer.train(run, learning_rate=1e30, checkpoint_every=1, warmup_steps=0)
    assert ended.code == 4, ended.err
    (line,) = ended.ours
    event = rows(run)[-1]
    assert f"diverged at step {event['step']}" in line
    assert event["step"] == sum(row["kind"] == "train" for row in rows(run))
    saved = checkpoint.load(newest(run))
    assert saved.step == event["step"]
    assert all(w.isfinite().all() for w in saved.weights.values())


@pytest.mark.slow
@pytest.mark.fault(number=9)
def test_on_one_rank_only_all_stop(trainer: Trainer, tmp_path: Path) -> None:
    run, launcher = tmp_path / "run", tmp_path / "spoilt.py"
    launcher.write_text(ON_ONE_RANK)
    ended = trainer.train(run, processes=2, launcher=launcher)
    assert ended.code != 0
    (line,) = ended.ours
    assert "in sequences 4 to 7 of the update" in line, "the second rank's"
    step = rows(run)[-1]["step"]
    assert f"diverged at step {step}" in line
    assert "first in the output of block 1 (transformer.h.0)" in line, "though the rank that speaks has it not"
    assert "gptlab/training" not in ended.err, "a traceback of ours"
    codes = set(re.findall(r"exitcode +: (-?\d+)", ended.err))
    assert "4" in codes
    assert codes <= {"4", "-15"}, "torchrun may end the second rank while it leaves"
    assert rows(run)[-1]["event"] == "DivergedError"
    saved = checkpoint.load(newest(run))
    assert saved.step <= step
    assert all(w.isfinite().all() for w in saved.weights.values())


@pytest.mark.slow
@pytest.mark.fault(number=10)
def test_a_signal_that_gives_nan(trainer: Trainer, tmp_path: Path, choose: random.Random) -> None:
    """The signal, its judge, the step and the batch are named, not the true loss, which is well.

    Not finite is what judge 1 says, its only one, of the fifth sequence on.
    """
    run, signal = tmp_path / "run", tmp_path / "spoilt.py"
    signal.write_text(SPOILT)
    start = choose.randrange(1, 6)
    changes = {"signal.name": f"{signal}:nan", "signal.start": start, "allow_code": None, "batch_size": 2}
    ended = trainer.train(run, **changes)
    assert ended.code == 4, ended.err
    (line,) = ended.ours
    assert f"diverged at step {start}" in line
    assert f"the signal {signal}:nan of judge 1 (block 1) is not finite" in line
    assert "in sequences 4 to 5 of the update; the weights were not changed" in line
    assert [row["kind"] for row in rows(run)] == ["train"] * start + ["event"]
