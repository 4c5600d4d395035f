"""`gptlab train`, which train_gpt2.py and train_gpt2_ben.py call too: options in, a run folder out.

Options are checked before torch is imported; everything that needs it is imported in the functions below.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.cli.arguments import Parser, add_options, file_options, given_options
from gptlab.cli.console import Interrupted, StopRequest
from gptlab.errors import ConfigError, GptlabError, Stopped, UsageError, did_you_mean, shown
from gptlab.options import build
from gptlab.signals.config import SignalConfig
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS, preset_options

if TYPE_CHECKING:
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.device import ComputeConfig, Machine
    from gptlab.distributed import World
    from gptlab.training.state import TrainingState

SAMPLE_TOKENS = 64


def main(argv: list[str], defaults: Mapping[str, Any] | None = None) -> int:
    """Train; `defaults` are a launcher's own, under a config file's values and the command line's."""
    parser = Parser(
        prog="gptlab train",
        usage="%(prog)s [options]",
        description="Train GPT-2 from scratch. Values come from the preset, over it --config, over that the options.",
        epilog=f"presets: {', '.join(PRESETS)}. Exit codes: 0 done, 2 usage, 3 data, config or checkpoint, "
        "4 diverged, 75 stopped with a checkpoint saved: run the same command again.",
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file of options; tables or dotted keys")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on standard output")
    parser.add_argument("--allow_code", action="store_true", help="let signal.name be a function in a file of yours")
    parser.add_argument(
        "--despite", action="store_true", help="resume a run although options, data or code differ; it is recorded"
    )
    add_options(parser, TrainingConfig)
    parsed = parser.parse(argv)
    given = given_options(parsed, TrainingConfig)
    filed = file_options(parsed.config, TrainingConfig) if parsed.config else {}
    check_values(given, "--preset", allow_code=parsed.allow_code, kind=UsageError)
    check_values(filed, parsed.config, allow_code=parsed.allow_code, kind=ConfigError)
    values = {**(defaults or {}), **filed, **given}
    with StopRequest(raising=True) as stop:
        run(values, stop, as_json=parsed.json, despite=parsed.despite)
    return 0


def check_values(values: Mapping[str, Any], where: str, *, allow_code: bool, kind: type[GptlabError]) -> None:
    """Refuse, as an error of this kind, what can be seen before torch is imported. where: the preset was given."""
    preset = values.get("preset", "shakespeare-tiny")
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS)
        raise kind(f"{where}: unknown preset {shown(preset)}{hint}; presets are {', '.join(PRESETS)}")
    try:
        TrainingConfig(log=values.get("log", "none"))  # refuses an unknown tracker
    except ConfigError as error:
        raise kind(str(error)) from None
    check_signals(values, allow_code=allow_code, kind=kind)


def _stopped_early(values: Mapping[str, Any], request: Interrupted) -> BaseException:
    """What to raise for a request that came before this start could make a step: Stopped where a checkpoint waits."""
    name = signal.Signals(request.number).name
    with contextlib.suppress(ConfigError):
        config = resolve(values, 0)
        if config.resume != "never" and any(Path(config.folder).glob("checkpoints/step_*/MANIFEST.json")):
            return Stopped(f"stopped by {name} before the first step; run the same command again to resume")
    request.args = (f"stopped by {name} before there was anything to save; run the same command again",)
    return request


def check_signals(values: Mapping[str, Any], *, allow_code: bool, kind: type[GptlabError]) -> None:
    """Refuse, as an error of this kind, an unknown signal, and a user's own function without --allow_code."""
    for name in (values.get("signal.name", "none"), *(s.get("name", "none") for s in values.get("also", ()))):
        try:
            code = SignalConfig(name).is_code
        except ConfigError as error:
            raise kind(str(error)) from None
        if code and not allow_code:
            raise UsageError(f"signal.name {name} is a function in a file: it runs as your code; add --allow_code")


def resolve(values: Mapping[str, Any], gpus: int) -> TrainingConfig:
    """The config of a run: preset, then values; without a preset the one that suits the machine."""
    preset = values.get("preset") or ("gpt2-124m" if gpus else "shakespeare-tiny")
    return build(TrainingConfig, {**preset_options(preset, values), **values, "preset": preset})


def check(words: Sequence[str]) -> int:
    """Print what is wrong with files of options, as {file: why no run could begin}; users' signals with --allow_code.

    An experiment asks this of the code that its cells will run.
    """
    found = {}
    allow_code = "--allow_code" in words
    for file in words:
        try:
            if not file.startswith("--"):
                signals = resolve(file_options(file, TrainingConfig), 0).signals
                for signal in signals if allow_code else ():
                    _ = signal.signal  # a file that does not run says so here
        except GptlabError as error:
            found[file] = str(error).removeprefix(f"{file}: ")
    print(json.dumps(found))
    return 0


