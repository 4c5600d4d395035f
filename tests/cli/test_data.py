"""`gptlab data` as a user types it: what goes to which stream, spellings of options, and what a mistake is told."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.cli.data import main
from gptlab.cli.main import main as gptlab
from gptlab.data.corpus import open_corpus
from gptlab.errors import UsageError
from gptlab.runs.folder import RunFolder

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of texts, and the working folder beside it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"[bold]text {i}[/bold] " * 10)
    return folder


def test_prepare_and_info_in_words(texts: Path, capsys: Capture) -> None:
    assert main(["prepare", "text", "--input", str(texts), "--tokenizer", "bytes"]) == 0
    out, err = capsys.readouterr()
    assert "text in data/text-bytes (tokenizer bytes)" in out
    assert "20 documents" in err
    assert main(["info", "data/text-bytes"]) == 0
    out, err = capsys.readouterr()
    assert "--- train begins ---\n[bold]text " in out
    assert out.count("sha256 ") == 2
    assert err == ""


def test_json_is_all_of_standard_output(texts: Path, capsys: Capture) -> None:
    assert main(["prepare", "text", "--input", str(texts), "--out", "here", "--json"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert (prepared["folder"], prepared["tokenizer"], prepared["complete"]) == ("here", "gpt2", True)
    assert main(["info", "here", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["splits"]["train"].pop("excerpt").startswith("[bold]text ")
    assert info["splits"]["val"].pop("excerpt").startswith("[bold]text ")
    assert info == prepared


def test_options_are_spelled_either_way(texts: Path, capsys: Capture) -> None:
    options = ["--shard-tokens=500", "--val_fraction", "0.3", "--val-fraction=0.4", "--workers", "1", "--json"]
    assert main(["prepare", "text", "--input", str(texts / "01.txt"), "--input", str(texts), *options]) == 0
    shards = json.loads(capsys.readouterr().out)["splits"]["train"]["shards"]
    assert {shard["tokens"] for shard in shards[:-1]} == {500}


def test_info_finds_a_corpus_by_its_name(texts: Path, capsys: Capture) -> None:
    main(["prepare", "shakespeare"])
    capsys.readouterr()
    assert main(["info", "shakespeare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["val"]["tokens"] == 499_660


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["prepar", "text"], "found 'prepar'; did you mean 'prepare'"),
        (["prepare"], "the following arguments are required: NAME"),
        (["prepare", "shakespear"], "found 'shakespear'; did you mean 'shakespeare'"),
        (["prepare", "text", "--tokenizer", "gpt-2"], "found 'gpt-2'; did you mean 'gpt2'"),
        (["prepare", "text", "--shard-tokns=3"], "unknown argument '--shard_tokns'; did you mean '--shard_tokens'"),
        (["prepare", "text", "--shard", "3"], "unknown argument '--shard'; see"),
        (["prepare", "text", "--workers", "two"], "argument --workers: invalid int value: 'two'"),
        (["prepare", "text", "--json=1"], "argument --json: ignored explicit argument '1'"),
        (["info", "a", "b"], "unknown argument 'b'"),
    ],
)
def test_a_mistake_is_one_line_of_ours(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        main(words)
    assert "\n" not in str(caught.value)


def test_help_shows_every_option(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for option in ("--input", "--tokenizer", "--out", "--workers", "--shard_tokens", "--val_fraction", "--json"):
        assert option in out


def test_the_command_starts_without_torch() -> None:
    script = "import sys, gptlab.cli.data; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_folder_named_as_a_corpus_is_the_users_own_if_it_holds_one(
    tiny: Callable[..., list[str]], tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_corpus, "shakespeare")
    before = sorted(Path("shakespeare").iterdir())
    assert gptlab(tiny(tmp_path / "run", data="shakespeare", steps=1)) == 0
    assert RunFolder(tmp_path / "run").recorded("config.json")["data"] == open_corpus(tiny_corpus).identity()
    assert sorted(Path("shakespeare").iterdir()) == before
    assert not Path("data").exists()
    Path("markov").mkdir()
    Path("markov", "notes.txt").write_text("mine")
    assert gptlab(tiny(tmp_path / "other", data="markov", steps=1)) == 0
    assert [path.name for path in Path("markov").iterdir()] == ["notes.txt"]
    assert Path("data", "markov-bytes", "corpus.json").is_file()
    assert main(["info", "markov", "--json"]) == 0
