"""Runs as they lie in folders: what one left behind, which there are and how they stand, sorted, filtered and grouped.

Config, environment, losses, dose, how they ended. Reads, never writes. Only JSON is read, so that comparing runs needs
neither torch nor the machine that trained them.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

from gptlab.analysis.statistics import spread
from gptlab.data.prepare import known_tokens
from gptlab.data.tokenizers import TOKENIZERS
from gptlab.errors import GptlabError, UsageError, did_you_mean
from gptlab.files import LOCK, is_locked
from gptlab.options import as_typed, flatten
from gptlab.runs.experiment_spec import FILE as EXPERIMENT
from gptlab.runs.records import (
    EVERY,
    Clock,
    Row,
    Source,
    is_figure,
    mean_over_updates,
    path_of,
    read_config,
    read_environment,
    read_rows,
    rounded,
)
from gptlab.signals.config import SignalConfig
from gptlab.training.config import TrainingConfig

UNIGRAM_LOSSES = {"8668a430ddac561d66c6d4a1e044d57e410fd837517d19455942589a3bbcd0fe": 3.3293496725902556}
"""By validation_sha256, of runs that recorded none: of the first 131,072 bytes of Shakespeare's validation text."""


@dataclass(frozen=True)
class Run:
    """figures: {figure: {step: value}} of validations, `losses` one of them, nats; doses: by step, as measured.

    ended: the last event row, if nothing came after it.
    tempered: the last validation's loss at its best temperature; seconds: in updates, all sessions; source: of it all.
    start: norm of the first update's gradient, which equal weights and data make equal, None where it is not on record.
    norms: by step, of the signals' weighted gradient where it was measured; of a run without any, of the whole
    gradient, at the steps that a pack keeps too. step_changes: by step, of what the signals change in Adam's step.
    """

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    environment: Mapping[str, Any] = field(repr=False)
    figures: Mapping[str, Mapping[int, float]] = field(repr=False)
    last_step: int
    ended: Mapping[str, Any] = field(default_factory=dict)
    doses: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    tempered: float | None = None
    bits_per_byte: float | None = None
    seconds: float = 0.0
    source: Source = field(default="", repr=False)
    norms: Mapping[int, float] = field(default_factory=dict, repr=False)
    step_changes: Mapping[int, float] = field(default_factory=dict, repr=False)
    start: float | None = None

    @property
    def losses(self) -> Mapping[int, float]:
        return self.figures.get("loss", {})

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """The recorded options; one that came into being after the run has its default, which is how it was then.

        Of a run of another trainer only what was recorded with it.
        """
        if self.is_foreign:
            return {"also": [], **self.config["options"]}
        found, usual = self.config["options"], flatten(TrainingConfig())
        usual_signal = flatten(SignalConfig())
        return {**usual, **found, "also": [{**usual_signal, **signal} for signal in found.get("also", [])]}

    @property
    def is_foreign(self) -> bool:
        """Whether another trainer made it, and `gptlab.record` kept it."""
        return "recorder" in self.config

    @property
    def loss(self) -> float | None:
        """The last validation loss, nats; None where there is none."""
        return self.losses[max(self.losses)] if self.losses else None

    @property
    def unigram_loss(self) -> float | None:
        """Of its validation set (`ValidationWindows.unigram_loss`); None where it is not on record."""
        return self.ended.get("unigram_loss", UNIGRAM_LOSSES.get(self.ended.get("validation_sha256", "")))

    def at_plateau(self, step: int) -> bool | None:
        """Whether it is no better at `step` than the frequencies of tokens; None where that is not known."""
        return self._not_below(self.unigram_loss, step)

    def not_below_bigrams(self, step: int) -> bool | None:
        """Whether it is below the plateau and yet no better than the frequencies of pairs; None as for `at_plateau`."""
        worse = self._not_below(self.ended.get("bigram_loss"), step)
        return worse and not self.at_plateau(step)

    def _not_below(self, floor: float | None, step: int) -> bool | None:
        found = [self.figures[name][step] for name in ("loss", "clean_loss") if step in self.figures.get(name, {})]
        return None if floor is None or not found else min(found) >= floor

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
        """The mean dose over updates of a run with a signal; 0 where its weight is 0, None where not measured."""
        if self.doses:
            return mean_over_updates(self.doses)
        return 0.0 if self.options.get("signal.weight") == 0 else None

    @property
    def has_signal(self) -> bool:
        return self.options.get("signal.name", "none") != "none"


