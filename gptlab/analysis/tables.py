"""A comparison, or measures of noise, as tables of text: for terminal, Markdown and page. Nothing is computed here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gptlab.analysis.noise import ALTERNATIVES, TEXT, THRESHOLDS, TRUE_LOSS
from gptlab.runs.experiment_spec import Metric

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


def _table(title: str, first: str, named: Mapping[str, Any], columns: Mapping[str, Callable[[Any], str]]) -> Table:
    """A row for each name, a column for each function of what it names."""
    rows = [(name, *(column(one) for column in columns.values())) for name, one in named.items()]
    return Table(title, (first, *columns), rows)


VERDICT_COLUMNS: dict[str, Callable[[Any], str]] = {
    "verdict": lambda arm: arm["verdict"],
    "mean": lambda arm: number(arm["loss"], ".4f"),
    "difference": lambda arm: number(arm["difference"], "+z.4f"),
    "95% interval": lambda arm: interval(arm["interval"]),
    "n": lambda arm: str(arm["n"]),
    "p (Holm)": lambda arm: number(arm["p_holm"], ".2g"),
    "more seeds": lambda arm: number(arm["more_seeds"], "d"),
    "dose": lambda arm: number(arm["dose"], ".3f"),
}


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The verdicts, their reasons, other differences and the passports, where there are any."""
    arms = result["arms"]
    metric = Metric(result["metric"], result["better"])
    unit = f", {metric.unit}" * bool(metric.unit)
    what = f"{metric.label} minus its baseline's{unit}"
    title = f"{result['experiment']} at step {result['step']:,}: {what}, {paired(arms)}"
    marked = {f"{name}{_brackets('control' * arm['control'], plateau(arm))}": arm for name, arm in arms.items()}
    names = {name: f"{name}{_brackets(plateau(arm))}" for name, arm in arms.items()}
    yield _table(title, "arm", marked, VERDICT_COLUMNS)
    yield _table("Why", "arm", arms, {"against": lambda arm: arm["baseline"], "reason": lambda arm: arm["reason"]})
    if any(arm.get(key) for arm in arms.values() for key in ALSO_SHOWN):
        title = f"At equal cost, and against the placebo: difference and 95% interval{unit}"
        rows = [(names[name], *(_difference(arm.get(key)) for key in ALSO_SHOWN)) for name, arm in arms.items()]
        yield Table(title, ("arm", *ALSO_SHOWN.values()), rows)
    if saved := {names[name]: arm["steps_saved"] for name, arm in arms.items() if arm.get("steps_saved")}:
        yield _table("Steps saved: how much earlier it is where its baseline ends", "arm", saved, {
            "steps": lambda found: f"{found['value']:+,.0f} of {found['of']:,}",
            "95% interval": lambda found: "{:+,.0f} to {:+,.0f}".format(*found["interval"]),
        })  # fmt: skip
    if any(_norms(arm) for arm in arms.values()):
        title = "Norm of its gradient, median (lowest to highest) over seeds and steps"
        columns = ("arm", *dict.fromkeys(key for arm in arms.values() for key in _norms(arm)))
        rows = [
            (name, *(found.get(key, "–") for key in columns[1:]))
            for name, arm in arms.items()
            if (found := _norms(arm))
        ]
        yield Table(title, columns, rows)
    if any("parameters" in arm["passport"] for arm in arms.values()):
        yield Table("How far to trust it", ("arm", "passport"), _passports(arms))
    if tuning := result.get("tuning"):
        seeds = ", ".join(map(str, tuning["seeds"] or ())) or "–"
        title = f"What {number(tuning['trials'], 'd')} trials an arm chose, on seeds {seeds}"
        rows = [(name, *_choice(arm)) for name, arm in tuning["arms"].items()]
        yield Table(title, ("arm", "options", "factors", "loss", "note"), rows)


def plateau(arm: Mapping[str, Any]) -> str:
    """How many runs of an arm, or of its baseline, are no better than frequencies of tokens, or of pairs."""
    marks = {"at_plateau": "at the plateau", "not_below_bigrams": "not below bigrams"}
    counts = [
        (arm.get(f"{prefix}{key}"), whose, mark)
        for prefix, whose in (("", ""), ("baseline_", " of its baseline"))
        for key, mark in marks.items()
    ]
    return ", ".join(f"{n} run{'s' * (n > 1)}{whose} {mark}" for n, whose, mark in counts if n)


def _brackets(*parts: str) -> str:
    return f" ({', '.join(filter(None, parts))})" if any(parts) else ""


