"""PSNR and SSIM beside scikit-image 0.26's figures for the same pictures."""

import numpy as np
import pytest
from numpy.typing import NDArray

from raymuse.training.fidelity import psnr, ssim

PSNR = 22.480364420749996  # metrics.peak_signal_noise_ratio
# metrics.structural_similarity(channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
SSIM = (0.8896894711318235, 0.9019459086239143)
SSIM_INVERTED = (-0.7754108093200526, -0.6955394584058118)


def pictures() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two pictures of 24 x 30 of flat patches, and the same with noise."""
    draw = np.random.default_rng(0)
    smooth = draw.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8).repeat(4, axis=1).repeat(6, axis=2)
    return smooth, np.clip(smooth + draw.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def test_both_are_those_of_scikit_image() -> None:
    smooth, noisy = pictures()
    assert psnr(smooth, noisy) == pytest.approx(PSNR, abs=1e-9)
    assert [ssim(smooth[n : n + 1], noisy[n : n + 1]) for n in range(2)] == pytest.approx(SSIM, abs=1e-9)
    assert ssim(smooth, noisy) == pytest.approx(np.mean(SSIM), abs=1e-9)
    assert ssim(smooth, 255 - smooth) == pytest.approx(np.mean(SSIM_INVERTED), abs=1e-9)


def test_a_true_copy_has_the_best_of_both() -> None:
    smooth, noisy = pictures()
    assert ssim(noisy, noisy) == pytest.approx(1.0)
    assert psnr(smooth, smooth) == pytest.approx(120.0)
    tiny = smooth[:, :8, :8]
    assert ssim(tiny, tiny) == pytest.approx(1.0)
    assert ssim(tiny, 255 - tiny) < 0
