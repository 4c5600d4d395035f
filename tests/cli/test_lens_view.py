"""The tables of a lens: as many blocks side by side as the terminal has room for, and nothing cut off."""

from __future__ import annotations

from typing import Any

import pytest

from gptlab.cli.lens import show

Capture = pytest.CaptureFixture[str]


def block(number: int) -> dict[str, Any]:
    words = [" Shakespeare", "\x1b[2J", "日本"]
    top = [{"token": 1, "text": word, "probability": 0.5 / (1 + place)} for place, word in enumerate(words)]
    return {"top": top, "entropy": number + 0.25, "agrees": number == 12}


@pytest.fixture
def found() -> dict[str, Any]:
    """One position read by 12 blocks."""
    positions = [{"token": 1, "text": "a", "blocks": [block(number) for number in range(1, 13)]}]
    means = [{"confidence": 0.5, "entropy": 2.0, "agreement": 1.0}] * 12
    return {"readers": {"raw": {"positions": positions, "blocks": means}}}


@pytest.mark.parametrize(("columns", "tables"), [(80, 4), (300, 1)])
def test_every_block_is_shown_whatever_the_width(
    columns: int, tables: int, found: dict[str, Any], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    show(found)
    out = capsys.readouterr().out
    assert all(f"{number}.25 " in out for number in range(1, 13))
    assert out.count("┃ read ┃") == tables
    assert "…" not in out
    assert ("raw reading, blocks 1 to " in out) == (tables > 1)
    assert out.count("' Shakespeare' 50%") == 12


def test_as_many_tokens_as_were_asked_for(
    found: dict[str, Any], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    show(found)
    assert "25%" not in capsys.readouterr().out
    show(found, top=2)
    out = capsys.readouterr().out
    assert out.count("'␛[2J' 25%") == 12
    assert "17%" not in out
