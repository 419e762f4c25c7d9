"""What the hardware can do: a product of matrices as large as it likes, timed."""

import time

import torch

MEASURE_SECONDS = 0.2
SIDES = {"cpu": 1024, "cuda": 8192}  # of the square matrices


def measured_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """The best of some products of two matrices, in operations a second; a multiplication and an addition are two."""
    side = SIDES[device.type]
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    best, until = 0.0, time.perf_counter() + MEASURE_SECONDS
    while best == 0 or time.perf_counter() < until:
        began = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for a GPU
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best
