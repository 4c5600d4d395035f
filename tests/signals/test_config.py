"""When a signal speaks, how loudly, by which judges; and a signal from a user's own file."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.cli.main import main
from gptlab.errors import ConfigError
from gptlab.model import GPT, GPTConfig
from gptlab.runs.folder import RunFolder
from gptlab.signals import SignalConfig
from gptlab.signals.registry import file_hash, user_signal
from gptlab.training import TrainingConfig, backward


def confidence(**options: Any) -> SignalConfig:
    return SignalConfig(name="confidence", **options)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0.25] * 6),
        ({"weight": 0.5}, [0.5] * 6),
        ({"weight": 0.0}, [0.0] * 6),
        ({"start": 2}, [0, 0, 0.25, 0.25, 0.25, 0.25]),
        ({"weight": 1.0, "anneal": 4}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"weight": 1.0, "start": 1, "anneal": 2}, [0, 1, 0.5, 0, 0, 0]),
        ({"weight": 1.0, "start": 1, "anneal": 0}, [0, 1, 0, 0, 0, 0]),
    ],
)
def test_the_weight_of_every_step(options: dict[str, Any], weights: list[float]) -> None:
    assert [confidence(**options).weight_at(step, n_layer=4) for step in range(6)] == pytest.approx(weights)


def test_without_a_signal_there_is_no_weight() -> None:
    assert SignalConfig(weight=3.0).weight_at(0, n_layer=4) == 0.0


def test_judges_are_all_blocks_but_the_last_or_those_listed() -> None:
    assert confidence().judges_at(0, 4, seed=1) == ((1, 2, 3), 1)
    assert confidence(layers=(3, 1)).judges_at(0, 4, seed=1) == ((3, 1), 1)
    assert confidence(layers=[2]).layers == (2,)
    assert confidence(layers="rotate").judges_at(0, 2, seed=1) == ((1,), 1)


def test_rotate_draws_each_judge_equally_often_and_counts_it_for_all() -> None:
    drawn: Counter[int] = Counter()
    for step in range(3000):
        judges, factor = confidence(layers="rotate").judges_at(step, 4, seed=1)
        assert (len(judges), factor) == (1, 3)
        drawn.update(judges)
    assert set(drawn) == {1, 2, 3}
    assert all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in drawn.values()), drawn


def test_rotate_is_keyed_by_seed_and_step() -> None:
    def draws(seed: int) -> list[tuple[int, ...]]:
        return [confidence(layers="rotate").judges_at(step, 9, seed)[0] for step in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "confidense"}, "unknown signal 'confidense'; did you mean 'confidence'"),
        ({"layers": "some"}, "all, rotate or a list such as 1,3, found 'some'"),
        ({"positions": 0.0}, "signal.positions must lie above 0 and at most 1, found 0.0"),
        ({"positions": 1.5}, "signal.positions .* found 1.5"),
        ({"threshold": 0.0}, "signal.threshold .* found 0.0"),
        ({"start": -1}, "signal.start must be at least 0, found -1"),
        ({"anneal": -1}, "signal.anneal must be at least 0, found -1"),
        ({"dose": -0.1}, "signal.dose must be at least 0, found -0.1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SignalConfig(**options)


@pytest.mark.parametrize("judge", [0, 4, -1])
def test_only_blocks_that_judge_another_below_the_last_can_be_listed(judge: int) -> None:
    with pytest.raises(ConfigError, match=rf"judges 1 to 3 of this model, found {judge}"):
        confidence(layers=(1, judge)).judges_at(0, 4, seed=1)


def test_a_judge_listed_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="once, found 2,2"):
        confidence(layers=(2, 2)).judges_at(0, 4, seed=1)


def test_no_judges_and_a_dose_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="found an empty list"):
        confidence(layers=())
    with pytest.raises(ConfigError, match=r"signal\.weight 0 takes the signal out, signal\.dose 0\.3"):
        confidence(weight=0.0, dose=0.3)


Capture = pytest.CaptureFixture[str]
Words = Callable[..., list[str]]

MARGIN = '''
def margin(logits, targets):
    """z_1 - z_2, how far the first stands before the second."""
    first, second = logits.topk(2, 1).values.unbind(1)
    return second - first
'''
TOLD = MARGIN + "margin.uses_truth = False\nmargin.formula = 'z_2 - z_1'\n"
NEEDY = """
def follow(logits, targets, *, other, threshold):
    return (logits - other).square().mean(1).where(logits.softmax(1).amax(1) >= threshold, 0.0)

