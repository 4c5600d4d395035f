"""Options as dataclass fields: a default, one line of help, a unit; read from text or TOML with clear refusals.

The same fields serve `--help`, the command line, TOML files and the record of a run, so an option is written once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptlab.errors import ConfigError, did_you_mean, shown

MOST_BLOCKS = 10_000
"""The largest n_layer. No file's length bounds it: a shared block is stored once, and lists of n_layer are made."""

LARGEST_SIZES = {
    "n_layer": MOST_BLOCKS, "n_head": 2**20, "n_embd": 2**20, "block_size": 2**24, "vocab_size": 2**24,
    "batch_size": 2**20, "total_batch_tokens": 2**40, "eval_tokens": 2**40, "steps": 10**12, "rank_timeout": 10**9,
}  # fmt: skip
"""Of sizes, which are at least 1: above what anyone trains, and small enough to be counted, listed and waited for."""


def check_sizes(config: object, *names: str) -> None:
    """Raise ConfigError where a size that a config holds is not from 1 to the largest."""
    for name in names:
        check_size(name, getattr(config, name))


def check_size(name: str, found: int) -> None:
    """Raise ConfigError where a size is not from 1 to the largest."""
    most = LARGEST_SIZES[name]
    if not 1 <= found <= most:
        bound = f"at most {most}" if found > most else "at least 1"
        raise ConfigError(f"{name} must be {bound}, found {found}")


