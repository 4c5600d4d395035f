"""Names and links that lead out of a folder: nothing is written, read into a copy or deleted there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from readers import EXPERIMENT, readers  # pyright: ignore[reportMissingImports]
from tiny_experiment import write  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main
from gptlab.data.corpus import read_manifest
from gptlab.errors import CheckpointError, ConfigError, DataError
from gptlab.runs import checkpoint
from gptlab.runs.cells import Claim, lease
from gptlab.runs.executor import Child, Packing, patched
from gptlab.runs.experiment_runner import Runner
from gptlab.runs.experiment_spec import read_experiment
from gptlab.runs.folder import WRITTEN, move_to_trash

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
    for name in ("sure/seed_1/environment.json", "sure/seed_1/config.json", "sure/seed_1", "sure", "tuning.json"):
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
