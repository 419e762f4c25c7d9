"""`python -m raymuse.cli`: the same as `raymuse`."""

import sys

from raymuse.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
