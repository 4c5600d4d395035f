"""Fixtures of the fault tests: one corpus and one uninterrupted run a session, and processes that are ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `harness`, which benchmarks/faults.py imports too

from harness import Trainer, make_corpus, outcome


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
