"""`gptlab lens`: what every block would say at every position, raw and tuned; and what early exit would lose and save.

The readings are interpret/lens.py's, the tuned readers signals/tuned_reader.py's, early exit interpret/early_exit.py's.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.cli.arguments import Parser
from gptlab.cli.model import TOKENIZER
from gptlab.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from gptlab.cli.model import Opened
    from gptlab.data.corpus import Corpus
    from gptlab.signals.tuned_reader import TunedReader


def main(argv: list[str]) -> int:
    """Look, fit or measure; raises UsageError, and CheckpointError where there is no model."""
    options = _parse(argv)

    from gptlab.cli import lens_view
    from gptlab.cli.model import open_model

    opened = open_model(options.checkpoint, options.device, options.dtype, tokenizer=options.tokenizer)
    found: dict[str, Any] = {"checkpoint": options.checkpoint}
    if options.fit:
        found |= _fit(opened, options)
    if options.early_exit:
        found |= _early_exit(opened, options)
    if options.prompt is not None:
        found |= _look(opened, options)
    for path, write in ((options.html, _write_page), (options.svg, _write_plot)):
        if path:
            write(Path(path), found)
            _tell(f"written to {path}")
    if options.json:
        print(json.dumps(found))
    else:
        lens_view.show(found, options.top or 1)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gptlab lens",
        description="What every block would say next at every position of a text (--prompt), through its raw reading "
        "and a tuned one (--fit trains it once and keeps it beside the run); and what leaving at the first block that "
        "is sure enough would lose and save (--early_exit).",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint or a Hugging Face GPT-2 folder")
    add("--prompt", metavar="TEXT", help="the text to look at")
    add("--top", metavar="K", type=int, help="tokens shown for every block and position [5; in the table 1]")
    add("--html", metavar="FILE", help="also write the lens as a page that opens offline")
    add("--fit", action="store_true", help="train an affine reader for each block, and keep it")
    add("--steps", metavar="N", type=int, default=200, help="updates of the fit [200]")
    add("--batch_tokens", metavar="N", type=int, default=2048, help="tokens of an update of the fit [2048]")
    add("--early_exit", action="store_true", help="loss, agreement and compute for confidences from 0.5 to 1")
    add("--tokens", metavar="N", type=int, default=8192, help="validation tokens that are measured on [8192]")
    add("--svg", metavar="FILE", help="also draw --early_exit")
    add("--data", metavar="NAME|FOLDER", help="corpus for --fit and --early_exit [the run's own, else shakespeare]")
    add("--tokenizer", choices=["bytes", "gpt2"], help=TOKENIZER)
    add("--seed", metavar="N", type=int, default=1, help="decides the windows that the fit reads [1]")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matmuls [fp32]")
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse(argv)
    if options.prompt is None and not options.fit and not options.early_exit:
        raise UsageError("expected --prompt TEXT, --fit or --early_exit, found none of them; see `gptlab lens --help`")
    for name in ("top", "steps", "batch_tokens", "tokens"):
        if (found := getattr(options, name)) is not None and found < 1:
            raise UsageError(f"--{name}: expected a number of at least 1, found {found}")
    if options.html and options.prompt is None:
        raise UsageError("--html shows a text; add --prompt TEXT")
    if options.svg and not options.early_exit:
        raise UsageError("--svg draws early exit; add --early_exit")
    return options


def _look(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    from gptlab.interpret.lens import readings

    tuned = _tuned(opened, options.checkpoint)
    readers = {"raw": None} if tuned is None else {"raw": None, "tuned": tuned}
    model, cast = opened.model, opened.placement.autocast
    found = readings(model, opened.tokenizer, options.prompt, readers, top=options.top or 5, autocast=cast)
    return {"prompt": options.prompt, "readers": found}


def _fit(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    from gptlab.data.batches import TrainingWindows
    from gptlab.signals.tuned_reader import TunedReader, beside, divergences, fit, save

    model, c, device = opened.model, opened.model.config, opened.placement.device
    if c.n_layer < 2:
        raise UsageError(f"--fit: expected a model of at least two blocks, found {c.n_layer}: the last is never tuned")
    corpus = _corpus(opened, options)
    windows = TrainingWindows(corpus, c.block_size, c.vocab_size, options.seed)
    rows = max(1, options.batch_tokens // c.block_size)
    held_out = [tokens for tokens, _ in _validation(opened, corpus, options.tokens)]

    def told(step: int, found: list[float]) -> None:
        if step in (1, options.steps) or step % max(1, options.steps // 10) == 0:
            _tell(f"step {step} of {options.steps}: KL to the final block {sum(found) / len(found):.4f} nats, mean")

    def measured(reader: TunedReader) -> list[float]:
        found = [divergences(model, tokens, reader, opened.placement.autocast) for tokens in held_out]
        return [sum(of_block) / len(found) for of_block in zip(*found, strict=True)]

    def batch(step: int) -> Tensor:
        return windows.rows(step * rows, rows)[0].to(device)

    reader = fit(model, batch, options.steps, autocast=opened.placement.autocast, told=told)
    path = beside(options.checkpoint)
    save(reader, model, path)
    raw, tuned = measured(TunedReader.untuned(model)), measured(reader)
    return {"reader": str(path), "divergence": {"raw": raw, "tuned": tuned}}


def _early_exit(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    from gptlab.interpret.early_exit import CONFIDENCES, curve

    batches = _validation(opened, _corpus(opened, options), options.tokens)
    tuned = _tuned(opened, options.checkpoint)
    found = {}
    for name, reader in (("raw", None), ("tuned", tuned)):
        if name == "tuned" and tuned is None:
            continue
        points = []
        at, cast = CONFIDENCES, opened.placement.autocast
        for point in curve(opened.model, batches, at, reader=reader, vocab_size=opened.vocabulary.size, autocast=cast):
            points.append(asdict(point))
            _tell(f"{name} reader, confidence {point.confidence:g}: loss {point.loss:.4f}, blocks {point.blocks:.0%}")
        found[name] = points
    return {"early_exit": found, "tokens": sum(targets.numel() for _, targets in batches)}


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tuned(opened: Opened, source: str) -> TunedReader | None:
    """The tuned reader beside the run, if it is there and this model's own."""
    from gptlab.signals.tuned_reader import beside, load

    try:
        return load(opened.model, beside(source))
    except CheckpointError as error:
        _tell(f"no tuned reader: {error}")
        return None


def _corpus(opened: Opened, options: argparse.Namespace) -> Corpus:
    from gptlab.distributed import World

    data = options.data or (opened.config.data if opened.config else "shakespeare")
    return opened.vocabulary.corpus(data, World(), _tell)[0]


def _validation(opened: Opened, corpus: Corpus, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Validation tokens and targets, a window a batch: a small machine holds the logits of one."""
    from gptlab.data.batches import ValidationWindows

    c, device = opened.model.config, opened.placement.device
    windows = ValidationWindows(corpus, c.block_size, c.vocab_size, max(tokens, c.block_size))
    rows = [windows.rows(first, 1) for first in range(len(windows))]
    return [(tokens.to(device), targets.to(device)) for tokens, targets in rows]


def _write_page(path: Path, found: dict[str, Any]) -> None:
    from gptlab.analysis.report.lens import page
    from gptlab.analysis.report.page import write

    write(path, page(found))


def _write_plot(path: Path, found: dict[str, Any]) -> None:
    from gptlab.analysis.report.lens import exit_plot
    from gptlab.analysis.report.page import write

    write(path, exit_plot(found["early_exit"]))
