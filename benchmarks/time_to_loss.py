"""Seconds to a validation loss: nanoGPT's own CPU recipe against two of gptlab's presets, on the same text and split.

    python benchmarks/time_to_loss.py --nanogpt PATH [--text FILE] [--rounds 3] [--steps N] [--json]

nanoGPT runs as its README says for a CPU (shakespeare-char; 4 blocks, 128 wide, 2,000 updates), gptlab as its presets
shakespeare-tiny and shakespeare-tiny-muon say, in turn. The clock starts with the preparation of the data and runs
through start-up and validation. All validate 40 times on as many characters, 30,720: nanoGPT on 20 random batches of
training text and 20 of the held-out tenth, gptlab on stretches of the held-out tenth at equal distances. Where nanoGPT
does not come to a loss, gptlab's share is of the whole of its run, and below what it would be.

PATH is a checkout, of which a copy is run. FILE is the text, where the checkout's data/shakespeare_char has no
input.txt. --steps shortens both, for trying the script out. Writes benchmarks/results/measured.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from figures import keep

from gptlab.training import TrainingConfig

ROOT = Path(__file__).parents[1]
LOSSES = (2.2, 2.0, 1.88, 1.75)
"""Nats a character."""
RECIPE = (
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
)  # fmt: skip
NEEDED = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
PRESETS = ("shakespeare-tiny", "shakespeare-tiny-muon")
UPDATES = 2000
EVALUATIONS = 40
"""Of a run, for both alike; nanoGPT's recipe asks for 8, between which a loss would be seen late."""

PRESET = TrainingConfig()
"""shakespeare-tiny, but for what its last learning rate is; the other preset has as many updates."""
VALIDATED, STRETCH = 2 * 20 * 12 * 64, 1024
"""Characters of a validation, and of a stretch of held-out text that gptlab reads for it."""

