"""The life of an idea: it is applied, smoked, screened on shared seeds, confirmed on fresh ones, and written down.

What is decided follows from the results of runs, which are kept, and from the ledger: a judge that was killed comes to
where it was by starting again, and several judges share a lab. evidence.py has the statistics and their promise.
"""

from __future__ import annotations

import hashlib
import math
import queue
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.analysis.design import seeds_for_difference, smallest_difference
from gptlab.analysis.run import read_run
from gptlab.analysis.statistics import paired_t, spread
from gptlab.errors import ConfigError, DivergedError, Stopped, UsageError
from gptlab.files import read_bytes, write_whole
from gptlab.judge.evidence import (
    PASS,
    Evidence,
    at_equal_flops,
    cost,
    design,
    flops,
    keeps,
    level_left,
    next_level,
    runs_as_json,
    screened,
    screening_z,
)
from gptlab.judge.lab import FIRST_FRESH, Lab, Ledger, Line, machine_type
from gptlab.judge.trial import Outcome, Subject, Trials, arm_options, baseline_of, read_idea, signal_file

EXIT = {"keep": 0, "discard": 10, "undecided": 11, "inactive": 12, "broken": 13, "diverged": 4}
"""Exit codes by verdict."""


@dataclass(eq=False)
class Verdict(Exception):
    """Ends the life of an idea."""

    verdict: str
    reason: str
    evidence: Evidence | None = None
    more_seeds: int | None = None


