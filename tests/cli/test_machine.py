"""`gptlab doctor`, `gptlab bench` and `gptlab data` as a user types them: what is printed where, and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import load_script

import gptlab
from gptlab import device
from gptlab.benchmark.contenders import STEPS, Ladder, Timing, ours
from gptlab.benchmark.run import Bench
from gptlab.cli.data import main as data
from gptlab.cli.main import main
from gptlab.data.corpus import open_corpus
from gptlab.device import Machine, choose_compute
from gptlab.errors import UsageError
from gptlab.runs.folder import RunFolder

Capture = pytest.CaptureFixture[str]


def test_doctor_in_json_tells_what_a_run_uses_here(capsys: Capture) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gptlab"] == gptlab.__version__
    assert found["torch"] == torch.__version__
    machine = Machine.probe()
    assert (found["cores"], found["gpus"]) == (machine.cores, list(machine.gpus))
    assert found["preset"] == ("gpt2-124m" if machine.gpus else "shakespeare-tiny")
    for name, width in (("shakespeare-tiny", 128), ("gpt2-124m", 768)):
        placement = choose_compute(machine, n_embd=width)
        used = found["runs"][name]
        assert (used["device"], used["dtype"]) == (str(placement.device), placement.dtype_name)
        assert (used["threads"], used["reasons"]) == (placement.threads, placement.reasons)
    assert all(rate > 0 for rate in found["matmul_peak"].values())
    assert found["packages"]["rich"]


def test_doctor_in_words(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("processor", "GPUs", "matmul", "GFLOP/s", "shakespeare-tiny", "threads", "screen", "transformers"):
        assert words in out


@pytest.mark.slow
def test_the_json_has_a_row_a_contender(capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "--size",
        "tiny",
        "--batch",
        "1",
        "--rounds",
        "1",
        "--modes",
        "rotate",
        "--threads",
        "1",
        "--dtype",
        "fp32",
    ]
    assert main(["bench", *words, "--ladder", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    assert {"baseline", "rotate", "transformers fp32", "ladder"} <= set(rows)
    assert result["matmul_limit_tokens_per_second"] > 0
    assert rows["baseline"]["ratio_to_baseline"] == pytest.approx(1.0)
    for name, row in rows.items():
        assert row["tokens_per_second"] > 0, name
        assert row["ratio_to_baseline"] * row["tokens_per_second"] == pytest.approx(
            rows["baseline"]["tokens_per_second"]
        )
    assert rows["baseline"]["peak_memory_bytes"] > 2**20
    assert 0 < rows["rotate"]["share_of_limit"]


@pytest.mark.parametrize(("size", "both"), [("tiny", False), ("small", False), ("small", True)])
def test_peers_run_in_both_dtypes_where_asked_or_narrow(size: str, both: bool) -> None:
    bench = Bench(size, peers_in_both=both)
    bench.__dict__["machine"] = replace(bench.machine, cpu_bf16="AVX-512")
    names = {"transformers bf16", "transformers fp32"} if both or size == "tiny" else {"transformers bf16"}
    assert set(bench.theirs()) == names
    bench.__dict__["machine"] = replace(bench.machine, cpu_bf16="")
    assert set(bench.theirs()) == {"transformers fp32"}


@pytest.mark.parametrize("size", ["tiny", "small", "124m"])
def test_a_gpu_is_measured_with_its_own_sizes_and_compiled(size: str) -> None:
    bench = Bench(size, ladder=True)
    bench.__dict__["machine"] = replace(
        bench.machine, gpus=("H200",), gpu_bf16=True, gpu_capability=(9, 0), cpu_bf16=""
    )
    assert (bench.placement.device.type, bench.placement.compile, bench.placement.dtype_name) == ("cuda", True, "bf16")
    assert bench.work.config.block_size == 1024
    assert bench.work.tokens >= 32 * 1024
    with pytest.raises(UsageError, match="--ladder runs one process a core"):
        bench.run()
    bench.__dict__["machine"] = replace(bench.machine, gpus=())
    assert bench.placement.compile is False
    assert bench.work.config.block_size <= 256


def test_the_peak_is_the_best_of_repeats_on_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy for most of them still shows its rate; ones would be multiplied faster on a GPU."""
    seen: list[torch.Tensor] = []
    busy = iter([8.0, 2.0, 4.0, 1.0, 9.0, *[5.0] * 50])
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a.clone()) or plain(a, b, out=out))

    def took(action: Callable[[], object], where: torch.device) -> float:
        action()
        return next(busy)

    monkeypatch.setattr(device, "seconds", took)
    compute = device.choose_compute(device.Machine.probe(), device="cpu", dtype="fp32", threads=1)
    assert device.matmul_peak(compute, 32) == 2 * 32**3 / 1.0
    assert all(a.unique().numel() > 1000 for a in seen)


