"""What training sends: bytes over the loopback in an update, as the kernel counts them, next to tools/scale.py.

    unshare -rn sh -c 'ip link set lo up && python benchmarks/traffic.py'     in a network of its own
    python benchmarks/traffic.py                                              where nothing else uses the loopback

Each row is the trainer itself under torchrun, over gloo, for a few updates and again for more: the difference is the
updates' alone. Counted are all bytes that pass the interface, headers and all. Writes
benchmarks/results/measured.json and the table of docs/scale.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from figures import keep, rewrite

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))  # for scale.py, a script and no package: so imports follow

import scale  # noqa: E402  # pyright: ignore[reportMissingImports]

from gptlab.data.shards import write_shard  # noqa: E402
from gptlab.device import Machine  # noqa: E402
from gptlab.model.gpt import GPTConfig  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
START, END = "<!-- measured by benchmarks/traffic.py -->", "<!-- end of what traffic.py measured -->"

MODEL: dict[str, Any] = {"block_size": 32, "n_layer": 6, "n_head": 4, "n_embd": 256}
BATCH, MICRO_BATCHES = 2, 2  # sequences of a micro-batch, micro-batches of a process in an update
FEW, MORE = 2, 12
QUIET = 1e4
"""Bytes a second that others may send meanwhile."""
KINDS = {
    "ddp": ("train_gpt2.py", "ddp", 0),
    "ddp, block losses": ("train_gpt2_ben.py", "ddp", MODEL["n_layer"] - 1),
    "fsdp": ("train_gpt2.py", "fsdp", 0),
    "fsdp, block losses": ("train_gpt2_ben.py", "fsdp", MODEL["n_layer"] - 1),
}
"""name -> launcher, --parallel, judges"""


def main() -> int:
    """Measure every kind at two and at four processes; print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    chosen = parser.parse_args()
    others = idle()
    if others > QUIET:
        parser.error(f"expected a quiet loopback, found {others:,.0f} bytes a second; see the first command in --help")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = babble(Path(folder) / "corpus")
        for processes in chosen.processes:
            for name, (launcher, parallel, judges) in KINDS.items():
                few, more = (sent(launcher, parallel, processes, steps, corpus) for steps in (FEW, MORE))
                row = {"run": name, "processes": processes, **computed(processes, parallel, judges)}
                rows.append(row | {"measured": (more - few) / (MORE - FEW) / processes})
                print(table({"rows": rows[-1:]}).splitlines()[2], flush=True)
    found = {
        "command": "python benchmarks/traffic.py",
        "date": date.today().isoformat(),
        "processor": Machine.probe().processor,
        "others_bytes_per_second": others,
        "model": MODEL,
        "micro_batches": MICRO_BATCHES,
        "rows": rows,
    }
    keep("traffic", found)
    rewrite(PAGE, START, END, table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """The figures as a table of Markdown."""
    lines = [
        "| run | processes | ring, MB | gloo, MB | measured, MB | measured / gloo |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        cells = [f"{row[key] / 1e6:.1f}" for key in ("ring", "gloo", "measured")]
        lines.append(
            f"| {' | '.join([row['run'], str(row['processes']), *cells])} | {row['measured'] / row['gloo']:.3f} |"
        )
    return "\n".join([*lines, "", ""])


def counted() -> int:
    """Bytes that have passed the loopback since it is up."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[0] == "lo:")


def idle(seconds: float = 3.0) -> float:
    """Bytes a second that pass the loopback while nothing of ours does."""
    before = counted()
    time.sleep(seconds)
    return (counted() - before) / seconds


def sent(launcher: str, parallel: str, processes: int, steps: int, corpus: Path) -> int:
    """Bytes that all processes of a run of so many updates sent, from its start to its end."""
    with tempfile.TemporaryDirectory() as out:
        values = {
            **MODEL, "data": corpus, "out": Path(out) / "run", "parallel": parallel, "steps": steps,
            "batch_size": BATCH, "total_batch_tokens": BATCH * MICRO_BATCHES * MODEL["block_size"] * processes,
            "warmup_steps": 0, "eval_every": MORE, "checkpoint_every": MORE, "sample_every": 0, "dose_every": 0,
            "dtype": "fp32", "threads": 1,
        }  # fmt: skip
        words = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", launcher, *words]
        before = counted()
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return counted() - before


def computed(processes: int, parallel: str, judges: int) -> dict[str, float]:
    """Bytes that a process sends in an update, all in fp32 as on a CPU: `ring`, as tools/scale.py has it, and `gloo`,
    whose reduce-scatter sends as much as an all-reduce, twice a ring's."""
    model = GPTConfig(**MODEL, vocab_size=256)
    said = scale.traffic(model, processes, parallel, micro_batches=MICRO_BATCHES, judges=judges, gathered=scale.FP32)
    return {"ring": said.total, "gloo": said.total + said.scattered}


def babble(folder: Path) -> Path:
    """A corpus of bytes without sense."""
    folder.mkdir()
    (folder / "tokenizer.txt").write_text("bytes\n", encoding="utf-8")
    tokens = np.random.Generator(np.random.PCG64(1)).integers(256, size=31_000).astype(np.uint16)
    write_shard(folder / "train_000000.bin", tokens[:30_000])
    write_shard(folder / "val_000000.bin", tokens[30_000:30_129])  # a validation is a gather of every block, too
    return folder


if __name__ == "__main__":
    sys.exit(main())
