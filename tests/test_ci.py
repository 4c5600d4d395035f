"""What CI asks of a package index about known holes and what it trusts; and the Dockerfiles, without a builder."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND = "Found 1 known vulnerability in 1 package\nName  Version ID\ntiny 1 CVE-1"
UNKNOWN = "{}  Dependency not found on PyPI and could not be audited: {} (1)"


def audit(folder: Path, *, says: str | None, ends: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """.ci/run's function over a lock of two packages, where pip-audit answers so; None: it is not installed."""
    function = re.search(r"^audit\(\) \{\n.*?^\}\n", (ROOT / ".ci/run").read_text(), re.MULTILINE | re.DOTALL)
    assert function
    (folder / "requirements.txt").write_text("one==1 \\\n    --hash=sha256:1\ntwo==1\n# three==1\n")
    tools = folder / "bin"
    tools.mkdir()
    for name in ("python3", *(["pip-audit"] if says is not None else [])):
        (tools / name).write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {ends}\n")
        (tools / name).chmod(0o755)
    script = f'set -uo pipefail\nnot_audited=\n{function[0]}\naudit; code=$?; echo "<$not_audited>"; exit $code'
    settings = {"PATH": f"{tools}:/usr/bin:/bin", "TMPDIR": str(folder), **environment}
    return subprocess.run(["bash", "-c", script], cwd=folder, env=settings, capture_output=True, text=True)


@pytest.mark.parametrize("required", ["", "required"])
@pytest.mark.parametrize(
    ("says", "ends", "reason"),
    [
        (None, 1, r"pip-audit ended with 127: .*No such file"),
        ("Traceback\nConnectionError: no route", 1, "pip-audit ended with 1: ConnectionError: no route"),
        ("", 124, "pip-audit ended with 124: "),
        ("\n".join(["No known vulnerabilities found", *(UNKNOWN.format(n, n) for n in ("one", "two"))]), 0,
         "the index answers about none of the 2 packages"),
    ],
)  # fmt: skip
def test_no_answer_is_said_in_capitals_and_fails_where_one_is_required(
    says: str | None, ends: int, reason: str, required: str, tmp_path: Path
) -> None:
    done = audit(tmp_path, says=says, ends=ends, AUDIT=required)
    assert done.returncode == (1 if required else 0), done.stdout + done.stderr
    assert re.search(f"^== NOT AUDITED: {reason}", done.stdout, re.MULTILINE)
    assert re.search(f"^<{reason}.*>$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("required", ["", "required"])
def test_known_holes_fail_and_are_listed(required: str, tmp_path: Path) -> None:
    done = audit(tmp_path, says=FOUND, ends=1, AUDIT=required)
    assert done.returncode == 1
    assert "CVE-1" in done.stdout
    assert "NOT AUDITED" not in done.stdout


def test_packages_without_an_answer_are_counted(tmp_path: Path) -> None:
    done = audit(tmp_path, says=f"No known vulnerabilities found\n{UNKNOWN.format('one', 'one')}", ends=0)
    assert (done.returncode, done.stdout) == (0, "   asked about 2 packages, 1 without an answer\n<>\n")


def test_workflows_pin_what_they_run_and_may_write_nothing() -> None:
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        text = path.read_text()
        used = re.findall(r"uses: (\S+)", text)
        assert used
        assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used), used
        assert re.search(r"^permissions:\n  contents: read\n(?! )", text, re.MULTILINE)


def test_what_readmes_command_leaves_out_is_run_by_a_second_one(pytestconfig: pytest.Config) -> None:
    words = [str(word) for word in pytestconfig.getini("addopts")]
    left_out = words[words.index("-m") + 1]
    script = (ROOT / ".ci/run").read_text()
    assert left_out == "not slow"
    assert re.search(
        r"\nbash -c 'source setup.sh && pytest' \|\| code=1\n.*\npytest -m slow \|\| code=1\nexit \$code\n$", script
    )


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
