"""An arm's patch: applied to a copy alone, recorded, refused where it does not fit."""

from __future__ import annotations

import difflib
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.errors import ConfigError
from gptlab.runs.patches import MARK, applied, package, patched

Diff = Callable[[str, str, str], Path]


@pytest.fixture
def diff(tmp_path: Path) -> Diff:
    """`diff("errors.py", old, new)` is a patch of the package's file, as git writes it."""

    def write(file: str, old: str, new: str) -> Path:
        before = (package() / file).read_text(encoding="utf-8")
        assert old in before
        names = (f"a/gptlab/{file}", f"b/gptlab/{file}")
        lines = difflib.unified_diff(before.splitlines(True), before.replace(old, new).splitlines(True), *names)
        path = tmp_path / "idea.diff"
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


def test_only_the_copy_is_changed_and_it_knows_its_patch(diff: Diff, tmp_path: Path) -> None:
    patch = diff("randomness.py", "% 2**63", "% 2**62")
    before = (package() / "randomness.py").read_bytes()
    copy = patched(patch, tmp_path / "copies")
    assert "% 2**62" in (copy / "gptlab" / "randomness.py").read_text()
    assert (package() / "randomness.py").read_bytes() == before
    assert applied() is None
    said = "import sys; sys.path.insert(0, sys.argv[1]); from gptlab.runs import patches as p; print(p.applied())"
    done = subprocess.run([sys.executable, "-c", said, str(copy)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(patch.read_bytes()).hexdigest()
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [copy.name], "nothing half-made is left"


def test_a_copy_is_made_once_and_anew_for_another_patch(diff: Diff, tmp_path: Path) -> None:
    first = patched(diff("randomness.py", "% 2**63", "% 2**62"), tmp_path / "copies")
    (first / "gptlab" / MARK).touch()
    stamp = (first / "gptlab" / MARK).stat().st_mtime_ns
    assert patched(tmp_path / "idea.diff", tmp_path / "copies") == first
    assert (first / "gptlab" / MARK).stat().st_mtime_ns == stamp
    assert patched(diff("randomness.py", "% 2**63", "% 2**61"), tmp_path / "copies") != first


def test_a_copy_inside_a_repository_is_patched_too(diff: Diff, tmp_path: Path) -> None:
    """git leaves out files beside the folder that it stands in, without a word."""
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    copy = patched(diff("randomness.py", "% 2**63", "% 2**62"), tmp_path / "copies")
    assert "% 2**62" in (copy / "gptlab" / "randomness.py").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; expected a file such as `git diff` writes"),
        ("not a patch\n", "does not apply to gptlab .*: No valid patches in input"),
        ("--- a/gptlab/nowhere.py\n+++ b/gptlab/nowhere.py\n@@ -1 +1 @@\n-a\n+b\n", "gptlab/nowhere.py: No such file"),
        ("--- a/gptlab/errors.py\n+++ b/gptlab/errors.py\n@@ -1 +1 @@\n-a\n+b\n", "patch failed: gptlab/errors.py:1"),
        ("--- /dev/null\n+++ b/idea.py\n@@ -0,0 +1 @@\n+x = 1\n", "it changes nothing in gptlab/"),
        ("--- /dev/null\n+++ b/../idea.py\n@@ -0,0 +1 @@\n+x = 1\n", "invalid path"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    patch = tmp_path / "idea.diff"
    if text is not None:
        patch.write_text(text)
    with pytest.raises(ConfigError, match=message):
        patched(patch, tmp_path / "copies")
    assert not list((tmp_path / "copies").glob("*"))
    assert not (tmp_path / "idea.py").exists()
