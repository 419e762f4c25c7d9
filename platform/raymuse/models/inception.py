"""FID's Inception: features (2048) and class logits (1008) of pictures, as the field's tools compute them.

The network is TensorFlow's of 2015-12-05 (Szegedy et al., arXiv 1512.00567), in torchvision's names, with the three
poolings by which that graph differs. Pictures are resized as TensorFlow 1 does it (bilinear, no antialiasing, corners
not aligned) and scaled to [-1, 1): torch-fidelity's protocol, which is the original FID's.

B pictures, H W pixels, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from raymuse.models.precision import float32_products
from raymuse.models.weight_file import file_sha256, read_weights, require_file, take

SIDE = 299
FEATURES, CLASSES = 2048, 1008
PREPROCESSING = "TensorFlow 1 bilinear to 299, (x - 128) / 128"
AT_ONCE = 16  # pictures; the first layers hold 6 MB a picture
WHAT = "FID's Inception of 2015-12-05"
GET_IT = (
    "Inception's weights are not downloaded: fetch pt_inception-2015-12-05-6726825d.pth (the releases of "
    "github.com/mseitzer/pytorch-fid; torch-fidelity's weights-inception-2015-12-05-6726825d.pth is the same file), "
    "and name it with inception=FILE."
)

Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel]  # name, channels out, kernel
Branch = tuple[tuple[Layer, ...], ...]  # steps in a row; layers of one step read the same, and are joined


FLAT, TALL = (1, 7), (7, 1)


@dataclass(frozen=True)
class Seen:
    """What Inception says of B pictures: float32.

    Attributes:
        features: of the last pooling (B, 2048).
        logits: of the classes, without the bias, as the Inception score's code leaves it away (B, 1008).
    """

    features: NDArray[np.float32]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Inception:
    """The frozen network; see `load`."""

    network: "Network"

    @classmethod
    def load(cls, address: str, device: str = "cpu") -> "Inception":
        """From a file: pytorch-fid's or torch-fidelity's state dict (only tensors are read), or .safetensors of it.

        Raises:
            UserError: for a file that is missing, damaged, or holds another network.
        """
        state, network = read_weights(require_file(address, GET_IT)), Network()
        with torch.no_grad():
            for name, own in network.state_dict().items():
                if not name.endswith("num_batches_tracked"):
                    own.copy_(take(state, name, tuple(own.shape), address, WHAT))
        return cls(network.eval().requires_grad_(False).to(device))

    @torch.no_grad()
    def see(self, pixels: NDArray[np.uint8]) -> Seen:
        """Features and logits of pictures uint8 (B, H, W, 3)."""
        weight = self.network.fc.weight
        found = []
        for start in range(0, len(pixels), AT_ONCE):
            batch = torch.from_numpy(np.require(pixels[start : start + AT_ONCE], requirements=["C", "W"]))
            floats = batch.to(weight.device).permute(0, 3, 1, 2).float()
            with float32_products("ieee"):
                found.append(self.network((resize_like_tensorflow(floats, SIDE) - 128) / 128))
        features = torch.cat(found)
        with float32_products("ieee"):
            logits = features @ weight.T
        return Seen(features.cpu().numpy(), logits.cpu().numpy())


def inception_sha256(address: str) -> str:
    """sha256 (hex) of the file. Raises UserError where it is missing, saying where to get it."""
    return file_sha256(require_file(address, GET_IT))


def resize_like_tensorflow(pixels: Tensor, side: int) -> Tensor:
    """Floats (B, C, H, W) to (B, C, side, side) as `tf.image.resize_bilinear` of TensorFlow 1 did by default.

    A pixel of the result lies at its index times H / side (its corner, not its middle), between two of the source's.
    """
    for dimension in (-1, -2):
        length = pixels.shape[dimension]
        scale = torch.tensor(length / side, dtype=pixels.dtype)
        places = torch.arange(side, dtype=pixels.dtype) * scale
        low = places.long()
        share = (places - low).to(pixels.device)
        low, high = (index.to(pixels.device) for index in (low, (low + 1).clamp(max=length - 1)))
        left, right = pixels.index_select(dimension, low), pixels.index_select(dimension, high)
        pixels = left + (right - left) * (share if dimension == -1 else share[:, None])
    return pixels


class Network(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1) to features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            _block_a(*widths) for widths in ((192, 32), (256, 64), (288, 64))
        )
        self.Mixed_6a = Halving(288, _row(("branch3x3", 384, 3)), _doubled())
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_block_c(width) for width in (128, 160, 160, 192))
        seven = (("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, FLAT), ("branch7x7x3_3", 192, TALL))
        self.Mixed_7a = Halving(
            768,
            _row(("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)),
            _row(*seven, ("branch7x7x3_4", 192, 3)),
        )
        self.Mixed_7b = _block_e(1280, average=True)
        self.Mixed_7c = _block_e(2048, average=False)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features: Tensor = x.mean(dim=(2, 3))
        return features


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; padded so that stride 1 keeps the size, unless `padding` says otherwise."""

    def __init__(self, before: int, width: int, kernel: Kernel, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padded = (sides[0] // 2, sides[1] // 2) if padding is None else (padding, padding)
        self.conv = nn.Conv2d(before, width, sides, stride=stride, padding=padded, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, joined by channel; the last one pools first (3 x 3) and is `branch_pool`.

    The average leaves padding out of its count, as TensorFlow's does; the last block takes the maximum, as that graph
    does.
    """

    def __init__(self, before: int, pool_width: int, *branches: Branch, average: bool = True) -> None:
        super().__init__()
        self.branches, self.average = branches, average
        for branch in branches:
            _add_layers(self, before, branch)
        self.branch_pool = Conv(before, pool_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.average:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*(_follow(self, branch, x) for branch in self.branches), self.branch_pool(pooled)], dim=1)


class Halving(nn.Module):
    """Branches that end with stride 2, and a pooling (the maximum) of stride 2."""

    def __init__(self, before: int, *branches: Branch) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            _add_layers(self, before, branch, halving=True)

    def forward(self, x: Tensor) -> Tensor:
        found = [_follow(self, branch, x) for branch in self.branches]
        return torch.cat([*found, F.max_pool2d(x, 3, stride=2)], dim=1)


def _add_layers(block: nn.Module, before: int, branch: Branch, halving: bool = False) -> None:
    for place, step in enumerate(branch, 1):
        last = halving and place == len(branch)
        for name, width, kernel in step:
            block.add_module(name, Conv(before, width, kernel, 2, 0) if last else Conv(before, width, kernel))
        before = sum(width for _, width, _ in step)


def _follow(block: nn.Module, branch: Branch, x: Tensor) -> Tensor:
    for step in branch:
        x = torch.cat([block.get_submodule(name)(x) for name, _, _ in step], dim=1)
    return x


def _row(*layers: Layer) -> Branch:
    return tuple((layer,) for layer in layers)


def _doubled() -> Branch:
    return _row(("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))


def _block_a(before: int, pool_width: int) -> Mixed:
    five = _row(("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5))
    return Mixed(before, pool_width, _row(("branch1x1", 64, 1)), five, _doubled())


def _block_c(width: int) -> Mixed:
    return Mixed(
        768,
        192,
        _row(("branch1x1", 192, 1)),
        _row(("branch7x7_1", width, 1), ("branch7x7_2", width, FLAT), ("branch7x7_3", 192, TALL)),
        _row(
            *(("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, TALL), ("branch7x7dbl_3", width, FLAT)),
            *(("branch7x7dbl_4", width, TALL), ("branch7x7dbl_5", 192, FLAT)),
        ),
    )


def _block_e(before: int, *, average: bool) -> Mixed:
    forks = [((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))) for name in ("branch3x3_2", "branch3x3dbl_3")]
    return Mixed(
        before,
        192,
        _row(("branch1x1", 320, 1)),
        (*_row(("branch3x3_1", 384, 1)), forks[0]),
        (*_row(("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)), forks[1]),
        average=average,
    )
