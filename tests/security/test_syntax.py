"""No line of ours runs what it reads, but where that is asked for; and the check finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from syntax import found_in  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("*.py"), *(p for d in ("gptlab", "benchmarks", "tools") for p in (ROOT / d).rglob("*.py"))])

EXCEPTED = {
    ("gptlab/signals/user.py", "exec"): "a user's own signal file is code, and runs with --allow_code only",
    ("gptlab/signals/user.py", "compile"): "the same",
    ("gptlab/lazy.py", "importlib.import_module"): "a module of a table in our own code",
    ("gptlab/signals/registry.py", "importlib.import_module"): "the module of a family in our own table",
    ("gptlab/cli/completion.py", "importlib.import_module"): "a command of COMMANDS",
    ("gptlab/benchmark/contenders.py", "exec_module"): "a peer's training script, which --peer NAME=PATH asks to run",
    ("gptlab/cli/main.py", "importlib.import_module"): "a command of COMMANDS",
    ("gptlab/evals/harness.py", "importlib.import_module"): "a module of lm_eval, named in the file itself",
}


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
