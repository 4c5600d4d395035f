"""The page in a real browser, with real mouse, keys and touch: what is shown, no script error, no request elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, IMAGE, Browser, Served

from gptlab.data.huggingface_tokenizer import files_of
from gptlab.model.huggingface import write_folder
from gptlab.runs.init_weights import model_of

Serve = Callable[..., Served]
PROMPT = "<b>9\u202e"
"""It reads otherwise than it is, where it is not shown as text: five signs, seven bytes."""

CELLS = "[...document.querySelectorAll('#map tbody tr')].map(row => [...row.querySelectorAll('td')]"


@pytest.fixture
def browser(requires_program: Callable[[str], str], tmp_path: Path) -> Iterator[Browser]:
    with Browser(requires_program("chromium"), tmp_path / "profile") as opened:
        yield opened


def cell(block: int, position: int) -> str:
    """The selector of a cell; both from 1, of a model of two blocks."""
    return f"#map tbody tr:nth-child({3 - block}) td:nth-child({position + 1})"


def answers(page: Served, key: str) -> list[dict[str, Any]]:
    asked = json.dumps({"model": key, "prompt": PROMPT}).encode()
    return json.loads(page.post(asked).body)["readers"]["raw"]["positions"]


def fits(browser: Browser) -> bool:
    """Whether nothing is wider than the window."""
    return browser.value("document.documentElement.scrollWidth <= innerWidth")


def small(browser: Browser) -> list[str]:
    """What is too small for a finger: shown, to be touched, and below 24 pixels in a direction."""
    return browser.value(
        "[...document.querySelectorAll('a, button, input, select, label')].filter(e => { const r = "
        "e.getBoundingClientRect(); return r.width && (r.width < 24 || r.height < 24) }).map(e => e.outerHTML)"
    )


def test_a_text_is_typed_a_cell_hovered_and_the_confidence_dragged(
    served: Serve, run: Path, tmp_path: Path, browser: Browser
) -> None:
    write_folder(sharpened(run), tmp_path / IMAGE, files_of("bytes", 16), {})
    page = served(run, tmp_path / IMAGE)
    browser.window(1200)
    browser.go(f"{page.url}lens")
    browser.click("#prompt")
    browser.type(PROMPT)
    browser.click("#ask button")
    browser.until("!document.querySelector('#lens').hidden")
    positions = answers(page, browser.value("document.querySelector('#model').value"))
    assert browser.value("[...document.querySelectorAll('#map thead bdi')].map(e => e.textContent)")[:4] == list("<b>9")

    browser.hover(cell(1, 3))
    of = positions[2]["blocks"][0]
    assert browser.text("#cell h3") == "Block 1 after >"
    assert f"entropy {of['entropy']:.2f} nats" in browser.text("#cell p")
    shown = browser.value("[...document.querySelectorAll('#cell li span')].map(e => e.textContent)")
    assert [float(p.rstrip("%")) for p in shown] == pytest.approx(
        [100 * b["probability"] for b in of["top"]], abs=0.051
    )

    sure = [position["blocks"][0]["top"][0]["probability"] for position in positions]
    assert min(sure) < 0.5 < max(sure)
    for share in (0.5, 0.02, 0.98):
        browser.drag("#tau", [0.75, 0.25, share])
        tau = float(browser.value("document.querySelector('#tau').value"))
        assert tau == pytest.approx(0.5 + 0.5 * share, abs=0.03)
        stops = [1 if p >= tau else 2 for p in sure]
        found = browser.value(f"{CELLS}.map(cell => cell.classList.contains('stops')))")
        assert found == [[stop == 2 for stop in stops], [stop == 1 for stop in stops]]
        mean = sum(stops) / len(stops)
        assert browser.text("#share") == f"τ = {tau:.2f}: {mean:.2f} of 2 blocks computed, {50 * mean:.1f}%"

    browser.click(cell(1, 1))
    browser.key("ArrowRight")
    browser.key("ArrowUp")
    assert browser.text("#cell h3") == "Block 2 after b"
    assert browser.value("document.activeElement === document.querySelector('#map [aria-selected=true]')")
    browser.window(390, touch=True)
    browser.tap(cell(2, 4))
    assert browser.text("#cell h3") == "Block 2 after 9"
    assert fits(browser)

    browser.value("document.querySelector('#prompt').value = 'x'.repeat(17)")
    browser.click("#ask button")
    browser.until("document.querySelector('#said').textContent.includes('at most block_size 16 tokens')")
    assert browser.value("document.querySelectorAll('b, img').length") == 0
    assert [text for text in browser.messages if "422" not in text] == []
    assert {url for url in browser.requests if not url.startswith((page.url, "data:"))} == set()


def sharpened(run: Path) -> Any:
    """The run's model, surer of what it says: some of its cells lie above any τ, some below."""
    model, _ = model_of(run)
    model.transformer.ln_f.weight.data *= 40
    return model


