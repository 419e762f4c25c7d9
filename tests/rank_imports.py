"""What every rank of a test imports, imported once: see `ranks.run_ranks`."""

import trainings  # noqa: F401
from raymuse.training.zero import _import_deepspeed

_import_deepspeed()
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
