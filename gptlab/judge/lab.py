"""A lab: the folder of `gptlab judge`, what its lab.toml declares, how one is written, its ledger, a command's metric.

docs/judge.md explains every key; `lab_text` writes them all, with comments.

A ledger is a file of JSON lines to which lines are only added, each with the hash of the one before, so that an edit is
found. A chain cannot show that its end was cut off. So a lab has two: `ledger.jsonl`, one line a try, and
`journal.jsonl`, what was reserved and adopted; each line holds the head of the other chain as it stood, which has to be
there still.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gptlab.analysis.statistics import check_looks
from gptlab.errors import ConfigError, DataError, did_you_mean
from gptlab.files import GB, MB, open_append, parse_json, read_text, read_toml, take_lock
from gptlab.options import build, flatten, option, options_of, table_options
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS, preset_options

FILE = "lab.toml"
DECLARED = ("metric.", "plan.looks", "plan.confirm", "plan.error_rate")
"""Keys that may not change once an idea was tried: the promise is for all ideas together."""

ENVIRONMENT_SEED = "GPTLAB_SEED"
FIRST_FRESH = 1001
"""The first seed that confirms; screening has seeds 1, 2, ... below it."""


@dataclass(frozen=True)
class Baseline:
    command: str = option("", "what trains and evaluates, run by sh; {seed} stands for the seed")
    path: str = option("", "the folder that it runs in a copy of, as seen from the lab")
    preset: str = option("", "in place of a command: a preset of gptlab, with [options]")


@dataclass(frozen=True)
class Metric:
    pattern: str = option("", "a regular expression with one group; its last match in the output counts")
    json: str = option("", "instead: a key of a JSON line of the output; the last such line counts")
    csv: str = option("", "instead: FILE:COLUMN of a CSV file that the command writes; its last row counts")
    better: str = option("lower", "whether lower or higher is better", choices=("lower", "higher"))
    min_gain: float = option(0.0, "the smallest mean gain that is kept", unit="the metric's")
    second: str = option("", "a pattern like the first, of a second validation slice: reported, never used to choose")

    @property
    def sign(self) -> float:
        """What makes a difference, idea minus baseline, a gain."""
        return -1.0 if self.better == "lower" else 1.0


@dataclass(frozen=True)
class Plan:
    looks: tuple[int, ...] = option((2, 4, 8), "seeds at which an idea is looked at in screening")
    confirm: tuple[int, ...] | None = option(
        None, "fresh seeds at which it is confirmed", shown="the last look's, and twice as many"
    )
    error_rate: float = option(0.05, "the probability of a false keep in the whole ledger")
    time_limit: float = option(3600.0, "of a run", unit="seconds")
    jobs: int = option(1, "runs at a time")
    budget: float | None = option(None, "of all runs of an idea, its own and new ones of the baseline", unit="seconds")
    disk: float = option(4.0, "that a run may write", unit="GB")

    @property
    def confirm_looks(self) -> tuple[int, ...]:
        return self.confirm or (self.looks[-1], 2 * self.looks[-1])


@dataclass(frozen=True)
class Paths:
    allow: tuple[str, ...] = option(("**",), "globs of files that an idea may change")
    deny: tuple[str, ...] = option((), "globs of files that it may not, whatever allow says")


@dataclass(frozen=True)
class LabConfig:
    baseline: Baseline = Baseline()
    metric: Metric = Metric()
    plan: Plan = Plan()
    paths: Paths = Paths()


@dataclass(frozen=True)
class Lab:
    """folder: of lab.toml; options: of a preset's runs."""

    folder: Path
    config: LabConfig
    options: Mapping[str, Any]

    @cached_property
    def tree(self) -> Path:
        """The folder that a command's baseline is a copy of."""
        return (self.folder / self.config.baseline.path).resolve()

    def declared(self) -> dict[str, Any]:
        """What may not change once an idea was tried."""
        return {key: value for key, value in flatten(self.config).items() if key.startswith(DECLARED)}

    def check_unchanged(self, first: Mapping[str, Any]) -> None:
        """Raise ConfigError where this is not what the ledger's first try declared."""
        now = json.loads(json.dumps(self.declared()))
        if changed := [key for key in now if now[key] != first.get(key)]:
            raise ConfigError(
                f"{self.folder / FILE}: {', '.join(changed)} changed since the first idea was tried; the error rate is "
                "promised for the whole ledger: undo the change, or begin a new lab"
            )


