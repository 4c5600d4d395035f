"""What every command shares: help, streams, exit codes, one line for a mistake; and completion as bash does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.cli import arguments
from gptlab.cli.arguments import Parser
from gptlab.cli.console import StopRequest, printable
from gptlab.cli.main import COMMANDS, guarded, main
from gptlab.cli.progress import visible
from gptlab.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    GptlabError,
    Stopped,
    UsageError,
    did_you_mean,
)
from gptlab.options import flatten, options_of
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS

Capture = pytest.CaptureFixture[str]


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def command(argv: list[str]) -> int:
        raise error

    return command


def test_help_names_every_command(capsys: Capture) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for name, summary in COMMANDS.items():
            assert f"  {name} " in out
            assert summary in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_takes_json_but_completion(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, *(["info"] if name == "data" else []), "--help"])
    assert ended.value.code == 0
    assert ("--json" in capsys.readouterr().out) == (name != "completion")


def test_train_help_shows_every_option_with_default_and_unit(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    for option in options_of(TrainingConfig):
        if option.key == "also":
            continue
        assert f"--{option.key}" in shown, option.key
        unit = f", {option.unit}" if option.unit else ""
        assert f"[{option.default_shown}{unit}]".replace(" ", "") in words.replace(" ", ""), option.key
        assert option.help, option.key
    for preset in PRESETS:
        assert preset in words


def test_the_tree_of_errors_has_designs_exit_codes(capsys: Capture) -> None:
    codes = {UsageError: 2, DataError: 3, ConfigError: 3, CheckpointError: 3, DivergedError: 4, Stopped: 75}
    assert {kind.exit_code for kind in GptlabError.__subclasses__()} == {2, 3, 4, 75}
    for kind, code in codes.items():
        assert guarded(raising(kind("what and why")), []) == code
        assert capsys.readouterr().err == "gptlab: what and why\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(28, "No space left", "/a/b"), 3, "No space left: /a/b; check the path and the disk"),
        (PermissionError(13, "Permission denied", "/c"), 3, "Permission denied: /c; check the path and the disk"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)  # fmt: skip
def test_other_ends_are_one_line_too(error: BaseException, code: int, line: str, capsys: Capture) -> None:
    assert guarded(raising(error), []) == code
    assert capsys.readouterr().err == f"gptlab: {line}\n"


def test_our_own_faults_keep_their_traceback() -> None:
    with pytest.raises(AssertionError):
        guarded(raising(AssertionError("ours")), [])
    with pytest.raises(OSError, match="no number"):
        guarded(raising(OSError("no number")), [])


def test_debug_adds_the_traceback_wherever_it_stands(capsys: Capture) -> None:
    for argv in (["--debug"], ["x", "--debug", "--y"]):
        seen: list[list[str]] = []

        def command(words: list[str], seen: list[list[str]] = seen) -> int:
            seen.append(words)
            raise DataError("a shard is gone")

        assert guarded(command, argv) == 3
        assert seen == [[word for word in argv if word != "--debug"]]
        err = capsys.readouterr().err
        assert err.startswith("gptlab: a shard is gone\nTraceback (most recent call last)")
        assert "DataError: a shard is gone" in err


def test_with_json_an_error_is_machine_readable_too(capsys: Capture) -> None:
    assert guarded(raising(CheckpointError("gone")), ["--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "gone", "exit_code": 3}
    assert err == "gptlab: gone\n"


def test_without_a_folder_in_common_local_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for rank, expected in (("1", ""), ("0", "gptlab: everyone's\n")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert guarded(raising(DataError("everyone's")), []) == 3
        assert capsys.readouterr().err == expected


def test_whichever_process_of_a_machine_comes_first_speaks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """torchrun gives each process a file for its errors, all in one folder; nothing else tells them apart here."""
    for rank, text, spoken in (("1", "a", True), ("0", "a", False), ("2", "b", True), ("1", "b", False)):
        own = tmp_path / "attempt_0" / rank
        own.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own / "error.json"))
        assert guarded(raising(DataError(text)), []) == 3
        assert capsys.readouterr().err == f"gptlab: {text}\n" * spoken


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?; see `gptlab --help`"),
        (["train", "--lerning_rate=1"], "unknown argument '--lerning_rate'; did you mean '--learning_rate'?; see"),
        (["train", "--signal.nam", "x"], "unknown argument '--signal.nam'; did you mean '--signal.name'?"),
        (["train", "--steps", "x"], "--steps: expected a whole number, found 'x'"),
        (["train", "--steps"], "expected one argument"),
        (["train", "--schedule", "linear"], "--schedule: expected one of cosine, wsd, constant, found 'linear'"),
        (["train", "--preset", "gpt2-125m"], "--preset: unknown preset 'gpt2-125m'; did you mean 'gpt2-124m'?"),
        (["train", "stray"], "unknown argument 'stray'; see"),
        (["train", "--step", "3"], "unknown argument '--step'; did you mean '--steps'?"),
        (["sample", "--prompt", "x"], "the following arguments are required: --checkpoint"),
        (["sample", "--checkpoint", "x", "--temperature=-1"], "--temperature: expected a number of at least 0"),
        (["sample", "--checkpoint", "x", "--temperature=nan"], "--temperature: expected a number of at least 0"),
        (["sample", "--checkpoint", "x", "--top_p=0"], "--top_p: expected a number above 0 and at most 1, found 0.0"),
        (["sample", "--checkpoint", "x", "--top-k", "0"], "--top_k: expected a whole number of at least 1, found '0'"),
        (
            ["noise", "x", "--conversation", "--signals", "entropy"],
            "--signals: --conversation measures the model without",
        ),
        (["noise", "x", "--say=0"], "--say must be at least 1, found 0"),
        *(
            (["noise", "x", "--signals", name, *words.split()], line)
            for name, words, line in [
                ("conversation", "--signal.say=0", "--signal.say must be at least 1, found 0"),
                ("conversation", "--signal.exact=true --signal.say=2", "--signal.exact enumerates utterances of one"),
                ("conversation", "--signal.samples=1", "--signal.advantage positive compares utterances"),
                ("conversation", "--signal.listener=ema", "--signal.listener: expected self or frozen:PATH"),
                ("conversation", "--signal.reach=local", "--signal.reach local is for signals that read blocks"),
                ("flipped:conversation", "", "--signal.control flipped shows wrong targets"),
                ("entropy", "--signal.turns=2", "--signal.turns 2 is an option of a conversation"),
                ("self:z_loss", "", "--signal.control self is a conversation without its listener"),
            ]
        ),
        (["digest"], "the following arguments are required: RUN"),
        (["verify", "a", "b"], "unknown argument 'b'"),
        (["export", "a"], "the following arguments are required: OUT"),
    ],
)
def test_a_wrong_word_exits_2_with_one_line(words: list[str], line: str, capsys: Capture) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gptlab: ")
    assert line in err
    assert err.count("\n") == 1


def test_values_keep_their_dashes() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--some_key")
    for words in (["--some-key", "a-b_c"], ["--some_key=a-b_c"], ["--some-key=a-b_c"]):
        assert parser.parse(words).some_key == "a-b_c"


def test_the_nearest_word_is_guessed_only_where_one_is_near() -> None:
    assert did_you_mean("total-batch-token", flatten(TrainingConfig())) == "; did you mean 'total_batch_tokens'?"
    assert did_you_mean("xyzzy", flatten(TrainingConfig())) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äö 中 🙂\n\ttext", "plain äö 中 🙂\n\ttext"),
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("over\rwritten\b\x7f\0", "over␍written␈␡␀"),
        ("\x9b31m \x85", "�31m �"),
        ("\u202eright to left\u2066", "�right to left�"),
        ("no\u2028lines\u2029", "no�lines�"),
        ("\udc80", "�"),
    ],
)
def test_what_steers_a_terminal_is_shown_instead(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_character_that_steers_is_left() -> None:
    """Every character of Unicode's first plane: what is let through is printable, or a line break or tab."""
    shown = printable("".join(map(chr, range(0x10000))))
    assert len(shown) == 0x10000
    kept = {c for c in shown if ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000}
    assert kept == {"\n", "\t"}


