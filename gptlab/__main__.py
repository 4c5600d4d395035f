"""`python -m gptlab` is the command `gptlab`."""

import sys

from gptlab.cli.main import main

sys.exit(main())
