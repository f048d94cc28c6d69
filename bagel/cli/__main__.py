"""`python -m bagel.cli`: the command `bagel`."""

import sys

from bagel.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
