"""`gptlab train` as a user types it: what a run leaves behind, how it goes on, and what a mistake is told."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptlab.cli import train
from gptlab.cli.main import main
from gptlab.cli.progress import next_commands
from gptlab.data.shards import write_shard
from gptlab.data.synthetic import Dialogue
from gptlab.runs import checkpoint
from gptlab.runs.folder import RunFolder, newest
from gptlab.runs.init_weights import any_model

Capture = pytest.CaptureFixture[str]
Words = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]
WITH_REPORTS = True


def rows(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in RunFolder(run).rows() if not kinds or row["kind"] in kinds]


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if not path.name.startswith(".")}


def told(capture: Capture) -> list[str]:
    """Our own lines on standard error; fails on a traceback."""
    err = capture.readouterr().err
    assert "Traceback" not in err
    return [line.removeprefix("gptlab: ") for line in err.splitlines() if line.startswith("gptlab: ")]


def test_a_run_leaves_all_its_records(finished_run: Path) -> None:
    records = {"config.json", "environment.json", "metrics.jsonl", "log.txt", "report.html", "checkpoints"}
    assert names(finished_run) == records
    assert [row["step"] for row in rows(finished_run, "train")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(finished_run, "val")] == [3, 6]
    assert [row["step"] for row in rows(finished_run, "sample")] == [3, 6]
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
    for row in rows(finished_run, "train"):
        assert {"loss", "signal_loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu"} <= row.keys()
        assert row["tokens"] == 64 * row["step"]
        assert row["signal_loss"] < 0
    assert [row["step"] for row in rows(finished_run, "train") if "dose" in row] == [1, 3, 5]
    finished = rows(finished_run)[-1]
    assert finished["event"] == "finished"
    assert finished["loss"] == rows(finished_run, "val")[-1]["loss"]


def test_log_txt_is_in_build_nanogpts_format(finished_run: Path) -> None:
    lines = [line.split() for line in (finished_run / "log.txt").read_text().splitlines()]
    expected = [["1", "train"], ["2", "train"], ["3", "train"], ["3", "val"]]
    expected += [["4", "train"], ["5", "train"], ["6", "train"], ["6", "val"]]
    assert [line[:2] for line in lines] == expected
    losses = [row["loss"] for row in rows(finished_run, "train", "val")]
    assert [float(line[2]) for line in lines] == pytest.approx(losses, abs=1e-4)


def test_the_display_shows_what_a_run_is_about(tiny: Words, tmp_path: Path, capsys: Capture) -> None:
    assert main(tiny(tmp_path / "run", signal_name="confidence", sample_every=6)) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("block loss confidence: log(1-p_m)", "tokens/s", "MFU", "left", "dose", "signal -", "bits/byte",
                  "each block's best next token", "block 2", "validation loss", "nats a token", "matmul peak",
                  "run folder", "try next", "train_gpt2.py", "gptlab sample --checkpoint"):  # fmt: skip
        assert words in err, words


def test_json_is_the_summary_and_all_of_standard_output(tiny: Words, tmp_path: Path, capsys: Capture) -> None:
    words = [*tiny(tmp_path / "run"), "--json"]
    assert main(words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["step"], summary["folder"], summary["tokens"]) == (6, str(tmp_path / "run"), 384)
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == summary


def test_a_finished_run_is_not_run_again(run: Path, tiny: Words, capsys: Capture) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert main(tiny(run, signal_name="confidence")) == 0
    assert "this run was finished before" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", [".report.html.0123456789abcdef.tmp", ""])
def test_a_run_killed_before_its_report_was_whole_gets_it(run: Path, tiny: Words, left: str) -> None:
    report = (run / "report.html").read_bytes()
    (run / left).write_bytes(b"half") if left else (run / "report.html").unlink()
    assert main(tiny(run, signal_name="confidence")) == 0
    assert (run / "report.html").read_bytes() == report
    assert not list(run.glob(".report.html.*"))


def test_more_steps_go_on_and_equal_a_run_of_that_length(tiny: Words, tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    common = {"signal_name": "confidence", "schedule": "constant", "checkpoint_every": 3}
    assert main(tiny(short, steps=3, **common)) == 0
    assert main(tiny(short, steps=9, **common)) == 0
    assert main(tiny(long, steps=9, **common)) == 0
    assert checkpoint.digest(newest(short)) == checkpoint.digest(newest(long))
    assert [(r["step"], r["kind"], r.get("loss")) for r in rows(short)] == [
        (r["step"], r["kind"], r.get("loss")) for r in rows(long)
    ]


def test_a_run_killed_before_its_summary_writes_the_same_one(run: Path, tiny: Words) -> None:
    path = run / "metrics.jsonl"
    whole = path.read_text()
    expected = rows(run)[-1]
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert main(tiny(run, signal_name="confidence")) == 0
    found = rows(run)[-1]
    assert path.read_text().count("\n") == whole.count("\n")
    for key in ("event", "step", "loss", "bits_per_byte", "tokens", "clipped_share", "tokens_per_second"):
        assert found[key] == expected[key], key


@pytest.mark.fault(number=17)
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"learning_rate": 0.5}, "learning_rate: the run has 0.001, you ask for 0.5"),
        ({"steps": 5}, "steps: the run has 6, you ask for 5"),
        ({"signal_name": "none"}, "signal.name: the run has 'confidence', you ask for 'none'"),
    ],
)
def test_another_config_is_refused_with_the_difference(
    changes: dict[str, Any], difference: str, run: Path, tiny: Words, capsys: Capture
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert main(tiny(run, **{"signal_name": "confidence", **changes})) == 3
    err = capsys.readouterr().err
    assert "holds another run; use --resume never" in err
    assert [line.strip() for line in err.splitlines() if "you ask for" in line] == [difference]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_intervals_and_threads_may_change(run: Path, tiny: Words) -> None:
    changes = {"eval_every": 2, "checkpoint_every": 4, "log_every": 5, "threads": 2, "resume": "must"}
    assert main(tiny(run, signal_name="confidence", **changes)) == 0


@pytest.mark.fault(number=17)
def test_another_corpus_is_refused(run: Path, tiny: Words, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.txt").write_text("bytes")
    for split in ("train", "val"):
        write_shard(other / f"{split}_000000.bin", np.arange(2000, dtype=np.uint16) % 200)
    assert main(tiny(run, signal_name="confidence", data=other)) == 3
    assert "data: train shard 0: recorded SHA-256" in capsys.readouterr().err


@pytest.mark.fault(number=17)
def test_despite_goes_on_and_is_recorded(
    run: Path, tiny: Words, tiny_corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Another learning rate and other data first, and the learning rate again; all of it stays in config.json."""
    other = Path(shutil.copytree(tiny_corpus, tmp_path / "other"))
    write_shard(other / "train_000000.bin", np.arange(4000, dtype=np.uint16) % 200)
    changes = {"signal_name": "confidence", "learning_rate": 0.5, "data": other, "steps": 8, "checkpoint_every": 100}
    assert main(tiny(run, **changes)) == 3
    refused = [line.strip() for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert len(refused) == 3
    assert main([*tiny(run, **changes), "--despite"]) == 0
    err = capsys.readouterr().err
    assert all("".join(line.split()) in "".join(err.split()) for line in refused)
    config = json.loads((run / "config.json").read_text())
    assert config["despite"] == [{"step": 6, "differences": refused}]
    assert config["options"]["learning_rate"] == 0.5
    told = [row for row in rows(run) if row.get("event") == "despite"]
    assert told == [{"step": 6, "kind": "event", "event": "despite", "differences": refused}]
    assert main(tiny(run, **changes)) == 0, "what was recorded is no difference any more"
    changes |= {"learning_rate": 0.25, "steps": 9}
    assert main([*tiny(run, **changes), "--despite"]) == 0
    history = json.loads((run / "config.json").read_text())["despite"]
    assert [(entry["step"], len(entry["differences"])) for entry in history] == [(6, 3), (8, 1)]


@pytest.mark.fault(number=17)
@pytest.mark.parametrize("change", [{"n_layer": 3}, {"block_size": 8}, {"optimizer": "muon"}])
def test_despite_cannot_make_a_checkpoint_fit(change: dict[str, Any], run: Path, tiny: Words, capsys: Capture) -> None:
    before = checkpoint.digest(newest(run)), (run / "config.json").read_bytes()
    assert main([*tiny(run, signal_name="confidence", steps=8, **change), "--despite"]) == 3
    assert f"does not fit another {next(iter(change))}; " in capsys.readouterr().err
    assert (checkpoint.digest(newest(run)), (run / "config.json").read_bytes()) == before


def test_resume_never_takes_a_new_folder(run: Path, tiny: Words) -> None:
    words = tiny(run, signal_name="confidence", resume="never", steps=2)
    assert main(words) == 0
    assert main(words) == 0
    assert [rows(run.with_name(name))[-1]["step"] for name in ("run", "run-2", "run-3")] == [6, 2, 2]


def test_resume_must_insists(tiny: Words, tmp_path: Path, capsys: Capture) -> None:
    words = tiny(tmp_path / "run", resume="must")
    assert main(words) == 3
    assert told(capsys) == [f"--resume must: expected a run in {tmp_path / 'run'}, found none; check --out"]
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_made_a_step_may_begin_with_other_options(
    tiny: Words, finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    assert main(tiny(out, init_from=finished_run, n_layer=3)) == 3
    (line,) = told(capsys)
    assert "transformer.h.2.ln_1.weight is missing there; give that model's --n_layer" in line
    assert rows(out) == [{"step": 0, "kind": "event", "event": "CheckpointError", "text": line}]
    assert main(tiny(out, init_from=finished_run, steps=1)) == 0


def test_a_run_goes_on_without_the_weights_it_started_from(tiny: Words, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    assert main(tiny(out, init_from=run, steps=3, checkpoint_every=3)) == 0
    shutil.rmtree(run)
    assert main(tiny(out, init_from=run, steps=6)) == 0
    assert rows(out)[-1]["step"] == 6


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run: Path, tiny: Words, capsys: Capture) -> None:
    expected = checkpoint.digest(newest(run))
    damaged = run / "checkpoints" / "step_00000006" / "model.safetensors"
    flip(damaged)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))  # not finished, so that it goes on
    assert main(tiny(run, signal_name="confidence", checkpoint_every=3)) == 0
    err = capsys.readouterr().err
    assert f"damaged checkpoint: {damaged}: its content does not match its checksum; falling back" in err
    assert checkpoint.digest(newest(run)) == expected


