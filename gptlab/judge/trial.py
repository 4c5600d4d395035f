"""Trials: the baseline's files with an idea's changes, a run of them at a seed, and the metric that it gave.

A command's baseline is the HEAD of its git repository, or the files of a folder that is none. Each run has a copy of
its own, made for it and removed after it. What git does not track, and files above LARGE, are links to where they are:
data sets, mostly. A preset's baseline is the package gptlab itself; its runs are ordinary run folders.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError, DataError, shown
from gptlab.files import (
    GB,
    MB,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    read_toml,
    take_lock,
    write_json,
    write_whole,
)
from gptlab.judge.lab import ENVIRONMENT_SEED, FIRST_FRESH, Lab, last_in_csv, last_match, may_change, read_metric
from gptlab.options import as_typed, table_options
from gptlab.processes import environment, how_it_ended, package, python_command
from gptlab.runs.executor import LARGEST_PATCH, MARK, Packing, PatchedPackage, apply_patch
from gptlab.runs.experiment_spec import Arm
from gptlab.runs.records import last_row
from gptlab.training.config import TrainingConfig

LARGE = 64 * MB
"""Larger files are linked, not copied."""
SKIPPED = {".git", "__pycache__"}
STOP_PATIENCE = 30.0

File = tuple[str, bytes]
"""Of a tree: "file", "program" or "link", and its content or where it leads."""


@dataclass(frozen=True)
class Subject:
    """What is run: the baseline, or the baseline with an idea. lines: (added, removed) by the idea.

    files: {name: file}; links: {name: where it lies}; options: of a preset's runs.
    """

    files: Mapping[str, File]
    links: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    patch: bytes = b""
    lines: tuple[int, int] = (0, 0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the files and options."""
        found = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode())
        for name in sorted(self.files):
            kind, content = self.files[name]
            found.update(f"{name}\0{kind}\0{len(content)}\0".encode(errors="surrogateescape") + content)
        return found.hexdigest()

    def write(self, folder: Path) -> None:
        """Write the tree; what an idea has put in place of a link stands."""
        for name, (kind, content) in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "link":
                path.symlink_to(os.fsdecode(content))
            else:
                path.write_bytes(content)
                path.chmod(0o755 if kind == "program" else 0o644)
        for name, target in self.links.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(folder / name):
                (folder / name).symlink_to(target)

    def changed_by(self, idea: Path, lab: Lab) -> Subject:
        """With the idea in `idea`, a diff or an arm's TOML; raises ConfigError that says why it cannot be tried."""
        if idea.suffix != ".toml":
            return self._patched(idea, read_idea(idea), lab)
        if not lab.config.baseline.preset:
            raise ConfigError(f"{idea}: an arm's options need a preset as the baseline; expected a diff")
        options, patch = arm_options(idea)
        found = self._patched(patch, read_idea(patch), lab) if patch else self
        if file := signal_file(options):
            options["signal.name"] = str(_kept(file, lab)) + ":" + options["signal.name"].rpartition(":")[2]
        return replace(found, options={**self.options, **options})

    def _patched(self, patch: Path, content: bytes, lab: Lab) -> Subject:
        with tempfile.TemporaryDirectory(prefix="gptlab_judge_") as scratch:
            folder = Path(scratch, "tree")
            folder.mkdir()
            Subject(self.files).write(folder)
            apply_patch(patch, content, folder, "the baseline")
            files = dict(read_files(folder))
        changed = [name for name in {**self.files, **files} if files.get(name) != self.files.get(name)]
        if not changed:
            raise ConfigError(f"{patch}: it changes nothing")
        for name in sorted(changed):
            _check_change(patch, name, files.get(name), lab)
        text = content.decode(errors="replace").splitlines()
        added = sum(line.startswith("+") and not line.startswith("+++ ") for line in text)
        removed = sum(line.startswith("-") and not line.startswith("--- ") for line in text)
        return replace(self, files=files, patch=self.patch + content, lines=(added, removed))


def read_idea(patch: Path) -> bytes:
    """A file of an idea; raises ConfigError where it cannot be read."""
    try:
        return read_bytes(patch, limit=LARGEST_PATCH, error=ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"expected an idea at {patch}, found none; give a diff or an arm's TOML") from None


