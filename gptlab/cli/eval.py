"""`gptlab eval`: what a model, and each of its blocks, scores. Scoring is gptlab/evals/'s, validation training's."""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptlab.analysis.tables import Table
from gptlab.cli.arguments import Parser, count, whole
from gptlab.cli.console import Counter, console, show_table
from gptlab.cli.model import add_model_options
from gptlab.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from gptlab.cli.model import Vocabulary
    from gptlab.device import ComputeConfig
    from gptlab.distributed import World
    from gptlab.evals.tasks import Task
    from gptlab.model.gpt import GPT
    from gptlab.training.config import TrainingConfig

TASKS = ("val", "hellaswag", "lambada")
HARNESS = "lm_eval:"
Figures = Sequence[Mapping[str, float | None]]
"""Every block's, the last block's last; the last block's alone without --blocks."""


class Opened(NamedTuple):
    """A model ready to be read, and where from."""

    model: GPT
    config: TrainingConfig | None
    vocabulary: Vocabulary
    placement: ComputeConfig
    world: World
    identity: dict[str, Any]


def main(argv: list[str]) -> int:
    """Score; raises UsageError, CheckpointError where there is no model, DataError where a test cannot be read."""
    options = _parse(argv)

    from gptlab.distributed import World, end_with_launcher

    world = World.from_environment()
    if world.launched:
        end_with_launcher()
    display = Counter(quiet=not world.main)
    try:
        opened = _open(options, world, display)
        found: dict[str, Any] = {}
        for name in options.tasks:
            found |= _score(name, opened, options, display)
    finally:
        display.close()
        world.disconnect()
    if world.main:
        result = {"model": options.run, **opened.identity, "tasks": found}
        if options.json:
            print(json.dumps(result, indent=1, allow_nan=False))
        else:
            _print(result)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gptlab eval",
        description="Score a model: loss on the pinned validation tokens, HellaSwag as build-nanogpt scores it, "
        "LAMBADA, and tasks of lm-evaluation-harness. Under torchrun, ranks share the work: `torchrun "
        "--nproc_per_node=2 -m gptlab eval RUN`. Stopped, the same command resumes.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, a checkpoint or a Hugging Face GPT-2 folder")
    add("--tasks", metavar="A,B", default="val", help="of val, hellaswag, lambada and lm_eval:NAME [val]")
    add("--blocks", action="store_true", help="score every block's reading, not the last one's alone")
    add("--hellaswag", metavar="FILE", help="JSON lines or parquet [Rowan/hellaswag by the package datasets]")
    add("--lambada", metavar="FILE", help="JSON lines or parquet [EleutherAI/lambada_openai by datasets]")
    add("--include_path", metavar="FOLDER", help="a folder of your own lm_eval tasks (YAML)")
    add("--limit", metavar="N", type=count, help="the first N rows of a test, for a quick look [all]")
    add("--data", metavar="CORPUS", help="whose validation tokens val reads [the run's]")
    add("--eval_tokens", metavar="N", type=count, help="how many, the first of the pinned set [the run's]")
    add("--skip_tokens", metavar="N", type=whole, default=0, help="of that set that are left out before them [0]")
    add("--batch_size", metavar="N", type=count, default=16, help="rows read at once by a process [16]")
    add("--out", metavar="FOLDER", help="where finished rows are kept [RUN/eval]")
    add_model_options(parser)
    add("--threads", metavar="N", type=int, default=0, help="threads a process [its share of the cores]")
    add("--compile", choices=["auto", "on", "off"], default="off", help="torch.compile [off]")
    add("--json", action="store_true", help='print {"model", ..., "tasks": {NAME: {..., "blocks": [..]}}}')
    options = parser.parse(argv)
    options.tasks = list(dict.fromkeys(filter(None, options.tasks.split(","))))
    for name in options.tasks:
        if name not in TASKS and not (name.startswith(HARNESS) and name != HARNESS):
            hint = did_you_mean(name, TASKS)
            raise UsageError(f"--tasks: no task {name!r}{hint}; there are {', '.join(TASKS)} and {HARNESS}NAME")
    if not options.tasks:
        raise UsageError(f"--tasks: expected one or more of {', '.join(TASKS)} and {HARNESS}NAME, found none")
    if options.blocks and options.skip_tokens:
        raise UsageError("--skip_tokens: figures of every block are of all that is read; leave --blocks out")
    return options


def _open(options: argparse.Namespace, world: World, display: Counter) -> Opened:
    import torch

    from gptlab.cli.model import open_any
    from gptlab.device import Machine, choose_compute
    from gptlab.model.fast_cpu import install
    from gptlab.runs.init_weights import weights_digest
    from gptlab.training.evaluate import hidden_states
    from gptlab.training.parallel import compile_blocks

    model, config, vocabulary = open_any(options.run, options.tokenizer)
    if options.tasks != ["val"]:
        vocabulary.tokenizer  # noqa: B018 - tests of text are refused at once where there is none
    placement = choose_compute(
        Machine.probe(), device=options.device, dtype=options.dtype, threads=options.threads, compile=options.compile,
        n_embd=model.config.n_embd, local_rank=world.local_rank, local_size=world.local_size,
    )  # fmt: skip
    placement.apply()
    digest = weights_digest(model)
    model.to(placement.device).eval()
    world.connect(placement.device)
    install(model, placement)
    model.requires_grad_(False)
    if options.compile != "off":
        tokens = torch.zeros(2, model.config.block_size, dtype=torch.int64, device=placement.device)
        once = functools.partial(hidden_states, model, tokens, placement)
        display.note(f"  compile {compile_blocks(model, placement, once, dynamic=None)}")
    name = vocabulary.known.name if vocabulary.known else None
    identity = {"weights_sha256": digest, "dtype": placement.dtype_name, "tokenizer": name}
    return Opened(model, config, vocabulary, placement, world, identity)