class Judge:
    """Judges ideas in a lab. stop: whether to give up, asked often; note: is given a line when something begins.

    allow_code: whether an arm may bring a signal of its own, FILE.py:FUNCTION.
    """

    def __init__(
        self, lab: Lab, stop: Callable[[], bool] = lambda: False, note: Callable[[str], None] = print,
        allow_code: bool = False,
    ) -> None:  # fmt: skip
        self.lab, self.plan, self.metric = lab, lab.config.plan, lab.config.metric
        self.ledger = Ledger(lab.folder)
        self.trials = Trials(lab, machine_type(), stop, allow_code)
        self._preset = lab.config.baseline.preset
        self._note = note

    @cached_property
    def adopted(self) -> list[Line]:
        """The journal's lines of what was adopted."""
        return [line for line in self.ledger.read()[1] if line["kind"] == "adopted"]

    @cached_property
    def first_baseline(self) -> Subject:
        """The baseline before anything was adopted."""
        return baseline_of(self.lab)

    @cached_property
    def baseline(self) -> Subject:
        """The baseline with all that was adopted."""
        found = self.first_baseline
        for line in self.adopted:
            found = found.changed_by(self._kept_file(line["idea"], line["name"]), self.lab)
        return found

    def judge(self, path: Path) -> Line:
        """The line of an idea in the ledger, as it stands there or as it is now added.

        Raises ConfigError where the lab or its baseline cannot be run, and Stopped.
        """
        if not self.trials.allow_code and (file := _own_signal(path)):
            raise UsageError(f"{path}: {file.name} holds a signal: it runs as your code; add --allow_code")
        idea = idea_digest(path)
        baseline = self.trials.key(self.baseline)
        if found := self._known(idea, baseline):
            return {**found, "answered_from_the_ledger": True}
        evidence: list[Evidence] = []
        subject = self.baseline
        try:
            subject = self._applied(path)
            self._screen(subject, evidence)
            self._confirm(subject, idea, baseline, evidence)
        except Verdict as verdict:
            return self._record(path, idea, baseline, subject, verdict, evidence)
        raise AssertionError("a confirmation ends in a verdict")

    def _known(self, idea: str, baseline: str) -> Line | None:
        with self.ledger.locked():
            tries, journal = self.ledger.read()
            if not journal:
                self.ledger.add_note({"kind": "declared", "declared": self.lab.declared()})
            else:
                self.lab.check_unchanged(journal[0]["declared"])
        return next((line for line in tries if (line["idea"], line["baseline"]) == (idea, baseline)), None)

    def _applied(self, path: Path) -> Subject:
        try:
            return self.baseline.changed_by(path, self.lab)
        except ConfigError as error:
            raise Verdict("broken", str(error)) from None

    def _screen(self, subject: Subject, evidence: list[Evidence]) -> None:
        """Run the looks on shared seeds; raises Verdict unless the idea passes."""
        if self.trials.key(subject) == self.trials.key(self.baseline):
            raise Verdict("inactive", "it changes nothing that is run")
        self._note("smoke: 1 seed")
        self._pairs("screening", [1], subject, evidence)  # what cannot run ends after one run
        self._note(f"the baseline's noise: {self.plan.looks[-1]} seeds, once")
        self._baseline_runs()
        for n in self.plan.looks:
            self._note(f"screening: {n} seeds")
            self._pairs("screening", range(1, n + 1), subject, evidence)
            gains = self._gains(evidence[-1])
            if n == self.plan.looks[0] and not gains.any():
                raise Verdict("inactive", f"the metric is exactly equal at {n} seeds", evidence[-1])
            found = int(screened(gains, self._floor(), last=n == self.plan.looks[-1]))
            if found < 0:
                words = "no gain" if gains.mean() <= 0 else "a gain that noise alone explains"
                raise Verdict("discard", f"{words} at {n} seeds of screening", evidence[-1])
            if found > 0:
                return

    def _confirm(self, subject: Subject, idea: str, baseline: str, evidence: list[Evidence]) -> None:
        """Run the looks on fresh seeds; raises Verdict."""
        reserved = self._reserve(idea, baseline)
        level, looks = reserved["level"], self.plan.confirm_looks
        for k, n in enumerate(looks):
            self._note(f"confirmation: {n} fresh seeds, one-sided level {level:.2g}")
            self._pairs("fresh", reserved["seeds"][:n], subject, evidence)
            gains = self._gains(evidence[-1])
            values = [one.value for one in evidence[-1].baseline if one.value is not None]
            found = keeps(values, gains.tolist(), level, looks, k)
            if found > 0 and gains.mean() < self.metric.min_gain:
                raise Verdict("discard", f"a gain on {n} fresh seeds, but below min_gain", evidence[-1])
            if found > 0:
                raise Verdict("keep", f"confirmed on {n} fresh seeds", evidence[-1])
            if found < 0:
                raise self._unconfirmed(gains, level, evidence[-1])

    def _unconfirmed(self, gains: np.ndarray, level: float, evidence: Evidence) -> Verdict:
        mean, n = float(gains.mean()), len(gains)
        if mean < self.metric.min_gain or screening_z(gains, gains.std(ddof=1) / math.sqrt(2)) < PASS:
            return Verdict("discard", f"not confirmed on {n} fresh seeds", evidence)
        needed = seeds_for_difference(mean, float(gains.std(ddof=1)), 2 * level)
        more = max(1, needed - n) if needed else None
        return Verdict("undecided", f"a gain on {n} fresh seeds that they cannot tell from noise", evidence, more)

    def _gains(self, evidence: Evidence) -> np.ndarray:
        return self.metric.sign * np.array(evidence.differences())

    def _floor(self) -> float:
        """The baseline's standard deviation over the seeds of screening that have run."""
        return spread(self._screened_baseline()) or 0.0

    def _screened_baseline(self) -> list[float]:
        found = [self.trials.cached(self.baseline, seed) for seed in self._screening_seeds()]
        return [one.value for one in found if one and one.value is not None]

    def _screening_seeds(self) -> list[int]:
        return list(range(1, self.plan.looks[-1] + 1))

    def _baseline_runs(self) -> list[Outcome]:
        """The baseline's runs at the seeds of screening; raises where one of them fails."""
        seeds = self._screening_seeds()
        ran = self.run([(self.baseline, seed) for seed in seeds])
        for seed, outcome in zip(seeds, ran, strict=True):
            check_baseline(seed, outcome)
        return ran

    def _pairs(self, how: str, seeds: Sequence[int], subject: Subject, evidence: list[Evidence]) -> None:
        """Run the idea and the baseline at seeds and add what they gave; raises Verdict where the idea fails."""
        self._check_budget(evidence)
        found = self._evidence(how, seeds, self.baseline, subject)
        evidence.append(found)
        for seed, outcome in zip(seeds, found.baseline, strict=True):
            check_baseline(seed, outcome)
        for seed, outcome in zip(seeds, found.idea, strict=True):
            if outcome.state != "ok":
                raise Verdict(outcome.state, f"seed {seed}: {outcome.reason}", None)

    def _evidence(self, how: str, seeds: Sequence[int], baseline: Subject, idea: Subject) -> Evidence:
        ran = self.run([(one, seed) for seed in seeds for one in (baseline, idea)])
        return Evidence(how, list(seeds), ran[::2], ran[1::2])

    def _check_budget(self, evidence: list[Evidence]) -> None:
        used = cost(evidence)["seconds"]
        if self.plan.budget is not None and used > self.plan.budget:
            raise Verdict("undecided", f"its budget of {self.plan.budget:g} s is spent", evidence[-1])

    def run(self, wanted: Sequence[tuple[Subject, int]]) -> list[Outcome]:
        """Outcomes in their order, `jobs` at a time; raises Stopped."""
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.plan.jobs):
            slots.put(slot)

        def one(subject: Subject, seed: int) -> Outcome | None:
            slot = slots.get()
            try:
                return self.trials.run(subject, seed, slot)
            finally:
                slots.put(slot)

        with ThreadPoolExecutor(self.plan.jobs) as pool:
            found = list(pool.map(one, *zip(*wanted, strict=True)))
        if any(outcome is None for outcome in found):
            raise Stopped("stopped before the verdict; run the same command again to continue")
        return [outcome for outcome in found if outcome]

    def _reserve(self, idea: str, baseline: str) -> Line:
        """The level and the fresh seeds of an idea's confirmation: reserved before it begins, also for a restart."""
        with self.ledger.locked():
            tries, journal = self.ledger.read()
            notes = [line for line in journal if line["kind"] == "confirmation"]
            for line in notes:
                if (line["idea"], line["baseline"]) == (idea, baseline):
                    return line
            content = {
                "kind": "confirmation", "idea": idea, "baseline": baseline,
                "level": next_level(self.plan.error_rate, failures(tries, journal)),
                "seeds": _fresh(journal, self.plan.confirm_looks[-1]),
            }  # fmt: skip
            return self.ledger.add_note(content)

    def _record(
        self, path: Path, idea: str, baseline: str, subject: Subject, verdict: Verdict, evidence: list[Evidence]
    ) -> Line:
        """Write the verdict down, unless another judge has meanwhile."""
        with self.ledger.locked():
            tries, journal = self.ledger.read()
            if found := next((t for t in tries if (t["idea"], t["baseline"]) == (idea, baseline)), None):
                return {**found, "answered_from_the_ledger": True}
            reserved = [n for n in journal if n["kind"] == "confirmation" and n["idea"] == idea]
            level = next((n["level"] for n in reserved if n["baseline"] == baseline), None)
            kept = verdict.verdict == "keep"
            equal, why = self._equal_flops(subject, verdict.evidence)
            left = level_left(self.plan.error_rate, failures(tries, journal) - kept)
            content = {
                "idea": idea, "name": path.name, "baseline": baseline, "subject": self.trials.key(subject),
                "machine": self.trials.machine, "verdict": verdict.verdict, "reason": verdict.reason,
                **self._figures(verdict, level), **cost(evidence), "flops": flops(self._preset, subject, self.baseline),
                "equal_flops": equal, "equal_flops_reason": why or None,
                "lines": list(subject.lines), "level": level, "level_spent": 0.0 if kept else level or 0.0,
                "level_left": left, "runs": runs_as_json(evidence),
            }  # fmt: skip
            if kept:
                self._keep_file(path, idea)
            return self.ledger.add_try(content)

    def _figures(self, verdict: Verdict, level: float | None) -> dict[str, Any]:
        """The statistics of a verdict: of the fresh seeds where there are any, else of screening's."""
        floor, last, ran = self._floor(), self.plan.confirm_looks[-1], self._screened_baseline()
        figures: dict[str, Any] = {
            "difference": None, "interval": [None, None], "n": 0, "seeds": None, "second": None,
            "more_seeds": verdict.more_seeds, "noise_floor": floor,
            "baseline_metric": float(np.mean(ran)) if ran else None, "smallest_effect": None,
        }  # fmt: skip
        if verdict.evidence is None or len(differences := verdict.evidence.differences()) < 2:
            return figures
        test, second = paired_t(differences), verdict.evidence.differences(second=True)
        at = 2 * (level or next_level(self.plan.error_rate, 0))
        return figures | {
            "difference": test.mean, "interval": list(test.interval()), "n": test.n, "seeds": verdict.evidence.how,
            "second": float(np.mean(second)) if second else None,
            "smallest_effect": smallest_difference(test.deviation, last, at) if test.deviation else 0.0,
        }  # fmt: skip

    def _equal_flops(self, subject: Subject, evidence: Evidence | None) -> tuple[dict[str, Any] | None, str]:
        """`at_equal_flops` of what a verdict rests on, and why that is not known."""
        if not self._preset:
            return None, "what a command computes is not known"
        if (costs := flops(self._preset, subject, self.baseline)) is None:
            return None, "what changed code computes is not known"
        if evidence is None or len(evidence.seeds) < 2:
            return None, "fewer than two seeds ran"
        curves = [
            [read_run(self.trials.folder(one, seed)).losses for seed in evidence.seeds]
            for one in (subject, self.baseline)
        ]
        return at_equal_flops(costs, *curves)

    def measure(self) -> dict[str, Any]:
        """The noise floor, from runs of the baseline at the seeds of screening, and what the lab can find with it."""
        ran = self._baseline_runs()
        values = [one.value for one in ran if one.value is not None]
        floor, seconds = spread(values) or 0.0, float(np.mean([one.seconds for one in ran]))
        found = design(math.sqrt(2) * floor, self.plan.looks, self.plan.confirm_looks, self.plan.error_rate)
        measured = {"noise_floor": floor, "n": len(values), "mean": float(np.mean(values)), "seconds_a_run": seconds}
        return {**measured, **found}

    def adopt(self, line: Line) -> Line:
        """Make a kept idea part of the baseline; from the second on, measure all of them against the first baseline."""
        if line["verdict"] != "keep":
            raise ConfigError(f"only a kept idea can be adopted; {line['name']}: {line['verdict']}, {line['reason']}")
        if any(one["idea"] == line["idea"] for one in self.adopted):
            raise ConfigError(f"{line['name']} was adopted before")
        if line["baseline"] != self.trials.key(self.baseline):
            raise ConfigError(f"{line['name']} was kept against another baseline; judge it again against this one")
        content = {"kind": "adopted", "idea": line["idea"], "name": line["name"], "subject": line["subject"]}
        with self.ledger.locked():
            note = self.ledger.add_note({**content, "difference": line["difference"], "interval": line["interval"]})
        del self.adopted, self.baseline
        if self.lab.config.baseline.command:  # what the next idea is a diff of
            shutil.rmtree(self.lab.folder / "baseline", ignore_errors=True)
            Subject(self.baseline.files).write(self.lab.folder / "baseline")
        return note

    def measure_stack(self) -> Line | None:
        """All that was adopted against the first baseline, on fresh seeds of its own; None below two ideas."""
        if len(self.adopted) < 2:
            return None
        with self.ledger.locked():
            seeds = _fresh(self.ledger.read()[1], self.plan.confirm_looks[-1])
            self.ledger.add_note({"kind": "stack begun", "seeds": seeds})
        self._note(f"all {len(self.adopted)} adopted ideas against the first baseline: {len(seeds)} fresh seeds")
        evidence = self._evidence("fresh", seeds, self.first_baseline, self.baseline)
        for seed, outcome in zip(seeds * 2, [*evidence.baseline, *evidence.idea], strict=True):
            check_baseline(seed, outcome)
        test = paired_t(evidence.differences())
        content = {"difference": test.mean, "interval": list(test.interval()), "n": test.n, "ideas": len(self.adopted)}
        with self.ledger.locked():
            return self.ledger.add_note({"kind": "stack", **content})

    def _keep_file(self, path: Path, idea: str) -> None:
        """Copy an idea's files into the lab, where adopting finds them."""
        folder = self.lab.folder / "kept" / idea
        folder.mkdir(parents=True, exist_ok=True)
        for file in idea_files(path):
            write_whole(folder / file.name, read_bytes(file))

    def _kept_file(self, idea: str, name: str) -> Path:
        path = self.lab.folder / "kept" / idea / name
        if not path.exists() or idea_digest(path) != idea:
            raise ConfigError(
                f"{path}: expected the idea as it was kept, found another content; restore it from a copy"
            )
        return path


