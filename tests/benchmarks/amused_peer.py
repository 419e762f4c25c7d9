"""train_amused.py as it is, in the peer's environment: `python amused_peer.py SCRIPT ARGUMENT...`.

Nothing of it is changed but what torchvision_python.py says. The arguments that `train.py` gives keep clear of what is
known to crash in it: caption dropout and `--split_vae_encode` on a folder of pictures, gradient checkpointing, and
validation without wandb.
"""

import runpy
import sys

from torchvision_python import import_torchvision

if __name__ == "__main__":
    import_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
