"""`gptlab lens` and `gptlab eval` as a user types them: tables, JSON, mistakes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.cli.lens import show
from gptlab.cli.main import main
from gptlab.cli.sample import PLAIN, colour
from gptlab.data.huggingface_tokenizer import files_of
from gptlab.interpret.lens import CONFIDENCES
from gptlab.model.huggingface import write_folder
from gptlab.runs.folder import RunFolder
from gptlab.runs.init_weights import model_of
from gptlab.signals.tuned_lens import FILE

Capture = pytest.CaptureFixture[str]
HOSTILE = '<img src=x onerror=alert(1)>"\x1b[2J'


def lens(capsys: Capture, source: Path, *words: str) -> dict[str, Any]:
    assert main(["lens", str(source), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def test_a_lens_is_the_models_own_reading(finished_run: Path, capsys: Capture) -> None:
    found = lens(capsys, finished_run, "--prompt", "line 9", "--top", "3")
    assert found["readers"].keys() == {"raw"}
    positions = found["readers"]["raw"]["positions"]
    assert "".join(position["text"] for position in positions) == "line 9"
    model, _ = model_of(finished_run)
    states = model.hidden_states(torch.tensor([list(b"line 9")]))[1:]
    for j, h in enumerate(states):
        p = model.read(h)[0].softmax(1)
        for t, position in enumerate(positions):
            top = position["blocks"][j]["top"]
            assert [best["token"] for best in top] == p[t].topk(3).indices.tolist()
            assert top[0]["probability"] == pytest.approx(float(p[t].max()), abs=1e-5)


def test_a_fit_is_kept_beside_the_run_and_used(run: Path, capsys: Capture) -> None:
    words = ("--fit", "--steps", "20", "--batch_tokens", "64", "--tokens", "128")
    found = lens(capsys, run, *words)
    assert found["reader"] == str(run / FILE)
    assert found["divergence"]["tuned"][0] < found["divergence"]["raw"][0]
    both = lens(capsys, run, "--prompt", "line")["readers"]
    assert both["tuned"]["positions"][0]["blocks"][1] == both["raw"]["positions"][0]["blocks"][1]
    assert both["tuned"]["positions"][0]["blocks"][0] != both["raw"]["positions"][0]["blocks"][0]
    checkpoint = next((run / "checkpoints").glob("*6"))
    assert lens(capsys, checkpoint, "--prompt", "line")["readers"] == both
    sample = ["sample", "--checkpoint", str(run), "--reader", "tuned", "--exit_confidence", "0.001", "--json"]
    assert main([*sample, "--max_new_tokens", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"][0]["exit_blocks"] == [1, 1, 1, 1]
    assert told["share_of_blocks"] == 0.5
    words = ["--reader", "tuned", "--show_blocks", "--prompt", "line", "--max_new_tokens", "1", "--json"]
    assert main(["sample", "--checkpoint", str(run), *words]) == 0
    ((read,),) = (sample["blocks"] for sample in json.loads(capsys.readouterr().out)["samples"])
    seen = [block["top"][0] for block in both["tuned"]["positions"][-1]["blocks"]]
    assert [best for best, _ in read] == [best["text"] for best in seen]
    assert [p for _, p in read] == pytest.approx([best["probability"] for best in seen], abs=1e-4)
    assert main(["verify", str(run)]) == 0


def test_another_models_reader_is_left_alone_and_said(run: Path, capsys: Capture) -> None:
    lens(capsys, run, "--fit", "--steps", "1", "--batch_tokens", "16", "--tokens", "16")
    older = next((run / "checkpoints").glob("*3"))
    assert main(["lens", str(older), "--prompt", "a", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["readers"].keys() == {"raw"}
    assert "fitted to other weights" in err
    assert main(["sample", "--checkpoint", str(older), "--reader", "tuned", "--exit_confidence", "0.5"]) == 3


def test_early_exit_as_json_table_and_plot(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    plot = tmp_path / "exit.svg"
    found = lens(capsys, finished_run, "--early_exit", "--tokens", "64", "--figure", str(plot))
    points = found["early_exit"]["raw"]
    assert [point["confidence"] for point in points] == list(CONFIDENCES)
    assert found["tokens"] == 64
    assert (points[-1]["agreement"], points[-1]["blocks"], points[-1]["compute"]) == (1, 1, 1)
    drawn = ElementTree.fromstring(plot.read_text())
    text = {element.text for element in drawn.iter() if element.text}
    assert {"0.5", "Full model", "loss, nats a token", "agreement with the full model"} <= text
    assert main(["lens", str(finished_run), "--early_exit", "--tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert "64 validation tokens" in out
    assert f"{points[-1]['loss']:.4f}" in out


class Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}


def test_a_page_is_whole_and_its_text_stays_text(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "lens.html"
    lens(capsys, finished_run, "--prompt", HOSTILE[:16], "--html", str(path))
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert not page.tags & {"script", "img", "iframe", "object", "form"}
    assert not [name for name in page.names if name.startswith("on") or name == "style"]
    assert "&lt;img src=x onerr" in source
    style = source.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in source
    assert source.count('<th scope="row">block 2</th>') == 1


def test_a_terminal_shows_a_table_without_control_sequences(finished_run: Path, capsys: Capture) -> None:
    assert main(["lens", str(finished_run), "--prompt", HOSTILE[-6:]]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "␛" in out
    assert "block 2" in out


def test_it_reads_hugging_face_folders(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    write_folder(model_of(finished_run)[0], tmp_path / "model", files_of("bytes", 16), {})
    found = lens(capsys, tmp_path / "model", "--prompt", "line")
    expected = lens(capsys, finished_run, "--prompt", "line")
    for theirs, ours in zip(*(x["readers"]["raw"]["positions"] for x in (found, expected)), strict=True):
        assert [b["top"][0]["token"] for b in theirs["blocks"]] == [b["top"][0]["token"] for b in ours["blocks"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected --prompt TEXT, --fit or --early_exit"),
        (["--prompt", "a", "--top", "0"], "--top: expected a whole number of at least 1, found '0'"),
        (["--fit", "--html", "x"], "--html shows a text"),
        (["--prompt", "a", "--figure", "x.svg"], "--figure draws early exit"),
        (["--promt", "a"], "did you mean '--prompt'"),
    ],
)
def test_usage(words: list[str], message: str, capsys: Capture) -> None:
    assert main(["lens", "nowhere", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_text_longer_than_the_model_reads_is_refused(finished_run: Path, capsys: Capture) -> None:
    assert main(["lens", str(finished_run), "--prompt", "a" * 17]) == 3
    assert "at most block_size 16 tokens at once, found 17" in capsys.readouterr().err


def test_colours_go_from_the_first_block_to_the_last_which_is_plain() -> None:
    shades = [colour(j, 12) for j in range(1, 13)]
    assert shades[-1] == PLAIN
    assert len(set(shades)) > 9
    assert colour(1, 1) == PLAIN
    assert colour(1, 2) != PLAIN


def test_a_page_that_cannot_be_written_leaves_one_object_for_a_program(finished_run: Path, capsys: Capture) -> None:
    words = ["lens", str(finished_run), "--prompt", "a", "--json", "--html", "nowhere/lens.html"]
    assert main(words) == 3
    assert json.loads(capsys.readouterr().out)["exit_code"] == 3


def block(number: int) -> dict[str, Any]:
    words = [" Shakespeare", "\x1b[2J", "日本"]
    top = [{"token": 1, "text": word, "probability": 0.5 / (1 + place)} for place, word in enumerate(words)]
    return {"top": top, "entropy": number + 0.25, "agrees": number == 12}


@pytest.fixture
def found() -> dict[str, Any]:
    """One position read by 12 blocks."""
    positions = [{"token": 1, "text": "a", "blocks": [block(number) for number in range(1, 13)]}]
    means = [{"confidence": 0.5, "entropy": 2.0, "agreement": 1.0}] * 12
    return {"readers": {"raw": {"positions": positions, "blocks": means}}}


@pytest.mark.parametrize(("columns", "tables"), [(80, 4), (300, 1)])
def test_every_block_is_shown_whatever_the_width(
    columns: int, tables: int, found: dict[str, Any], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    show(found)
    out = capsys.readouterr().out
    assert all(f"{number}.25 " in out for number in range(1, 13))
    assert out.count("┃ read ┃") == tables
    assert "…" not in out
    assert ("raw reading, blocks 1 to " in out) == (tables > 1)
    assert out.count("' Shakespeare' 50%") == 12


def test_as_many_tokens_as_were_asked_for(
    found: dict[str, Any], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    show(found)
    assert "25%" not in capsys.readouterr().out
    show(found, top=2)
    out = capsys.readouterr().out
    assert out.count("'␛[2J' 25%") == 12
    assert "17%" not in out


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
