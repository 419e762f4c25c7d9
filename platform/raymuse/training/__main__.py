"""`torchrun ... -m raymuse.training RECIPE KEY=VALUE`: see `alone`."""

import sys

from raymuse.training.alone import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
