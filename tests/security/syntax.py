"""What a syntax tree says that could run what it reads: names of calls, resolved through the file's imports.

It finds what is written plainly, which is what slips into a review. It is no sandbox: `getattr` on a module finds its
way around it, and so would anyone who wants to.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

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


FILES = {
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
    if name in FILES or name.startswith("tempfile."):
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