def run(
    values: Mapping[str, Any], stop: StopRequest, *, as_json: bool = False, despite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train with these values and give the run's summary and its folder; as_json: print them, where this is rank 0.

    Raises Stopped where a stop was asked for and a checkpoint waits, Interrupted where none does.
    """
    try:
        return _run(values, stop, as_json=as_json, despite=despite, quiet=quiet)
    except Interrupted as request:
        raise _stopped_early(values, request) from None


def _run(values: Mapping[str, Any], stop: StopRequest, *, as_json: bool, despite: bool, quiet: bool) -> dict[str, Any]:
    from gptlab.device import Machine, choose_compute
    from gptlab.distributed import World, end_with_launcher

    world = World.from_environment()
    if world.launched:
        end_with_launcher()
    machine = Machine.probe()
    config = resolve(values, len(machine.gpus))
    placement = choose_compute(
        machine, device=config.device, dtype=config.dtype, threads=config.threads, compile=config.compile,
        n_embd=config.n_embd, local_rank=world.local_rank, local_size=world.local_size,
        deterministic=config.deterministic,
    )  # fmt: skip
    placement.apply()
    config.micro_batch(world.size)  # refuses what cannot be shared, before any waiting
    try:
        summary = _train(config, machine, placement, world, stop, despite=despite, quiet=quiet or not world.main)
    finally:
        world.disconnect()
    if world.main and as_json:
        print(json.dumps(summary))
    return summary


def _train(
    config: TrainingConfig, machine: Machine, placement: ComputeConfig, world: World, stop: StopRequest, *,
    despite: bool, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    from gptlab.analysis.report import after_run, lacks_report
    from gptlab.cli.data import open_or_prepare
    from gptlab.cli.progress import Display, check_installed, tracking
    from gptlab.data.batches import TrainingWindows, ValidationWindows
    from gptlab.data.tokenizers import get_tokenizer
    from gptlab.device import environment, kept_matmul_peak
    from gptlab.runs.folder import RunFolder
    from gptlab.runs.session import Beginning, Session, begin

    check_installed(config)
    display = Display(config, quiet=quiet)
    corpus, alive = open_or_prepare(config.data, config.tokenizer, world, display.note)
    vocabulary = min(config.vocab_size, corpus.vocab_size)  # the model's may be padded
    windows = TrainingWindows(corpus, config.block_size, vocabulary, config.seed, alive)
    validation = ValidationWindows(corpus, config.block_size, vocabulary, config.eval_tokens)
    tokenizer = get_tokenizer(config.tokenizer)
    bytes_per_token = tokenizer.count_bytes(validation.stream) / len(validation.stream)
    world.connect(placement.device, timedelta(seconds=config.rank_timeout))
    folder: RunFolder | None = None

    def start() -> dict[str, Any]:
        nonlocal folder
        made_by = environment(placement, machine) | ({"launch": world.launch} if world.launched else {})
        folder, beginning = begin(config, corpus, made_by, despite=despite, attempt=world.attempt)
        return asdict(beginning)

    with contextlib.ExitStack() as ends:
        ends.callback(display.close)
        beginning = Beginning(**world.broadcast_from_main(start, placement.device))
        if folder:
            ends.callback(folder.close)
        if beginning.finished:
            display.finished(beginning.folder, beginning.finished, again=True)
            if folder and lacks_report(folder.path):
                display.note(f"  report  {after_run(folder.path)}")
            return {**beginning.finished, "folder": beginning.folder}
        for note in beginning.notes:
            display.note(note)
        stop.defer()  # from here on a stop saves a checkpoint
        peak = kept_matmul_peak(placement, machine)
        display.opening(config, placement, corpus, peak * world.size, beginning)
        session = Session(config, folder, beginning.checkpoint, placement, corpus.identity(), world)
        display.note(f"  compile {session.compiled}")
        if session.sharded:
            display.note("  blocks  cut over the processes; no samples are drawn, gptlab sample reads a checkpoint")
        began, first = time.perf_counter(), session.state.step
        track = ends.enter_context(tracking(config, folder.path, first, display.note)) if folder else None
        sample = partial(_sample, config, validation.stream[: max(1, config.block_size // 4)].tolist(), tokenizer)
        for record in session.records(
            windows, validation, peak=peak, bytes_per_token=bytes_per_token, stop=stop, sample=sample
        ):
            display.show(record)
            if track:
                track(record)
        display.stage("writing the report")
        summary = session.finish(validation, time.perf_counter() - began, first, peak * world.size)
        if folder:
            display.note(f"  report  {after_run(folder.path)}")
        display.finished(beginning.folder, summary, again=False)
        return {**summary, "folder": beginning.folder}


def _sample(config: TrainingConfig, prompt: list[int], tokenizer: Tokenizer, state: TrainingState) -> dict[str, Any]:
    """Text generated from `prompt` by the model as it is now, with each block's best next token."""
    from gptlab.interpret.generate import Sampling, as_row, generate
    from gptlab.randomness import torch_generator

    generator = torch_generator("sample", config.seed, state.step)
    steps = generate(
        state.model, prompt, SAMPLE_TOKENS, Sampling(temperature=0.8), generator=generator,
        vocab_size=tokenizer.vocab_size, show_blocks=True,
    )  # fmt: skip
    return as_row(prompt, list(steps), tokenizer)