def _check_change(patch: Path, name: str, file: File | None, lab: Lab) -> None:
    """Raise ConfigError that names a file which an idea may not change, or not so."""
    if not may_change(name, lab.config.paths):
        raise ConfigError(f"{patch}: it changes {shown(name)}, which [paths] of lab.toml does not allow")
    if file and (file[0] == "link" or b"\0" in file[1]):
        raise ConfigError(f"{patch}: expected changes of text files, found a {file[0]} that is none: {shown(name)}")
    if lab.config.baseline.preset and (not re.fullmatch(r"gptlab/(\w+/)*\w+\.py", name) or not file):
        raise ConfigError(f"{patch}: expected changes of Python files in gptlab/, found one of {shown(name)}")


def arm_options(idea: Path) -> tuple[dict[str, Any], Path | None]:
    """The options and the patch of an arm's TOML, as [arms.NAME] of an experiment file has them."""
    try:
        table = dict(read_toml(idea, limit=MB, error=ConfigError))
    except FileNotFoundError:
        raise ConfigError(f"expected an idea at {idea}, found none; give a diff or an arm's TOML") from None
    patch = table.pop("patch", None)
    options = table_options({**table.pop("options", {}), **table}, TrainingConfig)
    if patch is not None and (not isinstance(patch, str) or Path(patch).name != patch):
        raise ConfigError(f"{idea}: patch: expected the name of a file next to it, found {shown(patch)}")
    if (file := signal_file(options)) and file.name != str(file):
        raise ConfigError(f"{idea}: signal.name: expected the name of a file next to it, found {shown(str(file))}")
    if file:
        options["signal.name"] = str(idea.parent / options["signal.name"])
    return options, idea.parent / patch if patch else None


def signal_file(options: Mapping[str, Any]) -> Path | None:
    """The file of a user's own signal among an arm's options, FILE.py:FUNCTION."""
    path, _, function = str(options.get("signal.name", "")).rpartition(":")
    return Path(path) if path.endswith(".py") and function else None


def _kept(file: Path, lab: Lab) -> Path:
    """A copy in the lab, named by its content: what an idea was tried with stays as it was."""
    content = read_idea(file)
    path = lab.folder / "signals" / hashlib.sha256(content).hexdigest() / file.name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return path


def read_files(
    folder: Path, *, skip: Path | None = None, large: dict[str, Path] | None = None
) -> Iterator[tuple[str, File]]:
    """The files of a folder by their names, but for `skip` and what nobody wrote; into `large` go those above LARGE."""
    for root, folders, names in os.walk(folder):
        inner = [name for name in folders if name not in SKIPPED and Path(root, name) != skip]
        folders[:] = sorted(name for name in inner if not Path(root, name).is_symlink())
        for path in sorted(Path(root, name) for name in {*names, *inner} - {*folders}):
            name, found = path.relative_to(folder).as_posix(), path.lstat()
            if stat.S_ISLNK(found.st_mode):
                inside = folder.resolve() in path.resolve().parents
                yield name, ("link", os.fsencode(os.readlink(path) if inside else path.resolve()))
            elif stat.S_ISREG(found.st_mode):
                if large is not None and found.st_size > LARGE:
                    large[name] = path
                else:
                    yield name, ("program" if found.st_mode & 0o100 else "file", read_bytes(path, limit=GB))


def baseline_of(lab: Lab) -> Subject:
    """The baseline as it is now, without what the lab has adopted; raises ConfigError where git fails."""
    if lab.config.baseline.preset:
        files = {f"gptlab/{name}": file for name, file in read_files(package()) if name != MARK}
        return Subject(files, options=lab.options)
    links: dict[str, Path] = {}
    if not (lab.tree / ".git").exists():
        found = read_files(lab.tree, skip=lab.folder, large=links)
        return Subject({name: file for name, file in found if not name.endswith((".diff", ".patch"))}, links)
    with tempfile.TemporaryDirectory(prefix="gptlab_judge_") as scratch:
        where = environment(without="GIT_", GIT_INDEX_FILE=f"{scratch}/index")
        _git(lab.tree, where, "read-tree", "HEAD")
        _git(lab.tree, where, "checkout-index", "--all", f"--prefix={scratch}/tree/")
        files = dict(read_files(Path(scratch, "tree")))
        untracked = _git(lab.tree, where, "ls-files", "--others", "--directory", "-z")
    for name in os.fsdecode(untracked).split("\0"):
        path = lab.tree / name.rstrip("/")
        if name and path != lab.folder and path not in lab.folder.parents and lab.folder not in path.parents:
            links[name.rstrip("/")] = path
    return Subject(files, links)


