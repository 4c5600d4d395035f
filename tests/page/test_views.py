"""What the pages show: the reports' own content, anew when it has changed, and text as text whoever wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import ARM, HOSTILE, IMAGE, Page, Served, wait

import gptlab
from gptlab.data.huggingface_tokenizer import files_of
from gptlab.data.tokenizers import get_tokenizer
from gptlab.interpret.lens import as_json, look, summary
from gptlab.model.huggingface import write_folder
from gptlab.page import views
from gptlab.page.guard import AccessPolicy
from gptlab.page.run_index import Cache
from gptlab.runs.folder import RunFolder
from gptlab.runs.init_weights import model_of
from gptlab.signals.tuned_lens import TunedLens, path_of, save

Serve = Callable[..., Served]
SAFE = set(
    "html head meta link script title body nav a span main header footer p b h1 h2 h3 bdi section form button div "
    "table thead tbody tr td th input ul ol li i figure figcaption svg g path text defs use clippath rect dl dt dd "
    "details summary pre small article code progress label textarea select option noscript wbr".split()
)
"""Elements that our own templates make."""


def links(page: Page, start: str) -> list[str]:
    return [value for value in page.values("href") if value.startswith(start)]


def marks(page: Page) -> list[str]:
    """The keys of the runs in the list, in its order."""
    return re.findall(r'name="run" value="(\w+)"', page.source)


def written(page: Served, **asked: Any) -> Any:
    """What is written for the first model of the lens."""
    key = re.findall(r'<option value="(\w+)"', page.get("lens").body.decode())[0]
    answer = page.post(json.dumps({"model": key, "prompt": "a", **asked}).encode(), "write")
    return json.loads(answer.body) if answer.status == 200 else answer.status


def questions(page: Served, prompt: str) -> list[dict[str, Any]]:
    """The answers of all models that the lens offers, by their names in the page's order."""
    keys = re.findall(r'<option value="(\w+)"', page.get("lens").body.decode())
    return [json.loads(page.post(json.dumps({"model": key, "prompt": prompt}).encode()).body) for key in keys]


def leaves(value: Any) -> Iterator[Any]:
    """What stands in nested objects and lists: keys and values in their order."""
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def test_hostile_names_stay_text_on_every_page(served: Serve, hostile_experiment: Path) -> None:
    served_page = served(hostile_experiment.parent)
    runs = Page(served_page.get().body.decode())
    assert f"{IMAGE}/{ARM}/seed_1" in runs.text
    every = [
        runs,
        *(Page(served_page.get(link).body.decode()) for link in (*links(runs, "run?"), *links(runs, "compare"))),
    ]
    assert len(every) == 8
    every.insert(1, Page(served_page.get("overlay?" + "&".join(f"run={key}" for key in marks(runs))).body.decode()))
    of_run = next(page for page in every if f"{ARM}/seed_1" in page.text and page is not runs)
    assert all(words.replace("\n", "") in of_run.text for words in HOSTILE)
    assert HOSTILE[3] in every[-1].text  # in the environment
    for page in every:
        assert page.tags <= SAFE
        assert page.source.count("<script") == 1
        assert page.values("src") == ["page.js"]
        assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]


def test_a_run_is_drawn_anew_when_it_has_grown_and_not_before(served: Serve, run: Path) -> None:
    page = served(run)
    link = links(Page(page.get().body.decode()), "run?")[0]
    first = page.get(link)
    mark = first.headers["etag"]
    assert b"<svg" in first.body
    assert f"data-mark={mark}".encode() in first.body
    same = page.get(link, If_None_Match=mark)
    assert (same.status, same.body) == (304, b"")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "kind": "train", "loss": 1.0, "tokens": 448}\n')
    wait(lambda: page.get(link, If_None_Match=mark).status == 200)  # drawing may take but a share of the time
    assert b"step 7 of 6" in page.get(link).body


