"""LPIPS: how different two pictures look, by the features of a VGG16 (Zhang et al., arXiv 1801.03924, section 3).

The weights come from local files: torchvision's VGG16, and LPIPS' linear layers.

B pictures, H W pixels, C channels.
"""

import torch
from torch import Tensor, nn

from raymuse.models.weight_file import file_sha256, read_weights, require_file, take

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LEAST_SIDE = 16  # four poolings
NOT_DOWNLOADED = "Weights of a perceptual loss are not downloaded: put them there."
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


class Lpips(nn.Module):
    """`lpips(pictures, others)`: distances (B,) of pictures (B, 3, H, W) in [0, 1], not negative.

    The features after the last ReLU before each pooling have length 1 at every place; their squared differences are
    weighted by channel and averaged over the places, and the five averages are added. Without linear layers every
    channel's weight is 1, which is twice the cosine distance.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()  # numbered as torchvision's
        self.taps: list[int] = []
        before = 3
        for widths in WIDTHS:
            if self.taps:
                self.features.append(nn.MaxPool2d(2))
            for width in widths:
                self.features.append(nn.Conv2d(before, width, 3, padding=1)).append(nn.ReLU())
                before = width
            self.taps.append(len(self.features) - 1)
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(widths[-1])) for widths in WIDTHS)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, vgg: str, linear: str | None = None) -> "Lpips":
        """From files, .safetensors or torch.save's (of which only tensors are read).

        Args:
            vgg: the state dict of torchvision's `vgg16`; its classifier may be missing.
            linear: LPIPS' `weights/v0.1/vgg.pth`: `lin0.model.1.weight` to `lin4.model.1.weight`, (1, C, 1, 1).

        Raises:
            UserError: for a file that is missing, damaged, or holds something else.
        """
        network = cls()
        with torch.no_grad():
            trunk = read_weights(require_file(vgg, NOT_DOWNLOADED))
            for name, parameter in network.features.named_parameters():
                parameter.copy_(take(trunk, f"features.{name}", tuple(parameter.shape), vgg, "torchvision's vgg16"))
            layers = {} if linear is None else read_weights(require_file(linear, NOT_DOWNLOADED))
            for number, weight in enumerate(network.weights if linear is not None else ()):
                name, shape = f"lin{number}.model.1.weight", (1, len(weight), 1, 1)
                weight.copy_(take(layers, name, shape, str(linear), "LPIPS' linear layers for VGG16").flatten())
        return network

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        distance = pictures.new_zeros(len(pictures))
        ours, theirs = ((x - self.mean) / self.deviation for x in (pictures, others))
        for number, layer in enumerate(self.features):
            ours, theirs = layer(ours), layer(theirs)
            if number in self.taps:
                weight = self.weights[self.taps.index(number)][:, None, None]
                squared = (_unit(ours) - _unit(theirs)).square()
                distance = distance + (weight * squared).sum(dim=1).mean(dim=(1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w) of length 1 at every place, fp32; 0 stays 0."""
    features = features.float()
    # Inside the root, since its slope at 0 has no bound.
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()


def files_sha256(*addresses: str | None) -> str:
    """sha256 (hex) of the files that there are, one after another. Raises UserError for one that is missing."""
    return " ".join(file_sha256(require_file(address, NOT_DOWNLOADED)) for address in addresses if address is not None)