def _score(name: str, opened: Opened, options: argparse.Namespace, display: Counter) -> dict[str, dict[str, Any]]:
    """{task: its figures} of one name of --tasks, which may be a group."""
    from gptlab.evals.scoring import Scorer, run_harness
    from gptlab.evals.tasks import hellaswag, lambada

    if name == "val":
        return {name: _validation(opened, options, display)}
    scorer = Scorer(
        opened.model, opened.placement, opened.world, batch_size=options.batch_size, every_block=options.blocks
    )
    if name in TASKS:
        read: Callable[..., Task] = {"hellaswag": hellaswag, "lambada": lambada}[name]
        task = read(getattr(options, name), opened.vocabulary.tokenizer, options.limit)
        return {name: _rows(task, scorer, opened, options, display)}
    display.note(f"{name}: going through its requests")
    found = run_harness(
        name.removeprefix(HARNESS), scorer, opened.vocabulary.tokenizer,
        limit=options.limit, include_path=options.include_path,
    )  # fmt: skip
    return {HARNESS + task: _figures({}, blocks, options) for task, blocks in found.items()}


def _figures(about: Mapping[str, Any], blocks: Figures, options: argparse.Namespace) -> dict[str, Any]:
    """The last block's figures, what they rest on, and every block's where they were asked for."""
    return {**blocks[-1], **about, **({"blocks": blocks} if options.blocks else {})}


def _rows(task: Task, scorer: Any, opened: Opened, options: argparse.Namespace, display: Counter) -> dict[str, Any]:
    from gptlab.evals.tasks import Record, run_task

    identity = {**opened.identity, "rows": task.sha256, "limit": options.limit, "blocks": scorer.blocks}
    world, path = opened.world, Path(options.out or Path(options.run) / "eval") / f"{task.name}.json"
    record = Record(path if world.main else None, identity)
    known = world.broadcast_from_main(lambda: record.done, opened.placement.device)
    record.done = {int(n): done for n, done in known.items()}
    if record.done:
        display.note(f"{task.name}: {len(record.done):,} of {len(task.rows):,} rows were finished before")

    def progress(done: int, figures: Mapping[str, Any]) -> None:
        display.count(task.name, done, len(task.rows), shown(figures))

    progress(len(record.done), {})
    blocks = run_task(task, scorer, record, progress)
    return _figures({"rows": len(task.rows), "source": task.source}, blocks, options)


def _validation(opened: Opened, options: argparse.Namespace, display: Counter) -> dict[str, Any]:
    """Loss on the pinned tokens in nats, perplexity, and bits a byte of their text where that is known."""
    from gptlab.data.batches import ValidationWindows
    from gptlab.training.config import TrainingConfig
    from gptlab.training.evaluate import validate

    config = opened.config
    data = options.data or (config.data if config else None)
    if data is None:
        raise UsageError(f"{options.run} is no run: say with --data whose validation tokens to read, or leave val out")
    tokens = options.eval_tokens or (config or TrainingConfig()).eval_tokens
    corpus, _ = opened.vocabulary.corpus(data, opened.world, display.note)
    shape, known = opened.model.config, opened.vocabulary.known
    windows = ValidationWindows(corpus, shape.block_size, opened.vocabulary.size, options.skip_tokens + tokens)
    skipped = options.skip_tokens // shape.block_size
    if skipped >= len(windows):
        raise DataError(f"--skip_tokens: expected fewer than {corpus.folder} has, found {options.skip_tokens}")
    display.note(f"val: {len(windows) - skipped:,} windows of {shape.block_size} tokens")
    found = validate(opened.model, windows, opened.world, opened.placement, every_block=options.blocks)
    assert found is not None, "nothing interrupts it"
    read = found.windows[skipped:]
    bytes_per_token = known.count_bytes(windows.stream) / len(windows.stream) if known else 0
    blocks = [
        {
            "loss": loss, "bits_per_byte": loss / math.log(2) / bytes_per_token if bytes_per_token else None,
            "perplexity": math.exp(min(loss, 700.0)),
        }
        for loss in (found.by_block or (float(read.sum() / len(read)),))
    ]  # fmt: skip
    tokens = (len(windows) - skipped) * shape.block_size
    about = {"tokens": tokens, "validation_sha256": windows.sha256, "source": str(corpus.folder)}
    return _figures(about, blocks, options)


def shown(figures: Mapping[str, Any]) -> str:
    """The numbers of a test in one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))


def _print(result: Mapping[str, Any]) -> None:
    """A task a row; with every block's figures, a row a block; under it what the figures rest on."""
    rows: list[tuple[str, ...]] = []
    for task, found in result["tasks"].items():
        blocks = found.get("blocks") or [found]
        numbers = map(str, range(1, len(blocks) + 1)) if "blocks" in found else ["last"]
        rows += [(task * (k == 0), number, shown(blocks[k])) for k, number in enumerate(numbers)]
        about = [f"{found[unit]:,} {unit}" for unit in ("tokens", "rows") if unit in found]
        rows += [("", "", ", ".join([*about, *filter(None, [found.get("source")])]))] if about else []
    show_table(console(), Table(f"{result['model']}, {result['dtype']}", ("task", "block", "score"), rows))
