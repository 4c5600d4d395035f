"""`gptlab doctor`: what this machine has, and what a run would use here and why. It changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from dataclasses import replace
from typing import Any

import gptlab
from gptlab.cli.arguments import Parser

PACKAGES = ("numpy", "safetensors", "tiktoken", "rich", "transformers", "datasets", "pyarrow", "scipy", "matplotlib",
            "jinja2")  # fmt: skip
PROGRAMS = ("screen", "torchrun", "git")
MODELS = {"shakespeare-tiny": 128, "gpt2-124m": 768}
"""The models whose placement is shown, with the width that decides it."""


def main(argv: list[str]) -> int:
    """Print what was found."""
    parser = Parser(prog="gptlab doctor", description="What this machine has, and what a run would use here and why.")
    parser.add_argument("--json", action="store_true", help="machine-readable, on standard output")
    options = parser.parse(argv)
    found = examine()
    print(json.dumps(found, indent=1) if options.json else _as_text(found))
    return 0


def examine() -> dict[str, Any]:
    """JSON values: software, machine, a placement for each of MODELS, measured matmul rates in FLOP/s by dtype."""
    import torch

    from gptlab.device import DTYPES, Machine, choose_compute, matmul_peak

    machine = Machine.probe()
    placements = {name: choose_compute(machine, n_embd=width) for name, width in MODELS.items()}
    largest = placements["gpt2-124m"]
    largest.apply()
    casts = {name: None if name == "fp32" else dtype for name, dtype in DTYPES.items()}
    return {
        "gptlab": gptlab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": machine.processor,
        "cores": machine.cores,
        "cpu_bf16": machine.cpu_bf16,
        "gpus": list(machine.gpus),
        "matmul_peak": {name: matmul_peak(replace(largest, autocast=cast)) for name, cast in casts.items()},
        "runs": {name: placement.as_json() for name, placement in placements.items()},
        "preset": "gpt2-124m" if machine.gpus else "shakespeare-tiny",
        "programs": {name: shutil.which(name) for name in PROGRAMS},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_text(found: dict[str, Any]) -> str:
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found["matmul_peak"].items())
    lines = [
        f"gptlab {found['gptlab']}, Python {found['python']}, torch {found['torch']}, {found['platform']}",
        f"processor  {found['processor']}, {found['cores']} cores, {found['cpu_bf16'] or 'no'} bf16 in hardware",
        f"GPUs       {', '.join(found['gpus']) or 'none'}",
        f"matmul     {peaks} (measured now)",
        "",
        f"a run without --preset is {found['preset']}; what a run would use:",
    ]
    for name, used in found["runs"].items():
        shown = {**used, "compile": "on" if used["compile"] else "off"}
        keys = ("device", "dtype", "threads", "compile")
        lines += [f"  {name}", *(f"    {key:<8} {shown[key]} ({used['reasons'][key]})" for key in keys)]
    lines.append("")
    for kind in ("programs", "packages"):
        lines.append(f"{kind}   " + ", ".join(f"{n} {v or 'not installed'}" for n, v in found[kind].items()))
    return "\n".join(lines)
