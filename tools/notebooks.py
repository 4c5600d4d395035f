"""The notebooks of docs/tutorials: executes them, and writes each as a page of the site, which renders no notebooks.

    pip install -e '.[docs]' && python tools/notebooks.py             # execute, then render: a minute or two
    python tools/notebooks.py --render                                # from the outputs that the notebooks hold

A page is what its notebook holds and nothing else (tests/test_tools.py).
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import base64
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
SECONDS = 900
"""The most that one cell may take."""


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def executed(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of a new kernel that starts in an empty folder; raises where a cell fails."""
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as settings:
        patience: dict[str, Any] = {"timeout": SECONDS, "startup_timeout": SECONDS}
        client = NotebookClient(node, kernel_name="python3", record_timing=False, **patience)
        client.execute(cwd=folder, env={**os.environ, "IPYTHONDIR": settings})  # nobody's own start-up files
    node.metadata["language_info"] = {"name": "python"}  # without the version of whoever ran it
    return json.loads(nbformat.writes(node))


def rendered(notebook: Mapping[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and the images that it shows by their file's name."""
    parts, images = list[str](), dict[str, bytes]()
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}_{len(images) + 1}.png"
                images[file] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{cell['metadata'].get('alt', 'Figure')}]({file})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--render", action="store_true", help="execute nothing")
    options = parser.parse_args()
    for path in notebooks():
        if not options.render:
            path.write_text(json.dumps(executed(read(path)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page, images = rendered(read(path), path.stem)
        path.with_suffix(".md").write_text(page, encoding="utf-8")
        for name, content in images.items():
            (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    main()
