"""`gptlab train`, which train_gpt2.py and train_gpt2_ben.py call too: options in, a run folder out.

Options are checked before torch is imported; everything that needs it is imported in the functions below.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from gptlab.cli.arguments import Parser, add_options, file_options, given_options
from gptlab.errors import GptlabError, UsageError, did_you_mean
from gptlab.options import build
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS

if TYPE_CHECKING:
    from gptlab.data.tokenizers import Tokenizer
    from gptlab.device import Machine, Placement
    from gptlab.distributed import World
    from gptlab.training.state import TrainingState

SAMPLE_TOKENS = 64


def main(argv: list[str], defaults: Mapping[str, Any] | None = None) -> int:
    """Train; `defaults` are a launcher's own, under a config file's values and the command line's."""
    parser = Parser(
        prog="gptlab train",
        description="Train GPT-2 from scratch. Values come from the preset, over it --config, over that the options.",
        epilog=f"presets: {', '.join(PRESETS)}. Exit codes: 0 done, 2 usage, 3 data, config or checkpoint, "
        "4 diverged, 75 stopped with a checkpoint saved: run the same command again.",
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file of options; tables or dotted keys")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on standard output")
    add_options(parser, TrainingConfig)
    parsed = parser.parse(argv)
    given = given_options(parsed, TrainingConfig)
    if given.get("preset", "shakespeare-tiny") not in PRESETS:
        raise UsageError(f"--preset: unknown preset {given['preset']!r}{did_you_mean(given['preset'], PRESETS)}")
    values = {**(defaults or {}), **(file_options(parsed.config, TrainingConfig) if parsed.config else {}), **given}
    return _run(values, as_json=parsed.json)


def resolve(values: Mapping[str, Any], gpus: int) -> TrainingConfig:
    """The config of a run: preset, then values; without a preset the one that suits the machine."""
    preset = values.get("preset") or ("gpt2-124m" if gpus else "shakespeare-tiny")
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}")
    return build(TrainingConfig, {**PRESETS[preset], **values, "preset": preset})


def _run(values: Mapping[str, Any], *, as_json: bool) -> int:
    from gptlab.device import Machine, decide
    from gptlab.distributed import World, end_with_launcher

    world = World.from_environment()
    if world.launched:
        end_with_launcher()
    machine = Machine.probe()
    config = resolve(values, len(machine.gpus))
    placement = decide(
        machine,
        device=config.device,
        dtype=config.dtype,
        threads=config.threads,
        compile=config.compile,
        n_embd=config.n_embd,
        local_rank=world.local_rank,
        local_size=world.local_size,
    )
    placement.apply()
    world.share(config.sequences, config.batch_size)  # refuses what cannot be shared, before any waiting
    try:
        summary = _train(config, machine, placement, world)
    except GptlabError as error:
        error.told = not world.main and getattr(error, "everywhere", False)  # type: ignore[attr-defined]
        raise
    finally:
        world.disconnect()
    if world.main and as_json:
        print(json.dumps(summary))
    return 0


def _train(config: TrainingConfig, machine: Machine, placement: Placement, world: World) -> dict[str, Any]:
    from gptlab.cli.corpus import open_or_prepare
    from gptlab.cli.progress import Display
    from gptlab.cli.stopping import StopRequest
    from gptlab.data.batches import TrainingWindows, ValidationWindows
    from gptlab.data.tokenizers import get_tokenizer
    from gptlab.device import environment, matmul_peak
    from gptlab.runs.begin import Beginning, as_json, begin
    from gptlab.runs.folder import RunFolder
    from gptlab.runs.session import Session

    display = Display(config, quiet=not world.main)
    corpus, alive = open_or_prepare(config.data, config.tokenizer, world, display.note)
    world.connect(placement.device)
    folder: RunFolder | None = None

    def start() -> dict[str, Any]:
        nonlocal folder
        folder, beginning = begin(config, corpus, environment(placement, machine))
        return as_json(beginning)

    beginning = Beginning(**world.agree(start, placement.device))
    if beginning.finished:
        display.finished(beginning.folder, beginning.finished, again=True)
        return {**beginning.finished, "folder": beginning.folder}
    for note in beginning.notes:
        display.note(note)

    windows = TrainingWindows(corpus, config.block_size, config.vocab_size, config.seed, alive)
    validation = ValidationWindows(corpus, config.block_size, config.vocab_size, config.eval_tokens)
    tokenizer = get_tokenizer(config.tokenizer)
    peak = matmul_peak(placement)
    display.opening(config, placement, corpus, peak * world.size, beginning)
    session = Session(config, folder if world.main else None, beginning.checkpoint, placement, corpus.identity())
    display.note(session.compiled)
    bytes_per_token = tokenizer.count_bytes(validation.stream) / len(validation.stream)
    stop = StopRequest()
    began, first = time.perf_counter(), session.state.step
    sample = partial(_sample, config, validation.stream[: config.block_size // 4].tolist(), tokenizer)
    for record in session.records(
        windows, validation, world, peak=peak, bytes_per_token=bytes_per_token, stop=stop, sample=sample
    ):
        display.show(record)
    summary = session.finish(validation.sha256, time.perf_counter() - began, first, peak * world.size)
    display.finished(beginning.folder, summary, again=False)
    return {**summary, "folder": beginning.folder}


def _sample(config: TrainingConfig, prompt: list[int], tokenizer: Tokenizer, state: TrainingState) -> dict[str, Any]:
    """Text written on from `prompt` by the model as it is now, with what each block would have said."""
    from gptlab.interpret.generate import as_row, generate
    from gptlab.randomness import torch_generator

    generator = torch_generator("sample", config.seed, state.step)
    steps = generate(
        state.model, prompt, SAMPLE_TOKENS, temperature=0.8, vocab_size=tokenizer.vocab_size, generator=generator
    )
    return as_row(prompt, list(steps), tokenizer)
