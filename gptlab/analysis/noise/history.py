"""What a run logged of its noise while it was trained (`--noise_every`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptlab.runs.folder import RunFolder


def alignment_history(source: Path) -> dict[str, Any] | None:
    """{"steps", "noise_scale", "signals": [{"total", "blocks"}]} over training; None where nothing was logged.

    source: a run's folder, or one of its checkpoints. Each list has one value a step; blocks[j] is of block j + 1.
    """
    folders = (RunFolder(path) for path in (source, source.resolve().parent.parent))
    folder = next((folder for folder in folders if folder.exists() and folder.path.is_dir()), None)
    if folder is None:
        return None
    rows = [row for row in folder.rows() if row["kind"] == "train" and "noise_scale" in row]
    if not rows:
        return None
    signals = range(len(rows[0]["alignment"]))
    return {
        "steps": [row["step"] for row in rows],
        "noise_scale": [row["noise_scale"] for row in rows],
        "signals": [
            {
                "total": [row["alignment"][k] for row in rows],
                "blocks": [
                    list(values) for values in zip(*(row["alignment_by_block"][k] for row in rows), strict=True)
                ],
            }
            for k in signals
        ],
    }
