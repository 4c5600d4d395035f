"""What one update passes through: the files, functions and lines of gptlab that run in it, traced on a tiny model.

    python tools/update_path.py    prints it, and keeps it in benchmarks/results/measured.json

The update is the second of a run with --signal.name none, and of one with confidence.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import gptlab
from gptlab.cli.train import main as train

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from figures import keep  # pyright: ignore[reportMissingImports]

PACKAGE = Path(gptlab.__file__).parent
SMALL = ["--steps", "2", "--n_layer", "3", "--n_embd", "32", "--n_head", "2", "--block_size", "32", "--eval_every", "0",
         "--total_batch_tokens", "256", "--batch_size", "4", "--sample_every", "0", "--checkpoint_every", "0",
         "--dose_every", "0", "--dtype", "fp32", "--threads", "1", "--device", "cpu"]  # fmt: skip


def path_of_update(signal: str) -> dict[str, Any]:
    """Files by name, and counts of files, functions and their lines, of one update with a signal."""
    from gptlab.training import loop

    seen: set[CodeType] = set()
    update = loop.update

    def traced(*args: Any, **named: Any) -> Any:
        seen.clear()

        def note(frame: FrameType, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
                seen.add(frame.f_code)

        sys.setprofile(note)
        try:
            return update(*args, **named)
        finally:
            sys.setprofile(None)

    loop.update = traced
    try:
        with tempfile.TemporaryDirectory() as out:
            train([*SMALL, "--signal.name", signal, "--out", f"{out}/run", "--json"])
    finally:
        loop.update = update
    named = [code for code in seen if not code.co_name.startswith("<")]
    files = sorted({Path(code.co_filename).relative_to(PACKAGE).as_posix() for code in named})
    lines = sum(len({line for *_, line in code.co_lines() if line}) for code in named)
    return {"files": len(files), "functions": len(named), "lines": lines, "names": files}


def main() -> None:
    found = {name: path_of_update(signal) for name, signal in (("baseline", "none"), ("confidence", "confidence"))}
    keep("update_path", found)
    for name, one in found.items():
        counts = f"{one['files']} files, {one['functions']} functions, {one['lines']} lines"
        print(f"{name}: {counts}: {', '.join(one['names'])}")


if __name__ == "__main__":
    main()
