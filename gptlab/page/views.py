"""The pages as HTML: the list of runs, a run, a comparison and the lens's form, each redrawn when it has changed.

A run and a comparison are shown as their reports show them, by the same templates. The lens answers with a text read by
every block of a model that was asked for, of which a few are kept open. Reads only.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptlab.analysis.load import read
from gptlab.analysis.report import comparison, run, theme
from gptlab.analysis.report.page import render, stylesheet
from gptlab.analysis.report.plots import Band, Line, curves
from gptlab.analysis.report.run import History, read_history
from gptlab.analysis.run import Listed, figures_of, grouped, listed, ordered, read_run
from gptlab.errors import CheckpointError, ConfigError, GptlabError
from gptlab.files import LOCK, is_locked
from gptlab.page.run_index import SHARE, Cache, Indexed, RunIndex, mark_of, stamp
from gptlab.runs.records import SlowReadError

if TYPE_CHECKING:
    from gptlab.interpret.generate import OpenedModel
    from gptlab.signals.tuned_lens import TunedLens

HERE = Path(__file__).parent
TEMPLATES, STATIC = HERE / "templates", HERE / "static"

SECONDS_RUNNING, SECONDS_IDLE = 2, 10
"""After which a page asks whether there is something new: while a run of it is running, and else."""

MOST_PAGES, MOST_MODELS = 64, 2
"""Pages that are kept, and models that stay in memory."""

MOST_OVERLAID = 48
"""Runs whose curves are laid over each other; of more, the first."""

OVERLAID = {
    "val": "validation loss, nats a token", "loss": "training loss, nats a token", "grad_norm": "gradient norm",
    "dose": "dose",
}  # fmt: skip
"""Figures whose curves can be laid over each other, with their axes' labels."""

MOST_WRITTEN, WRITING_SECONDS = 256, 20.0
"""Tokens that are generated for a prompt, and seconds after which generation ends with what is there."""

DRAWING_SECONDS = 3.0
"""CPU seconds that a page's runs may take to read; what is drawn of them is bounded by itself, and takes about one."""


class View(NamedTuple):
    """A page, the mark of what it shows, and its status: 503 for one that takes too long to draw."""

    html: bytes
    mark: str
    status: int


class Missing(Exception):
    """No run or experiment has this key (any more)."""


