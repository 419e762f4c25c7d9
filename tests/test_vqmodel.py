"""The VQGAN's network beside diffusers' `VQModel`: the same weights from a seed, the same numbers, the same folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel

from raymuse.config.errors import UserError
from raymuse.models.network_files import save_network
from raymuse.models.vqgan import Vqgan
from raymuse.models.vqmodel import VqModel, VqModelConfig

SHAPES: dict[str, dict[str, Any]] = {
    "f4": {"block_out_channels": (8, 8, 16), "layers_per_block": 1, "mid_block_add_attention": False},
    "f8 with attention": {"block_out_channels": (8, 16, 16, 24), "layers_per_block": 2},
    "f16": {"block_out_channels": (8, 16, 16, 32, 48), "layers_per_block": 2, "mid_block_add_attention": False},
    "narrow codes": {"block_out_channels": (8, 8), "vq_embed_dim": 3, "mid_block_add_attention": False},
}
SHARED = {"latent_channels": 6, "num_vq_embeddings": 20, "norm_num_groups": 4, "lookup_from_codebook": True}


def shape(name: str) -> dict[str, Any]:
    blocks = len(SHAPES[name]["block_out_channels"])
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    return {**SHARED, **SHAPES[name], **kinds}


def both(name: str) -> tuple[VqModel, VQModel]:
    """The two networks, each made from the same seed."""
    torch.manual_seed(0)
    ours = VqModel(VqModelConfig.from_diffusers(shape(name)))
    torch.manual_seed(0)
    return ours.eval(), VQModel(**shape(name)).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_weights_and_numbers_are_those_of_diffusers(name: str) -> None:
    ours, theirs = both(name)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    side = 4 * ours.config.factor
    pixels = torch.rand(2, 3, side, side + ours.config.factor)
    with torch.no_grad():
        latents = ours.latents(pixels)
        assert torch.equal(latents, theirs.encode(pixels).latents)
        ids = torch.randint(20, (2, 4, 5))
        drawn = theirs.decode(ids, force_not_quantize=True, shape=(2, 4, 5, latents.shape[1])).sample
        codes = ours.quantize.embedding(ids).permute(0, 3, 1, 2).contiguous()
        assert torch.equal(ours.draw(codes), drawn)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_diffusers(name: str) -> None:
    ours, theirs = (network.train() for network in both(name))
    pixels = torch.rand(2, 3, 2 * ours.config.factor, 2 * ours.config.factor)
    ours.draw(ours.latents(pixels)).square().mean().backward()
    theirs.decoder(theirs.post_quant_conv(theirs.encode(pixels).latents)).square().mean().backward()
    wanted = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if key != "quantize.embedding.weight":
            torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_folders_open_on_either_side(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name)
    save_network(ours, ours.config.to_diffusers(), tmp_path / "ours", ours.state_dict())
    again = VQModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert {key: again.config[key] for key in SHARED} == SHARED
    assert all(torch.equal(again.state_dict()[key], value) for key, value in ours.state_dict().items())
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    loaded = Vqgan.load(str(tmp_path / "theirs")).network
    assert loaded.config == ours.config
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in theirs.state_dict().items())


def test_a_config_that_leaves_fields_out_means_diffusers_defaults(tmp_path: Path) -> None:
    VQModel().save_pretrained(tmp_path)
    assert VqModelConfig.from_diffusers({}) == Vqgan.load(str(tmp_path)).network.config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_type": "spatial"}, "norm_type 'spatial': only silu and group are built"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types must be DownEncoderBlock2D, 3 times"),
        ({"block_out_channels": (8, 10, 16)}, r"block_out_channels \[10\] are no multiples of norm_num_groups=4"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings: all above 0"),
        ({"depth": 3}, "unknown keys depth in a VQModel config"),
    ],
)
def test_a_network_that_is_not_built_here_is_said_by_its_file(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    ours, _ = both("f4")
    save_network(ours, {**ours.config.to_diffusers(), **changes}, tmp_path, ours.state_dict())
    with pytest.raises(UserError, match=f"config.json: .*{said}"):
        Vqgan.load(str(tmp_path))