def test_without_a_whole_checkpoint_nothing_is_overwritten(run: Path, tiny: Words, capsys: Capture) -> None:
    for step in (3, 6):
        flip(run / "checkpoints" / f"step_{step:08d}" / "optimizer.safetensors")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # killed in the midst of its summary
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert main(tiny(run, signal_name="confidence")) == 3
    (line,) = told(capsys)
    assert "no checkpoint in" in line
    assert "step_00000006/optimizer.safetensors" in line
    assert {path: path.read_bytes() for path in before} == before
    assert rows(run)[-1] == {"step": 6, "kind": "event", "event": "CheckpointError", "text": line}
    assert len(rows(run)) == len(lines)


def flip(path: Path) -> None:
    """Change one bit of a file's last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def corrupt(folder: Path) -> None:
    (folder / "train_000000.bin").write_bytes((folder / "train_000000.bin").read_bytes()[:-10])


def out_of_range(folder: Path) -> None:
    tokens = np.full(1000, 65, dtype=np.uint16)
    tokens[789] = 256
    write_shard(folder / "train_000000.bin", tokens)


def out_of_range_in_validation(folder: Path) -> None:
    write_shard(folder / "val_000000.bin", np.full(600, 300, dtype=np.uint16))


def of_another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.txt").write_text("gpt2")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, r"train_000000\.bin is truncated: expected \d+ bytes for 4000 tokens, found \d+"),
        (out_of_range, r"train_000000\.bin: token out of range: .* vocab_size 256, found 256 at position"),
        (out_of_range_in_validation, r"val_000000\.bin: token out of range: .* found 300 at position 0"),
        (of_another_tokenizer, "holds gpt2 tokens, the run is set for bytes; add --tokenizer gpt2"),
        (gone, "no corpus .*expected a folder of shards or one of shakespeare, fineweb-edu.*gptlab data prepare"),
    ],
)
def test_bad_data_is_one_line_that_names_it(
    damage: Callable[[Path], None], message: str, tiny: Words, tiny_corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, folder)
    damage(folder)
    assert main(tiny(tmp_path / "run", data=folder, steps=16, eval_every=0)) == 3  # an epoch: every window is read
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("gptlab: ")]
    assert re.search(message, line), line
    if (tmp_path / "run").exists():
        assert rows(tmp_path / "run")[-1]["text"] == line.removeprefix("gptlab: ")


def test_a_token_that_only_pads_the_models_vocabulary_is_out_of_range(
    tiny: Words, tiny_corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, folder)
    of_another_tokenizer(folder)
    write_shard(folder / "val_000000.bin", np.full(600, 50300, dtype=np.uint16))
    assert main(tiny(tmp_path / "run", data=folder, tokenizer="gpt2")) == 3
    (line,) = told(capsys)
    assert re.search(r"val_000000\.bin: token out of range: .* 50257, found 50300 at position 0", line)


def test_the_shortest_context_has_a_prompt_for_its_samples(tiny: Words, tmp_path: Path) -> None:
    assert main(tiny(tmp_path / "run", block_size=2, total_batch_tokens=8, steps=2, sample_every=1)) == 0
    assert sum(row["kind"] == "sample" for row in rows(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1200, "total_batch_tokens": 1200, "eval_tokens": 1200}, "has 1000 validation tokens"),
        ({"block_size": 5000, "total_batch_tokens": 5000, "eval_tokens": 5000}, "has no training window"),
        ({"total_batch_tokens": 65}, "must be a multiple of block_size 16, found 65; try 64"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head 5, found 32"),
        ({"n_embd": 10**12}, "n_embd must be at most 1048576, found 1000000000000"),
        ({"steps": 10**18}, "steps must be at most 1000000000000, found 1000000000000000000"),
        ({"device": "cuda:99"}, "device cuda:99 is not there: this machine has"),
        ({"min_lr": -1}, "min_lr must be at least 0, found -1.0"),
        ({"beta2": 1}, "beta2 must be at least 0 and below 1, found 1.0"),
        ({"beta1": -0.1}, "beta1 must be at least 0 and below 1, found -0.1"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1, found 1.0"),
        ({"threads": 100_000}, r"threads must be from 0 \(a share of the cores\) to 1024, found 100000"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, found 'tpu'"),
        ({"data": "shakespear"}, "no corpus 'shakespear'.*did you mean 'shakespeare'"),
        ({"init_from": "nowhere"}, "expected a run or a checkpoint, found none at nowhere"),
        ({"signal_name": "confidence", "n_layer": 1}, "n_layer must be at least 2, found 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_line_and_code_3(
    changes: dict[str, Any], message: str, tiny: Words, tmp_path: Path, capsys: Capture
) -> None:
    assert main(tiny(tmp_path / "run", **changes)) == 3
    (line,) = told(capsys)
    assert re.search(message, line), line


def test_a_shorter_context_than_the_source_is_explained(
    tiny: Words, finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(tiny(tmp_path / "run", init_from=finished_run, block_size=32)) == 3
    (line,) = told(capsys)
    assert "transformer.wpe.weight is (16, 32) there and (32, 32) here; give that model's --block_size" in line


def test_a_made_up_corpus_shows_the_loss_over_its_floor(
    tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Fourteen fair bits, a label that is wrong one time in ten, and the end of the line."""
    monkeypatch.chdir(tmp_path)
    assert main([*tiny(tmp_path / "run", data="lpn:bits=14,tokens=8192"), "--json"]) == 0
    out, err = capsys.readouterr()
    floor = (14 * math.log(2) - 0.1 * math.log(0.1) - 0.9 * math.log(0.9)) / 16
    validated = [row for row in rows(tmp_path / "run") if row["kind"] == "val"]
    assert len(validated) == 2
    for row in validated:
        assert row["excess_loss"] == pytest.approx(row["loss"] - floor, abs=1e-12)
        assert f"{row['excess_loss']:+.4f} over the floor" in err
    assert json.loads(out)["excess_loss"] == validated[-1]["excess_loss"]
    assert (tmp_path / "data" / "lpn-bits=14,tokens=8192-bytes" / "corpus.json").exists()
    assert main(tiny(tmp_path / "other", data="lpn:bits=14,tokens=8192", block_size=24, total_batch_tokens=96)) == 3
    assert "windows of whole lines, of 16 tokens each, found block_size 24; try 32" in told(capsys)[0]


