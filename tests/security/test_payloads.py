"""Code in files from elsewhere is not run, and a size that a file merely claims is not believed."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from readers import EXPERIMENT, SIZES, SMALL, readers, sign  # pyright: ignore[reportMissingImports]
from safetensors.torch import load, load_file, save, save_file

from gptlab.analysis.run import read_run
from gptlab.cli.main import main
from gptlab.data.shards import open_shard
from gptlab.errors import CheckpointError, ConfigError
from gptlab.model.formats import open_foreign
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.huggingface import from_huggingface, to_huggingface
from gptlab.model.weights import ADAMW, check_moments
from gptlab.runs import checkpoint
from gptlab.runs.folder import RunFolder
from gptlab.runs.init_weights import any_model, any_state
from gptlab.signals import tuned_lens
from gptlab.signals.registry import user_signal

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """What a payload makes when it runs."""
    return tmp_path / "made"


@pytest.mark.parametrize("kind", ["gpt2", "evil"])
def test_code_beside_a_hugging_face_config_is_not_run(
    kind: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "theirs"
    to_huggingface(SMALL).save_pretrained(folder)
    code = (
        "from transformers import PretrainedConfig, GPT2Config\nopen({!r}, 'w').close()\nclass Evil(GPT2Config): pass\n"
    )
    (folder / "evil.py").write_text(code.format(str(made)))
    content = json.loads((folder / "config.json").read_text())
    content |= {"model_type": kind, "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(content))
    if kind == "gpt2":
        assert torch.equal(from_huggingface(folder).lm_head.weight, SMALL.lm_head.weight)
    else:
        with pytest.raises(CheckpointError, match="expected a GPT-2 with model_type 'gpt2', found 'evil'"):
            from_huggingface(folder)
    assert not made.exists()

    import transformers

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert made.exists(), "the payload is a real one"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "somebody/kernel"),
        ("_attn_implementation", "somebody/kernel"),
        ("torch_dtype", "os.system"),
        ("dtype", {"": "evil"}),
        ("auto_map", {"AutoConfig": "somebody/repository--evil.Evil"}),
        ("output_hidden_states", "yes"),
    ],
)
def test_of_a_hugging_face_config_only_the_arithmetic_is_read(key: str, value: object, tmp_path: Path) -> None:
    to_huggingface(SMALL).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert torch.equal(from_huggingface(tmp_path).lm_head.weight, SMALL.lm_head.weight)


def test_a_run_that_names_code_runs_none_when_it_is_read(
    made: Path, tmp_path: Path, capsys: Capture, tiny: Callable[..., list[str]]
) -> None:
    (tmp_path / "evil.py").write_text(
        f"open({str(made)!r}, 'w').close()\ndef f(logits, targets): return targets * 0.0\n"
    )
    name, run = f"{tmp_path / 'evil.py'}:f", tmp_path / "run"
    reader = next(one for one in readers(tmp_path / "right") if one.name == "config.json")
    reader.prepare(run)
    config = json.loads(reader.samples[0])
    config["options"]["signal.name"] = name
    (run / "config.json").write_text(json.dumps(config))
    assert RunFolder(run).config().signal.name == name
    assert read_run(run).options["signal.name"] == name
    for words in (["runs", str(tmp_path)], ["compare", str(run)], ["verify", str(run)], ["digest", str(run)]):
        main(words)
    (tmp_path / "run.toml").write_text(f'signal.name = "{name}"\n')
    assert main([*tiny(tmp_path / "new"), "--config", str(tmp_path / "run.toml")]) == 2
    assert "it runs as your code; add --allow_code" in capsys.readouterr().err
    text = EXPERIMENT.replace('signal.name = "confidence"\n', f'signal.name = "{name}"\n').partition("[tune]")[0]
    (tmp_path / "x.toml").write_text(text)
    assert main(["experiment", "run", str(tmp_path / "x.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "--allow_code" in capsys.readouterr().err
    assert not made.exists()
    user_signal(name)
    assert made.exists(), "the payload is a real one"


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "log.csv").write_text("st\x1b]0;owned\x07ep,\x1b[2Jloss\u202e\n1,2\n")
    assert main(["compare", "--log", str(tmp_path / "log.csv")]) in (2, 3)
    assert main(["compare", str(tmp_path / "log.csv")]) == 3
    shown = capsys.readouterr().err
    assert "␛[2Jloss" in shown
    assert not set("\x1b\x07\u202e") & set(shown)


def test_a_preset_is_no_path(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "c.toml").write_text('preset = "../../../etc"\n')
    assert main(["train", "--config", str(tmp_path / "c.toml")]) in (2, 3)
    assert "preset" in capsys.readouterr().err


def test_a_function_is_no_path() -> None:
    from gptlab.training.config import SignalConfig, TrainingConfig

    with pytest.raises(ConfigError, match="with the name of a function, found 'idea"):
        TrainingConfig(signal=SignalConfig("idea.py:../../../tmp/x"))
    assert TrainingConfig(signal=SignalConfig("some/idea.py:f")).folder == "log/shakespeare-tiny-idea-f-1"


def test_verify_names_a_state_that_only_its_checksum_speaks_for(tmp_path: Path, capsys: Capture) -> None:
    reader = next(one for one in readers(tmp_path / "right") if one.name == "state.json")
    saved = tmp_path / "run" / "checkpoints" / "step_00000003"
    reader.prepare(saved)
    right = json.loads((saved / "state.json").read_text())
    wrong = [{"scalars": [], "records": {"metrics_bytes": "many"}}]
    wrong += [right | {part: {"x": [value]}} for part in ("cursor", "rng") for value in (float("nan"), float("-inf"))]
    for state in wrong:
        (saved / "state.json").write_text(json.dumps(state))
        sign(saved)
        assert main(["verify", str(tmp_path / "run")]) == 3
        out = capsys.readouterr().out
        assert "state.json: " in out, state
        assert "expected scalars, cursor, rng and records" in out, state
        assert main(["digest", str(tmp_path / "run")]) == 3
        assert "expected scalars, cursor, rng and records" in capsys.readouterr().err, state


def _keep(moments: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: moment for name, moment in moments.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda all_: _keep(all_, "exp_avg.a"), "of a, found exp_avg_sq, step"),
        (lambda all_: _keep(all_, "step.b"), "of b, found exp_avg, exp_avg_sq"),
        (lambda all_: _keep(all_, "step.b", "exp_avg.b", "exp_avg_sq.b"), "of b, found none"),
        (lambda all_: {**all_, "momentum_buffer.a": torch.zeros(2)}, "exp_avg_sq, momentum_buffer, step"),
        (lambda all_: {**all_, "exp_avg_sq.b": torch.tensor([0.0, math.nan])}, "numbers in exp_avg_sq.b, found NaN"),
    ],
)  # fmt: skip
def test_moments_that_lack_a_tensor_or_a_number_are_refused(change: Any, found: str) -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(2)}
    adamw = {f"{key}.{of}": torch.zeros(() if key == "step" else 2) for of in weights for key in ADAMW}
    check_moments(weights, adamw, "x")
    check_moments(weights, {}, "x")
    check_moments(weights, {"momentum_buffer.a": torch.zeros(2), **_keep(adamw, *(f"{k}.a" for k in ADAMW))}, "x")
    with pytest.raises(CheckpointError, match=found):
        check_moments(weights, change(adamw), "x")


@pytest.mark.parametrize("weight", [math.nan, 3e38])
@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--prompt", "line", "--temperature", "0"],
        ["sample", "--prompt", "line", "--exit_confidence", "0.9"],
        ["lens", "--prompt", "line"], ["eval"], ["noise"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_figures_that_are_not_finite_are_one_line(
    weight: float, words: list[str], run: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a model that another program saved, or one that a user broke; what is printed is JSON all the same."""
    model = run / "hf"
    assert main(["export", str(run), str(model)]) == 0
    tensors = load_file(model / "model.safetensors")
    tensors["transformer.ln_f.weight"] = torch.full_like(tensors["transformer.ln_f.weight"], weight)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    data = ["--data", str(tiny_corpus)] if words[0] in ("eval", "noise") else []
    named = ["--checkpoint"] * (words[0] == "sample") + [str(model)]
    assert main([*words, *named, *data, "--json"]) == 4
    out, err = capsys.readouterr()
    assert "not finite" in err
    assert "not finite" in json.loads(out)["error"]


