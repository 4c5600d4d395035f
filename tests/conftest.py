"""What tests in every folder share: the programs beside Python that some of them drive. No settings, no fakes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def requires_program() -> Callable[[str], str]:
    """`requires_program("screen")` is the program's path; where there is none, the test is skipped.

    With CI=true it fails instead: the machine that checks everything must have everything.
    """

    def path_of(program: str) -> str:
        if path := shutil.which(program):
            return path
        reason = f"needs {program} (Debian: apt install {program})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)

    return path_of
