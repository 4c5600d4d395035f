"""Ideas for a preset of gptlab: an arm's TOML, or a diff of the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gptlab.errors import ConfigError
from gptlab.judge.lab import Lab, read_lab
from gptlab.judge.procedure import Judge, idea_digest
from gptlab.judge.trial import baseline_of

sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from tiny_experiment import OPTIONS, make_corpus

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


@pytest.mark.slow
def test_an_arm_with_a_better_learning_rate_is_kept_and_its_cells_are_runs(lab: Lab) -> None:
    (lab.folder / "arm.toml").write_text("learning_rate = 1e-2\n")
    line = Judge(lab).judge(lab.folder / "arm.toml")
    assert line["verdict"] in ("keep", "undecided")  # two or three seeds decide at 0.0045 only what is very clear
    assert line["difference"] < 0
    assert line["flops"][0] == line["flops"][1] > 0
    assert len(list(lab.folder.glob("cells/*/seed_*/metrics.jsonl"))) == 2 * line["n"] + 4
