"""One session of a run: where it begins, a model built or restored, records written as they come, checkpoints saved.

A run begins in a new folder, where it was stopped, or not at all because it is finished or another run's. With other
options, data or code it is no longer the run that it says it is, and is refused with the difference, a line each; with
`--despite` it continues, and the difference stands in config.json from then on, so that `gptlab compare` shows it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gptlab
from gptlab.data.batches import TrainingWindows, ValidationWindows
from gptlab.data.corpus import Corpus
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import CheckpointError, GptlabError
from gptlab.model.fast_cpu import install
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.weights import check_moments, check_stored
from gptlab.options import flatten
from gptlab.processes import environment as child_environment
from gptlab.processes import package
from gptlab.runs import checkpoint
from gptlab.runs.executor import applied
from gptlab.runs.folder import RunFolder
from gptlab.runs.init_weights import frozen_listener, initial_model, jitter, weights_digest
from gptlab.runs.records import read_config, replayed_norms, rows_sha256
from gptlab.signals.registry import file_hash, without_folders
from gptlab.training.config import FIXED_IF_DETERMINISTIC, FREE_ON_RESUME, TrainingConfig
from gptlab.training.loop import Record, rehearse, train
from gptlab.training.optimizer import build_optimizer
from gptlab.training.parallel import compile_blocks, shard_blocks
from gptlab.training.presets import command_of
from gptlab.training.state import TrainingState


@dataclass(frozen=True)
class Beginning:
    """folder: the run's; checkpoint: where to continue from; finished: the summary of a run that needs nothing more."""

    folder: str
    checkpoint: str | None = None
    finished: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def begin(
    config: TrainingConfig, corpus: Corpus, environment: Mapping[str, Any], *, despite: bool = False, attempt: int = 0
) -> tuple[RunFolder, Beginning]:
    """Take the run's folder as its only writer and find where to start.

    despite: continue a run of other options, data or code, and record what differs. attempt: how often torchrun has
    restarted this command. Raises CheckpointError if the folder holds another run (with the difference) or what is no
    run's, if `--resume must` finds nothing to continue, if no checkpoint of it is whole, or if it finished before and
    its checkpoints are gone.
    """
    launch = environment.get("launch") if attempt else None
    folder = RunFolder(_free(Path(config.folder), launch) if config.resume == "never" else config.folder)
    if config.resume == "must" and not folder.exists():
        raise CheckpointError(f"--resume must: expected a run in {folder.path}, found none; check --out")
    summary, _ = _look(folder, config, corpus, despite)
    if summary:
        return folder, Beginning(str(folder.path), finished=summary)
    folder.refuse_foreign()
    folder.lock()
    try:
        summary, changed = _look(folder, config, corpus, despite)
        if summary:  # by the process that the lock was waited for
            folder.close()
            return folder, Beginning(str(folder.path), finished=summary)
        checkpoint.remove_debris(folder.checkpoints)
        found, notes = _where_to_continue(folder, config)
        if found is None and folder.begun() and (step := folder.finished_at()):
            raise CheckpointError(
                f"{folder.path} finished at step {step} and has no checkpoint to continue from; "
                "give another --out, or --resume never for a new folder"
            )
        made_of = made_of_what(config, corpus)
        step = found.step if found else 0
        if history := _despite(folder, changed, step):
            made_of["despite"] = history
        environment = {**environment, **repeated_by(config), **made_elsewhere(folder, environment, step)}
        if environment.get("earlier", [{}])[-1].get("until_step") == step > 0:
            notes.append("until here it was made by other software or elsewhere; environment.json keeps both")
        folder.record("config.json", made_of)
        folder.record("environment.json", environment)
        folder.open_records(**(found.state["records"] if found else {}))
        if changed:
            folder.write("event", step, {"event": "despite", "differences": changed})
            notes.append("continuing despite:" + "".join(f"\n  {line}" for line in changed))
    except BaseException:
        folder.close()
        raise
    return folder, Beginning(str(folder.path), str(found.folder) if found else None, notes=tuple(notes))