@pytest.mark.slow
def test_a_profile_names_the_products(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size", "tiny", "--batch", "1", "--modes", "", "--threads", "1", "--profile"]) == 0
    assert "aten::mm" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "tinny"], "--size: expected tiny, small, 124m, found 'tinny'; did you mean 'tiny'?"),
        (["--modes", "exakt"], "did you mean 'exact'?"),
        (["--peer", "nanogtp=."], "did you mean 'nanogpt'?"),
        (["--batch", "-3"], "--batch: expected a whole number of at least 0, found '-3'"),
        (["--rounds", "0"], "--rounds: expected a whole number of at least 1, found '0'"),
        (["--peer", "nanogpt=/nowhere", "--batch", "1"], "expected a checkout with model.py, found none at /nowhere"),
    ],
)
def test_wrong_words_are_named(capfd: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["bench", *words]) == 2
    assert said in capfd.readouterr().err


def test_weak_scaling_compares_the_rate_a_thread() -> None:
    """A second for one thread's 100 tokens, 1.25 for two threads' 200, two for two processes' 200."""
    speed = load_script("benchmarks/speed.py")
    one, two, pair = speed.rows({name: Timing([s]) for name, s in zip(speed.TEAMS, (1.0, 1.25, 2.0), strict=True)}, 100)
    assert [row["tokens_per_second"] for row in (one, two, pair)] == pytest.approx([100, 160, 100])
    assert [row["efficiency"] for row in (one, two, pair)] == pytest.approx([1.0, 0.8, 0.5])
    assert [row["ratio_to_one_process"] for row in (one, two, pair)] == pytest.approx([1.0, 1.0, 0.625])


def test_processes_of_a_team_sum_their_gradients() -> None:
    """Both take the same batch, of which each is half: together their gradient is as long as that of one alone."""
    bench = Bench("tiny", batch=1, threads=1, dtype="fp32")
    (step,) = ours(bench.work, bench.placement)
    alone = [step().grad_norm for _ in range(1 + STEPS)]
    with Ladder("tiny", bench.placement, 2, batch=1, together=True) as team:
        assert team.steps() == pytest.approx([alone[-1]] * 2, rel=1e-4)


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
    assert data(["prepare", "text", "--input", str(texts), "--tokenizer", "bytes"]) == 0
    out, err = capsys.readouterr()
    assert "text in data/text-bytes (tokenizer bytes)" in out
    assert "20 documents" in err
    assert data(["info", "data/text-bytes"]) == 0
    out, err = capsys.readouterr()
    assert "--- train begins ---\n[bold]text " in out
    assert out.count("sha256 ") == 2
    assert err == ""


def test_json_is_all_of_standard_output(texts: Path, capsys: Capture) -> None:
    assert data(["prepare", "text", "--input", str(texts), "--out", "here", "--json"]) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert (prepared["folder"], prepared["tokenizer"], prepared["complete"]) == ("here", "gpt2", True)
    assert data(["info", "here", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["splits"]["train"].pop("excerpt").startswith("[bold]text ")
    assert info["splits"]["val"].pop("excerpt").startswith("[bold]text ")
    assert info == prepared


def test_options_are_spelled_either_way(texts: Path, capsys: Capture) -> None:
    options = ["--shard-tokens=500", "--val_fraction", "0.3", "--val-fraction=0.4", "--workers", "1", "--json"]
    assert data(["prepare", "text", "--input", str(texts / "01.txt"), "--input", str(texts), *options]) == 0
    shards = json.loads(capsys.readouterr().out)["splits"]["train"]["shards"]
    assert {shard["tokens"] for shard in shards[:-1]} == {500}


def test_info_finds_a_corpus_by_its_name(texts: Path, capsys: Capture) -> None:
    data(["prepare", "shakespeare"])
    capsys.readouterr()
    assert data(["info", "shakespeare", "--json"]) == 0
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
        data(words)
    assert "\n" not in str(caught.value)


def test_help_shows_every_option(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        data(["prepare", "--help"])
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
    assert main(tiny(tmp_path / "run", data="shakespeare", steps=1)) == 0
    assert RunFolder(tmp_path / "run").recorded("config.json")["data"] == open_corpus(tiny_corpus).identity()
    assert sorted(Path("shakespeare").iterdir()) == before
    assert not Path("data").exists()
    Path("markov").mkdir()
    Path("markov", "notes.txt").write_text("mine")
    assert main(tiny(tmp_path / "other", data="markov", steps=1)) == 0
    assert [path.name for path in Path("markov").iterdir()] == ["notes.txt"]
    assert Path("data", "markov-bytes", "corpus.json").is_file()
    assert data(["info", "markov", "--json"]) == 0
