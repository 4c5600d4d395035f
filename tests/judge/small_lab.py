"""A lab over a trainer of ten lines, which takes milliseconds and whose noise is known."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRAINER = """\
import os, random
from evaluate import report
seed = int(os.environ["GPTLAB_SEED"])
rate = 0.1
noise = random.Random(f"{seed} {rate}").gauss(0, 0.01)
loss = 3.0
for step in range(10):
    loss -= 0.01 * rate
loss += noise
report(loss)
"""
EVALUATE = 'def report(loss):\n    print(f"step 10\\nval_loss: {loss:.6f}", flush=True)\n'
LAB = """\
[baseline]
command = "python train.py"
path = "../repo"
[metric]
pattern = "val_loss: ([0-9.]+)"
[plan]
looks = [2, 4]
confirm = [4, 8]
time_limit = 20
disk = 0.01
jobs = 2
[paths]
allow = ["train.py", "model/**"]
deny = ["evaluate.py", "model/data.py"]
"""


class Site:
    """A folder with the trainer in repo/ and the lab in lab/."""

    def __init__(self, root: Path) -> None:
        self.root, self.repo, self.lab = root, root / "repo", root / "lab"
        (self.repo / "model").mkdir(parents=True)
        self.lab.mkdir()
        (self.repo / "train.py").write_text(TRAINER)
        (self.repo / "evaluate.py").write_text(EVALUATE)
        (self.repo / "model" / "data.py").write_text("SPLIT = 0.9\n")
        (self.lab / "lab.toml").write_text(LAB)

    def edit(self, old: str, new: str, name: str = "idea.diff", file: str = "train.py") -> Path:
        """A diff of one file of the trainer."""
        before = (self.repo / file).read_text()
        assert old in before
        after = before.replace(old, new)
        lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{file}", f"b/{file}")
        return self.diff("".join(lines), name)

    def diff(self, text: str, name: str = "idea.diff") -> Path:
        path = self.root / name
        path.write_text(text)
        return path

    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.lab / "ledger.jsonl").read_text().splitlines()]


Run = Callable[..., tuple[int, dict[str, Any]]]
