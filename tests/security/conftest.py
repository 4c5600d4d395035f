"""What the tests of this folder share stands beside them: readers.py and mutations.py."""

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "runs"),
    str(Path(__file__).parents[1] / "faults"),
]
