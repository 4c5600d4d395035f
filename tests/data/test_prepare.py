"""Preparing: the packing of documents, the same bytes whatever happens on the way, and what is left after a failure."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from gptlab.data.corpus import open_corpus
from gptlab.data.prepare import Progress, default_folder, prepare
from gptlab.data.tokenizers import get_tokenizer
from gptlab.errors import ConfigError, DataError

ALICE = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def made_up_texts(count: int, words: int, seed: int = 0) -> list[str]:
    """Documents of up to `words` words each, the same for the same arguments."""
    draw = random.Random(seed)
    vocabulary = ALICE.split()
    return [" ".join(draw.choices(vocabulary, k=draw.randrange(words))) for _ in range(count)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in made_up_texts(300, 60)))
    return path


@pytest.fixture(scope="module")
def large_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text (6 MB) that several processes share the work."""
    path = tmp_path_factory.mktemp("large") / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in made_up_texts(2400, 1000)))
    return path


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_documents_are_packed_in_order_each_after_its_start(jsonl: Path, tmp_path: Path, tokenizer: str) -> None:
    corpus = prepare("text", tmp_path / "out", tokenizer, inputs=[jsonl], shard_tokens=1000)
    encoder = get_tokenizer(tokenizer)
    documents: dict[str, list[str]] = {}
    for split in ("val", "train"):
        shards = [corpus.read(split, index) for index in range(len(corpus.splits[split]))]
        assert {len(shard) for shard in shards[:-1]} <= {1000}
        tokens = np.concatenate(shards)
        starts = np.flatnonzero(tokens == encoder.document_start)
        assert starts[0] == 0
        documents[split] = [encoder.decode(document[1:]) for document in np.split(tokens, starts[1:])]
    texts = made_up_texts(300, 60)
    assert sorted(documents["val"] + documents["train"]) == sorted(texts)
    chosen = set(documents["val"]) - set(documents["train"])
    assert [text for text in texts if text in chosen] == [text for text in documents["val"] if text in chosen]
    assert len(corpus.train) > 3


def test_the_manifest_tells_what_the_corpus_is(jsonl: Path, tmp_path: Path) -> None:
    corpus = prepare("text", tmp_path / "out", "gpt2", inputs=[jsonl], shard_tokens=4000)
    manifest = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert set(contents(tmp_path / "out")) == {
        "corpus.json",
        *(shard["file"] for split in manifest["splits"].values() for shard in split),
    }
    assert manifest["splits"]["train"][0] == {
        "file": "train_000000.bin",
        "tokens": 4000,
        "sha256": corpus.train[0].sha256,
    }
    assert {key: manifest[key] for key in ("format", "name", "tokenizer", "vocab_size", "complete", "documents")} == {
        "format": 1,
        "name": "text",
        "tokenizer": "gpt2",
        "vocab_size": 50257,
        "complete": True,
        "documents": 300,
    }
    assert corpus.complete
    assert "resume" not in manifest


def test_shakespeare_needs_nothing_but_its_name(tmp_path: Path) -> None:
    corpus = prepare("shakespeare", tmp_path / "out", "bytes")
    assert (corpus.tokens("val"), corpus.tokens("train")) == (499_656 + 4, 4_557_542 + 38)
    assert corpus.vocab_size == 256


