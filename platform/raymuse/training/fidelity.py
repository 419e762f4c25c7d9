"""How near a picture's copy is to it: PSNR and SSIM."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

RADIUS, SIGMA = 5, 1.5  # of SSIM's Gaussian window, pixels
C1, C2 = 0.01**2, 0.03**2


def psnr(pictures: NDArray[np.uint8], copies: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of uint8 (B, H, W, 3), of the mean squared error over all of them."""
    error = (copies.astype(np.float64) - pictures) / 255
    return -10 * math.log10(max(float((error**2).mean()), 1e-12))


def ssim(pictures: NDArray[np.uint8], copies: NDArray[np.uint8]) -> float:
    """Mean structural similarity of uint8 (B, H, W, 3), channel by channel; 1 where they are equal.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), section III.B-C:
    an 11 x 11 Gaussian window of sigma 1.5 (smaller where a picture is), where it lies whole inside the picture.
    """
    radius = min(RADIUS, (min(pictures.shape[1:3]) - 1) // 2)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    window = (-places.square() / (2 * SIGMA**2)).exp()
    window /= window.sum()
    return float(np.mean([_one(_planes(a), _planes(b), window) for a, b in zip(pictures, copies, strict=True)]))


def _one(x: Tensor, y: Tensor, window: Tensor) -> float:
    """SSIM of planes (3, 1, H, W)."""
    mean_x, mean_y, xx, yy, xy = (
        F.conv2d(F.conv2d(plane, window[None, None, :, None]), window[None, None, None])
        for plane in (x, y, x * x, y * y, x * y)
    )
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    similar = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return float((similar / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))).mean())


def _planes(picture: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(picture.astype(np.float64) / 255).permute(2, 0, 1)[:, None]
