"""No room, in a save and in a row of metrics: one line that names the file, nothing lost, nothing half left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ROOT, Ended, Trainer, options, outcome, rows

from gptlab.runs import checkpoint

pytestmark = pytest.mark.slow

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
