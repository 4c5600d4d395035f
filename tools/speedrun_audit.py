"""Each record of modded-nanogpt's optimisation track against the one before, from the logs that it published.

    python tools/speedrun_audit.py CHECKOUT   reads a checkout of it into docs/findings/speedrun_audit.csv: a row a run

What is kept is a number a run: the validation loss at the step that its record claims. The track counts steps to a
loss of 3.28, and its README gives what a step is worth. So a run that claims step s with loss x is worth
s + (x - 3.28) / SLOPE steps, its *steps to 3.28*, and records are compared in them: unpaired, by Welch's t, as
`gptlab compare` does. `python tools/findings.py` writes the page's tables and picture from these rows.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.analysis.design import power_of_difference, smallest_difference
from gptlab.analysis.logs import read_texts
from gptlab.analysis.report.theme import AMBER, GREEN, GREY
from gptlab.analysis.statistics import holm, spread
from gptlab.analysis.verdict import compare

ROWS = Path(__file__).parents[1] / "docs" / "findings" / "speedrun_audit.csv"
TRACK = "records/track_3_optimization/results"
TARGET, SLOPE = 3.28, 0.0045 / 100
"""The loss to reach, and what a step less costs, in nats, of two schedules of other lengths: both the track's own."""

BAR = 0.004
"""Its rule: a difference over sqrt(1/n + 1/m) of at least that: one-sided p < 0.001 where sigma is 0.0013."""

POWER, MOST = 0.9, 2000
SLOPES = (SLOPE, 2 * SLOPE)
"""That of the track, and about that of the last steps within a run, which is steeper."""


class Record(NamedTuple):
    """number: in the track's README; step: its claim; logs: a glob in TRACK; n: its claimed runs."""

    number: int
    name: str
    step: int
    logs: str
    n: int


RECORDS = (
    Record(1, "Muon", 3600, "7b8270c5-*.txt", 1),
    Record(3, "Muon, tuned", 3500, "311d7833-*.txt", 1),
    Record(5, "MuonH", 3325, "20260430_muonh/*.txt", 10),
    Record(9, "NorMuon, u/w floor", 3250, "20260501_skylight001/*.txt", 8),
    Record(11, "Contra-Muon", 3225, "20260501_contra_muon/*.txt", 16),
    Record(13, "MuLoCo", 3210, "20260504_muloco_normuonh/*.txt", 10),
    Record(14, "SOAP for MLPs", 3150, "20260504_contra_muon_mlp_soapish/*.txt", 4),
    Record(16, "SOAP for attention", 3125, "20260506_trustlight/*/seed_*/stdout.txt", 8),
    Record(20, "Soft-Muon, PowerCool", 3030, "20260509_contra_soft_muon/*.txt", 30),
    Record(29, "radial brake", 2990, "20260511_dampen_radial_gradient_component/*.txt", 11),
    Record(30, "Aurora", 2930, "20260514_aurora_proj_pruned_extended_contra/*.txt", 16),
    Record(34, "RRE extrapolation", 2925, "20260520_rre_extrapolation_pr300_2925/*.txt", 8),
    Record(38, "reference interpolation", 2900, "20260520_tail_refinterp_2900/*.txt", 9),
    Record(40, "EMA-Nesterov", 2890, "20260522_ema_nesterov_aurora_proj/*.txt", 16),
    Record(41, "Circuit-Muon", 2875, "20260523_circuit_muon/README.md", 20),
    Record(42, "fixed reference", 2860, "20260525_aurora_ema_ref/*.txt", 16),
    Record(43, "late transforms", 2850, "20260529_tail_phase_readout_2850/*.txt", 13),
    Record(44, "SOAP everywhere", 2750, "20260609_soap_f1_auxb2_clean/H100_*.txt", 20),
    Record(45, "tail EMA", 2720, "20260611_tailema_2720_submission/*.txt", 10),
    Record(46, "row floor, cautious decay", 2690, "20260619_cwd_rowfloor_tailema/*.txt", 8),
)
"""The track's world records, in their order."""


