"""`python -m gptlab` is the command `gptlab`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder: gptlab is found already, and no other package is looked for there

from gptlab.cli.main import main

sys.exit(main())
