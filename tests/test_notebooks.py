"""The notebooks of docs/tutorials: each page shows what its notebook holds, and a new run gives the same again."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

tool = load_script("tools/notebooks.py")
NOTEBOOKS = tool.notebooks()


def outputs(notebook: dict[str, Any]) -> list[list[str]]:
    """What the cells show, without what a processor that rounds otherwise may change.

    Of tables their titles, headers and arms; of texts all but digits and verdicts.
    """
    shown = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/html" in data:
                page = "".join(data["text/html"])
                shown.append(re.findall(r"<(?:caption|th)>.*?<|<tr><td>[^(<]*", page))
            else:
                text = "".join(output.get("text") or data["text/plain"])
                text = re.sub(r"better|worse|no difference|undecided", "VERDICT", text)
                shown.append([*data, re.sub(r"[-+]?[\d.,]*\d(e-?\d+)?", "0", text)])
    return shown


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["idea", "trainer"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_is_what_its_executed_notebook_holds(path: Path) -> None:
    notebook = tool.read(path)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    page, images = tool.rendered(notebook, path.stem)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page, "run `python tools/notebooks.py --render`"
    assert {name: (tool.FOLDER / name).read_bytes() for name in images} == images
    assert path.stat().st_size < 100_000
    for said in re.findall(r"Here it is \*([\w ]+)\*", page):
        assert f"'verdict': '{said}'" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of a library that only writers of documents have
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_the_same_again(path: Path) -> None:
    if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
        reason = "needs nbclient and ipykernel (pip install -e '.[docs]')"
        # .ci/run installs them with the site's generator, so that a skip there would hide notebooks that no longer run
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    notebook = tool.read(path)
    assert outputs(tool.executed(notebook)) == outputs(notebook)
