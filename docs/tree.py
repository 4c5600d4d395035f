"""The tree of files in the README, each with the first words of the file itself.

    python docs/tree.py          rewrites the tree between its two marks
    python docs/tree.py --check  exits 1 where it is not as it should be

Tests, being many, are shown by folder.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tree: python docs/tree.py -->\n```\n", "```\n<!-- end of tree -->"
LONGEST = 100
GIT = ["git", "-c", "safe.directory=*", "ls-files"]  # a container's user may not own the checkout

SAID_HERE = {
    ".ci/run": "checks everything: ruff, pyright, pytest",
    ".github/workflows/ci.yml": "runs .ci/run on every push",
    "CHANGELOG.md": "what changed for those who use it",
    "LICENSE": "MIT",
    "pyproject.toml": "the package and its extras; settings of ruff, pyright and pytest",
    "requirements.txt": "the lock: every package with its version",
    "setup.sh": "sets everything up; made to be sourced",
    "log/": "where runs go",
    "tests/": "mirrors gptlab/; faults/ kills and stops real runs",
    "experiments/": "ready experiments",
    "benchmarks/results/": "what the benchmarks printed, with machine and command",
    "gptlab/data/gpt2_merges.bpe": "GPT-2's merges, checked by SHA-256",
    "docs/LOG.md": "decisions and negative results, newest first",
    "docs/metrics.md": "every row of metrics.jsonl and log.txt, with units",
    "docs/signals.md": "every signal, option and control: formula, gradient, when it fails; how to add one",
    "docs/verdicts.md": "how a verdict is reached, and what it promises",
    "docs/cluster/train.sbatch": "one run on several nodes of Slurm",
    "docs/cluster/train.sky.yaml": "one run on several nodes of a cloud, by SkyPilot",
    "docs/images/": "the picture above",
    "docs/findings/": "results, each with its command, seeds and machine",
}
HIDDEN = {"README.md", ".gitignore", "docs/README.md"}


def tree() -> str:
    """One line a tracked file (or folder, for those of SAID_HERE), indented by folder."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    shown: dict[str, str] = {}
    for name in filter(None, listed):
        folder = next((f for f in SAID_HERE if f.endswith("/") and name.startswith(f)), None)
        if name not in HIDDEN and (ROOT / name).exists():
            shown[folder or name] = SAID_HERE[folder] if folder else said(name)
    width = max(2 * name.rstrip("/").count("/") + len(_last(name)) for name in shown) + 2
    lines, open_folders = [], []
    for name in sorted(shown, key=lambda name: (_depth_first(name), name)):
        folders = name.rstrip("/").split("/")[:-1]
        for depth, folder in enumerate(folders):
            if open_folders[: depth + 1] != folders[: depth + 1]:
                package = "/".join(folders[: depth + 1]) + "/__init__.py"
                lines.append(f"{'  ' * depth + folder + '/':<{width}}{shown.get(package, '')}".rstrip())
        open_folders = folders
        if not name.endswith("__init__.py"):
            lines.append(f"{'  ' * len(folders) + _last(name):<{width}}{shown[name]}".rstrip())
    return "\n".join(lines) + "\n"


def said(name: str) -> str:
    """What a file says it is for: its first sentence, cut where it takes a breath."""
    if name in SAID_HERE:
        return SAID_HERE[name]
    text = (ROOT / name).read_text(encoding="utf-8") if name.endswith((".py", ".toml", ".md")) else ""
    if name.endswith(".py"):
        words = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        words = text.partition("\n")[0].lstrip("# ")
    words = re.split(r"\.(?: (?=[A-Z])|$)", words)[0]
    pauses = [match.start() for match in re.finditer(r"[:;,] ", words) if LONGEST // 3 < match.start() <= LONGEST]
    return words if len(words) <= LONGEST or not pauses else words[: pauses[-1]]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] + "/" * name.endswith("/")


def _depth_first(name: str) -> list[tuple[bool, str]]:
    """Sorts a folder's files before its folders."""
    parts = name.rstrip("/").split("/")
    return [(True, part) for part in parts[:-1]] + [(name.endswith("/"), parts[-1])]


def with_tree(readme: str) -> str:
    """The README's text with the tree as it should be."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + tree() + END + rest.partition(END)[2]


if __name__ == "__main__":
    path = ROOT / "README.md"
    found = path.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(found != with_tree(found))
    path.write_text(with_tree(found), encoding="utf-8")
