"""What a run recorded, read and checked once: config.json, environment.json and the rows of metrics.jsonl.

A run may come from anyone, and a disk may have failed. Whoever reads one may rely on this: files are regular ones of
the run's own folder, values are of the kinds and within the bounds that training writes, and whatever is not ends in a
CheckpointError that names file and line. Only JSON is read, row by row; torch is not needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from gptlab.errors import CheckpointError, ConfigError, shown
from gptlab.files import KB, MB, is_count, is_number, open_regular, parse_json, read_json
from gptlab.options import LARGEST_SIZES, MOST_BLOCKS, Option, describe, options_of, typed
from gptlab.training.config import TrainingConfig

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"

LARGEST_RECORD = 4 * MB
"""Bytes of config.json or environment.json; ten thousand shards' checksums are about 1 MB."""
LONGEST_ROW = 4 * MB
"""Bytes of a row; a sample of 48 blocks takes about 100 kB."""
LONGEST_VALUE = 4 * KB
"""Characters of a text in config.json or environment.json."""
EVERY = 50
"""Updates between two train rows that a packed run keeps whole."""
MOST_STEPS, MOST_OPTIONS = 10**15, 1000
LARGEST, SMALLEST = 1e100, 1e-100
"""Of a figure's absolute value: its square, and sums of such, are numbers too. float32 ends at 3e38 and 1e-45."""

Row = dict[str, Any]


@dataclass(frozen=True)
class PackedRun:
    """A run within a packed experiment: what the files of its folder held. path: what errors call it."""

    path: Path
    config: Any
    environment: Any
    rows: Sequence[Any]


Source = str | Path | PackedRun


def path_of(run: Source) -> Path:
    return run.path if isinstance(run, PackedRun) else Path(run)


class SlowReadError(CheckpointError):
    """Reading a run took longer than whoever asked for it allows."""


def is_figure(value: object) -> bool:
    """Whether it is a number that can be averaged and squared.

    >>> [is_figure(value) for value in (0, -2.5, 1e-320, 1e200, float("nan"), True, "1", 10**30)]
    [True, True, False, False, False, False, False, False]
    """
    if type(value) is float:
        return value == 0 or SMALLEST <= abs(value) <= LARGEST  # false for NaN and infinity
    return type(value) is int and -(2**63) <= value < 2**63


def _is_step(value: object) -> bool:
    return is_count(value) and value <= MOST_STEPS  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _or_null(check: Callable[[Any], bool], value: object) -> bool:
    return value is None or check(value)


def _all(check: Callable[[Any], bool], value: object) -> bool:
    return isinstance(value, list) and len(value) <= MOST_BLOCKS and all(map(check, value))


def _is_guess(value: object) -> bool:
    if type(value) is not list or len(value) != 2 or type(value[0]) is not str:
        return False
    return type(value[1]) in (float, int) and 0 <= value[1] <= 1


Check = tuple[str, Callable[[Any], bool]]
_NUMBER: Check = ("a finite number", is_figure)
_FIGURE: Check = ("a finite number or null", partial(_or_null, is_figure))
_SPEED: Check = ("a number above 0, or null", lambda v: v is None or (is_figure(v) and v >= 0))
_COUNT: Check = ("a whole number", _is_step)
_TEXT: Check = ("text", _is_text)
_BOOL: Check = ("true or false", lambda value: isinstance(value, bool))
_LIST: Check = ("a list of numbers or nulls", partial(_all, _FIGURE[1]))
_LISTS: Check = ("lists of numbers or nulls", partial(_all, partial(_or_null, _LIST[1])))
_BLOCKS: Check = ("a number for each block", partial(_all, is_figure))

ROWS: Mapping[str, Mapping[str, Check]] = {
    "train": {
        **dict.fromkeys(("loss", "signal_loss", "grad_norm", "lr", "mfu", "dose", "weight", "noise_scale",
                        "signal_norm", "step_change", "step_share", "noise_step_share", "batch_noise", "reward",
                        "reward_passed", "distinct_ngrams", "argmax_entropy"), _FIGURE),
        **dict.fromkeys(("signal_by_judge", "doses", "weights", "alignment"), _LIST),
        **dict.fromkeys(("signals_by_judge", "alignment_by_block"), _LISTS),
        "clipped": _BOOL, "tokens": _COUNT, "tokens_per_second": _SPEED,
    },
    "val": {
        **dict.fromkeys(("excess_loss", "clean_loss", "accuracy", "bits_per_byte", "tempered_loss",
                        "truth_probability"), _FIGURE),
        "loss": _NUMBER, "temperature": _SPEED, "block_loss": _BLOCKS, "block_confidence": _BLOCKS,
    },
    "sample": {
        "prompt": _TEXT, "text": _TEXT, "tokens": ("token ids", partial(_all, is_count)),
        "written": ("a list of texts", partial(_all, _is_text)),
        "blocks": ("each block's [text, probability] for each token", partial(_all, partial(_all, _is_guess))),
    },
    "event": {
        "event": _TEXT, "text": _TEXT, "validation_sha256": _TEXT, "rows_sha256": _TEXT,
        "tokens": _COUNT, "tokens_per_second": _SPEED,
        **dict.fromkeys(("loss", "excess_loss", "unigram_loss", "bigram_loss", "bits_per_byte", "mfu", "seconds",
                        "clipped_share"), _FIGURE),
        "differences": ("a list of texts", partial(_all, _is_text)),
    },
}  # fmt: skip
"""What docs/metrics.md says of each kind of row; figures that it does not name are left alone."""
NEEDED = {"val": ("loss",), "sample": ("prompt", "text", "written", "blocks"), "event": ("event",)}


