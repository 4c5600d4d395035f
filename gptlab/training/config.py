"""Every option of a run, with default and unit: what `--help` shows, a TOML file may set and config.json records."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptlab.errors import ConfigError, did_you_mean, shown
from gptlab.options import check_sizes, option
from gptlab.signals.config import EXACT_VOCABULARY, SignalConfig
from gptlab.signals.registry import CONVERSATION

if TYPE_CHECKING:
    from gptlab.model.config import GPTConfig

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class TrainingConfig:
    """A run. The defaults are the preset shakespeare-tiny's but for min_lr; training/presets.py has the presets."""

    preset: str = option(
        "shakespeare-tiny",
        "where the other options' defaults come from",
        group="Run",
        shown="shakespeare-tiny; gpt2-124m with a GPU",
    )
    depth: int | None = option(
        None, "the rung of preset ladder: 2, 3, 4, 6 or 8 blocks, from which its other options follow", unit="blocks"
    )
    out: str | None = option(None, "the run's folder", shown="log/<preset>-<signal>-<seed>")
    seed: int = option(1, "decides initial weights, data order and every draw")
    resume: Literal["auto", "never", "must"] = option(
        "auto", "resume an unfinished run (auto), insist on one (must), or start a new folder (never)"
    )
    init_from: str | None = option(None, "start from the weights of a run or a Hugging Face GPT-2 folder")
    init_jitter: float = option(0.0, "relative Gaussian noise on the initial weights, for a twin run")

    data: str = option("shakespeare", "a corpus by name, or a folder of shards", group="Data")
    tokenizer: Literal["bytes", "gpt2"] = option("bytes", "how text becomes tokens")
    block_size: int = option(64, "length of a training window", unit="tokens")
    batch_size: int = option(16, "the most sequences per micro-batch and process", unit="sequences")
    total_batch_tokens: int = option(1024, "one update's batch over all processes and micro-batches", unit="tokens")

    n_layer: int = option(4, "blocks", group="Model")
    n_head: int = option(4, "attention heads a block")
    n_embd: int = option(128, "width of the hidden states", unit="channels")
    share_blocks: bool = option(False, "use one block n_layer times over")

    steps: int = option(1300, "updates to make", unit="updates", group="Optimisation")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "AdamW, or Muon for the blocks' matrices and AdamW for the rest"
    )
    beta1: float = option(0.9, "of AdamW's first moment")
    beta2: float = option(0.95, "of AdamW's second moment; a longer memory (0.99) suits small batches")
    learning_rate: float = option(5e-3, "the peak, after warmup")
    min_lr: float | None = option(None, "where the schedule ends", shown="learning_rate/10")
    warmup_steps: int = option(100, "linear rise of the learning rate; may exceed steps", unit="updates")
    schedule: Literal["cosine", "wsd", "constant"] = option("cosine", "fall of the learning rate after warmup")
    weight_decay: float = option(0.1, "on matrices only")
    grad_clip: float = option(1.0, "longest gradient, over all parameters; 0 = never clipped")
    dropout: float = option(
        0.0,
        "share of entries that embeddings, attention and MLP leave out of the residual stream, in updates only",
    )
    gradient_noise: float = option(0.0, "noise on the gradient, drawn again in every update, as a share of |g_CE|")
    gradient_noise_shape: Literal["isotropic", "batch"] = option(
        "isotropic", "alike in all parameters, or the scaled difference of two unread batches' gradients"
    )
    gradient_bias: float = option(0.0, "a fixed random direction added to the gradient, as a share of |g_CE|")
    target_flip: float = option(0.0, "share of the true loss's targets that are made wrong")
    target_flip_to: Literal["uniform", "shuffled", "argmax"] = option(
        "uniform", "what a wrong target is: any, another place's, or the likeliest"
    )

    signal: SignalConfig = field(default_factory=SignalConfig)
    also: tuple[SignalConfig, ...] = ()
    """Further signals, each with its own weight: the second and later [[signal]] tables of a TOML file."""

    log_every: int = option(20, "print a line; 0 = never, as for all intervals", unit="updates", group="Records")
    eval_every: int = option(650, "validation loss; also after the last step", unit="updates")
    eval_tokens: int = option(131072, "validation tokens that are read, the first of the pinned set", unit="tokens")
    checkpoint_every: int = option(650, "save; also after the last step", unit="updates")
    sample_every: int = option(1300, "write a sample, with each block's best next token", unit="updates")
    dose_every: int = option(100, "measure the signal's dose", unit="updates")
    dose_first: int = option(
        100, "with dose_every, also in each of the first updates of the run and of a signal", unit="updates"
    )
    log: str = option("none", "also log figures with tensorboard, wandb or trackio; several with commas")
    log_project: str = option("gptlab", "project of wandb and trackio")
    log_name: str = option("", "name of the run in wandb and trackio", shown="its folder's")
    noise_every: int = option(0, "log noise scale and alignment, from 32 sequences", unit="updates")

    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="Machine")
    dtype: Literal["auto", "fp32", "tf32", "bf16"] = option(
        "auto", "of the matmuls; weights and moments stay fp32; tf32 on GPUs only"
    )
    threads: int = option(0, "threads a process", unit="threads", shown="its share of the cores")
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile; auto = only where it pays")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "every process holds the model, or its rows of every block (FSDP2)"
    )
    activation_checkpointing: bool = option(
        False, "keep a block's output only, and compute its inner activations again on the way back"
    )
    deterministic: bool = option(
        False, "the same bits from any number of processes, on a GPU too: sums in a fixed order; needs threads"
    )
    rank_timeout: int = option(
        600, "wait so long for another process of the run before it counts as lost", unit="seconds"
    )

    def __post_init__(self) -> None:
        self._check_each()
        self._check_together()
        if self.parallel == "fsdp":
            self._check_sharded()
        for signal in self.signals:
            self._check_signal(signal)

    def _check_each(self) -> None:
        """Raise ConfigError for an option that is out of its own range."""
        check_sizes(
            self, "block_size", "batch_size", "total_batch_tokens", "n_layer", "n_head", "n_embd", "steps",
            "eval_tokens", "rank_timeout",
        )  # fmt: skip
        for name in (
            "warmup_steps", "weight_decay", "grad_clip", "log_every", "eval_every", "checkpoint_every", "sample_every",
            "dose_every", "dose_first", "noise_every", "threads", "learning_rate", "min_lr", "gradient_noise",
            "gradient_bias", "init_jitter",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be at least 0, found {value}")
        for name in ("beta1", "beta2", "dropout", "target_flip"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(f"log: expected none, {', '.join(TRACKERS)} or several with commas, "
                                  f"found {shown(name)}{did_you_mean(name, TRACKERS)}")  # fmt: skip

    def _check_together(self) -> None:
        """Raise ConfigError for options that contradict each other: what each asks for cannot hold at once.

        What another option leaves without effect is no contradiction: target_flip_to where no target is flipped, a
        warmup that outlasts the run.
        """
        if self.total_batch_tokens % self.block_size:
            nearest = max(1, round(self.total_batch_tokens / self.block_size)) * self.block_size
            raise ConfigError(
                f"total_batch_tokens must be a multiple of block_size {self.block_size}, "
                f"found {self.total_batch_tokens}; try {nearest}"
            )
        if self.depth is not None and self.preset != "ladder":
            raise ConfigError(
                f"depth {self.depth} chooses a rung of preset ladder, found preset {self.preset}; "
                "add --preset ladder, or give --n_layer"
            )
        if self.eval_tokens < self.block_size:
            raise ConfigError(
                f"eval_tokens must hold one window of block_size {self.block_size}, found {self.eval_tokens}; raise it"
            )
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd must be a multiple of n_head {self.n_head}, found {self.n_embd}")
        if self.schedule != "constant" and self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ConfigError(
                f"min_lr must be at most learning_rate {self.learning_rate}, from which {self.schedule} falls "
                f"to it, found {self.min_lr}; lower it, or leave it out for learning_rate/10"
            )
        if self.deterministic and not self.threads:
            raise ConfigError(
                "deterministic needs a fixed number of threads for each process, on which rounding depends; "
                "add --threads 1, or more"
            )

    def _check_signal(self, signal: SignalConfig) -> None:
        """Raise ConfigError for a signal that this model or this run leaves nothing to do."""
        if self.n_layer < 2 and (signal.is_code or signal.kind == "reading"):
            raise ConfigError("a signal needs a block that judges another: n_layer must be at least 2, found 1")
        signal.judges_at(0, self.n_layer, self.seed)  # refuses judges that this model does not have
        if signal.name == CONVERSATION:
            self._check_conversation(signal)
        if signal.name == "prefix_token_prediction" and self.tokenizer == "bytes":
            raise ConfigError("prefix_token_prediction needs tokens that begin with other tokens, and bytes do not; "
                              "add --tokenizer gpt2, or leave it out")  # fmt: skip
        if signal.start >= self.steps:
            raise ConfigError(
                f"signal.start must be below steps {self.steps}, found {signal.start}: {signal.name} would never begin"
            )
        if signal.placebo_of and len(self.signals) > 1:
            raise ConfigError(
                f"signal.placebo_of is for a run with one signal, whose norms it takes, found {len(self.signals)}"
            )
        if signal.placebo_match == "update" and self.optimizer != "adamw":
            raise ConfigError(
                f"signal.placebo_match update compares steps of adamw, found optimizer {self.optimizer}; "
                "use --signal.placebo_match gradient"
            )
        if signal.control != "flipped" and (signal.flip, signal.flip_to) != (1.0, "uniform"):
            raise ConfigError(
                f"signal.flip and signal.flip_to are for signal.control flipped, found control {signal.control}; "
                "add --signal.control flipped, or leave them out"
            )

    def _check_conversation(self, signal: SignalConfig) -> None:
        """Raise ConfigError for a conversation that this model's windows, vocabulary or figures have no room for."""
        room = self.block_size - signal.say - signal.reply + 1
        if room < signal.turns:
            raise ConfigError(
                f"signal.turns must be at most {max(0, room)} in windows of block_size {self.block_size} with room for "
                f"signal.say {signal.say} and signal.reply {signal.reply}, found {signal.turns}"
            )
        if signal.exact and self.vocab_size > EXACT_VOCABULARY:
            raise ConfigError(
                f"signal.exact enumerates a vocabulary of at most {EXACT_VOCABULARY}, found {self.vocab_size}; "
                "leave it out, or use --tokenizer bytes"
            )
        if sum(other.name == CONVERSATION for other in self.signals) > 1:
            raise ConfigError("a run logs the figures of one conversation, found several; leave all but one out")

    def _check_sharded(self) -> None:
        """Raise ConfigError for what needs whole matrices, or gradients, on one process."""
        for name, found, needs in (
            ("optimizer muon", self.optimizer == "muon", "whole matrices"),
            ("deterministic", self.deterministic, "whole gradients, to sum them in one fixed order"),
            ("noise_every", self.noise_every > 0, "whole gradients of single sequences"),
        ):
            if found:
                raise ConfigError(f"{name} needs {needs}, and parallel fsdp keeps rows; use --parallel ddp")

    @cached_property
    def signals(self) -> tuple[SignalConfig, ...]:
        """The signals that are switched on; none for the baseline."""
        return tuple(s for s in (self.signal, *self.also) if s.name != "none")

    @cached_property
    def injects_noise(self) -> bool:
        return self.gradient_noise > 0 or self.gradient_bias > 0

    @cached_property
    def reads_for_noise(self) -> bool:
        """Whether an update reads two further batches, whose gradients' difference is its noise."""
        return self.gradient_noise > 0 and self.gradient_noise_shape == "batch"

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where figures are logged in addition to metrics.jsonl."""
        return () if self.log == "none" else tuple(dict.fromkeys(name.strip() for name in self.log.split(",")))

    @property
    def undoable_flip(self) -> float:
        """The share of uniformly flipped targets whose effect on predictions can be undone; 0 where none can."""
        traces = self.target_flip < 1 - 1 / self.vocab_size  # from there on a target says nothing of the truth
        return self.target_flip if traces and self.target_flip_to == "uniform" else 0.0

    @cached_property
    def sequences(self) -> int:
        """Sequences of one update, over all ranks and micro-batches."""
        return self.total_batch_tokens // self.block_size

    def micro_batch(self, processes: int) -> int:
        """Sequences of a micro-batch: the most that divide a process's part of an update and exceed no batch_size; with
        `deterministic` the same for any number of processes.

        Raises ConfigError where the update cannot be shared equally.
        """
        sharers = 1 if self.deterministic else processes
        if self.sequences % sharers:
            raise ConfigError(
                f"an update of {self.sequences} sequences cannot be shared equally by {sharers} processes; "
                f"make total_batch_tokens a multiple of {sharers} x block_size"
            )
        mine = self.sequences // sharers
        size = next(b for b in range(min(self.batch_size, mine), 0, -1) if mine % b == 0)
        units = self.sequences // size
        if self.deterministic and units % processes:
            fit = [n for n in range(1, units + 1) if units % n == 0]
            raise ConfigError(
                f"deterministic: an update of {self.sequences} sequences is {units} micro-batches of {size} "
                f"(batch_size), which {processes} processes cannot share; use "
                f"{', '.join(map(str, fit))} of them, or for a new run another --batch_size"
            )
        return size

    @cached_property
    def final_learning_rate(self) -> float:
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: GPT-2's 50,257 are padded to a multiple of 128, which matmuls like."""
        from gptlab.data.tokenizers import TOKENIZERS

        return TOKENIZERS[self.tokenizer].rows

    @property
    def shape(self) -> GPTConfig:
        """The model's size."""
        from gptlab.model.config import GPTConfig

        return GPTConfig(
            self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd, share_blocks=self.share_blocks
        )

    @property
    def folder(self) -> str:
        name = self.signal.name
        if self.signal.is_code:  # a path to a file
            file, _, function = name.rpartition(":")
            name = f"{Path(file).stem}-{function}"
        rung = "" if self.depth is None else f"-{self.depth}"
        return self.out or f"log/{self.preset}{rung}-{name}-{self.seed}"


FREE_ON_RESUME = frozenset(
    {"out", "resume", "log", "log_every", "eval_every", "checkpoint_every", "sample_every", "noise_every", "dose_every"}
    | {"dose_first", "log_project", "log_name"}
    | {"batch_size", "device", "threads", "compile", "rank_timeout", "parallel", "activation_checkpointing"}
    | {"signal.placebo_of", "signal.listener"}  # the norms and the weights there may not, wherever they lie
)
"""What may change when a run is resumed; `steps` may grow. Everything else makes it another run."""

FIXED_IF_DETERMINISTIC = frozenset({"batch_size", "device", "threads", "compile"})
"""What may not change either where the same bits are asked for."""


def flops_per_token(config: TrainingConfig) -> float:
    """Arithmetic of one training token with its judges, in FLOPs; measuring doses is left out.

    A judge's block takes 2 FLOPs a weight and 8·C·T of attention scores for the gradient to its input, its reading
    4·V·C for logits and their gradient. A live judge's weights take 2 more each, a placebo one more backward pass.
    Noise of a batch's shape is that of two more batches.
    """
    C, T, V = config.n_embd, config.block_size, config.vocab_size
    plain = config.shape.flops_per_token
    total = float(plain)
    for signal in config.signals:
        if signal.weight == 0:
            continue
        judges, _ = signal.judges_at(0, config.n_layer, config.seed)
        if not signal.is_code and signal.kind == "objective":
            total += 6 * V * C  # logits, and their gradient in head and state
        live = signal.evaluator == "live"
        block = 24 * C * C + 8 * C * T + 24 * C * C * live
        reading = (4 + 2 * live) * V * C * signal.positions
        total += len(judges) * (block + reading) + (2 / 3 * plain if signal.control == "placebo" else 0)
    return total + 2 * plain * config.reads_for_noise


def run_flops(config: TrainingConfig) -> float:
    """Of all of a run's updates."""
    return config.steps * config.total_batch_tokens * flops_per_token(config)