class Views:
    """The pages about what lies below a folder; models: {key: name} of others that the lens offers first."""

    def __init__(self, index: RunIndex, models: Mapping[str, str], *, writes: bool = False) -> None:
        """writes: whether the page offers to generate text."""
        self.index, self.models, self.writes = index, models, writes
        self._drawn = Cache(MOST_PAGES, SHARE)

    def runs(self) -> View:
        """The list of runs and experiments."""
        found = self.index.look()
        mark = (tuple((key, mark_of(path)) for key, path in found.runs.items()), self.index.pending)
        return self._view(("runs",), mark, "Runs", lambda until: self._runs(found))

    def run(self, key: str) -> View:
        """A run; raises Missing."""
        found = self.index.look()
        path = _at(found.runs, key)
        name = found.names[key]
        return self._view(("run", key), mark_of(path), name, lambda until: self._run(key, path, name, until))

    def experiment(self, key: str) -> View:
        """An experiment's comparison; raises Missing."""
        found = self.index.look()
        folder = _at(found.experiments, key)
        mark = tuple(_settled(path) for path in found.runs.values() if path.is_relative_to(folder))
        return self._view(("experiment", key), mark, found.names[key], lambda until: self._comparison([folder], until))

    def compare(self, keys: Sequence[str]) -> View:
        """The comparison of some runs; raises Missing."""
        found = self.index.look()
        paths = [_at(found.runs, key) for key in keys]
        mark = tuple(map(_settled, paths))
        return self._view(("compare", *keys), mark, "runs", lambda until: self._comparison(paths, until))

    def overlay(self, keys: Sequence[str]) -> View:
        """The curves of some runs over each other; raises Missing."""
        found = self.index.look()
        by_key = {key: _at(found.runs, key) for key in keys}
        paths = dict(sorted((found.names[key], path) for key, path in by_key.items())[:MOST_OVERLAID])
        mark = tuple(map(mark_of, paths.values()))
        return self._view(("overlay", *keys), mark, "curves", lambda until: self._overlay(paths, until))

    def lens(self, chosen: str = "") -> View:
        """The form that asks for a model and a text."""
        models = self.sources()
        shown = [(key, name, key == chosen) for key, name in models.items()]
        mark = tuple(models.items())
        return self._view(("lens", chosen), mark, "Lens", lambda until: _page("ask.html", "Lens", 0, models=shown))

    def sources(self) -> dict[str, str]:
        """{key: name} of the models that the lens can read."""
        found = self.index.look()
        return {**self.models, **{key: found.names[key] for key, path in found.runs.items() if _has_weights(path)}}

    def _view(self, key: Hashable, mark: Hashable, name: str, draw: Callable[[float], str]) -> View:
        """draw: makes the page, given the moment at which reading for it ends; name: of what cannot be shown."""

        def drawn() -> tuple[bytes, int]:
            try:
                page, status = draw(time.thread_time() + DRAWING_SECONDS), 200
            except GptlabError as error:
                page = _page("problem.html", name, problem=str(error))
                status = 503 if isinstance(error, SlowReadError) else 200
            return page.encode("utf-8", errors="replace"), status

        (html, status), made_at = self._drawn.get(key, mark, drawn)
        digest = hashlib.sha256(repr(made_at).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
        return View(html.replace(b'data-mark=""', f'data-mark="{digest}"'.encode(), 1), digest, status)

    def _runs(self, found: Indexed) -> str:
        rows = self.index.rows(found.runs)
        key_of_row = {id(one): key for key, one in rows.items()}
        shown = ordered(list(rows.values()), "run")
        experiments = sorted(((key, found.names[key]) for key in found.experiments), key=lambda item: item[1])
        return _page(
            "runs.html", "Runs", _every(shown), folder=self.index.root, experiments=experiments, groups=grouped(shown),
            key_of=lambda one: key_of_row[id(one)],
        )  # fmt: skip

    def _run(self, key: str, path: Path, name: str, until: float) -> str:
        history = History()
        found = read_run(path, until, history.add)
        content = run.content(found, history)
        figures = figures_of(found, name)
        return _page(
            "run.html", every=_every([Listed(path, figures, {})]), state=figures["state"], steps=figures["steps"],
            lens=key if _has_weights(path) else None, writes=self.writes, **content,
        )  # fmt: skip

    def _overlay(self, paths: Mapping[str, Path], until: float) -> str:
        if not paths:
            raise ConfigError("expected marked runs, found none: mark some in the list")
        runs = []
        for name, path in paths.items():
            history = read_history(path, until)
            points = {"val": history.losses} | {key: history.updates[key] for key in OVERLAID if key != "val"}
            arm = listed(self.index.root, path, until).figures["arm"]
            curves = {key: list(map(list, run.binned(of).items())) for key, of in points.items()}
            runs.append({"name": name, "arm": arm, "curves": curves})
        return _page("overlay.html", "Curves", SECONDS_IDLE, runs=runs, figures=OVERLAID)

    def _comparison(self, sources: list[Path], until: float) -> str:
        if not sources:
            raise ConfigError("expected marked runs, found none: mark some in the list, one without a signal")
        outcomes = read(sources, until=until)
        if outcomes.undeclared:
            differences = "; ".join(outcomes.undeclared)
            raise ConfigError(
                f"these runs differ in what no arm declares, so no verdict would mean anything: {differences}. "
                "`gptlab compare --despite` compares them all the same"
            )
        result = outcomes.verdicts()
        histories = {arm: [read_history(one.source, until) for one in runs] for arm, runs in outcomes.runs.items()}
        return _page("comparison.html", every=SECONDS_IDLE, **comparison.content(outcomes, result, histories))


def prepare() -> None:
    """Draw something, so that what is loaded for it is no part of what a first page takes."""
    curves([Line(Band.of({1: 1.0, 2: 2.0}), theme.MUTED)], "first", "", unit="")


def static() -> dict[str, tuple[bytes, str]]:
    """{path: (content, its type)} of the files that never change."""
    style = stylesheet() + (STATIC / "page.css").read_text(encoding="utf-8")
    script = (STATIC / "page.js").read_bytes()
    return {"/style.css": (style.encode(), "text/css"), "/page.js": (script, "text/javascript")}


def _page(template: str, title: str = "", every: int = SECONDS_IDLE, **content: Any) -> str:
    """every: seconds after which the page asks for what is new, 0 for never."""
    above = {"state": None, "steps": None, "lens": None, "writes": False, "title": title, "every": every}
    return render(template, base="live.html", folders=(TEMPLATES,), **{**above, **content})


def _at(found: Mapping[str, Any], key: str) -> Any:
    if key not in found:
        raise Missing
    return found[key]


def _every(rows: Iterable[Listed]) -> int:
    return SECONDS_RUNNING if any(one.figures["state"] in ("running", "unread") for one in rows) else SECONDS_IDLE


def _settled(run: Path) -> Hashable:
    """A mark of a run that a comparison rests on: it takes nothing of one that is running."""
    return str(run), "running" if is_locked(run / LOCK) else mark_of(run)


def _has_weights(run: Path) -> bool:
    from gptlab.runs import checkpoint  # torch comes with it: the link is printed before

    return bool(checkpoint.complete(run / "checkpoints"))


class Models:
    """Models by where they lie, opened when they are asked for. Used by one thread, so that one computes at a time."""

    def __init__(self, open_model: Callable[[str], OpenedModel]) -> None:
        self._open_model = open_model
        self._opened = Cache(MOST_MODELS)

    def read(self, source: Path, prompt: str) -> dict[str, Any]:
        """What `gptlab lens --json` says of a prompt, and `note`, why there is no tuned reading.

        Raises CheckpointError where there is no model, DataError for text that its tokenizer cannot hold, ConfigError
        for more than its block_size tokens.
        """
        from gptlab.interpret.lens import readings

        opened, tuned, note = self._of(source)
        readers = {"raw": None} if tuned is None else {"raw": None, "tuned": tuned}
        found = readings(opened.model, opened.tokenizer, prompt, readers, autocast=opened.placement.autocast)
        return {"prompt": prompt, "readers": found, "note": note}

    def write(self, source: Path, prompt: str, tokens: int, temperature: float) -> dict[str, Any]:
        """{"text", "note"}: at most MOST_WRITTEN tokens that continue `prompt`; note: why it ended early.

        Raises what `read` does but for long prompts, of which the last block_size tokens are the context.
        """
        from gptlab.interpret.generate import Sampling, generate
        from gptlab.randomness import torch_generator

        opened = self._of(source)[0]
        until, kept, note = time.monotonic() + WRITING_SECONDS, [], ""
        steps = generate(
            opened.model, opened.tokenizer.prompt(prompt), min(tokens, MOST_WRITTEN), Sampling(temperature),
            generator=torch_generator("sample", 1, 0), vocab_size=opened.vocabulary.size,
            end=opened.tokenizer.end_of_text,
        )  # fmt: skip
        for step in steps:
            kept.append(step.token)
            if time.monotonic() > until:
                note = f"ended after {WRITING_SECONDS:g} s and {len(kept)} tokens"
                break
        return {"text": opened.tokenizer.decode(kept), "note": note}

    def _of(self, source: Path) -> tuple[OpenedModel, TunedLens | None, str]:
        return self._opened.get(source, _model_mark(source), lambda: self._open(source))[0]

    def _open(self, source: Path) -> tuple[OpenedModel, TunedLens | None, str]:
        from gptlab.signals.tuned_lens import load, path_of

        opened = self._open_model(str(source))
        try:
            return opened, load(opened.model, path_of(source)), ""
        except CheckpointError as error:
            return opened, None, f"no tuned reader: {error}"


def _model_mark(source: Path) -> Hashable:
    """Another one when the model has changed: a run has a newer checkpoint, or a folder's files are others."""
    from gptlab.runs import checkpoint
    from gptlab.signals.tuned_lens import path_of

    if newest := checkpoint.complete(source / "checkpoints")[:1]:
        return newest[0], stamp(path_of(source))
    files = sorted(entry.path for entry in os.scandir(source) if entry.is_file())
    return tuple((file, stamp(Path(file))) for file in [*files, path_of(source)])