def parse_row(line: str | bytes | Row, blocks: int | None = None) -> Row:
    """The row that a line holds, or that is one already; raises ValueError that says what is not as training writes it.

    blocks: how many a validation lists; None where that is not known.

    >>> parse_row('{"step": 3, "kind": "val", "loss": 2.5}')
    {'step': 3, 'kind': 'val', 'loss': 2.5}
    >>> parse_row('{"step": 3, "kind": "val", "loss": "low"}')
    Traceback (most recent call last):
    ValueError: expected a finite number as loss, found 'low'
    """
    row: Any = line
    if isinstance(line, str | bytes):
        try:
            row = parse_json(line, unique=True)
        except ValueError:
            start = line[:200].decode(errors="replace") if isinstance(line, bytes) else line[:200]
            raise ValueError(f"expected a row with step and kind, found {shown(start, 60)}") from None
    if not isinstance(row, dict) or not _is_step(row.get("step")) or not _is_text(row.get("kind")):
        raise ValueError(f"expected a row with step and kind, found {shown(row, 60)}")
    kind = row["kind"]
    if missing := [name for name in NEEDED.get(kind, ()) if name not in row]:
        raise ValueError(f"expected {missing[0]} in a row of kind {kind}, found none")
    checks = ROWS.get(kind, {})
    for name, value in row.items():
        if (check := checks.get(name)) and not check[1](value):
            raise ValueError(f"expected {check[0]} as {name}, found {shown(value, 60)}")
    if kind == "train" and row.get("tokens_per_second") and "tokens" not in row:
        raise ValueError("expected tokens where there are tokens_per_second, found none")
    if kind == "val" and blocks is not None:
        for name in ("block_loss", "block_confidence"):
            if len(row.get(name) or ()) not in (0, blocks):
                raise ValueError(f"expected {blocks} numbers as {name}, one a block, found {len(row[name])}")
    return row


def read_rows(run: Source, *, blocks: int | None = None, until: float = math.inf) -> Iterator[Row]:
    """The rows of a run's metrics.jsonl, none where there is no file; a last line that a kill cut off is left out.

    blocks: of the run's model, where that is known. until: the moment (time.thread_time) at which reading ends in a
    SlowReadError. Raises CheckpointError naming the first line that is no row.
    """
    path = path_of(run) / METRICS
    if isinstance(run, PackedRun):
        yield from _in_order(path, run.rows, blocks, until)
    elif file := _opened(path):
        with file:
            yield from _in_order(path, _lines(path, file), blocks, until)


def _in_order(path: Path, lines: Iterable[bytes | Row], blocks: int | None, until: float) -> Iterator[Row]:
    step, tokens = 0, 0
    for number, line in enumerate(lines, 1):
        if until < math.inf and time.thread_time() > until:
            raise SlowReadError(f"{path} takes too long to read at line {number}; read it on the command line")
        try:
            row = parse_row(line, blocks)
            if row["step"] < step:
                raise ValueError(f"expected steps that do not fall, found {row['step']} after {step}")
            if row["kind"] == "train" and row.get("tokens", tokens) < tokens:
                raise ValueError(f"expected tokens that do not fall, found {row['tokens']} after {tokens}")
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number}: {error}; remove that line, or leave the run out") from None
        step = row["step"]
        tokens = row.get("tokens", tokens) if row["kind"] == "train" else tokens
        yield row


def new_rows(path: Path, offset: int) -> Iterator[tuple[Row, int]]:
    """The rows behind a byte of a metrics.jsonl that grows, each with the byte where it ends; raises as read_rows."""
    file = _opened(path)
    if file is None:
        return
    with file:
        file.seek(offset)
        for line in _lines(path, file):
            offset += len(line)
            try:
                yield parse_row(line), offset
            except ValueError as error:
                raise CheckpointError(f"{path}, before byte {offset}: {error}") from None


