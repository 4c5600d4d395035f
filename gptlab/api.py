"""What `import gptlab` offers: train, load, compare, and record for other people's trainers.

Each does what a command of the same name does, in this process, and raises the same errors (gptlab/errors.py).
"""

from __future__ import annotations

import contextlib
import html
import math
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gptlab
from gptlab.errors import CheckpointError, ConfigError, DivergedError, shown
from gptlab.options import flatten, table_options
from gptlab.signals.config import SignalConfig
from gptlab.signals.registry import GivenFunction
from gptlab.training.config import TrainingConfig

if TYPE_CHECKING:
    from gptlab.analysis.run import Run
    from gptlab.interpret.generate import TextModel
    from gptlab.runs.folder import RunFolder

Losses = Mapping[str, Mapping[Any, float | None]]
"""{arm: {seed: loss}}"""


def train(
    options: Mapping[str, Any] | TrainingConfig | str | Path | None = None, /, *, quiet: bool = False,
    allow_code: bool = False, despite: bool = False, **more: Any,
) -> Run:  # fmt: skip
    """Train a GPT-2, or resume an unfinished run, as `gptlab train` does; gives the finished run.

    Args:
        options: those of docs/options.md, as a mapping (nested or with dotted keys), a config or a TOML file.
        quiet: show nothing on standard error.
        allow_code: let signal.name be FILE.py:FUNCTION. A function that is given itself needs no leave.
        despite: resume a run although options, data or code differ; it is recorded.
        more: options by name, over those of `options`. `signal` takes a name, a function, a SignalConfig or a list.

    Ctrl-C saves a checkpoint and raises Stopped: the same call resumes. Sets PyTorch's threads and matmul precision
    for the process. Raises ConfigError, DataError, CheckpointError, and DivergedError.

    >>> run = gptlab.train(steps=3, signal="confidence", out="runs/a", quiet=True)
    >>> run.finished, sorted(run.losses)
    (True, [3])
    """
    from gptlab.analysis.run import read_run
    from gptlab.cli.console import StopRequest
    from gptlab.cli.train import check_values, run

    values = {**_options(options), **_options(more)}
    names = [values.get("signal.name", "none"), *(one.get("name", "none") for one in values.get("also", ()))]
    given = all(isinstance(name, GivenFunction) for name in names if ".py:" in name)
    check_values(values, "options", allow_code=allow_code or given, kind=ConfigError)
    handles = threading.current_thread() is threading.main_thread()  # no other thread may listen to signals
    with StopRequest(raising=True) if handles else contextlib.nullcontext(StopRequest()) as stop:
        return read_run(run(values, stop, despite=despite, quiet=quiet)["folder"])


def _options(given: Mapping[str, Any] | TrainingConfig | str | Path | None) -> dict[str, Any]:
    """Options under dotted keys and in their own types; raises ConfigError."""
    from gptlab.cli.arguments import file_options

    if isinstance(given, str | Path):
        return file_options(given, TrainingConfig)
    table = flatten(given) if isinstance(given, TrainingConfig) else dict(given or {})
    for key, value in table.items():
        if isinstance(value, Path):
            table[key] = str(value)
    if (signal := table.pop("signal", None)) is not None:
        signals = signal if isinstance(signal, list | tuple) else [signal]
        table["signal"] = [_signal(one) for one in (*signals, *table.pop("also", ()))]
    elif also := table.pop("also", None):
        return {**table_options(table, TrainingConfig), "also": tuple(_signal(one) for one in also)}
    return table_options(table, TrainingConfig)


def _signal(given: Any) -> dict[str, Any]:
    """The options of one signal."""
    if isinstance(given, Mapping):
        given = {**given, "name": GivenFunction(given["name"]) if callable(given.get("name")) else given.get("name")}
        return {key: value for key, value in given.items() if value is not None}
    given = given if isinstance(given, SignalConfig) else SignalConfig(given)
    usual = flatten(SignalConfig())
    return {key: value for key, value in flatten(given).items() if value != usual[key]}


def load(
    source: str | Path | Run, *, device: str = "auto", dtype: str = "fp32", tokenizer: str | None = None
) -> TextModel:
    """The GPT of a run (its newest checkpoint), a checkpoint or a Hugging Face folder, in evaluation mode.

    It is a `gptlab.model.GPT` that also has its tokenizer, and `generate(prompt)`. tokenizer: bytes or gpt2, for a
    folder that brings none. Raises CheckpointError where there is no model, ConfigError for what does not fit.

    >>> model = gptlab.load("runs/a")
    >>> len(model.generate("To be", max_new_tokens=20, temperature=0)) > 0
    True
    """
    from gptlab.cli.model import open_model
    from gptlab.interpret.generate import TextModel

    return TextModel(open_model(str(getattr(source, "path", source)), device, dtype, tokenizer=tokenizer))


