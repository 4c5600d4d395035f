"""`gptlab noise`: is a signal bias or noise? Measured on one checkpoint; the figures are analysis/noise/'s."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.analysis.noise import NoiseConfig, names_in, own_names, signal_configs, split_name
from gptlab.cli.arguments import Parser, add_options, add_paper, given_options
from gptlab.cli.console import Counter, say, show_result, write_tables
from gptlab.cli.train import check_signals
from gptlab.errors import ConfigError, UsageError
from gptlab.options import build

if TYPE_CHECKING:
    from gptlab.analysis.noise.measure import Progress, Subject
    from gptlab.cli.model import Vocabulary
    from gptlab.signals.config import SignalConfig
    from gptlab.training.config import TrainingConfig
    from gptlab.training.state import TrainingState

NOT_HERE = ("signal.name", "signal.control", "signal.dose", "signal.start", "signal.anneal")
"""Options of a signal that are part of its name in --signals, or make no sense for a single step."""


def main(argv: list[str]) -> int:
    """Print the figures; raises UsageError, CheckpointError without a model, ConfigError without data for it."""
    parser = _parser()
    parsed = parser.parse(argv)
    given = given_options(parsed, NoiseConfig)
    try:
        options: NoiseConfig = build(NoiseConfig, given)
    except ConfigError as error:
        raise UsageError(f"--{error}") from None
    names = names_in(options.signals)
    for name in names:
        check_signals({"signal.name": split_name(name)[0]}, allow_code=parsed.allow_code, kind=UsageError)
    for option in ("html", "figure", "latex", "markdown"):  # said before minutes are spent
        if (file := getattr(parsed, option)) and not Path(file).resolve().parent.is_dir():
            raise UsageError(f"--{option}: expected a file in a folder that exists, found {file}")
    if parsed.conversation and (unused := [key for key in given if key == "signals" or key.startswith("signal.")]):
        raise UsageError(f"--{unused[0]}: --conversation measures the model without any signal; leave one out")
    changes = {key.removeprefix("signal."): value for key, value in given.items() if key.startswith("signal.")}
    _signals(names, (), changes)  # before torch is imported
    _show(parsed, _measure(parsed, options, names, changes))
    return 0


def _show(parsed: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the files that were asked for, and print."""
    from gptlab.analysis import tables

    if parsed.conversation:
        first, *lines = tables.conversation_remarks(result)
        answers, shown = [first], list(tables.conversation_tables(result))
    else:
        answers, lines = tables.noise_sentences(result), tables.noise_remarks(result)
        shown = list(tables.noise_tables(result))
    if parsed.html:
        from gptlab.analysis.report.noise import write_noise

        write_noise(result, Path(parsed.html))
        say(f"report: {parsed.html}")
    if parsed.figure:
        from gptlab.analysis.report.noise import write_figures

        for path in write_figures(result, parsed.figure) or ["none: no signal here has a gradient to compare"]:
            say(f"figure: {path}")
    write_tables(parsed, shown, [*answers, *lines])
    if parsed.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        show_result(shown, lines, first=answers)


def _parser() -> Parser:
    parser = Parser(
        prog="gptlab noise",
        usage="%(prog)s CHECKPOINT [options]",
        description="Measure whether a signal teaches, or is bias or noise, on one model as it stands: noise scale, "
        "alignment with the true loss, progress and variance of group gradients; what each block's verdicts are worth "
        "as labels; whether anything collapses. docs/noise.md says how to read it.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint, or a Hugging Face GPT-2 folder")
    parser.add_argument(
        "--conversation", action="store_true", help="measure this alone: is a reply surer after what was really said?"
    )
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots too")
    add_paper(parser, "draw each signal's alignment by block, and in NAME_SIGNAL the fit of its branch test")
    parser.add_argument("--allow_code", action="store_true", help="let a signal be a function in a file of yours")
    add_options(parser, NoiseConfig, skip=NOT_HERE)
    return parser


