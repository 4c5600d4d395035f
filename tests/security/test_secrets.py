"""Secrets reach no file that is kept and no output; the guards of benchmarks/guards.py are where it says."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script
from tiny_experiment import write

from gptlab.cli.main import main
from gptlab.device import Machine, choose_compute, environment
from gptlab.options import build, flatten
from gptlab.training.config import TrainingConfig

WITH_REPORTS = True
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIplantedKEY",
    "AWS_ACCESS_KEY_ID": "AKIAplantedEXAMPLE",
    "HF_TOKEN": "hf_plantedtokenofnobody",
    "WANDB_API_KEY": "0123plantedwandbkey4567",
    "PIP_INDEX_URL": "https://user:plantedpippassword@index.example/simple",
    "HTTPS_PROXY": "http://user:plantedproxypassword@127.0.0.1:9",
    "DATABASE_URL": "postgres://u:planteddatabasepassword@h/d",
}
WORDS = ["plantedargumenttoken", "plantedgitpassword", *SECRETS.values()]


def forms(secret: str) -> Iterator[bytes]:
    """A secret as it might stand somewhere."""
    yield secret.encode()
    yield secret.encode().hex().encode()
    yield base64.b64encode(secret.encode()).rstrip(b"=")[:-2]


def leaks(*contents: bytes) -> list[str]:
    return [word for word in WORDS for content in contents if any(form in content for form in forms(word))]


def files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a password in its remote, in which everything runs, and secrets all around."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    here = tmp_path / "checkout"
    (here / ".git").mkdir(parents=True)
    remote = '[remote "origin"]\n\turl = https://user:plantedgitpassword@example.org/x.git\n'
    (here / ".git" / "config").write_text(f"[core]\n\trepositoryformatversion = 0\n{remote}")
    (here / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.argv", ["gptlab", "train", "--token=plantedargumenttoken"])
    return here


def test_the_finder_finds_a_secret_in_any_form(tmp_path: Path) -> None:
    for word in WORDS:
        for form in forms(word):
            assert leaks(b"x" + form + b"y") == [word]
    assert leaks(json.dumps(dict(os.environ)).encode()) == [], "nothing is planted here"


def test_a_run_and_its_report_keep_none(
    planted: Path, tiny: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert leaks(json.dumps(dict(os.environ)).encode()) == list(SECRETS.values()), "they are planted"
    assert main(tiny(out, signal_name="confidence", checkpoint_every=3, sample_every=3)) == 0
    for words in (
        [*tiny(out, signal_name="confidence", n_layer=3), "--debug"],
        ["train", "--data", "nowhere", "--debug"],
        ["verify", str(out)],
        ["runs", str(out), "--json"],
        ["doctor", "--json"],
    ):
        main(words)
    shown = capfd.readouterr()
    assert (out / "report.html").is_file()
    assert leaks(shown.out.encode(), shown.err.encode(), *files(out), *files(planted / "log")) == []


def test_a_pack_keeps_none(planted: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path, {"plain": {}, "sure": {"signal.name": "confidence"}}), tmp_path / "out"
    machine = Machine.probe()
    for arm in ("plain", "sure"):
        options = flatten(build(TrainingConfig, {"signal.name": "confidence"} if arm == "sure" else {}))
        cell = out / arm / "seed_1"
        cell.mkdir(parents=True)
        (cell / "environment.json").write_text(json.dumps(environment(choose_compute(machine), machine)))
        (cell / "config.json").write_text(
            json.dumps({"options": options, "data": {"tokenizer": "bytes", "train": ["1" * 64], "val": ["2" * 64]}})
        )
        (cell / "metrics.jsonl").write_text(
            json.dumps({"step": 24, "kind": "event", "event": "finished", "loss": 1.0}) + "\n"
        )
        (cell / "output.txt").write_text(SECRETS["HF_TOKEN"])  # what a process said is not packed
    shutil.copy(file, out / "experiment.toml")
    assert main(["experiment", "pack", str(out), "--out", str(tmp_path / "packed.json.gz")]) == 0
    unpacked = tmp_path / "packed.json"
    unpacked.write_bytes(gzip.decompress((tmp_path / "packed.json.gz").read_bytes()))
    assert b'"finished"' in unpacked.read_bytes()
    assert leaks(unpacked.read_bytes()) == []


def test_what_the_environment_records_is_a_list_of_names() -> None:
    """A new entry is a new promise: add it here once it is known that it holds no variable, path or word of a user."""
    machine = Machine.probe()
    names = {"machine", "platform", "python", "torch", "device", "dtype", "threads", "compile", "reasons"}
    found = environment(choose_compute(machine), machine)
    assert found.keys() == names
    assert found["machine"].keys() == {"processor", "cores", "gpus"}


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def guards() -> ModuleType:
    return load_script("benchmarks/guards.py")


def test_every_guard_and_its_tests_are_there(guards: ModuleType) -> None:
    for guard in guards.GUARDS:
        text = (ROOT / "gptlab" / guard.file).read_text(encoding="utf-8")
        assert text.count(guard.line) == 1, guard.what
        assert guard.tests, guard.what
        for test in guard.tests:
            path, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), test
    names = {guard.what for guard in guards.GUARDS}
    assert len(names) == len(guards.GUARDS)
    assert names.issuperset(name for guard in guards.GUARDS for name in guard.behind)


def test_a_guard_that_nothing_needs_is_told(
    guards: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gptlab").mkdir()
    (tmp_path / "gptlab" / "a.py").write_text("if wrong:\n    raise\n")
    guard = guards.Guard("x", "a.py", "if wrong:", "if False:", ("t",))
    for ends, said in (((0, 1), "noticed"), ((0, 0), "pass: t"), ((1,), "do not pass as it is (pytest ended with 1)")):
        codes = iter(ends)
        monkeypatch.setattr(guards, "run", lambda tests, copy, codes=codes: next(codes))
        assert guards.tried(guard, tmp_path)["said"] == said
        assert (tmp_path / "gptlab" / "a.py").read_text() == "if wrong:\n    raise\n"


def test_what_stands_behind_a_guard_is_taken_out_with_it(
    guards: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gptlab").mkdir()
    file = tmp_path / "gptlab" / "a.py"
    file.write_text("if first:\nif second:\n")
    first = guards.Guard("x", "a.py", "if first:", "if False:", ("t",), behind=("y",))
    monkeypatch.setattr(guards, "GUARDS", (first, guards.Guard("y", "a.py", "if second:", "if False:", ("u",))))
    seen: list[str] = []
    monkeypatch.setattr(guards, "run", lambda tests, copy: seen.append(file.read_text()) or len(seen) - 1)
    assert guards.tried(first, tmp_path)["said"] == "noticed"
    assert seen == ["if first:\nif second:\n", "if False:\nif False:\n"]
    assert file.read_text() == seen[0]
