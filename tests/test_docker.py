"""The Dockerfiles, as far as they can be checked without a builder."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_what_it_takes_and_starts_is_there_and_it_runs_as_nobody_special(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    of = {word: [rest for kind, rest in lines if kind == word] for word, _ in lines}
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", of["FROM"][0])
    sources = [source for rest in of["COPY"] for source in rest.split()[:-1]]
    assert not [source for source in sources if not (ROOT / source).exists()]
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "gptlab", "experiments"}
    assert needed <= set(sources), "the wheel is built from these"
    assert of["USER"] == ["1000"]
    assert lines.index(("USER", "1000")) > max(k for k, (kind, _) in enumerate(lines) if kind == "COPY")
    assert set(re.findall(r'^\["(\w+)"', of["CMD"][0])) <= set(PROJECT["scripts"])
    assert of["CMD"][0].startswith('["')


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_its_constraints_are_the_locks_versions(name: str, tmp_path: Path) -> None:
    (command,) = re.findall(r"^RUN (bash setup\.sh lock .*>locked\.txt)", (ROOT / name).read_text(), re.MULTILINE)
    command = command.replace(">locked.txt", f">{tmp_path / 'locked.txt'}")
    subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    locked = (tmp_path / "locked.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+( *;.*)?", line) for line in locked)
    names = {line.partition("==")[0].lower() for line in locked}
    assert {re.split(r"[^\w-]", one)[0] for one in PROJECT["dependencies"]} <= names
