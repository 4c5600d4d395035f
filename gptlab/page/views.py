"""The pages as HTML: the list of runs, a run, a comparison and the lens's form, each drawn anew when it has changed.

A run and a comparison are shown as their reports show them, by the same templates. Reads only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.analysis.listing import Listed, differing, ordered
from gptlab.analysis.load import read
from gptlab.analysis.report import comparison, run, theme
from gptlab.analysis.report.history import Band, read_history
from gptlab.analysis.report.page import render, stylesheet
from gptlab.analysis.report.plots import Line, curves
from gptlab.analysis.run import read_run
from gptlab.errors import ConfigError, GptlabError
from gptlab.page.line import Cache
from gptlab.page.shelf import SHARE, Shelf, Shelved, mark_of

HERE = Path(__file__).parent
TEMPLATES, STATIC = HERE / "templates", HERE / "static"

SOON, LATER = 2, 10
"""Seconds after which a page asks whether there is something new: while a run of it is running, and else."""

MOST = 64
"""Pages that are kept."""


class View(NamedTuple):
    """A page, and the mark of what it shows."""

    html: bytes
    mark: str


class Missing(Exception):
    """No run or experiment has this key (any more)."""


class Views:
    """The pages about what lies below a folder; models: {key: name} of others that the lens offers first."""

    def __init__(self, shelf: Shelf, models: Mapping[str, str]) -> None:
        self.shelf, self.models = shelf, models
        self._drawn = Cache(MOST, SHARE)

    def runs(self) -> View:
        """The list of runs and experiments."""
        found = self.shelf.look()
        return self._view(("runs",), tuple(found.marks.items()), lambda: self._runs(found))

    def run(self, key: str) -> View:
        """A run; raises Missing."""
        one = _at(self.shelf.look().runs, key)
        return self._view(("run", key), mark_of(one.path), lambda: self._run(key, one))

    def experiment(self, key: str) -> View:
        """An experiment's comparison; raises Missing."""
        found = self.shelf.look()
        folder = _at(found.experiments, key)
        inside = [key for key, one in found.runs.items() if one.path.is_relative_to(folder)]
        mark = _settled(found, inside)
        return self._view(("experiment", key), mark, lambda: self._comparison([folder], found.names[key]))

    def compare(self, keys: Sequence[str]) -> View:
        """The comparison of some runs; raises Missing."""
        found = self.shelf.look()
        paths = [_at(found.runs, key).path for key in keys]
        return self._view(("compare", *keys), _settled(found, keys), lambda: self._comparison(paths, "runs"))

    def lens(self, chosen: str = "") -> View:
        """The form that asks for a model and a text."""
        models = self.sources()
        shown = [(key, name, key == chosen) for key, name in models.items()]
        return self._view(("lens", chosen), tuple(models.items()), lambda: _page("ask.html", "Lens", 0, models=shown))

    def sources(self) -> dict[str, str]:
        """{key: name} of the models that the lens can read."""
        runs = self.shelf.look().runs.items()
        return {**self.models, **{key: one.figures["run"] for key, one in runs if _has_weights(one.path)}}

    def _view(self, key: Hashable, mark: Hashable, draw: Callable[[], str]) -> View:
        html, drawn = self._drawn.get(key, mark, lambda: draw().encode("utf-8", errors="replace"))
        digest = hashlib.sha256(repr(drawn).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
        return View(html.replace(b'data-mark=""', f'data-mark="{digest}"'.encode(), 1), digest)

    def _runs(self, found: Shelved) -> str:
        of = {id(one): key for key, one in found.runs.items()}
        rows = ordered(list(found.runs.values()), "run")
        experiments = sorted(found.names.items(), key=lambda item: item[1])
        shown = [(of[id(one)], one) for one in rows]
        return _page(
            "runs.html", "Runs", _every(rows), folder=self.shelf.root, experiments=experiments, keys=differing(rows),
            rows=shown,
        )  # fmt: skip

    def _run(self, key: str, one: Listed) -> str:
        try:
            content = run.content(read_run(one.path), read_history(one.path))
        except GptlabError as error:
            return _problem(one.figures["run"], error)
        figures = one.figures
        return _page(
            "run.html", every=_every([one]), state=figures["state"], steps=figures["steps"],
            lens=key if _has_weights(one.path) else None, **content,
        )  # fmt: skip

    def _comparison(self, sources: list[Path], name: str) -> str:
        try:
            if not sources:
                raise ConfigError("expected marked runs, found none: mark some in the list, one without a signal")
            outcomes = read(sources)
            if outcomes.undeclared:
                differences = "; ".join(outcomes.undeclared)
                raise ConfigError(
                    f"these runs differ in what no arm declares, so no verdict would mean anything: {differences}. "
                    "`gptlab compare --despite` compares them all the same"
                )
            result = outcomes.verdicts()
            histories = {arm: [read_history(one.path) for one in runs] for arm, runs in outcomes.runs.items()}
            content = comparison.content(outcomes, result, histories)
        except GptlabError as error:
            return _problem(name, error)
        return _page("comparison.html", every=LATER, **content)


def prepare() -> None:
    """Draw something, so that what is loaded for it is no part of what a first page takes."""
    curves([Line(Band.of({1: 1.0, 2: 2.0}), theme.MUTED)], "first", "", unit="")


def static() -> dict[str, tuple[bytes, str]]:
    """{path: (content, its type)} of the files that never change."""
    style = stylesheet() + (STATIC / "page.css").read_text(encoding="utf-8")
    script = (STATIC / "page.js").read_bytes()
    return {"/style.css": (style.encode(), "text/css"), "/page.js": (script, "text/javascript")}


def _page(template: str, title: str = "", every: int = LATER, **content: Any) -> str:
    """every: seconds after which the page asks for what is new, 0 for never."""
    above = {"state": None, "steps": None, "lens": None, "title": title, "every": every}
    return render(template, base="live.html", folders=(TEMPLATES,), **{**above, **content})


def _problem(name: str, error: GptlabError) -> str:
    return _page("problem.html", name, problem=str(error))


def _at(found: Mapping[str, Any], key: str) -> Any:
    if key not in found:
        raise Missing
    return found[key]


def _every(rows: Iterable[Listed]) -> int:
    return SOON if any(one.figures["state"] == "running" for one in rows) else LATER


def _settled(found: Shelved, keys: Iterable[str]) -> Hashable:
    """A mark of runs that a comparison rests on: of one that is running it takes nothing."""
    states = [(key, found.runs[key].figures["state"]) for key in keys]
    return tuple((key, "running" if state == "running" else found.marks[key]) for key, state in states)


def _has_weights(run: Path) -> bool:
    from gptlab.runs import checkpoint  # torch comes with it: the link is printed before

    return bool(checkpoint.complete(run / "checkpoints"))
