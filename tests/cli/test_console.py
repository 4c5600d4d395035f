"""The terminal as an observer: whatever becomes of it, work ends as it would have; and what is shown there is whole."""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptlab.analysis.tables import Table
from gptlab.cli import console
from gptlab.cli.console import Counter, Part, fitted, show_table
from gptlab.cli.main import COMMANDS, guarded, main
from gptlab.cli.progress import Display
from gptlab.errors import Stopped
from gptlab.runs import checkpoint
from gptlab.runs.folder import RunFolder, newest
from gptlab.signals.config import SignalConfig
from gptlab.training.config import TrainingConfig
from gptlab.training.loop import Record

Capture = pytest.CaptureFixture[str]
Words = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]
WITH_REPORTS = True
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


class Failing(io.StringIO):
    """A stream that raises in one of its methods, from a given call on, for as long as it is asked."""

    def __init__(self, error: BaseException, method: str = "write", after: int = 0) -> None:
        super().__init__()
        self._error, self._method, self._left = error, method, after

    def _use(self, method: str) -> None:
        if method == self._method:
            self._left -= 1
            if self._left < 0:
                raise self._error

    def write(self, text: str) -> int:
        self._use("write")
        return super().write(text)

    def flush(self) -> None:
        self._use("flush")


FAILURES = {
    "no reader": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "terminal gone": OSError(errno.EIO, "Input/output error"),
    "bad descriptor": OSError(errno.EBADF, "Bad file descriptor"),
    "closed": ValueError("I/O operation on closed file."),
    "would block": BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
}