def failures(tries: Sequence[Line], journal: Sequence[Line]) -> int:
    """Confirmations that did not end in a keep, those under way and abandoned ones among them."""
    kept = {(line["idea"], line["baseline"]) for line in tries if line["verdict"] == "keep"}
    return sum(line["kind"] == "confirmation" and (line["idea"], line["baseline"]) not in kept for line in journal)


def _fresh(journal: Sequence[Line], count: int) -> list[int]:
    """Seeds that no run has had."""
    first = max((line["seeds"][-1] for line in journal if "seeds" in line), default=FIRST_FRESH - 1) + 1
    return list(range(first, first + count))


def check_baseline(seed: int, outcome: Outcome) -> None:
    """Raise ConfigError, or DivergedError, where the baseline itself fails: no idea can be judged against it."""
    if outcome.state != "ok":
        error = DivergedError if outcome.state == "diverged" else ConfigError
        raise error(f"the baseline itself is {outcome.state} at seed {seed}: {outcome.reason}; mend it, or lab.toml")


def idea_files(path: Path) -> list[Path]:
    """The files of an idea: a diff, or an arm's TOML with its patch and the file of its signal."""
    patch = arm_options(path)[1] if path.suffix == ".toml" else None
    return [path, *filter(None, (patch, _own_signal(path)))]


def _own_signal(path: Path) -> Path | None:
    return signal_file(arm_options(path)[0]) if path.suffix == ".toml" else None


def idea_digest(path: Path) -> str:
    """SHA-256 of an idea's files; raises ConfigError where they cannot be read."""
    found = hashlib.sha256()
    for content in map(read_idea, idea_files(path)):
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()