def _measure(
    parsed: argparse.Namespace, options: NoiseConfig, names: list[str], changes: Mapping[str, Any]
) -> dict[str, Any]:
    from gptlab.analysis.noise.conversation import conversation
    from gptlab.analysis.noise.measure import about, alignment_history, measure
    from gptlab.runs.init_weights import any_state

    state, config = any_state(parsed.checkpoint)
    own = config.signals if config else ()
    if not options.signals:
        names = own_names(own)
        for signal in own:
            check_signals({"signal.name": signal.name}, allow_code=parsed.allow_code, kind=UsageError)
    with Counter() as shown:
        progress = shown.count
        subject = _subject(parsed.checkpoint, state, config, options, shown.note)
        if parsed.conversation:
            found = conversation(subject, options, progress)
            return {"source": str(parsed.checkpoint), **about(subject), "conversation": found}
        signals = _signals(names, own, changes)
        branches = _branches(parsed.checkpoint, config, subject, options, signals, progress)
        result = measure(subject, options, signals, branches, progress)
    history = alignment_history(Path(parsed.checkpoint))
    return {"source": str(parsed.checkpoint), **result, "history": history}


def _signals(names: list[str], own: Sequence[SignalConfig], changes: Mapping[str, Any]) -> Mapping[str, SignalConfig]:
    """The config of every name; raises UsageError for options that contradict each other."""
    try:
        return signal_configs(names, own, changes)
    except ConfigError as error:
        raise UsageError(f"--{error}") from None


def _branches(
    checkpoint: str,
    config: TrainingConfig | None,
    subject: Subject,
    options: NoiseConfig,
    signals: Mapping[str, SignalConfig],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """What the branch test says of each signal; nothing where it was left out or no moments can be continued from."""
    from gptlab.analysis.noise.branching import Plan, branch_test

    if not options.branch_steps or not signals:
        return {}
    if config is None:
        say("no branch test: a Hugging Face folder has no optimizer moments to continue with")
        return {}
    plan = Plan(options.branch_steps, eval_tokens=options.eval_tokens)
    corpus, placement = subject.windows.corpus, subject.placement
    return branch_test(checkpoint, signals, corpus, placement, plan, progress)


def _subject(
    source: str, state: TrainingState, config: TrainingConfig | None, options: NoiseConfig, note: Callable[[str], None]
) -> Subject:
    """The model where it is computed, with its run's data or the data asked for."""
    from gptlab.analysis.noise.measure import Subject
    from gptlab.cli.model import vocabulary_of
    from gptlab.data.batches import TrainingWindows, ValidationWindows
    from gptlab.device import Machine, choose_compute
    from gptlab.distributed import World
    from gptlab.runs.init_weights import tokenizer_of

    shape = state.model.config
    if config is None and options.data is None:
        raise UsageError("--data: expected a corpus, a Hugging Face folder names none; try --data shakespeare")
    vocabulary = vocabulary_of(source, state.model, lambda: tokenizer_of(source, config), options.tokenizer)
    if config is None:
        config = _made_up(state, vocabulary)
    block_size = options.block_size or config.block_size
    if block_size > shape.block_size:
        raise UsageError(f"--block_size: the model reads at most {shape.block_size} tokens, found {block_size}")
    corpus, alive = vocabulary.corpus(options.data or config.data, World(), note)
    seed = config.seed if options.seed is None else options.seed
    windows = TrainingWindows(corpus, block_size, vocabulary.size, seed, alive)
    validation = ValidationWindows(corpus, block_size, vocabulary.size, options.eval_tokens)
    placement = choose_compute(
        Machine.probe(), device=options.device, dtype=options.dtype, threads=options.threads, n_embd=shape.n_embd
    )
    placement.apply()
    state.model.to(placement.device)
    for moments in state.optimizer.state.values():
        moments.update({key: value.to(placement.device) for key, value in moments.items()})
    return Subject(state, config, windows, validation, placement, vocabulary.known)


def _made_up(state: TrainingState, vocabulary: Vocabulary) -> TrainingConfig:
    """A config for a model without one: its shape, an update of one sequence; `tokenizer` says nothing if not ours."""
    from gptlab.data.tokenizers import TOKENIZERS
    from gptlab.training.config import TrainingConfig

    shape = state.model.config
    name: Any = vocabulary.known.name if vocabulary.known else None
    return TrainingConfig(
        tokenizer=name if name in TOKENIZERS else "bytes",
        block_size=shape.block_size, total_batch_tokens=shape.block_size, n_layer=shape.n_layer,
        n_head=shape.n_head, n_embd=shape.n_embd, share_blocks=shape.share_blocks,
    )  # fmt: skip