def test_the_first_shard_of_a_stream_is_validation(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": made_up_texts(100, 60)}), tmp_path / "a.parquet")
    corpus = prepare("fineweb-edu", tmp_path / "out", "gpt2", inputs=[tmp_path / "a.parquet"], shard_tokens=500)
    assert corpus.tokens("val") == 500
    assert len(corpus.val) == 1
    encoder = get_tokenizer("gpt2")
    tokens = [corpus.read("val", 0), *(corpus.read("train", index) for index in range(len(corpus.train)))]
    expected = "".join(f"<|endoftext|>{text}" for text in made_up_texts(100, 60))
    assert encoder.decode(np.concatenate(tokens)) == expected


def test_a_stream_of_one_shard_has_nothing_to_train_on(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["short"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="documents for training and for validation, found too few"):
        prepare("fineweb-edu", tmp_path / "out", "gpt2", inputs=[tmp_path / "a.parquet"])
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_the_number_of_workers_changes_nothing(large_jsonl: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        prepare("text", tmp_path / str(workers), "gpt2", inputs=[large_jsonl], shard_tokens=300_000, workers=workers)
    assert len(contents(tmp_path / "1")) > 4
    assert contents(tmp_path / "2") == contents(tmp_path / "1")
    assert contents(tmp_path / "3") == contents(tmp_path / "1")


def test_progress_grows_to_the_whole(jsonl: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    corpus = prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], shard_tokens=5000, progress=seen.append)
    assert seen[-1] == Progress(300, corpus.tokens("val") + corpus.tokens("train"), 300)
    assert [step.tokens for step in seen] == sorted(step.tokens for step in seen)


def test_a_limit_stops_early_and_the_next_call_goes_on(jsonl: Path, tmp_path: Path) -> None:
    whole = prepare("text", tmp_path / "whole", "gpt2", inputs=[jsonl], shard_tokens=1000)
    for limit in (1, 3, 3):
        part = prepare("text", tmp_path / "part", "gpt2", inputs=[jsonl], shard_tokens=1000, limit_shards=limit)
        assert not part.complete
        assert part.train == whole.train[:limit]
        assert part.val == whole.val
    again = prepare("text", tmp_path / "part", "gpt2", inputs=[jsonl], shard_tokens=1000, limit_shards=1000)
    assert again.complete
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_a_finished_corpus_is_left_alone(jsonl: Path, tmp_path: Path) -> None:
    prepare("text", tmp_path / "out", "bytes", inputs=[jsonl])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], workers=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(DataError, match="holds a finished corpus of another tokenizer: choose another --out"):
        prepare("text", tmp_path / "out", "gpt2", inputs=[jsonl])
    jsonl.write_text('{"text": "other"}\n' * 9)
    with pytest.raises(DataError, match="holds a finished corpus of another source"):
        prepare("text", tmp_path / "out", "bytes", inputs=[jsonl])


@pytest.mark.parametrize("change", ["missing", "truncated"])
def test_a_finished_corpus_that_lost_a_shard_is_made_again(jsonl: Path, tmp_path: Path, change: str) -> None:
    prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], shard_tokens=5000)
    before = contents(tmp_path / "out")
    victim = tmp_path / "out" / "train_000001.bin"
    victim.unlink() if change == "missing" else victim.write_bytes(victim.read_bytes()[:-2])
    prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], shard_tokens=5000)
    assert contents(tmp_path / "out") == before


def test_other_settings_leave_an_unfinished_preparation_alone(jsonl: Path, tmp_path: Path) -> None:
    prepare("text", tmp_path / "out", "gpt2", inputs=[jsonl], shard_tokens=300, limit_shards=8)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="holds an unfinished corpus of another tokenizer and shard_tokens: give"):
        prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], shard_tokens=4000)
    assert contents(tmp_path / "out") == before


def test_of_what_was_interrupted_only_our_own_files_are_removed(jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare("text", out, "bytes", inputs=[jsonl], shard_tokens=4000, limit_shards=1)
    ours = [".train_000008.bin.1.tmp", ".corpus.partial.json.22.tmp", "train_000077.bin"]
    ours.append(".val_000003.bin.0123456789abcdef.tmp")
    others = [".notes.tmp", ".corpus.tmp", "mine_000001.bin"]
    for name in (*ours, *others):
        (out / name).write_bytes(b"half")
    prepare("text", out, "bytes", inputs=[jsonl], shard_tokens=4000)
    assert [name for name in (*ours, *others) if (out / name).exists()] == others


def test_shards_of_others_are_left_alone(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"holds train\.bin, and no manifest of ours: choose another --out"):
        prepare("text", tmp_path / "out", "bytes", inputs=[jsonl])
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("clock", [-10, 10])
@pytest.mark.parametrize("limit", [None, 1])
def test_an_input_that_was_changed_since_is_named(jsonl: Path, tmp_path: Path, limit: int | None, clock: int) -> None:
    """Whether the clock of whoever changed it was fast or slow."""
    prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], shard_tokens=4000, limit_shards=limit)
    jsonl.write_text(jsonl.read_text().swapcase())  # as many bytes
    os.utime(jsonl, (time.time() + clock,) * 2)
    with pytest.raises(DataError, match=rf"{jsonl} was changed since .*out was prepared from it"):
        prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], shard_tokens=4000)


@pytest.mark.parametrize("clock", [-(10**9), 10**9])
@pytest.mark.parametrize("limit", [None, 1])
def test_times_of_another_clock_are_no_change(jsonl: Path, tmp_path: Path, limit: int | None, clock: int) -> None:
    os.utime(jsonl, (time.time() + clock,) * 2)
    for out in ("out", "whole"):
        prepare("text", tmp_path / out, "bytes", inputs=[jsonl], shard_tokens=4000, limit_shards=limit)
    assert prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], shard_tokens=4000).complete


