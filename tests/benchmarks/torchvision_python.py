"""torchvision's Python part, where its compiled part does not load beside the torch that is installed.

It registers shapes for operators of the compiled part, and cannot be imported where those are unknown. Here they are
declared without being there: the peers take only picture transforms from it, which are Python and Pillow.
"""

import sys

import torch


def import_torchvision() -> None:
    """Import torchvision, whole where it can be."""
    try:
        import torchvision
    except (RuntimeError, OSError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "DEF")
        declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(declared)
        import torchvision  # noqa: F401


_kept: list[torch.library.Library] = []
