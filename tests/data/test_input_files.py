"""Which files are read: hidden ones never, those of another kind counted, linked ones once, by their own names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gptlab.data.text_files import LeftOut, find_files, text_kind
from gptlab.errors import DataError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def names(folder: Path, **options: str) -> list[str]:
    return [str(file.relative_to(folder)) for file in find_files([folder], **options)[0]]


HIDDEN = [
    "._a.txt",
    ".ipynb_checkpoints/a-checkpoint.txt",
    ".DS_Store",
    ".git/a.txt",
    "deep/.a.jsonl.swp",
    "deep/._.json",
]


def test_names_that_begin_with_a_dot_are_no_input(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "deep/b.txt", *HIDDEN)
    files, left_out = find_files([tmp_path])
    assert [file.name for file in files] == ["a.txt", "b.txt"]
    assert left_out.kinds == {"hidden": 6}
    assert {"._a.txt", ".ipynb_checkpoints", ".DS_Store", ".git", "._.json"} < set(left_out.first)


def test_a_hidden_folder_or_file_that_is_named_itself_is_read(tmp_path: Path) -> None:
    """As the cache of Hugging Face is, which lies in ~/.cache."""
    write(tmp_path, ".cache/a.txt", ".b.txt")
    assert [file.name for file in find_files([tmp_path / ".cache", tmp_path / ".b.txt"])[0]] == ["a.txt", ".b.txt"]


def test_suffixes_count_in_any_case_and_compressed(tmp_path: Path) -> None:
    kinds = ["a.TXT", "b.Jsonl", "c.JSON", "d.PARQUET", "e.txt.gz", "f.JSONL.GZ", "g.json.zst", "h.Txt.Zst"]
    write(tmp_path, *kinds)
    (tmp_path / "c.JSON").write_text("[]")
    assert names(tmp_path) == kinds
    assert [text_kind(name)[0] for name in kinds[4:]] == [".txt", ".jsonl", ".json", ".txt"]


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.csv", "c.CSV", "d.md", "e", "f.parquet.gz", "deep/g.csv", "h.gz")
    os.mkfifo(tmp_path / "i.txt")
    (tmp_path / "j.txt").symlink_to("gone")
    files, left_out = find_files([tmp_path])
    assert len(files) == 1
    assert left_out.kinds == {
        ".csv": 3, ".md": 1, "without a suffix": 1, ".gz": 2, "a pipe": 1, "links to nothing": 1
    }  # fmt: skip
    assert left_out.count == 9
    assert str(left_out).startswith("left out 9: ")
    assert LeftOut.from_json(json.loads(json.dumps(left_out.as_json()))) == left_out


def test_an_account_stays_short_whatever_lies_there(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", *(f"{n}.{'k' * 150}{n}" for n in range(200)), "b" * 200)
    (tmp_path / "\x1b[2J\udcff").write_text("")
    _, left_out = find_files([tmp_path])
    assert left_out.count == 202
    assert len(json.dumps(left_out.as_json())) < 3000


@pytest.mark.parametrize("content", [{"count": 1}, {"kinds": {"a": -1}, "first": []}, {"kinds": {}, "first": [1]}, []])
def test_an_account_from_elsewhere_is_checked(content: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        LeftOut.from_json(content)


@pytest.mark.parametrize("kept", ["a.txt", "deep/b.jsonl"])
def test_a_compressed_copy_of_a_file_is_no_second_document(tmp_path: Path, kept: str) -> None:
    write(tmp_path, kept, f"{kept}.gz", f"{kept}.zst", "other.txt.gz", "other.txt.zst")
    files, left_out = find_files([tmp_path])
    assert sorted(file.name for file in files) == sorted([Path(kept).name, "other.txt.gz"])
    assert left_out.kinds == {"compressed copies": 3}


def test_the_description_of_a_dataset_is_no_document(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    for name, content in {"dataset_info": {"features": {}}, "one": {"text": "a"}, "list": [{"content": "b"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files, left_out = find_files([tmp_path])
    assert [file.name for file in files] == ["a.txt", "list.json", "one.json"]
    assert left_out.as_json() == {"count": 1, "kinds": {".json without documents": 1}, "first": ["dataset_info.json"]}
    assert "dataset_info.json" in names(tmp_path, text_field="features")


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/x.txt", "in/a/b/y.txt", "in/z.txt", "elsewhere/more/w.txt")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "second").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "0-inner").symlink_to("a")  # of a folder that is there anyway
    (tmp_path / "in" / "a" / "b" / "cycle").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    expected = ["a/b/y.txt", "link/more/w.txt", "link/x.txt", "z.txt"]
    assert names(tmp_path / "in") == expected
    again, left_out = find_files([tmp_path / "in", tmp_path / "in" / "a", tmp_path / "elsewhere"])
    assert [str(file.relative_to(tmp_path / "in")) for file in again] == expected
    assert not left_out.count


def cache(tmp_path: Path) -> Path:
    """A file as a Hugging Face cache has it: a link to one that is called by its hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f3e").write_text("text")
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    link = tmp_path / "snapshots" / "abc" / "train.txt"
    link.symlink_to("../../blobs/0f3e")
    return link


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_link_has_the_kind_of_its_own_name(tmp_path: Path, named: str) -> None:
    link = cache(tmp_path)
    assert find_files([link if named == "file" else link.parent])[0] == (link,)


def test_a_link_of_another_name_does_not_make_a_kind(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    (tmp_path / "b.dat").symlink_to("a.txt")
    with pytest.raises(DataError, match=r"found .*b\.dat: convert or rename it"):
        find_files([tmp_path / "b.dat"])
    (tmp_path / "c.txt").symlink_to("a.txt")
    assert find_files([tmp_path / "c.txt", tmp_path / "a.txt"])[0] == (tmp_path / "a.txt",)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["gone.txt"], "expected a file or folder at .*gone.txt, found nothing"),
        (["table.csv"], "expected a file of kind .txt, .jsonl, .json, .parquet, found .*table.csv"),
        (["empty"], "expected .txt, .jsonl, .json, .parquet files in folder .*empty, found none:"),
        (["others"], r"found none \(left out 2: 1 hidden, 1 .csv \(._a.txt, t.csv\)\): choose another"),
    ],
)
def test_unfit_inputs_are_named(tmp_path: Path, inputs: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path, "table.csv", "others/t.csv", "others/._a.txt")
    with pytest.raises(DataError, match=message):
        find_files([tmp_path / name for name in inputs])


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, "z.parquet", "a.txt", "deep/c.jsonl")
    files, _ = find_files([tmp_path / "z.parquet", tmp_path, tmp_path / "deep"])
    assert [file.name for file in files] == ["z.parquet", "a.txt", "c.jsonl"]