def replayed_norms(config: TrainingConfig) -> dict[int, float]:
    """{finished updates: norm} that the run named by `signal.placebo_of` recorded of its signal; {} without one.

    Raises CheckpointError where it lacks one of the updates that the placebo is to make.
    """
    if not config.signal.placebo_of:
        return {}
    name = "signal_norm" if config.signal.placebo_match == "gradient" else "step_change"
    rows = (row for row in read_rows(config.signal.placebo_of) if row["kind"] == "train")
    norms = {row["step"]: float(row[name]) for row in rows if row.get(name) is not None}
    needed = [k + 1 for k in range(config.steps) if config.signal.weight_at(k, config.n_layer)]
    if missing := [step for step in needed if step not in norms]:
        raise CheckpointError(
            f"signal.placebo_of {config.signal.placebo_of}: expected {name} of each of the {len(needed):,} updates "
            f"with the signal, found none of update {missing[0]:,} and {len(missing) - 1:,} more; train that run to "
            "its end, with --dose_every 1"
        )
    return norms


DIGITS = 7
"""Significant digits of figures that are averaged or drawn."""


def rounded(figure: float) -> float:
    """A figure to DIGITS."""
    return float(f"{figure:.{DIGITS}g}")


def mean_over_updates(measured: Sequence[tuple[int, float]]) -> float | None:
    """The mean of a figure that was measured after some updates: each stands for those up to the next, and the last for
    as many as the one before. Figures count with the DIGITS that a pack keeps of them, so that its mean is the same.

    >>> mean_over_updates([(1, 3.0), (2, 3.0), (3, 1.0), (13, 1.0)])  # 1.0 in 20 of 22 updates
    1.1818181818181819
    """
    lengths = [max(1, later - step) for (step, _), (later, _) in pairwise(measured)]
    lengths += lengths[-1:] or [1] * len(measured)
    values = [rounded(value) for _, value in measured]
    return math.fsum(map(operator.mul, lengths, values)) / sum(lengths) if measured else None


CLOCK = ("tokens_per_second", "mfu")
"""Figures of train rows that differ between two equal runs."""


def rows_sha256(rows: Iterable[Row]) -> str:
    """SHA-256 over train and val rows without what a clock measures: equal for equal runs, killed on the way or not."""
    h = hashlib.sha256()
    for row in rows:
        if row["kind"] in ("train", "val"):
            h.update(json.dumps({key: value for key, value in row.items() if key not in CLOCK}).encode() + b"\n")
    return h.hexdigest()


def edited_rows(run: Source) -> str | None:
    """What to say where a finished run's rows are not those that it ended with; None too where none are on record."""
    if isinstance(run, PackedRun):
        return None
    rows = list(read_rows(run))
    recorded = rows[-1].get("rows_sha256") if rows and rows[-1].get("event") == "finished" else None
    if not recorded or rows_sha256(rows) == recorded:
        return None
    return f"{path_of(run) / METRICS}: its rows are not those that the run ended with; they were changed since"


def last_row(run: str | Path) -> tuple[Row | None, int]:
    """The last whole row of a run's metrics.jsonl, None where it is none or cannot be read, and where it ends."""
    path = Path(run) / METRICS
    file = _opened(path)
    if file is None:
        return None, 0
    with file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - 2 * LONGEST_ROW))
        whole, _, rest = file.read(size - start).rpartition(b"\n")
    try:
        return parse_row(whole.rpartition(b"\n")[2]), size - len(rest)
    except ValueError:
        return None, size - len(rest)


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open_regular(path, inside=path.parent, error=CheckpointError)
    except FileNotFoundError:
        return None


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Its whole lines; raises CheckpointError for one that is longer than any row."""
    while (line := file.readline(LONGEST_ROW)).endswith(b"\n"):
        yield line
    if len(line) == LONGEST_ROW:
        raise CheckpointError(f"{path} is damaged: expected rows of at most {LONGEST_ROW:,} bytes, found a longer line")


@dataclass
class Clock:
    """Seconds spent in updates, from train rows in their order; rows left out count at the speed of the next."""

    seconds: float = 0.0
    _tokens: int = 0

    def tick(self, row: Mapping[str, Any]) -> None:
        if row.get("tokens_per_second"):
            self.seconds += (row["tokens"] - self._tokens) / row["tokens_per_second"]
        self._tokens = row.get("tokens", self._tokens)


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON file of a run: an object of plain values with an object for each of `keys`; raises CheckpointError."""
    try:
        content = read_json(path, limit=LARGEST_RECORD, inside=path.parent, error=CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"expected a run folder, found no {path.name} in {path.parent}") from None
    return checked_record(path, content, *keys)