def _where_to_continue(folder: RunFolder, config: TrainingConfig) -> tuple[checkpoint.Verified | None, list[str]]:
    """The checkpoint and notes of `RunFolder.newest_whole`; where that fails the run's last row says why."""
    try:
        found, notes = folder.newest_whole()
        if config.resume == "must" and found is None:
            raise CheckpointError(
                f"--resume must: {folder.path} has no checkpoint yet; use --resume auto to start it again"
            )
        return found, notes
    except CheckpointError as error:
        folder.append_event({"event": type(error).__name__, "text": str(error)})
        raise


def _look(
    folder: RunFolder, config: TrainingConfig, corpus: Corpus, despite: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """(the summary if the folder's run is finished, what makes it another than the one asked for, one line each).

    Neither of a run that never made a step: it can be any. Raises CheckpointError if it is another, with `despite` only
    where a checkpoint of it cannot fit.
    """
    if not folder.begun():
        return None, []
    if lines := changes(folder, config, corpus):
        refuse(folder, config, lines, despite)
    return folder.finished(config.steps), lines


def _free(path: Path, launch: str | None) -> Path:
    """`path`, or with -2, -3, ... the first that holds no run.

    launch: torchrun's name for this start, where it has restarted the command; the unfinished run of that name,
    which is the newest there is, then continues.
    """
    candidate, n, last = path, 1, None
    while RunFolder(candidate).exists():
        n, last = n + 1, candidate
        candidate = path.with_name(f"{path.name}-{n}")
    if launch and last:
        run = RunFolder(last)
        if run.recorded("environment.json").get("launch") == launch and not run.finished(run.config().steps):
            return last
    return candidate


FIXED = ("tokenizer", "block_size", "n_layer", "n_embd", "share_blocks", "optimizer")
"""Options that decide which tensors there are: with another of these a checkpoint does not fit."""
PASSING = ("launch", "reasons", "earlier", "commit", "command")
"""What environment.json says of a session alone."""


def made_of_what(config: TrainingConfig, corpus: Corpus) -> dict[str, Any]:
    """What config.json records of a run."""
    found: dict[str, Any] = {"gptlab": gptlab.__version__, "options": flatten(config), "data": corpus.identity()}
    own = {"code": _code(config), "patch": applied(), "replayed": _norms(config), "listener": _listener(config)}
    return found | {key: value for key, value in own.items() if value}


def changes(folder: RunFolder, config: TrainingConfig, corpus: Corpus) -> list[str]:
    """What makes of the folder's run another than the one asked for, one line each."""
    lines, before = differences(folder.config(), config), read_config(folder.path)
    files = {os.path.basename(str(name)): file for name, file in (before.get("code") or {}).items()}
    if files != {os.path.basename(name): file for name, file in _code(config).items()}:
        lines.append("code: a signal's file has changed since the run began")
    if before.get("replayed") != _norms(config):
        lines.append("signal.placebo_of: the norms of that run are not those that the run began with")
    if before.get("listener") != _listener(config):
        lines.append("signal.listener: who replies is not who did when the run began")
    if before.get("patch") != applied():
        lines.append("patch: the run was made by this code under another patch, or under none")
    return lines + [f"data: {line}" for line in corpus.grew_from(before["data"])]


def differences(before: TrainingConfig, now: TrainingConfig) -> list[str]:
    """What makes `now` another run than `before`, a line an option; more steps and FREE_ON_RESUME are no difference."""
    old, new = without_folders(flatten(before)), without_folders(flatten(now))
    free = FREE_ON_RESUME - (FIXED_IF_DETERMINISTIC if before.deterministic else frozenset())
    return [
        f"{key}: the run has {old[key]!r}, you ask for {new[key]!r}"
        for key in old
        if key not in free and old[key] != new[key] and not (key == "steps" and new[key] > old[key])
    ]


def refuse(folder: RunFolder, config: TrainingConfig, differences: list[str], despite: bool) -> None:
    """Raise CheckpointError with the differences of the folder's run; despite: only where a checkpoint cannot fit."""
    listed = "\n  ".join(differences)
    if not despite:
        raise CheckpointError(
            f"{folder.path} holds another run; use --resume never for a new folder, give --out, or continue it "
            f"--despite:\n  {listed}"
        )
    old, new = flatten(folder.config()), flatten(config)
    if unfit := [key for key in FIXED if old[key] != new[key]]:
        raise CheckpointError(
            f"--despite: a checkpoint of {folder.path} does not fit another {', '.join(unfit)}; "
            f"use --resume never for a new folder, or give --out:\n  {listed}"
        )


def _despite(folder: RunFolder, changed: list[str], step: int) -> list[dict[str, Any]]:
    """All that the run was resumed despite of: what config.json says, and what has changed now, at `step`."""
    before = read_config(folder.path).get("despite", []) if folder.begun() else []
    return [*before, {"step": step, "differences": changed}] if changed else before


def made_elsewhere(folder: RunFolder, environment: Mapping[str, Any], step: int) -> dict[str, Any]:
    """{"earlier": what environment.json said of each session before, up to its last step}, where those differ from now.

    A run that is resumed after an update, or on another machine, was made by both.
    """
    if not step:
        return {}
    before: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):  # nothing hangs on it
        before = folder.recorded("environment.json")
    earlier = before.pop("earlier", None)
    earlier = [one for one in earlier if isinstance(one, dict)] if isinstance(earlier, list) else []
    before["gptlab"] = folder.recorded("config.json").get("gptlab")
    now = {**environment, "gptlab": gptlab.__version__}
    if any(before.get(key) != value for key, value in now.items() if key not in PASSING):
        earlier = [*earlier, {"until_step": step, **before}]
    return {"earlier": earlier} if earlier else {}


