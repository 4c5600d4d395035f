"""Train GPT-2 with the block loss: the same trainer as train_gpt2.py, with the notes' signal (N4) switched on."""

import os
import sys
from functools import partial

import gptlab  # noqa: F401

if sys.path[0] == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # of this folder the package alone is imported, whatever else lies here

from gptlab.cli.main import guarded
from gptlab.cli.train import main

if __name__ == "__main__":
    sys.exit(guarded(partial(main, defaults={"signal.name": "confidence"}), sys.argv[1:]))
