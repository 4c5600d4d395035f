"""Ideas for a preset of gptlab: an arm's TOML, a diff of the package, and the night of known ideas."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from scripts import load_script
from tiny_experiment import OPTIONS, make_corpus

from gptlab.cli.main import main
from gptlab.errors import ConfigError, UsageError
from gptlab.judge.evidence import at_equal_flops
from gptlab.judge.lab import FIRST_FRESH, Lab, read_lab
from gptlab.judge.procedure import Judge, idea_digest, idea_files
from gptlab.judge.trial import baseline_of
from gptlab.options import build
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import preset_options

LAB = """\
[baseline]
preset = "shakespeare-tiny-v1"
[plan]
looks = [2]
confirm = [2, 3]
jobs = 2
[paths]
allow = ["gptlab/**"]
deny = ["gptlab/training/evaluate.py"]
[options]
"""


def new_file(name: str) -> str:
    return f"diff --git a/{name} b/{name}\nnew file mode 100644\n--- /dev/null\n+++ b/{name}\n@@ -0,0 +1 @@\n+x = 1\n"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    make_corpus(tmp_path / "corpus")
    options = {**OPTIONS, "data": str(tmp_path / "corpus"), "learning_rate": 1e-4}
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    (tmp_path / "lab.toml").write_text(LAB + "\n".join(lines) + "\n")
    return read_lab(tmp_path)


def test_an_arm_adds_its_options_and_its_patch(lab: Lab) -> None:
    (lab.folder / "arm.toml").write_text('signal.name = "confidence"\npatch = "new.diff"\n')
    (lab.folder / "new.diff").write_text(new_file("gptlab/training/new.py"))
    before = baseline_of(lab)
    after = before.changed_by(lab.folder / "arm.toml", lab)
    assert after.options == {**before.options, "signal.name": "confidence"}
    assert after.files.keys() - before.files.keys() == {"gptlab/training/new.py"}
    assert after.lines == (1, 0)
    assert after.digest != before.digest
    first = idea_digest(lab.folder / "arm.toml")
    (lab.folder / "new.diff").write_text(new_file("gptlab/training/newer.py"))
    assert idea_digest(lab.folder / "arm.toml") != first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat = 1.0", "did you mean 'learning_rate'"),
        ('patch = "../x.diff"', "a file next to it"),
        ('patch = "none.diff"', "expected an idea"),
        ("learning_rate = [", "not a TOML file"),
    ],
)
def test_an_arm_that_is_none_is_refused(text: str, expected: str, lab: Lab) -> None:
    (lab.folder / "arm.toml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        baseline_of(lab).changed_by(lab.folder / "arm.toml", lab)


@pytest.mark.parametrize(
    "name", ["gptlab/training/evaluate.py", "gptlab/x.sh", "gptlab/x y.py", "other.py", "gptlab/judge/x.json"]
)
def test_a_diff_of_a_package_changes_allowed_python_files_alone(name: str, lab: Lab) -> None:
    text = new_file(name) if "evaluate" not in name else new_file(name).replace("new file mode 100644\n", "")
    (lab.folder / "idea.diff").write_text(text)
    with pytest.raises(ConfigError, match=r"idea\.diff"):
        baseline_of(lab).changed_by(lab.folder / "idea.diff", lab)


SIGNAL = "def mine(logits, targets):\n    return logits.logsumexp(-1)\n"


def test_an_arm_may_bring_a_signal_of_its_own_where_that_is_allowed(lab: Lab) -> None:
    (lab.folder / "arm.toml").write_text('signal.name = "mine.py:mine"\nsignal.weight = 0.01\n')
    (lab.folder / "mine.py").write_text(SIGNAL)
    with pytest.raises(UsageError, match=r"mine\.py holds a signal.*--allow_code"):
        Judge(lab).judge(lab.folder / "arm.toml")
    assert not (lab.folder / "ledger.jsonl").exists()
    before, first = baseline_of(lab).changed_by(lab.folder / "arm.toml", lab), idea_digest(lab.folder / "arm.toml")
    kept, _, function = before.options["signal.name"].rpartition(":")
    assert (Path(kept).read_text(), function) == (SIGNAL, "mine")
    (lab.folder / "mine.py").write_text(SIGNAL.replace("-1", "1"))
    after = baseline_of(lab).changed_by(lab.folder / "arm.toml", lab)
    assert after.digest != before.digest  # by its content, not by its name
    assert idea_digest(lab.folder / "arm.toml") != first
    assert Path(kept).read_text() == SIGNAL  # what was tried stays
    assert [file.name for file in idea_files(lab.folder / "arm.toml")] == ["arm.toml", "mine.py"]


@pytest.mark.parametrize("name", ["../mine.py:mine", "/tmp/mine.py:mine", "none.py:mine"])
def test_a_signal_of_ones_own_lies_next_to_its_arm(name: str, lab: Lab) -> None:
    (lab.folder / "arm.toml").write_text(f'signal.name = "{name}"\n')
    with pytest.raises(ConfigError, match=r"next to it|expected an idea"):
        baseline_of(lab).changed_by(lab.folder / "arm.toml", lab)


FLAT = {0: 4.0, 50: 3.2, 60: 3.1, 90: 2.8, 100: 2.5}


@pytest.mark.parametrize(
    ("costs", "idea", "difference", "read", "step"),
    [
        ([1.0, 1.0], {100: 2.4}, -0.1, "baseline", 100),  # as dear: the difference of the ends
        ([2.0, 2.2], {100: 2.7}, 0.0, "baseline", 100 / 1.1),  # cheaper: the baseline between 90 and 100
        ([1.0, 0.55], FLAT, 0.65, "idea", 55),  # dearer: the idea between 50 and 60
    ],
)
def test_at_equal_flops_the_dearer_is_read_where_it_had_cost_as_much(
    costs: list[float], idea: dict[int, float], difference: float, read: str, step: float
) -> None:
    shifts = (0.0, 0.01)
    found, why = at_equal_flops(costs, *([{s: x + by for s, x in of.items()} for by in shifts] for of in (idea, FLAT)))
    assert found is not None
    assert (found["read"], why) == (read, "")
    assert found["step"] == pytest.approx(step)
    if step == 100 / 1.1:
        difference = 2.7 - (2.8 - 0.3 * (step - 90) / 10)
    assert found["difference"] == pytest.approx(difference)


@pytest.mark.parametrize("costs", [[1.0, 0.3], [0.7, 1.0]])
def test_at_equal_flops_nothing_is_said_far_from_a_validation(costs: list[float]) -> None:
    found, why = at_equal_flops(costs, [FLAT] * 2, [FLAT] * 2)
    assert found is None
    assert "lower eval_every" in why


def test_fresh_seeds_have_a_second_slice_that_nothing_else_reads(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    judge = Judge(lab)
    (outcome,) = judge.run([(judge.baseline, FIRST_FRESH)])
    assert outcome.state == "ok", outcome.reason
    folder = judge.trials.folder(judge.baseline, FIRST_FRESH)
    found = []
    for tokens in (OPTIONS["eval_tokens"], 2 * OPTIONS["eval_tokens"]):
        assert main(["eval", str(folder), "--json", "--eval_tokens", str(tokens), "--threads", "1"]) == 0
        found.append(json.loads(capsys.readouterr().out)["tasks"]["val"])
    whole = [one["loss"] * one["tokens"] for one in found]
    behind = (whole[1] - whole[0]) / (found[1]["tokens"] - found[0]["tokens"])
    assert outcome.second == pytest.approx(behind, abs=1e-6)
    assert outcome.second != pytest.approx(found[0]["loss"], abs=1e-4)
    assert main(["eval", str(folder), "--json", "--skip_tokens", "1000"]) == 3
    assert "--skip_tokens: expected fewer" in capsys.readouterr().out


@pytest.mark.slow
def test_an_arm_with_a_better_learning_rate_is_kept_and_its_cells_are_runs(lab: Lab) -> None:
    (lab.folder / "arm.toml").write_text("learning_rate = 1e-2\n")
    line = Judge(lab).judge(lab.folder / "arm.toml")
    assert line["verdict"] in ("keep", "undecided")  # two or three seeds decide at 0.0045 only what is very clear
    assert line["difference"] < 0
    assert line["flops"][0] == line["flops"][1] > 0
    assert line["equal_flops"]["difference"] == pytest.approx(line["difference"])
    assert line["second"] is not None
    assert line["second"] != line["difference"]
    assert len(list(lab.folder.glob("cells/*/seed_*/metrics.jsonl"))) == 2 * line["n"] + 4


night = load_script("benchmarks/judge_night.py")


def test_every_idea_applies_and_changes_what_it_says(tmp_path: Path) -> None:
    night.write_lab(tmp_path, {"steps": 40}, [2], [2, 3])
    lab, ideas = read_lab(tmp_path), night.ideas(40, 0.005, 1024, 16)
    baseline = baseline_of(lab)
    assert Counter(idea.predicted for idea in ideas) == {"null": 20, "better": 4, "worse": 6}
    assert len({idea.name for idea in ideas}) == len(ideas)
    digests = {baseline.digest}
    for idea in ideas:
        subject = baseline.changed_by(night.write_idea(idea, tmp_path), lab)
        build(TrainingConfig, {**preset_options(night.PRESET, subject.options), **subject.options})
        for name, (_, content) in subject.files.items():
            if content != baseline.files[name][1]:
                compile(content, name, "exec")
        digests.add(subject.digest)
    assert len(digests) == 1 + len(ideas)


def test_a_night_counts_its_keeps_against_what_was_predicted() -> None:
    answers = {
        f"{predicted} {verdict}": {"predicted": predicted, "verdict": verdict, "seconds": 2.0}
        for predicted in ("null", "better", "worse") for verdict in ("keep", "discard", "inactive")
    }  # fmt: skip
    found = night.summary(answers, 3, 60.0)
    assert (found["false_keeps"], found["found"], found["better"], found["ideas"]) == (2, 1, 3, 9)
    assert found["seconds_of_runs"] == 18.0


@pytest.mark.slow
def test_a_small_night_survives_its_kills_and_is_answered_from_its_ledger(tmp_path: Path) -> None:
    corpus, lab = make_corpus(tmp_path / "corpus"), tmp_path / "lab"
    words = [sys.executable, "benchmarks/judge_night.py", "--quick", "--lab", str(lab), "--data", str(corpus)]
    found = []
    for _ in range(2):
        done = subprocess.run(words, cwd=night.ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((lab / "night.json").read_text()))
    first, again = (result["answers"] for result in found)
    assert first == again
    assert len(first) == 5
    assert first["renamed_qkv"]["verdict"] == "inactive"
    assert not any(answer["verdict"] in ("broken", "diverged") for answer in first.values())
    assert found[0]["false_keeps"] <= 1
    assert len((lab / "ledger.jsonl").read_text().splitlines()) == 5
    assert (lab / "report.html").exists()
