"""`python -m smolrun.cli`: the same as the command `smolrun`."""

import sys

from smolrun.cli import main

if __name__ == "__main__":
    sys.exit(main())
