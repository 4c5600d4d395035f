"""Train GPT-2: the plain baseline. `train_gpt2.py --help` shows every option; so does `gptlab train --help`."""

import sys

from gptlab.cli.main import guarded
from gptlab.cli.train import main

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
