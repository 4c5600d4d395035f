"""An arm's options as the TOML file that its cells are started with, and as its patched code understands them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError
from gptlab.runs.experiment_file import Arm


def options_file(folder: Path, arm: Arm) -> Path:
    """The options of an arm's cells as `gptlab train --config` takes them."""
    return folder / arm.name / "options.toml"


def as_toml(options: Mapping[str, Any], table: str = "") -> str:
    """Options under dotted keys as TOML; `also` becomes further [[signal]] tables.

    table: the name, dot included, of the table that they are put under; the caller has opened it.
    """
    options, also = dict(options), options.get("also", ())
    options.pop("also", None)
    if not also:
        return "".join(f"{key} = {_value(value)}\n" for key, value in options.items())
    signal = {key.removeprefix("signal."): value for key, value in options.items() if key.startswith("signal.")}
    plain = {key: value for key, value in options.items() if not key.startswith("signal.")}
    tables = [f"[[{table}signal]]\n{as_toml(one)}" for one in (signal, *also)]
    return as_toml(plain) + "".join(tables)


def _value(value: Any) -> str:
    """A TOML value; JSON's strings, numbers and lists are TOML's too."""
    if value is None:
        return '"none"'
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False, allow_nan=False)


_CHECK = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from gptlab.cli.main import guarded; from gptlab.cli.arguments import file_options; "
    "from gptlab.cli.train import resolve; from gptlab.training.config import TrainingConfig; "
    "sys.exit(guarded(lambda words: resolve(file_options(words[0], TrainingConfig), 0) and 0, sys.argv[2:]))"
)


def check_options(arm: Arm, code: Path, file: Path) -> None:
    """Refuse options that the patched code does not know; what they may be, it alone can tell."""
    done = subprocess.run(
        [sys.executable, "-c", _CHECK, str(code), str(file)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise ConfigError(f"[arms.{arm.name}] under {arm.patch}: {lines[-1].removeprefix('gptlab: ')}")
