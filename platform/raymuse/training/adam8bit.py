"""AdamW with moments of 8 bits (Dettmers et al., arXiv 2110.02861), by bitsandbytes.

A block of 256 moments shares a scale, so a shard would cut blocks elsewhere than another world's: for whole parameters
alone. Checkpoints hold codes and scales as they are: made to fp32 and back, the codes would not be the same.
"""

from typing import Any

import torch
from torch import Tensor

from raymuse.config.errors import UserError

SMALLEST = 4096
"""Parameters of fewer numbers keep fp32 moments (bitsandbytes' default)."""


def build_adamw_8bit(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit.

    Raises:
        UserError: bitsandbytes is not installed, or does not load here.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # it also fails where its library does not fit the machine
        raise UserError(
            f"optimizer.name: adamw-8bit needs bitsandbytes, which does not load: {type(error).__name__}: {error}. "
            "Install it (pip install bitsandbytes), or choose another optimizer."
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, min_8bit_size=SMALLEST, **options)
    return optimizer


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "AdamW8bit"


def names(parameter: Tensor) -> tuple[str, ...]:
    """Of a parameter's moments: the codes, and what they are scaled by."""
    return ("state1", "state2") if parameter.numel() < SMALLEST else ("state1", "absmax1", "state2", "absmax2")


def begin(optimizer: Any, parameter: Tensor) -> None:
    """Zero moments of one parameter."""
    for number, group in enumerate(optimizer.param_groups):
        for place, one in enumerate(group["params"]):
            if one is parameter:
                optimizer.init_state(group, parameter, number, place)
