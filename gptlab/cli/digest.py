"""`gptlab digest`: one number for the state a run has reached, to compare two runs for equality, never closeness."""

from __future__ import annotations

import json

from gptlab.cli.arguments import Parser


def main(argv: list[str]) -> int:
    """Print the SHA-256 and the step of a run's newest checkpoint; raises CheckpointError where it is damaged."""
    parser = Parser(
        prog="gptlab digest",
        description="SHA-256 over weights, moments, RNG and data cursor of a run's newest checkpoint. "
        "Two runs have the same one only if every bit of their states is equal.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--json", action="store_true", help='print {"sha256", "step"}')
    options = parser.parse(argv)

    from gptlab.runs import checkpoint
    from gptlab.runs.folder import newest

    sha256, step = checkpoint.digest(newest(options.run))
    print(json.dumps({"sha256": sha256, "step": step}) if options.json else f"{sha256}  step {step}")
    return 0