def test_dialogue_shows_what_the_model_gives_to_the_truth(
    tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row's figure again from the checkpoint and the text of the corpus, an answer at a time."""
    monkeypatch.chdir(tmp_path)
    words = tiny(tmp_path / "run", data="dialogue:tokens=8192", checkpoint_every=6, learning_rate=0.02, steps=30)
    assert main(words) == 0
    validated = [row for row in rows(tmp_path / "run") if row["kind"] == "val"]
    source, (model, _) = Dialogue(tokens=8192), any_model(tmp_path / "run")
    text = "\0" + source.text(512, "val", 0)
    given = []
    for start in range(0, 512, 16):
        window = text[start : start + 16]
        with torch.no_grad():
            p = model(torch.tensor([[*window.encode()]])).softmax(2)[0]
        for place in range(1, 16, 4):  # after the question
            given.append(p[place, ord("A") + source.order[ord(window[place]) - ord("a"), 0]].item())
    assert len(given) == 128
    assert validated[-1]["truth_probability"] == pytest.approx(sum(given) / 128, rel=1e-4)
    assert validated[-1]["truth_probability"] > 2 * validated[0]["truth_probability"] > 0


def test_debug_shows_the_traceback_and_json_the_error(tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", "--data", "nowhere", "--debug", "--json"]) == 3
    out, err = capsys.readouterr()
    assert "Traceback (most recent call last)" in err
    assert json.loads(out) == {"error": err.splitlines()[0].removeprefix("gptlab: "), "exit_code": 3}


def test_a_toml_file_gives_options_under_those_of_the_command_line(tiny: Words, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('learning-rate = 3e-4\nsteps = 4\nsignal.name = "confidence"\n[signal]\nlayers = [1]\n'.replace(
        'signal.name = "confidence"\n[signal]\n', '[signal]\nname = "confidence"\n'))  # fmt: skip
    words = [word for word in tiny(tmp_path / "run") if not word.startswith(("--steps", "--learning_rate"))]
    assert main([*words, "--config", str(file), "--warmup-steps=1"]) == 0
    config = RunFolder(tmp_path / "run").config()
    assert (config.learning_rate, config.steps, config.warmup_steps) == (3e-4, 4, 1)
    assert (config.signal.name, config.signal.layers) == ("confidence", (1,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate = 1", "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("[signal]\nnam = 'x'", "unknown key 'signal.nam'; did you mean 'signal.name'?"),
        ("steps = 'many'", "steps: expected a whole number, found 'many'"),
        ("steps = nan", "steps: expected a whole number, found nan"),
        ("steps = 1.5", "steps: expected a whole number, found 1.5"),
        ("schedule = 'cosin'", "schedule: expected one of cosine, wsd, constant, found 'cosin'; did you mean 'cosine'"),
        ("preset = 'gpt2-125m'", "unknown preset 'gpt2-125m'; did you mean 'gpt2-124m'?"),
        ("steps = ", "is not a TOML file that can be read"),
    ],
)
def test_a_bad_toml_file_is_named_with_the_key(content: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    assert main(["train", "--config", str(file)]) == 3
    (line,) = told(capsys)
    assert str(file) in line
    assert message in line
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 3
    assert told(capsys) == [f"--config: no file {tmp_path / 'none.toml'}"]


def test_presets_and_values_over_them() -> None:
    assert train.resolve({}, gpus=0).preset == "shakespeare-tiny"
    big = train.resolve({}, gpus=1)
    assert (big.preset, big.n_layer, big.total_batch_tokens, big.steps) == ("gpt2-124m", 12, 524_288, 19_073)
    assert (big.learning_rate, big.warmup_steps) == (6e-4, 715)
    notes = train.resolve({"preset": "notes-124m", "steps": 7}, gpus=0)
    assert (notes.share_blocks, notes.total_batch_tokens, notes.steps) == (True, 131_072, 7)


def test_a_diverged_run_exits_4_and_says_where(tiny: Words, tmp_path: Path, capsys: Capture) -> None:
    assert main(tiny(tmp_path / "run", learning_rate=1e30, warmup_steps=0, grad_clip=0)) == 4
    (line,) = told(capsys)
    assert line.startswith("diverged at step ")
    last = rows(tmp_path / "run")[-1]
    assert (last["kind"], last["event"], last["text"]) == ("event", "DivergedError", line)


def test_the_signals_are_left_as_they_were(tiny: Words, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main(tiny(tmp_path / "run", steps=1)) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_full_disk_is_one_line(tiny: Words, tmp_path: Path, capsys: Capture) -> None:
    """A limit on the size of files stands for the disk: both are an OSError at a write."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from gptlab.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *tiny(tmp_path / "run", checkpoint_every=3)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not save" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_torchrun_with_two_processes_tells_an_error_once(tiny: Words, tmp_path: Path) -> None:
    words = tiny(tmp_path / "run", signal_name="confidence", resume="must")[1:]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt2.py", *words],
        cwd=ROOT, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("gptlab: --resume must: expected a run") == 1
    assert "exitcode  : 3" in done.stderr


@pytest.mark.parametrize(
    ("signal", "launcher", "command"),
    [
        ("none", "train_gpt2_ben.py", "gptlab train --signal.name confidence"),
        ("brier", "train_gpt2.py", "gptlab train"),
    ],
)
def test_what_to_try_next_works_where_it_is_printed(
    signal: str, launcher: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the launchers of a checkout, or with the command alone, which is all that an installed wheel has."""
    config = train.resolve({"signal.name": signal, "steps": 7, "seed": 2}, gpus=0)
    monkeypatch.chdir(tmp_path)
    assert next_commands(config, "log/run")[0].startswith(f"{command} --preset shakespeare-tiny --seed=2 --steps=7  # ")
    (tmp_path / launcher).touch()
    assert next_commands(config, "log/run")[0].startswith(f"torchrun --standalone --nproc_per_node=1 {launcher} --")
