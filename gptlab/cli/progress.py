"""What a person sees of a run: a live line on a terminal, plain lines in a file, samples as a table, a summary."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gptlab.cli.console import printable
from gptlab.data.corpus import Corpus
from gptlab.device import Placement
from gptlab.options import build, flatten
from gptlab.runs.begin import Beginning
from gptlab.training.config import TrainingConfig
from gptlab.training.loop import Record
from gptlab.training.presets import PRESETS

SHOWN_TOKENS = 12
"""Tokens of a sample whose blocks are shown; the row in metrics.jsonl has all of them."""
LONGEST_TOKEN = 8


class Display:
    """Shows records on standard error, or on a console of the caller's; `quiet` shows nothing. clock: in seconds."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.quiet, self._clock = config, quiet, clock
        self.console = console or Console(
            stderr=True, highlight=False, quiet=quiet, width=None if sys.stderr.isatty() else 110
        )
        self._dose: float | None = None
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._started, self._first = self._clock(), 0

    def note(self, text: str) -> None:
        self.console.print(Text(text, style="dim"), soft_wrap=True)

    def opening(
        self, config: TrainingConfig, placement: Placement, corpus: Corpus, peak: float, beginning: Beginning
    ) -> None:
        """Say what is about to run, and where."""
        signal = config.signal
        judged = "the plain baseline" if signal.name == "none" else f"block loss {signal.name}: {signal.signal.formula}"
        parameters = _model_size(config)
        verb = f"going on from {beginning.checkpoint}" if beginning.checkpoint else "starting"
        self.console.print(
            Text.assemble(
                ("gptlab ", "bold"), f"{config.preset}, {judged}\n",
                f"  model   {parameters / 1e6:.1f}M parameters, {config.n_layer} blocks, {config.n_embd} wide, "
                f"reads {config.block_size} tokens\n",
                f"  data    {corpus.folder}: {corpus.tokens('train'):,} training tokens"
                f"{'' if corpus.complete else ' so far'}\n",
                f"  machine {placement.device}, {placement.threads} thread{'s' * (placement.threads > 1)} a process, "
                f"matmul peak {peak / 1e9:,.0f} GFLOP/s\n",
                f"  dtype   {placement.dtype_name} ({placement.reasons['dtype']})\n",
                f"  run     {beginning.folder}, {verb}",
            )
        )  # fmt: skip
        self._begin_line()

    def _begin_line(self) -> None:
        self._started = self._clock()
        if self.quiet or not self.console.is_terminal:
            return
        self._live = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=16), TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True), TextColumn("left"), console=self.console,
        )  # fmt: skip
        self._task = self._live.add_task("", total=self.config.steps)
        self._live.start()

    def show(self, record: Record) -> None:
        """Show one record."""
        if record.kind == "train":
            self._train(record)
        elif record.kind == "val":
            v = record.values
            shown = evenly(len(v["block_loss"]), 4)
            blocks = " ".join(f"{v['block_loss'][j - 1]:.2f}" for j in shown)
            sure = " ".join(f"{v['block_confidence'][j - 1]:.2f}" for j in shown)
            self.console.print(
                Text.assemble(
                    (f"{record.step:>6} val   loss {v['loss']:.4f}", "bold"),
                    *([f", {v['excess_loss']:+.4f} over the floor"] if "excess_loss" in v else []),
                    *([f", clean {v['clean_loss']:.4f}"] if "clean_loss" in v else []),
                    f"  {v['bits_per_byte']:.3f} bits/byte, {v['accuracy']:.1%} right",
                    (f"  blocks {','.join(map(str, shown))}: loss {blocks}, p_max {sure}", "dim"),
                ),
                soft_wrap=True,
            )
        elif record.kind == "sample":
            self.console.print(sample_panel(record.step, record.values, self.console.width))

    def _train(self, record: Record) -> None:
        v, config = record.values, self.config
        self._dose = v.get("dose", self._dose)
        if not self._first:
            self._first = record.step
        words = f"loss {v['loss']:.3f}"
        if config.signal.name != "none":
            words += f"  signal {v['signal_loss']:+.3f}"
            words += f"  dose {self._dose:.2f}" if self._dose is not None else ""
        words += f"  {v['tokens_per_second']:,.0f} tokens/s  MFU {v['mfu']:.0%}"
        if self._live and self._task is not None:
            self._live.update(self._task, completed=record.step, description=escape(words))
        elif config.log_every and (record.step % config.log_every == 0 or record.step == config.steps):
            elapsed = self._clock() - self._started
            left = elapsed / (record.step - self._first + 1) * (config.steps - record.step)
            self.console.print(f"{record.step:>6} train {words}  {_minutes(left)} left", markup=False, soft_wrap=True)

    def finished(self, folder: str, summary: dict[str, Any], *, again: bool) -> None:
        """The summary of a run that is done, and what to try next."""
        self.close()
        table = Table.grid(padding=(0, 2))
        loss = summary["loss"]
        if loss is not None:
            table.add_row("validation loss", f"{loss:.4f} nats a token, {summary['bits_per_byte']:.4f} bits a byte")
        if "excess_loss" in summary:
            table.add_row("over the floor", f"{summary['excess_loss']:+.4f} nats a token")
        if summary["tokens_per_second"]:
            table.add_row(
                "speed", f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['mfu']:.0%} of the matmul peak"
            )
        table.add_row("clipped", f"{summary['clipped_share']:.0%} of the updates")
        table.add_row("run folder", Text(folder))
        title = f"step {summary['step']}: " + ("this run was finished before" if again else "finished")
        self.console.print(Panel(table, title=title, title_align="left", expand=False))
        self.console.print("try next:")
        for command in next_commands(self.config, folder):
            self.console.print(f"  {command}", markup=False, soft_wrap=True)  # never cut, so that it can be copied

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