def test_a_corpus_of_an_earlier_version_is_left_alone(jsonl: Path, tmp_path: Path) -> None:
    """Its manifest says nothing of times, and nothing of what was left out."""
    before = prepare("text", tmp_path / "out", "bytes", inputs=[jsonl])
    manifest = json.loads((tmp_path / "out" / "corpus.json").read_text())
    del manifest["modified_ns"]
    (tmp_path / "out" / "corpus.json").write_text(json.dumps(manifest))
    assert prepare("text", tmp_path / "out", "bytes", inputs=[jsonl]) == before


@pytest.mark.parametrize("target", ["file", "nothing", "folder"])
def test_a_lock_is_not_taken_through_a_link(jsonl: Path, tmp_path: Path, target: str) -> None:
    victim = tmp_path / "victim"
    if target == "file":
        victim.write_text("mine")
    elif target == "folder":
        victim.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(victim)
    with pytest.raises(DataError, match=r"\.lock: expected a regular file to append to, found a link"):
        prepare("text", tmp_path / "out", "bytes", inputs=[jsonl])
    assert victim.read_text() == "mine" if target == "file" else victim.is_dir() == (target == "folder")


def test_no_file_is_written_through_a_link(jsonl: Path, tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    for name in ("corpus.json", "corpus.partial.json", ".corpus.json.tmp"):
        (out / name).symlink_to(tmp_path / "gone")
    (out / "val_000001.bin").symlink_to(victim)
    with contextlib.suppress(DataError):  # whose shard that is, is not known
        prepare("text", out, "bytes", inputs=[jsonl])
    assert victim.read_text() == "mine"
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_an_input_that_never_ends_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    with pytest.raises(DataError, match=f"a.txt: expected a regular file, found a {kind}"):
        prepare("text", tmp_path / "out", "bytes", inputs=[path])
    (tmp_path / "b.txt").write_text("text\n" * 9)
    corpus = prepare("text", tmp_path / "out", "bytes", inputs=[tmp_path])
    assert corpus.left_out.as_json() == {"count": 1, "kinds": {f"a {kind}": 1}, "first": ["a.txt"]}


def test_what_was_left_out_is_in_the_manifest_and_survives_a_restart(tmp_path: Path) -> None:
    rows = [{"content": None if n % 5 == 0 else f"text {n} " * 9} for n in range(100)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in" / "b.csv").write_text("no")
    options = {"inputs": [tmp_path / "in"], "text_field": "content", "skip_null": True, "shard_tokens": 1000}
    whole = prepare("text", tmp_path / "whole", "bytes", **options)
    prepare("text", tmp_path / "out", "bytes", **options, limit_shards=2)
    found = prepare("text", tmp_path / "out", "bytes", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (found.nulls, found.left_out.kinds, found.left_out) == (20, {".csv": 1}, whole.left_out)
    manifest = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert (manifest["documents"], manifest["nulls"]) == (80, 20)
    assert (manifest["source"]["text_field"], manifest["source"]["skip_null"]) == ("content", True)
    with pytest.raises(DataError, match="another source"):
        prepare("text", tmp_path / "out", "bytes", **(options | {"skip_null": False}))


@pytest.mark.parametrize("options", [{"shard_tokens": 0}, {"shard_tokens": 2**31}, {"workers": 0}])
def test_unfit_numbers_are_named(jsonl: Path, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"expected {next(iter(options))} .*, found {next(iter(options.values()))}"):
        prepare("text", tmp_path / "out", "bytes", inputs=[jsonl], **options)
    assert not (tmp_path / "out").exists()


def test_a_document_that_cannot_be_encoded_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_text("bad \0 one")
    with pytest.raises(DataError, match=r"the document that begins 'bad \\x00 one': expected text without NUL"):
        prepare("text", tmp_path / "out", "bytes", inputs=[tmp_path])
    assert not (tmp_path / "out" / "corpus.json").exists()


@pytest.mark.parametrize("below", ["", "out", "deep/out"])
def test_a_file_where_the_folder_should_be_is_named(jsonl: Path, tmp_path: Path, below: str) -> None:
    with pytest.raises(DataError, match=rf"found {jsonl / below}, and {jsonl} is a file: change --out"):
        prepare("text", jsonl / below, "bytes", inputs=[jsonl])
    assert list(tmp_path.iterdir()) == [jsonl]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only in /proc can not even root make a folder")
def test_a_folder_that_cannot_be_made_is_named(jsonl: Path) -> None:
    with pytest.raises(DataError, match=r"cannot use /proc/gptlab: No such file or directory: look at its rights"):
        prepare("text", Path("/proc/gptlab"), "bytes", inputs=[jsonl])


def test_the_default_folder_is_named_for_corpus_and_tokenizer() -> None:
    assert default_folder("shakespeare", "bytes") == Path("data/shakespeare-bytes")


# What follows drives real processes: `python -c SCRIPT out name tokenizer shard_tokens workers input...`
SCRIPT = """
import sys
from pathlib import Path
from gptlab.data.prepare import prepare
from gptlab.errors import DataError
out, name, tokenizer, shard_tokens, workers, *inputs = sys.argv[1:]
try:
    prepare(name, Path(out), tokenizer, inputs=inputs, shard_tokens=int(shard_tokens), workers=int(workers))
except DataError as error:
    sys.exit(f"DataError: {error}")
"""


def start(*arguments: object, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What the process wrote to standard error, once it ended."""
    return process.communicate(timeout=60)[1]


def files_in(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.exists() else 0


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, at most so long; whether it came."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def until_it_works(process: subprocess.Popen[str], folder: Path, files_before: int) -> None:
    """Wait until a file is added or the process is over: Python's start is no interesting moment for a kill."""
    until(lambda: process.poll() is not None or files_in(folder) > files_before, 30)


def kill_and_repeat(seed: int, folder: Path, kills: int, *arguments: object) -> int:
    """Prepare `folder`, killed after a random while of work `kills` times, then left alone; how many kills hit."""
    draw = random.Random(seed)
    hits = 0
    for _ in range(kills):
        before = files_in(folder)
        process = start(folder, *arguments)
        until_it_works(process, folder, before)
        time.sleep(draw.random() * 0.05)
        process.kill()
        finish(process)
        hits += process.returncode == -signal.SIGKILL
        if (folder / "corpus.json").exists():
            break
        if (folder / "corpus.partial.json").exists():
            assert not open_corpus(folder).complete
    assert finish(start(folder, *arguments)) == ""
    return hits


@pytest.mark.parametrize(("seed", "workers"), [(1, 1), (2, 2)])
def test_kills_change_nothing(large_jsonl: Path, tmp_path: Path, seed: int, workers: int) -> None:
    settings = ("text", "gpt2", 100_000, workers, large_jsonl)
    prepare("text", tmp_path / "whole", "gpt2", inputs=[large_jsonl], shard_tokens=100_000)
    assert kill_and_repeat(seed, tmp_path / "killed", 3, *settings) >= 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_kills_change_nothing_in_a_stream(tmp_path: Path) -> None:
    texts = made_up_texts(1200, 1000)
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file, part in zip(files, (texts[:700], texts[700:]), strict=True):
        parquet.write_table(pyarrow.table({"text": part, "id": range(len(part))}), file, row_group_size=100)
    settings = ("fineweb-edu", "gpt2", 30_000, 1, *files)
    prepare("fineweb-edu", tmp_path / "whole", "gpt2", inputs=files, shard_tokens=30_000)
    assert kill_and_repeat(3, tmp_path / "killed", 1, *settings) >= 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_second_preparation_waits_for_the_first(large_jsonl: Path, tmp_path: Path) -> None:
    processes = [start(tmp_path / "out", "text", "gpt2", 200_000, 1, large_jsonl) for _ in range(2)]
    assert [finish(process) for process in processes] == ["", ""]
    prepare("text", tmp_path / "alone", "gpt2", inputs=[large_jsonl], shard_tokens=200_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_full_disk_is_named_and_can_be_mended(large_jsonl: Path, tmp_path: Path) -> None:
    small_files = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    settings = (tmp_path / "out", "text", "gpt2", 100_000, 1, large_jsonl)
    message = finish(start(*settings, before=small_files))
    assert message.startswith(f"DataError: cannot write val_000000.bin in {tmp_path / 'out'}: File too large")
    assert set(contents(tmp_path / "out")) == {"corpus.partial.json"}
    assert finish(start(*settings)) == ""
    assert open_corpus(tmp_path / "out").complete


def test_a_corpus_can_be_read_while_it_is_prepared(large_jsonl: Path, tmp_path: Path) -> None:
    whole = prepare("text", tmp_path / "whole", "gpt2", inputs=[large_jsonl], shard_tokens=100_000)
    out = tmp_path / "out"
    seen: list[int] = []

    def watch() -> Iterator[None]:
        corpus = open_corpus(out)
        while not corpus.complete:
            seen.append(len(corpus.train))
            assert corpus.train == whole.train[: len(corpus.train)]
            corpus = open_corpus(out)
            yield

    prepare("text", out, "gpt2", inputs=[large_jsonl], shard_tokens=100_000, limit_shards=1)
    watcher = watch()
    preparing = threading.Thread(
        target=prepare, args=("text", out, "gpt2"), kwargs={"inputs": [large_jsonl], "shard_tokens": 100_000}
    )
    preparing.start()
    for _ in watcher:
        time.sleep(0.005)
    preparing.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert open_corpus(out).train == whole.train
