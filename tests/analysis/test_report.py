"""Reports as files, all text and equal bytes for equal runs, and the same files in a real browser."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pages import ARM, HOSTILE, IMAGE, Page

from gptlab.analysis import report
from gptlab.analysis.load import read
from gptlab.analysis.report import theme
from gptlab.analysis.report.comparison import write_comparison
from gptlab.analysis.report.plots import Band, Line, curves, draw_curves, draw_forest
from gptlab.analysis.report.run import Points, binned, flat, over_seeds, read_history, write_run
from gptlab.analysis.report.theme import CSS_COLOURS
from gptlab.cli.compare import main as compare
from gptlab.cli.main import guarded, main

WITH_REPORTS = True
TAGS = set(
    "html head meta link title style body main footer header section article figure figcaption h1 h2 h3 p b i ul li dl "
    "dt dd div span small bdi table thead tbody tr th td details summary pre "
    "svg g path defs use clippath rect text".split()
)
"""All that a report is made of: nothing here runs, and nothing here loads."""


def comparison(folder: Path) -> Page:
    outcomes = read([folder])
    path = write_comparison(outcomes, outcomes.verdicts(), folder / "report.html")
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def pages(hostile_experiment: Path) -> list[Page]:
    """The comparison's page and one of its runs'."""
    run = write_run(hostile_experiment / ARM / "seed_1")
    return [comparison(hostile_experiment), Page(run.read_text(encoding="utf-8"))]


def test_hostile_text_stays_text(pages: list[Page]) -> None:
    for page in pages:
        assert page.tags <= TAGS
        assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
        assert all(word in page.text for word in HOSTILE[1:3])
        assert IMAGE in page.text
        assert "49" not in page.text.partition("日本")[2][:12]
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", page.source)
        assert "␛[2J" in page.text
    assert HOSTILE[3] in pages[0].text


def test_nothing_is_loaded_and_the_policy_allows_nothing(pages: list[Page]) -> None:
    for page in pages:
        assert not re.search(r"https?:|//[a-z]|@import", page.source)
        assert [value for name in ("href", "src") for value in page.values(name) if value[0] != "#"] == ["data:,"]
        assert all(value.startswith("url(#") for value in page.values("clip-path"))
        policy = page.values("content")[0]
        digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
        assert policy == (
            f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
        )
        assert page.source.index("Content-Security-Policy") < page.source.index("<link")
        assert "width=device-width" in page.values("content")[1]


def test_a_page_is_whole_in_itself(pages: list[Page]) -> None:
    """Every reference leads to exactly one element, every colour of a plot is the style sheet's, every plot is told."""
    for page in pages:
        ids = page.values("id")
        assert len(ids) == len(set(ids))
        used = {value[1:] for value in page.values("href") if value[0] == "#"}
        used |= {value[5:-1] for value in page.values("clip-path")}
        assert used == set(ids)
        painted = [value for name in ("fill", "stroke") for value in page.values(name)]
        assert set(painted) <= {"none", *CSS_COLOURS.values()}
        defined = set(re.findall(r"(--[\w-]+):", page.style))
        assert set(re.findall(r"var\((--[\w-]+)\)", page.source)) <= defined
        roles = [(tag, value) for tag, name, value in page.attributes if name == "role"]
        assert len(roles) == len([value for value in page.values("aria-label") if value != "figures"]) >= 3


def test_the_verdicts_come_first_and_are_those_of_compare(hostile_experiment: Path) -> None:
    page = comparison(hostile_experiment)
    found = read([hostile_experiment]).verdicts()["arms"][ARM]
    assert found["verdict"] == "worse"
    assert page.text.index("Verdicts") < page.text.index("worse") < page.text.index("Loss over training")
    assert f"{found['difference']:+.4f}" in page.text
    assert found["reason"] in page.text
    assert any("worse: difference +0.1000" in label for label in page.values("aria-label"))
    for part in ("Dose and clipping", "Blocks over training", "Cost", "What the arms differ in", "Samples"):
        assert part in page.text
    assert "signal.name" in page.text


