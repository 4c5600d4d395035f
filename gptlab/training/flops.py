"""The arithmetic of a run's updates with its judges, as its options tell it. No torch here."""

from __future__ import annotations

from gptlab.model.config import GPTConfig
from gptlab.training.config import TrainingConfig


def flops_per_token(config: TrainingConfig) -> float:
    """Arithmetic of one training token with its judges, in FLOPs; measuring doses is left out.

    A judge's block takes 2 FLOPs a weight and 8·C·T of attention scores for the gradient to its input, its reading
    4·V·C for logits and their gradient. A live judge's weights take 2 more each, a placebo one more backward pass.
    """
    C, T, V = config.n_embd, config.block_size, config.vocab_size
    plain = GPTConfig(T, V, config.n_layer, config.n_head, C).flops_per_token
    total = float(plain)
    for signal in config.signals:
        if signal.weight == 0:
            continue
        judges, _ = signal.judges_at(0, config.n_layer, config.seed)
        live = signal.evaluator == "live"
        block = 24 * C * C + 8 * C * T + 24 * C * C * live
        reading = (4 + 2 * live) * V * C * signal.positions
        total += len(judges) * (block + reading) + (2 / 3 * plain if signal.control == "placebo" else 0)
    return total


def run_flops(config: TrainingConfig) -> float:
    """Of all of a run's updates."""
    return config.steps * config.total_batch_tokens * flops_per_token(config)
