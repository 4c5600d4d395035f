"""`gptlab lens`: what every block would say at every position, raw and tuned; and what early exit would lose and save.

Readings and early exit are interpret/lens.py, the tuned readers signals/tuned_lens.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gptlab.cli.arguments import Parser, count, figure_file
from gptlab.cli.console import console, grid, printable, say
from gptlab.cli.model import add_model_options
from gptlab.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gptlab.cli.model import Opened
    from gptlab.data.corpus import Corpus
    from gptlab.signals.tuned_lens import TunedLens


NAMES = {"raw": "raw reading", "tuned": "tuned reading"}
FRAME = 3
"""Characters of a column besides its text: a line and two blanks."""


def main(argv: list[str]) -> int:
    """Look, fit or measure; raises UsageError, and CheckpointError where there is no model."""
    options = _parse(argv)

    from gptlab.cli.model import open_model

    opened = open_model(options.checkpoint, options.device, options.dtype, tokenizer=options.tokenizer)
    found: dict[str, Any] = {"checkpoint": options.checkpoint}
    if options.fit:
        found |= _fit(opened, options)
    if options.early_exit:
        found |= _early_exit(opened, options)
    if options.prompt is not None:
        found |= _look(opened, options)
    if options.html or options.figure:
        _write(options, found)
    if options.json:
        print(json.dumps(found))
    else:
        show(found, options.top or 1)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gptlab lens",
        description="What every block would say next at every position of a text (--prompt), through its raw reading "
        "and a tuned one (--fit trains it once and keeps it next to the run); and what leaving at the first block "
        "that is sure enough would lose and save (--early_exit).",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint or a Hugging Face GPT-2 folder")
    add("--prompt", metavar="TEXT", help="the text to look at")
    add("--top", metavar="K", type=count, help="tokens shown for every block and position [5; in the table 1]")
    add("--html", metavar="FILE", help="also write the lens as a page that opens offline")
    add("--fit", action="store_true", help="train an affine reader for each block, and keep it")
    add("--steps", metavar="N", type=count, default=200, help="updates of the fit [200]")
    add("--batch_tokens", metavar="N", type=count, default=2048, help="tokens of an update of the fit [2048]")
    add("--early_exit", action="store_true", help="loss, agreement and compute for confidences from 0.5 to 1")
    add("--tokens", metavar="N", type=count, default=8192, help="validation tokens that are measured on [8192]")
    add("--figure", "--svg", metavar="FILE", type=figure_file, help="also draw --early_exit: .pdf, .svg or .png")
    add("--data", metavar="NAME|FOLDER", help="corpus for --fit and --early_exit [the run's own, else shakespeare]")
    add("--seed", metavar="N", type=int, default=1, help="decides the windows that the fit reads [1]")
    add_model_options(parser)
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse(argv)
    if options.prompt is None and not options.fit and not options.early_exit:
        raise UsageError("expected --prompt TEXT, --fit or --early_exit, found none of them; see `gptlab lens --help`")
    if options.html and options.prompt is None:
        raise UsageError("--html shows a text; add --prompt TEXT")
    if options.figure and not options.early_exit:
        raise UsageError("--figure draws early exit; add --early_exit")
    return options


def _look(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    from gptlab.interpret.lens import readings

    readers, cast = _readers(opened, options.checkpoint), opened.placement.autocast
    found = readings(opened.model, opened.tokenizer, options.prompt, readers, top=options.top or 5, autocast=cast)
    return {"prompt": options.prompt, "readers": found}


def _fit(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    from gptlab.data.batches import TrainingWindows
    from gptlab.signals.tuned_lens import TunedLens, divergences, fit, path_of, save

    model, c, device = opened.model, opened.model.config, opened.placement.device
    if c.n_layer < 2:
        raise UsageError(f"--fit: expected a model of at least two blocks, found {c.n_layer}: the last is never tuned")
    corpus = _corpus(opened, options)
    windows = TrainingWindows(corpus, c.block_size, c.vocab_size, options.seed)
    rows = max(1, options.batch_tokens // c.block_size)
    held_out = [tokens for tokens, _ in _validation(opened, corpus, options.tokens)]

    def progress(step: int, found: list[float]) -> None:
        if step in (1, options.steps) or step % max(1, options.steps // 10) == 0:
            say(f"step {step} of {options.steps}: KL to the final block {sum(found) / len(found):.4f} nats, mean")

    def measured(reader: TunedLens) -> list[float]:
        found = [divergences(model, tokens, reader, opened.placement.autocast) for tokens in held_out]
        return [sum(of_block) / len(found) for of_block in zip(*found, strict=True)]

    read = (windows.rows(n * rows, rows) for n in itertools.count())
    batches = ((tokens.to(device), y.to(device)) for tokens, y in read)
    cast = opened.placement.autocast
    reader = fit(TunedLens.untuned(model), model, batches, options.steps, autocast=cast, progress=progress)
    path = path_of(options.checkpoint)
    save(reader, model, path)
    raw, tuned = measured(TunedLens.untuned(model)), measured(reader)
    return {"reader": str(path), "divergence": {"raw": raw, "tuned": tuned}}


def _early_exit(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    from gptlab.interpret.lens import CONFIDENCES, curve

    batches = _validation(opened, _corpus(opened, options), options.tokens)
    model, how = opened.model, {"vocab_size": opened.vocabulary.size, "autocast": opened.placement.autocast}
    found: dict[str, Any] = {}
    for name, reader in _readers(opened, options.checkpoint).items():
        found[name] = []
        for point in curve(model, batches, CONFIDENCES, reader=reader, **how):
            found[name].append(asdict(point))
            say(f"{name} reader, confidence {point.confidence:g}: loss {point.loss:.4f}, blocks {point.blocks:.0%}")
    return {"early_exit": found, "tokens": sum(targets.numel() for _, targets in batches)}


def _readers(opened: Opened, source: str) -> dict[str, TunedLens | None]:
    """The raw reading, and the tuned reader next to the run, if it is there and this model's own."""
    from gptlab.signals.tuned_lens import load, path_of

    try:
        tuned = load(opened.model, path_of(source))
    except CheckpointError as error:
        say(f"no tuned reader: {error}")
        tuned = None
    return {"raw": None} if tuned is None else {"raw": None, "tuned": tuned}