def _git(folder: Path, where: Mapping[str, str], *words: str) -> bytes:
    try:
        return subprocess.run(["git", *words], cwd=folder, env=where, check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise ConfigError("the baseline is a git repository, which needs the program git; install it") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise ConfigError(f"baseline.path {folder}: git {words[0]} failed: {reason}; commit something first") from None


@dataclass(frozen=True)
class Outcome:
    """What a run came to. state: "ok", "broken" or "diverged"; value: its metric, second: on the second slice."""

    state: str
    value: float | None = None
    second: float | None = None
    reason: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Trials:
    """Runs subjects at seeds, each once for all judges of a lab. stop: whether to give up; `run` is then None.

    allow_code: whether a preset's runs may have a signal of the user's own.
    """

    lab: Lab
    machine: str
    stop: Callable[[], bool]
    allow_code: bool = False

    def key(self, subject: Subject) -> str:
        """The name of a subject's runs: of all that decides what they give."""
        base = self.lab.config.baseline
        return hashlib.sha256(f"{subject.digest}\n{base.command}\n{base.preset}\n{self.machine}".encode()).hexdigest()[
            :24
        ]

    def cached(self, subject: Subject, seed: int) -> Outcome | None:
        """What is known of a run."""
        try:
            return Outcome(**read_json(self.folder(subject, seed) / "result.json", inside=self.lab.folder))
        except (FileNotFoundError, DataError, TypeError):
            return None

    def run(self, subject: Subject, seed: int, slot: int = 0) -> Outcome | None:
        """Run, or wait for the judge that does; None where it was stopped."""
        folder = self.folder(subject, seed)
        while not self.stop():
            if found := self.cached(subject, seed):
                return found
            if claim := take_lock(folder / ".claim"):
                with claim:
                    return self.cached(subject, seed) or self._run(subject, seed, folder, slot)
            time.sleep(0.2)
        return None

    def folder(self, subject: Subject, seed: int) -> Path:
        """Of a run: of a preset's an ordinary run folder."""
        return self.lab.folder / "cells" / self.key(subject) / f"seed_{seed}"

    def _run(self, subject: Subject, seed: int, folder: Path, slot: int) -> Outcome | None:
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            if self.lab.config.baseline.preset:
                argv = self._preset(subject, seed, folder, slot)
            else:
                subject.write(work)
                argv = ["sh", "-c", self.lab.config.baseline.command.replace("{seed}", str(seed))]
            ended = self._supervised(argv, seed, folder)
            if ended is None:
                return None
            if not self.lab.config.baseline.preset:
                outcome = self._read(folder, ended)
            elif (outcome := read_preset(folder, ended)).state == "ok" and seed >= FIRST_FRESH:
                outcome = replace(outcome, second=self._second(subject, folder))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if outcome.state != "broken":  # that may be the machine's doing: it is tried again where somebody asks
            write_json(folder / "result.json", vars(outcome))
        return outcome

    def _preset(self, subject: Subject, seed: int, folder: Path, slot: int) -> list[str]:
        """The command of an ordinary run of gptlab, with the subject's code where it is not the package in use."""
        preset = self.lab.config.baseline.preset
        options = {"preset": preset, "sample_every": 0, **subject.options}
        width = Arm("", subject.options).count("n_embd", preset)
        options = {**Packing.of_this_machine(self.lab.config.plan.jobs).options(width, slot), **options}
        if subject.patch:
            texts = {name: file[1].decode(errors="surrogateescape") for name, file in subject.files.items()}
            mark = hashlib.sha256(subject.patch).hexdigest() + "\n"
            shutil.move(PatchedPackage({**texts, f"gptlab/{MARK}": mark}).unpack(), folder / "work" / "code")
        words = [word for key, value in options.items() for word in (f"--{key}", as_typed(value))]
        words += ["--seed", str(seed), "--out", str(folder), "--resume", "auto", *["--allow_code"] * self.allow_code]
        return python_command("gptlab.cli.main:main", "train", *words, code=_code_of(subject, folder))

    def _second(self, subject: Subject, folder: Path) -> float | None:
        """The loss on as many validation tokens behind those that training reads; None where there are none."""
        tokens = str(read_json(folder / "config.json", inside=folder)["options"]["eval_tokens"])
        words = ["eval", str(folder), "--tasks", "val", "--json", "--eval_tokens", tokens, "--skip_tokens", tokens]
        command = python_command(
            "gptlab.cli.main:main", *words, "--threads", "1", code=_code_of(subject, folder), ends_with_us=True
        )
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return None if done.returncode else float(parse_json(done.stdout.decode())["tasks"]["val"]["loss"])

    def _supervised(self, argv: Sequence[str], seed: int, folder: Path) -> Mapping[str, Any] | None:
        """How a command ended, as supervisor.py says; None where it was stopped."""
        result, plan = folder / "ended.json", self.lab.config.plan
        result.unlink(missing_ok=True)
        safe_path = {key: value for key, value in os.environ.items() if key == "PYTHONSAFEPATH"}
        asked = {
            "argv": argv, "cwd": str(folder / "work"), "environment": {**safe_path, ENVIRONMENT_SEED: str(seed)},
            "output": str(folder / "output.txt"), "result": str(result), "time_limit": plan.time_limit,
            "disk": int(plan.disk * GB), "parent": os.getpid(),
        }  # fmt: skip
        command = python_command("gptlab.processes:supervise", json.dumps(asked))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None:
            if self.stop():
                process.send_signal(signal.SIGTERM)
                process.wait(STOP_PATIENCE)
            time.sleep(0.05)
        try:
            ended = read_json(result, inside=folder)
        except FileNotFoundError:
            raise DataError(
                f"{folder}: the process that watched the run {how_it_ended(process.returncode)}; run again"
            ) from None
        return None if ended["ended"] == "stopped" else ended

    def _read(self, folder: Path, ended: Mapping[str, Any]) -> Outcome:
        """The outcome of a command."""
        output = read_bytes(folder / "output.txt", inside=folder).decode(errors="replace")
        metric = self.lab.config.metric
        value = last_in_csv(folder / "work", metric.csv) if metric.csv else read_metric(output, metric)
        second = last_match(output, metric.second) if metric.second else None
        cost = {"seconds": ended["seconds"], "peak_bytes": ended["peak_bytes"]}
        if value is not None and not math.isfinite(value):
            return Outcome("diverged", reason=f"its metric is {value}", **cost)
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        ending = f"; its last line: {shown(last, 160)}" if last else "; it printed nothing"
        code = ended["code"]
        if ended["ended"] or code:
            code = 128 - code if 128 < code <= 192 else code  # sh says so that a signal ended what it ran
            return Outcome("broken", reason=(ended["ended"] or how_it_ended(code)) + ending, **cost)
        if value is None:
            return Outcome("broken", reason=f"it printed no metric that [metric] of lab.toml finds{ending}", **cost)
        return Outcome("ok", value, second if second is not None and math.isfinite(second) else None, **cost)


def _code_of(subject: Subject, folder: Path) -> Path | None:
    """Where a run's own code lies while it is run."""
    return folder / "work" / "code" if subject.patch else None


def read_preset(folder: Path, ended: Mapping[str, Any]) -> Outcome:
    """The outcome of a run of gptlab: its last validation loss, nats a token."""
    cost = {"seconds": ended["seconds"], "peak_bytes": ended["peak_bytes"]}
    row = last_row(folder)[0] if (folder / "metrics.jsonl").exists() else None
    if ended["code"] == 0 and row and row.get("event") == "finished":
        return Outcome("ok", float(row["loss"]), **cost)
    lines = read_text(folder / "output.txt").strip().splitlines() or [how_it_ended(ended["code"])]
    message = next(
        (line.removeprefix("gptlab: ") for line in reversed(lines) if line.startswith("gptlab: ")), lines[-1]
    )
    return Outcome("diverged" if ended["code"] == 4 else "broken", reason=ended["ended"] or message, **cost)
