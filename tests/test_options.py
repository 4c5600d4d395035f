"""Options: text and TOML values become the field's own type, or a refusal that names key, expected and found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from gptlab.errors import ConfigError
from gptlab.options import Option, build, flatten, flatten_table, option, options_of, typed


@dataclass(frozen=True)
class Inner:
    name: str = option("none", "a choice", choices=["none", "some"])
    layers: str | tuple[int, ...] = option("all", "all or a list")


@dataclass(frozen=True)
class Outer:
    steps: int = option(5, "how many", unit="updates", group="Run")
    rate: float = option(0.5, "how fast", shown="half")
    on: bool = option(True, "whether")
    limit: float | None = option(None, "at most")
    mode: Literal["fast", "slow"] = option("fast", "how")
    inner: Inner = field(default_factory=Inner)


OPTIONS: dict[str, Option] = {o.key: o for o in options_of(Outer)}


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("steps", "12", 12), ("steps", "1_000", 1000), ("steps", "-3", -3), ("steps", 7, 7), ("steps", 1e3, 1000),
        ("rate", "1e-3", 0.001), ("rate", 2, 2.0), ("rate", "3", 3.0),
        ("on", "true", True), ("on", "Off", False), ("on", "0", False), ("on", "yes", True), ("on", False, False),
        ("limit", "none", None), ("limit", "None", None), ("limit", "1.5", 1.5), ("limit", 2, 2.0),
        ("mode", "slow", "slow"), ("inner.name", "some", "some"),
        ("inner.layers", "all", "all"), ("inner.layers", "1,3", (1, 3)), ("inner.layers", "2", (2,)),
        ("inner.layers", [1, 2], (1, 2)), ("inner.layers", 4, (4,)),
    ],
)  # fmt: skip
def test_a_value_takes_its_own_type(key: str, given: Any, expected: Any) -> None:
    found = typed(OPTIONS[key], given)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("steps", "many", "steps: expected a whole number, found 'many'"),
        ("steps", "1.5", "steps: expected a whole number, found '1.5'"),
        ("steps", 1.5, "steps: expected a whole number, found 1.5"),
        ("steps", True, "steps: expected a whole number, found True"),
        ("steps", "", "steps: expected a whole number, found ''"),
        ("steps", float("nan"), "steps: expected a whole number, found nan"),
        ("steps", float("inf"), "steps: expected a whole number, found inf"),
        ("rate", "fast", "rate: expected a number, found 'fast'"),
        ("rate", "nan", "rate: expected a number, found 'nan'"),
        ("rate", "-inf", "rate: expected a number, found '-inf'"),
        ("rate", [1], r"rate: expected a number, found \[1\]"),
        ("rate", 10**400, "rate: expected a number, found 1000"),
        ("on", "maybe", "on: expected true or false, found 'maybe'"),
        ("on", 1, "on: expected true or false, found 1"),
        ("limit", "all", "limit: expected .*a number.*, found 'all'"),
        ("mode", "slo", "mode: expected one of fast, slow, found 'slo'; did you mean 'slow'"),
        ("inner.name", "sme", "inner.name: expected one of none, some, found 'sme'; did you mean 'some'"),
        ("inner.layers", [], r"inner.layers: expected .*, found \[\]"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_by_name(key: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(OPTIONS[key], given)


def test_options_come_in_order_with_default_and_unit() -> None:
    assert list(OPTIONS) == ["steps", "rate", "on", "limit", "mode", "inner.name", "inner.layers"]
    assert (OPTIONS["steps"].unit, OPTIONS["steps"].group, OPTIONS["rate"].group) == ("updates", "Run", "Run")
    assert [OPTIONS[key].default_shown for key in ("steps", "rate", "on", "limit")] == ["5", "half", "true", "none"]
    assert OPTIONS["mode"].choices == ("fast", "slow")


def test_build_and_flatten_are_inverse() -> None:
    values = {"steps": 1, "on": False, "inner.name": "some", "inner.layers": (1, 2)}
    config = build(Outer, values)
    assert config == Outer(steps=1, on=False, inner=Inner("some", (1, 2)))
    assert flatten(config) == {
        "steps": 1, "rate": 0.5, "on": False, "limit": None, "mode": "fast", "inner.name": "some",
        "inner.layers": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(("key", "nearest"), [("stepz", "steps"), ("inner.nme", "inner.name")])
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{key}'; did you mean '{nearest}'"):
        build(Outer, {key: 1})


def test_tables_become_dotted_keys_and_dashes_underscores() -> None:
    assert flatten_table({"a-b": {"c-d": 1, "e": {"f": 2}}, "g": [1]}) == {"a_b.c_d": 1, "a_b.e.f": 2, "g": [1]}
