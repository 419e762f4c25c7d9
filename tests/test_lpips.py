"""LPIPS beside the `lpips` package 0.1.4 with the same weights, and files that are something else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from raymuse.config.errors import UserError
from raymuse.models.lpips import Lpips
from test_fidelity import pictures

# LPIPS(net="vgg", lpips=True and False)(pictures, noisy, normalize=True), of tiny.vgg_state and tiny.linear_state
LINEAR = (0.07718174159526825, 0.0685407891869545)
UNWEIGHTED = (0.15049582719802856, 0.13478614389896393)
SLOPE, SLOPES = -0.0009528123191557825, 3.5701637268066406  # of the sum of LINEAR: at [0, 1, 3, 4]; all, absolute


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return print, ("run",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(tiny.vgg_state() | {"classifier.0.bias": torch.zeros(4096)}, folder / "vgg.pth")
    save_file(tiny.vgg_state(), folder / "vgg.safetensors")
    torch.save(tiny.linear_state(), folder / "linear.pth")
    return folder


def tensors() -> tuple[Tensor, Tensor]:
    smooth, noisy = (torch.from_numpy(batch).permute(0, 3, 1, 2) / 255 for batch in pictures())
    return smooth, noisy


def test_distances_and_slopes_are_those_of_the_lpips_package(files: Path) -> None:
    smooth, noisy = tensors()
    network = Lpips.load(str(files / "vgg.pth"), str(files / "linear.pth"))
    distances = network(smooth.requires_grad_(), noisy)
    assert distances.tolist() == pytest.approx(LINEAR, rel=1e-5)
    distances.sum().backward()
    assert smooth.grad is not None
    assert float(smooth.grad[0, 1, 3, 4]) == pytest.approx(SLOPE, rel=1e-3)
    assert float(smooth.grad.abs().sum()) == pytest.approx(SLOPES, rel=1e-4)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_without_linear_layers_every_feature_counts_the_same(files: Path) -> None:
    smooth, noisy = tensors()
    network = Lpips.load(str(files / "vgg.safetensors"))
    assert network(smooth, noisy).tolist() == pytest.approx(UNWEIGHTED, rel=1e-5)


def test_equal_pictures_and_dead_features_have_a_finite_slope() -> None:
    network = Lpips()
    with torch.no_grad():
        for parameter in network.features.parameters():
            parameter.zero_()
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance = network(flat, torch.ones(1, 3, 16, 16))
    distance.sum().backward()
    assert flat.grad is not None
    assert float(distance) == 0
    assert torch.count_nonzero(flat.grad) == 0


def damaged(folder: Path, kind: str) -> tuple[str, str]:
    """(file of the VGG, file of the linear layers) of which one is wrong."""
    vgg, linear, bad = folder / "vgg.pth", folder / "linear.pth", folder / f"bad-{kind}.pth"
    if kind == "missing":
        return str(folder / "nowhere.pth"), str(linear)
    if kind == "code":
        torch.save({"features.0.weight": Code()}, bad)
    elif kind == "cut":
        bad.write_bytes(linear.read_bytes()[:300])
    elif kind == "list":
        torch.save([1, 2], bad)
    elif kind == "narrow":
        torch.save({**tiny.vgg_state(), "features.2.weight": torch.zeros(64, 3, 3, 3)}, bad)
    elif kind == "infinite":
        torch.save({**tiny.vgg_state(), "features.28.bias": torch.full((512,), float("inf"))}, bad)
    elif kind == "swapped":
        return str(linear), str(vgg)
    else:
        torch.save({name: value for name, value in tiny.linear_state().items() if "lin3" not in name}, bad)
        return str(vgg), str(bad)
    return str(bad), str(linear)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", r"nowhere.pth is no file on this machine. Weights of a perceptual loss are not downloaded"),
        ("code", r"cannot be read as weights .*Copy it again, or give .safetensors"),
        ("cut", r"cannot be read as weights"),
        ("list", r"holds a list, no state dict"),
        ("narrow", r"features.2.weight is \[64, 3, 3, 3\], not \[64, 64, 3, 3\]: it is not torchvision's vgg16"),
        ("infinite", r"features.28.bias holds numbers that are not finite"),
        ("swapped", r"linear.pth has no features.0.weight: it is not torchvision's vgg16"),
        ("part", r"has no lin3.model.1.weight: it is not LPIPS' linear layers for VGG16"),
    ],
)
def test_a_file_that_is_something_else_is_said(
    kind: str, said: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=said):
        Lpips.load(*damaged(files, kind))
    assert "run" not in capsys.readouterr().out
