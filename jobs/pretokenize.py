"""Encode image shards to token shards, on a cluster.

    ray job submit --working-dir . --runtime-env jobs/env.yaml -- python jobs/pretokenize.py my.yaml

What follows the script's name is what follows `raymuse pretokenize`. The driver's exit code is the command's: 0 done,
1 failed, 2 bad usage or config, 3 done with too many rejects. Submit the same again to resume.
"""

import sys

from raymuse.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["pretokenize", *sys.argv[1:]]))