def extract(checkout: Path) -> list[dict[str, Any]]:
    """A row a run: {record, claim, val_loss, path, revision}; raises SystemExit where a record lacks runs."""
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    revision = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    rows = []
    for record in RECORDS:
        found = [
            (path, loss) for path in sorted((checkout / TRACK).glob(record.logs)) for loss in _losses(path, record.step)
        ]
        if len(found) != record.n:
            raise SystemExit(f"#{record.number}: expected {record.n} runs at {record.logs}, found {len(found)}")
        rows += [
            {"record": record.number, "claim": record.step, "val_loss": f"{loss:.5f}",
             "path": path.relative_to(checkout).as_posix(), "revision": revision[:12]}
            for path, loss in found
        ]  # fmt: skip
    return rows


def _losses(path: Path, step: int) -> list[float]:
    """Of every run in a file: from lines of a log, of the average that it reports, or of a README's table of seeds."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if averaged := re.findall(rf"^step:{step}/\d+ .*\bval_ema_loss:(\S+)", text, flags=re.MULTILINE):
        return [float(averaged[-1])]
    if path.suffix != ".md":
        return [steps[step] for steps in read_texts([("", path)])[0][""].values() if step in steps]
    table = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    column = next(row.index(f"step {step}") for row in table if f"step {step}" in row)
    return [float(row[column]) for row in table if row[1].isdigit()]


@cache
def _rows() -> tuple[dict[str, str], ...]:
    with ROWS.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def steps_to_target(number: int, slope: float = SLOPE) -> list[float]:
    """Of every run of a record, as many digits as its log has: its claimed step, and what its loss is above 3.28."""
    rows = [row for row in _rows() if row["record"] == str(number)]
    return [round(int(row["claim"]) + (float(row["val_loss"]) - TARGET) / slope, 2) for row in rows]


def audit() -> dict[str, Any]:
    """{pairs: a record against the one before it, each; counts of them}, in steps; null where a figure has none."""
    sigma = pooled()
    found = {str(new.number): _pair(old, new, sigma) for old, new in pairwise(RECORDS)}
    tested = [pair for pair in found.values() if pair["p"] is not None]
    for pair, p in zip(tested, holm([pair["p"] for pair in tested]), strict=True):
        pair["p_holm"] = p
    counts = {
        "pairs": len(found), "tested": len(tested),
        "distinguishable": sum(pair["verdict"] == "better" for pair in tested),
        "after_holm": sum(pair["p_holm"] < 0.05 for pair in tested),
        "not": sum(pair["verdict"] == "undecided" for pair in tested),
        "by_the_track": sum(pair["margin"] >= BAR for pair in tested),
        "steeper": sum(pair["steeper"] for pair in tested),
        "claimed": RECORDS[0].step - RECORDS[-1].step, "runs": len(_rows()),
    }  # fmt: skip
    targets = {str(r.number): _target(r) for r in RECORDS}
    counts["reached"] = sum(target["rule"] >= BAR for target in targets.values())
    open_claims = [-pair["claim"] for pair in tested if pair["verdict"] == "undecided"]
    shown = [pair["detectable"] for pair in tested]
    ends = [record for record in RECORDS if record.number in (34, 43)]
    return {
        "sigma": sigma, "sigma_nats": sigma * SLOPE, "counts": counts, "arms": found, "targets": targets,
        "detectable": [min(shown), max(shown)], "undecided_claims": [min(open_claims), max(open_claims)],
        "spans": {"43-34": _pair(ends[0], ends[1], sigma)},
    }  # fmt: skip


def pooled() -> float:
    """The standard deviation of runs around their record's mean, in steps, with as many degrees as all give."""
    groups = [values for record in RECORDS if len(values := steps_to_target(record.number)) > 1]
    squares = [(spread(values) or 0.0) ** 2 * (len(values) - 1) for values in groups]
    return (sum(squares) / sum(len(values) - 1 for values in groups)) ** 0.5


def _pair(old: Record, new: Record, sigma: float) -> dict[str, Any]:
    values = [steps_to_target(record.number) for record in (old, new)]
    n, m = map(len, values)
    difference = sum(values[1]) / m - sum(values[0]) / n
    tested = {slope: _compared(old, new, slope) for slope in SLOPES if min(n, m) > 1}
    of_track = tested.get(SLOPE, {})
    return {
        "name": f"#{new.number} {new.name}", "against": f"#{old.number}", "claim": new.step - old.step,
        "difference": difference, "interval": of_track.get("interval", [None, None]), "n": f"{m}, {n}",
        "p": of_track.get("p"), "p_holm": None, "verdict": of_track.get("verdict", "undecided"),
        "margin": -difference * SLOPE / (1 / n + 1 / m) ** 0.5,
        "steeper": bool(tested) and tested[SLOPES[1]]["verdict"] == "better",
        "detectable": detectable(sigma, n, m) if min(n, m) > 1 else None, "needed": needed(difference, sigma),
    }  # fmt: skip


