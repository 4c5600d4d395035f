"""What a run's options make wrong on purpose, where, and how much; and what the run would be without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Clean = tuple[Any, ...]
"""All options of a run but its errors: runs of equal ones may be compared as dose and response."""

_ERRORS = ("target_flip", "target_flip_to", "gradient_noise")
_FLIPS = ("control", "flip", "flip_to")


@dataclass(frozen=True)
class Corruption:
    """kind: what is wrong, in words; judges: where, of a signal's flips, lowest first; dose: the share or size.

    figure: of validation rows, the one that shows what was learnt of the truth despite it. theory: a key of
    dose_response.THEORIES.
    """

    kind: str
    judges: tuple[int, ...]
    dose: float
    figure: str
    theory: str

    @property
    def series(self) -> str:
        """The name of what differs from it in dose alone."""
        return f"{self.kind} at judge {','.join(map(str, self.judges))}" if self.judges else self.kind


def corruptions(options: Mapping[str, Any]) -> tuple[Clean, list[Corruption]]:
    """The run without its errors, and its errors; `options` are all of a run's, under dotted keys."""
    found: list[Corruption] = []
    if options["target_flip"]:
        to = options["target_flip_to"]
        figure, theory = ("clean_loss", "uniform") if to == "uniform" else ("accuracy", "parity")
        found.append(Corruption(f"{to} flips in the true loss", (), options["target_flip"], figure, theory))
    if options["gradient_noise"]:
        found.append(Corruption("gradient noise", (), options["gradient_noise"], "loss", "gaussian"))
    flips: dict[tuple[str, str, float], list[int]] = {}
    lessons: list[Clean] = []
    for signal in _signals(options):
        judges = range(1, options["n_layer"]) if signal["layers"] == "all" else signal["layers"]
        if signal["control"] == "flipped" and signal["flip"]:
            if isinstance(judges, str):  # rotate: one place in turn is no place
                judges = range(1, options["n_layer"])
            flips.setdefault((signal["flip_to"], signal["name"], signal["flip"]), []).extend(judges)
        lessons += [_lesson(signal, judge, options["n_layer"]) for judge in judges]
    for (to, name, dose), judges in flips.items():
        theory = "uniform" if to == "uniform" else "parity"
        found.append(Corruption(f"{to} flips in {name}", tuple(sorted(judges)), dose, "loss", theory))
    rest = {k: v for k, v in options.items() if k not in _ERRORS and k.partition(".")[0] not in ("signal", "also")}
    return (tuple(sorted((k, repr(v)) for k, v in rest.items())), tuple(sorted(lessons))), found


def _signals(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    first = {key.removeprefix("signal."): value for key, value in options.items() if key.startswith("signal.")}
    return [signal for signal in (first, *options["also"]) if signal["name"] != "none"]


def _lesson(signal: Mapping[str, Any], judge: int | str, n_layer: int) -> Clean:
    """What one judge says without its errors: several signals that share a job are as one that does it all."""
    control = "none" if signal["control"] == "flipped" else signal["control"]
    weight = 1 / n_layer if signal["weight"] is None else signal["weight"]
    kept = {k: v for k, v in signal.items() if k not in (*_FLIPS, "layers", "weight")}
    return (str(judge), float(weight), control, tuple(sorted((k, repr(v)) for k, v in kept.items())))
