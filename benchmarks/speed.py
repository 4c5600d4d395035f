"""Training speed as ratios in one run: `gptlab bench` over the sizes that docs/performance.md shows.

python benchmarks/speed.py [--rounds N] [--peer nanogpt=PATH] [--peer build-nanogpt=PATH] [--sizes tiny,124m]
"""

import sys

from gptlab.benchmark.sizes import SIZES
from gptlab.cli.main import main


def run(argv: list[str]) -> int:
    """Run `gptlab bench` for every size with the rest of the options; the first exit code that is not 0."""
    sizes = list(SIZES)
    if "--sizes" in argv:
        at = argv.index("--sizes")
        sizes = argv[at + 1].split(",")
        argv = argv[:at] + argv[at + 2 :]
    codes = [main(["bench", "--size", size, *argv]) for size in sizes]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
