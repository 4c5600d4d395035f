"""Programs that answer as Slurm's do, for one machine: sbatch runs the script at once, or when its queue is released.

They know as much of Slurm as submitit asks of it: job ids, states, the end of a job. No assertions.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from harness import wait_until  # pyright: ignore[reportMissingImports]

SBATCH = """#!/bin/sh
id=$(($(cat {0}/count) + 1))
echo $id > {0}/count
cp "$1" {0}/$id.sh
(while [ -e {0}/held ] && [ ! -e {0}/$id.cancelled ]; do sleep 0.05; done
 [ -e {0}/$id.cancelled ] || SLURM_JOB_ID=$id setsid sh -c "echo \\$\\$ > {0}/$id.pid; exec sh {0}/$id.sh"
 touch {0}/$id.over) > /dev/null 2>&1 &
echo Submitted batch job $id
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do [ "$1" = --output ] && { out=$2; shift; }; shift; done
exec "$@" > "$(echo "$out" | sed "s/%j/$SLURM_JOB_ID/; s/%t/0/")" 2>&1
"""
SCANCEL = """#!/bin/sh
touch {0}/$1.cancelled
[ ! -e {0}/$1.pid ] || kill -TERM -$(cat {0}/$1.pid)
"""
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
while [ $# -gt 0 ]; do
 if [ "$1" = -j ]; then
  state=PENDING
  [ -e {0}/$2.pid ] && state=RUNNING
  [ -e {0}/$2.over ] && state=NODE_FAIL
  [ -e {0}/$2.cancelled ] && state=CANCELLED
  echo "$2|$state|here"
 fi
 shift
done
"""


class FakeSlurm:
    """Its programs are in `folder`/bin, to be put on PATH; held: jobs wait until `release`."""

    def __init__(self, folder: Path, *, held: bool = False) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "count").write_text("0\n")
        if held:
            (folder / "held").touch()
        for name, text in {"sbatch": SBATCH, "srun": SRUN, "scancel": SCANCEL, "sacct": SACCT}.items():
            program = self.bin / name
            program.write_text(text.replace("{0}", str(folder)))
            program.chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    @property
    def submitted(self) -> int:
        return int((self.folder / "count").read_text() or 0)

    def release(self) -> None:
        (self.folder / "held").unlink()

    def lose_node(self, job: int) -> None:
        """Kill all of a job that runs, as when its node goes down."""
        os.killpg(int((self.folder / f"{job}.pid").read_text()), signal.SIGKILL)

    def wait_for_end(self) -> None:
        """Wait until every job is over or cancelled."""
        jobs = range(1, self.submitted + 1)
        wait_until(lambda: all((self.folder / f"{job}.over").exists() for job in jobs), "the end of every job", 30.0)
