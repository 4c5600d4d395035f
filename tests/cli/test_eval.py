"""`gptlab eval`: the run's own figures again, from one process or two, and what is refused before anything is read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptlab.cli.main import main
from gptlab.runs.folder import RunFolder

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words that name a HellaSwag and a LAMBADA of 70 rows each."""
    folder = tmp_path_factory.mktemp("tests")
    endings = ["no", "of it", "and [bold]", "more play"]
    swag = [{"ctx": f"line {n}", "endings": endings[n % 4 :] + endings[: n % 4], "label": n % 3} for n in range(70)]
    last = [{"text": f"line {n} of the play"} for n in range(70)]
    for name, rows in (("swag", swag), ("last", last)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--hellaswag", str(folder / "swag"), "--lambada", str(folder / "last")]


def evaluated(capsys: Capture, *words: str) -> dict[str, Any]:
    assert main(["eval", *words, "--threads", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_validation_is_what_the_run_recorded(run: Path, capsys: Capture) -> None:
    last = [row for row in RunFolder(run).rows() if row["kind"] == "val"][-1]
    found = evaluated(capsys, str(run), "--blocks")
    told = found["tasks"]["val"]
    assert told["loss"] == pytest.approx(last["loss"], abs=1e-6)
    assert told["bits_per_byte"] == pytest.approx(last["bits_per_byte"], abs=1e-6)
    assert told["perplexity"] == pytest.approx(2.718281828459045 ** told["loss"])
    assert told["tokens"] == 512
    assert len(told["blocks"]) == 2
    assert told["blocks"][1]["loss"] == told["loss"]
    assert told["blocks"][0]["loss"] != told["loss"]
    finished = [row for row in RunFolder(run).rows() if row.get("event") == "finished"][-1]
    assert told["validation_sha256"] == finished["validation_sha256"]


def test_an_exported_folder_scores_as_its_run(run: Path, tiny_corpus: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(run), str(tmp_path / "model"), "--json"]) == 0
    capsys.readouterr()
    words = ("--data", str(tiny_corpus), "--eval_tokens", "512")
    ours, theirs = evaluated(capsys, str(run)), evaluated(capsys, str(tmp_path / "model"), *words)
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["tasks"] == theirs["tasks"]
    assert main(["eval", str(tmp_path / "model")]) == 2
    assert "say with --data whose validation tokens" in capsys.readouterr().err


def test_two_processes_score_what_one_does_and_finished_rows_are_kept(
    run: Path, files: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = [str(run), "--tasks", "val,hellaswag,lambada", "--blocks", *files]
    alone = evaluated(capsys, *words)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "gptlab", "eval", *words, "--threads", "1", "--out", str(tmp_path), "--json"]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | rendezvous | {"RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        (out, err), (silent, said) = (rank.communicate(timeout=300) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], (err, said)
    assert json.loads(out) == alone
    assert silent == b""
    for name in ("hellaswag", "lambada"):
        kept = [json.loads((folder / f"{name}.json").read_text()) for folder in (run / "eval", tmp_path)]
        assert kept[0] == kept[1]
    assert main(["eval", *words, "--threads", "1"]) == 0
    shown = capsys.readouterr()
    assert "hellaswag: 70 of 70 rows were finished before" in shown.err
    assert "lambada    1      acc" in shown.out
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--tasks", "hellaswg"],
            "--tasks: no task 'hellaswg'; did you mean 'hellaswag'?; there are val, hellaswag,",
        ),
        (["--tasks", "lm_eval:"], "no task 'lm_eval:'"),
        (["--tasks", ""], "expected one or more of val, hellaswag, lambada and lm_eval:NAME"),
        (["--limit", "0"], "--limit: expected a whole number of at least 1, found '0'"),
    ],
)
def test_a_wrong_word_exits_2(words: list[str], line: str, capsys: Capture) -> None:
    assert main(["eval", "nowhere", *words]) == 2
    assert line in capsys.readouterr().err


def test_what_cannot_be_scored_exits_3(run: Path, tmp_path: Path, capsys: Capture) -> None:
    words = (
        ([str(tmp_path)], "expected a run or a checkpoint"),
        ([str(run), "--tokenizer", "gpt2"], "has a tokenizer of its own, bytes; leave the option out"),
        ([str(run), "--tasks", "lambada", "--lambada", str(tmp_path / "no")], "cannot read"),
    )
    for given, line in words:
        assert main(["eval", *given]) == 3
        assert line in capsys.readouterr().err