@dataclass(frozen=True, repr=False)
class Comparison:
    """Verdicts: prints as tables, shows as HTML in a notebook.

    result: all of it, in the shape of `gptlab compare --json` (docs/commands.md).

    >>> found = gptlab.compare({"baseline": {1: 3.00, 2: 3.10, 3: 3.05}, "wider": {1: 2.80, 2: 2.91, 3: 2.85}})
    >>> list(found.arms), found["wider"]["n"], found.to_dict()["baseline"]
    (['wider'], 3, 'baseline')
    >>> print(str(found).splitlines()[0])
    wider helps: 2.85 against 3.05 nats, difference -0.20 [-0.21, -0.18], 3 seeds
    """

    result: Mapping[str, Any]

    @property
    def arms(self) -> Mapping[str, Mapping[str, Any]]:
        """{arm: its verdict, reason, difference, interval, ...}."""
        return self.result["arms"]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, which JSON can hold."""
        return dict(self.result)

    def __getitem__(self, arm: str) -> Mapping[str, Any]:
        return self.arms[arm]

    def __repr__(self) -> str:
        from gptlab.analysis.tables import remarks, sentences, tables
        from gptlab.cli.console import result_text

        return result_text(tables(self.result), remarks(self.result), first=sentences(self.result))

    __str__ = __repr__

    def _repr_html_(self) -> str:
        from gptlab.analysis.tables import remarks, sentences, tables

        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        parts = [f"<p><strong>{html.escape(line)}</strong></p>" for line in sentences(self.result)]
        for title, header, rows in tables(self.result):
            body = "".join(row(cells, "td") for cells in rows)
            head = f"<caption>{html.escape(title)}</caption><thead>{row(header, 'th')}</thead>"
            parts.append(f"<table>{head}<tbody>{body}</tbody></table>")
        notes = "".join(f"<li>{html.escape(line)}</li>" for line in remarks(self.result))
        return "".join(parts) + f"<ul>{notes}</ul>"


def compare(
    *sources: str | Path | Run | Losses, baseline: str | Path | None = None, delta: float | None = None,
    looks: Sequence[int] | None = None, seeds: Sequence[int] | None = None, placebos: Mapping[str, str] | None = None,
    step: int | None = None, metric: str = "loss", better: str | None = None, despite: bool = False,
) -> Comparison:  # fmt: skip
    """Say of every arm whether it is better, worse or no different than the baseline, paired by seed, and why.

    Args:
        sources: runs, a folder of runs, an experiment (its folder or its packed file), a log of another trainer, or
            {arm: {seed: loss}}.
        baseline: an arm's name, or of single runs the folder of one; by default "baseline", or without a signal.
        delta: the largest difference that does not matter, nats. An experiment's file declares this and what follows.
        looks, seeds, placebos: as for `gptlab.analysis.compare`.
        metric: what is judged, a figure of validations; better: "lower" or "higher", where that is not known of it.
        step: at which losses are compared; by default the last that all have.
        despite: compare runs although they differ in what nobody declared.

    Raises ConfigError with the difference where runs differ in more than their arms declare.

    >>> found = gptlab.compare({"baseline": {1: 3.00, 2: 3.10, 3: 3.05}, "wider": {1: 2.80, 2: 2.91, 3: 2.85}})
    >>> found["wider"]["verdict"], round(found["wider"]["difference"], 2)
    ('better', -0.2)
    """
    from gptlab.analysis import load as loading
    from gptlab.runs.experiment_spec import Metric

    given: dict[str, Any] = {"delta": delta, "looks": looks, "placebos": placebos}
    base = str(baseline) if baseline is not None else None
    if not sources:
        raise ConfigError("expected runs, an experiment, a log or losses to compare, found nothing")
    judged = Metric.of(metric, better)
    if isinstance(sources[0], Mapping) and len(sources) == 1:
        of_metric = {"metric": judged.name, "better": judged.better}
        outcomes = loading.Outcomes(metric, 0, sources[0], {"baseline": base, "seeds": seeds, **of_metric})
        return Comparison(outcomes.verdicts(**given))
    found = [getattr(one, "path", one) for one in sources]
    paths = [Path(one) for one in found if isinstance(one, str | Path)]
    if wrong := [one for one in found if not isinstance(one, str | Path)]:
        raise ConfigError(f"expected runs or paths, or losses alone, found {shown(wrong[0])} of {len(sources)} sources")
    if loading.is_experiment(paths[0]) and any(x is not None for x in (base, seeds, *given.values())):
        raise ConfigError(f"{paths[0]} declares its baseline, delta, looks, seeds and placebos itself; leave them out")
    outcomes = loading.read(paths, step=step, baseline=base, seeds=seeds, metric=judged)
    loading.refuse_undeclared(outcomes, despite=despite)
    return Comparison(outcomes.verdicts(**given))


RECORDER = "gptlab.record"


class Recorder:
    """What `record` gives: called with a step and its figures, it writes them.

    >>> with gptlab.record("trials/adam-1", seed=1, arm="adam") as log:
    ...     log(100, loss=3.1, train_loss=3.0, accuracy=0.4)
    >>> log.last
    {'loss': 3.1, 'accuracy': 0.4}
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._step = folder, -1
        self.last: dict[str, Any] = {}

    def __call__(self, step: int, *, loss: Any = None, train_loss: Any = None, **figures: Any) -> None:
        """Write the figures of a step (finished updates), which must not fall; numbers, or tensors of one value.

        loss: on held-out data, which verdicts compare; train_loss: of the update. Raises DivergedError where one of
        these is not finite, ConfigError for anything that is no number.
        """
        if not isinstance(step, int) or step < max(0, self._step):
            raise ConfigError(f"expected a step of at least {max(0, self._step)}, found {shown(step)}")
        if not figures.keys().isdisjoint({"step", "kind"}) or loss is train_loss is None:
            raise ConfigError("expected loss=, train_loss= or both, and no other figure named step or kind")
        self._step = step
        for kind, value in (("train", train_loss), ("val", loss)):
            if value is not None:
                row = {"loss": _number("loss", value), **{name: _number(name, v) for name, v in figures.items()}}
                if not math.isfinite(row["loss"]):
                    raise DivergedError(f"expected a finite {'train_' * (kind == 'train')}loss at step {step}, found "
                                        f"{row['loss']}")  # fmt: skip
                self._folder.write(kind, step, {key: x for key, x in row.items() if math.isfinite(x)})
                self.last = row if kind == "val" else self.last

    def finish(self) -> None:
        self._folder.write("event", max(0, self._step), {"event": "finished", "loss": self.last.get("loss")})

    def fail(self, error: BaseException) -> None:
        name = type(error).__name__ if not isinstance(error, KeyboardInterrupt) else "Stopped"
        self._folder.write("event", max(0, self._step), {"event": name, "text": str(error)[:1000]})


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}: expected a number, found {shown(value)}") from None