def checked_record(path: Path, content: Any, *keys: str) -> dict[str, Any]:
    """The content of a JSON file of a run, as read_record gives it; raises CheckpointError."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in keys):
        expected = "a JSON object" + f" with {' and '.join(keys)}" * bool(keys)
        raise CheckpointError(f"{path} is damaged: expected {expected}, found {shown(content, 60)}; {_INSTEAD}")
    if (wrong := next(_unplain(content), None)) is not None:
        raise CheckpointError(f"{path} is damaged: {wrong}; {_INSTEAD}")
    return content


_INSTEAD = "leave that run out, or train it in another folder"


def _unplain(value: Any, where: str = "") -> Iterator[str]:
    """What of a JSON value is more than a run records: numbers without an end, texts that are a file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _unplain(key, where)
            yield from _unplain(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _unplain(inner, where)
    elif isinstance(value, str) and (len(value) > LONGEST_VALUE or "\0" in value):
        yield f"expected no text with NUL or over {LONGEST_VALUE:,} characters, found one in {shown(where, 60)}"
    elif isinstance(value, int | float) and not (isinstance(value, bool) or is_number(value)):
        yield f"expected a number that 64 bits hold as {shown(where, 60)}, found {shown(value, 30)}"


SIZES = ("n_layer", "n_head", "n_embd", "block_size", "total_batch_tokens", "steps")
"""Options that a run's arithmetic is counted with."""


def read_config(run: Source) -> dict[str, Any]:
    """A run's config.json, or CheckpointError: options by kind (a patch alone may know their values), and data."""
    path = path_of(run) / CONFIG
    config = checked_record(path, run.config, "options") if isinstance(run, PackedRun) else read_record(path, "options")
    options, data = config["options"], config.setdefault("data", {})

    def refuse(expected: str, key: str, found: object) -> None:
        raise CheckpointError(f"{path}: expected {expected} for {key}, found {shown(found, 60)}; {_INSTEAD}")

    if not is_count(options.get("seed")):
        refuse("a run's options with its seed", "seed", options.get("seed"))
    known = {option.key: replace(option, choices=() if "patch" in config else option.choices)
             for option in options_of(TrainingConfig)}  # fmt: skip
    of_signal = {key.removeprefix("signal."): option for key, option in known.items() if key.startswith("signal.")}
    also = options.get("also", [])
    if not isinstance(also, list) or not all(isinstance(one, dict) for one in also):
        refuse("a list of signals", "also", also)
    for table, options_there in [(options, known), *((one, of_signal) for one in also)]:
        for key, value in table.items():
            if key in options_there and not _fits(options_there[key], value):
                option = options_there[key]
                refuse(f"one of {', '.join(option.choices)}" if option.choices else describe(option.type), key, value)
    for key in SIZES:
        if not 1 <= options.get(key, 1) <= LARGEST_SIZES[key]:
            refuse(f"a number from 1 to {LARGEST_SIZES[key]:,}", key, options[key])
    if not isinstance(data, dict):
        refuse("what data the run had", "data", data)
    for split in ("train", "val"):
        if not _all_texts(data.setdefault(split, [])):
            refuse("its shards' checksums", f"data {split}", data[split])
    for key in ("replayed", "recorder"):
        if not _or_null(_is_text, config.get(key)):
            refuse("text", key, config[key])
    if not isinstance(config.get("despite", []), list):
        refuse("a list of differences", "despite", config["despite"])
    if not _or_null(is_count, data.get("train_tokens")):
        refuse("a whole number", "data train_tokens", data["train_tokens"])
    if len(options) > MOST_OPTIONS or len(also) > MOST_OPTIONS:
        refuse(f"at most {MOST_OPTIONS}", "options", f"{max(len(options), len(also)):,} of them")
    return config


def _fits(option: Option, value: Any) -> bool:
    """Whether a value of config.json is of the option's kind as training writes it: no text where a number belongs."""
    try:
        found = typed(option, value)
    except ConfigError:
        return False
    if isinstance(found, tuple):
        return list(found) == value and len(found) <= MOST_BLOCKS
    same = found == value
    return same and (is_figure(value) if isinstance(found, int | float) and not isinstance(found, bool) else True)


def _all_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def read_environment(run: Source) -> dict[str, Any]:
    """A run's environment.json; raises CheckpointError where what is compared of it is of another kind."""
    path = path_of(run) / ENVIRONMENT
    environment = checked_record(path, run.environment) if isinstance(run, PackedRun) else read_record(path)
    if not _is_environment(environment):
        raise CheckpointError(f"{path}: expected a machine with its gpus, and earlier sessions alike; {_INSTEAD}")
    return environment


def _is_environment(content: Mapping[str, Any]) -> bool:
    machine, earlier = content.get("machine", {}), content.get("earlier", [])
    return (
        isinstance(machine, dict)
        and _all_texts(machine.get("gpus", []))
        and isinstance(earlier, list)
        and all(isinstance(before, dict) and _is_environment(before) for before in earlier)
    )
