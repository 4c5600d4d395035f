"""`gptlab judge` on a trainer of ten lines: verdicts, adoption, a ledger that shows edits; and its error rate."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scripts import load_script
from small_lab import TRAINER, Run, Site

from gptlab.analysis.statistics import two_sided_p
from gptlab.errors import DataError
from gptlab.judge.evidence import critical_value, design, keeps, level_left, next_level, screened
from gptlab.judge.lab import Ledger, Metric, last_match, matches, read_lab, read_metric
from gptlab.judge.procedure import EXIT


def test_a_gain_is_kept_and_reported_from_fresh_seeds_alone(site: Site, run: Run) -> None:
    code, found = run(site.edit("rate = 0.1", "rate = 0.9"))
    assert (code, found["verdict"], found["exit_code"]) == (0, "keep", 0)
    assert found["difference"] == pytest.approx(-0.08, abs=0.02)
    assert found["interval"][0] < found["difference"] < found["interval"][1] < 0
    fresh = found["runs"]["fresh"]
    assert min(fresh["seeds"]) > max(found["runs"]["screening"]["seeds"])
    pairs = zip(fresh["idea"], fresh["baseline"], strict=True)
    assert found["difference"] == pytest.approx(sum(i - b for i, b in pairs) / found["n"])
    assert found["level_spent"] == 0
    assert found["level_left"] == 0.05
    assert found["lines"] == [1, 1]


@pytest.mark.usefixtures("known_site")
def test_a_loss_and_a_null_are_discarded_and_an_idea_without_effect_is_inactive(site: Site, run: Run) -> None:
    assert run(site.edit("rate = 0.1", "rate = -0.9", "worse.diff"))[0] == 10
    code, found = run(site.edit("step in", "update in", "renamed.diff"))
    assert (code, found["verdict"], found["difference"]) == (12, "inactive", 0.0)
    nulls = [run(site.edit("rate = 0.1", f"rate = 0.1{k}", f"null_{k}.diff"))[1]["verdict"] for k in range(1, 4)]
    assert "keep" not in nulls
    assert [line["verdict"] for line in site.ledger()][:2] == ["discard", "inactive"]


@pytest.mark.usefixtures("known_site")
def test_the_same_idea_twice_is_answered_from_the_ledger(site: Site, run: Run) -> None:
    idea = site.edit("rate = 0.1", "rate = -0.5")
    code, first = run(idea)
    again, second = run(idea.rename(site.root / "other_name.diff"))
    assert (code, again) == (10, 10)
    assert second["answered_from_the_ledger"]
    assert second["hash"] == first["hash"]
    assert len(site.ledger()) == 1


@pytest.mark.usefixtures("known_site")
def test_an_adopted_idea_is_the_baseline_of_the_next(site: Site, run: Run) -> None:
    first = site.edit("rate = 0.1", "rate = 0.9", "first.diff")
    code, found = run(first, "--adopt")
    assert code == 0
    assert found["adopted"]
    assert (site.repo / "train.py").read_text() == TRAINER  # the user's own tree stays as it was
    assert (site.lab / "baseline" / "train.py").read_text() == TRAINER.replace("rate = 0.1", "rate = 0.9")
    second = site.edit("loss = 3.0", "loss = 2.9", "second.diff")
    second.write_text(second.read_text().replace("rate = 0.1", "rate = 0.9"))
    code, found = run(second, "--adopt")
    assert code == 0
    assert found["difference"] == pytest.approx(-0.1, abs=1e-6)  # equal noise: the rate is the adopted one
    assert found["stack"]["difference"] == pytest.approx(-0.18, abs=0.02)
    status = run("--status")[1]
    assert status["adopted"] == ["first.diff", "second.diff"]
    code, found = run(site.edit("rate = 0.1", "rate = 0.5", "third.diff"))
    assert (code, found["verdict"]) == (13, "broken")
    assert "does not apply" in found["reason"]


@pytest.mark.usefixtures("known_site")
def test_a_kept_file_that_was_changed_is_not_adopted(site: Site, run: Run) -> None:
    run(site.edit("rate = 0.1", "rate = 0.9"), "--adopt")
    (kept,) = (site.lab / "kept").rglob("*.diff")
    kept.write_text(kept.read_text().replace("0.9", "0.8"))
    code, found = run(site.edit("loss = 3.0", "loss = 2.9", "second.diff"))
    assert code == 3
    assert "as it was kept" in found["error"]


def test_a_repository_is_judged_at_its_head_whatever_is_being_edited(site: Site, run: Run) -> None:
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(site.repo)]
    (site.repo / ".gitignore").write_text("data.bin\n")
    (site.repo / "train.py").write_text((site.repo / "train.py").read_text() + "assert open('data.bin').read()\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    (site.repo / "data.bin").write_text("not tracked, and needed")
    idea = site.edit("rate = 0.1", "rate = 0.9")
    (site.repo / "train.py").write_text("raise SystemExit('half edited')\n")
    code, found = run(idea)
    assert (code, found["verdict"]) == (0, "keep"), found


def test_init_writes_a_lab_and_measures_its_noise(site: Site, run: Run) -> None:
    (site.lab / "lab.toml").unlink()
    words = ["--command", "python train.py", "--path", site.repo, "--metric", "val_loss: ([0-9.]+)"]
    code, found = run("--init", *words)
    assert code == 0
    assert found["noise_floor"] == pytest.approx(0.01, rel=0.9)
    assert found["smallest_effect"] > 0
    text = (site.lab / "lab.toml").read_text()
    assert text.count("# measured:") == 3
    assert read_lab(site.lab).config.plan.looks == (2, 4, 8)
    assert run("--init")[0] == 0
    assert (site.lab / "lab.toml").read_text().count("# measured:") == 3
    uncommented = re.sub(r"^# (looks|error_rate|time_limit|jobs|disk|allow|better|min_gain)", r"\1", text, flags=re.M)
    (site.lab / "lab.toml").write_text(uncommented)
    assert read_lab(site.lab).config.paths.allow == ("**",)


def test_one_command_judges_without_a_lab_file(site: Site, run: Run) -> None:
    (site.lab / "lab.toml").unlink()
    idea = site.edit("rate = 0.1", "rate = -0.9")
    words = ["--command", "python train.py", "--path", site.repo, "--metric", "val_loss: ([0-9.]+)"]
    assert run(*words, "--idea", idea)[0] == 10
    code, found = run(*words, "--idea", idea)
    assert code == 2
    assert "lab.toml is there" in found["error"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("looks =", "look =", "plan.look'; did you mean 'plan.looks'"),
        ("[metric]", "[metrics]", "did you mean 'metric.pattern'"),
        ("looks = [2, 4]", "looks = [4, 2]", "rising numbers of seeds"),
        ("looks = [2, 4]", "looks = [2, 1001]", "fewer than 1001"),
        ('pattern = "val_loss: ([0-9.]+)"', 'pattern = "val_loss"', "expected one group"),
        ('pattern = "val_loss: ([0-9.]+)"', 'pattern = "val_loss: ("', "regular expression"),
        ('command = "python train.py"', "", "a command"),
        ('path = "../repo"', 'path = "../rep"', "expected a folder"),
        ('path = "../repo"', 'path = "../repo"\npreset = "shakespeare-tiny"', "either a command"),
        ("time_limit = 20", "time_limit = 0", "above 0"),
        ("[plan]", '[plan]\nerror_rate = "half"', "plan.error_rate"),
        ("[plan]", "[plan]\nerror_rate = 1.5", "plan.error_rate"),
        ("[plan]", "[plan", "not a TOML file"),
    ],
)
def test_what_is_wrong_in_a_lab_is_named(old: str, new: str, expected: str, site: Site, run: Run) -> None:
    text = (site.lab / "lab.toml").read_text()
    assert old in text
    (site.lab / "lab.toml").write_text(text.replace(old, new))
    code, found = run("--status")
    assert code == 3
    assert expected in found["error"]
    assert "lab.toml" in found["error"]


@pytest.mark.usefixtures("known_site")
def test_what_the_ledger_promises_may_not_change_under_it(site: Site, run: Run) -> None:
    run(site.edit("rate = 0.1", "rate = -0.9"))
    text = (site.lab / "lab.toml").read_text()
    (site.lab / "lab.toml").write_text(text.replace("[plan]", "[plan]\nerror_rate = 0.1"))
    code, found = run(site.edit("rate = 0.1", "rate = 0.3"))
    assert code == 3
    assert "plan.error_rate changed" in found["error"]
    (site.lab / "lab.toml").write_text(text.replace("time_limit = 20", "time_limit = 30"))
    assert run(site.edit("rate = 0.1", "rate = -0.3"))[0] == 10


@pytest.mark.usefixtures("known_site")
def test_an_edited_ledger_is_refused_by_every_use_of_it(site: Site, run: Run) -> None:
    run(site.edit("rate = 0.1", "rate = -0.9"))
    ledger = site.lab / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"discard"', '"keep"'))
    for words in (["--status"], ["--report"], ["--export", "csv"], ["--adopt"], [site.root / "idea.diff"]):
        code, found = run(*words)
        assert code == 3, words
        assert "line 1" in found["error"]


@pytest.mark.usefixtures("known_site")
def test_the_report_and_the_csv_show_every_try(site: Site, run: Run) -> None:
    assert run("--report")[0] == 0  # of an empty lab too
    run(site.edit("rate = 0.1", "rate = 0.9", "<good>.diff"))
    run(site.edit("rate = 0.1", "rate = -0.9", "=bad.diff"))
    run(site.edit("SPLIT", "SPLITS", "outside.diff", "model/data.py"))
    assert run("--report")[0] == 0
    page = (site.lab / "report.html").read_text()
    assert "&lt;good&gt;.diff" in page
    assert "<good>" not in page
    assert page.count("<svg") == 3
    rows = list(csv.DictReader(io.StringIO(run("--export", "csv")[1]["text"])))
    assert [row["verdict"] for row in rows] == ["keep", "discard", "broken"]
    assert rows[1]["name"] == "'=bad.diff"


@pytest.mark.parametrize(
    "words", [[], ["--status", "--report"], ["--export", "xml"], ["a.diff", "--idea", "b.diff"], ["a.diff", "--status"],
              ["--better", "more"], ["--adopt"]],
)  # fmt: skip
def test_wrong_usage(words: list[str], run: Run) -> None:
    assert run(*words)[0] == 2


def test_an_idea_that_is_not_there_is_no_try(site: Site, run: Run) -> None:
    code, found = run(site.root / "none.diff")
    assert code == 3
    assert "expected an idea" in found["error"]
    assert not (site.lab / "ledger.jsonl").exists()


def test_a_higher_metric_and_the_second_slice(site: Site, run: Run) -> None:
    text = (site.lab / "lab.toml").read_text()
    second = "[metric]\nbetter = \"higher\"\nsecond = 'step ([0-9]+)'"
    (site.lab / "lab.toml").write_text(text.replace("[metric]", second))
    code, found = run(site.edit("rate = 0.1", "rate = -0.9"))
    assert (code, found["second"]) == (0, 0.0)
    assert found["difference"] > 0


def test_exit_codes_are_the_documented_ones() -> None:
    assert EXIT == {"keep": 0, "discard": 10, "undecided": 11, "inactive": 12, "broken": 13, "diverged": 4}
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text()
    for verdict, code in EXIT.items():
        assert re.search(rf"\| `{verdict}` \| {code} \|", page), verdict


@pytest.mark.parametrize(
    ("output", "metric", "value"),
    [
        ("loss 2.5\nloss 2.25 of 9", Metric(pattern=r"loss ([0-9.]+)"), 2.25),
        ("a\rloss 1\rloss 2\r", Metric(pattern=r"loss (\S+)"), 2.0),
        ("loss 1.5e-3", Metric(pattern=r"(?:final )?loss ([0-9.e+-]+)"), 1.5e-3),
        ("loss 2.5\nloss -", Metric(pattern=r"loss ([0-9.-]+)"), 2.5),
        ("nothing", Metric(pattern=r"loss ([0-9.]+)"), None),
        ('{"val": 1}\n{"val": 2.5, "x": []}\n{"step": 1}\nbye', Metric(json="val"), 2.5),
        ("[1]\n2\n", Metric(json="val"), None),
    ],
)
def test_a_metric_is_read(output: str, metric: Metric, value: float | None) -> None:
    assert read_metric(output, metric) == value


@pytest.mark.parametrize(
    "pattern", [r"loss: ([0-9.]+)", r"loss: (?P<x>\d+\.\d+)", r"loss\(x\)?: ([(0-9.]+)", r"(?:val )?loss: ([\d.]+)$"]
)
@pytest.mark.parametrize("word", ["nan", "NaN", "inf", "-inf", "Infinity"])
def test_a_number_that_is_none_is_seen_though_the_pattern_takes_digits_only(pattern: str, word: str) -> None:
    found = last_match(
        f"loss: 2.5\nloss: {word}\n" if "x" not in pattern[:8] else f"loss(x: 2.5\nloss(x: {word}", pattern
    )
    assert found is not None
    assert found != 2.5


@pytest.mark.parametrize(
    ("name", "glob", "found"),
    [
        ("train.py", "train.py", True), ("x/train.py", "train.py", False), ("model/a/b.py", "model", True),
        ("model/a/b.py", "model/", True), ("model.py", "model", False), ("a.py", "*.py", True),
        ("x/a.py", "*.py", False),
        ("x/a.py", "**/*.py", True), ("a.py", "**/*.py", True), ("a+b.py", "a+b.py", True), ("aab.py", "a+b.py", False),
        ("anything/at/all", "**", True), ("a.py\n", "a.py", False),
    ],
)  # fmt: skip
def test_globs(name: str, glob: str, found: bool) -> None:
    assert matches(name, glob) is found


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path)
    with found.locked():
        found.add_note({"kind": "declared"})
        for number in range(3):
            found.add_note({"kind": "confirmation", "idea": f"idea {number}"})
            found.add_try({"verdict": "discard", "difference": 0.1 * number, "name": "Süd→"})
    return found


def test_what_was_added_is_read_again(ledger: Ledger) -> None:
    tries, journal = ledger.read()
    assert [line["line"] for line in tries] == [1, 2, 3]
    assert len(journal) == 4
    assert tries[1]["previous"] == tries[0]["hash"]


EDITS: dict[str, Callable[[list[str]], list[str]]] = {
    "a verdict": lambda lines: [lines[0].replace("discard", "keep"), *lines[1:]],
    "a number": lambda lines: [*lines[:1], lines[1].replace("0.1", "0.2"), *lines[2:]],
    "blanks": lambda lines: [lines[0].replace('": ', '":  ', 1), *lines[1:]],
    "the order": lambda lines: lines[::-1],
    "a line removed": lambda lines: [lines[0], lines[2]],
    "the first removed": lambda lines: lines[1:],
    "the last removed": lambda lines: lines[:2],
    "all removed": lambda lines: [],
    "a line twice": lambda lines: [*lines, lines[-1]],
    "another kind of line": lambda lines: [*lines, "[]"],
    "no JSON": lambda lines: [lines[0], "x", *lines[1:]],
    "a key twice": lambda lines: [lines[0][:-1] + ', "verdict": "keep"}', *lines[1:]],
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_found(edit: str, ledger: Ledger, tmp_path: Path) -> None:
    with ledger.locked():
        ledger.add_note({"kind": "adopted"})
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(f"{line}\n" for line in EDITS[edit](path.read_text().splitlines())))
    with pytest.raises(DataError, match=r"ledger\.jsonl.*(edited|removed)"):
        ledger.read()


def test_an_edit_is_found_even_where_its_own_hash_was_made_new(ledger: Ledger, tmp_path: Path) -> None:
    from gptlab.judge.lab import digest

    path = tmp_path / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["verdict"] = "keep"
    lines[0]["hash"] = digest({key: value for key, value in lines[0].items() if key != "hash"})
    path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    with pytest.raises(DataError, match="line 2"):
        ledger.read()


def test_a_line_that_a_kill_cut_off_is_no_line_and_the_next_takes_its_place(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    for length in range(1, 40, 7):
        path.write_bytes(whole + whole[:length])
        assert len(ledger.read()[0]) == 3
    ledger.add_try({"verdict": "keep"})
    assert [line["verdict"] for line in ledger.read()[0]] == ["discard"] * 3 + ["keep"]


LOOKS = (8, 16)


@pytest.mark.parametrize("failures", [0, 1, 7, 100, 10_000])
def test_levels_that_are_spent_and_left_add_up_to_the_error_rate(failures: int) -> None:
    spent = sum(next_level(0.05, m) for m in range(failures))
    assert spent + level_left(0.05, failures) == pytest.approx(0.05, rel=1e-9)
    assert next_level(0.05, failures) < level_left(0.05, failures)


def test_the_looks_of_a_confirmation_together_keep_its_level() -> None:
    generator = np.random.default_rng(3)
    gains = generator.standard_normal((400_000, 16))
    for failures in (0, 30):  # simulated levels, and those too small to be simulated
        level = next_level(0.05, failures)
        won = np.zeros(len(gains), dtype=bool)
        for k, n in enumerate(LOOKS):
            part = gains[:, :n]
            won |= part.mean(1) / part.std(1, ddof=1) * math.sqrt(n) > critical_value(level, LOOKS, k)
        assert won.mean() < level + 4 * math.sqrt(level / len(gains))
        assert won.mean() > level / 2


def test_screening_passes_what_is_large_and_gives_up_what_is_not_positive() -> None:
    gains = np.array([[3.0, 3.2], [-0.1, -0.2], [0.8, 0.2]])
    assert screened(gains, 1.0, last=False).tolist() == [1, -1, 0]
    assert screened(gains, 1.0, last=True).tolist() == [1, -1, -1]
    assert screened(np.zeros((1, 2)), 0.0, last=True).tolist() == [-1]


@pytest.mark.parametrize("digits", [1, 2])
def test_a_metric_of_few_digits_is_not_kept_more_often_than_promised(digits: int) -> None:
    """Gains that repeat look as if they had no spread: on 4 seeds 1 of 8 nulls would have been kept."""
    generator = np.random.default_rng(5)
    level, kept = next_level(0.05, 0), 0
    for _ in range(4000):
        baseline, idea = np.round(generator.normal(0, 0.4 * 10**-digits, (2, 8)), digits)
        gains = idea - baseline
        kept += any(
            keeps(baseline[:n].tolist(), gains[:n].tolist(), level, (4, 8), k) == 1 for k, n in ((0, 4), (1, 8))
        )
    assert kept / 4000 < level + 4 * math.sqrt(level / 4000)


@pytest.mark.parametrize("baseline", [[0.5] * 8, [0.5 + 0.01 * k for k in range(8)]])
def test_a_trainer_without_noise_is_kept_or_not_by_the_sign_of_its_gain(baseline: list[float]) -> None:
    level = next_level(0.05, 0)
    assert keeps(baseline, [0.25] * 8, level, LOOKS, 0) == 1
    assert keeps(baseline, [-0.25] * 8, level, LOOKS, 0) == -1


def test_a_design_says_what_can_be_found_and_what_it_costs() -> None:
    found = design(0.02, (2, 4, 8), LOOKS, 0.05)
    assert found["smallest_effect"] < found["smallest_effect_later"] < 0.05
    assert found["runs_of_a_discarded_idea"] == [2, 8]
    assert found["runs_of_a_kept_idea"] == [18, 40]
    assert two_sided_p(critical_value(next_level(0.05, 0), LOOKS, 1), 15) < 0.01


def test_the_committed_nights_keep_the_promise_and_the_naive_rules_do_not() -> None:
    nights = load_script("benchmarks/judge_nights.py")
    found = load_script("benchmarks/figures.py").measured("judge_nights")
    for correlation in ("correlation_0", "correlation_0.5"):
        for effect, rules in found[correlation].items():
            assert rules["judge"]["upper_bound"] <= 0.05, (correlation, effect)
            assert all(
                rules[name]["nights_with_a_false_keep"] > 0.4 for name in ("lower_loss", "paired_t", "mad_score")
            )
    assert found["nights"] >= 1000
    assert nights.table(found) in nights.PAGE.read_text(encoding="utf-8"), "run `python benchmarks/judge_nights.py`"


def test_a_few_nights_simulated_now_are_like_the_committed_ones() -> None:
    nights = load_script("benchmarks/judge_nights.py")
    found = nights.simulate(150, 3.0, 0.5, seed=11)
    assert found["judge"]["found"] > 0.95
    assert found["judge"]["nights_with_a_false_keep"] < 0.08
    assert abs(found["judge"]["overstatement"]) < 0.1
    assert found["lower_loss"]["nights_with_a_false_keep"] > 0.5
