"""`python -m seesr`, the same as the command `seesr`."""

import sys

from seesr.cli import main

sys.exit(main())