def read_lab(folder: str | Path) -> Lab:
    """The lab in a folder; raises ConfigError that names the file and the nearest key."""
    folder = Path(folder)
    path = folder / FILE
    try:
        table = dict(read_toml(path, limit=MB, error=ConfigError))
    except FileNotFoundError:
        raise ConfigError(
            f"expected a lab at {folder}, found no {FILE} there; `gptlab judge --init` writes one"
        ) from None
    try:
        return _lab(folder, table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _lab(folder: Path, table: dict[str, Any]) -> Lab:
    options = table.pop("options", {})
    baseline, paths = table.get("baseline", {}), table.get("paths", {})
    if isinstance(baseline, dict) and "options" in baseline:
        options, table["baseline"] = baseline["options"], {k: v for k, v in baseline.items() if k != "options"}
    if isinstance(paths, dict) and paths.get("deny") == []:
        table["paths"] = {k: v for k, v in paths.items() if k != "deny"}
    config = build(LabConfig, table_options(table, LabConfig))
    typed = table_options(options, TrainingConfig) if isinstance(options, Mapping) else {}
    _check(config, typed)
    lab = Lab(folder.resolve(), config, typed)
    if config.baseline.command and not lab.tree.is_dir():
        raise ConfigError(f"baseline.path: expected a folder, found none at {lab.tree}")
    return lab


def _check(config: LabConfig, options: Mapping[str, Any]) -> None:
    baseline, metric, plan = config.baseline, config.metric, config.plan
    if bool(baseline.command) == bool(baseline.preset):
        raise ConfigError("[baseline]: expected either a command, with its path, or a preset")
    if baseline.command:
        if not baseline.path or options:
            raise ConfigError("[baseline]: a command needs its path, and takes no [options]")
        if sum(map(bool, (metric.pattern, metric.json, metric.csv))) != 1:
            raise ConfigError("[metric]: expected one of pattern, json and csv")
    elif baseline.preset not in PRESETS:
        raise ConfigError(f"baseline.preset: no preset {baseline.preset!r}{did_you_mean(baseline.preset, PRESETS)}")
    elif metric.pattern or metric.json or metric.csv or metric.second or metric.better != "lower":
        raise ConfigError("[metric]: a preset's is its validation loss, which is read without a pattern; leave it out")
    else:
        usual = preset_options(baseline.preset, options)
        build(TrainingConfig, {**usual, **options, "preset": baseline.preset})
    for key in ("pattern", "second"):
        _check_pattern(f"metric.{key}", getattr(metric, key))
    if metric.csv and not all(metric.csv.rpartition(":")[::2]):
        raise ConfigError(f"metric.csv: expected FILE:COLUMN, found {metric.csv!r}")
    check_looks(plan.looks)
    check_looks(plan.confirm_looks)
    if plan.looks[-1] >= FIRST_FRESH:
        raise ConfigError(f"plan.looks: expected fewer than {FIRST_FRESH} seeds, found {plan.looks[-1]}")
    if not 0 < plan.error_rate <= 0.1:
        raise ConfigError(f"plan.error_rate: expected above 0 and at most 0.1, found {plan.error_rate:g}")
    if metric.min_gain < 0:
        raise ConfigError(f"metric.min_gain: expected at least 0, found {metric.min_gain:g}")
    for key in ("time_limit", "jobs", "budget", "disk"):
        if (found := getattr(plan, key)) is not None and found <= 0:
            raise ConfigError(f"plan.{key}: expected a number above 0, found {found:g}")


def _check_pattern(key: str, pattern: str) -> None:
    if not pattern:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f"{key}: expected a regular expression, found {pattern!r}: {error}") from None
    if groups != 1:
        raise ConfigError(f"{key}: expected one group, such as 'loss ([0-9.]+)', found {groups} in {pattern!r}")