@contextlib.contextmanager
def record(
    folder: str | Path, *, seed: int, arm: str | None = None, overwrite: bool = False, **options: Any
) -> Iterator[Recorder]:
    """Record a run of your own trainer in a folder that `gptlab.compare`, `gptlab runs` and `gptlab page` read.

    Args:
        folder: a new one, or with `overwrite` one that this function made before.
        seed: runs of different arms with equal seeds are paired.
        arm: what is compared, such as "adam"; runs of one arm differ by nothing but their seed.
        options: what else the run was made with, to be kept with it: numbers, texts, true or false.

    Where the block ends the run is finished. A loss that is not finite ends the block: the run counts as diverged, and
    the program continues after it. Any other exception is recorded, and passes on. Raises CheckpointError where the
    folder is in use, ConfigError for figures that are no numbers.

    >>> for arm, gain in (("baseline", 0.0), ("mine", 0.1)):
    ...     for seed in (1, 2, 3):
    ...         with gptlab.record(f"trials/{arm}-{seed}", seed=seed, arm=arm, width=64) as log:
    ...             for step in range(1, 4):
    ...                 log(step, loss=3 + seed / 100 - gain * step)
    >>> gptlab.compare("trials")["mine"]["verdict"]
    'better'
    """
    from gptlab.runs.folder import RunFolder

    found = RunFolder(folder)
    found.refuse_foreign()
    if found.exists() and not (overwrite and found.recorded("config.json").get("recorder") == RECORDER):
        hint = "give another folder, or overwrite=True" if not overwrite else "which gptlab.record did not make"
        raise CheckpointError(f"{found.path} holds a run already; {hint}")
    config = {"gptlab": gptlab.__version__, "recorder": RECORDER, "options": {**options, "seed": seed}, "data": {}}
    if arm is not None:
        config["options"]["arm"] = str(arm)
    _check_config(found.path, config)
    found.lock(patience=0.0)
    try:
        found.record("config.json", config)
        found.record("environment.json", _environment())
        found.open_records()
        log = Recorder(found)
        try:
            yield log
        except DivergedError as error:
            log.fail(error)
        except BaseException as error:
            log.fail(error)
            raise
        else:
            log.finish()
    finally:
        found.close()


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Raise ConfigError for options that no reader of runs would take."""
    from gptlab.runs.records import PackedRun, read_config

    for key, value in config["options"].items():
        if not isinstance(value, str | int | float | None):
            raise ConfigError(f"{key}: expected a number, a text, true or false, found {shown(value)}")
    try:
        read_config(PackedRun(path, config, {}, ()))
    except CheckpointError as error:
        raise ConfigError(str(error).partition("; leave that run out")[0]) from None


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "machine": {"processor": platform.processor() or platform.machine(), "gpus": []},
    }