def test_hostile_runs_are_listed_shown_and_kept_up_to_date(
    served: Serve, hostile_experiment: Path, browser: Browser
) -> None:
    page = served(hostile_experiment.parent)
    for width, dark in ((1200, False), (390, True)):
        browser.window(width, dark=dark)
        browser.go(page.url)
        assert IMAGE in browser.text("table")
        assert fits(browser)
        browser.click(".experiments a")
        browser.arrives("document.querySelector('.verdict')?.innerText === 'worse'")
        assert browser.text("h1") == "hostile"
        assert HOSTILE[3] in browser.text("main")
        assert fits(browser)
    browser.go(page.url)
    browser.click("tbody tr:not(.group) a")
    browser.arrives("location.pathname.endsWith('/run') && document.querySelector('svg') !== null")
    assert fits(browser)
    browser.value("document.querySelector('details').open = true")
    browser.value("document.querySelector('main').dataset.every = 0.1; renew()")
    run = hostile_experiment / "baseline" / "seed_1"  # the first of the list
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "kind": "train", "loss": 1.0, "tokens": 10000000}\n')
    browser.until("document.querySelector('.state').innerText.includes('step 21 of 20')")
    assert browser.value("document.querySelector('details').open")
    assert browser.value("document.querySelectorAll('img, main script').length") == 0
    assert browser.messages == []
    assert {url for url in browser.requests if not url.startswith((page.url, "data:"))} == set()


def test_the_list_is_searched_sorted_folded_and_laid_over_each_other(
    served: Serve, tmp_path: Path, write_run: Callable[..., Path], browser: Browser
) -> None:
    for k, arm in enumerate(("baseline", "mild", "strong")):
        options = {"signal.name": "confidence", "signal.weight": k / 4} if k else {}
        for seed in range(1, 13):
            write_run(tmp_path / "exp" / arm / f"seed_{seed}", 3 - k / 10 + seed / 1000, seed=seed, options=options)
    (tmp_path / "exp" / "experiment.toml").write_text("")
    page = served(tmp_path)
    heads = "[...document.querySelectorAll('tbody:not([hidden]) .group')].map(r => r.cells[1].textContent.slice(0, 6))"
    rows = "document.querySelectorAll('tbody:not([hidden]) tr:not([hidden]):not(.group)').length"
    browser.window(1200)
    browser.go(page.url)
    browser.until("document.querySelector('.fold') !== null")
    assert (browser.value(f"{heads}.length"), browser.value(rows)) == (3, 0)  # many runs: arms alone
    browser.click("#find")
    browser.type("seed_7")
    assert browser.value(rows) == 3
    browser.value("document.querySelector('main').dataset.mark = ''; renew()")  # it stays while the page is renewed
    assert browser.value("document.querySelector('#find').value") == "seed_7"
    browser.value("document.querySelector('#find').value = ''; arrange(document)")
    browser.click("thead th:nth-child(3) .sort")
    assert browser.value("[...document.querySelectorAll('.group th')].map(e => e.innerText.trim())") == [
        "exp/strong", "exp/mild", "exp/baseline",
    ]  # fmt: skip
    browser.click("tbody:nth-of-type(1) .fold")
    assert browser.value(rows) == 12
    browser.window(390, touch=True)
    assert small(browser) == []
    browser.window(1200)
    browser.click("tbody:nth-of-type(1) .all")
    browser.click("[formaction=overlay]")
    browser.arrives("document.querySelectorAll('#overlay path[fill=none]').length === 12")
    first = "document.querySelector('#values tbody td').textContent"
    browser.until(f"{first} === '2.8010'")
    browser.value("document.querySelector('#overlay').focus()")
    browser.key("ArrowLeft")
    assert "at step 10" in browser.text("#value")
    browser.value("document.querySelector('#log-x').click()")
    for width in (1200, 390):
        browser.window(width)
        assert fits(browser)
    assert small(browser) == []
    assert browser.messages == []


def test_a_text_is_generated_once_however_often_the_page_was_renewed(
    served: Serve, run: Path, browser: Browser
) -> None:
    page = served(run)
    browser.window(1200)
    browser.go(page.url)
    browser.click("th a")
    browser.arrives("location.pathname.endsWith('/run')")
    for _ in range(3):
        browser.value("(async () => { document.querySelector('main').dataset.mark = ''; await renew(); return 1 })()")
    browser.value("document.querySelector('.write').open = true")
    browser.click("#start")
    browser.type("line")
    browser.click("#write button")
    browser.until("!document.querySelector('#text').hidden && document.querySelector('#text').textContent.length > 0")
    assert len([url for url in browser.requests if url.endswith("/write")]) == 1
    assert browser.messages == []