@pytest.mark.parametrize("method", ["write", "flush"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_stream_that_fails_changes_no_end(failure: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def command(words: list[str]) -> int:
        for name, stream in (("err", sys.stderr), ("out", sys.stdout)):
            print("something", file=stream, flush=True)
            made.append(name)
        if words:
            raise Stopped("stopped with a checkpoint saved")
        return 0

    for argv, code in (([], 0), (["--json"], 75)):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, Failing(FAILURES[failure], method))
        assert guarded(command, argv) == code
    assert made == ["err", "out"] * 2


@pytest.mark.parametrize("failure", FAILURES)
def test_a_result_that_could_not_be_printed_is_said(
    failure: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that only prints: its reader may leave, but a full disk has lost the result."""
    made: list[str] = []

    def command(words: list[str]) -> int:
        print("the result", flush=True)
        made.append("all of it")
        return 0

    monkeypatch.setattr(sys, "stdout", Failing(FAILURES[failure]))
    lost = failure not in ("no reader", "would block")
    assert guarded(command, [], in_files=False) == (3 if lost else 0)
    assert ("standard output could not be written" in capsys.readouterr().err) == lost
    assert made == ["all of it"] * (failure != "no reader")


def without_clocks(run: Path) -> list[dict[str, Any]]:
    clocks = {"tokens_per_second", "mfu", "seconds"}
    return [{key: value for key, value in row.items() if key not in clocks} for row in RunFolder(run).rows()]


@pytest.mark.parametrize("fails", [*FAILURES, "rich"])
def test_a_display_that_fails_leaves_the_run_as_it_is(
    fails: str, finished_run: Path, tiny: Words, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = tiny(run, signal_name="confidence", sample_every=3, checkpoint_every=3, noise_every=3)
    if fails == "rich":
        raised = iter([None, None])  # the display has begun, and fails later

        def print_(*_: object, **__: object) -> None:
            if next(raised, ...) is ...:
                raise ZeroDivisionError("a fault of rich")

        monkeypatch.setattr(Console, "print", print_)
    else:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, Failing(FAILURES[fails], after=3))
    assert main(words) == 0
    assert without_clocks(run) == without_clocks(finished_run)
    assert (run / "log.txt").read_text() == (finished_run / "log.txt").read_text()
    assert checkpoint.digest(newest(run)) == checkpoint.digest(newest(finished_run))
    assert (run / "report.html").is_file()
    if fails == "rich":
        assert capsys.readouterr().err.count("nothing more is shown here (ZeroDivisionError") == 1


@pytest.mark.parametrize("redirected", ["2>&1 | head -2", *map(slow, (">/dev/full 2>&1", ">&- 2>&-", "2>&1 | true"))])
def test_a_run_is_whole_whatever_becomes_of_its_streams(redirected: str, tiny: Words, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = f'"$@" {redirected}; exit ${{PIPESTATUS[0]}}'
    words = tiny(run, steps=30, eval_every=10, checkpoint_every=10)[1:]
    done = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "train_gpt2.py", *words],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert newest(run).name == "step_00000030"
    lines = (run / "log.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\d+ (train|val) [\d.]+", line) for line in lines), "what was meant for the display"
    assert main(["verify", str(run)]) == 0


IN_THIS_ENCODING = r"""
import contextlib, sys
from gptlab.cli.main import COMMANDS, main
runs, checkpoint = sys.argv[1:]
for words in (
    *([name, "--help"] for name in COMMANDS), ["--help"], ["data", "prepare", "--help"], ["data", "info", "--help"],
    ["runs", runs], ["compare", checkpoint], ["tr\u00edan"], ["train", "--steps", "\u03c4"], ["verify", checkpoint],
    ["sample", "--checkpoint", checkpoint, "--prompt", "\u00e9", "--max_new_tokens", "9", "--show_blocks"],
    ["sample", "--checkpoint", checkpoint, "--prompt", "\u4e2d", "--max_new_tokens", "9", "--exit_confidence", "0.5"],
    ["lens", checkpoint, "--text", "na\u00efve \u2423"], ["doctor"], ["digest", "/no/such/f\udcffolder"],
):
    with contextlib.suppress(SystemExit):
        main(words)
    print("done", words[0].encode("ascii", "replace").decode(), flush=True)
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        slow({"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}),
        slow({"PYTHONIOENCODING": "ascii"}),
        slow({"PYTHONIOENCODING": "cp437:strict"}),
    ],
    ids=str,
)
def test_no_command_ends_because_of_the_locale(variables: dict[str, str], finished_run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_THIS_ENCODING, str(finished_run.parent), str(finished_run)],
        check=False, capture_output=True, env=os.environ | {"COLUMNS": "100"} | variables,
    )  # fmt: skip
    err = done.stderr.decode("latin-1")
    assert done.returncode == 0, err
    assert not re.search("UnicodeEncodeError|Traceback", err), err
    out = done.stdout.decode("latin-1")
    assert out.count("done ") == len(COMMANDS) + 13
    assert r"\u03c4 of the signals that have one" in out or "τ" in done.stdout.decode("cp437")


HEADER = tuple(f"name of column {n}" for n in range(8))
ROW = tuple(f"{n} is what this cell says, in so many words" for n in range(8))


def table_lines(terminal: bool, width: int) -> list[str]:
    out = io.StringIO()
    show_table(
        Console(file=out, force_terminal=terminal, width=width, color_system=None), Table("a title", HEADER, [ROW])
    )
    return out.getvalue().splitlines()


def test_in_a_pipe_a_row_of_a_table_is_a_line() -> None:
    assert any(all(cell in line for cell in ROW) for line in table_lines(terminal=False, width=80))


@pytest.mark.parametrize("width", [60, 120])
def test_on_a_terminal_cells_fold_and_none_is_cut(width: int) -> None:
    found = "".join(table_lines(terminal=True, width=width))
    expected = "".join((*HEADER, *ROW)).replace(" ", "")
    assert {c: found.count(c) for c in expected} == {c: expected.count(c) + "a title".count(c) for c in expected}


NAMES = ("self_distillation-placebo", "information_gain-annealed")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_on_a_terminal_no_name_or_number_is_broken_and_an_empty_column_is_left_out(width: int) -> None:
    rows = [(name, "-1.0171 (-1.1260 to -0.9083)", "–", "+0.0121 (-0.0015 to +0.0257)") for name in NAMES]
    out = io.StringIO()
    header = ("arm", "against its placebo", "at equal FLOPs", "at each one's best temperature")
    table = Table("At equal cost", header, rows)
    show_table(Console(file=out, force_terminal=True, width=width, color_system=None), table)
    found = out.getvalue()
    assert max(map(len, found.splitlines())) <= width
    for word in (*NAMES, "-1.0171", "-1.1260", "-0.9083", "+0.0121", "temperature"):
        assert word in found
    assert "FLOPs" not in found


TRAIN = {"loss": 4.5678, "signal_loss": -0.4321, "dose": 0.45, "tokens_per_second": 123_456.7, "mfu": 0.31}
VAL = {
    "loss": 4.1234, "block_loss": [4.9, 4.5, 4.3, 4.1], "block_confidence": [0.1, 0.2, 0.3, 0.4], "accuracy": 0.2345,
    "bits_per_byte": 2.345,
}  # fmt: skip


def live_lines(width: int, encoding: str = "utf-8") -> list[str]:
    """Every line as it was drawn in place, of a run whose records are all that can follow an update."""
    seconds = iter(range(10_000))
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="")
    shown_on = Console(file=file, force_terminal=True, width=width, color_system=None)
    signal = SignalConfig("confidence")
    config = TrainingConfig(steps=19_073, eval_every=2, checkpoint_every=2, sample_every=0, signal=signal)
    display = Display(config, console=shown_on, clock=lambda: float(next(seconds)))
    display.start_line()
    for record in (Record("train", 18_001, TRAIN), Record("train", 18_002, TRAIN), Record("val", 18_002, VAL)):
        display.show(record)
    display.stage("writing the report")
    display.close()
    file.flush()
    assert not display.dropped
    return re.split(r"[\r\n]|\x1b\[[\d;?]*[a-zA-Z]", raw.getvalue().decode(encoding))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 300])
