"""Secrets reach no kept file and no output; names and links that lead out of a folder; benchmarks/guards.py's list."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from readers import EXPERIMENT, readers
from scripts import load_script
from tiny_experiment import write

from gptlab.cli.main import main
from gptlab.data.corpus import read_manifest
from gptlab.device import Machine, choose_compute, environment
from gptlab.errors import CheckpointError, ConfigError, DataError
from gptlab.options import build, flatten
from gptlab.runs import checkpoint
from gptlab.runs.cells import Claim, lease
from gptlab.runs.executor import Child, Packing, patched
from gptlab.runs.experiment_runner import Runner
from gptlab.runs.experiment_spec import read_experiment
from gptlab.runs.folder import WRITTEN, move_to_trash
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


CHECKPOINT = ("MANIFEST.json", "state.json", "model.safetensors", "optimizer.safetensors")
Capture = pytest.CaptureFixture[str]
NAMES = (
    "../x",
    "../../x",
    "/tmp/x",
    "..",
    ".",
    "",
    "a/b",
    "a/../../x",
    ".hidden",
    "~",
    "-rf",
    "a\\b",
    "a b",
    "x\n",
    "x\0",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["name", "arm"])
def test_names_that_become_folders_are_no_paths(place: str, name: str, tmp_path: Path) -> None:
    text = EXPERIMENT.replace(
        '"tiny"' if place == "name" else "[arms.sure]",
        json.dumps(name) if place == "name" else f"[arms.{json.dumps(name)}]",
    )
    (tmp_path / "x.toml").write_text(text.partition("[groups]")[0])
    with pytest.raises(ConfigError, match="of letters, digits and"):
        read_experiment(tmp_path / "x.toml")


@pytest.mark.parametrize(
    "name", ["../v.bin", "/etc/passwd", "..", ".", "", "a/v.bin", "v\0.bin", "v.bin\n", "v.npy", ".v.bin"]
)
def test_a_manifest_names_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    reader = next(one for one in readers(tmp_path / "right") if one.name == "corpus.json")
    content = json.loads(reader.samples[0])
    (tmp_path / "corpus.json").write_text(json.dumps(content))
    assert read_manifest(tmp_path / "corpus.json") == content
    content["splits"]["val"][0]["file"] = name
    (tmp_path / "corpus.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="expected a corpus manifest"):
        read_manifest(tmp_path / "corpus.json")


def link(name: str, target: object) -> str:
    """The part of a patch that makes a link."""
    return (
        f"diff --git a/{name} b/{name}\nnew file mode 120000\nindex 0000000..1111111\n--- /dev/null\n+++ b/{name}\n"
        f"@@ -0,0 +1 @@\n+{target}\n\\ No newline at end of file\n"
    )


def file(name: str) -> str:
    return f"diff --git a/{name} b/{name}\nnew file mode 100644\n--- /dev/null\n+++ b/{name}\n@@ -0,0 +1 @@\n+owned\n"


@pytest.mark.parametrize(
    "text",
    [
        lambda out: file("../../victim"),
        lambda out: file("gptlab/../../../victim"),
        lambda out: file(f"{out}/victim"),
        lambda out: f"--- /dev/null\n+++ {out}/victim\n@@ -0,0 +1 @@\n+owned\n",
        lambda out: link("gptlab/way", out) + file("gptlab/way/victim"),
        lambda out: file(".git/hooks/post-applypatch"),
        # What is written after the patch would follow a link: the patch's own copy, and the mark.
        lambda out: file("gptlab/new.py") + link("idea.diff", out / "victim"),
        lambda out: file("gptlab/new.py") + link("gptlab/PATCH.sha256", out / "victim"),
        lambda out: file("gptlab/new.py") + link("gptlab/errors2.py", out / "secret"),
    ],
    ids=[
        "up",
        "up from within",
        "absolute",
        "absolute name",
        "through a link",
        "git",
        "its copy",
        "the mark",
        "a read",
    ],
)
def test_a_patch_reaches_nothing_but_its_copy(text: Callable[[Path], str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("victim", "secret"):
        (out / name).write_text("mine\n")
    patch = tmp_path / "idea.diff"
    patch.write_text(text(out))
    with pytest.raises(ConfigError, match=r"idea\.diff"):
        patched(patch)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"victim": "mine\n", "secret": "mine\n"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["idea.diff", "out"]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_is_not_written_through_a_link(
    name: str, tiny: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    """A folder from elsewhere, with a link to a file of yours where the run's own would be."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.mkdir() if name == "checkpoints" else victim.write_text("mine\n")
    (run / name).symlink_to(victim)
    assert main(tiny(run, steps=1)) == 3
    assert f"{run / name} is a link to elsewhere" in capsys.readouterr().err
    assert list(victim.iterdir()) == [] if name == "checkpoints" else victim.read_text() == "mine\n"


def test_links_among_checkpoints_are_removed_and_not_what_they_lead_to(tmp_path: Path) -> None:
    reader = next(one for one in readers(tmp_path / "right") if one.name == "state.json")
    victim, saved = tmp_path / "victim", tmp_path / "checkpoints"
    reader.prepare(victim)
    before = sorted(victim.iterdir())
    saved.mkdir()
    for name in (".saving_step_00000009", ".removing_step_00000008", "step_00000001", "step_00000002", "step_00000003"):
        (saved / name).symlink_to(victim)
    loaded = checkpoint.load(victim)
    checkpoint.save(saved, loaded.weights, loaded.moments, loaded.state)
    assert sorted(path.name for path in saved.iterdir()) == ["step_00000002", "step_00000003"]
    assert not (saved / "step_00000003").is_symlink()
    assert sorted(victim.iterdir()) == before