def _norms(arm: Mapping[str, Any]) -> dict[str, str]:
    """How long an arm's gradient is against others, by column."""
    found = {
        "over its baseline's true one": arm.get("dose_of_baseline"),
        "over its placebo's": (arm.get("placebo") or {}).get("norm_ratio"),
        "change of Adam's step over its placebo's": (arm.get("placebo") or {}).get("step_ratio"),
    }
    return {key: "{median:.3g} ({lowest:.3g} to {highest:.3g})".format_map(one) for key, one in found.items() if one}


EFFECTS = {"better": "helps", "worse": "harms", "no difference": "makes no difference", "inactive": "is inactive"}


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The answer in plain words, one sentence for each arm that is no control."""
    found = [f"{name} {_effect(arm, result)}" for name, arm in result["arms"].items() if not arm["control"]]
    return found or [f"{name} (control) {_effect(arm, result)}" for name, arm in result["arms"].items()]


def _effect(arm: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What an arm does, by how much, over how many seeds, and what its placebo does."""
    effect = EFFECTS.get(arm["verdict"], "is undecided")
    if arm["difference"] is None:
        return f"{effect}: {arm['reason']}"
    low, high = arm["interval"]
    half = (high - low) / 2 if low is not None else 0.0
    digits = min(6, max(2, math.ceil(-math.log10(half)))) if half else 4
    unit = f" {unit}" if (unit := Metric(result["metric"], result["better"]).unit) else ""
    around = "" if low is None else f" [{low:z.{digits}f}, {high:z.{digits}f}]"
    text = (
        f"{effect}: {arm['loss']:.{digits}f} against {arm['baseline_loss']:.{digits}f}{unit}, difference "
        f"{arm['difference']:+z.{digits}f}{around}, {arm['n']} seed{'s' * (arm['n'] != 1)}{_brackets(plateau(arm))}"
    )
    name = (arm["placebo"] or {}).get("arm")
    placebo = result["arms"].get(name, {}).get("difference")
    if placebo is None or not arm["difference"]:
        return text
    share = placebo / arm["difference"]
    same = arm["difference"] * (1 if result["better"] == "lower" else -1) > 0
    does = "harms" if same == (share > 0) else "helps"
    if arm["verdict"] not in ("better", "worse"):  # times a difference that may be 0 says nothing
        return f"{text}; its placebo {does} by {abs(placebo):.{digits}f}"
    size = abs(share)
    times = f"{size:.0%} as much" if size < 0.95 else "as much" if size < 1.05 else f"{size:.1f} times as much"
    return f"{text}; its placebo {does} {'half as much' if 0.45 <= size <= 0.55 else times}"


