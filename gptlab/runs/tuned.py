"""Running an experiment with [tune]: its trials, then its cells with what the trials chose, as one runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptlab.runs.cells import ENDED, Cell
from gptlab.runs.choice import Choice, choices, chosen, keep
from gptlab.runs.executor import Children, Executor
from gptlab.runs.experiment import Runner, Snapshot
from gptlab.runs.experiment_file import Experiment
from gptlab.runs.packing import Packing, Queue
from gptlab.runs.trials import trial_experiment, trials_folder


@dataclass
class TunedRunner:
    """Like `Runner`, with the trials' cells first. seeds: of the verdict; trials always run on all of theirs.

    choices: {arm: what its trials chose}, once all of them have ended.
    """

    experiment: Experiment
    folder: Path
    packing: Packing | Queue
    seeds: int | None = None
    allow_code: bool = False
    executor: Executor = field(default_factory=Children)

    def __post_init__(self) -> None:
        self.trials = self._runner(trial_experiment(self.experiment), trials_folder(self.folder), None)
        self.verdict = self._runner(self.experiment, self.folder, self.seeds)
        self.choices: dict[str, Choice] = {}

    def _runner(self, experiment: Experiment, folder: Path, seeds: int | None) -> Runner:
        return Runner(experiment, folder, self.packing, seeds, self.allow_code, self.executor)

    @property
    def cells(self) -> list[Cell]:
        return [*self.trials.cells, *self.verdict.cells]

    @property
    def ran(self) -> list[str]:
        return [*self.trials.ran, *self.verdict.ran]

    def prepare(self) -> None:
        """Write what the trials need; raises ConfigError as `Runner.prepare` does."""
        self.verdict.check_same()
        self.trials.prepare()
        self.verdict.declare()

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Snapshot]:
        """Run the trials, choose, and run the cells of every arm that has a choice.

        An arm with a trial that failed waits for the next run, which tries that trial again.
        """
        for _ in self.trials.run(stop):
            yield self.snapshot()
        self.choices = choices(self.experiment, self.trials.results.write()["cells"])
        keep(self.experiment, self.folder, self.choices)
        self.verdict = self._runner(chosen(self.experiment, self.choices), self.folder, self.seeds)
        self.verdict.prepare()
        for _ in self.verdict.run(stop):
            yield self.snapshot()

    def snapshot(self) -> Snapshot:
        """All cells as they stand now; the cells' time is told from the trials' as long as these run."""
        trials, verdict = self.trials.snapshot(), self.verdict.snapshot()
        seconds = verdict.seconds_left
        if not self.choices:
            left, then = _steps_left(trials), _steps_left(verdict)
            seconds = trials.seconds_left * (left + then) / left if trials.seconds_left and left else None
        return Snapshot((*trials.cells, *verdict.cells), seconds)


def _steps_left(snapshot: Snapshot) -> int:
    return sum(one.cell.steps - one.step for one in snapshot.cells if one.state not in ENDED)
