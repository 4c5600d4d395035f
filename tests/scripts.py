"""Scripts, as modules for the tests of what is in them, and as the ranks of one process group. No tests here.

Ranks are processes of their own over gloo on the loopback, forked from one that has imported PyTorch: the import takes
longer than most of what they do.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PATIENCE = 300.0
"""Seconds for all ranks together."""
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "gptlab.training"]
)


def run_ranks(script: Path, size: int, *words: object) -> None:
    """Run a script in `size` processes; all of them have ended, and without error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(size)]
        ranks = [
            _FORKED.Process(
                target=_become,
                args=(script, [*map(str, words)], common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, said[rank]),
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + PATIENCE
        try:
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        assert codes == [0] * size, [path.read_text() for path in said]


def _become(script: Path, words: list[str], environment: dict[str, str], said: Path) -> None:
    """Be a rank: the script with these words, in this process; what it says on standard error goes to a file."""
    with said.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def load_script(path: str) -> ModuleType:
    """A script as a module, by its path from the root, such as "tools/scale.py"; loaded once.

    Its folder is one to import from, as when Python runs it.
    """
    file, name = ROOT / path, "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