def _corpus(opened: Opened, options: argparse.Namespace) -> Corpus:
    from gptlab.distributed import World

    data = options.data or (opened.config.data if opened.config else "shakespeare")
    return opened.vocabulary.corpus(data, World(), say)[0]


def _validation(opened: Opened, corpus: Corpus, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Validation tokens and targets, a window a batch: a small machine holds the logits of one."""
    from gptlab.data.batches import ValidationWindows

    c, device = opened.model.config, opened.placement.device
    windows = ValidationWindows(corpus, c.block_size, c.vocab_size, max(tokens, c.block_size))
    rows = [windows.rows(first, 1) for first in range(len(windows))]
    return [(tokens.to(device), targets.to(device)) for tokens, targets in rows]


def _write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    from gptlab.analysis.report.page import write
    from gptlab.analysis.report.standalone import lens_page, write_exit_plot

    if options.html:
        write(Path(options.html), lens_page(found))
    if options.figure:
        write_exit_plot(found["early_exit"], options.figure)
    for path in filter(None, (options.html, options.figure)):
        say(f"written to {path}")


def show(found: Mapping[str, Any], top: int = 1) -> None:
    """Print whatever there is of `gptlab lens --json`'s content; top: tokens shown of every block and position."""
    shown_on = console()
    for part in _parts(found, top, shown_on.width):
        shown_on.print(part)


def _parts(found: Mapping[str, Any], top: int, width: int) -> Iterator[RenderableType]:
    if "divergence" in found:
        yield from _titled(
            "KL from the final block's reading, nats a token, validation", _divergence_table(found["divergence"])
        )
    for name, points in found.get("early_exit", {}).items():
        title = f"early exit by the {NAMES[name]}, {found['tokens']:,} validation tokens"
        note = "compute: multiplications over the full model's, readings and filled-in keys and values included"
        yield from _titled(title, _exit_table(points), note)
    for name, lens in found.get("readers", {}).items():
        yield from _positions(NAMES[name], lens["positions"], top, width)
        yield from _titled(f"{NAMES[name]}, mean over positions", _blocks(lens["blocks"]))
    if "reader" in found:
        yield Text(f"kept in {found['reader']}")


def _titled(title: str, table: Table, note: str = "") -> Iterator[RenderableType]:
    """A table under its title. Both words are lines of their own: rich would fold them to the table's width."""
    yield Text(title, style="bold")
    yield table
    if note:
        yield Text(note, style="dim")


def _positions(name: str, positions: Sequence[Mapping[str, Any]], top: int, width: int) -> Iterator[RenderableType]:
    """A row a position: each block's best next tokens and below them the entropy; as many blocks a table as fit."""
    L = len(positions[0]["blocks"])
    read = [Text(_shown(position["text"])) for position in positions]
    columns = {j: [_cell(position["blocks"][j - 1], top) for position in positions] for j in range(1, L + 1)}
    wide = {j: max(_width(cell) for cell in (Text(_named(j)), *cells)) + FRAME for j, cells in columns.items()}
    room = width - max(map(_width, (Text("read"), *read))) - FRAME - 1
    while columns:
        fit, left = [], room
        for j in columns:
            left -= wide[j]
            if fit and left < 0:
                break
            fit.append(j)
        table = Table()
        table.add_column("read", no_wrap=True)
        for j in fit:
            table.add_column(_named(j), overflow="fold")
        for row in zip(read, *(columns.pop(j) for j in fit), strict=True):
            table.add_row(*row)
        part = "" if len(fit) == L else f", blocks {fit[0]} to {fit[-1]} of {L}"
        yield from _titled(name + part, table)
    yield Text("best next token and p, below it the entropy in nats; bold: the final block's", style="dim")


def _named(block: int) -> str:
    return f"block {block}"


def _cell(block: Mapping[str, Any], top: int) -> Text:
    """The likeliest tokens, the first of them bold where the final block says the same, and the entropy."""
    cell = Text()
    for place, best in enumerate(block["top"][:top]):
        bold = place == 0 and block["agrees"]
        cell.append(f"{_shown(best['text'])} {best['probability']:.0%}\n", style="bold" if bold else "")
    return cell.append(f"{block['entropy']:.2f}", style="dim")


def _width(text: Text) -> int:
    return max(map(cell_len, text.plain.splitlines()))


def _blocks(blocks: Sequence[Mapping[str, float]]) -> Table:
    rows = (
        (str(number), f"{one['confidence']:.1%}", f"{one['entropy']:.3f}", f"{one['agreement']:.1%}")
        for number, one in enumerate(blocks, 1)
    )
    return grid((">block", ">confidence", ">entropy, nats", ">agrees with the final block"), rows, boxed=True)


def _exit_table(points: Sequence[Mapping[str, Any]]) -> Table:
    rows = (
        (
            f"{p['confidence']:g}", f"{p['loss']:.4f}", f"{p['agreement']:.1%}", f"{p['blocks']:.1%}",
            f"{p['compute']:.1%}", " ".join(f"{share:.0%}" for share in p["exits"]),
        )
        for p in points
    )  # fmt: skip
    columns = (">confidence", ">loss, nats", ">agreement", ">blocks", ">compute", ">left at block 1..L")
    return grid(columns, rows, boxed=True)


def _divergence_table(found: Mapping[str, list[float]]) -> Table:
    pairs = enumerate(zip(found["raw"], found["tuned"], strict=True), 1)
    rows = ((str(number), f"{raw:.4f}", f"{tuned:.4f}") for number, (raw, tuned) in pairs)
    return grid((">block", ">raw", ">tuned"), rows, boxed=True)


def _shown(token: str) -> str:
    return repr(printable(token))