def read_run(source: Source, until: float = math.inf, each: Callable[[Row], None] = lambda row: None) -> Run:
    """The run in a folder or a pack, finished or not; `each` gets every row. until: as for read_rows.

    Raises CheckpointError where there is none or it cannot be read.
    """
    config = read_config(source)
    figures: dict[str, dict[int, float]] = {}
    doses: list[tuple[int, float]] = []
    norms, step_changes = dict[int, float](), dict[int, float]()
    norm = "grad_norm" if config["options"].get("signal.name", "none") == "none" else "signal_norm"
    ended, last, step, clock, start = {}, {}, 0, Clock(), None
    for row in read_rows(source, blocks=blocks_of(config), until=until):
        each(row)
        step = row["step"]
        if row["kind"] == "val":
            last = row
            for name, value in row.items():
                if name not in ("step", "kind") and is_figure(value):
                    figures.setdefault(name, {})[step] = value
        elif row["kind"] == "train":
            clock.tick(row)
            start = row.get("grad_norm") if step == 1 else start
            doses += [(step, row["dose"])] if row.get("dose") is not None else []
            if row.get(norm) is not None and (norm == "signal_norm" or step % EVERY in (0, 1)):
                norms[step] = rounded(row[norm])  # as a pack has it
            if row.get("step_change") is not None:
                step_changes[step] = rounded(row["step_change"])
        ended = row if row["kind"] == "event" else {}  # what follows an event is a run that was resumed
    tempered, bits = last.get("tempered_loss"), last.get("bits_per_byte")
    environment = read_environment(source)
    return Run(
        path_of(source), config, environment, figures, step, ended, tuple(doses), tempered, bits, clock.seconds, source,
        norms, step_changes, start,
    )  # fmt: skip


def norm_ratio(
    runs: Sequence[Run], others: Sequence[Run], of: Literal["norms", "step_changes"] = "norms"
) -> dict[str, float] | None:
    """The median, lowest and highest ratio of the norms of two arms' runs, over the seeds and steps that both have.

    None where they have none in common.
    """
    of_seed: dict[int, Mapping[int, float]] = {run.seed: getattr(run, of) for run in others}
    pairs = [(norm, of_seed[run.seed].get(step)) for run in runs if run.seed in of_seed
             for step, norm in getattr(run, of).items()]  # fmt: skip
    ratios = sorted(norm / other for norm, other in pairs if other)
    return {"median": median(ratios), "lowest": ratios[0], "highest": ratios[-1]} if ratios else None


def blocks_of(config: Mapping[str, Any]) -> int | None:
    """The blocks that a run's validations list; None of patched code, which may have others."""
    return (
        None
        if "patch" in config or "recorder" in config
        else config["options"].get("n_layer", TrainingConfig().n_layer)
    )


