"""A comparison, or measures of noise, as tables of text: for terminal, Markdown and page. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gptlab.analysis.noise import THRESHOLDS, TRUE_LOSS

ALSO_SHOWN = {
    "placebo": "against its placebo",
    "tempered": "at each one's best temperature",
    "equal_flops": "at equal FLOPs",
    "equal_time": "at equal time",
}


NO_DELTA = (
    "no delta was declared, so that only a difference of exactly 0 is called none; declare the largest difference that "
    "does not matter before the runs: delta = X in the experiment's file, or --delta X"
)


class Table(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The verdicts, their reasons, other differences and the passports, where there are any."""
    arms = result["arms"]
    yield Table(
        f"{result['experiment']} at step {result['step']:,}: loss minus its baseline's, nats, paired by seed",
        ("arm", "verdict", "difference", "95% interval", "n", "p (Holm)", "more seeds", "dose"),
        [
            (
                name + (" (control)" if arm["control"] else ""),
                arm["verdict"],
                number(arm["difference"], "+z.4f"),
                interval(arm["interval"]),
                str(arm["n"]),
                number(arm["p_holm"], ".2g"),
                number(arm["more_seeds"], "d"),
                number(arm["dose"], ".3f"),
            )
            for name, arm in arms.items()
        ],
    )
    yield Table("Why", ("arm", "against", "reason"), [(n, a["baseline"], a["reason"]) for n, a in arms.items()])
    rows = [(name, *(_difference(arm.get(key)) for key in ALSO_SHOWN)) for name, arm in arms.items()]
    if any(arm.get(key) for arm in arms.values() for key in ALSO_SHOWN):
        yield Table(
            "At equal cost, and against the placebo: difference and 95% interval, nats",
            ("arm", *ALSO_SHOWN.values()),
            rows,
        )
    if any("parameters" in arm["passport"] for arm in arms.values()):
        rows = [(name, _passport(arm["passport"])) for name, arm in arms.items()]
        yield Table("How far to trust it", ("arm", "passport"), rows)
    if tuning := result.get("tuning"):
        seeds = ", ".join(map(str, tuning["seeds"] or ())) or "–"
        yield Table(
            f"What {number(tuning['trials'], 'd')} trials an arm chose, on seeds {seeds}",
            ("arm", "options", "factors", "loss", "note"),
            [(name, *_choice(arm)) for name, arm in tuning["arms"].items()],
        )


def _choice(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Options, their factors of what was declared, the best trial's loss, and what to know of them."""
    options = ", ".join(f"{key} {format(v, 'g') if isinstance(v, float) else v}" for key, v in found["options"].items())
    factors = [(what, found[key]) for what, key in (("learning rate", "learning_rate"), ("dose", "dose"))]
    shown = ", ".join(f"{what} x{factor:g}" for what, factor in factors if factor is not None)
    notes = [f"as {found['follows']}", *found["notes"]] if found["follows"] else found["notes"]
    return options or "as declared", shown or "–", number(found["loss"], ".4f"), "; ".join(notes)


def _tuned(found: Mapping[str, Any]) -> str:
    """How a passport's learning rate was come by."""
    if not found.get("tuned"):
        return ""
    best = f", best of {found['trials']} trials" if found.get("trials") else ""
    whose = f" of {found['follows']}" if best and found.get("follows") else ""
    return f" (tuned for each arm{best}{whose})"


def _difference(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "–"
    text = f"{number(found['difference'], '+z.4f')} ({interval(found['interval'])})"
    return f"{text} against {found['against']}, at {found['ratio']:.2f} of its cost" if "against" in found else text


def _passport(found: Mapping[str, Any]) -> str:
    return ", ".join(
        [
            f"{number(found.get('parameters'), ',')} parameters",
            f"{number(found.get('tokens_per_parameter'), '.3g')} tokens each",
            f"{number(found.get('epochs'), '.3g')} epochs",
            f"vocabulary {number(found.get('vocabulary'), ',')}",
            f"{number(found.get('depth'), 'd')} blocks",
            f"learning rate {number(found.get('learning_rate'), 'g')}{_tuned(found)}",
            f"{number(found.get('clipped_share'), '.0%')} of steps clipped",
            f"noise floor {number(found['noise_floor'], '.4f')}",
            f"seed correlation {number(found['seed_correlation'], '.2f')}",
            f"minimum detectable effect (80% power) {number(found['smallest_difference'], '.4f')}",
        ]
    )


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What must be read with the tables: differences that were overridden, runs that were left out."""
    floor = number(result["noise_floor"], ".4f")
    looks = f"; looks at {', '.join(map(str, result['looks']))} seeds" if result["looks"] else ""
    declared = NO_DELTA if result["delta"] is None else f"delta {result['delta']:g}"
    lines = [f"{declared}; seed-to-seed SD of {result['baseline']}: {floor}{looks}"]
    lines += [f"COMPARED DESPITE: {line}" for line in result["undeclared"]]
    return lines + [f"left out: {line}" for line in result["notes"]]


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as a Markdown page part."""
    parts = [table_in_markdown(table) for table in tables(result)]
    parts.append("\n".join(f"- {_escaped(line)}" for line in remarks(result)))
    return "\n\n".join(parts) + "\n"


def table_in_markdown(table: Table) -> str:
    """One table, its title over it."""
    lines = [_row(table.header), "|" + "---|" * len(table.header), *map(_row, table.rows)]
    return f"**{_escaped(table.title)}**\n\n" + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\`*_|<>[]#":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")


def number(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def interval(bounds: Sequence[float | None]) -> str:
    return "–" if bounds[0] is None else f"{number(bounds[0], '+z.4f')} to {number(bounds[1], '+z.4f')}"


SHOWN = (0.5, 0.9)
"""The τ of the table of labels."""


def noise_tables(result: Mapping[str, Any]) -> Iterator[Table]:
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


def noise_remarks(result: Mapping[str, Any]) -> list[str]:
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
