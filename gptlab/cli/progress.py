"""What observes a run: a person, by a live line, plain lines in a file, samples and a summary; and trackers (`--log`).

Trackers (TensorBoard, Weights & Biases, trackio) are handed its figures as they are recorded. The run does not know of
its observers, and what they do or fail to do changes no figure of it. Nothing leaves the machine unless the user's own
settings of Weights & Biases or trackio say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gptlab.cli.console import LiveLine, Observer, Part, bar, duration, observing, printable
from gptlab.cli.console import console as terminal
from gptlab.data.corpus import Corpus
from gptlab.device import ComputeConfig
from gptlab.errors import ConfigError, needs_package
from gptlab.options import flatten
from gptlab.runs.session import Beginning
from gptlab.signals.config import SignalConfig
from gptlab.training.config import TrainingConfig
from gptlab.training.loop import Record, due
from gptlab.training.presets import command_of

SHOWN_TOKENS = 12
"""Tokens of a sample whose blocks are shown; the row in metrics.jsonl has all of them."""
LONGEST_TOKEN = 8


class Display(Observer):
    """Shows records on standard error, or on a console of the caller's; `quiet` shows nothing. clock: in seconds."""

    def __init__(
        self, config: TrainingConfig, *, quiet: bool = False, console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.config, self.quiet, self._clock = config, quiet, clock
        self.console = console or terminal(stderr=True, quiet=quiet)
        self._dose: float | None = None
        self._step, self._figures, self._left, self._stage = 0, [], "", "starting"
        self._started, self._first = self._clock(), 0

    @observing
    def opening(
        self, config: TrainingConfig, placement: ComputeConfig, corpus: Corpus, peak: float, beginning: Beginning
    ) -> None:
        """Say what is about to run, and where."""
        signal = config.signal
        judged = "the plain baseline"
        if signal.name != "none":
            what = "block loss" if signal.kind == "reading" else "signal"
            judged = f"{what} {signal.name}: {signal.signal.formula}"
        verb = f"resuming from {beginning.checkpoint}, {placement.repeats}" if beginning.checkpoint else "starting"
        self._print("gptlab ", [f"{config.preset},", *judged.split(" ")], " ")
        for text in (
            f"  model   {config.shape.parameters / 1e6:.1f}M parameters, {config.n_layer} blocks, "
            f"{config.n_embd} wide, reads {config.block_size} tokens",
            f"  data    {corpus.folder}: {corpus.tokens('train'):,} training tokens"
            f"{'' if corpus.complete else ' so far'}",
            f"  machine {placement.device}, {placement.threads} thread{'s' * (placement.threads > 1)} a process, "
            f"matmul peak {peak / 1e9:,.0f} GFLOP/s",
            f"  dtype   {placement.dtype_name} ({placement.reasons['dtype']})",
            f"  run     {beginning.folder}, {verb}",
        ):
            self._print(text[:10], text[10:].split(" "), " ")
        self.start_line()

    @observing
    def start_line(self) -> None:
        """On a terminal, show the step in a line of its own from now on."""
        if not self.quiet and self.console.is_terminal:
            self._line = LiveLine(self.console)
            self._draw()

    def _print(self, label: str, parts: Sequence[str], between: str = "  ") -> None:
        """A label and the parts after it: a line, on a terminal folded between parts and indented as the label says."""
        width = self.console.width if self.console.is_terminal else sys.maxsize
        for line in folded(printable(label), [printable(part) for part in parts], width, between):
            text = Text(line)
            text.stylize("bold", 0, len(label) if line.startswith(label) else 0)
            self.console.print(text, soft_wrap=True)

    @observing
    def show(self, record: Record) -> None:
        """Show one record, and what is made next, if that takes its time."""
        if record.kind == "train":
            self._train(record)
        elif record.kind == "val":
            self._print(f"{record.step:>6} val   ", _validation(record))
        elif record.kind == "sample":
            self.console.print(sample_panel(record.step, record.values, self.console.width))
        self._stage = self._next(record)
        self._draw(at_once=bool(self._stage) or record.kind != "train")

    def _next(self, record: Record) -> str:
        """What the loop does after a record, "" for an update: validation, a sample and a save come in this order."""
        config, step, last = self.config, record.step, record.step == self.config.steps
        after = ("train", "val", "sample", "checkpoint").index(record.kind)
        every = {"validating": config.eval_every, "sampling": config.sample_every, "saving": config.checkpoint_every}
        return next((stage for stage in list(every)[after:] if due(every[stage], step, last)), "")

    @observing
    def stage(self, name: str) -> None:
        """Say what takes its time now."""
        self._stage = name
        self._draw(at_once=True)

    def _train(self, record: Record) -> None:
        v, config, step = record.values, self.config, record.step
        self._dose = v.get("dose", self._dose)
        if not self._first:
            self._first, self._started = step, self._clock()
        judged = config.signal.name != "none"
        self._figures = [
            Part(f"loss {v['loss']:.3f}", 1),
            *([Part(f"signal {v['signal_loss']:+.3f}", 4)] if judged else []),
            *([Part(f"dose {self._dose:.2f}", 5)] if judged and self._dose is not None else []),
            Part(f"{v['tokens_per_second']:,.0f} tokens/s", 3),
            Part(f"MFU {v['mfu']:.0%}", 6),
        ]
        elapsed, made = self._clock() - self._started, step - self._first
        seconds = elapsed / made if made else config.total_batch_tokens / v["tokens_per_second"]
        self._step, self._left = step, duration(seconds * (config.steps - step))
        if self._line is None and config.log_every and (step % config.log_every == 0 or step == config.steps):
            self._print(f"{step:>6} train ", [*(part.text for part in self._figures), f"{self._left} left"])

    def _draw(self, *, at_once: bool = False) -> None:
        if self._line:
            step, steps = self._step, self.config.steps
            counted, drawn = Part(f"step {step:,}/{steps:,}"), Part(bar(step / steps, self.console), 2)
            last = Part(f"{self._stage or f'{self._left} left':<{len('validating')}}")  # what fits stays the same
            self._line.show([counted, drawn, *self._figures, last], at_once=at_once)

    @observing
    def finished(self, folder: str, summary: dict[str, Any], *, again: bool) -> None:
        """The summary of a run that is done, and what to try next."""
        self.close()
        table = Table.grid(padding=(0, 2))
        loss = summary["loss"]
        if loss is not None:
            table.add_row("validation loss", f"{loss:.4f} nats a token, {summary['bits_per_byte']:.4f} bits a byte")
        if "excess_loss" in summary:
            table.add_row("over the floor", f"{summary['excess_loss']:+.4f} nats a token")
        if rate := summary["tokens_per_second"]:
            table.add_row("speed", f"{rate:,.0f} tokens/s, {summary['mfu']:.0%} of the matmul peak")
        table.add_row("clipped", f"{summary['clipped_share']:.0%} of the updates")
        table.add_row("run folder", Text(folder))
        title = f"step {summary['step']}: " + ("this run was finished before" if again else "finished")
        self.console.print(Panel(table, title=title, title_align="left", expand=False))
        self.console.print("try next:")
        for command in next_commands(self.config, folder):
            self.console.print(f"  {command}", markup=False, soft_wrap=True)  # never cut, so that it can be copied


def _validation(record: Record) -> list[str]:
    """What a validation found, in parts that stay whole."""
    v = record.values
    shown = evenly(len(v["block_loss"]), 4)
    blocks = " ".join(f"{v['block_loss'][j - 1]:.2f}" for j in shown)
    sure = " ".join(f"{v['block_confidence'][j - 1]:.2f}" for j in shown)
    return [
        f"loss {v['loss']:.4f}",
        *([f"{v['excess_loss']:+.4f} over the floor"] if "excess_loss" in v else []),
        *([f"clean {v['clean_loss']:.4f}"] if "clean_loss" in v else []),
        f"{v['bits_per_byte']:.3f} bits/byte",
        f"accuracy {v['accuracy']:.1%}",
        f"blocks {','.join(map(str, shown))}:",
        f"loss {blocks}",
        f"p_max {sure}",
    ]


def folded(label: str, parts: Sequence[str], width: int, between: str = "  ") -> list[str]:
    """Lines of at most `width` characters that are broken between parts; the later ones are as far in as the label.

    >>> folded("  val   ", ["loss 4.1234", "accuracy 23.4%"], 24)
    ['  val   loss 4.1234', '        accuracy 23.4%']
    """
    lines = [label + parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(between) + len(part) <= width:
            lines[-1] += between + part
        else:
            lines.append(" " * len(label) + part)
    return lines


def next_commands(config: TrainingConfig, folder: str) -> list[str]:
    """Commands that suit a finished run: the same run of the other launcher, to compare, and looks at this one."""
    other, what = ("train_gpt2.py", "without") if config.signal.name != "none" else ("train_gpt2_ben.py", "with")
    start = f"torchrun --standalone --nproc_per_node=1 {other}"
    if not Path(other).exists():  # gptlab was installed: its launchers are in the checkout alone
        start = "gptlab train" + " --signal.name confidence" * (what == "with")
    plain, run = replace(config, out=None, signal=SignalConfig(), also=()), shlex.quote(folder)
    return [
        f"{command_of(plain, start)}  # the same {what} the block loss",
        f'gptlab sample --checkpoint {run} --prompt "ROMEO:" --show_blocks',
        f"gptlab verify {run}",
    ]


def sample_panel(step: int, sample: dict[str, Any], width: int) -> Panel:
    """A sample as text, and a table of its first tokens: what each block would have said, and how sure it was.

    width: of the terminal, in characters; where not all blocks have room, some are left out, evenly.
    """
    body = Table.grid(padding=(0, 0))
    body.add_row(Text.assemble((printable(sample["prompt"].lstrip("\0")), "dim"), printable(sample["text"])))
    steps = [[(visible(word), p) for word, p in blocks] for blocks in sample["blocks"][:SHOWN_TOKENS]]
    if steps:
        body.add_row(Text("\neach block's best next token and its probability:", "dim"))
        longest = max(len(word) for blocks in steps for word, _ in blocks)
        shown = evenly(len(steps[0]), (width - 16) // (max(longest, 3) + 7))
        table = Table("written", *(f"block {j}" for j in shown), box=None, padding=(0, 1), header_style="dim")
        for written, blocks in zip(sample["written"], steps, strict=False):
            guesses = [blocks[j - 1] for j in shown]
            cells = [Text(f"{word:<{max(longest, 3)}} {p:4.0%}", style=_shade(p)) for word, p in guesses]
            table.add_row(Text(visible(written), style="bold"), *cells)
        body.add_row(table)
    return Panel(body, title=f"sample at step {step}", title_align="left", expand=False)


def evenly(blocks: int, most: int) -> list[int]:
    """At most so many (two at least) of the blocks 1..blocks, evenly spread, first and last among them.

    >>> evenly(12, 5)
    [1, 4, 7, 9, 12]
    """
    count = min(blocks, max(2, most))
    return [1 + round(i * (blocks - 1) / max(1, count - 1)) for i in range(count)]


def visible(token: str) -> str:
    """A token in at most LONGEST_TOKEN characters, with a sign for every blank."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣").replace("\0", "∅")
    shown = printable(shown) or "·"
    return shown if len(shown) <= LONGEST_TOKEN else shown[: LONGEST_TOKEN - 1] + "…"


def _shade(p: float) -> str:
    return "green" if p >= 0.9 else "yellow" if p >= 0.5 else "dim"


def figures(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl under its names, entries of lists counted from 1; what is null is left out.

    >>> figures("val", {"loss": 2.5, "block_loss": [3.0, 2.5]})
    {'val/loss': 2.5, 'val/block_loss/1': 3.0, 'val/block_loss/2': 2.5}
    """

    def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, list):
            for i, one in enumerate(value, start=1):
                yield from numbers(f"{name}/{i}", one)
        elif isinstance(value, int | float):
            yield name, float(value)

    return {name: number for key, value in values.items() for name, number in numbers(f"{kind}/{key}", value)}


Tracker: TypeAlias = tuple[Callable[..., object], Callable[[], object]]
"""How a tracker takes `(figures, step=step)`, and how it is closed."""


def _tensorboard(config: TrainingConfig, folder: Path, step: int) -> Tracker:
    """Event files in the run's folder. Every step is on disk before its checkpoint is: a resume finds none missing."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)  # readers forget what came after `step`

    def write(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _wandb(config: TrainingConfig, folder: Path, step: int) -> Tracker:
    """A run of `log_project`, written into the run's folder for `wandb sync`: offline unless the user set a mode."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it reports its own errors to its makers
    wandb = import_module("wandb")
    chosen = "mode" in wandb.setup().settings.model_fields_set
    run = wandb.init(
        project=config.log_project,
        name=config.log_name or folder.name,
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(folder),
        config=flatten(config),
        mode=None if chosen else "offline",
        settings=wandb.Settings(console="off", silent=True, disable_git=True),
    )
    return run.log, run.finish


def _trackio(config: TrainingConfig, folder: Path, step: int) -> Tracker:
    """A run of `log_project` in trackio's own folder on this machine, unless the user has set a Space for it."""
    trackio = import_module("trackio")
    name = folder.resolve()
    run = trackio.init(
        project=config.log_project, name=config.log_name or f"{name.parent.name}/{name.name}", resume="allow",
        config=flatten(config), embed=False, auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    return run.log, trackio.finish  # the run's own would be called again when Python ends, and print


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def check_installed(config: TrainingConfig) -> None:
    """Raises ConfigError for a tracker whose package is not there."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise ConfigError(needs_package(f"--log {name}", name))


@contextlib.contextmanager
def tracking(
    config: TrainingConfig, folder: Path, step: int, note: Callable[[str], None]
) -> Iterator[Callable[[Record], None]]:
    """Hands records on to all trackers of the config, from after `step` on; what they print goes to standard error.

    Raises ConfigError where one cannot begin. One that fails later is left out from then on; `note` gets the reason.
    """
    trackers: dict[str, Tracker] = {}

    def each(action: Callable[..., object]) -> None:
        for name, tracker in list(trackers.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    action(*tracker)
            except Exception as error:
                del trackers[name]
                note(f"{name} logs no more: {type(error).__name__}: {error}".partition("\n")[0])

    def write(record: Record) -> None:
        if record.kind in ("train", "val"):
            each(lambda write, _: write(figures(record.kind, record.values), step=record.step))

    try:
        for name in config.trackers:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    trackers[name] = TRACKERS[name](config, folder, step)
            except Exception as error:
                line = f"--log {name} cannot begin: {type(error).__name__}: {error}".partition("\n")[0]
                raise ConfigError(f"{line}; leave it out, or mend its settings") from error
        yield write
    finally:
        each(lambda _, close: close())