def test_equal_runs_give_equal_bytes_without_torch(hostile_experiment: Path) -> None:
    run = write_run(hostile_experiment / ARM / "seed_1")
    page = hostile_experiment / "report.html"
    comparison(hostile_experiment)
    before = [run.read_bytes(), page.read_bytes()]
    script = f"""
import sys
from gptlab.analysis.load import read
from gptlab.analysis.report.comparison import write_comparison
from gptlab.analysis.report.run import write_run
write_run({str(run.parent)!r})
outcomes = read([{str(hostile_experiment)!r}])
write_comparison(outcomes, outcomes.verdicts(), {str(page)!r})
assert "torch" not in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    run.unlink()
    page.unlink()
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert [run.read_bytes(), page.read_bytes()] == before


def test_drawing_changes_no_setting_of_matplotlib(hostile_experiment: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    comparison(hostile_experiment)
    assert dict(mpl.rcParams) == before


def test_a_finished_run_has_its_report(finished_run: Path) -> None:
    """Of a real run: its loss, and a plot of everything that it measured."""
    page = Page((finished_run / "report.html").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    loss = [row for row in rows if row["kind"] == "val"][-1]
    assert f"{loss['loss']:.4f}" in page.text
    assert f"{loss['bits_per_byte']:.4f}" in page.text
    assert f"{loss['tempered_loss']:.4f}" in page.text
    for part in ("Signal loss", "Dose", "Loss of every block’s reading", "Confidence of every", "Clipped", "Speed"):
        assert part in page.text
    assert "block loss confidence" in page.text.replace("\n", " ")
    assert sum(tag == "svg" for tag, name, _ in page.attributes if name == "role") == 8
    assert "n_embd" in page.text  # what it sets over its preset


def test_a_report_that_cannot_be_made_is_told_in_a_line_and_fails_nothing(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gptlab.analysis.report.run.write_run", lambda folder: 1 / 0)
    assert main(tiny(tmp_path / "run", steps=1)) == 0
    assert "none: ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()
    monkeypatch.undo()
    (tmp_path / "run" / "report.html").mkdir()
    assert report.after_run(tmp_path / "run").startswith("none: DataError: ")
    assert report.after_run(tmp_path / "nowhere").startswith("none: CheckpointError: expected a run folder")


def test_compare_writes_it_into_the_experiments_folder_or_where_html_says(
    hostile_experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare([str(hostile_experiment)]) == 0
    written = hostile_experiment / "report.html"
    assert str(written) in capsys.readouterr().err
    assert compare([str(hostile_experiment), "--json", "--html", str(tmp_path / "other.html")]) == 0
    assert json.loads(capsys.readouterr().out)["arms"]
    assert (tmp_path / "other.html").read_bytes() == written.read_bytes()
    assert guarded(compare, [str(hostile_experiment), "--html", str(tmp_path / "no" / "such.html")]) == 3
    assert "could not write" in capsys.readouterr().err
    written.unlink()
    written.mkdir()  # the report is a gift: the verdicts are printed all the same
    assert compare([str(hostile_experiment)]) == 0
    assert "could not write" in capsys.readouterr().err


def test_a_log_of_another_trainer_has_one_too(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    lines = [f'{step},{5 - step / 10 + len(arm) / 100},"{arm}",{seed}'
             for arm in ("plain", HOSTILE[2]) for seed in (1, 2) for step in (5, 10)]  # fmt: skip
    log.write_text("\n".join(["step,loss,arm,seed", *lines]), encoding="utf-8")
    assert compare([str(log), "--html", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert HOSTILE[2] in page.text
    assert page.tags <= TAGS
    assert "Samples" not in page.text


def test_what_was_overridden_stands_on_the_page(hostile_experiment: Path) -> None:
    path = hostile_experiment / "baseline" / "seed_2" / "environment.json"
    path.write_text(path.read_text().replace("2.13.0", "2.12.0"))
    assert compare([str(hostile_experiment), "--despite"]) == 0
    page = Page((hostile_experiment / "report.html").read_text(encoding="utf-8"))
    assert page.text.index("Compared despite undeclared differences") < page.text.index("Verdicts")
    assert "software torch: expected '2.13.0'" in page.text


def test_runs_that_tell_little_and_arms_that_diverged_still_have_a_page(hostile_experiment: Path) -> None:
    """No rows at all of an arm that diverged on every seed; one seed left of nothing else."""
    for seed in (1, 2, 3):
        path = hostile_experiment / ARM / f"seed_{seed}" / "metrics.jsonl"
        path.write_text(json.dumps({"step": 3, "kind": "event", "event": "DivergedError", "text": "x"}) + "\n")
    page = comparison(hostile_experiment)
    assert "it diverged on 3 of 3 seeds, its baseline on 0 (p = 0.1, threshold 0.05)" in page.text
    for seed in (2, 3):
        shutil.rmtree(hostile_experiment / "baseline" / f"seed_{seed}")
    assert "undecided" in comparison(hostile_experiment).text


def test_a_curve_over_seeds_is_their_mean_with_their_spread() -> None:
    band = over_seeds([{1: 1.0, 2: 4.0, 3: 9.0}, {1: 3.0, 2: 4.0}])
    assert (band.steps, band.mean) == ([1, 2], [2.0, 4.0])
    assert band.high == pytest.approx([2 + 2**0.5, 4.0])
    points = Points()
    for i in range(1, 8):
        points.add(i, float(i))
    assert binned(points, bins=3) == {3: 2.0, 6: 5.0, 7: 7.0}


def test_time_and_speed_count_every_session(run: Path) -> None:
    history = read_history(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert history.seconds == pytest.approx(
        sum(64 / row["tokens_per_second"] for row in rows if row["kind"] == "train")
    )
    assert history.n_blocks == 2


def test_what_cannot_be_seen_is_said_in_words() -> None:
    band = over_seeds([{1: 5.0, 20: 2.5}])
    label = Page(curves([Line(band, "#010001", "plain")], "loss", "Loss", unit="nats")).values("aria-label")
    assert label == ["Loss: plain goes from 5 at step 1 to 2.5 at step 20"]
    better = {"verdict": "better", "differences": [-0.1, -0.3], "difference": -0.2, "interval": [-0.4, 0.0]}
    undecided = {"verdict": "undecided", "differences": [], "difference": None, "interval": [None, None]}
    arms = {"a": {**better, "control": False}, "b": {**undecided, "control": False}}
    label = Page(draw_forest(arms, 0.01, "forest", "loss minus the baseline's, nats").inline()).values("aria-label")
    assert label == [
        "Paired differences, loss minus the baseline's, nats, with a band of ±0.01: a, better: difference "
        "-0.2000, 95% interval -0.4000 to +0.0000; b, undecided: no difference measured"
    ]


def test_earlier_sessions_are_rows_of_their_own() -> None:
    found = flat({"torch": "b", "earlier": [{"torch": "a", "machine": {"gpus": []}}], "gpus": ["x", "y"]})
    assert found == [("torch", "b"), ("earlier 1: torch", "a"), ("earlier 1: machine: gpus", "none"), ("gpus", "x, y")]


@pytest.mark.parametrize(
    "names",
    [["a"], ["negative_self_cross_entropy-placebo", "b"], ["gated_confidence at 0.9"] * 2, ["many_options=" * 50],
     [f"arm {k}" for k in range(30)]],
)  # fmt: skip
def test_names_of_arms_cover_no_data_and_each_other(names: list[str]) -> None:
    found = {
        "verdict": "worse",
        "control": False,
        "difference": 0.1,
        "interval": (-0.1, 0.3),
        "differences": [0.0, 0.2],
    }
    arms = {f"{name}{'' if k == 0 else k}": {**found, "plateau": None} for k, name in enumerate(names)}
    drawn = draw_forest(arms, 0.01, "forest", "loss minus the baseline's, nats a token")
    lines = [Line(Band.of({1: 2.0, 2: 1.0 + k / 100}), theme.arm(k), name) for k, name in enumerate(arms)][:12]
    for figure in (drawn, draw_curves(lines, "losses", "Loss", unit="nats", named=True)):
        theme._print_texts(figure.figure, figure.texts)
        FigureCanvasAgg(figure.figure).draw()
        (axes,) = figure.figure.axes
        data, whole = axes.get_window_extent(), figure.figure.bbox
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= len(lines)
        assert not any(data.overlaps(box) for box in boxes)
        assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 for box in boxes)
        assert not any(a.y0 + 3 < b.y1 and b.y0 + 3 < a.y1 for a, b in itertools.combinations(boxes, 2))


HOST = "http://page.test"

HARNESS = """<!doctype html><title>harness</title><link rel=icon href=data:,><pre id=found></pre><script>
const names = ["comparison", "run", "guest"], widths = [390, 1200], found = {};
let waiting = names.length * widths.length;
for (const name of names) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.width = width;
  frame.onload = () => {
    const page = frame.contentDocument, style = element => frame.contentWindow.getComputedStyle(element);
    found[name + width] = {
      needs: page.documentElement.scrollWidth, window: frame.contentWindow.innerWidth,
      background: style(page.body).backgroundColor,
      line: [...page.querySelectorAll("svg path[stroke^='var']")].map(path => style(path).stroke)[0],
      scripts: page.scripts.length, images: page.images.length, alerted: frame.contentWindow.alerted === true,
    };
    if (--waiting === 0) document.getElementById("found").textContent = JSON.stringify(found);
  };
  frame.src = "/" + name + ".html";
  document.body.append(frame);
}
</script>"""
"""It loads each page into frames as wide as a phone and as a desk's screen, and measures them."""