def passport(runs: list[Run], step: int) -> dict[str, Any]:
    """What an arm's figures rest on, from its runs at `step`; None for what the folders do not hold.

    Nothing is known of another trainer's runs.
    """
    options = runs[0].options
    if runs[0].is_foreign:
        return {}
    tokens, trained = step * options["total_batch_tokens"], _training_tokens(runs[0])
    vocabulary = count_vocabulary(options)
    parameters = count_parameters(options, vocabulary) if vocabulary else None
    clipped = [c for run in runs if (c := run.ended.get("clipped_share")) is not None]
    return {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters if parameters else None,
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


def count_vocabulary(options: Mapping[str, Any]) -> int | None:
    """Rows of the embedding; None for a tokenizer that only a patch's code knows."""
    tokenizer = TOKENIZERS.get(options["tokenizer"])
    return tokenizer.rows if tokenizer else None


def _training_tokens(run: Run) -> int | None:
    """Tokens of the corpus: as a packed run records, or where the corpus is at hand."""
    data = run.config["data"]
    try:
        return data.get("train_tokens") or known_tokens(run.options["data"], run.options["tokenizer"], data["train"])
    except OSError:  # a name that no folder of this machine can have
        return None


FIGURES = (
    "run", "experiment", "arm", "state", "step", "steps", "loss", "bits_per_byte", "dose", "clipped_share",
    "finished_at",
)  # fmt: skip
NO_DIFFERENCE = frozenset({"out", "resume"})
"""Options that name a run and do not make it."""
STATES = {"finished": "finished", "Stopped": "stopped", "DivergedError": "diverged", None: "unfinished"}
"""By a run's last event; failed with another error of ours, unfinished (killed) without any."""
_CONDITION = re.compile(r"([\w.]+)(<=|>=|!=|=|<|>)(.*)")


@dataclass(frozen=True)
class Listed:
    """figures: of FIGURES, None where there is none; options: as recorded; problem: why a run cannot be read."""

    path: Path
    figures: dict[str, Any]
    options: dict[str, Any]
    problem: str = ""

    def value(self, key: str) -> Any:
        """A figure or an option."""
        return self.figures[key] if key in self.figures else self.options.get(key)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders in `folder` at any depth, itself included, by name; hidden folders (the trash) are left out."""
    if (folder / "config.json").is_file():
        yield folder
        return
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)):
        if not name.startswith("."):
            yield from find_runs(folder / name)


def listed(root: Path, path: Path, until: float = math.inf) -> Listed:
    """How a run stands. until: the moment at which reading it ends, as for read_rows."""
    name = path.relative_to(root).as_posix() if path != root else path.name
    experiment, arm = experiment_of(root, path)
    try:
        run = read_run(path, until)
    except GptlabError as error:
        known = {"run": name, "experiment": experiment, "arm": arm, "state": "damaged"}
        return Listed(path, dict.fromkeys(FIGURES) | known, {}, str(error))
    named = str(run.options.get("arm") or (run.options["signal.name"] if run.has_signal else "baseline"))
    figures = figures_of(run, name) | {"experiment": experiment, "arm": arm or named}
    return Listed(path, figures, dict(run.options))


def experiment_of(root: Path, path: Path) -> tuple[str | None, str | None]:
    """The names of the experiment and the arm that a run is a cell of, None for any other run."""
    for folder in path.parents:
        if not folder.is_relative_to(root):
            break
        if (folder / EXPERIMENT).is_file():
            arm = path.parent.relative_to(folder).as_posix()
            return (folder.relative_to(root).as_posix() if folder != root else root.name), arm
    return None, None


def figures_of(run: Run, name: str) -> dict[str, Any]:
    """The FIGURES of a run that was read, but for its experiment and its arm."""
    last, rows = max(run.losses, default=None), run.path / "metrics.jsonl"
    written = datetime.fromtimestamp(rows.stat().st_mtime, UTC) if rows.exists() else None
    return {
        "run": name,
        "state": "running" if is_locked(run.path / LOCK) else STATES.get(run.ended.get("event"), "failed"),
        "step": run.last_step,
        "steps": run.options.get("steps"),
        "loss": run.losses[last] if last is not None else None,
        "bits_per_byte": run.ended.get("bits_per_byte", run.bits_per_byte),
        "dose": run.dose if run.has_signal else None,
        "clipped_share": run.ended.get("clipped_share"),
        "finished_at": f"{written:%Y-%m-%d %H:%M:%S}" if written else None,
    }


def differing(runs: Sequence[Listed]) -> list[str]:
    """The options in which these runs are not all alike, in the config's order."""
    read = [run for run in runs if run.options]
    keys = [key for key in dict.fromkeys(key for run in read for key in run.options) if key not in NO_DIFFERENCE]
    return [key for key in keys if len({repr(run.options.get(key)) for run in read}) > 1]


@dataclass(frozen=True)
class Group:
    """Runs of one arm of one experiment, with equal options but for the seed; differences: from its baseline's runs."""

    experiment: str | None
    arm: str | None
    runs: list[Listed]
    differences: dict[str, Any]

    @property
    def name(self) -> str:
        """A run's where there is one alone, else the arm's."""
        alone = self.experiment is None and len(self.runs) == 1
        return str(self.runs[0].figures["run"] if alone or self.arm is None else self.arm)

    @property
    def states(self) -> str:
        """How many runs are in which state.

        >>> state = lambda word: Listed(Path(), {"state": word}, {})
        >>> Group(None, None, [state("finished"), state("failed"), state("finished")], {}).states
        '2 finished, 1 failed'
        """
        found = Counter(run.figures["state"] for run in self.runs)
        return ", ".join(f"{count} {state}" for state, count in found.most_common())

    def values(self, figure: str) -> list[float]:
        """Of the runs that have it."""
        return [run.figures[figure] for run in self.runs if run.figures[figure] is not None]

    def mean(self, figure: str) -> tuple[float | None, float | None]:
        """A figure's mean over the runs that have it, and its standard deviation from two runs on."""
        found = self.values(figure)
        return (sum(found) / len(found) if found else None), spread(found)


def grouped(runs: Sequence[Listed]) -> dict[str | None, list[Group]]:
    """{experiment, None for other runs: its groups}, all in the order of `runs`; other runs come last."""
    by_experiment: dict[str | None, list[Listed]] = {}
    for run in runs:
        by_experiment.setdefault(run.figures["experiment"], []).append(run)
    by_experiment |= {None: by_experiment.pop(None)} if None in by_experiment else {}
    return {name: _groups(name, members) for name, members in by_experiment.items()}


def _groups(experiment: str | None, runs: Sequence[Listed]) -> list[Group]:
    keys = [key for key in differing(runs) if key != "seed"]
    around = [run for run in runs if run.options and run.figures["arm"] == "baseline"] or runs
    usual = {key: Counter(repr(run.options.get(key)) for run in around).most_common(1) for key in keys}
    groups: dict[tuple[Any, ...], Group] = {}
    for run in runs:
        shown = {key: run.options.get(key) for key in keys if repr(run.options.get(key)) != usual[key][0][0]}
        same = run.figures["arm"], run.problem, *(repr(run.options.get(key)) for key in keys)
        groups.setdefault(same, Group(experiment, same[0], [], shown if run.options else {})).runs.append(run)
    return list(groups.values())


def where(runs: Sequence[Listed], conditions: Sequence[str]) -> list[Listed]:
    """The runs that meet every condition, as `loss<2.5` or `arm=gated*`; raises UsageError, for no such arm too."""
    tests = [_parsed(condition, runs) for condition in conditions]
    for key, sign, wanted in tests:
        names = list(dict.fromkeys(str(value) for run in runs if (value := run.value(key)) is not None))
        if runs and key in ("arm", "experiment") and sign == "=" and not fnmatch.filter(names, wanted):
            listed = ", ".join(names) or "none"
            raise UsageError(f"--where: no {key} {wanted!r}{did_you_mean(wanted, names)}; there are {listed}")
    return [run for run in runs if all(_meets(run.value(key), sign, wanted) for key, sign, wanted in tests)]


def ordered(runs: Sequence[Listed], key: str, *, reverse: bool = False) -> list[Listed]:
    """Sorted by a figure or an option; runs without it come last either way. Raises UsageError."""
    _check(key, runs)
    having = [run for run in runs if run.value(key) is not None]
    kind = float if all(isinstance(run.value(key), int | float) for run in having) else str
    having.sort(key=lambda run: kind(run.value(key)), reverse=reverse)
    return having + [run for run in runs if run.value(key) is None]


def _parsed(condition: str, runs: Sequence[Listed]) -> tuple[str, str, str]:
    if not (match := _CONDITION.fullmatch(condition)):
        raise UsageError(f"--where: expected KEY=VALUE, or one of != < <= > >=, found {condition!r}")
    _check(match[1], runs)
    return match[1], match[2], match[3]


def _check(key: str, runs: Sequence[Listed]) -> None:
    known = [*FIGURES, *dict.fromkeys(option for run in runs for option in run.options)]
    if runs and key not in known:
        raise UsageError(f"no figure or option {key!r}{did_you_mean(key, known)}; figures are {', '.join(FIGURES)}")


def _meets(found: Any, sign: str, wanted: str) -> bool:
    """Numbers are compared as numbers, all else as text with * for anything, equal or not; no value is `none`."""
    try:
        a, b = float(found), float(wanted)
    except (TypeError, ValueError):
        if sign not in ("=", "!="):
            return False
        return fnmatch.fnmatchcase(as_typed(found), wanted) == (sign == "=")
    return {"=": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[sign]