def repeated_by(config: TrainingConfig) -> dict[str, str]:
    """{"command": what makes the run again, "commit": of a clone of gptlab, with -dirty where it was changed}.

    Nothing is compared by them: runs that differ in these alone are of one recipe.
    """
    found = {"command": command_of(config)}
    if (clone := package().parent / ".git").exists():
        command = ["git", "-C", str(clone.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # nothing hangs on it
            head = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=True, text=True,
                env=child_environment(without="GIT_", GIT_OPTIONAL_LOCKS="0"),
            )  # fmt: skip
            found["commit"] = head.stdout.strip()
    return {key: value for key, value in found.items() if value}


def _code(config: TrainingConfig) -> dict[str, str]:
    """SHA-256 of the file of every signal that is a user's own."""
    return {signal.name: file_hash(signal.name) for signal in config.signals if signal.is_code}


def _norms(config: TrainingConfig) -> str | None:
    """SHA-256 of the norms that a placebo takes from another run, wherever that lies."""
    norms = replayed_norms(config)
    return hashlib.sha256(json.dumps(norms).encode()).hexdigest() if norms else None


def _listener(config: TrainingConfig) -> str | None:
    """SHA-256 of the weights that reply in a conversation, wherever they lie; None where the model itself does."""
    model = frozen_listener(config)
    return weights_digest(model) if model else None


class Session:
    """folder: where to write, None on ranks that do not; compiled: what became of torch.compile, in words.

    Raises CheckpointError where the weights to start from, or to resume from, do not fit.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder | None,
        checkpoint_path: str | None,
        compute: ComputeConfig,
        data: dict[str, Any],
        world: World,
    ) -> None:
        self.config, self.folder, self.compute, self.data, self.world = config, folder, compute, data, world
        self._replayed = replayed_norms(config)
        try:
            if config.init_from and not checkpoint_path:  # a resumed run no longer needs its source
                model = initial_model(str(config.init_from), config.shape, config.seed, config.tokenizer)
            else:
                model = GPT(config.shape, config.seed)
            listener = frozen_listener(config)
        except GptlabError as error:
            self._write_error(0, error)
            raise
        if config.init_jitter and not checkpoint_path:
            jitter(model, config.init_jitter, config.seed)
        model.to(compute.device)
        listener = listener.to(compute.device) if listener else None
        self.sharded = config.parallel == "fsdp" and world.size > 1
        install(model, compute, copies=not self.sharded)
        if self.sharded:
            shard_blocks(model, world, compute)
        self.compiled = compile_blocks(model, compute, partial(rehearse, model, config, world, compute, listener))
        self.state = TrainingState(model, build_optimizer(model, config), listener=listener)
        self._saved = -1
        if checkpoint_path:
            self._restore(Path(checkpoint_path), config.shape)
            self._saved = self.state.step
        self._final: dict[str, Any] = {}
        self._speeds: list[float] = []

    def _restore(self, path: Path, shape: GPTConfig) -> None:
        """Take over the checkpoint that rank 0 chose; where blocks are sharded, each process reads its own rows."""
        if self.sharded:
            checkpoint.load_sharded(path, shape, self.state, self.world)
            return
        found = checkpoint.load(path)
        check_stored(shape, found.weights, found.folder / checkpoint.WEIGHTS)
        check_moments(found.weights, found.moments, found.folder / checkpoint.MOMENTS)
        self.state.restore(found.weights, found.moments, found.state["scalars"])

    def records(
        self,
        windows: TrainingWindows,
        validation: ValidationWindows,
        *,
        peak: float,
        bytes_per_token: float,
        stop: Callable[[], bool],
        sample: Callable[[TrainingState], dict[str, Any]],
    ) -> Iterator[Record]:
        """Train, and give every record when it is written, a checkpoint when it is saved; a failure ends the rows.

        sample: makes a sample's row, on the rank that writes.
        """
        records = train(
            self.state, self.config, windows, validation, self.world, self.compute,
            peak=peak, bytes_per_token=bytes_per_token, replayed=self._replayed, stop=stop,
        )  # fmt: skip
        try:
            for record in self.world.name_lost_ranks(records):
                if record.kind == "checkpoint":
                    self._save(record)
                    yield record
                    continue
                if record.kind == "sample":
                    if self.folder is None or self.sharded:  # generating text needs whole blocks
                        continue
                    record = Record("sample", record.step, sample(self.state))
                elif record.kind == "val":
                    self._final = record.values
                else:
                    self._speeds.append(record.values["tokens_per_second"])
                if self.folder:
                    self.folder.write(record.kind, record.step, record.values)
                yield record
        except GptlabError as error:
            self._write_error(self.state.step, error)
            raise

    def _write_error(self, step: int, error: GptlabError) -> None:
        if self.folder:
            self.folder.write("event", step, {"event": type(error).__name__, "text": str(error)})

    def _save(self, record: Record) -> None:
        if self._saved == record.step or not (self.folder or self.sharded):
            return
        checkpoints = self.folder.checkpoints if self.folder else None
        rest = self._state_json(self.folder, record) if self.folder else {}
        if self.sharded:
            checkpoint.save_sharded(checkpoints, self.state, rest, self.world)
        elif checkpoints:
            checkpoint.save(checkpoints, *self.state.tensors(), rest)
        self._saved = record.step

    def _state_json(self, folder: RunFolder, record: Record) -> dict[str, Any]:
        return {
            "format": checkpoint.FORMAT,
            "scalars": self.state.scalars(),
            "cursor": record.values["cursor"],
            "rng": {"seed": self.config.seed, "scheme": "keyed by purpose, seed and step"},
            "options": flatten(self.config),
            "data": self.data,
            "records": folder.written(),
        }

    def finish(self, validation: ValidationWindows, seconds: float, first_step: int, peak: float) -> dict[str, Any]:
        """Write the summary as the run's last row and give it."""
        config, steps = self.config, self.state.step - first_step
        if self.folder and not steps:  # killed before its summary was written: the rows have the session before
            for row in self.folder.rows():
                if row["kind"] == "val":
                    self._final = row
                elif row["kind"] == "train":
                    self._speeds.append(row["tokens_per_second"])
        speeds = sorted(self._speeds)
        speed = speeds[len(speeds) // 2] if speeds else None
        summary: dict[str, Any] = {
            "event": "finished",
            "loss": self._final.get("loss"),
            **({"excess_loss": self._final["excess_loss"]} if "excess_loss" in self._final else {}),
            "bits_per_byte": self._final.get("bits_per_byte"),
            "unigram_loss": validation.unigram_loss,
            "bigram_loss": validation.bigram_loss,
            "validation_sha256": validation.sha256,
            "clipped_share": self.state.clipped / max(1, self.state.step),
            "tokens": self.state.step * config.total_batch_tokens,
            "tokens_per_second": speed,
            "mfu": speed * self.state.model.config.flops_per_token / peak if speed else None,
            "seconds": seconds,
            "steps_in_this_session": steps,
        }
        if self.folder:
            summary["rows_sha256"] = rows_sha256(self.folder.rows())
            self.folder.write("event", self.state.step, summary)
        return {"step": self.state.step, "kind": "event", **summary}