def test_a_pack_takes_no_link_along(tmp_path: Path, capsys: Capture) -> None:
    """What a cell's folder links to is not the cell's: it could be a key of whoever packs what somebody sent."""
    arms = {"plain": {}, "sure": {"signal.name": "confidence"}}
    file, out, secret = write(tmp_path, arms), tmp_path / "run", tmp_path / "secret"
    secret.write_text('{"key": "hunter2"}')
    for arm in arms:
        for seed in (1, 2):
            _finished(out / arm / f"seed_{seed}")
    shutil.copy(file, out / "experiment.toml")
    whole = tmp_path / "whole.json.gz"
    assert main(["experiment", "pack", str(out), "--out", str(whole)]) == 0
    for name in (
        "sure/seed_1/environment.json",
        "sure/seed_1/config.json",
        "sure/seed_1",
        "sure",
        "tuning.json",
        "ladder.json",
    ):
        path, kept = out / name, tmp_path / "kept"
        if path.exists():
            path.rename(kept)
        path.symlink_to(kept if kept.is_dir() else secret)
        packed = tmp_path / "packed.json.gz"
        capsys.readouterr()
        assert main(["experiment", "pack", str(out), "--out", str(packed)]) == 3
        assert "is a link to elsewhere" in capsys.readouterr().err
        assert not packed.exists()
        path.unlink()
        if kept.exists():
            kept.rename(path)


def _finished(cell: Path) -> None:
    cell.mkdir(parents=True)
    options = {"data": "nowhere", "tokenizer": "bytes", "seed": int(cell.name.partition("_")[2] or 1)}
    (cell / "config.json").write_text(json.dumps({"options": options, "data": {"train": []}}))
    (cell / "environment.json").write_text("{}")
    row = {"step": 24, "kind": "event", "event": "finished", "loss": 1.0}
    (cell / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_a_trash_that_is_a_link_takes_nothing(tmp_path: Path) -> None:
    run, away = tmp_path / "log" / "run", tmp_path / "away"
    _finished(run)
    away.mkdir()
    (tmp_path / "log" / ".trash").symlink_to(away)
    with pytest.raises(CheckpointError, match="is a link to elsewhere"):
        move_to_trash(tmp_path / "log", run)
    assert list(away.iterdir()) == []
    assert run.is_dir()


ARMS = {"plain": {}, "sure": {"signal.name": "confidence"}}
PLACES = [
    "plain", "plain/seed_1", "plain/seed_1/.claim", "plain/seed_1/.job", "plain/seed_1/output.txt",
    "plain/options.toml", "experiment.toml", "results.json", ".results.lock",
]  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_an_experiment_writes_through_no_link(name: str, tmp_path: Path) -> None:
    """A folder from elsewhere in which one of these is a link: it is refused, or the link alone is replaced."""
    out, victim, text = tmp_path / "out", tmp_path / "victim", EXPERIMENT
    is_folder = name in ("plain", "plain/seed_1")
    if is_folder:
        (victim / "seed_1").mkdir(parents=True)
    else:
        victim.write_text(text := write(tmp_path, ARMS).read_text())
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).symlink_to(victim)
    file = write(tmp_path, ARMS)
    runner = Runner(read_experiment(file), out, Packing(1))
    refused = ""
    try:
        runner.prepare()
        claim = Claim.take(runner.cells[0].folder)
        assert claim
        lease(runner.cells[0].folder, "token")
        child = Child(runner.cells[0].folder, claim, None, ["--version"])
        while not child.over():
            time.sleep(0.05)
        child.close()
        runner.results.write()
    except ConfigError as error:
        refused = str(error)
    assert "a link" in refused if refused else not (out / name).is_symlink()
    if is_folder:
        assert [path.name for path in victim.rglob("*")] == ["seed_1"]
    else:
        assert victim.read_text() == text


@pytest.mark.parametrize("name", PLACES[:5])
def test_a_cell_is_claimed_through_no_link(name: str, tmp_path: Path) -> None:
    """By a job on another machine too, which no runner has prepared."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    if name in ("plain", "plain/seed_1"):
        (victim / "seed_1").mkdir(parents=True)
    else:
        victim.touch()
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).symlink_to(victim)
    with pytest.raises(ConfigError, match="is a link to elsewhere"):
        Claim.take(out / "plain" / "seed_1")
    assert [path.name for path in victim.rglob("*")] == ["seed_1"] * victim.is_dir()


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl", "log.txt", *CHECKPOINT])
@pytest.mark.parametrize("command", ["verify", "digest", "compare", "runs", "train"])
def test_what_a_runs_link_leads_to_is_not_shown(
    command: str, name: str, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0:hunter2\n")
    path = run / name
    if name in CHECKPOINT:
        path = run / "checkpoints" / "step_00000006" / name
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    words = {"compare": ["compare", str(run), str(run), "--json"], "runs": ["runs", str(run.parent), "--json"],
             "train": ["train", "--preset", "shakespeare-tiny", "--out", str(run)]}  # fmt: skip
    code = main(words.get(command, [command, str(run)]))
    captured = capsys.readouterr()
    assert "hunter2" not in captured.out + captured.err
    assert "Traceback" not in captured.err
    if command == "verify" and name != "log.txt":
        assert code == 3
        assert "is a link to elsewhere" in captured.out
    assert secret.read_text() == "root:x:0:0:hunter2\n"