LONGEST_LINE = 4096
"""Characters of a line of output in which a pattern is looked for."""


def read_metric(output: str, metric: Metric) -> float | None:
    """The metric in a command's output; nan or inf where that is what it printed last; None where there is none.

    >>> read_metric("loss 2.5\\nloss nan", Metric(pattern=r"loss ([0-9.]+)"))
    nan
    """
    if metric.pattern:
        return last_match(output, metric.pattern)
    for line in reversed(output.splitlines()):
        try:
            found = parse_json(line)
            return float(found[metric.json])
        except (ValueError, TypeError, KeyError, IndexError):
            continue
    return None


def last_match(output: str, pattern: str) -> float | None:
    """The number in the last line that a pattern matches, also where it stands for a number and a NaN is printed."""
    number, without = re.compile(pattern), re.compile(_of_no_number(pattern), re.IGNORECASE)
    for line in reversed(output.splitlines()):
        for found in [*number.finditer(line[:LONGEST_LINE]), *without.finditer(line[:LONGEST_LINE])][::-1]:
            try:
                return float(found[1])
            except (ValueError, TypeError):
                continue
    return None


def _of_no_number(pattern: str) -> str:
    """The pattern with nan or inf in its one group.

    >>> _of_no_number(r"\\(loss\\) ([(0-9.]+)$")
    '\\\\(loss\\\\) ([-+]?(?:nan|inf(?:inity)?))$'
    """
    opened, depth, in_class, start = 0, 0, False, None
    for at, (c, before) in enumerate(zip(pattern, " " + pattern, strict=False)):
        escaped = before == "\\" and (at - len(pattern[:at].rstrip("\\"))) % 2 == 1
        if escaped:
            continue
        if c in "[]":
            in_class = c == "["
        elif c == "(" and not in_class:
            if start is None and not re.match(r"\(\?(?!P<)", pattern[at:]):
                start, opened = at, depth
            depth += 1
        elif c == ")" and not in_class:
            depth -= 1
            if start is not None and depth == opened:
                return pattern[:start] + "([-+]?(?:nan|inf(?:inity)?))" + pattern[at + 1 :]
    return pattern


def last_in_csv(work: Path, where: str) -> float | None:
    """The last number in a column of a CSV file that the command wrote."""
    name, _, column = where.rpartition(":")
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(work / name, limit=64 * MB, inside=work))))
        return float(rows[-1][column])
    except (FileNotFoundError, DataError, IndexError, KeyError, TypeError, ValueError, csv.Error):
        return None


def may_change(name: str, paths: Paths) -> bool:
    """Whether an idea may change a file, given relative to the baseline's folder with / between folders."""
    return any(matches(name, glob) for glob in paths.allow) and not any(matches(name, glob) for glob in paths.deny)


def matches(name: str, glob: str) -> bool:
    """Whether a glob means a file: * within a folder's names, ** across folders, a folder's name all below it.

    >>> [matches(name, "model/*.py") for name in ("model/gpt.py", "model/old/gpt.py")]
    [True, False]
    >>> [matches("model/old/gpt.py", glob) for glob in ("model/**", "model", "**/gpt.py", "gpt.py")]
    [True, True, True, False]
    """
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob.removeprefix("./").rstrip("/"))
    return re.fullmatch("".join(words.get(part) or re.escape(part) for part in parts) + "(?:/.*)?", name) is not None


def machine_type() -> str:
    """What a run's numbers may depend on besides its files: system, processor and GPUs.

    gptlab.device knows them too, by way of torch, which a judge of other people's trainers need not import.
    """
    found = [platform.system(), platform.machine(), platform.processor()]
    for path, key in ((Path("/proc/cpuinfo"), "model name"), *((p, "Model") for p in _gpus())):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        found += [line.partition(":")[2].strip() for line in lines if line.startswith(key)][:1]
    return ", ".join(filter(None, found))


def _gpus() -> list[Path]:
    return sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))


