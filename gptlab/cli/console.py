"""The one way to the terminal: streams that never end a job, what is shown on them, and Ctrl-C as a request to stop.

A display observes the work. A terminal that goes away, a pipe whose reader has left, a full disk or an encoding that
lacks a character take the display with them, never the training that it shows.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec

from gptlab.distributed import launcher_hangs_up
from gptlab.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    from gptlab.analysis.tables import Table

_P = ParamSpec("_P")

PIPE_WIDTH = 110
"""Characters of a line on standard error where it is no terminal."""
REDRAW_EVERY, COUNT_EVERY = 0.1, 10.0
"""Seconds between two drawings of a live line, and between two lines of progress in a file."""
LEAST_FOLDED = 12
"""Characters of a table's last column in which words may be broken."""
NARROWEST = 20
"""A terminal that reports fewer columns, or none, is shown lines of the usual 80."""

_KEPT = "\n\t"
_BIDI = {0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Marks that change the direction of what follows: shown text could be made to read otherwise than it is."""


class ReaderLeft(Exception):
    """Nobody reads standard output any more (`| head`), and what is printed there is all that the command is for."""


class _Stream:
    """A standard stream that never fails: at its first error it is replaced, for good, by one that nobody reads.

    ends: whether ReaderLeft is raised where the reader of a pipe has left, to end a command that only prints.
    """

    def __init__(self, stream: IO[str], *, ends: bool) -> None:
        self._stream, self._ends = stream, ends
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        with self._surviving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._surviving():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # another program made the terminal non-blocking: this text is lost, no more
            pass
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._drop(error if isinstance(error, OSError) else OSError(errno.EBADF, str(error)))
            if self._ends and isinstance(error, BrokenPipeError):
                raise ReaderLeft from None

    def _drop(self, error: OSError) -> None:
        """Let the descriptor lead nowhere, for C code and child processes too; the text that waited goes there."""
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            self._stream.flush()


@contextlib.contextmanager
def standard_streams(*, in_files: bool) -> Iterator[Callable[[], OSError | None]]:
    """Within, sys.stdout and sys.stderr fail nobody, whatever their encoding.

    in_files: whether the work is kept in files. Then standard output is an observer too; else ReaderLeft is raised
    where its reader has left. What is yielded gives the error that kept standard output from being written, if any.
    """
    for descriptor in range(3):  # else the next file that is opened would be taken for a stream that was closed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out = _Stream(_encodable(before[0]), ends=not in_files)
    err = _Stream(_encodable(before[1]), ends=False)

    def lost() -> OSError | None:
        with contextlib.suppress(ReaderLeft):
            out.flush()
        return out.lost

    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield lost
    finally:
        with contextlib.suppress(ReaderLeft):
            out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def _encodable(stream: IO[str] | None) -> IO[str]:
    if stream is None:  # it was closed before Python started
        return open(os.devnull, "w", encoding="utf-8")
    if reconfigure := getattr(stream, "reconfigure", None):
        reconfigure(errors="backslashreplace")
    return stream


def say(line: str) -> None:
    """One line on standard error, at once; what others wrote in it steers no terminal."""
    print(printable(line), file=sys.stderr, flush=True)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A rich console that fits the terminal; what is shown of the work in a pipe has lines of PIPE_WIDTH."""
    from rich.console import Console

    shown = Console(stderr=stderr, highlight=False, quiet=quiet, force_jupyter=False)
    if stderr and not shown.is_terminal:
        shown.width = PIPE_WIDTH
    elif shown.width < NARROWEST:
        shown.width = 80
    return shown


def observing(method: Callable[Concatenate[Any, _P], None]) -> Callable[Concatenate[Any, _P], None]:
    """A method of an Observer that does nothing once the display is dropped, and drops it where it raises."""

    @wraps(method)
    def observed(self: Observer, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if self.dropped:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.drop(error)

    return observed


class Observer:
    """A display: what fails in a method under `observing` ends the display, once and for good, and nothing else."""

    dropped = False
    console: Console
    _line: LiveLine | None = None

    @observing
    def note(self, text: str) -> None:
        """A line that stays."""
        from rich.text import Text

        self.console.print(Text(printable(text), style="dim"), soft_wrap=True)

    def close(self) -> None:
        """Take away what is drawn live."""
        if self._line:
            self._line.close()
            self._line = None

    def drop(self, error: Exception) -> None:
        """Show nothing from now on, and say so."""
        self.dropped = True
        with contextlib.suppress(Exception):
            self.close()
        say(f"nothing more is shown here ({type(error).__name__}: {error}); the work continues")


class LiveLine:
    """One line at the bottom of a terminal that is drawn again in place; nothing where there is no terminal.

    It is drawn when it is shown, by no thread of its own.
    """

    def __init__(self, shown_on: Console) -> None:
        from rich.live import Live

        self._console, self._drawn = shown_on, 0.0
        self._live = Live(console=shown_on, auto_refresh=False, transient=True) if shown_on.is_terminal else None

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def show(self, parts: Sequence[Part], *, at_once: bool = False) -> None:
        """Draw the parts that fit, unless the line was drawn a moment ago."""
        from rich.text import Text

        now = time.monotonic()
        if self._live is None or (now - self._drawn < REDRAW_EVERY and not at_once):
            return
        if not self._live.is_started:
            self._live.start()
        self._drawn = now
        line = Text(printable(fitted(parts, self._console.width - 1)), no_wrap=True, overflow="ellipsis")
        self._live.update(line, refresh=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


class Part(NamedTuple):
    """What a line may show; `rank` 0 always, then the lower the sooner. A bar takes what room it gets."""

    text: str
    rank: int = 0


def fitted(parts: Sequence[Part], width: int) -> str:
    """The parts that a line of `width` characters has room for, in their order, two blanks apart.

    >>> fitted([Part("step 5/9"), Part("loss 2.345", 1), Part("dose 0.45", 2), Part("0:07 left")], 32)
    'step 5/9  loss 2.345  0:07 left'
    """
    chosen = [part for part in parts if part.rank == 0]
    for part in sorted((part for part in parts if part.rank), key=lambda part: part.rank):
        if sum(len(one.text) + 2 for one in (*chosen, part)) - 2 > width:
            break  # a part of a higher rank may be shorter, but would come and go
        chosen.append(part)
    return "  ".join(part.text for part in parts if part in chosen)


def bar(share: float, shown_on: Console, width: int = 16) -> str:
    """A bar of which a share is full."""
    full, empty = ("━", "╌") if shown_on.encoding.startswith("utf") else ("#", ".")
    count = round(max(0.0, min(1.0, share)) * width)
    return full * count + empty * (width - count)


class Counter(Observer):
    """How far a long job is, on standard error: a line drawn in place on a terminal, else a line now and then."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = console(stderr=True, quiet=quiet)
        self._quiet = quiet
        self._name, self._started, self._first, self._last = "", 0.0, 0, 0.0

    @observing
    def count(self, name: str, done: int, total: int | None, words: str = "") -> None:
        """`done` of `total` pieces of the job of that name are finished; what was at its first count cost no time."""
        now = time.monotonic()
        counted = f"{name} {done:,}" + ("" if total is None else f"/{total:,}")
        if name != self._name:
            self.close()
            self._name, self._started, self._first, self._last = name, now, done, 0.0 if self._quiet else now
            self._line = None if self._quiet else LiveLine(self.console)
            if self._line and not self._line.is_live:
                self.note(counted)
        left = (now - self._started) / (done - self._first) * (total - done) if total and done > self._first else None
        more = [Part(words, 1)] * bool(words) + [Part(f"{duration(left)} left")] * (total is not None)
        ended = total is not None and done >= total
        if self._line and self._line.is_live:
            drawn = [Part(bar(done / max(1, total), self.console), 2)] if total is not None else []
            self._line.show([Part(counted), *drawn, *more], at_once=ended)
        elif now - self._last > COUNT_EVERY or ended:
            self._last = now
            self.note("  ".join(part.text for part in (Part(counted), *more)))

    def close(self) -> None:
        super().close()
        self._name = ""

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def printable(text: str) -> str:
    """`text` with a visible stand-in for every character that would steer the terminal; lines and tabs are kept.

    >>> printable("a\\x1b[2Jb\\r\\n")
    'a␛[2Jb␍\\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _stand_in(c) for c in text)


def _stand_in(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if code == 0x7F:
        return "␡"
    steers = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or code in _BIDI
    return "\N{REPLACEMENT CHARACTER}" if steers else character


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds; a dash where they are unknown.

    >>> duration(3725.2), duration(59.9), duration(None)
    ('1:02:05', '0:59', '–')
    """
    if seconds is None:
        return "–"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def grid(
    columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, boxed: bool = False, width: int | None = None,
    title: str = "",
) -> RichTable:  # fmt: skip
    """A table; columns whose names begin with ">" are aligned to the right, and never folded.

    width: that it has to keep to without breaking a word, where there is room.
    """
    from rich.table import Table
    from rich.text import Text

    shown = Table() if boxed else Table(box=None, pad_edge=False, header_style=None if title else "dim")
    if title:
        shown.title, shown.title_justify = Text(printable(title), "bold"), "left"
    rows, rights = list(rows), [name.startswith(">") for name in columns]
    cells = [[str(cell).replace(" ", "_" if right else " ") for cell in column]
             for right, *column in zip(rights, columns, *rows, strict=True)]  # fmt: skip
    widths = column_widths(cells, width) if width else None
    for name, right, wide in zip(columns, rights, widths or [None] * len(columns), strict=True):
        shown.add_column(
            name.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=right and not boxed,
            min_width=wide, max_width=wide,
        )  # fmt: skip
    for row in rows:
        shown.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    return shown


def show_result(
    tables: Iterable[Table], lines: Iterable[str], *, first: Sequence[str] = (), on: Console | None = None
) -> None:
    """The answer in words, tables, and what is to be read with them, on standard output or another console."""
    from rich.text import Text

    shown_on = on or console()
    for line in first:
        shown_on.print(Text(printable(line), "bold"))
    if first:
        shown_on.print()
    for table in tables:
        show_table(shown_on, table)
    for line in lines:
        shown_on.print(Text(printable(line)))


def write_tables(options: argparse.Namespace, tables: Sequence[Table], lines: Sequence[str]) -> None:
    """Write what `show_result` shows to the files of --markdown and --latex, where they were asked for."""
    from gptlab.analysis.tables import in_markdown, latex

    if options.markdown:
        write_whole(options.markdown, printable(in_markdown(tables, lines)))
    if options.latex:
        write_whole(options.latex, printable(latex(tables)))


def result_text(tables: Iterable[Table], lines: Iterable[str], *, first: Sequence[str] = ()) -> str:
    """What `show_result` shows, as text with rows as long as they are."""
    from rich.console import Console

    text = io.StringIO()
    shown_on = Console(file=text, highlight=False, width=PIPE_WIDTH, force_jupyter=False)
    show_result(tables, lines, first=first, on=shown_on)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def show_table(shown_on: Console, table: Table) -> None:
    """A table and an empty line after it; cells fold where the terminal is narrow, and are never cut.

    Words are broken only where a terminal is too narrow for the longest one of every column; columns without a figure
    are left out there. What is no terminal has no width: rows are as long as they are, and columns all there.
    """
    title, header, rows = table
    if shown_on.is_terminal:
        columns = [column for column in zip(header, *rows, strict=True) if {*column[1:]} != {"–"}]
        header, *rows = zip(*columns, strict=True)
    width = shown_on.width if shown_on.is_terminal else sys.maxsize
    shown_on.print(grid(header, rows, width=width, title=title), "", crop=False)


def column_widths(columns: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """How wide columns of texts are, two blanks apart, where no word is broken but, if it has to be, in the last one.

    None where there is no room even then.

    >>> column_widths([("arm", "a_long_name"), ("reason", "it is so because it is so")], 28)
    [11, 15]
    """
    from rich.cells import cell_len

    widths = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    most = [max(map(cell_len, column)) for column in columns]
    spare = width - sum(widths) - 2 * (len(columns) - 1)
    if spare < 0:
        widths[-1], spare = widths[-1] + spare, 0
        return widths if widths[-1] >= LEAST_FOLDED else None
    while spare and widths != most:
        for i in range(len(widths)):
            given = int(widths[i] < most[i] and spare > 0)
            widths[i], spare = widths[i] + given, spare - given
    return widths


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO = 1.0
"""Seconds in which a second signal is the first one again: a Ctrl-C reaches torchrun and its workers alike, torchrun
passes it on to them, and `timeout` signals its command and then the command's group."""


class Interrupted(KeyboardInterrupt):
    """A request to stop that came before there was anything to save; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number = number


class StopRequest:
    """Called, it says whether the process was asked to stop. A second request ends the process at once.

    It listens from entering the `with` block to its end, and then leaves the signals to whom they were before. SIGHUP
    stays ignored where it was on entry, as nohup asks, unless torchrun, which would end its processes, hears it. It may
    come several times when a terminal goes, and never is an order.

    raising: whether a request raises Interrupted at once, until `defer` is called.
    """

    def __init__(self, *, raising: bool = False) -> None:
        self._raising = raising
        self._asked: float | None = None

    def __enter__(self) -> StopRequest:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not launcher_hangs_up()
        listened = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
        self._before = {number: signal.signal(number, self._hear) for number in listened}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a request waits until somebody asks for it."""
        self._raising = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            if self._raising:
                raise Interrupted(number)
        elif number != signal.SIGHUP and now - self._asked >= ECHO:
            os._exit(128 + number)

    def __call__(self) -> bool:
        return self._asked is not None
