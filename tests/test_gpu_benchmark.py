"""benchmarks/gpu.py on a CPU: every section runs and is ok, and a broken one is reported. No figure is tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import ROOT, load_script

script = load_script("benchmarks/gpu.py")


def test_the_page_says_what_was_measured_and_nothing_else() -> None:
    between = script.PAGE.read_text().partition(script.START)[2].partition(script.END)[0].strip()
    found = json.loads(script.RESULT.read_text()) if script.RESULT.exists() else {}
    assert between == script.page(found).strip()
    assert script.page({}) == "Not measured.\n\n"
    row = {"name": "exact", "batch": 16, "tokens_per_second": 1234.5, "spread": 0.01, "share_of_limit": None}
    row |= {"peer": "transformers", "against_peer": 1.5}
    where = {"machine": "a GPU", "torch": "2.13.0", "date": "2026-12-01", "seconds": 9.0}
    page = script.page({
        "parity": {**where, "status": "ended with exit code 1: a|b", "summary": ["one", "two"]},
        "speed": {**where, "status": "ok", "tokens": 1024, "rows": [row]},
        "resume": {"status": "cut off after 5 s: ", "seconds": 5.0},
    })  # fmt: skip
    assert "| parity | ended with exit code 1: a/b | one; two | a GPU, torch 2.13.0, 2026-12-01 |" in page
    assert "| exact | 16 | 1,234 | 1.0% |  | transformers 1.50x |" in page


@pytest.mark.slow
def test_every_section_is_ok_on_a_cpu(tmp_path: Path) -> None:
    before = script.PAGE.read_text()
    code = script.main(["--tiny", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: of["status"] for name, of in found.items()} == dict.fromkeys(script.SECTIONS, "ok")
    assert code == 0
    assert len(found["parity"]["differences"]["bf16 compiled"]) > 30
    assert set(found["determinism"]["repeats"].values()) == {True}
    assert found["resume"]["as shipped"] == {"bit for bit": True, "losses apart": 0.0}
    names = {row["name"] for row in found["speed"]["rows"]}
    assert names == {"baseline", "exact", "rotate", "positions", "whole model", "transformers"}
    assert found["torchrun"]["processes"] == 2
    assert len(found["generate"]["rows"]) == 4
    assert script.PAGE.read_text() == before
    assert "| generate | ok |" in script.page(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "limit", "status"),
    [
        ("raise RuntimeError('broken here')", "0", "ended with exit code 1: RuntimeError: broken here"),
        ("import os; os.kill(os.getpid(), 9)", "0", "ended by SIGKILL; was memory short?"),
        ("import time; time.sleep(600)", "20", "cut off after 20 s"),
    ],
)
def test_a_broken_section_is_said_to_be(
    what: str, limit: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text(what)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    (tmp_path / "found.json").write_text(json.dumps({"parity": {"status": "ok", "seconds": 1.0}}))
    code = script.main(["--tiny", "--only", "generate", "--limit", limit, "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 1
    assert found["generate"]["status"].startswith(status)
    assert found["parity"]["status"] == "ok", "a section that was not asked for stays as it was"
