"""Run folders as training leaves them, with the losses a test asks for: comparing reads only their JSON.

Fixtures of every folder's tests, by way of conftest.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import ARM, HOSTILE, IMAGE

from gptlab.options import build, flatten
from gptlab.training.config import TrainingConfig

ENVIRONMENT = {
    "machine": {"processor": "a processor", "cores": 2, "gpus": []},
    "platform": "Linux x86_64",
    "python": "3.11.7",
    "torch": "2.13.0",
    "device": "cpu",
    "dtype": "fp32",
    "threads": 2,
    "compile": False,
}
DATA = {"tokenizer": "bytes", "train": ["1" * 64, "2" * 64], "val": ["3" * 64], "complete": True}

TINY = {
    "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "batch_size": 4, "total_batch_tokens": 64, "steps": 6,
    "learning_rate": 1e-3, "warmup_steps": 2, "eval_every": 3, "eval_tokens": 512, "checkpoint_every": 0,
    "sample_every": 0, "dose_every": 2, "dose_first": 0, "log_every": 1, "threads": 1,
}  # fmt: skip
"""The options of the smallest run that has everything in it."""

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run() -> WriteRun:
    """`write_run(folder, loss, seed=1, options={...})` makes a finished run of 20 steps, validated at 10 and 20.

    end: the last event's fields, None for a run that has not ended; environment, data, config: what differs in them.
    """

    def write(
        folder: Path,
        loss: float,
        *,
        seed: int = 1,
        options: dict[str, Any] | None = None,
        dose: float | None = None,
        end: dict[str, Any] | None = {"event": "finished"},  # noqa: B006
        environment: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> Path:
        folder.mkdir(parents=True)
        usual = {"steps": 20, "eval_every": 10, "total_batch_tokens": 2048, "learning_rate": 1e-3, "block_size": 128}
        built = build(TrainingConfig, {**usual, "seed": seed, **(options or {})})
        written = {"gptlab": "0.1.0", "options": flatten(built), "data": {**DATA, **(data or {})}, **(config or {})}
        (folder / "config.json").write_text(json.dumps(written))
        (folder / "environment.json").write_text(json.dumps({**ENVIRONMENT, **(environment or {})}))
        rows: list[dict[str, Any]] = [{"step": 10, "kind": "val", "loss": loss + 1}]
        rows += [{"step": 20, "kind": "train", "loss": loss, **({} if dose is None else {"dose": dose})}]
        if end is None or end["event"] == "finished":
            rows += [{"step": 20, "kind": "val", "loss": loss}]
        if end:
            rows += [{"step": 20, "kind": "event", "validation_sha256": "f" * 64, "clipped_share": 0.25, **end}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


@pytest.fixture
def hostile_experiment(tmp_path: Path, write_run: WriteRun) -> Path:
    """An experiment whose folder, options, machine and samples try to be more than text; its arm is worse by 0.1."""
    folder = tmp_path / "served" / IMAGE
    arms = {"baseline": (0.0, None), ARM: (0.1, 0.5)}
    signal = {"signal.name": "confidence"}
    for arm, (difference, dose) in arms.items():
        for seed in (1, 2, 3):
            options = {"data": IMAGE, **(signal if arm == ARM else {})}
            machine = {"processor": HOSTILE[3], "cores": 2, "gpus": []}
            run = write_run(folder / arm / f"seed_{seed}", 3 + seed / 1000 + difference, seed=seed, options=options,
                            dose=dose, environment={"machine": machine})  # fmt: skip
            blocks = {"block_loss": [4.0, 3.5, 3.2, 3.0 + difference], "block_confidence": [0.1, 0.2, 0.3, 0.4]}
            words = [*HOSTILE, "\0\x1b[2J", "\ud800", "\u202e"]
            sample = {"prompt": HOSTILE[1], "text": "".join(words), "tokens": list(range(len(words))),
                      "written": words, "blocks": [[[word, 0.5]] * 4 for word in words]}  # fmt: skip
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            rows = [{**row, **blocks} if row["kind"] == "val" else row for row in rows]
            rows.insert(-1, {"step": 20, "kind": "sample", **sample})
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "experiment.toml").write_text(
        f"name = 'hostile'\nbaseline = 'baseline'\nseeds = [1, 2, 3]\ndelta = 0.01\n"
        f"[options]\ndata = {json.dumps(IMAGE)}\n[arms.baseline]\n[arms.{ARM}]\n'signal.name' = 'confidence'\n"
    )
    return folder