ROOM = 2**28
Case = tuple[str, Callable[[], object]]


def safetensors(shape: list[int], offsets: list[int], *, dtype: str = "F32", header: int | None = None) -> bytes:
    return _stated({"transformer.wte.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, header)


def _stated(tensors: dict[str, dict[str, object]], header: int | None = None) -> bytes:
    """A file with this header, of its own length or of a stated one, and 64 bytes."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if header is None else header) + text + b"\0" * 64


TWICE = {name: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} for name in ("weight", "bias")}
SAFETENSORS = {
    "huge": safetensors([2**20, 2**20], [0, 2**42]),
    "overlapping": _stated(TWICE),
    "beyond the end": safetensors([2**20], [2**40, 2**40 + 2**22]),
    "backwards": safetensors([4, 4], [64, 0]),
    "shape and length differ": safetensors([2**30], [0, 64]),
    "overflow": safetensors([2**63, 2], [0, 64]),
    "long header": safetensors([4, 4], [0, 64], header=2**62),
    "other type": safetensors([4, 4], [0, 64], dtype="F4096"),
}


def cases(folder: Path) -> Iterator[Case]:
    shard = struct.pack("<256i", 20240520, 1, 2**31 - 1, *[0] * 253) + b"\1\0" * 5
    yield from _file(folder / "train_000000.bin", shard, open_shard)
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    yield from _file(folder / "a.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header, open_shard)
    numbers = (1024, 50257, 10_000, 64, 2**17, 50304)
    yield from _file(
        folder / "m.bin", struct.pack("<256i", 20240326, 3, *numbers, *[0] * 248) + b"\0" * 64, open_foreign
    )
    weights = {name: p.detach() for name, p in SMALL.named_parameters()}
    for name, changes in {"wide": {"n_embd": 2**17}, "long": {"block_size": 2**31}, "deep": {"n_layer": 2**40}}.items():
        path = folder / f"{name}.pt"
        torch.save({"model": weights, "model_args": {**SIZES, "vocab_size": 256, **changes}}, path)
        yield path.name, lambda path=path: open_foreign(path)
    path = folder / "expanded.pt"  # four bytes that are said to be a table
    sizes = {**SIZES, "vocab_size": 2**20, "n_embd": 2**12}
    torch.save({"model": {"transformer.wte.weight": torch.zeros(1).expand(2**20, 2**12)}, "model_args": sizes}, path)
    yield path.name, lambda path=path: open_foreign(path)
    yield from _huggingface(folder)
    yield from _checkpoints(folder)
    for kind, content in SAFETENSORS.items():
        path = folder / f"tuned {kind}"
        path.write_bytes(content)
        yield path.name, lambda path=path: tuned_lens.load(SMALL, path)


def _file(path: Path, content: bytes, read: Callable[[Path], object]) -> Iterator[Case]:
    path.write_bytes(content)
    yield path.name, lambda: read(path)


def _huggingface(folder: Path) -> Iterator[Case]:
    for key, value in {
        "n_embd": 2**20,
        "n_layer": 2**31,
        "n_positions": 2**40,
        "vocab_size": 2**40,
        "n_head": -1,
    }.items():
        path = folder / f"theirs {key}"
        to_huggingface(SMALL).save_pretrained(path)
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(content | {key: value}))
        yield path.name, lambda path=path: from_huggingface(path)
    for kind, content in SAFETENSORS.items():
        path = folder / f"theirs {kind}"
        to_huggingface(SMALL).save_pretrained(path)
        (path / "model.safetensors").write_bytes(content + b"\0" * 8000)
        yield path.name, lambda path=path: from_huggingface(path)


def _checkpoints(folder: Path) -> Iterator[Case]:
    """Each with checksums that are right: whoever writes a checkpoint writes them."""
    reader = next(one for one in readers(folder / "right") if one.name == "state.json")
    deep = {"n_layer": 2**40, "share_blocks": True}
    for name, changes in {"n_embd": {"n_embd": 2**20}, "block_size": {"block_size": 2**40, "total_batch_tokens": 2**40},
                          "n_layer": {"n_layer": 9_999}, "shared": deep}.items():  # fmt: skip
        path = folder / f"checkpoint {name}"
        reader.prepare(path)
        state = json.loads((path / "state.json").read_text())
        state["options"] |= changes
        (path / "state.json").write_text(json.dumps(state))
        if name == "shared":  # stored once, whatever n_layer says
            shared = GPT(GPTConfig(vocab_size=256, **SIZES, share_blocks=True))
            weights = {key: p.detach() for key, p in shared.named_parameters()}
            (path / checkpoint.WEIGHTS).write_bytes(save(weights))
            (path / checkpoint.MOMENTS).write_bytes(save({}))
        sign(path)
        yield path.name, lambda path=path: any_model(path)
    for kind, content in SAFETENSORS.items():
        for file in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
            path = folder / f"checkpoint {file} {kind}"
            reader.prepare(path)
            (path / file).write_bytes(content)
            sign(path)
            yield path.name, lambda path=path: any_state(path)


HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="the process's room is limited by Linux's means")
def test_a_claim_ends_in_an_error_of_ours_and_takes_no_memory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {one["case"]: one["told"] for one in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 48
    assert {case: told for case, told in found.items() if not told.startswith("gptlab.errors.")} == {}
    assert {case: told for case, told in found.items() if "\n" in told or "allocate" in told or "memory" in told} == {}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("exp_avg.transformer.ln_f.bias", (5,), r"expected exp_avg.transformer.ln_f.bias \(4,\), found .* \(5,\)"),
        ("step.transformer.ln_f.bias", (4,), r"expected step.transformer.ln_f.bias \(\), found"),
        ("exp_avg.transformer.h.9.ln_1.bias", (4,), "expected exp_avg.transformer.h.9.ln_1.bias None, found"),
    ],
)
def test_moments_are_those_of_the_weights(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    reader = next(one for one in readers(tmp_path / "right") if one.name == "state.json")
    reader.prepare(tmp_path / "saved")
    any_state(tmp_path / "saved")
    (tmp_path / "saved" / checkpoint.MOMENTS).write_bytes(save({name: torch.zeros(shape)}))
    sign(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=message):
        any_state(tmp_path / "saved")


def test_weights_have_the_shapes_of_the_options(tmp_path: Path) -> None:
    """As many numbers as there should be, in another shape."""
    reader = next(one for one in readers(tmp_path / "right") if one.name == "state.json")
    reader.prepare(tmp_path / "saved")
    any_model(tmp_path / "saved")
    name, file = "transformer.h.0.mlp.c_fc.weight", tmp_path / "saved" / checkpoint.WEIGHTS
    weights = load(file.read_bytes())
    file.write_bytes(save({**weights, name: weights[name].T.contiguous()}))
    sign(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"expected {name} to be there|expected {name} .*, found"):
        any_model(tmp_path / "saved")


def read_all(folder: Path) -> None:
    """Print a line of JSON a file, {case: the error's class and text}, from a process that has little room."""
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    known = list(cases(folder))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    for name, read in known:
        try:
            told = f"read: {read()}"
        except Exception as error:
            told = f"{type(error).__module__}.{type(error).__name__}: {error}"
        print(json.dumps({"case": name, "told": told}), flush=True)


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
