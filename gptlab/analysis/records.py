"""One run as its folder tells it: config, environment, validation losses, dose, how it ended. Reads, never writes.

Only JSON is read, so that comparing runs needs neither torch nor the machine that trained them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gptlab.data.prepare import known_tokens
from gptlab.data.tokenizers import TOKENIZERS
from gptlab.errors import CheckpointError
from gptlab.options import flatten, options_of
from gptlab.parsing import is_count, is_number, parse_json
from gptlab.runs.rows import Clock, parse_row
from gptlab.training.config import TrainingConfig


@dataclass(frozen=True)
class Run:
    """losses: validation loss by step, nats; ended: the last event row, where there is one; doses: as measured.

    tempered: the last validation's loss at its best temperature, nats; seconds: spent in updates, all sessions.
    """

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    losses: Mapping[int, float]
    last_step: int
    ended: Mapping[str, Any] = field(default_factory=dict)
    doses: tuple[float, ...] = ()
    tempered: float | None = None
    seconds: float = 0.0

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """The recorded options; one that came into being after the run has its default, which is how it was then."""
        return {**flatten(TrainingConfig()), **self.config["options"]}

    @property
    def seed(self) -> int:
        return self.options["seed"]

    @property
    def finished(self) -> bool:
        return self.ended.get("event") == "finished"

    @property
    def diverged(self) -> bool:
        return self.ended.get("event") == "DivergedError"

    @property
    def dose(self) -> float | None:
        """The mean dose of a run with a signal; 0 where its weight is 0, None where it was not measured."""
        if self.doses:
            return sum(self.doses) / len(self.doses)
        return 0.0 if self.options.get("signal.weight") == 0 else None

    @property
    def has_signal(self) -> bool:
        return self.options.get("signal.name", "none") != "none"


def read_run(path: str | Path) -> Run:
    """The run in a folder, finished or not; raises CheckpointError where there is none or it cannot be read."""
    path = Path(path)
    config = _json(path / "config.json")
    if not isinstance(config.get("options"), dict) or not is_count(config["options"].get("seed")):
        raise CheckpointError(f"{path / 'config.json'}: expected a run's options with its seed, found none")
    for option in options_of(TrainingConfig):  # by kind alone: what values a patch allows, only its code knows
        if option.type in (int, float) and not is_number(value := config["options"].get(option.key, 0)):
            raise CheckpointError(f"{path / 'config.json'}: expected a number for {option.key}, found {value!r:.60}")
    losses: dict[int, float] = {}
    doses: list[float] = []
    ended: Mapping[str, Any] = {}
    step, clock, tempered = 0, Clock(), None
    for row in read_rows(path / "metrics.jsonl"):
        step = row["step"]
        if row["kind"] == "val":
            losses[step], tempered = row["loss"], row.get("tempered_loss")
        elif row["kind"] == "train":
            clock.tick(row)
            doses += [row["dose"]] if row.get("dose") is not None else []
        ended = row if row["kind"] == "event" else {}  # what follows an event is a run that went on
    environment = _json(path / "environment.json")
    if not _is_environment(environment):
        raise CheckpointError(
            f"{path / 'environment.json'}: expected a machine with its gpus, and earlier sittings alike; leave "
            "that run out or train it again"
        )
    return Run(path, config, environment, losses, step, ended, tuple(doses), tempered, clock.seconds)


def _is_environment(content: Mapping[str, Any]) -> bool:
    """Whether what is compared of machine and software is of the kinds that a run records."""
    machine, earlier = content.get("machine", {}), content.get("earlier", [])
    gpus = machine.get("gpus", []) if isinstance(machine, dict) else None
    return (
        isinstance(gpus, list)
        and all(isinstance(gpu, str) for gpu in gpus)
        and isinstance(earlier, list)
        and all(isinstance(before, dict) and _is_environment(before) for before in earlier)
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"expected a run folder, found no {path.name} in {path.parent}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; leave that run out or train it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object; leave that run out or train it again")
    return content


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            row = parse_row(line)
            if row is None:
                raise CheckpointError(f"{path}, line {number}: expected a row with step and kind; train that run again")
            yield row


def passport(runs: list[Run], step: int) -> dict[str, Any]:
    """What an arm's figures rest on, from its runs at `step`; None for what the folders do not tell."""
    options = runs[0].options
    tokens = step * options["total_batch_tokens"]
    parameters = count_parameters(options, vocabulary := count_vocabulary(options))
    trained = _training_tokens(runs[0])
    clipped = [c for run in runs if (c := run.ended.get("clipped_share")) is not None]
    return {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "epochs": tokens / trained if trained else None,
        "vocabulary": vocabulary,
        "depth": options["n_layer"],
        "learning_rate": options["learning_rate"],
        "dose": mean_dose(runs),
        "clipped_share": sum(clipped) / len(clipped) if clipped else None,
    }


def mean_dose(runs: list[Run]) -> float | None:
    """Over the runs that have one; None where no run has."""
    doses = [run.dose for run in runs if run.has_signal and run.dose is not None]
    return sum(doses) / len(doses) if doses else None


def count_parameters(options: Mapping[str, Any], vocabulary: int) -> int:
    """Parameters of a run's GPT-2, the tied head counted once: 12·C² + 13·C a block, 2·C of ln_f, (V + T)·C."""
    C, blocks = options["n_embd"], 1 if options["share_blocks"] else options["n_layer"]
    return blocks * (12 * C * C + 13 * C) + 2 * C + (vocabulary + options["block_size"]) * C


def count_vocabulary(options: Mapping[str, Any]) -> int:
    return TOKENIZERS[options["tokenizer"]].rows


def _training_tokens(run: Run) -> int | None:
    """Tokens of the corpus: as a packed run tells, or where the corpus is at hand."""
    data = run.config["data"]
    return data.get("train_tokens") or known_tokens(run.options["data"], run.options["tokenizer"], data["train"])