def next_commands(config: TrainingConfig, folder: str) -> list[str]:
    """Commands that suit a finished run: the same run of the other launcher, to compare, and looks at this one."""
    other, what = ("train_gpt2.py", "without") if config.signal.name != "none" else ("train_gpt2_ben.py", "with")
    start = f"torchrun --standalone --nproc_per_node=1 {other}"
    if not Path(other).exists():  # gptlab was installed: its launchers are in the checkout alone
        start = "gptlab train" + " --signal.name confidence" * (what == "with")
    run = shlex.quote(folder)
    return [
        f"{command_of(config, start)}  # the same {what} the block loss",
        f'gptlab sample --checkpoint {run} --prompt "ROMEO:" --show_blocks',
        f"gptlab verify {run}",
    ]


def command_of(config: TrainingConfig, start: str) -> str:
    """The command that begins with `start` and gives what this config sets over its preset, signals left out."""
    usual = flatten(build(TrainingConfig, PRESETS[config.preset]))
    words = [start]
    if config.preset != "shakespeare-tiny":
        words.append(f"--preset {config.preset}")
    for key, value in flatten(config).items():
        if value != usual[key] and key not in ("out", "resume", "preset", "also") and not key.startswith("signal."):
            words.append(f"--{key} {shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))}")
    return " ".join(words)


def sample_panel(step: int, sample: dict[str, Any], width: int) -> Panel:
    """A sample as text, and a table of its first tokens: what each block would have said, and how sure it was.

    width: of the terminal, in characters; where not all blocks have room, some are left out, evenly.
    """
    body = Table.grid(padding=(0, 0))
    body.add_row(Text.assemble((printable(sample["prompt"].lstrip("\0")), "dim"), printable(sample["text"])))
    steps = [[(visible(word), p) for word, p in blocks] for blocks in sample["blocks"][:SHOWN_TOKENS]]
    if steps:
        longest = max(len(word) for blocks in steps for word, _ in blocks)
        shown = evenly(len(steps[0]), (width - 16) // (max(longest, 3) + 7))
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column("written")
        for j in shown:
            table.add_column(f"block {j}")
        for written, blocks in zip(sample["written"], steps, strict=False):
            guesses = [blocks[j - 1] for j in shown]
            cells = [Text(f"{word:<{max(longest, 3)}} {p:4.0%}", style=_shade(p)) for word, p in guesses]
            table.add_row(Text(visible(written), style="bold"), *cells)
        body.add_row(table)
    return Panel(body, title=f"sample at step {step}: each block's best next token and its probability",
                 title_align="left", expand=False)  # fmt: skip


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


def _minutes(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _model_size(config: TrainingConfig) -> int:
    from gptlab.model.gpt import GPTConfig

    return GPTConfig(
        config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.share_blocks
    ).parameters
