"""What a person sees of a run: a live line on a terminal, plain lines in a file, samples as a table, a summary."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gptlab.data.corpus import Corpus
from gptlab.device import Placement
from gptlab.runs.begin import Beginning
from gptlab.training.config import TrainingConfig
from gptlab.training.loop import Record

SHOWN_TOKENS = 12
"""Tokens of a sample whose blocks are shown; the row in metrics.jsonl has all of them."""


class Display:
    """Shows records on standard error; `quiet` shows nothing (ranks that do not write)."""

    def __init__(self, config: TrainingConfig, *, quiet: bool) -> None:
        self.config, self.quiet = config, quiet
        self.console = Console(stderr=True, highlight=False, quiet=quiet, width=None if sys.stderr.isatty() else 110)
        self._dose: float | None = None
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._started, self._first = time.perf_counter(), 0

    def note(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))

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
                f"  machine {placement.device}, {placement.dtype_name} ({placement.reasons['dtype']}), "
                f"{placement.threads} thread{'s' * (placement.threads > 1)} a process, "
                f"matmul peak {peak / 1e9:,.0f} GFLOP/s\n",
                f"  run     {beginning.folder}, {verb}",
            )
        )  # fmt: skip
        self._begin_line()

    def _begin_line(self) -> None:
        self._started = time.perf_counter()
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
            blocks = "  ".join(f"{x:.2f}" for x in v["block_loss"])
            sure = "  ".join(f"{x:.2f}" for x in v["block_confidence"])
            self.console.print(
                Text.assemble(
                    (f"{record.step:>6} val   loss {v['loss']:.4f}", "bold"),
                    f"  {v['bits_per_byte']:.3f} bits/byte",
                    (f"   by block: loss {blocks}; p_max {sure}", "dim"),
                )
            )
        elif record.kind == "sample":
            self.console.print(sample_panel(record.step, record.values))

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
            elapsed = time.perf_counter() - self._started
            left = elapsed / (record.step - self._first + 1) * (config.steps - record.step)
            self.console.print(f"{record.step:>6} train {words}  {_clock(left)} left", markup=False, soft_wrap=True)

    def finished(self, folder: str, summary: dict[str, Any], *, again: bool) -> None:
        """The summary of a run that is done, and what to try next."""
        self.close()
        if self.quiet:
            return
        table = Table.grid(padding=(0, 2))
        loss = summary["loss"]
        if loss is not None:
            table.add_row("validation loss", f"{loss:.4f} nats a token, {summary['bits_per_byte']:.4f} bits a byte")
        if summary["tokens_per_second"]:
            table.add_row(
                "speed", f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['mfu']:.0%} of the matmul peak"
            )
        table.add_row("clipped", f"{summary['clipped_share']:.0%} of the updates")
        table.add_row("run folder", escape(folder))
        other = "train_gpt2_ben.py" if self.config.signal.name == "none" else "train_gpt2.py"
        script = f"torchrun --standalone --nproc_per_node=1 {other}"
        table.add_row("try next", f"{script}  # the same without the other's signal, to compare")
        table.add_row("", f'gptlab sample --checkpoint {folder} --prompt "ROMEO:"')
        table.add_row("", f"gptlab verify {folder}")
        title = f"step {summary['step']}: " + ("this run was finished before" if again else "finished")
        self.console.print(Panel(table, title=title, title_align="left", expand=False))

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


def sample_panel(step: int, sample: dict[str, Any]) -> Panel:
    """A sample as text, and a table of the last tokens: what each block would have said, and how sure it was."""
    body = Table.grid(padding=(0, 0))
    body.add_row(Text.assemble((sample["prompt"], "dim"), sample["text"]))
    steps = sample["blocks"][:SHOWN_TOKENS]
    if steps:
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column("written")
        for j in range(1, len(steps[0]) + 1):
            table.add_column(f"block {j}")
        for i, blocks in enumerate(steps):
            cells = [Text(f"{_visible(word):<3} {p:4.0%}", style=_shade(p)) for word, p in blocks]
            table.add_row(Text(_visible(sample["written"][i]), style="bold"), *cells)
        body.add_row(table)
    return Panel(body, title=f"sample at step {step}: each block's best next token and its probability",
                 title_align="left", expand=False)  # fmt: skip


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣").replace("\0", "∅") or "·"


def _shade(p: float) -> str:
    return "green" if p >= 0.9 else "yellow" if p >= 0.5 else "dim"


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _model_size(config: TrainingConfig) -> int:
    from gptlab.model.gpt import GPTConfig

    return GPTConfig(
        config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.share_blocks
    ).parameters
