"""The night of known ideas: each applies to the code as it stands, and a small night survives its kills."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gptlab.judge.lab import read_lab
from gptlab.judge.trial import baseline_of
from gptlab.options import build
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import preset_options

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from harness import make_corpus
from scripts import load_script

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