follow.needs = "final"
follow.has_threshold = True
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(content, "margin")` is the name of that signal in a file of that content."""

    def name(content: str, function: str = "margin") -> str:
        path = tmp_path / "idea.py"
        path.write_text(content)
        return f"{path}:{function}"

    return name


def gradients(name: str, **options: Any) -> dict[str, torch.Tensor]:
    model = GPT(GPTConfig(block_size=4, vocab_size=9, n_layer=3, n_head=1, n_embd=8)).double()
    tokens = torch.arange(8).view(2, 4)
    backward(model, tokens, tokens + 1, SignalConfig(name, weight=10.0, **options))
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def test_a_signal_says_what_it_is_and_needs(write: Callable[..., str]) -> None:
    plain = user_signal(write(MARGIN))
    assert (plain.formula, plain.needs, plain.uses_truth, plain.has_threshold) == (
        "z_1 - z_2, how far the first stands before the second.", None, True, False
    )  # fmt: skip
    assert (user_signal(write(TOLD)).formula, user_signal(write(TOLD)).uses_truth) == ("z_2 - z_1", False)
    needy = user_signal(write(NEEDY, "follow"))
    assert (needy.needs, needy.has_threshold) == ("final", True)
    assert needy.formula.endswith("idea.py:follow"), "without a docstring its name stands for the formula"


def test_it_trains_as_one_of_the_table_does(write: Callable[..., str]) -> None:
    """A user's copy of a signal of the table gives the same gradient, with every option."""
    copies = {
        "entropy": "def f(z, y):\n    return -(z.softmax(1) * z.log_softmax(1)).sum(1)\n",
        "self_distillation": "def f(z, y, *, other):\n    p = other.softmax(1)\n"
        "    return (p * (p.log() - z.log_softmax(1))).sum(1)\nf.needs = 'final'\n",
        "pseudo_label": "def f(z, y, *, threshold):\n    p = z.softmax(1).amax(1)\n"
        "    return -p.log() * (p.detach() >= threshold)\nf.has_threshold = True\n",
    }
    plain = gradients("entropy", start=5)
    for name, content in copies.items():
        for options in ({}, {"positions": 0.5, "evaluator": "live"}, {"control": "placebo"}):
            theirs = gradients(name, threshold=0.01, **options)
            mine = gradients(write(content, "f"), threshold=0.01, **options)
            for key, expected in theirs.items():
                torch.testing.assert_close(mine[key], expected, rtol=1e-9, atol=1e-12)
            assert any(not torch.equal(mine[key], plain[key]) for key in plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("margin = 3", r"idea\.py has no function 'margin'"),
        ("def margn(z, y): ...", "has no function 'margin'; did you mean 'margn'"),
        ("import nothing_of_that_name", "does not run: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def margin(z, y: return z", "does not run: SyntaxError"),
        (MARGIN + "margin.needs = 'first'", "needs must be previous, next or final, found 'first'"),
    ],
)
def test_a_file_that_cannot_be_a_signal_is_refused(write: Callable[..., str], content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        user_signal(write(content))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a Python file at nowhere/idea\.py, found none"):
        user_signal("nowhere/idea.py:margin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "def margin(z, y):\n    return z.max(1).values.mean()",
            r"expected one value a token, .*\(8,\), found shape \(\)",
        ),
        ("def margin(z, y):\n    return z", r"found shape \(8, 9\)"),
        ("def margin(z, y):\n    return 0.0", "found a float"),
        ("def margin(z, y):\n    return z[99]", "failed: IndexError"),
        ("def margin(z):\n    return z.sum(1)", "failed: TypeError: margin.. takes 1 positional argument but 2"),
        (MARGIN + "margin.needs = 'final'", "failed: TypeError: margin.. got an unexpected keyword argument 'other'"),
    ],
)
def test_a_function_that_does_not_work_is_told_in_a_line(write: Callable[..., str], content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        gradients(write(content))
    assert "\n" not in str(refused.value)


def test_a_file_that_changes_counts_for_the_next_run_only(write: Callable[..., str]) -> None:
    """A config keeps the function it first looked up; a new one takes the file as it stands, and its hash with it."""
    name = write("def margin(z, y):\n    return z.sum(1)\n")
    running, before = SignalConfig(name), file_hash(name)
    z, y = torch.ones(2, 5), torch.zeros(2, dtype=torch.long)
    assert running.signal(z, y).tolist() == [5.0, 5.0]
    write("def margin(z, y):\n    return -z.sum(1)\n")
    assert running.signal(z, y).tolist() == [5.0, 5.0]
    assert SignalConfig(name).signal(z, y).tolist() == [-5.0, -5.0]
    assert before[:12] in running.signal.source
    assert file_hash(name)[:12] in SignalConfig(name).signal.source


def test_a_run_with_it_needs_allow_code(
    write: Callable[..., str], tiny: Words, tmp_path: Path, capsys: Capture
) -> None:
    name, out = write("raise SystemExit('this ran')\n"), tmp_path / "run"
    assert main(tiny(out, signal_name=name)) == 2
    assert f"signal.name {name} is a function in a file: it runs as your code; add --allow_code" in (
        capsys.readouterr().err
    )
    file = tmp_path / "run.toml"
    file.write_text(f'[[signal]]\nname = "confidence"\n[[signal]]\nname = "{name}"\n')
    assert main([*tiny(out), "--config", str(file)]) == 2
    assert "add --allow_code" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_goes_on_with_the_same_file_and_is_refused_with_a_changed_one(
    write: Callable[..., str], tiny: Words, tmp_path: Path, capsys: Capture
) -> None:
    name, out = write(TOLD), tmp_path / "run"
    words = [*tiny(out, signal_name=name, steps=2, checkpoint_every=2), "--allow_code"]
    assert main(words) == 0
    assert "block loss" in capsys.readouterr().err
    rows = list(RunFolder(out).rows())
    assert [row["dose"] > 0 for row in rows if row["kind"] == "train" and "dose" in row] == [True]
    longer = [*tiny(out, signal_name=name, steps=4, checkpoint_every=2), "--allow_code"]
    assert main(longer) == 0
    assert [row["step"] for row in RunFolder(out).rows() if row["kind"] == "train"] == [1, 2, 3, 4]
    write(TOLD + "# a comment\n")
    capsys.readouterr()
    assert main(longer) == 3
    err = capsys.readouterr().err
    assert "holds another run; use --resume never for a new folder" in err
    assert "a signal's file has changed since the run began" in err


def test_the_folder_of_a_run_is_named_after_file_and_function() -> None:
    config = TrainingConfig(signal=SignalConfig("/some/where/idea.py:margin"))
    assert config.folder == "log/shakespeare-tiny-idea-margin-1"


def test_a_finished_run_is_read_without_its_signals_file(
    write: Callable[..., str], tiny: Words, tmp_path: Path, capsys: Capture
) -> None:
    """Sampling and comparing must not run anybody's code."""
    out = tmp_path / "run"
    assert main([*tiny(out, signal_name=write(MARGIN), steps=1, checkpoint_every=1), "--allow_code"]) == 0
    (tmp_path / "idea.py").unlink()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    capsys.readouterr()
    sample = ["sample", "--checkpoint", str(out), "--prompt", "line", "--max_new_tokens", "2", "--temperature", "0"]
    assert main(sample) == 0, capsys.readouterr().err
    assert re.search("line", capsys.readouterr().out)