GUEST = (
    "<!doctype html><p>x<img src=http://elsewhere.test/x.png><script>alerted = true; throw 'a script error'</script>"
)
"""A page that does all that a report must not do: what the test would see of it."""

OWN = re.compile(r"(http://)?(clients2|accounts|update|optimizationguide-pa)\.google(apis)?\.com[:/]")
"""What Chromium asks for by itself, whatever page it shows: the time, an account, updates."""


@pytest.fixture
def site(hostile_experiment: Path) -> Iterator[tuple[int, list[str]]]:
    """A proxy's port, and the requests it met for anything but the pages."""
    outcomes = read([hostile_experiment])
    comparison = write_comparison(outcomes, outcomes.verdicts(), hostile_experiment / "report.html")
    run = write_run(hostile_experiment / ARM / "seed_1")
    content = {f"{HOST}/harness.html": HARNESS.encode(), f"{HOST}/guest.html": GUEST.encode()}
    content |= {f"{HOST}/comparison.html": comparison.read_bytes(), f"{HOST}/run.html": run.read_bytes()}
    strange: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in content:
                strange.append(self.path)
            self.send_response(200 if self.path in content else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content.get(self.path, b""))

        def do_CONNECT(self) -> None:
            strange.append(self.path)
            self.send_error(403)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, strange
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(
    site: tuple[int, list[str]], requires_program: Callable[[str], str], tmp_path: Path
) -> Callable[[str], tuple[str, list[str], list[str]]]:
    """`visit(name)` opens a page: its document when it is loaded, console messages, and requests for other things."""
    port, strange = site

    def opened(name: str) -> tuple[str, list[str], list[str]]:
        command = [
            requires_program("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--proxy-server=127.0.0.1:{port}", "--enable-logging=stderr",
            "--virtual-time-budget=20000", "--window-size=1300,900", "--dump-dom", f"{HOST}/{name}.html",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=300, check=True)
        log = done.stderr.decode(errors="replace")
        messages = [line for line in log.splitlines() if "CONSOLE" in line]
        return done.stdout.decode(errors="replace"), messages, [url for url in strange if not OWN.match(url)]

    return opened


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_a_report_opens_without_an_error_or_a_request(name: str, visit: Any) -> None:
    document, messages, requests = visit(name)
    assert messages == []
    assert requests == []
    text = re.sub(r"<[^>]*>", "", document)
    assert HOSTILE[2].replace("&", "&amp;") in text
    if name == "comparison":
        assert re.search(r'<p class="verdict">worse</p>', document)


def test_reports_fit_a_phone_and_a_screen_and_show_their_colours(visit: Any) -> None:
    document, messages, requests = visit("harness")
    found = json.loads(re.findall(r'<pre id="found">(.*?)</pre>', document)[0])
    for name in ("comparison390", "comparison1200", "run390", "run1200"):
        page = found[name]
        assert page["needs"] <= page["window"] == int(re.sub(r"\D", "", name))
        assert page["background"] != "rgba(0, 0, 0, 0)"  # the policy's hash let the style sheet through
        assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", page["line"])  # the plot's variable has a colour
        assert (page["scripts"], page["images"], page["alerted"]) == (0, 0, False)
    # what a page looks like that keeps to none of this: the test would have seen it
    assert found["guest390"]["alerted"]
    assert any("a script error" in message for message in messages)
    assert "http://elsewhere.test/x.png" in requests
