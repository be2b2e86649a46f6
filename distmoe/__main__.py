"""`python -m distmoe` is the command `distmoe`."""

import sys

from distmoe.launch.cli import main

sys.exit(main())
