"""No line of ours runs what it reads, but where that is asked for; and the check finds what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("*.py"), *(p for d in ("gptlab", "benchmarks", "tools") for p in (ROOT / d).rglob("*.py"))])

EXCEPTED = {
    ("gptlab/signals/registry.py", "exec"): "a user's own signal file is code, and runs with --allow_code only",
    ("gptlab/signals/registry.py", "compile"): "the same",
    ("gptlab/__init__.py", "importlib.import_module"): "a module of a table in our own code",
    ("gptlab/benchmark/contenders.py", "exec_module"): "a peer's training script, which --peer NAME=PATH asks to run",
    ("gptlab/cli/main.py", "importlib.import_module"): "a command of COMMANDS",
    ("gptlab/evals/scoring.py", "importlib.import_module"): "a module of lm_eval, named in the file itself",
    ("gptlab/processes.py", "importlib.import_module"): "modules of ours and of PyTorch, named in the file itself",
}


OF_THE_PACKAGE = "a file of the package itself"
OUR_OWN = "in a fresh folder that nobody else knows"
OPENED = {
    ("gptlab/analysis/report/page.py", ".read_text"): OF_THE_PACKAGE,
    ("gptlab/page/views.py", ".read_text"): OF_THE_PACKAGE,
    ("gptlab/page/views.py", ".read_bytes"): OF_THE_PACKAGE,
    ("gptlab/runs/executor.py", ".read_bytes"): "the package's files, and a patched copy of them",
    ("gptlab/runs/executor.py", "tempfile.mkdtemp"): OUR_OWN,
    ("gptlab/runs/executor.py", "tempfile.TemporaryDirectory"): OUR_OWN,
    ("gptlab/runs/smoke.py", "tempfile.TemporaryDirectory"): OUR_OWN,
    ("gptlab/benchmark/contenders.py", "tempfile.TemporaryDirectory"): OUR_OWN,
    ("gptlab/benchmark/contenders.py", ".write_text"): OUR_OWN,
    ("gptlab/data/corpora.py", "tempfile.TemporaryDirectory"): OUR_OWN,
    ("gptlab/data/corpora.py", ".write_text"): OUR_OWN,
    ("gptlab/data/corpora.py", ".read_bytes"): "texts of an installed package",
    ("gptlab/data/corpora.py", ".open"): "an archive in memory",
    ("gptlab/data/corpora.py", "os.replace"): "an archive whose checksum was compared, into the user's cache",
    ("gptlab/runs/archive.py", ".open"): "gzip of bytes in memory",
    ("gptlab/benchmark/run.py", ".read_text"): "/proc",
    ("gptlab/distributed.py", ".read_bytes"): "/proc",
    ("gptlab/distributed.py", "os.open"): "in torchrun's own folder, no link followed",
    ("gptlab/cli/console.py", "open"): "/dev/null",
    ("gptlab/processes.py", "os.open"): "/dev/null",
    ("gptlab/judge/lab.py", ".read_text"): "/proc",
    ("gptlab/processes.py", ".read_text"): "/proc",
    ("gptlab/judge/trial.py", "tempfile.TemporaryDirectory"): OUR_OWN,
    ("gptlab/judge/trial.py", ".write_bytes"): "a copy of the baseline, in a new folder of the lab",
    ("gptlab/judge/trial.py", "shutil.move"): "the patched package, from a fresh folder into a new one of the lab",
    ("gptlab/cli/console.py", "os.open"): "/dev/null",
    ("gptlab/data/shards.py", "numpy.memmap"): "of a file that open_regular gave",
    ("gptlab/data/shards.py", "numpy.load"): "of a path that open_regular has opened; numpy maps a path alone",
    ("gptlab/model/formats.py", "numpy.fromfile"): "of a file that open_regular gave",
    ("gptlab/model/huggingface.py", ".rename"): "a folder, put in its place whole",
    ("gptlab/runs/checkpoint.py", ".rename"): "a folder, put in its place whole, or away",
    ("gptlab/runs/folder.py", ".rename"): "a run's folder, into the trash",
}
"""Who opens files without gptlab/files.py, and why."""


def test_files_are_read_and_written_in_one_way() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), one.what): one.line
        for path in FILES
        if path.is_relative_to(ROOT / "gptlab") and path != ROOT / "gptlab" / "files.py"
        for one in files_in(path.read_text(encoding="utf-8"))
    }
    assert {where: line for where, line in found.items() if where not in OPENED} == {}, "use gptlab/files.py"
    assert not OPENED.keys() - found.keys(), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("snippet", "what"),
    [
        ("open('x')", "open"),
        ("with open(path, 'w') as f:\n    pass", "open"),
        ("path.open('wb')", ".open"),
        ("Path('x').write_text('y')", ".write_text"),
        ("(folder / 'x').read_bytes()", ".read_bytes"),
        ("path.write_bytes(b'')", ".write_bytes"),
        ("path.read_text(encoding='utf-8')", ".read_text"),
        ("path.touch()", ".touch"),
        ("temporary.replace(path)", ".replace"),
        ("path.rename(other)", ".rename"),
        ("import os\nos.replace(a, b)", "os.replace"),
        ("from os import replace\nreplace(a, b)", "os.replace"),
        ("import os as o\no.open(path, 0)", "os.open"),
        ("from io import open\nopen(path)", "io.open"),
        ("import numpy as np\nnp.load(path)", "numpy.load"),
        ("from numpy import memmap\nmemmap(path)", "numpy.memmap"),
        ("import numpy\nnumpy.fromfile(path)", "numpy.fromfile"),
        ("import shutil\nshutil.copyfile(a, b)", "shutil.copyfile"),
        ("from shutil import copytree\ncopytree(a, b)", "shutil.copytree"),
        ("import tempfile\ntempfile.NamedTemporaryFile()", "tempfile.NamedTemporaryFile"),
        ("from tempfile import mkstemp\nmkstemp()", "tempfile.mkstemp"),
    ],
)
def test_a_file_that_is_opened_otherwise_is_found(snippet: str, what: str) -> None:
    assert [one.what for one in files_in(snippet)] == [what]


@pytest.mark.parametrize(
    "snippet",
    [
        "from gptlab.files import read_text, write_whole\nread_text(path)\nwrite_whole(path, 'x')",
        "from gptlab import files\nfiles.open_append(path)\nfiles.read_bytes(path)",
        "text.replace('a', 'b')\nfrom dataclasses import replace\nreplace(config, steps=3)",
        "self._open(path)\nfile.reopen()",
    ],
)
def test_what_opens_no_file_is_not_found(snippet: str) -> None:
    assert files_in(snippet) == []


def test_nothing_runs_what_it_reads() -> None:
    assert len(FILES) > 150
    found = {
        (path.relative_to(ROOT).as_posix(), one.what): one.line
        for path in FILES
        for one in found_in(path.read_text(encoding="utf-8"))
    }
    assert {where: line for where, line in found.items() if where not in EXCEPTED} == {}
    assert not EXCEPTED.keys() - found.keys(), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("snippet", "what"),
    [
        ("import pickle", "pickle"),
        ("import os, pickle as p", "pickle"),
        ("from pickle import loads", "pickle"),
        ("def f():\n    from cloudpickle import loads", "cloudpickle"),
        ("import dill", "dill"),
        ("import shelve", "shelve"),
        ("import marshal", "marshal"),
        ("from joblib import load", "joblib"),
        ("from torch import package", "torch.package"),
        ("import builtins", "builtins"),
        ("import runpy", "runpy"),
        ("import torch\ntorch.load(f)", "torch.load"),
        ("import torch as t\nt.load(f, map_location='cpu')", "torch.load"),
        ("from torch import load\nload(f)", "torch.load"),
        ("from torch import load as read\nread(f)", "torch.load"),
        ("import torch\ntorch.load(f, weights_only=False)", "weights_only"),
        ("import torch\ntorch.load(f, weights_only=safe)", "weights_only"),
        ("import torch\ntorch.load(f, weights_only=1)", "weights_only"),
        ("import torch\ntorch.load(f, **options)", "torch.load"),
        ("import torch\ntorch.save(x, f)", "torch.save"),
        ("model.from_pretrained(f, weights_only=False)", "weights_only"),
        ("model.from_pretrained(f, trust_remote_code=True)", "trust_remote_code"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle"),
        ("import numpy as np\nnp.load(f, allow_pickle=trusted)", "allow_pickle"),
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("list(map(eval, words))", "eval"),
        ("__import__('os')", "__import__"),
        ("compile(text, 'x', 'exec')", "compile"),
        ("import importlib\nimportlib.import_module(name)", "importlib.import_module"),
        ("from importlib import import_module\nimport_module(name)", "importlib.import_module"),
        ("spec.loader.exec_module(module)", "exec_module"),
        ("import yaml\nyaml.load(text)", "yaml.load"),
        ("from yaml import unsafe_load\nunsafe_load(text)", "yaml.unsafe_load"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
        ("from subprocess import run\nrun('ls', shell=flag)", "shell"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import popen\npopen('ls')", "os.popen"),
        ("import subprocess as s\ns.getoutput('ls')", "subprocess.getoutput"),
        ("import tarfile\ntarfile.open(f).extractall()", "extractall"),
        ("with zipfile.ZipFile(f) as z:\n    z.extract(name)", "extract"),
        ("import shutil\nshutil.unpack_archive(f)", "unpack_archive"),
        ("import torch.distributed as dist\ndist.broadcast_object_list(x)", "torch.distributed.broadcast_object_list"),
    ],
)
def test_what_is_to_be_found_is_found(snippet: str, what: str) -> None:
    assert what in [one.what for one in found_in(snippet)]


@pytest.mark.parametrize(
    "snippet",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f, allow_pickle=False)\nnp.load(f)",
        "model.eval()\nblock.compile()\nimport re\nre.compile(x)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "from importlib import import_module\nimport_module('wandb')",
        "import json\njson.load(f)\nimport yaml\nyaml.safe_load(f)",
        "text = 'import pickle; eval(x)'  # pickle",
    ],
)
def test_what_is_harmless_is_not_found(snippet: str) -> None:
    assert found_in(snippet) == []


MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle", "builtins",
    "torch.package", "runpy",
}  # fmt: skip
"""Modules that read values by running something, or that hand out the builtins below under other names."""

NAMES = {"eval", "exec", "__import__"}
"""Builtins that are found wherever they stand, called or handed on."""

CALLS = {
    "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load",
    "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "torch.jit.load", "torch.hub.load", "torch.save",
    "pandas.read_pickle", "torch.distributed.broadcast_object_list", "torch.distributed.all_gather_object",
    "torch.distributed.gather_object", "torch.distributed.scatter_object_list", "torch.distributed.send_object_list",
    "torch.distributed.recv_object_list",
}  # fmt: skip
METHODS = {"extractall", "extract", "unpack_archive", "exec_module"}
"""Methods of an archive, whatever it is called, and of a module's loader."""

