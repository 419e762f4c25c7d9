"""Training the VQGAN: reconstruction, edges, commitment, and care of the codebook.

B pictures, H W pixels, h w grid, D latent channels.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raymuse.config.errors import ConfigError
from raymuse.config.training import VqganConfig
from raymuse.masking import CHOICE, uniforms
from raymuse.models.network_files import save_network
from raymuse.models.vqgan import Vqgan, nearest_codes, to_unit
from raymuse.models.vqmodel import VqModel, VqModelConfig
from raymuse.training.codebook import Codebook
from raymuse.training.engine import Engine
from raymuse.training.pictures import PictureStream
from raymuse.training.task import Batch, Loss, network_weights, sheet

SAMPLES = 16


class VqganLoss(Loss):
    """Reconstruction (L1 and L2), L1 of the edges, and commitment of the latents to their codes; summed over rows.

    Codes are moved by the codebook's averages, not by gradients; before `quantise` is set the latents pass unrounded.
    """

    def __init__(self, network: VqModel, config: VqganConfig) -> None:
        super().__init__(config.precision)
        self.network = network
        self.config = config
        self.quantise = False
        self.latents: list[Tensor] = []
        self.ids: list[Tensor] = []

    def sums(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pictures, weights = batch["pixels"], batch["weights"]
        latents = self.network.latents(pictures).float()
        real = weights > 0  # padding must not move the codes, or the world size would
        codes, commitment = latents, latents.new_zeros(len(latents))
        if self.quantise:
            codes, commitment = self._quantised(latents, real)
        self.latents.append(latents.detach()[real].permute(0, 2, 3, 1).reshape(-1, latents.shape[1]))
        drawn = self.network.draw(codes).float()
        error = drawn - pictures
        squared = error.square().flatten(1).mean(dim=1)
        loss = (
            self.config.l1_weight * error.abs().flatten(1).mean(dim=1)
            + self.config.l2_weight * squared
            + self.config.gradient_weight * _edges(error)
            + self.config.commitment_weight * commitment
        )
        return (loss * weights).sum(), {"mse": (squared * weights).sum().detach()}

    def _quantised(self, latents: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes (B, D, h, w) with straight-through gradients, and each row's commitment loss (B,)."""
        with torch.autocast(latents.device.type, enabled=False):
            ids = nearest_codes(latents.detach(), self.network.quantize.embedding.weight)
        codes = self.network.quantize.embedding(ids).permute(0, 3, 1, 2)
        self.ids.append(ids[real].flatten())
        commitment = (latents - codes.detach()).square().flatten(1).mean(dim=1)
        return latents + (codes - latents).detach(), commitment


