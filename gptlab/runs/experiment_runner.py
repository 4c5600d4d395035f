"""Running an experiment's cells: whatever is missing, side by side, each in a process or a cluster's job of its own.

All arms are checked before the first cell trains. The runner yields snapshots and shows nothing. Killed at any moment
it leaves cells that continue exactly where they were; two runners on one experiment share the work and never a cell.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptlab.errors import ConfigError, Stopped
from gptlab.files import MB, open_append, read_toml, refuse_links, write_whole
from gptlab.processes import how_it_ended, python_command
from gptlab.runs.cells import CLAIM, ENDED, OUTPUT, Cell, Claim, Results, Rows, State, cells_of, claimed
from gptlab.runs.executor import Children, Executor, Packing, PatchedPackage, Queue, Worker, patched
from gptlab.runs.experiment_spec import FILE, Arm, Experiment, keep_declaration, options_file, options_text
from gptlab.runs.tuning import Choice, choices, chosen, keep, trial_experiment, trials_folder

LOOK_EVERY = 0.5
"""Seconds between two looks at the cells."""

PATIENCE = 120.0
"""Seconds that a cell gets to save when it was asked to stop; what it then has not saved is trained again."""


@dataclass(frozen=True)
class Progress:
    """A cell as it stands. loss: of validation where it is finished, else of the last update."""

    cell: Cell
    state: State
    step: int
    loss: float | None
    dose: float | None
    reason: str | None
    seconds_left: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """cells: all, in the order in which they are run; seconds_left: None while no speed is known."""

    cells: tuple[Progress, ...]
    seconds_left: float | None = None


@dataclass
class _Started:
    worker: Worker
    slot: int
    first: tuple[int, float] | None = None
    """The step and the moment at which it was first seen to make one."""

    def steps_per_second(self, step: int, now: float) -> float:
        if self.first is None:
            self.first = (step, now)
        return (step - self.first[0]) / (now - self.first[1]) if now > self.first[1] else 0.0


@dataclass
class _Runner:
    """Runs an experiment in `folder`. seeds: only so many of the first; allow_code: run users' own signals.

    packing: how many at a time; executor: where.
    """

    experiment: Experiment
    folder: Path
    packing: Packing | Queue
    seeds: int | None = None
    allow_code: bool = False
    executor: Executor = field(default_factory=Children)


@dataclass
class Runner(_Runner):
    """Runs an experiment's cells. ran: names of those that this runner had trained, in whole or in part."""

    def __post_init__(self) -> None:
        self.cells = cells_of(self.experiment, self.folder, self.seeds)
        self.results = Results(self.experiment, self.folder, cells_of(self.experiment, self.folder))
        self.ran: list[str] = []
        self._rows = {cell.name: Rows(cell) for cell in self.cells}
        self._started: dict[str, _Started] = {}
        self._tried: set[str] = set()
        self._code: dict[Path, PatchedPackage] = {}

    def prepare(self) -> None:
        """Write what the cells need: the copy of the file, options of every arm; and check that all arms can run.

        Raises ConfigError where the folder holds another experiment, or leads elsewhere, and with the reasons where
        arms cannot run: a patch that does not fit, options that its code does not know, a signal's file that fails.
        """
        self.check_same()
        self.folder.mkdir(parents=True, exist_ok=True)
        for cell in self.cells:
            refuse_links(cell.folder / CLAIM, self.folder, error=ConfigError)
        failed = {arm.name: reason for arm in self.experiment.arms.values() if (reason := self._unreadable(arm))}
        failed |= self._refused([arm for arm in self.experiment.arms.values() if arm.name not in failed])
        if failed:
            listed = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
            raise ConfigError(
                f"{len(failed)} of {len(self.experiment.arms)} arms cannot run; nothing is trained:{listed}"
            )
        write_whole(self.folder / FILE, self.experiment.text)  # the copy that status and compare read
        keep_declaration(self.experiment, self.folder)

    def _unreadable(self, arm: Arm) -> str | None:
        """Write an arm's options, and its patch for the record; why its patch does not fit, if it does not."""
        file = options_file(self.folder, arm)
        refuse_links(file, self.folder, error=ConfigError)
        file.parent.mkdir(exist_ok=True)
        write_whole(file, options_text(self.experiment, arm, self.folder))
        if arm.patch:
            try:
                self._code[arm.patch] = self._code.get(arm.patch) or patched(arm.patch)
            except ConfigError as error:
                return str(error)
            write_whole(file.with_name("patch.diff"), self._code[arm.patch].patch)
        return None

    def _refused(self, arms: Sequence[Arm]) -> dict[str, str]:
        """{arm: why its options or its signal's file would stop its cells}, asked of the code that its cells run."""
        found: dict[str, str] = {}
        for patch in dict.fromkeys(arm.patch for arm in arms):
            asked = [arm for arm in arms if arm.patch == patch and (patch or any(".py:" in s for s in arm.signals))]
            if asked:
                files = {str(options_file(self.folder, arm)): arm.name for arm in asked}
                answers = _checked([*files, *["--allow_code"] * self.allow_code], self._code[patch] if patch else None)
                under = f" under {patch.name}" if patch else ""
                found |= {files[file]: f"{reason}{under}" for file, reason in answers.items()}
        return found

    def check_same(self) -> None:
        """Refuse to change what was declared once a cell has begun; arms may be added, at the price of Holm."""
        copy = self.folder / FILE
        rows = [*self.folder.glob("*/seed_*/metrics.jsonl"), *trials_folder(self.folder).glob("*/seed_*/metrics.jsonl")]
        begun = {path.parents[1].name for path in rows}
        if not copy.is_file() or not begun:
            return
        try:
            before, now = read_toml(copy, limit=MB, inside=self.folder, error=ConfigError), self.experiment.table
            arms = dict(before.get("arms", {}))
        except (ConfigError, ValueError, TypeError) as error:
            raise ConfigError(f"{copy} is damaged: {error}; put the experiment's file in its place") from None
        changed = [key for key in {**before, **now} if key != "arms" and before.get(key) != now.get(key)]
        changed += [f"arms.{arm}" for arm, own in arms.items() if arm in begun and now["arms"].get(arm) != own]
        if changed:
            more = "; more seeds later are declared as looks" * bool({"seeds", "looks"} & set(changed))
            raise ConfigError(
                f"{self.folder} holds an experiment that declared otherwise in {', '.join(changed)} and has begun; "
                f"give another name or --out{more}"
            )

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Snapshot]:
        """Run until every cell has ended, failed ones once; waits for cells that other runners have.

        stop: asked twice a second; then cells are asked to save, and Stopped is raised. However this ends, no process
        or job is left; only those of a cluster outlive a runner that is killed, and the next one watches them.
        """
        try:
            while True:
                self._collect()
                if stop():
                    break
                busy = self._start_what_fits()
                yield self.snapshot()
                if not busy:
                    break
                time.sleep(LOOK_EVERY)
        finally:
            self._end_all()
            self.executor.close()
            self.results.write()
        left = [cell.name for cell in self.cells if self._state(cell) not in (*ENDED, "failed")]
        if left:
            raise Stopped(
                f"stopped with {len(left)} of {len(self.cells)} cells to finish; run the same command again to continue"
            )

    def _start_what_fits(self) -> bool:
        """Start cells as long as there is room; whether anything is left to wait for."""
        busy = bool(self._started)
        for cell in self.cells:
            if cell.name in self._tried or self._rows[cell.name].state(False) in ENDED:
                continue
            busy = True
            if self._waits(cell):
                continue
            widths = [self._rows[name].cell.n_embd for name in self._started]
            if not self.packing.fits(cell.n_embd, widths):
                break
            if worker := self.executor.find(cell):
                self._watch(cell, worker)
            elif claim := Claim.take(cell.folder):
                if self._rows[cell.name].look().state(False) in ENDED:  # by another runner since the last look
                    claim.release()
                elif not self._start(cell, claim):
                    break
        return busy

    def _replayed(self, cell: Cell) -> Rows | None:
        """The rows of the run whose norms a placebo takes."""
        of = self.experiment.replayed.get(cell.arm.name)
        return self._rows[f"{of}/seed_{cell.seed}"] if of else None

    def _waits(self, cell: Cell) -> bool:
        """Whether a placebo's arm has not ended at this seed. Where it failed, the placebo says what it lacks."""
        rows = self._replayed(cell)
        if rows is None or rows.state(False) in ENDED or rows.look().state(False) in ENDED:
            return False
        return rows.cell.name not in self._tried or rows.cell.name in self._started

    def _start(self, cell: Cell, claim: Claim) -> bool:
        """Whether a worker was started, which then has the claim."""
        worker = None
        try:
            if worker := self.executor.start(cell, claim, self.code(cell), self.words(cell, self._free_slot())):
                self._watch(cell, worker)
        finally:
            if worker is None:
                claim.release()
        return worker is not None

    def code(self, cell: Cell) -> PatchedPackage | None:
        """The code that a cell runs; None for the package in use."""
        return self._code[cell.arm.patch] if cell.arm.patch else None

    def words(self, cell: Cell, slot: int) -> list[str]:
        """What `gptlab` is started with for a cell."""
        arm = cell.arm
        words = ["train", "--config", str(options_file(self.folder, arm)), "--seed", str(cell.seed)]
        words += ["--out", str(cell.folder), "--resume", "auto"] + ["--allow_code"] * self.allow_code
        for key, value in self.packing.options(cell.n_embd, slot).items():
            words += [f"--{key}", value] if key not in arm.options else []
        if rows := self._replayed(cell):
            words += ["--signal.placebo_of", str(rows.cell.folder)]
            words += ["--signal.placebo_match", self.experiment.placebo_match]
        if arm.name in self.experiment.replayed.values():  # every update's norm has to be on record
            words += ["--dose_every", "1"]
        return words

    def _free_slot(self) -> int:
        return min(set(range(len(self._started) + 1)) - {one.slot for one in self._started.values()})

    def _watch(self, cell: Cell, worker: Worker) -> None:
        self._started[cell.name] = _Started(worker, self._free_slot())
        self._tried.add(cell.name)
        if cell.name not in self.ran:
            self.ran.append(cell.name)

    def _collect(self) -> None:
        """Take leave of the workers that have ended, and write the results."""
        for name, one in list(self._started.items()):
            if not one.worker.over():
                continue
            rows, end = self._rows[name].look(), one.worker.close()
            if rows.state(False) in ("waiting", "stopped"):
                if self.executor.again(rows.cell):
                    self._tried.discard(name)
                elif end:
                    with open_append(rows.cell.folder / OUTPUT) as file:
                        file.write(f"\ngptlab: {end}\n".encode())
            del self._started[name]
            self.results.write()

    def _end_all(self) -> None:
        """Ask the workers that are left to stop, wait, and kill what does not."""
        for one in self._started.values():
            one.worker.stop()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not all(one.worker.over() for one in self._started.values()):
            time.sleep(0.05)
        for name, one in list(self._started.items()):
            if not one.worker.over():
                one.worker.kill()
            one.worker.close()
            self._rows[name].look()
            del self._started[name]

    def snapshot(self) -> Snapshot:
        """The cells as they stand now."""
        now, left, speeds = time.monotonic(), 0, dict.fromkeys(self._started, 0.0)
        for cell in self.cells:
            rows, one = self._rows[cell.name], self._started.get(cell.name)
            if rows.state(False) not in ENDED:
                rows.look()
            if one and rows.step:
                speeds[cell.name] = one.steps_per_second(rows.step, now)
            if cell.name not in self._tried or one:
                left += max(0, cell.steps - rows.step)
        cells = tuple(
            progress(self._rows[cell.name], self._state(cell), speeds.get(cell.name, 0.0)) for cell in self.cells
        )
        return Snapshot(cells, _seconds(left, sum(speeds.values())))

    def _state(self, cell: Cell) -> State:
        rows = self._rows[cell.name]
        state = rows.state(running=rows.state(False) not in ENDED and claimed(cell))
        if state == "failed" and (cell.name not in self._tried or cell.name in self._started):
            return "stopped" if rows.step else "waiting"  # that was before: it is about to be tried again
        return state


