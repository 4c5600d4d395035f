"""`gptlab verify` and `gptlab digest`: whether a run's files are as they were written, and one number for its state.

Both only read. Digests compare two runs for equality, never closeness.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.cli.arguments import Parser
from gptlab.errors import CheckpointError

if TYPE_CHECKING:
    from gptlab.runs.checkpoint import Problem
    from gptlab.runs.folder import RunFolder


COVERS = (
    "checkpoints, by checksums; a finished run's rows in metrics.jsonl but for a clock's figures, by the hash in the "
    "last; an experiment's declaration, by the one of its first start. Not covered: config.json, "
    "environment.json, log.txt, runs from before such hashes, and whoever changes a hash too"
)


def main(argv: list[str]) -> int:
    """Print what is damaged and return 3 if anything is; raises CheckpointError where there is no run."""
    description = (
        "Check every checkpoint of a run against its checksums, that its records can be read, and that the rows of a "
        "finished run are those that it ended with; of an experiment's folder every cell, and that its declaration is "
        "that of its first start. Training falls back to the newest checkpoint that is whole. Exit code 3 if anything "
        "is damaged."
    )
    options = _parse(argv, "verify", description, 'print {"ok", "problems": [{"file", "problem"}]}')
    problems = list(_problems(Path(options.run)))
    if options.json:
        print(json.dumps({"ok": not problems, "problems": [dataclasses.asdict(p) for p in problems]}, indent=1))
        return 3 if problems else 0
    for p in problems:
        print(f"{p.file}: {p.problem}")
    if problems:
        raise CheckpointError(
            f"expected {options.run} as it was written, found {len(problems)} damaged file(s), listed above; "
            "training continues from the newest checkpoint that is whole"
        )
    print(f"{options.run}: every file is as it was written\ncovered: {COVERS}")
    return 0


def digest(argv: list[str]) -> int:
    """Print the SHA-256 and the step of a run's newest checkpoint; raises CheckpointError where it is damaged."""
    description = (
        "SHA-256 over weights, moments, RNG and data cursor of a run's newest checkpoint. Two runs have the same one "
        "only if every bit of their states is equal."
    )
    options = _parse(argv, "digest", description, 'print {"sha256", "step"}')
    from gptlab.runs import checkpoint
    from gptlab.runs.folder import newest

    sha256, step = checkpoint.digest(newest(options.run))
    print(json.dumps({"sha256": sha256, "step": step}) if options.json else f"{sha256}  step {step}")
    return 0


def _parse(argv: list[str], name: str, description: str, json_help: str) -> argparse.Namespace:
    parser = Parser(prog=f"gptlab {name}", description=description)
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder, or one of its checkpoints; for verify an experiment's too"
    )
    parser.add_argument("--json", action="store_true", help=json_help)
    return parser.parse(argv)


def _problems(path: Path) -> Iterator[Problem]:
    from gptlab.runs import checkpoint
    from gptlab.runs.experiment_spec import FILE, declaration, read_experiment, recorded_declaration
    from gptlab.runs.folder import RunFolder

    if (path / FILE).is_file() and not (path / "config.json").exists():
        yield from (
            checkpoint.Problem(str(path / FILE), line)
            for line in declaration(read_experiment(path / FILE, copy=True), path, recorded_declaration(path))[1]
        )
        for config in sorted(path.glob("*/seed_*/config.json")):
            yield from _problems(config.parent)
        return
    folder = RunFolder(path)
    if not folder.exists() and not folder.checkpoints.is_dir():
        if not path.is_dir() or not any((path / name).exists() for name in (checkpoint.MANIFEST, checkpoint.WEIGHTS)):
            raise CheckpointError(f"expected a run or a checkpoint, found none at {path}; check the path")
        yield from checkpoint.verify(path)
        return
    needed = {"metrics.jsonl": 0, "log.txt": 0}
    for saved in checkpoint.complete(folder.checkpoints):
        damage = checkpoint.verify(saved)
        yield from damage
        if not damage:
            try:
                records = checkpoint.read_state(saved / checkpoint.STATE)["records"]
            except CheckpointError as error:
                yield checkpoint.Problem(str(saved / checkpoint.STATE), str(error))
                continue
            lengths = {"metrics.jsonl": records.get("metrics_bytes", 0), "log.txt": records.get("log_bytes", 0)}
            needed = {name: max(length, lengths[name]) for name, length in needed.items()}
    yield from _unreadable(folder, needed)


def _unreadable(folder: RunFolder, needed: dict[str, int]) -> Iterator[Problem]:
    """The records that do not parse, or are shorter than a checkpoint needs to cut them back to."""
    from gptlab.runs.checkpoint import Problem
    from gptlab.runs.records import edited_rows

    for name, length in needed.items():
        path = folder.path / name
        found = path.stat().st_size if path.is_file() else 0
        if found < length:
            yield Problem(str(path), f"expected at least {length} bytes, found {found}")
    reads = {
        "config.json": folder.config,
        "environment.json": lambda: folder.recorded("environment.json"),
        "metrics.jsonl": lambda: edited_rows(folder.path),
    }
    for name, read in reads.items():
        try:
            found = read()
            if isinstance(found, str):
                yield Problem(str(folder.path / name), found)
        except CheckpointError as error:
            yield Problem(str(folder.path / name), str(error))