def _compared(old: Record, new: Record, slope: float) -> Mapping[str, Any]:
    losses = {str(r.number): dict(enumerate(steps_to_target(r.number, slope), 1)) for r in (old, new)}
    return compare(losses, baseline=str(old.number), metric="steps", better="lower", unpaired=True)["arms"][
        str(new.number)
    ]


def detectable(sigma: float, n: int, m: int) -> float:
    """The difference that n runs against m show with probability POWER at a level of 5%: n + m - 2 degrees."""
    equal = n + m - 1
    return smallest_difference(sigma * (equal * (1 / n + 1 / m)) ** 0.5, equal, power=POWER)


def needed(difference: float, sigma: float) -> int | None:
    """The fewest runs of each that show such a difference with probability POWER; None above MOST."""
    for n in range(2, MOST + 1):
        if power_of_difference(difference, sigma * (2 * (2 * n - 1) / n) ** 0.5, 2 * n - 1) >= POWER:
            return n
    return None


def _target(record: Record) -> dict[str, float]:
    """The record's own claim, a mean below 3.28 at its step: what the track's rule asks to be at least BAR."""
    losses = [float(row["val_loss"]) for row in _rows() if row["record"] == str(record.number)]
    mean = sum(losses) / len(losses)
    return {"mean": mean, "rule": (TARGET - mean) * len(losses) ** 0.5}


def table(result: Mapping[str, Any]) -> str:
    """The pairs as Markdown."""
    head = (
        "record", "against", "claimed, steps", "difference, steps", "95% interval", "runs", "p", "p (Holm)",
        "distinguishable", "by the track's rule", "detectable, steps", "runs of each that decide",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(_line, result["arms"].values())]
    return "\n".join(lines) + "\n"


def _line(pair: Mapping[str, Any]) -> str:
    low, high = pair["interval"]
    said = "one run" if pair["p"] is None else "yes" if pair["verdict"] == "better" else "no"
    cells = [
        pair["name"], pair["against"], f"{pair['claim']:+d}", f"{pair['difference']:+.0f}",
        "–" if low is None else f"{low:+.0f} to {high:+.0f}", pair["n"], _short(pair["p"]), _short(pair["p_holm"]),
        said, "yes" if pair["margin"] >= BAR else "no",
        "–" if pair["detectable"] is None else f"{pair['detectable']:.0f}",
        f"more than {MOST:,}" if pair["needed"] is None else str(pair["needed"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _short(p: float | None) -> str:
    return "–" if p is None else f"{p:.2g}"


def forest(axes: Any, _: int) -> None:
    """Differences with their intervals, newest below; an open point where no test is possible."""
    pairs: Sequence[Mapping[str, Any]] = list(audit()["arms"].values())
    axes.figure.set_size_inches(8.5, 6)
    axes.axvline(0.0, color="black", linewidth=0.8)
    for row, pair in enumerate(pairs):
        tested = pair["p"] is not None
        colour = GREY if not tested else GREEN if pair["verdict"] == "better" else AMBER
        if tested:
            axes.plot(pair["interval"], [row, row], color=colour, linewidth=2)
        axes.plot([pair["difference"]], [row], "o", color=colour, mfc=colour if tested else "white", markersize=5)
        axes.plot([pair["claim"]], [row], "|", color="black", markersize=9)
    axes.set_yticks(range(len(pairs)), [f"{pair['name']} against {pair['against']}" for pair in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("steps to 3.28, minus those of the record before (95% interval)")
    for label, colour in (("distinguishable", GREEN), ("not distinguishable", AMBER)):
        axes.plot([], [], "o-", color=colour, label=label)
    axes.plot([], [], "o", color=GREY, mfc="white", label="one run, no test")
    axes.plot([], [], "|", color="black", markersize=9, linestyle="none", label="claimed")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=4)


def main() -> None:
    rows = extract(Path(sys.argv[1]).resolve())
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
