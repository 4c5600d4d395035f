"""Every reader of outside bytes, and every command that reads a run, under hostile input: a value or our error."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hostile_runs import VALUES, allowed, commands, hostile_runs, some  # pyright: ignore[reportMissingImports]
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from readers import SHARD, Reader, readers  # pyright: ignore[reportMissingImports]

from gptlab.data.shards import open_shard
from gptlab.errors import GptlabError
from gptlab.files import parse_json, parse_toml

EXAMPLES = 150
SLOW = {"metrics.jsonl": 60, "state.json": 60, "experiment.toml": 60, "config.json": 60, "tuning.json": 60,
        "ladder.json": 60}  # fmt: skip
"""Examples of readers that take many milliseconds each; a report is drawn of a choice."""
NAMES = (
    "train_000000.bin", "train.bin", "train.npy", "corpus.json", "options.toml", "experiment.toml", "metrics.jsonl",
    "config.json", "tuning.json", "ladder.json", "state.json", "model.safetensors", SHARD, "MANIFEST.json", "model.bin",
    "ckpt.pt",
    "hf/config.json", "hf/model.safetensors.index.json", "hf/tokenizer.json", "hf/tokenizer_config.json",
    "hf/vocab.json", "hf/merges.txt", "log.csv", "log.jsonl", "rows.jsonl", "text.jsonl", "text.json",
    "text.jsonl.gz", "text.jsonl.zst", "text.parquet", "tuned_reader.safetensors", "tokens", "name",
)  # fmt: skip


def settled(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same examples in every run, and nothing kept of them."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return {reader.name: reader for reader in readers(tmp_path_factory.mktemp("right"))}


def test_every_reader_is_among_them(known: dict[str, Reader]) -> None:
    assert tuple(known) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_right_are_read(name: str, known: dict[str, Reader], tmp_path: Path) -> None:
    """Else everything would be refused below, for a reason that is no input's."""
    reader = known[name]
    reader.prepare(tmp_path)
    refused = 0
    for sample in reader.samples:
        try:
            reader(tmp_path, sample)
        except GptlabError:
            refused += 1
    assert refused == (name == "train_000000.bin")  # one of its two has tokens above 255


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_hostile_inputs_end_in_errors_of_ours(name: str, known: dict[str, Reader], tmp_path: Path) -> None:
    reader, outcomes = known[name], {"read": 0, "refused": 0}
    reader.prepare(tmp_path)

    @settled(SLOW.get(name, EXAMPLES))
    @given(st.integers(0, 2**32))
    def try_one(seed: int) -> None:
        try:
            reader(tmp_path, reader.hostile(Random(seed)))
            outcomes["read"] += 1
        except GptlabError:
            outcomes["refused"] += 1

    try_one()
    assert outcomes["refused"], "no input was hostile"


@settled(EXAMPLES)
@given(st.binary(max_size=1100), st.sampled_from(["t.bin", "t_000000.bin", "t.npy"]), st.booleans())
def test_shards_of_any_bytes(content: bytes, name: str, magic: bool) -> None:
    import tempfile

    start = {"t.npy": b"\x93NUMPY\x01\x00"}.get(name, (20240520).to_bytes(4, "little") + b"\1\0\0\0") if magic else b""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(GptlabError):
        Path(folder, name).write_bytes(start + content)
        open_shard(Path(folder, name))


@settled(EXAMPLES)
@given(st.text() | st.text("[]{}\"'=.,\n 1ae#"))
def test_whatever_is_wrong_with_a_text_is_a_value_error(text: str) -> None:
    for parse in (parse_json, parse_toml):
        with contextlib.suppress(ValueError):
            parse(text)


@pytest.mark.parametrize("depth", [65, 1000, 100_000])
def test_what_is_nested_too_deeply_is_a_value_error(depth: int) -> None:
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_toml("a = " + "[" * 60 + "]" * 60)
    for parse, text in (
        (parse_json, "[" * depth + "]" * depth),
        (parse_json, '{"a":' * depth + "1" + "}" * depth),
        (parse_toml, "a = " + "[" * depth + "]" * depth),
        (parse_toml, "a." * min(depth, 5000) + "b = 1"),
    ):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse(text)


COUNT, SECONDS = 96, 20.0
"""Spoilt runs, and the CPU seconds of a command: twice and more what the slowest takes on a machine of its own."""
WITH_REPORTS = True
SELDOM = {"resume": 6, "compare to a report": 4, "report": 6, "compare": 2, "verify --json": 4, "runs": 3}
"""Commands that are tried on every so many-eth run, as others read the same."""


def test_the_set_has_every_field_of_every_file_and_every_kind_of_value(finished_run: Path) -> None:
    names = [one.name for one in hostile_runs(finished_run, each=1, drawn=1)]
    assert len(names) == len(set(names)) > 300
    text = "\n".join(names)
    for part in ("options.n_layer ", "data.train ", "machine.gpus ", "grad_norm of train ", "block_loss of val ",
                 "written of sample ", "event of event ", "scalars.step ", "files.state.json "):  # fmt: skip
        assert part in text
    for value in VALUES:
        assert f" {value}" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_command_ends_in_a_traceback_whatever_a_run_holds(
    finished_run: Path, tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    faults, codes = [], Counter()
    for number, hostile in enumerate(some(hostile_runs(finished_run, each=1, drawn=6), COUNT)):
        folder = tmp_path / "runs"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished_run, folder / "bad")
        shutil.copytree(finished_run, folder / "good")
        hostile.spoil(folder / "bad")
        options = {"signal_name": "confidence", "sample_every": 3, "checkpoint_every": 3, "noise_every": 3, "steps": 7}
        try:
            for name, command in commands(folder / "bad", folder / "good", tiny(folder / "bad", **options)):
                if number % SELDOM.get(name, 1):
                    continue
                begun = time.process_time()
                outcome = command()
                codes[name.rstrip("0123456789 "), outcome.code] += 1
                if outcome.code not in allowed(name) or "Traceback" in outcome.text:
                    faults.append((hostile.name, name, outcome.code, outcome.text[-300:]))
                if (seconds := time.process_time() - begun) > SECONDS:
                    faults.append((hostile.name, name, f"{seconds:.1f} s"))
        except Exception as error:
            faults.append((hostile.name, "raised", repr(error)))
    assert faults == []
    assert codes["verify", 3] > COUNT / 2  # most of them are damaged, and said to be
    assert codes["page", 200] == COUNT
    assert codes["compare with a good run", 0] > 5
