"""The README's picture of a run: the rows that a real run recorded, shown by the display that showed them live.

    python tools/run_picture.py RUN docs/images/run.svg

It draws what metrics.jsonl holds and nothing else: some train rows, validations, the last sample. The time left is
computed from the recorded speeds.
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gptlab.cli.progress import Display, command_of
from gptlab.runs.folder import RunFolder
from gptlab.training.loop import Record

LINES = 7
"""Train rows in the picture, at most."""
LAUNCHERS = {"none": "train_gpt2.py", "confidence": "train_gpt2_ben.py"}


def draw(run: Path, picture: Path) -> None:
    """Write the SVG of a finished run; raises CheckpointError where there is none."""
    folder = RunFolder(run)
    config = folder.config()
    every = next(n for exponent in range(9) for n in (10**exponent, 2 * 10**exponent, 5 * 10**exponent)
                 if config.steps <= LINES * n)  # fmt: skip
    console = Console(record=True, width=120, file=io.StringIO(), highlight=False, color_system="truecolor")
    console.print(Text(f"$ {command_of(config, LAUNCHERS[config.signal.name])}", style="bold"))
    seconds = 0.0
    display = Display(config, console=console, clock=lambda: seconds)
    for row in folder.rows():
        kind, step = row.pop("kind"), row.pop("step")
        if kind == "train":
            seconds += config.total_batch_tokens / row["tokens_per_second"]
        display.config = replace(config, log_every=every)
        if kind in ("train", "val") or (kind == "sample" and step == config.steps):
            display.show(Record(kind, step, row))
    display.config = config
    if summary := folder.finished(config.steps):
        display.finished(str(run), summary, again=False)
    svg = console.export_svg(title="gptlab", unique_id="run")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # a picture fetches nothing
    picture.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
