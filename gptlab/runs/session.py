"""One session of a run: a model built or restored, the loop's records written as they come, checkpoints saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptlab.data.batches import TrainingWindows, ValidationWindows
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import GptlabError
from gptlab.model.fast_cpu import install
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.weights import check_moments, check_stored
from gptlab.options import flatten
from gptlab.runs import checkpoint, sharded
from gptlab.runs.folder import RunFolder
from gptlab.runs.init_weights import initial_model, jitter
from gptlab.training.compilation import compile_blocks
from gptlab.training.config import TrainingConfig
from gptlab.training.loop import Record, train
from gptlab.training.optimizer import build_optimizer
from gptlab.training.sharding import shard_blocks
from gptlab.training.state import TrainingState


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
        shape = config.shape
        drawn = checkpoint_path or not config.init_from  # a resumed run no longer needs its source
        try:
            source = None if drawn else str(config.init_from)
            model = initial_model(source, shape, config.seed, config.tokenizer) if source else GPT(shape, config.seed)
        except GptlabError as error:
            self._write_error(0, error)
            raise
        if config.init_jitter and not checkpoint_path:
            jitter(model, config.init_jitter, config.seed)
        model.to(compute.device)
        self.compiled = compile_blocks(model, compute)
        self.sharded = config.parallel == "fsdp" and world.size > 1
        install(model, compute, copies=not self.sharded)
        if self.sharded:
            shard_blocks(model, world, compute)
        self.state = TrainingState(model, build_optimizer(model, config))
        self._saved = -1
        if checkpoint_path:
            self._restore(Path(checkpoint_path), shape)
            self._saved = self.state.step
        self._final: dict[str, Any] = {}
        self._speeds: list[float] = []

    def _restore(self, path: Path, shape: GPTConfig) -> None:
        """Take over the checkpoint that rank 0 chose; where blocks are sharded, each process reads its own rows."""
        if self.sharded:
            sharded.load(path, shape, self.state, self.world)
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
            peak=peak, bytes_per_token=bytes_per_token, stop=stop,
        )  # fmt: skip
        try:
            for record in self.world.watched(records):
                if record.kind == "checkpoint":
                    self._save(record)
                    yield record
                    continue
                if record.kind == "sample":
                    if self.folder is None or self.sharded:  # writing on needs whole blocks
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
        cut = self.sharded
        if self._saved == record.step or not (self.folder or cut):
            return
        if cut:
            rest = self._beside_tensors(self.folder, record) if self.folder else {}
            sharded.save(self.folder.checkpoints if self.folder else None, self.state, rest, self.world)
        elif self.folder:
            weights, moments = self.state.tensors()
            checkpoint.save(self.folder.checkpoints, weights, moments, self._beside_tensors(self.folder, record))
        self._saved = record.step

    def _beside_tensors(self, folder: RunFolder, record: Record) -> dict[str, Any]:
        """state.json of a checkpoint."""
        return {
            "format": checkpoint.FORMAT,
            "scalars": self.state.scalars(),
            "cursor": record.values["cursor"],
            "rng": {"seed": self.config.seed, "scheme": "keyed by purpose, seed and step"},
            "options": flatten(self.config),
            "data": self.data,
            "records": folder.written(),
        }

    def finish(self, validation_hash: str, seconds: float, first_step: int, peak: float) -> dict[str, Any]:
        """Write the summary as the run's last row and give it."""
        config, steps = self.config, self.state.step - first_step
        if self.folder and not steps:  # killed before its summary was written: the rows tell of the session before
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
            "validation_sha256": validation_hash,
            "clipped_share": self.state.clipped / max(1, self.state.step),
            "tokens": self.state.step * config.total_batch_tokens,
            "tokens_per_second": speed,
            "mfu": speed * self.state.model.config.flops_per_token / peak if speed else None,
            "seconds": seconds,
            "steps_in_this_session": steps,
        }
        if self.folder:
            self.folder.write("event", self.state.step, summary)
        return {"step": self.state.step, "kind": "event", **summary}
