"""Which kernel computes attention. By default PyTorch picks the quickest that fits.

All give the same but for rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from raymuse.config.drawing import DrawPrecision
from raymuse.config.errors import UserError
from raymuse.models.precision import DTYPES

Attention = Literal["auto", "flash", "memory-efficient", "math"]

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@contextmanager
def attention_by(kernel: Attention) -> Iterator[None]:
    """Inside, attention is computed by this kernel."""
    if kernel == "auto":
        yield
        return
    with sdpa_kernel(_KERNELS[kernel]):
        yield


def require_kernel(kernel: Attention, device: str, precision: DrawPrecision) -> None:
    """Raise UserError where there is no such kernel, or it cannot compute in the precision on the device."""
    if kernel not in get_args(Attention):
        raise UserError(f"attention={kernel!r}: there are {', '.join(get_args(Attention))}")
    sample = torch.ones(1, 1, 16, 16, device=device, dtype=DTYPES[precision])
    try:
        with attention_by(kernel):
            F.scaled_dot_product_attention(sample, sample, sample)
    except RuntimeError as error:
        raise UserError(
            f"attention={kernel!r} cannot be computed in {precision} on {device}; leave it at auto."
        ) from error
