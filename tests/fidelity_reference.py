"""What torch-fidelity says: `python tests/fidelity_reference.py > tests/fidelity_reference.json`.

Run it where torch-fidelity 0.4.0 is installed, which is not among raymuse's dependencies (its torchvision does not load
beside the CPU build of torch). Only `main` needs it: the tests take their inputs from here.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raymuse.models.inception import Network


def main() -> None:
    """Print the reference as JSON."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    drawn, real, logits = (torch.from_numpy(x) for x in features())
    statistics = [fid_features_to_statistics(x.double()) for x in (drawn, real)]
    said = {"fid": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]}
    for size, one, other in ((300, drawn[:300], real), (100, drawn, real)):
        found = kid_features_to_metric(
            one.double(), other.double(), kid_subsets=100, kid_subset_size=size, verbose=False, rng_seed=2020
        )
        said |= {f"kid_{size}": found["kernel_inception_distance_mean"]}
        said |= {f"kid_std_{size}": found["kernel_inception_distance_std"]}
    said |= prc_features_to_metric(
        drawn, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    said |= isc_features_to_metric(logits)
    print(json.dumps({**said, "network": _network()}, indent=1))


def _network() -> dict[str, list[float]]:
    """Features and logits of random pictures of two sizes, by random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    said: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(inception_state(), Path(folder, "weights.pth"))
        names = ["2048", "logits_unbiased"]
        seen = FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=f"{folder}/weights.pth")
        for side, pixels in pictures().items():
            features, logits = seen(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            said[f"features_{side}"] = features[0, ::128].tolist()
            said[f"features_mean_{side}"] = features.mean(dim=1).tolist()
            said[f"logits_{side}"] = logits[0, ::63].tolist()
    return said


def inception_state() -> dict[str, torch.Tensor]:
    """Weights of FID's Inception, random but always the same, that keep its activations of one size."""
    rng = np.random.default_rng(0)
    state: dict[str, torch.Tensor] = {}
    for name, value in Network().state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = value
            continue
        drawn = rng.standard_normal(tuple(value.shape), dtype=np.float32)
        if name.endswith(("conv.weight", "fc.weight")):
            drawn *= np.float32((2 / np.prod(value.shape[1:])) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            drawn = 1 + np.float32(0.1) * np.abs(drawn)
        else:
            drawn *= np.float32(0.1)
        state[name] = torch.from_numpy(drawn)
    return state


def features() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Features (400, 32) of drawn and (300, 32) of real pictures, that overlap in part, and class logits (400, 20)."""
    rng = np.random.default_rng(1)
    real = rng.gamma(0.7, 1.0, (300, 32))
    drawn = rng.gamma(0.9, 0.8, (400, 32)) + 0.2 * rng.standard_normal((400, 1))
    logits = 3 * rng.standard_normal((400, 20))
    return drawn.astype(np.float32), real.astype(np.float32), logits.astype(np.float32)


def pictures() -> dict[int, NDArray[np.uint8]]:
    """Two pictures (2, side, side, 3) each, smaller than what Inception looks at, and larger."""
    rng = np.random.default_rng(2)
    return {side: rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8) for side in (64, 320)}


if __name__ == "__main__":
    main()
