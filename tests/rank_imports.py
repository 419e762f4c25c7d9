"""What every rank of a test imports, imported once: see `ranks.run_ranks`.

The last lines are what DeepSpeed's engine and pyarrow import when they are first used, a second of every rank.
"""

import pandas  # noqa: F401
from PIL import Image

import tiny  # noqa: F401
import trainings  # noqa: F401
from raymuse.training.zero import _import_deepspeed

_import_deepspeed()
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.ops.op_builder.all_ops  # noqa: E402
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

Image.preinit()
