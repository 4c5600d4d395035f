"""Fixtures of the fault tests: one corpus and one uninterrupted run a session, and processes that are ended."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Trainer, kill, make_corpus, outcome


@pytest.fixture(scope="session", autouse=True)
def _hang_ups_are_heard() -> Iterator[None]:
    """As in a terminal, also where the tests themselves run under nohup: what it ignores, children ignore too."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("faults") / "corpus")


@pytest.fixture
def trainer(corpus: Path, tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(corpus, tmp_path)
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, trained in one go by one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = Trainer(corpus, folder)
    try:
        ended = trainer.train(folder / "run")
        assert ended.code == 0, ended.err
    finally:
        trainer.close()
    assert outcome(folder / "run")[0][1] == 40
    return folder / "run"


@pytest.fixture(scope="session")
def _killed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    trainer = Trainer(corpus, folder)
    try:
        running = trainer.start(folder / "run")
        running.wait_for_rows(folder / "run", 14)
        kill(running, "worker", random.Random(0))
        running.end()
    finally:
        trainer.close()
    return folder / "run"


@pytest.fixture
def killed(_killed: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copies of the tiny run as a kill left it after update 13: checkpoints at 5 and 10."""
    copies = 0

    def copy() -> Path:
        nonlocal copies
        copies += 1
        return Path(shutil.copytree(_killed, tmp_path / f"killed_{copies}"))

    return copy