class VqganTask:
    """VQGAN training on random square crops at several scales."""

    def __init__(self, config: VqganConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self.pictures = PictureStream(config.input, config.seed)
        self.network = build_vqgan(config)
        codes = self.network.quantize.embedding.weight
        codes.requires_grad_(False)
        self.codebook = Codebook(codes, decay=config.codebook_decay, revive_below=config.revive_below, seed=config.seed)
        self.module = VqganLoss(self.network, config)

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        step = positions[0] // self.config.batch_size
        if step % 2 == 0 and step >= (1 - self.config.whole_share) * self.config.steps:
            return self._whole(positions, weights)
        draws = uniforms(self.config.seed, CHOICE, positions, 1)[:, 0]
        sides = np.array(self.config.resolutions)[(draws * len(self.config.resolutions)).astype(np.int64)]
        pixels, _ = self.pictures.crops(positions, sides, self.config.crop)
        return self._batch(pixels, weights)

    def _whole(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        """Every n-th position as a whole square of the largest resolution, n being how many crops one holds.

        Group norm sees all of what it normalises: a network that saw crops alone tints larger pictures at their edges.
        """
        side = max(self.config.resolutions)
        counted = positions % (side // self.config.crop) ** 2 == 0
        weights = weights * counted.astype(np.float32)
        counted[0] = True  # a rank with no such position holds one row of weight 0
        pixels, _ = self.pictures.crops(positions[counted], np.full(int(counted.sum()), side), side)
        return self._batch(pixels, weights[counted])

    def _batch(self, pixels: NDArray[np.uint8], weights: NDArray[np.float32]) -> Batch:
        return {"pixels": to_unit(pixels, self.device), "weights": torch.from_numpy(weights).to(self.device)}

    def count(self, batch: Batch) -> float:
        return float(batch["weights"].sum())

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        latents = torch.cat(self.module.latents)
        ids = torch.cat(self.module.ids) if self.module.ids else None
        self.module.latents.clear()
        self.module.ids.clear()
        if not self.codebook.started:
            if step + 1 >= self.config.warm_steps:
                self.codebook.start(latents, step)
                self.module.quantise = True
            return {}
        assert ids is not None
        progress = step / self.config.steps
        revive = progress < self.config.revive_until
        return self.codebook.update(latents, ids, step, revive=revive, rate=self.config.rate_weight)

    def skipped(self) -> None:
        self.module.latents.clear()
        self.module.ids.clear()

    def keys(self, positions: NDArray[np.int64]) -> list[str]:
        return self.pictures.keys(positions)

    def extra_state(self) -> dict[str, Tensor]:
        return self.codebook.state()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.codebook.load(state)
        self.module.quantise = self.codebook.started

    def sample(self, weights: dict[str, Tensor]) -> Image.Image:
        """Pictures over their round trips, at the largest resolution."""
        vqgan = Vqgan(self._network_with(weights))
        pixels = self._examples()
        return sheet([pixels, vqgan.decode(vqgan.encode(pixels))])

    def save(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        network = self._network_with(weights)
        save_network(network, network.config.to_diffusers(), folder, network.state_dict())
        vqgan = Vqgan(network)
        pixels = self._examples(256)
        ids = vqgan.encode(pixels)
        error = (vqgan.decode(ids).astype(np.float64) - pixels) / 255
        return {
            "psnr": -10 * math.log10(float((error**2).mean())),
            "codebook_used": float(len(np.unique(ids)) / vqgan.codes),
        }

    def _examples(self, count: int = SAMPLES) -> NDArray[np.uint8]:
        side = max(self.config.resolutions)
        positions = np.arange(min(count, len(self.pictures.index)))
        return self.pictures.crops(positions, np.full(len(positions), side), side)[0]

    def _network_with(self, weights: dict[str, Tensor]) -> VqModel:
        network = copy.deepcopy(self.network).eval()
        state = {**network.state_dict(), **network_weights(weights)}
        network.load_state_dict(state, strict=True)
        return network


def build_vqgan(config: VqganConfig) -> VqModel:
    """A fresh `VqModel` of the recipe's shape, without attention, codes looked up by id.

    Raises:
        ConfigError: for fields that there are not, or sizes that do not fit.
    """
    torch.manual_seed(config.seed)
    try:
        network = VqModel(VqModelConfig(**{"sample_size": config.crop, **config.model}))
    except (TypeError, ValueError) as error:
        raise ConfigError(config.stage, [f"model: {error}"]) from error
    if config.rate_weight > 0 and network.quant_conv.out_channels < 2:
        raise ConfigError(config.stage, [f"rate_weight={config.rate_weight} needs latent_channels of 2 or more"])
    if problems := _misfits(config, network.config.factor):
        raise ConfigError(config.stage, problems)
    if config.rate_weight > 0:
        _keep_place_for_prices(network)
    return network.train()


def _keep_place_for_prices(network: VqModel) -> None:
    """Hold the last of the latents' channels at 0, and out of the decoder: there the codes carry their prices.

    So the network stays a plain VQModel of diffusers, whose nearest code is the entropy-constrained one for everybody.
    """
    to_codes, from_codes = network.quant_conv, network.post_quant_conv
    assert to_codes.bias is not None
    for parameter, axis in ((to_codes.weight, 0), (to_codes.bias, 0), (from_codes.weight, 1)):
        kept = torch.ones_like(parameter)
        kept.select(axis, -1).zero_()
        parameter.data.mul_(kept)
        parameter.register_hook(lambda gradient, kept=kept: gradient * kept.to(gradient.device))  # type: ignore[no-untyped-call]


def _misfits(config: VqganConfig, factor: int) -> list[str]:
    """What of the pictures' sizes cannot work with a VQGAN of this factor."""
    sides = {f"resolutions={side}": side for side in config.resolutions}
    problems = [
        f"{name} is no multiple of the VQGAN's factor {factor}"
        for name, side in {f"crop={config.crop}": config.crop, **sides}.items()
        if side % factor
    ]
    problems += [f"{name} is below crop={config.crop}" for name, side in sides.items() if side < config.crop]
    crops = (max(config.resolutions) // config.crop) ** 2
    if config.whole_share > 0 and config.batch_size < crops:
        problems.append(f"whole_share={config.whole_share} takes one picture in {crops}: batch_size is below that")
    return problems


def _edges(error: Tensor) -> Tensor:
    """Mean L1 of horizontal and vertical differences of the error, a row (B,): blurred edges cost what they lose."""
    across = (error[..., 1:] - error[..., :-1]).abs().flatten(1).mean(dim=1)
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().flatten(1).mean(dim=1)
    return across + down
