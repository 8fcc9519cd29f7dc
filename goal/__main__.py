"""`python -m goal`, and so `torchrun … -m goal`, runs the command `goal`."""

import sys

from goal.cli import main

if __name__ == "__main__":
    sys.exit(main())