KEYWORDS = {"weights_only": True, "allow_pickle": False, "shell": False, "trust_remote_code": False}
"""Keywords and the one constant that each may have, in any call."""


OPENERS = {
    "open", "io.open", "os.open", "os.replace", "os.rename", "numpy.load", "numpy.fromfile", "numpy.memmap",
    "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move",
}  # fmt: skip
"""Calls that open, copy or put in place a file, whatever stands at its path."""

FILE_METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "rename", "touch"}
"""The same as methods of a path."""


@dataclass(frozen=True)
class Found:
    line: int
    what: str


def found_in(source: str) -> list[Found]:
    """What in a file's source could run what it reads, by line."""
    tree = ast.parse(source)
    names = _imported(tree)
    found = {one for node in ast.walk(tree) for one in _found(node, names)}
    return sorted(found, key=lambda one: (one.line, one.what))


def files_in(source: str) -> list[Found]:
    """What in a file's source opens or replaces files without gptlab/files.py, by line."""
    tree = ast.parse(source)
    names = _imported(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [Found(node.lineno, what) for node in calls if (what := _opens(node, _dotted(node.func, names)))]


def _opens(node: ast.Call, name: str) -> str:
    """What it is that opens a file; empty if nothing does."""
    if name.startswith("gptlab.files."):
        return ""
    if name in OPENERS or name.startswith("tempfile."):
        return name
    method = name.rpartition(".")[2] if isinstance(node.func, ast.Attribute) else ""
    is_path_replace = method == "replace" and len(node.args) == 1 and not node.keywords  # a text's takes two
    return f".{method}" if method in FILE_METHODS or is_path_replace else ""


def _imported(tree: ast.AST) -> dict[str, str]:
    """{name in the file: what it stands for, dotted}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _found(node: ast.AST, names: dict[str, str]) -> Iterator[Found]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if module := _forbidden(alias.name):
                yield Found(node.lineno, module)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            if module := _forbidden(node.module) or _forbidden(f"{node.module}.{alias.name}"):
                yield Found(node.lineno, module)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield Found(node.lineno, node.id)
    elif isinstance(node, ast.Call):
        yield from _call(node, _dotted(node.func, names))


def _call(node: ast.Call, name: str) -> Iterator[Found]:
    given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    method = name.rpartition(".")[2]
    if name in CALLS or (method in METHODS and isinstance(node.func, ast.Attribute)):
        yield Found(node.lineno, name if name in CALLS else method)
    if name == "torch.load" and "weights_only" not in given:
        yield Found(node.lineno, "torch.load")
    if name == "importlib.import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
        yield Found(node.lineno, name)
    for keyword, allowed in KEYWORDS.items():
        value = given.get(keyword) if method != "format" else None  # str.format names what it likes
        if value is not None and not (isinstance(value, ast.Constant) and value.value is allowed):
            yield Found(node.lineno, keyword)


def _forbidden(module: str) -> str:
    """The forbidden module that it is, or is of; empty if none."""
    parts = module.split(".")
    return next((m for n in range(1, len(parts) + 1) if (m := ".".join(parts[:n])) in MODULES), "")


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as `numpy.load`; what is no plain chain of names begins with a dot."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return ""