Mark = tuple[float, float]
"""(seconds since the start, validation loss)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run both in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, help="the text [input.txt of the checkout's data/shakespeare_char]")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds [3]")
    parser.add_argument("--steps", type=int, default=0, help="updates of both [their own]")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output instead of the table")
    parser.add_argument("options", nargs="*", help="of gptlab, after --")
    asked = parser.parse_args(argv)
    text = asked.text or asked.nanogpt / "data/shakespeare_char/input.txt"
    for path in (text, *(asked.nanogpt / name for name in NEEDED)):
        if not path.is_file():
            parser.error(f"expected a file {path}, found none; give a checkout of nanoGPT, and --text")
    runs: dict[str, list[list[Mark]]] = {"nanoGPT": [], **{preset: [] for preset in PRESETS}}
    for round_ in range(asked.rounds):
        with tempfile.TemporaryDirectory(prefix="time_to_loss_") as scratch:
            runs["nanoGPT"].append(nanogpt(asked.nanogpt, text, Path(scratch), asked.steps))
            for preset in PRESETS:
                runs[preset].append(gptlab(preset, text, Path(scratch), asked.steps, asked.options))
        print(f"round {round_ + 1} of {asked.rounds}", file=sys.stderr, flush=True)
    result = {"date": date.today().isoformat(), "cores": len(os.sched_getaffinity(0)), "steps": asked.steps or None,
              "seconds": {name: medians(marks) for name, marks in runs.items()}, "runs": runs}  # fmt: skip
    if not asked.steps:
        keep("time_to_loss", result)
    print(json.dumps(result) if asked.json else table(result))
    return 0


def nanogpt(checkout: Path, text: Path, scratch: Path, steps: int) -> list[Mark]:
    """The marks of nanoGPT's recipe, in a copy of the checkout."""
    copy = scratch / "nanogpt"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "out*"))
    data = copy / "data/shakespeare_char"
    data.mkdir(parents=True, exist_ok=True)
    if text.resolve() != (checkout / "data/shakespeare_char/input.txt").resolve():
        shutil.copyfile(text, data / "input.txt")
    updates = steps or UPDATES
    every = max(1, updates // EVALUATIONS)
    lengths = (f"--max_iters={updates}", f"--lr_decay_iters={updates}", f"--eval_interval={every}")
    start = time.perf_counter()
    subprocess.run([sys.executable, str(data / "prepare.py")], check=True, stdout=subprocess.DEVNULL, cwd=copy)
    return marks([sys.executable, "-u", "train.py", *RECIPE, *lengths], copy, start, printed_loss)


def printed_loss(line: str) -> float | None:
    """The validation loss in a line that nanoGPT prints, but for the one before its first update."""
    found = re.match(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", line)
    return float(found[2]) if found and int(found[1]) else None


def gptlab(preset: str, text: Path, scratch: Path, steps: int, options: Sequence[str]) -> list[Mark]:
    """The marks of a preset of gptlab, on one byte a character: the text is ASCII."""
    start = time.perf_counter()
    data, out = scratch / f"{preset}.characters", scratch / preset
    prepare = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import time_to_loss as t; "
    given = repr((str(text), str(data)))
    subprocess.run([sys.executable, "-c", f"{prepare}t.write_characters(*{given})"], check=True, cwd=ROOT)
    words = ["--data", data, "--out", out, "--log_every", 1, "--sample_every", 0, "--checkpoint_every", 0]
    words += ["--eval_tokens", VALIDATED, *options]
    updates = steps or PRESET.steps
    words += ["--steps", updates, "--eval_every", max(1, updates // EVALUATIONS)]
    command = [sys.executable, ROOT / "train_gpt2.py", "--preset", preset, *words]
    return marks([str(word) for word in command], ROOT, start, logged_loss)


def logged_loss(line: str) -> float | None:
    """The validation loss in a line that gptlab prints."""
    found = re.match(r"\s*\d+ val +loss ([\d.]+)", line)
    return float(found[1]) if found else None


def held_out(text: bytes) -> bytes:
    """nanoGPT's split: the last tenth is for validation."""
    return text[int(len(text) * 0.9) :]


def write_characters(text: str, folder: str) -> None:
    """Shards of the text's characters in nanoGPT's split, a token a byte."""
    import numpy as np

    from gptlab.data.shards import write_shard

    content, out = Path(text).read_bytes(), Path(folder)
    out.mkdir()
    (out / "tokenizer.txt").write_text("bytes\n")
    held = held_out(content)
    stretches = VALIDATED // STRETCH
    apart = len(held) // stretches
    if apart < STRETCH:
        raise SystemExit(f"{text}: expected {VALIDATED} held-out characters at least, found {len(held)}")
    read = b"".join(held[first : first + STRETCH] for first in range(0, stretches * apart, apart)) + held[-1:]
    for name, part in (("characters_train_000001.bin", content[: -len(held)]), ("characters_val_000000.bin", read)):
        write_shard(out / name, np.frombuffer(part, dtype=np.uint8).astype(np.uint16))


def marks(command: Sequence[str], folder: Path, start: float, loss: Callable[[str], float | None]) -> list[Mark]:
    """When a command's lines said which validation loss; raises CalledProcessError where it fails."""
    found: list[Mark] = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        last = ""
        for last in process.stdout or ():
            if (value := loss(last)) is not None:
                found.append((time.perf_counter() - start, value))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, last)
    return found


def seconds_to(target: float, run: Sequence[Mark]) -> float | None:
    """When a run's loss was first at the target or below it."""
    return next((seconds for seconds, loss in run if loss <= target), None)


def medians(runs: Sequence[Sequence[Mark]]) -> dict[str, float | None]:
    """For every loss the median of the seconds to it; None where a run did not come so far."""

    def of(target: float) -> Iterator[float | None]:
        return (seconds_to(target, run) for run in runs)

    found = {str(target): [s for s in of(target) if s is not None] for target in LOSSES}
    return {target: statistics.median(s) if len(s) == len(runs) else None for target, s in found.items()}


def table(result: dict[str, Any]) -> str:
    """The medians as Markdown."""
    whole = statistics.median(run[-1][0] for run in result["runs"]["nanoGPT"])
    seconds = result["seconds"]
    head = ("validation loss, nats a character", *(f"{name}, s" for name in seconds), *(f"{p}, share" for p in PRESETS))
    lines = [f"| {' | '.join(head)} |", "|---:" * len(head) + "|"]
    for target in map(str, LOSSES):
        theirs = seconds["nanoGPT"][target]
        row = [target, *(_shown(of[target]) for of in seconds.values())]
        for preset in PRESETS:
            ours = seconds[preset][target]
            row.append("" if ours is None else f"{ours / theirs:.2f}" if theirs else f"below {ours / whole:.2f}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _shown(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds:.1f}"


if __name__ == "__main__":
    sys.exit(main())
