"""report.html: a run, or a comparison, as one file that opens offline and can be sent to someone.

No verdict is made here: `compare`'s are shown.
"""

from __future__ import annotations

from pathlib import Path

FILE = "report.html"


def lacks_report(folder: Path) -> bool:
    """Whether a finished run was ended before its report was written whole."""
    return not (folder / FILE).exists() or any(folder.glob(f".{FILE}.*.tmp"))


def after_run(folder: Path) -> str:
    """Write the report of a run that has just finished, and say in one line where it is or why there is none.

    Never raises: the run is done and saved, and its report can be done without.
    """
    try:
        from gptlab.analysis.report.run import write_run

        return str(write_run(folder))
    except Exception as error:
        return f"none: {type(error).__name__}: {error}".partition("\n")[0]