def option(
    default: Any, help: str, *, unit: str = "", choices: Sequence[str] = (), shown: str = "", group: str = ""
) -> Any:
    """A dataclass field that is an option; `shown` stands in `--help` for a default that is derived."""
    metadata = {"help": help, "unit": unit, "choices": tuple(choices), "shown": shown, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One leaf field of a config: its dotted key, type and what `--help` says of it."""

    key: str
    type: Any
    default: Any
    help: str
    unit: str
    choices: tuple[str, ...]
    shown: str
    group: str

    @property
    def default_shown(self) -> str:
        return self.shown or as_typed(self.default)


def as_typed(value: Any) -> str:
    """A value as it stands on a command line.

    >>> as_typed(None), as_typed(True), as_typed((1, 2))
    ('none', 'true', '1,2')
    """
    if isinstance(value, list | tuple):
        return ",".join(map(as_typed, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


_hints = functools.cache(typing.get_type_hints)


@functools.cache
def options_of(config: type, prefix: str = "") -> tuple[Option, ...]:
    """The options of a config class in the order of its fields; a nested config's keys are dotted."""
    hints, found, group = _hints(config), list[Option](), ""
    for field in dataclasses.fields(config):
        kind, meta = hints[field.name], field.metadata
        if not meta:  # not an option of its own (TrainingConfig.also)
            if dataclasses.is_dataclass(kind):
                found += options_of(typing.cast(type, kind), prefix + field.name + ".")
            continue
        group = meta["group"] or group
        literals = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        choices = meta["choices"] or literals
        help, unit, shown_default = (meta[name] for name in ("help", "unit", "shown"))
        found.append(Option(prefix + field.name, kind, field.default, help, unit, choices, shown_default, group))
    return tuple(found)


def build(config: type, values: Mapping[str, Any]) -> Any:
    """An instance of `config` from dotted keys and typed values; what is not named keeps its default."""
    known = {o.key: o for o in options_of(config)}
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    listed = _lists_of_configs(config)
    for key, value in values.items():
        if key in listed:
            flat[key] = tuple(build(listed[key], v) if isinstance(v, Mapping) else v for v in value)
            continue
        if key not in known:
            raise ConfigError(f"unknown option {shown(key)}{did_you_mean(key, known)}")
        head, dot, rest = key.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[key] = value
    hints = _hints(config)
    return config(**flat, **{name: build(hints[name], inner) for name, inner in nested.items()})


def recorded(config: type, values: Mapping[str, Any]) -> Any:
    """`build` from a file's values, which may be anything; raises ConfigError for a key or a type that is none."""
    known, listed = {o.key: o for o in options_of(config)}, _lists_of_configs(config)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in listed:
            if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
                raise ConfigError(f"{key}: expected a list of tables, found {shown(value)}")
            found[key] = [recorded(listed[key], one) for one in value]
        else:
            found[key] = typed(known[key], value) if key in known else value  # `build` names it
    return build(config, found)


@functools.cache
def _lists_of_configs(config: type) -> dict[str, type]:
    """The fields that hold several configs of one class, with that class."""
    found = {}
    for name, kind in _hints(config).items():
        arguments = typing.get_args(kind)
        if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(arguments[0]):
            found[name] = typing.cast(type, arguments[0])
    return found


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The config's values under dotted keys, in the order of its fields: the inverse of `build`."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, prefix + field.name + ".")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            flat[prefix + field.name] = [flatten(item) for item in value]
        else:
            flat[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def flatten_table(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A TOML table under dotted keys; `-` and `_` are alike."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        key = prefix + key.replace("-", "_")
        flat |= flatten_table(value, key + ".") if isinstance(value, Mapping) else {key: value}
    return flat


def table_options(table: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The options of a TOML table; of several [[signal]] tables the first is `signal`, the others are `also`."""
    table, also = dict(table), []
    if isinstance(table.get("signal"), list) and table["signal"]:
        table["signal"], *also = table["signal"]
    flat = flatten_table(table)
    known = {o.key: o for o in options_of(config)}
    for key in flat:
        if key not in known:
            raise ConfigError(f"unknown key {shown(key)}{did_you_mean(key, known)}")
    found = {key: typed(known[key], value) for key, value in flat.items()}
    if also:
        further = [table_options({"signal": one}, config) for one in also]
        found["also"] = tuple({key.removeprefix("signal."): value for key, value in one.items()} for one in further)
    return found


def typed(option: Option, value: Any) -> Any:
    """`value`, as text from a command line or as a TOML value, in the option's own type.

    Raises ConfigError that says which key, what was expected and what was found.

    >>> typed(Option("steps", int, 0, "", "steps", (), "", ""), "1_000")
    1000
    """
    for kind in _alternatives(option.type):
        converted = _as(kind, value)
        if converted is not _NO:
            if option.choices and isinstance(converted, str) and converted not in option.choices:
                break
            return converted
    expected = f"one of {', '.join(option.choices)}" if option.choices else describe(option.type)
    hint = did_you_mean(str(value), option.choices)
    raise ConfigError(f"{option.key}: expected {expected}, found {shown(value)}{hint}")


_NO = object()
_WORDS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def _alternatives(kind: Any) -> list[Any]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return sorted(typing.get_args(kind), key=lambda k: k is str)  # text matches anything: tried last
    return [kind]


def _as(kind: Any, value: Any) -> Any:
    text = isinstance(value, str)
    if kind is types.NoneType:
        return None if value is None or (text and value.lower() == "none") else _NO
    if kind is bool:
        return value if isinstance(value, bool) else _WORDS.get(value.lower(), _NO) if text else _NO
    if kind is int or kind is float:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return _NO
        try:
            number = float(value) if kind is float else int(value) if text else value
        except (ValueError, OverflowError):
            return _NO
        if isinstance(number, float) and not math.isfinite(number):
            return _NO
        if kind is int and not abs(number) < 2**63:  # no machine counts so far, and such numbers have no float
            return _NO
        if kind is int and not isinstance(number, int):
            return int(number) if number == int(number) else _NO
        return number
    if typing.get_origin(kind) is tuple:
        items = [part for part in value.split(",") if part.strip()] if text else value
        if not isinstance(items, list | tuple):
            items = [items]
        converted = tuple(_as(typing.get_args(kind)[0], item) for item in items)
        return _NO if _NO in converted or not converted else converted
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return value if text else _NO
    return _NO


def describe(kind: Any) -> str:
    """What an option of this type takes, in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    return " or ".join(names.get(k, "a list of whole numbers") for k in _alternatives(kind))
