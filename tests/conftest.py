"""What tests in every folder share: the programs that some of them drive, and a tiny corpus with a tiny run over it.

Tests of faults are marked with the fault's number; `--rounds N` makes each of them N times, at other moments.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import page as page
from pages import served as served
from run_folders import TINY
from run_folders import hostile_experiment as hostile_experiment
from run_folders import write_run as write_run

from gptlab.analysis.report.run import write_run as write_report
from gptlab.cli.main import main
from gptlab.data.shards import write_shard

CACHE = tempfile.TemporaryDirectory(prefix="gptlab_tests_")
os.environ["XDG_CACHE_HOME"] = CACHE.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=1, help="how often each test of a fault is made")
    parser.addoption("--moments", type=int, default=0, help="seed of the moments at which faults strike")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rounds = metafunc.config.getoption("rounds")
    if rounds > 1 and metafunc.definition.get_closest_marker("fault"):
        metafunc.fixturenames.append("fault_round")
        metafunc.parametrize("fault_round", range(rounds))


@pytest.fixture
def choose(request: pytest.FixtureRequest) -> random.Random:
    """Draws for moments and victims: the same every time, but for `--rounds` and `--moments`."""
    return random.Random(f"{request.config.getoption('moments')} {request.node.name}")


@pytest.fixture(scope="session")
def requires_program() -> Callable[[str], str]:
    """`requires_program("screen")` is the program's path; where there is none, the test is skipped.

    With CI=true it fails instead: the machine that checks everything must have everything.
    """

    def path_of(program: str) -> str:
        if path := shutil.which(program):
            return path
        reason = f"needs {program} (Debian: apt install {program})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)

    return path_of


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 training and 1,000 validation bytes of a text that a model learns a little of in a few steps."""
    folder = tmp_path_factory.mktemp("tiny") / "corpus"
    folder.mkdir()
    (folder / "tokenizer.txt").write_text("bytes\n")
    text = "".join(f"line {i * i % 97} of the play, and [bold]no[/bold] more\n" for i in range(200)).encode()
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    write_shard(folder / "train_000000.bin", tokens[:4000])
    write_shard(folder / "val_000000.bin", tokens[4000:5000])
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_corpus: Path) -> Callable[..., list[str]]:
    """`tiny(out, steps=3)`: the words of `gptlab train` for a run of a second; `signal_name` means `signal.name`."""

    def words(out: Path, **changes: Any) -> list[str]:
        values = {**TINY, "data": tiny_corpus, "out": out, **changes}
        named = {key.replace("signal_", "signal."): value for key, value in values.items()}
        return ["train", *(f"--{key}={value}" for key, value in named.items())]

    return words


@pytest.fixture(scope="module", autouse=True)
def _reports_only_where_they_are_read(request: pytest.FixtureRequest) -> Iterator[None]:
    """Half of what a tiny run takes is its report; modules that read one set WITH_REPORTS."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "WITH_REPORTS", False):
            patch.setattr("gptlab.analysis.report.after_run", lambda folder: f"none: not read here: {folder}")
        yield


@pytest.fixture(scope="session")
def finished_run(tiny: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the block loss. It is shared: a test that changes it takes `run`."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(tiny(out, signal_name="confidence", sample_every=3, checkpoint_every=3, noise_every=3)) == 0
    write_report(out)
    return out


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors here are tiny: a second thread only waits, and waits badly where tests run beside other work.

    Every test begins so, whatever the one before it ran: `placement.apply` sets the threads of the process.
    """
    import torch

    torch.set_num_threads(1)
