"""Judge generated pictures beside the truth, on a cluster.

    ray job submit --working-dir . --runtime-env jobs/env.yaml -- python jobs/score.py my.yaml

What follows the script's name is what follows `raymuse score`. The driver's exit code is the command's: 0 done,
1 failed, 2 bad usage or config, 3 done with too many rejects. Submit the same again to resume.
"""

import sys

from raymuse.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
