"""The measures of noise as tables of text, for the terminal and the page. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptlab.analysis.noise.labels import THRESHOLDS
from gptlab.analysis.noise.options import TRUE_LOSS
from gptlab.analysis.tables import Table, interval, number

SHOWN = (0.5, 0.9)
"""The τ of the table of labels."""


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The branch test, gradients in total and by block, labels by block, collapse by block."""
    signals = result["signals"]
    tested = {name: signal["branch"] for name, signal in signals.items() if "branch" in signal}
    if tested:
        plan = next(iter(tested.values()))
        yield Table(
            f"Bias or noise, by branches of {plan['steps']} updates over {len(plan['seeds'])} data seeds, nats",
            ("signal", "verdict", "bias", "noise", "dose"),
            [(name, *_branched(branch)) for name, branch in tested.items()],
        )
        yield Table("Why", ("signal", "reason"), [(name, branch["reason"]) for name, branch in tested.items()])
    yield Table(
        f"Gradients of {result['groups']} groups of {result['group']} sequence(s), against the true loss",
        ("signal", "alignment", "under Adam's moment", "noise scale"),
        [(name, *_directions(signal["total"])) for name, signal in signals.items()],
    )
    others = {name: signal for name, signal in signals.items() if name != TRUE_LOSS}
    if others:
        yield Table(
            "What adding it does to the true loss's gradient",
            ("signal", "progress left", "variance, times", "dose"),
            [(name, *_effects(signal["total"])) for name, signal in others.items()],
        )
        yield Table(
            "Alignment by block",
            ("block", *others),
            [
                (f"block {j + 1}", *(aligned(signal["blocks"][j]["alignment"]) for signal in others.values()))
                for j in range(result["n_layer"])
            ],
        )
    quality = result["label_quality"]
    yield Table(
        f"Verdicts as labels, on {quality['tokens']:,} validation tokens; at τ, how many and how many right",
        ("block", "loss", "right", "mean p_m", *_headers(), "ECE"),
        [row for j, block in enumerate(quality["blocks"], 1) for row in _labels(j, block)],
    )
    yield Table(
        "Collapse",
        ("block", "entropy", "p_m 5%", "p_m 50%", "p_m 95%", "logit RMS", "argmax entropy"),
        [(f"block {j}", *_collapse(block)) for j, block in enumerate(result["collapse"], 1)],
    )


def _branched(branch: Mapping[str, Any]) -> tuple[str, ...]:
    """Verdict, bias and noise with their intervals, and dose of a branch test."""
    parts = (branch["bias"], branch["noise"])
    shown = (f"{part['value']:+.4f} ({interval(part['interval'])})" if part else "–" for part in parts)
    return branch["verdict"], *shown, number(branch["dose"], ".3f")


def aligned(alignment: Mapping[str, Any] | None) -> str:
    """An alignment with its interval; ~ stands before one whose lengths are not resolved.

    >>> aligned({"value": 0.25, "interval": [0.1, 0.4], "resolved": False})
    '~+0.25 [+0.10, +0.40]'
    """
    if alignment is None or alignment["value"] is None:
        return "–"
    low, high = alignment["interval"]
    return f"{'' if alignment['resolved'] else '~'}{alignment['value']:+z.2f} [{low:+z.2f}, {high:+z.2f}]"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What must be read beside the tables."""
    first, last = result["sequences"]
    lines = [
        f"step {result['step']:,}, seed {result['seed']}, {result['dtype']}; gradients of sequences {first:,} to "
        f"{last - 1:,} of {result['block_size']} tokens; noise scale in sequences",
        "– means nothing can be said; ~ an alignment whose lengths are not resolved: more --groups would",
    ]
    if not result["preconditioned"]:
        lines.append("no second moments here, so nothing under Adam")
    return lines


def _directions(total: Mapping[str, Any]) -> Iterator[str]:
    yield aligned(total["alignment"])
    yield aligned(total["preconditioned_alignment"])
    yield _with_interval(total["noise_scale"], total["noise_scale_interval"], ",.3g")


def _effects(total: Mapping[str, Any]) -> Iterator[str]:
    yield _with_interval(total["progress"], total["progress_interval"])
    yield _with_interval(total["variance"], total["variance_interval"])
    yield number(total["dose"], ".3f")


def _with_interval(value: float | None, bounds: list[float] | None, form: str = ".2f") -> str:
    """A figure with its interval, where it has one.

    >>> _with_interval(1.5, [1.25, 1.75]), _with_interval(1.0, None), _with_interval(None, None)
    ('1.50 [1.25, 1.75]', '1.00', '–')
    """
    ends = f" [{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else ""
    return number(value, form) + ends


def _headers() -> Iterator[str]:
    for threshold in SHOWN:
        yield f"τ {threshold:g}"
        yield "right"


def _labels(j: int, block: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, found in ((f"block {j}", block["raw"]), ("  tuned reader", block["tuned"])):
        if found is None:
            continue
        by_threshold = []
        for threshold in SHOWN:
            at = THRESHOLDS.index(threshold)
            by_threshold += [number(found["coverage"][at], ".1%"), number(found["precision"][at], ".1%")]
        shares = (f"{found[key]:.1%}" for key in ("accuracy", "confidence"))
        yield name, f"{found['loss']:.3f}", *shares, *by_threshold, f"{found['calibration_error']:.3f}"


def _collapse(block: Mapping[str, Any]) -> Iterator[str]:
    yield f"{block['entropy']:.3f}"
    for quantile in ("0.05", "0.5", "0.95"):
        yield f"{block['p_max'][quantile]:.3f}"
    yield f"{block['logit_rms']:.3g}"
    yield f"{block['argmax_entropy']:.3f}"
