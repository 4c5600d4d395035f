"""`gptlab import` and `gptlab export --format llm.c`: a run to llm.c and back is the same run to every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptlab.cli.main import main
from gptlab.runs.init_weights import any_model, initial_model

Capture = pytest.CaptureFixture[str]


def test_llmcs_file_comes_back_as_the_same_model(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    model, _ = any_model(finished_run)
    file, folder = tmp_path / "out" / "model.bin", tmp_path / "model"
    assert main(["export", str(finished_run), str(file), "--format", "llm.c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(file),
        "parameters": model.config.parameters,
        "padding": 0,
    }
    assert main(["import", str(file), "--out", str(folder), "--tokenizer", "bytes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["n_layer"], told["vocab_size"], told["tokenizer"]) == ("llm.c", 2, 256, "bytes")
    given = dict(any_model(folder)[0].named_parameters())
    started = dict(initial_model(str(folder), model.config, 5, "bytes").named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, given[name]), name
        assert torch.equal(p, started[name]), name
    words = ["--prompt", "line", "--max_new_tokens", "9", "--temperature", "0", "--json"]
    texts = []
    for source in (finished_run, folder):
        assert main(["sample", "--checkpoint", str(source), *words]) == 0
        texts.append(json.loads(capsys.readouterr().out)["samples"])
    assert texts[0] == texts[1]


def test_another_programs_model_is_pointed_to_the_import(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04")
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        for words in (["sample", "--checkpoint"], ["lens", "--prompt", "a"], ["eval"], ["noise"]):
            assert main([*words, str(source)]) == 3
            assert f"is read with `gptlab import {source} --out FOLDER`" in capsys.readouterr().err


def test_nothing_is_overwritten_and_nothing_half_written_is_left(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    (tmp_path / "no_model").write_bytes(b"x" * 40)
    refused = (
        (["import", str(tmp_path / "no_model"), "--out", str(used)], 2, "expected a new or empty folder to import to"),
        (["import", str(tmp_path / "no_model"), "--out", str(tmp_path / "new")], 3, "found none of them"),
        (["import", str(finished_run), "--out", str(tmp_path / "new")], 3, "what gptlab trained needs no import"),
        (["export", str(finished_run), str(used)], 2, "expected a new or empty folder to export to"),
        (["export", str(finished_run), str(used), "--format", "llm.c"], 2, "expected a new file to export to"),
        (["export", str(finished_run), str(tmp_path / "n"), "--dtype", "bf16"], 2, "bf16 is for --format llm.c"),
    )
    before = sorted(tmp_path.rglob("*"))
    for words, code, line in refused:
        assert main(words) == code
        assert line in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