def test_step_and_time_left_are_whole_at_every_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REDRAW_EVERY", 0.0)
    lines = [line.rstrip() for line in live_lines(width)]
    assert all(len(line) <= width for line in lines), lines
    drawn = [line for line in lines if line.startswith("step ")]
    assert re.fullmatch(r"step 18,001/19,073  (.*  )?\d+:\d\d left", drawn[1]), drawn
    ends = dict.fromkeys(line.rpartition("  ")[2] for line in drawn[2:])
    assert list(ends) == ["validating", "saving", "writing the report"]
    shown = {40: "step", 60: "loss 4.568", 80: "━", 100: "tokens/s", 140: "MFU 31%", 300: "dose 0.45"}[width]
    assert shown in drawn[1]
    for figure in ("18002 val   loss 4.1234", "2.345 bits/byte", "accuracy 23.4%", "loss 4.90 4.50 4.30 4.10",
                   "p_max 0.10 0.20 0.30 0.40"):  # fmt: skip
        assert any(figure in line for line in lines), "a figure is broken over two lines"
    below = [line for line in lines if "p_max" in line and "val" not in line]
    assert all(line.startswith(" " * len(" 18002 val   ")) for line in below), "it stands under the step"


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_same_figures_are_shown_whatever_is_under_way(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REDRAW_EVERY", 0.0)
    drawn = [line.rstrip() for line in live_lines(width) if line.startswith("step 18,002")]
    shown = {line.removesuffix(stage).rstrip() for line in drawn for stage in ("validating", "saving") if stage in line}
    assert len(shown) == 1, shown


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_opening_and_a_sample_are_whole_at_every_width(width: int) -> None:
    out = io.StringIO()
    display = Display(TrainingConfig(), console=Console(file=out, force_terminal=True, width=width, color_system=None))
    reason = "a model 32 wide is too small to gain from this processor's bf16 (AVX-512)"
    display._print("  dtype   ", f"fp32 ({reason})".split(" "), " ")
    sample = {"prompt": "KING", "text": " and more of it\n" * 3, "written": ["x"], "blocks": [[["x", 0.5]] * 12]}
    display.show(Record("sample", 1, sample))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(line.strip("│╭╮╰╯─ ") for line in lines)
    assert reason in " ".join(words.split())
    assert "each block's best next token and its probability:" in " ".join(words.split())
    assert lines[0].startswith("  dtype   fp32 (")
    assert all(line.startswith(" " * 10) for line in lines[1:] if "AVX-512" in line)


def test_the_live_line_is_drawn_in_any_encoding() -> None:
    assert any("###" in line for line in live_lines(100, "ascii"))


def test_the_order_of_parts_is_kept_whatever_fits() -> None:
    parts = [Part("a"), Part("b" * 9, 3), Part("c" * 5, 1), Part("d" * 5, 2), Part("e")]
    assert [fitted(parts, width) for width in (3, 11, 18, 99)] == [
        "a  e", "a  ccccc  e", "a  ccccc  ddddd  e", "a  bbbbbbbbb  ccccc  ddddd  e",
    ]  # fmt: skip


def test_a_counter_is_a_line_now_and_then_and_never_raises(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with Counter() as counter:
        counter.count("rows", 3, 10)
        counter.count("rows", 4, 10, "accuracy 0.5")
        counter.count("rows", 10, 10, "accuracy 0.6")
        monkeypatch.setattr(console, "duration", None)
        counter.count("rows", 10, 10)
        counter.count("rows", 10, 10)
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "rows 3/10"
    assert re.fullmatch(r"rows 10/10  accuracy 0\.6  \d:\d\d left", err[1])
    assert err[2].startswith("nothing more is shown here (TypeError")
    assert len(err) == 3