def test_a_token_is_shown_in_few_visible_characters() -> None:
    assert [visible(token) for token in (" a", "\n", "\t", "\0", "", "\x1b", " internationally")] == [
        "␣a", "⏎", "⇥", "∅", "·", "␛", "␣intern…",
    ]  # fmt: skip


def test_a_request_to_stop_is_heard_once_and_echoes_are_the_same_request() -> None:
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passing the same Ctrl-C on
        assert stop()


def test_gptlab_is_a_module_too_and_a_reader_may_leave_early(finished_run: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m gptlab sample --checkpoint {finished_run} --max_new_tokens 9 --samples 400 | head -c 10",
        shell=True, check=False, capture_output=True,
    )  # fmt: skip
    assert done.stderr == b""
    assert len(done.stdout) == 10


@pytest.mark.parametrize(("word", "meant"), arguments.ELSEWHERE.items())
def test_the_names_of_other_programs_lead_to_ours(word: str, meant: str, capsys: Capture) -> None:
    known = {f"--{option.key}" for option in options_of(TrainingConfig)}
    assert meant.split()[0] in known
    if word not in known:
        assert main(["train", word.replace("_", "-"), "3"]) == 2
        assert f"did you mean '{meant}'?" in capsys.readouterr().err


@pytest.fixture
def offered(requires_program: Callable[[str], str], capsys: Capture) -> Callable[..., list[str]]:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def offer(*words: str) -> list[str]:
        asked = f"COMP_WORDS=({' '.join(repr(w) for w in words)}) COMP_CWORD={len(words) - 1}; _shtab_gptlab"
        done = subprocess.run(
            [requires_program("bash"), "--norc", "-c", f'{script}\n{asked}\nprintf "%s\n" "${{COMPREPLY[@]}}"'],
            check=True, capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        return done.stdout.split()

    return offer


def test_bash_is_offered_what_there_is(offered: Callable[..., list[str]]) -> None:
    assert offered("gptlab", "") == list(COMMANDS)
    assert offered("gptlab", "ex") == ["experiment", "export"]
    assert set(offered("gptlab", "train", "--")) >= {f"--{o.key}" for o in options_of(TrainingConfig)}
    assert offered("gptlab", "train", "--signal.na") == ["--signal.name"]
    assert offered("gptlab", "train", "--preset", "gpt2-1") == ["gpt2-124m", "gpt2-1558m"]
    assert offered("gptlab", "train", "--preset", "") == list(PRESETS)  # and no files
    assert offered("gptlab", "train", "--signal.name", "gated") == ["gated_confidence"]
    assert offered("gptlab", "export", "--format", "ll") == ["llm.c"]
    assert offered("gptlab", "data", "pre") == ["prepare"]
    assert offered("gptlab", "completion", "z") == ["zsh"]
    assert "tmp" in offered("gptlab", "verify", "t")  # files, seen from /
    assert offered("gptlab", "sample", "--checkpoint", "RU") == []


def test_zsh_takes_the_script_where_completion_is_on(
    capsys: Capture, requires_program: Callable[[str], str], tmp_path: Path
) -> None:
    assert main(["completion", "zsh"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    profile = f'autoload -Uz compinit && compinit -u\neval "$(cat {script})"\nprint -r -- "$_comps[gptlab]"'
    shell = [requires_program("zsh"), "-f", "-c", profile]
    done = subprocess.run(shell, check=True, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    assert done.stdout.split() == ["_shtab_gptlab"], done


@pytest.mark.parametrize("shell", ["fish", "tcsh"])
def test_other_shells_have_a_script_too(shell: str, capsys: Capture) -> None:
    assert main(["completion", shell]) == 0
    assert "--signal.name" in capsys.readouterr().out or shell == "tcsh"