def paired(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """How arms were compared, in words."""
    ways = [arm["paired"] for arm in arms.values()]
    return "paired by seed" if all(ways) else "paired by seed or not, as said" if any(ways) else "unpaired (Welch's t)"


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
    text = f"{number(found['difference'], '+z.4f')} ({interval(found['interval'])}){_brackets(plateau(found))}"
    return f"{text} against {found['against']}, at {found['ratio']:.2f} of its cost" if "against" in found else text


def _passports(arms: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What all arms' figures rest on, once, and of each arm what is its own."""
    parts = {name: _passport(arm["passport"]) for name, arm in arms.items()}
    first = next(iter(parts.values()))
    common = [part for part in first if len(parts) > 1 and all(part in found for found in parts.values())]
    own = {name: [part for part in found if part not in common] for name, found in parts.items()}
    rows = [(name, ", ".join(found)) for name, found in own.items() if found]
    return [("all arms", ", ".join(common)), *rows] if common else rows


def _passport(found: Mapping[str, Any]) -> list[str]:
    return [
        *(
            f"{number(found.get('parameters'), ',')} parameters",
            f"{number(found.get('tokens_per_parameter'), '.3g')} tokens each",
            f"{number(found.get('epochs'), '.3g')} epochs",
            f"vocabulary {number(found.get('vocabulary'), ',')}",
            f"{number(found.get('depth'), 'd')} blocks",
            f"learning rate {number(found.get('learning_rate'), 'g')}{_tuned(found)}",
            f"{number(found.get('clipped_share'), '.0%')} of steps clipped",
            f"seed-to-seed SD {number(found['noise_floor'], '.4f')}",
            f"seed correlation {number(found['seed_correlation'], '.2f')}",
            *([f"correlation with other arms' errors {r:.2f}"] if (r := found["arms_correlation"]) is not None else []),
            f"minimum detectable effect (80% power) {number(found['smallest_difference'], '.4f')}",
            *([_on_the_ladder(rungs)] if (rungs := found.get("rungs")) else []),
        ),
    ]


def _on_the_ladder(rungs: Mapping[str, Any]) -> str:
    depths = ", ".join(map(str, rungs["depths"]))
    return f"its sign holds at {rungs['holds']} of {rungs['of']} rungs of the ladder ({depths} blocks)"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What must be read with the tables: differences that were overridden, runs that were left out."""
    deviation = number(result["noise_floor"], ".4f")
    looks = f"; looks at {', '.join(map(str, result['looks']))} seeds" if result["looks"] else ""
    declared = NO_DELTA if result["delta"] is None else f"delta {result['delta']:g}"
    judged = "" if result["metric"] == "loss" else f"{result['metric']} is judged: {result['better']} is better; "
    lines = [f"{judged}{declared}; seed-to-seed SD of {result['baseline']}: {deviation}{looks}"]
    lines += [result["declared"]] if result.get("declared") else []
    lines += [f"COMPARED DESPITE: {line}" for line in result["undeclared"]]
    return lines + [f"left out: {line}" for line in result["notes"]]


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as a part of a Markdown page."""
    return in_markdown(tables(result), remarks(result))


def in_markdown(tables: Iterable[Table], lines: Iterable[str]) -> str:
    """Tables, and the lines to read with them, as a part of a Markdown page."""
    parts = [table_in_markdown(table) for table in tables]
    parts.append("\n".join(f"- {_escaped(line)}" for line in lines))
    return "\n\n".join(parts) + "\n"


def table_in_markdown(table: Table) -> str:
    """One table, its title over it."""
    lines = [_row(table.header), "|" + "---|" * len(table.header), *map(_row, table.rows)]
    return f"**{_escaped(table.title)}**\n\n" + "\n".join(lines)


def latex(tables: Iterable[Table]) -> str:
    """Tables for a paper, each a `table` of `booktabs`, with its title as the caption."""
    return "\n".join(map(_table_in_latex, tables))


def _table_in_latex(table: Table) -> str:
    rows = [" & ".join(map(_in_latex, row)) + r" \\" for row in (table.header, *table.rows)]
    columns = "l" + "r" * (len(table.header) - 1)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_in_latex(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:]]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


LATEX = {
    "\\": r"\textbackslash{}", "–": "--", "±": r"$\pm$", "≤": r"$\le$", "σ": r"$\sigma$", "τ": r"$\tau$", "²": "$^2$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "\n": " ", "×": r"$\times$",
    **{sign: f"\\{sign}" for sign in "{}$&#%_"},
}  # fmt: skip


def _in_latex(text: str) -> str:
    """Text that LaTeX sets as it is; a minus before a digit is one.

    >>> print(_in_latex("50% of a_b: -0.5"))
    50\\% of a\\_b: $-$0.5
    """
    escaped = "".join(LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\`*_|<>[]#":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")


def number(value: float | None, form: str = ",.4g") -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def interval(bounds: Sequence[float | None]) -> str:
    return "–" if bounds[0] is None else f"{number(bounds[0], '+z.4f')} to {number(bounds[1], '+z.4f')}"


SHOWN = (0.5, 0.9)
"""The τ of the table of labels."""
COLLAPSE_COLUMNS: dict[str, Callable[[Any], str]] = {
    "entropy": lambda block: f"{block['entropy']:.3f}",
    "p_m 5%": lambda block: f"{block['p_max']['0.05']:.3f}",
    "p_m 50%": lambda block: f"{block['p_max']['0.5']:.3f}",
    "p_m 95%": lambda block: f"{block['p_max']['0.95']:.3f}",
    "logit RMS": lambda block: f"{block['logit_rms']:.3g}",
    "argmax entropy": lambda block: f"{block['argmax_entropy']:.3f}",
}


def noise_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The branch test, gradients in total and by block, labels by block, collapse by block."""
    signals = result["signals"]
    if tested := {name: signal["branch"] for name, signal in signals.items() if "branch" in signal}:
        plan = next(iter(tested.values()))
        title = f"Bias or noise, by branches of {plan['steps']} updates over {len(plan['seeds'])} data seeds, nats"
        rows = [(name, *_branched(branch)) for name, branch in tested.items()]
        yield Table(title, ("signal", "verdict", "bias", "noise", "dose"), rows)
        yield _table("Why", "signal", tested, {"reason": lambda branch: branch["reason"]})
    title = f"Gradients of {result['groups']} groups of {result['group']} sequence(s), against the true loss"
    totals = {name: signal["total"] for name, signal in signals.items()}
    yield _table(title, "signal", totals, {
        "alignment": lambda total: aligned(total["alignment"]),
        "under Adam's moment": lambda total: aligned(total["preconditioned_alignment"]),
        "noise scale": lambda total: _with_interval(total, "noise_scale", ",.3g"),
    })  # fmt: skip
    if others := {name: total for name, total in totals.items() if name != TRUE_LOSS}:
        yield _table("What adding it does to the true loss's gradient", "signal", others, {
            "progress left": lambda total: _with_interval(total, "progress"),
            "variance, times": lambda total: _with_interval(total, "variance"),
            "dose": lambda total: number(total["dose"], ".3f"),
        })  # fmt: skip
        by_block = zip(*(signals[name]["blocks"] for name in others), strict=True)
        rows = [(f"block {j}", *(aligned(of["alignment"]) for of in block)) for j, block in enumerate(by_block, 1)]
        if any(cell != "–" for row in rows for cell in row[1:]):  # a single judge reads below the first block alone
            yield Table("Alignment by block", ("block", *others), rows)
    quality = result["label_quality"]
    title = f"Readings as labels, on {quality['tokens']:,} validation tokens; coverage and precision at τ"
    by_threshold = (word for threshold in SHOWN for word in (f"τ {threshold:g}", "precision"))
    rows = [row for j, block in enumerate(quality["blocks"], 1) for row in _labels(j, block)]
    yield Table(title, ("block", "loss", "accuracy", "mean p_m", *by_threshold, "ECE"), rows)
    blocks = {f"block {j}": block for j, block in enumerate(result["collapse"], 1)}
    yield _table("Collapse", "block", blocks, COLLAPSE_COLUMNS)


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


def conversation_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """How often a reply is surer after the text than after each alternative, by its length, and by block."""
    found = result["conversation"]
    lengths = {f"reply of {length}": str(length) for length in found["replies"]}
    title = "Surer after what was really said: share of pairs (area under the curve), 95% interval"
    rows = [
        (f"than after {words}", *(_area(found["against"][name]["total"][length]) for length in lengths.values()))
        for name, words in ALTERNATIVES.items()
    ]
    yield Table(title, ("", *lengths), rows)
    first = str(found["replies"][0])
    by_block = zip(*(found["against"][name]["blocks"] for name in ALTERNATIVES), strict=True)
    rows = [(f"block {j}", *(_area(of[first]) for of in block)) for j, block in enumerate(by_block, 1)]
    yield Table(f"The same by block, reply of {first}", ("", *ALTERNATIVES.values()), rows)
    rows = [
        (words, *(f"{found['confidence'][name][length]:.3f}" for length in lengths.values()))
        for name, words in {TEXT: "what was really said", **ALTERNATIVES}.items()
    ]
    yield Table("Mean p_max over the reply", ("after", *lengths), rows)


def _area(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['auc']:.3f} [{low:.3f}, {high:.3f}]"


def conversation_remarks(result: Mapping[str, Any]) -> list[str]:
    """The answer, and what was compared."""
    found = result["conversation"]
    return [
        _answer(found),
        f"step {result['step']:,}, seed {result['seed']}, {result['dtype']}; {found['windows']:,} windows: "
        f"{found['context']} tokens of context, {found['say']} said, replies greedy; {found['shuffled']} shuffled; "
        "0.5 means no difference",
    ]


def _answer(found: Mapping[str, Any]) -> str:
    """In a sentence, whether the first token of a reply is surer after the text."""
    length = str(found["replies"][0])
    low = {name: one["total"][length]["interval"][0] for name, one in found["against"].items()}
    surer = [ALTERNATIVES[name] for name, bound in low.items() if bound > 0.5]
    others = [ALTERNATIVES[name] for name, bound in low.items() if bound <= 0.5]
    if not others:
        return f"Yes: a reply is surer after what was really said than after {_listed(surer, 'and')}."
    if not surer:
        return f"No: a reply is not surer after what was really said than after {_listed(others, 'or')}."
    than = f"surer after what was really said than after {_listed(surer, 'and')}"
    return f"In part: a reply is {than}, but not than after {_listed(others, 'or')}."


def _listed(words: Sequence[str], last: str) -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def noise_sentences(result: Mapping[str, Any]) -> list[str]:
    """The answer on each signal, in words: which way it pulls, what the branch test found, and how both can be true.

    The last sentence says how much was measured, and why no more.

    >>> total = {"alignment": {"value": 0.0, "interval": [-0.48, 0.49], "resolved": True}, "dose": 1.0}
    >>> signals = {"true_loss": {}, "confidence": {"total": total}}
    >>> stopped = {"by": "budget", "half_width": 0.485, "narrow": 0.05, "budget": 60.0}
    >>> for line in noise_sentences({"signals": signals, "groups": 40, "group": 1, "stopped": stopped}):
    ...     print(line)
    confidence: which way it pulls cannot be said (alignment +0.00 [-0.48, +0.49]).
    Measured 40 sequences: the budget of 60 s ended first, with ±0.48 and not ±0.05.
    """
    signals = [f"{name}: {_pull(one, result)}." for name, one in result["signals"].items() if name != TRUE_LOSS]
    return [*signals, _measured(result)]


def _measured(result: Mapping[str, Any]) -> str:
    """How much was measured, and why no more."""
    stopped, signals = result["stopped"], len(result["signals"]) - 1
    narrow, widest = f"±{stopped['narrow']:g}", stopped["half_width"]
    which = "the interval" if signals == 1 else "every interval"
    missed = "with a norm that is not resolved" if widest is None else f"with ±{widest:.2g} and not {narrow}"
    why = {
        "interval": f"{which} is narrower than {narrow}",
        "budget": f"the budget of {stopped['budget']:g} s ended first, {missed}",
        "groups": f"no more --groups were asked for, {missed}",
        "corpus": f"that is all training text there is, {missed}",
        "nothing to narrow": "there is no interval that more would narrow",
    }
    reason = (
        "as many --groups as asked for" if stopped["by"] == "groups" and not stopped["narrow"] else why[stopped["by"]]
    )
    return f"Measured {result['groups'] * result['group']:,} sequences: {reason}."


def _pull(signal: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    alignment, branch = signal["total"]["alignment"], signal.get("branch")
    tested = f"; the branch test: {branch['verdict']}" if branch else ""
    if alignment is None or alignment["value"] is None:
        return f"it has no gradient here that could be compared with the true loss's{tested}"
    low, high = alignment["interval"]
    way = "with the true loss" if low > 0 else "against the true loss"
    found = f"it pulls {way}" if low > 0 or high < 0 else "which way it pulls cannot be said"
    if low <= 0 <= high and alignment["resolved"] and (high - low) / 2 < result["stopped"]["narrow"]:
        found = "it hardly pulls either way"
    found += f" (alignment {aligned(alignment)}){tested}"
    bias = branch["bias"]["interval"] if branch and branch["bias"] else (-math.inf, math.inf)
    if low <= 0 or bias[1] < 0:  # nothing that a verdict of "worse" could contradict
        return found
    return found + _despite(alignment["value"], signal["total"]["dose"], "harms" if bias[0] > 0 else "may harm")


def _despite(cosine: float, dose: float | None, harms: str) -> str:
    """Why a signal that pulls with the true loss may harm: the cosine of both gradients' sum with the true one.

    >>> _despite(0.3, 1.0, "may harm")
    '; it may harm nevertheless: at dose 1.00 a step of the same length makes 81% of the progress in the true loss'
    """
    dose = dose or 0.0
    kept = (1 + dose * cosine) / math.sqrt(1 + 2 * dose * cosine + dose**2)
    if kept > 0.995:
        return ""
    step = f"at dose {dose:.2f} a step of the same length makes {kept:.0%} of the progress in the true loss"
    return f"; it {harms} nevertheless: {step}"


def noise_remarks(result: Mapping[str, Any]) -> list[str]:
    """What must be read with the tables."""
    first, last = result["sequences"]
    return [
        f"step {result['step']:,}, seed {result['seed']}, {result['dtype']}; gradients of sequences {first:,} to "
        f"{last - 1:,} of {result['block_size']} tokens; noise scale in sequences",
        "– means nothing can be said; ~ an alignment whose norms are not resolved: more groups would",
        *([] if result["preconditioned"] else ["no second moments here, so nothing under Adam"]),
    ]


def _with_interval(total: Mapping[str, Any], name: str, form: str = ".2f") -> str:
    """A figure with its interval, where it has one.

    >>> _with_interval({"progress": 1.5, "progress_interval": [1.25, 1.75]}, "progress")
    '1.50 [1.25, 1.75]'
    """
    bounds = total[f"{name}_interval"]
    return number(total[name], form) + (f" [{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else "")


def _labels(j: int, block: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, found in ((f"block {j}", block["raw"]), ("  tuned reader", block["tuned"])):
        if found is None:
            continue
        at = [found[key][THRESHOLDS.index(threshold)] for threshold in SHOWN for key in ("coverage", "precision")]
        shares = (number(share, ".1%") for share in (found["accuracy"], found["confidence"], *at))
        yield name, f"{found['loss']:.3f}", *shares, f"{found['calibration_error']:.3f}"
