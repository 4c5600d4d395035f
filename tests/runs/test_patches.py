"""An arm's patch: applied to a copy alone, recorded, refused where it does not fit."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptlab.errors import ConfigError
from gptlab.runs.executor import MARK, PatchedPackage, applied, package, patched

Diff = Callable[[str, str, str], Path]
Unpack = Callable[[PatchedPackage], Path]


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


@pytest.fixture
def unpack() -> Iterator[Callable[[PatchedPackage], Path]]:
    """A copy of patched code on disk, removed after the test."""
    made: list[Path] = []

    def one(code: PatchedPackage) -> Path:
        made.append(code.unpack())
        return made[-1]

    yield one
    for folder in made:
        shutil.rmtree(folder)


def test_only_a_private_copy_is_changed_and_it_knows_its_patch(diff: Diff, unpack: Unpack) -> None:
    patch = diff("randomness.py", "% 2**63", "% 2**62")
    before = (package() / "randomness.py").read_bytes()
    copy = unpack(patched(patch))
    assert "% 2**62" in (copy / "gptlab" / "randomness.py").read_text()
    assert (package() / "randomness.py").read_bytes() == before
    assert applied() is None
    assert copy.stat().st_mode & 0o077 == 0, "nobody else can put anything into it"
    said = "import sys; sys.path.insert(0, sys.argv[1]); from gptlab.runs import executor as p; print(p.applied())"
    done = subprocess.run([sys.executable, "-c", said, str(copy)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(patch.read_bytes()).hexdigest()


def test_the_copy_is_all_of_the_package_and_made_afresh_each_time(diff: Diff, unpack: Unpack) -> None:
    code = patched(diff("randomness.py", "% 2**63", "% 2**62"))
    first, second = unpack(code), unpack(code)
    assert first != second
    (first / "gptlab" / "errors.py").write_text("planted")
    (first / "sitecustomize.py").write_text("planted")
    third = unpack(code)

    def files(folder: Path) -> dict[str, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}

    original = {f"gptlab/{name}": content for name, content in files(package()).items()}
    for copy in (second, third):
        different = {name for name in {*original, *files(copy)} if original.get(name) != files(copy).get(name)}
        assert different == {"gptlab/randomness.py", f"gptlab/{MARK}"}


def test_code_for_another_machine_is_checked_before_it_is_used(diff: Diff, tmp_path: Path) -> None:
    code = patched(diff("randomness.py", "% 2**63", "% 2**62"))
    path, sha256 = tmp_path / "code.json", hashlib.sha256(code.archive).hexdigest()
    path.write_bytes(code.archive)
    assert PatchedPackage.from_archive(path, sha256).files == code.files
    path.write_bytes(code.archive.replace(b"2**62", b"2**61"))
    with pytest.raises(ConfigError, match=r"code\.json: expected the code that was submitted, found another content"):
        PatchedPackage.from_archive(path, sha256)
    path.rename(tmp_path / "other")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="is a link to elsewhere"):
        PatchedPackage.from_archive(path, sha256)


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_no_repository_around_it_matters(
    variable: str, diff: Diff, unpack: Unpack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """git leaves out files outside the repository that it finds itself in, without a word."""
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "--quiet", str(repository)], check=True)
    monkeypatch.setenv(variable, str(repository / ".git" if variable == "GIT_DIR" else repository))
    monkeypatch.setattr(tempfile, "tempdir", str(repository))
    copy = unpack(patched(diff("randomness.py", "% 2**63", "% 2**62")))
    assert "% 2**62" in (copy / "gptlab" / "randomness.py").read_text()


def new(name: str, content: str = "x = 1", mode: str = "100644") -> str:
    return (
        f"diff --git a/{name} b/{name}\nnew file mode {mode}\n--- /dev/null\n+++ b/{name}\n@@ -0,0 +1 @@\n+{content}\n"
    )


def removal(name: str) -> str:
    lines = (package().parent / name).read_text().splitlines(True)
    diff = difflib.unified_diff(lines, [], f"a/{name}", "/dev/null")
    return f"diff --git a/{name} b/{name}\ndeleted file mode 100644\n{''.join(diff)}"


def binary() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gptlab", "idea.py")
        path.parent.mkdir()
        path.write_bytes(bytes(range(256)))
        command = ["git", "diff", "--no-index", "--binary", "/dev/null", "gptlab/idea.py"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


REFUSED = {
    "none": (None, "No such file or directory; expected a file such as `git diff` writes"),
    "no patch": ("not a patch\n", "does not apply to gptlab .*: No valid patches in input"),
    "empty": ("", "does not apply to gptlab .*: No valid patches in input|it changes nothing"),
    "no file": ("--- a/gptlab/nowhere.py\n+++ b/gptlab/nowhere.py\n@@ -1 +1 @@\n-a\n+b\n", "nowhere.py: No such file"),
    "no fit": ("--- a/gptlab/errors.py\n+++ b/gptlab/errors.py\n@@ -1 +1 @@\n-a\n+b\n", "failed: gptlab/errors.py:1"),
    "up": ("--- /dev/null\n+++ b/../idea.py\n@@ -0,0 +1 @@\n+x = 1\n", "invalid path"),
    "next to the package": (new("idea.py"), "Python files in gptlab/, found another file: 'idea.py'"),
    "sitecustomize": (new("sitecustomize.py"), "found another file: 'sitecustomize.py'"),
    "a package of another name": (new("numpy/__init__.py"), "found another file: 'numpy/__init__.py'"),
    "setup": (new("setup.sh", "rm -rf ~"), "found another file: 'setup.sh'"),
    "tests": (new("tests/test_idea.py"), "found another file: 'tests/test_idea.py'"),
    "an idea and a test": (new("gptlab/idea.py") + new("tests/conftest.py"), "another file: 'tests/conftest.py'"),
    "a template": (new("gptlab/page/templates/x.html"), "found another file: 'gptlab/page/templates/x.html'"),
    "the mark": (new(f"gptlab/{MARK}", "0" * 64), "found another file: 'gptlab/PATCH.sha256'"),
    "compiled": (new("gptlab/x.cpython-311.pyc"), "found another file"),
    "a library": (new("gptlab/x.so"), "found another file"),
    "hidden": (new("gptlab/.x.py"), "found another file"),
    "a strange name": (new("gptlab/x y.py"), "found another file|does not apply"),
    "a program": (new("gptlab/idea.py", mode="100755"), "found a program: 'gptlab/idea.py'"),
    "made a program": (
        "diff --git a/gptlab/errors.py b/gptlab/errors.py\nold mode 100644\nnew mode 100755\n",
        "found a program: 'gptlab/errors.py'",
    ),
    "binary": ("binary", "found no text: 'gptlab/idea.py'"),
    "escapes": (new("gptlab/idea.py", "# \x1b[2J"), "found no text: 'gptlab/idea.py'"),
    "a link": (new("gptlab/idea.py", "/etc/passwd", mode="120000"), "found a link: 'gptlab/idea.py'"),
    "removal": ("removal", "it removes 'gptlab/randomness.py'"),
    "renaming": (
        "diff --git a/gptlab/randomness.py b/gptlab/idle.py\nsimilarity index 100%\n"
        "rename from gptlab/randomness.py\nrename to gptlab/idle.py\n",
        "it removes 'gptlab/randomness.py'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_patch_changes_python_files_of_the_package_and_nothing_else(kind: str, tmp_path: Path) -> None:
    text, message = REFUSED[kind]
    patch = tmp_path / "idea.diff"
    if text is not None:
        made = {"removal": lambda: removal("gptlab/randomness.py"), "binary": binary}
        patch.write_text(made[text]() if text in made else text)
    with pytest.raises(ConfigError, match=message) as caught:
        patched(patch)
    assert str(patch) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ([] if text is None else ["idea.diff"])


@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder", "large"])
def test_a_patch_is_a_file_of_a_patchs_size(kind: str, tmp_path: Path) -> None:
    patch = Path("/dev/zero") if kind == "zeros" else tmp_path / "idea.diff"
    if kind == "pipe":
        os.mkfifo(patch)
    elif kind == "folder":
        patch.mkdir()
    elif kind == "large":
        patch.write_text(new("gptlab/idea.py", "#" * 2_000_000))
    with pytest.raises(ConfigError, match=r"expected a regular file, found|expected at most 1 MB, found 1 MB"):
        patched(patch)


SHIPPED = sorted((package().parent / "experiments/patches").glob("*.diff"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_patch_applies_to_the_code_as_it_is(path: Path) -> None:
    assert any(name.startswith("gptlab/model/") for name in patched(path).files)
