"""Whether runs may be compared: they may differ in what their arms declare, and in nothing else.

A difference in data, validation set, model, software or machine type that nobody declared is often mistaken for the
effect of a method; here each is found and named in a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gptlab.analysis.run import Run
from gptlab.errors import shortened, shown
from gptlab.training.config import FREE_ON_RESUME

FREE = FREE_ON_RESUME | {"seed", "preset"}
"""Options that make no other experiment of a run."""

COMMON = frozenset({"data", "tokenizer", "block_size", "eval_tokens", "n_layer", "n_head", "n_embd", "share_blocks"})
"""Options of data and model: runs that are compared by themselves, without an experiment file, share them."""

TUNED = frozenset({"learning_rate", "min_lr", "signal.dose", "signal.weight", "also"})
"""What [tune] may set for each arm."""


LONGEST_NAME = 1000
"""Characters of an arm's name that is made from its options."""


def own_options(run: Run) -> dict[str, Any]:
    """The options that distinguish a run's arm from others."""
    return {key: value for key, value in run.options.items() if key not in FREE}


def undeclared(run: Run, reference: Run, declared: frozenset[str], sibling: Run) -> Iterator[str]:
    """What makes `run` another experiment than `reference`, a run of its baseline, one line each.

    In the `declared` keys it may differ from it, but not from its `sibling`, a run of its own arm.
    """
    expected_of = {True: (sibling, _facts(sibling)), False: (reference, _facts(reference))}
    for (name, key), found in _facts(run).items():
        other, facts = expected_of[key in declared]
        expected = facts.get((name, key))
        if found != expected and not (name == "data shards" and _grew(run, other, key)):
            yield f"{run.path}: {name} {key}: expected {_short(expected)} as in {other.path}, found {_short(found)}"


def _facts(run: Run) -> dict[tuple[str, str], Any]:
    """{(what it is, key): value} of everything that must be declared to differ."""
    data, environment = run.config.get("data", {}), run.environment
    machine = environment.get("machine", {})
    facts: dict[tuple[str, str], Any] = {("option", key): value for key, value in own_options(run).items()}
    facts |= {("data shards", key): data.get(key) for key in ("train", "val")}
    facts["data", "tokenizer"] = data.get("tokenizer")
    if run.finished:
        facts["validation set", "validation_sha256"] = run.ended.get("validation_sha256")
    for key in run.config.keys() - {"options", "data"}:  # gptlab's version, a patch, a user's code
        facts["software", key] = run.config[key]
    facts |= {("software", key): environment.get(key) for key in ("python", "torch", "compile")}
    facts |= {("machine", key): environment.get(key) for key in ("platform", "dtype")}
    now = _versions({"gptlab": run.config.get("gptlab"), **environment})
    sessions = [_versions(before) for before in environment.get("earlier", [])]
    facts["software", "earlier"] = [before for before in sessions if before != now]
    facts["machine", "device"] = str(environment.get("device", "")).partition(":")[0]
    facts["machine", "processor"] = machine.get("processor")
    facts["machine", "gpus"] = sorted(set(machine.get("gpus", [])))
    return facts


def _versions(before: Mapping[str, Any]) -> dict[str, Any]:
    """What made a session before the last one."""
    machine = before.get("machine", {})
    facts = {key: before.get(key) for key in ("gptlab", "python", "torch", "compile", "platform", "dtype")}
    return {**facts, "processor": machine.get("processor"), "gpus": sorted(set(machine.get("gpus", [])))}


def _grew(run: Run, reference: Run, split: str) -> bool:
    """Whether one run only began while the shards of the same corpus were still being prepared."""
    first, second = sorted((run.config["data"], reference.config["data"]), key=lambda data: len(data[split]))
    return first[split] == second[split][: len(first[split])] and not first.get("complete", True)


def _short(value: Any) -> str:
    """A value for a line of text: checksums cut, lists by their ends."""
    if isinstance(value, list) and len(value) > 2:
        return f"[{_short(value[0])}, ... {len(value)} of them]"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return repr(value)[:13] + "…'" if isinstance(value, str) and len(value) == 64 else shown(value, 120)


def arm_of(options: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """A name for runs with `options`, from what they change of the baseline's.

    >>> arm_of({"signal.name": "entropy", "learning_rate": 0.1}, {"signal.name": "none", "learning_rate": 0.1})
    'entropy'
    """
    changed = {key: value for key, value in options.items() if baseline.get(key) != value}
    name = changed.pop("signal.name", None)
    words = [*([str(name)] if name else []), *(f"{key}={shortened(str(value), 60)}" for key, value in changed.items())]
    return shortened(", ".join(words), LONGEST_NAME)
