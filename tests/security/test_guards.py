"""The guards of benchmarks/guards.py, which takes each of them out: their lines and tests are there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def guards() -> ModuleType:
    return load_script("benchmarks/guards.py")


def test_every_guard_and_its_tests_are_there(guards: ModuleType) -> None:
    for guard in guards.GUARDS:
        text = (ROOT / "gptlab" / guard.file).read_text(encoding="utf-8")
        assert text.count(guard.line) == 1, guard.what
        assert guard.tests, guard.what
        for test in guard.tests:
            path, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), test
    names = {guard.what for guard in guards.GUARDS}
    assert len(names) == len(guards.GUARDS)
    assert names.issuperset(name for guard in guards.GUARDS for name in guard.behind)


def test_a_guard_that_nothing_needs_is_told(
    guards: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gptlab").mkdir()
    (tmp_path / "gptlab" / "a.py").write_text("if wrong:\n    raise\n")
    guard = guards.Guard("x", "a.py", "if wrong:", "if False:", ("t",))
    for ends, said in (((0, 1), "noticed"), ((0, 0), "pass: t"), ((1,), "do not pass as it is (pytest ended with 1)")):
        codes = iter(ends)
        monkeypatch.setattr(guards, "run", lambda tests, copy, codes=codes: next(codes))
        assert guards.tried(guard, tmp_path)["said"] == said
        assert (tmp_path / "gptlab" / "a.py").read_text() == "if wrong:\n    raise\n"


def test_what_stands_behind_a_guard_is_taken_out_with_it(
    guards: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gptlab").mkdir()
    file = tmp_path / "gptlab" / "a.py"
    file.write_text("if first:\nif second:\n")
    first = guards.Guard("x", "a.py", "if first:", "if False:", ("t",), behind=("y",))
    monkeypatch.setattr(guards, "GUARDS", (first, guards.Guard("y", "a.py", "if second:", "if False:", ("u",))))
    seen: list[str] = []
    monkeypatch.setattr(guards, "run", lambda tests, copy: seen.append(file.read_text()) or len(seen) - 1)
    assert guards.tried(first, tmp_path)["said"] == "noticed"
    assert seen == ["if first:\nif second:\n", "if False:\nif False:\n"]
    assert file.read_text() == seen[0]
