"""`gptlab noise`: the shape of its JSON, its refusals, its page; and that logging noise changes no run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import Page

from gptlab.analysis.report.noise import write_figures
from gptlab.analysis.tables import noise_sentences
from gptlab.cli.main import main
from gptlab.runs.folder import RunFolder

Capture = pytest.CaptureFixture[str]
QUICK = ("--eval_tokens", "128", "--reader_tokens", "0", "--threads", "1", "--branch_steps", "0", "--groups", "32")


def measured(capsys: Capture, source: Path, *words: str) -> dict[str, Any]:
    assert main(["noise", str(source), "--json", *QUICK, *words]) == 0

    def never(name: str) -> None:
        raise AssertionError(f"JSON holds {name}")

    return json.loads(capsys.readouterr().out, parse_constant=never)


def test_json_has_every_signal_in_total_and_by_block(finished_run: Path, capsys: Capture, tmp_path: Path) -> None:
    names = "confidence,placebo:confidence,gated_confidence,true_loss"
    html = tmp_path / "noise.html"
    result = measured(capsys, finished_run, "--signals", names, "--reader_tokens", "4096", "--html", str(html))
    assert list(result["signals"]) == ["true_loss", "confidence", "placebo:confidence", "gated_confidence"]
    assert result["preconditioned"] is True
    assert result["sequences"] == [6 * 4, 6 * 4 + 32]  # what the run of 6 updates of 4 sequences would read next
    for signal in result["signals"].values():
        assert len(signal["blocks"]) == 2
        for one in (signal["total"], *signal["blocks"]):
            assert {"noise_scale", "alignment", "progress", "variance"} <= one.keys()
            assert one["alignment"].keys() == {"value", "interval", "resolved"}
    true, confidence, placebo, gated = (signal["total"] for signal in result["signals"].values())
    assert (true["progress"], true["variance"]) == (1.0, 1.0)
    assert true["alignment"]["value"] == pytest.approx(1.0)
    assert placebo["dose"] == pytest.approx(confidence["dose"])  # a placebo is as long as its signal
    assert (gated["dose"], gated["progress"], gated["alignment"]["value"]) == (0.0, 1.0, None)  # nobody is so sure yet
    # block 2 is taught by the true loss alone
    assert result["signals"]["confidence"]["blocks"][1]["alignment"]["value"] is None
    assert [b["tuned"]["loss"] < b["raw"]["loss"] for b in result["label_quality"]["blocks"]] == [True, True]
    page = Page(html.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert not [v for v in (*page.values("src"), *page.values("href")) if not v.startswith(("data:", "#"))]
    for word in ("placebo:confidence", "Precision against coverage", "Reliability", "tuned affine reader"):
        assert word in page.text, word
    assert "Alignment with the true loss" not in page.text  # of two blocks the judge teaches the embeddings alone


def test_groups_are_the_same_for_any_batch_size_and_the_seed_decides_them(finished_run: Path, capsys: Capture) -> None:
    def alignment(*words: str) -> Any:
        found = measured(capsys, finished_run, "--group", "2", *words)["signals"]
        assert list(found) == ["true_loss", "confidence"]  # the run's own
        return found["confidence"]["total"]["alignment"]["value"]

    found = alignment("--batch_size", "1")
    assert alignment("--batch_size", "2") == pytest.approx(found, rel=1e-3)
    assert alignment("--seed", "5") != pytest.approx(found, rel=1e-3)


def test_it_measures_until_the_interval_is_narrow_or_a_budget_ends(finished_run: Path, capsys: Capture) -> None:
    def found(*words: str) -> dict[str, Any]:
        return measured(capsys, finished_run, "--groups", "96", *words)

    fixed, wide = measured(capsys, finished_run), found("--narrow", "100")
    assert (wide.pop("stopped"), fixed.pop("stopped"))[0]["by"] == "interval"
    assert wide == fixed  # the first 32 groups are the same however many there might have been
    never = found("--narrow", "0", "--budget", "0")
    assert (never["groups"], never["sequences"], never["stopped"]["by"]) == (96, [24, 120], "groups")
    assert never["stopped"]["half_width"] < half_width(fixed)
    soon = found("--narrow", "0", "--budget", "0.001")
    assert (soon["groups"], soon["stopped"]["by"]) == (32, "budget")
    between = (half_width(fixed) + never["stopped"]["half_width"]) / 2
    enough = found("--narrow", str(between), "--budget", "0")
    assert enough["stopped"]["by"] == "interval"
    assert enough["groups"] in (64, 96)
    assert enough["stopped"]["half_width"] < between
    whole = measured(capsys, finished_run, "--groups", "4096", "--group", "4", "--narrow", "0", "--budget", "0")
    assert (whole["groups"], whole["stopped"]["by"]) == (62, "corpus")  # of 249 windows
    true = measured(capsys, finished_run, "--groups", "4096", "--signals", "none")
    assert (true["groups"], true["stopped"]["by"]) == (32, "nothing to narrow")


def half_width(result: dict[str, Any]) -> float:
    low, high = result["signals"]["confidence"]["total"]["alignment"]["interval"]
    return (high - low) / 2


def test_the_branch_test_stands_beside_a_signals_other_figures(
    finished_run: Path, capsys: Capture, tmp_path: Path
) -> None:
    html = tmp_path / "noise.html"
    words = ["noise", str(finished_run), *QUICK, "--branch_steps", "1", "--signals", "confidence", "--html", str(html)]
    paper = {"figure": tmp_path / "a.svg", "latex": tmp_path / "a.tex", "markdown": tmp_path / "a.md"}
    assert main([*words, "--json", *(f"--{option}={file}" for option, file in paper.items())]) == 0
    found = json.loads(capsys.readouterr().out)["signals"]
    assert "branch" not in found["true_loss"]
    branch = found["confidence"]["branch"]
    assert branch["steps"] == 1
    assert branch["differences"].keys() == {"1", "4", "16"}
    assert branch["verdict"] in ("bias", "noise", "bias and noise", "neither", "undecided")
    low, high = branch["bias"]["interval"]
    assert low <= branch["bias"]["value"] <= high
    drawn = (tmp_path / "a_confidence.svg").read_text(encoding="utf-8")
    assert f"confidence: {branch['verdict']}" in drawn
    assert not paper["figure"].exists()  # of two blocks the judge teaches the embeddings alone
    for option, title in (("latex", r"\caption{Why}"), ("markdown", "**Why**")):
        text = paper[option].read_text(encoding="utf-8")
        assert title in text
        assert branch["verdict"] in text
    page = Page(html.read_text(encoding="utf-8"))
    assert f"confidence: {branch['verdict']}" in page.text
    (told,) = [label for label in page.values("aria-label") if "at 1/M = 0" in label]
    assert f"{branch['bias']['value']:+.4f} nats at 1/M = 0" in told
    both = branch["bias"]["value"] + branch["noise"]["value"]
    assert f"{both:+.4f} at 1/M = 1" in told
    assert main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Bias or noise, by branches of 1 updates over 4 data seeds" in out
    assert " ".join(branch["reason"].split()[:4]) in out


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<svg"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_alignment_by_block_is_a_figure_of_its_own(ending: str, start: bytes, tmp_path: Path) -> None:
    def block(value: float | None, resolved: bool = True) -> dict[str, Any]:
        return {"alignment": {"value": value, "interval": [-0.5, 0.9], "resolved": resolved}}

    signals = {"true_loss": {}, "confidence": {"blocks": [block(0.4), block(0.1, False), block(None)]},
               "placebo:confidence": {"blocks": [block(0.01), block(None), block(None)]},
               "gated_confidence": {"blocks": [block(None)] * 3}}  # fmt: skip
    figure = tmp_path / f"a.{ending}"
    assert write_figures({"signals": signals, "n_layer": 3}, figure) == [figure]
    assert figure.read_bytes().startswith(start)
    if ending == "svg":
        text = figure.read_text(encoding="utf-8")
        assert ">confidence</text>" in text
        assert ">placebo:confidence</text>" in text
        assert "gated_confidence" not in text  # there is nothing of it to draw
        assert "cosine with the true loss" in text
    assert write_figures({"signals": {"true_loss": {}}, "n_layer": 3}, figure) == []


def test_a_run_logs_what_the_command_finds(finished_run: Path, capsys: Capture) -> None:
    rows = [row for row in RunFolder(finished_run).rows() if "noise_scale" in row]
    assert [row["step"] for row in rows] == [1, 4]  # before updates 0 and 3
    checkpoint = finished_run / "checkpoints" / "step_00000003"
    result = measured(capsys, checkpoint, "--dtype", "fp32")
    found = result["signals"]["confidence"]
    assert rows[1]["alignment"][0] == pytest.approx(found["total"]["alignment"]["value"], rel=0.02)
    assert rows[1]["alignment_by_block"][0][1] is None
    assert rows[1]["noise_scale"] == pytest.approx(result["signals"]["true_loss"]["total"]["noise_scale"], rel=0.02)


def test_logging_noise_changes_no_bit_of_a_run(tiny: Callable[..., list[str]], tmp_path: Path, capsys: Capture) -> None:
    digests = []
    for every in (0, 1):
        out = tmp_path / str(every)
        words = tiny(out, steps=3, noise_every=every, signal_name="confidence", checkpoint_every=3, eval_every=0)
        assert main(words) == 0
        capsys.readouterr()
        assert main(["digest", str(out), "--json"]) == 0
        digests.append(json.loads(capsys.readouterr().out))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--groups", "31"], "--groups must be at least 32, found 31"),
        (["--narrow", "-0.1"], "--narrow must be at least 0, found -0.1"),
        (["--budget", "-1"], "--budget must be at least 0, found -1.0"),
        (["--signals", "confidense"], "unknown signal 'confidense'; did you mean 'confidence'?"),
        (["--signals", "placebo:confidense"], "unknown signal 'confidense'; did you mean 'confidence'?"),
        (["--signals", "mine.py:f"], "add --allow_code"),
        (["--branch_steps", "-1"], "--branch_steps must be at least 0, found -1"),
        (["--html", "/nowhere/page.html"], "--html: expected a file in a folder that exists"),
        (["--latex", "/nowhere/a.tex"], "--latex: expected a file in a folder that exists"),
        (["--figure", "a.jpg"], "expected a file that ends in .pdf, .svg or .png"),
        (["--block_size", "64"], "the model reads at most 16 tokens, found 64"),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], message: str, finished_run: Path, capsys: Capture) -> None:
    assert main(["noise", str(finished_run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_hugging_face_folder_is_measured_on_data_that_is_named(
    finished_run: Path, tiny_corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "model"
    assert main(["export", str(finished_run), str(folder)]) == 0
    capsys.readouterr()
    assert main(["noise", str(folder)]) == 2
    assert "--data: expected a corpus" in capsys.readouterr().err
    result = measured(capsys, folder, "--data", str(tiny_corpus), "--signals", "none")
    assert list(result["signals"]) == ["true_loss"]
    assert result["preconditioned"] is False
    assert result["signals"]["true_loss"]["total"]["preconditioned_alignment"] is None
    assert main(["noise", str(folder), *QUICK, "--data", str(tiny_corpus), "--signals", "confidence"]) == 0
    out = capsys.readouterr().out
    assert "no second moments here" in out
    assert "Alignment by block" not in out  # of two blocks the only judge reads below both


HALF = "; it {} nevertheless: at dose 1.00 a step of the same length makes 81% of the progress in the true loss."


@pytest.mark.parametrize(
    ("interval", "bias", "words"),
    [
        ([0.2, 0.4], None, "it pulls with the true loss (alignment +0.30 [+0.20, +0.40])" + HALF.format("may harm")),
        ([-0.4, -0.2], None, "it pulls against the true loss (alignment -0.30 [-0.40, -0.20])."),
        ([-0.1, 0.7], None, "which way it pulls cannot be said (alignment +0.30 [-0.10, +0.70])."),
        ([-0.02, 0.04], None, "it hardly pulls either way (alignment +0.01 [-0.02, +0.04])."),
        ([0.2, 0.4], [0.01, 0.03], "; the branch test: bias" + HALF.format("harms")),
        ([0.2, 0.4], [-0.03, -0.01], "; the branch test: bias."),
        ([-0.4, -0.2], [0.01, 0.03], "; the branch test: bias."),
    ],
)
def test_the_first_sentence_answers(interval: list[float], bias: list[float] | None, words: str) -> None:
    one = {"total": {"alignment": {"value": sum(interval) / 2, "interval": interval, "resolved": True}, "dose": 1.0}}
    branch = {"branch": {"verdict": "bias", "bias": {"value": 0.02, "interval": bias}}} if bias else {}
    stopped = {"by": "interval", "half_width": 0.03, "narrow": 0.05, "budget": 60.0}
    result = {"signals": {"true_loss": {}, "idea": {**one, **branch}}, "groups": 48, "group": 2, "stopped": stopped}
    answer, measured = noise_sentences(result)
    assert answer.startswith("idea: ")
    assert answer.endswith(words)
    assert measured == "Measured 96 sequences: the interval is narrower than ±0.05."
