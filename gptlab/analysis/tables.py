"""A comparison as tables of text, the same for the terminal and for Markdown. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
