"""How exactly a frozen network counts: fp32, TF32 (fp32, products with 10 bits; CUDA alone), bf16 or fp16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def multiplies_bf16(device_type: str) -> bool:
    """Whether this machine's processor ("cpu") or GPU ("cuda") has products in bf16.

    Where there are none PyTorch takes them apart: on a CPU with AVX2 alone that is 70 times slower than fp32.
    """
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextmanager
def float32_products(kind: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Inside, CUDA multiplies and convolves fp32 tensors exactly ("ieee") or through TF32.

    PyTorch's own default is exact products and TF32 convolutions. The switches belong to the whole process, other
    threads included, and are put back at the end; without CUDA they change nothing.
    """
    cudnn: Any = torch.backends.cudnn
    switches = (torch.backends.cuda.matmul, cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = kind
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
