"""Run folders as training leaves them, with the losses a test asks for: comparing reads only their JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
        built = build(TrainingConfig, {"steps": 20, "eval_every": 10, "seed": seed, **(options or {})})
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