def _checked(words: Sequence[str], code: PatchedPackage | None) -> dict[str, str]:
    """{options file: why it cannot be trained with} as a process with that code finds it; see cli/train.py: check."""
    folder = code.unpack() if code else None
    try:
        command = python_command("gptlab.cli.train:check", *words, code=folder, ends_with_us=True)
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        lines = done.stderr.strip().splitlines() or [how_it_ended(done.returncode)]
        return {file: f"its code does not run: {lines[-1]}" for file in words if not file.startswith("--")}


def progress(rows: Rows, state: State, steps_per_second: float = 0.0) -> Progress:
    """What a cell's rows say of it in a state, and how long it takes at that speed."""
    loss = rows.val_loss if state == "finished" else rows.loss
    reason = rows.reason if state in ("failed", "diverged") else None
    left = (rows.cell.steps - rows.step) / steps_per_second if steps_per_second else None
    return Progress(rows.cell, state, rows.step, loss, rows.dose, reason, left)


def standing(experiment: Experiment, folder: Path) -> Snapshot:
    """The cells of an experiment as their folders show them, whoever runs them; seconds_left by their own speeds.

    Its trials come first, where it has any.
    """
    cells, speed, left = [], 0.0, 0.0
    trials = cells_of(trial_experiment(experiment), trials_folder(folder)) if experiment.tune else []
    for cell in [*trials, *cells_of(experiment, folder)]:
        rows = Rows(cell).look()
        state = rows.state(running=claimed(cell))
        batch = cell.arm.count("total_batch_tokens", experiment.preset)
        own = rows.tokens_per_second or 0.0 if state == "running" else 0.0
        cells.append(progress(rows, state, own / batch))
        left += (cell.steps - rows.step) * batch * (state not in (*ENDED, "failed"))
        speed += own
    return Snapshot(tuple(cells), _seconds(left, speed))


def _seconds(left: float, speed: float) -> float | None:
    return 0.0 if not left else left / speed if speed else None


@dataclass
class TunedRunner(_Runner):
    """Like `Runner`, with the trials' cells first. seeds: of the verdict; trials always run on all of theirs.

    choices: {arm: what its trials chose}, once all of them have ended.
    """

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
        """Write what trials and cells need, and check all arms; raises ConfigError as `Runner.prepare` does."""
        self.verdict.prepare()
        self.trials.prepare()

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
        """All cells as they stand now; the cells' time is estimated from the trials' as long as these run."""
        trials, verdict = self.trials.snapshot(), self.verdict.snapshot()
        seconds = verdict.seconds_left
        if not self.choices:
            left, then = _steps_left(trials), _steps_left(verdict)
            seconds = trials.seconds_left * (left + then) / left if trials.seconds_left and left else None
        return Snapshot((*trials.cells, *verdict.cells), seconds)


def _steps_left(snapshot: Snapshot) -> int:
    return sum(one.cell.steps - one.step for one in snapshot.cells if one.state not in ENDED)