def lab_text(given: Mapping[str, Any]) -> str:
    """The lab.toml of given keys, with every other one in a comment.

    given: {"baseline.command": ..., ...}; a key that is given with None is left out.
    """
    lines: list[str] = []
    for known in options_of(LabConfig):
        table, _, name = known.key.partition(".")
        if f"[{table}]" not in lines:
            lines += ["", f"[{table}]"]
        value, usual = given.get(known.key), "" if known.default is None else known.default
        shown = json.dumps(usual if value is None else value, ensure_ascii=False)
        unit = f", {known.unit}" if known.unit else ""
        lines.append(f"{'# ' * (value is None)}{name} = {shown}  # {known.help}{unit}")
    return "\n".join(lines[1:]) + "\n"


def with_measured(text: str, lines: Sequence[str]) -> str:
    """A lab.toml with a comment at its top, in place of the one that was written there before."""
    kept = list(itertools.dropwhile(lambda line: line.startswith("# measured:"), text.splitlines()))
    return "\n".join([*(f"# measured: {line}" for line in lines), *kept]) + "\n"


START = "0" * 64
"""What stands for the hash before the first line."""

Line = Mapping[str, Any]


class Chain:
    """One such file; `lines` reads and verifies it, `append` adds to it. Hold `locked` from reading to appending."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """All whole lines; raises DataError naming the first that is not as it was written.

        What a kill left of a last line is no line: nobody was given its verdict.
        """
        try:
            whole = read_text(self.path, limit=GB, inside=self.path.parent).rpartition("\n")[0]
        except FileNotFoundError:
            return []
        found: list[Line] = []
        for number, text in enumerate(whole.split("\n") if whole else [], 1):
            found.append(self._checked(text, number, found[-1]["hash"] if found else START))
        return found

    def _checked(self, text: str, number: int, previous: str) -> Line:
        where = f"{self.path}, line {number}"
        try:
            line = parse_json(text, unique=True)
            recorded = line["hash"]
            content = {key: value for key, value in line.items() if key != "hash"}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(f"{where}: expected a line of a ledger, found something else; it was edited") from None
        if recorded != digest(content) or text != _text(line):
            raise DataError(f"{where}: its content is not what its hash is of; it was edited: restore it from a copy")
        if content.get("previous") != previous:
            raise DataError(f"{where}: it does not follow the line before it; a line was removed or put in before it")
        return line

    def append(self, content: Mapping[str, Any]) -> Line:
        """Add a line and give it, with `line`, `time` (UTC), `previous` and `hash`; on disk when this returns."""
        before = self.lines()
        line = {"line": len(before) + 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **content}
        line["previous"] = before[-1]["hash"] if before else START
        line["hash"] = digest(line)
        with open_append(self.path) as file:
            file.truncate(sum(len(_text(one).encode()) + 1 for one in before))  # the rest of a line that a kill cut off
            file.write(_text(line).encode() + b"\n")
        return line


class Ledger:
    """The two chains of a lab's folder, which hold each other's heads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tries, self._journal = Chain(folder / "ledger.jsonl"), Chain(folder / "journal.jsonl")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The right to add lines; waits for whoever has it, for moments only."""
        lock = take_lock(self._folder / ".ledger.lock", wait=True)
        assert lock
        with lock:
            yield

    def read(self) -> tuple[list[Line], list[Line]]:
        """Tries and journal, verified, also against each other; raises DataError."""
        tries, journal = self._tries.lines(), self._journal.lines()
        for one, other, chain in ((tries, journal, self._journal), (journal, tries, self._tries)):
            heads = {line["hash"] for line in other} | {START}
            for line in one:
                if line.get("other") not in heads:
                    raise DataError(
                        f"{chain.path}: expected the line that was its last at {line['time']}, found it no more; lines "
                        "were removed: restore the file from a copy"
                    )
        return tries, journal

    def add_try(self, content: Mapping[str, Any]) -> Line:
        """Add a try; hold `locked`."""
        return self._tries.append({**content, "other": _head(self._journal.lines())})

    def add_note(self, content: Mapping[str, Any]) -> Line:
        """Add to the journal; hold `locked`."""
        return self._journal.append({**content, "other": _head(self._tries.lines())})


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON, however its keys are ordered."""
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False)


def _head(lines: list[Line]) -> str:
    return lines[-1]["hash"] if lines else START