def test_runs_are_listed_by_arm_and_laid_over_each_other(
    served: Serve, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    (tmp_path / "exp").mkdir()
    for arm, options in {"baseline": {}, "sure": {"signal.name": "confidence"}}.items():
        for seed, loss in ((1, 2.0), (2, 2.5)):
            write_run(tmp_path / "exp" / arm / f"seed_{seed}", loss, seed=seed, options=options)
    (tmp_path / "exp" / "experiment.toml").write_text("")
    page = served(tmp_path)
    runs = Page(page.get().body.decode())
    assert [name for _, key, name in runs.attributes if key == "data-group"] == ["exp/baseline", "exp/sure"]
    assert "2 finished" in runs.text
    assert "2.2500 ±0.3536" in " ".join(runs.text.split())
    assert runs.source.count("signal.name=confidence") == 1  # said of the arm, not of each run
    keys = marks(runs)
    overlay = Page(page.get("overlay?" + "&".join(f"run={key}" for key in reversed(keys))).body.decode())
    curves = json.loads(overlay.values("data-runs")[0])
    assert [run["name"] for run in curves] == [f"exp/{a}/seed_{s}" for a in ("baseline", "sure") for s in (1, 2)]
    assert [run["arm"] for run in curves] == ["baseline", "baseline", "sure", "sure"]
    assert [run["curves"]["val"][-1] for run in curves] == [[20, 2.0], [20, 2.5]] * 2
    assert page.get("overlay?run=nothing").status == 404
    assert "expected marked runs" in Page(page.get("overlay").body.decode()).text


def test_a_run_writes_text_within_bounds(served: Serve, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = served(run)
    assert 'id="write"' in page.get(f"run?key={marks(Page(page.get().body.decode()))[0]}").body.decode()
    expected = gptlab.load(run).generate("a", 20, temperature=0.5, seed=1)
    assert written(page, tokens=20, temperature=0.5) == {"text": expected, "note": ""}
    monkeypatch.setattr(views, "MOST_WRITTEN", 3)
    short = gptlab.load(run).generate("a", 3, temperature=0.0)
    assert written(page, tokens=10**9, temperature=0) == {"text": short, "note": ""}
    monkeypatch.setattr(views, "WRITING_SECONDS", 0.0)
    assert written(page, tokens=100)["note"] == "ended after 0 s and 1 tokens"


@pytest.mark.parametrize("asked", [{"tokens": 0}, {"tokens": 1.5}, {"tokens": "9"}, {"tokens": True},
                                   {"temperature": -1}, {"temperature": "hot"}, {"temperature": 1e9},
                                   {"prompt": None}])  # fmt: skip
def test_text_out_of_bounds_is_refused(asked: dict[str, Any], served: Serve, run: Path) -> None:
    assert written(served(run), **asked) == 400


def test_text_is_generated_for_this_machine_alone(served: Serve, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AccessPolicy, "local", False)
    page = served(run)
    assert 'id="write"' not in page.get(links(Page(page.get().body.decode()), "run?")[0]).body.decode()
    assert written(page) == 404


def test_a_running_run_is_asked_for_sooner(served: Serve, run: Path) -> None:
    page = served(run)
    assert b'data-every="10"' in page.get().body
    held = RunFolder(run)
    held.lock()
    try:
        wait(lambda: b'data-every="2"' in page.get().body)
        assert b"<progress" in page.get().body
    finally:
        held.close()


def test_what_cannot_be_read_is_said_in_its_place(served: Serve, run: Path) -> None:
    (run / "metrics.jsonl").write_text("no row\n")
    page = served(run)
    runs = page.get().body.decode()
    assert "damaged" in runs
    assert "line 1: expected a row" in Page(page.get(links(Page(runs), "run?")[0]).body.decode()).text


def test_a_folder_that_is_gone_is_said(served: Serve, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    page = served(tmp_path / "runs")
    (tmp_path / "runs").rmdir()
    gone = page.get()
    assert (gone.status, b"cannot be read just now" in gone.body) == (503, True)


def test_marked_runs_are_compared_or_refused_with_the_reason(
    served: Serve, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"plain_{seed}", 3.0, seed=seed)
        write_run(
            tmp_path / f"sure_{seed}", 3.1 + seed / 1000, seed=seed, options={"signal.name": "confidence"}, dose=0.5
        )
    write_run(tmp_path / "other", 3.0, seed=3, data={"val": ["4" * 64]})
    page = served(tmp_path)
    listed = page.get().body.decode().replace("<wbr>", "")
    keys = dict(re.findall(r'href="run\?key=(\w+)"><bdi>(\w+)', listed))
    of = {name: key for key, name in keys.items()}
    shown = Page(
        page.get(
            "compare?" + "&".join(f"run={of[f'{arm}_{s}']}" for arm in ("plain", "sure") for s in (1, 2))
        ).body.decode()
    )
    assert "+0.1015" in shown.text
    refused = page.get(f"compare?run={of['plain_1']}&run={of['other']}").body.decode()
    assert "This cannot be shown" in refused
    assert "differ in what no arm declares" in refused
    assert "This cannot be shown" in page.get("compare").body.decode()


def test_the_lens_says_what_gptlab_lens_says(served: Serve, run: Path) -> None:
    model, config = model_of(run)
    reader = TunedLens.untuned(model)
    reader.bias += 0.1
    save(reader, model, path_of(run))
    tokenizer = get_tokenizer(config.tokenizer)
    text = "line <b>9\n"
    (answer,) = questions(served(run), text)
    assert answer["prompt"] == text
    for name, used in (("raw", None), ("tuned", reader)):
        lens = look(model, list(text.encode()), reader=used, vocab_size=256)
        wanted = {"blocks": summary(lens), "positions": as_json(lens, tokenizer)}
        said, meant = (list(leaves(value)) for value in (answer["readers"][name], wanted))
        assert said == [pytest.approx(leaf, abs=2e-6) if isinstance(leaf, float) else leaf for leaf in meant]


def test_the_lens_refuses_in_words(page: Served) -> None:
    (long,) = questions(page, "x" * 17)
    assert "at most block_size 16 tokens at once, found 17" in long["error"]
    (nul,) = questions(page, "a\0b")
    assert "error" in nul
    (empty,) = questions(page, "")
    assert len(empty["readers"]["raw"]["positions"]) == 1


def test_a_hugging_face_folder_is_read_and_a_reader_of_other_weights_is_left_out(
    served: Serve, run: Path, tmp_path: Path
) -> None:
    model, _ = model_of(run)
    folder = tmp_path / "hf"
    write_folder(model, folder, files_of("bytes", 16), {})
    save(TunedLens.untuned(model_of(run)[0]), model, path_of(run))
    own, theirs = questions(served(run, folder), "line 9")
    assert own["readers"]["raw"] == theirs["readers"]["raw"]
    assert (own["note"], theirs["readers"].keys()) == ("", {"raw", "tuned"})
    with pytest.raises(KeyError):
        own["readers"]["tuned"]


def test_a_cache_renews_what_has_changed_as_often_as_its_share_allows() -> None:
    now, made = 0.0, 0

    def make() -> int:
        nonlocal now, made
        now, made = now + 1.0, made + 1  # a second's work
        return made

    cache = Cache(2, 0.25, lambda: now)
    assert cache.get("a", "mark 1", make) == (1, "mark 1")
    assert cache.get("a", "mark 2", make) == (1, "mark 1")
    now += 2.9
    assert cache.get("a", "mark 2", make) == (1, "mark 1")
    now += 0.1
    assert cache.get("a", "mark 2", make) == (2, "mark 2")
    assert cache.get("b", "", make)[0] == 3
    assert cache.get("a", "mark 2", make)[0] == 2
    assert cache.get("c", "", make)[0] == 4  # b, asked for longest ago, makes room
    assert cache.get("a", "mark 2", make)[0] == 2
    assert cache.get("b", "", make)[0] == 5
