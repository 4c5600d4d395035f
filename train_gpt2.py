"""Train GPT-2: the plain baseline. `train_gpt2.py --help` shows every option; so does `gptlab train --help`."""

import os
import sys

import gptlab  # noqa: F401

if sys.path[0] == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # of this folder the package alone is imported, whatever else lies here

from gptlab.cli.main import guarded
from gptlab.cli.train import main

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
