"""Training the VQGAN: reconstruction, edges, what it looks like, an adversary, commitment, and care of the codebook.

B pictures, H W pixels, h w grid, D latent channels.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raymuse.config.training import VqganConfig
from raymuse.masking import CHOICE, uniforms
from raymuse.models.lpips import Lpips
from raymuse.models.network_files import save_network
from raymuse.models.vqgan import Vqgan, nearest_codes, to_unit
from raymuse.models.vqmodel import VqModel
from raymuse.training.adversary import Adversary
from raymuse.training.codebook import Codebook, perplexity
from raymuse.training.engine import Engine
from raymuse.training.fidelity import psnr, ssim
from raymuse.training.optimizers import learning_rate_scale
from raymuse.training.pictures import PictureStream
from raymuse.training.task import Batch, Loss, network_weights, sheet
from raymuse.training.vqgan_network import build_vqgan

SAMPLES = 16
ADVERSARY = "adversary/"  # before the names of its tensors in a checkpoint


class VqganLoss(Loss):
    """Reconstruction (L1 and L2), L1 of the edges, and commitment of the latents to their codes; summed over rows.

    And LPIPS and an adversary's term, where the config has them. Codes are moved by the codebook's averages, not by
    gradients; before `quantise` is set the latents pass unrounded.
    """

    def __init__(self, network: VqModel, config: VqganConfig, lpips: Lpips | None, adversary: Adversary | None) -> None:
        super().__init__(config.precision)
        self.network = network
        self.config = config
        self.lpips = lpips
        self.adversary = adversary  # no module: its parameters and their optimizer are its own
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
        metrics = {"mse": (squared * weights).sum().detach()}
        reconstruction = (
            self.config.l1_weight * error.abs().flatten(1).mean(dim=1)
            + self.config.l2_weight * squared
            + self.config.gradient_weight * _edges(error)
        )
        if self.lpips is not None and self.config.perceptual is not None:
            seen = self.lpips(drawn, pictures)
            metrics["lpips"] = (seen * weights).sum().detach()
            reconstruction = reconstruction + self.config.perceptual.weight * seen
        loss = reconstruction + self.config.commitment_weight * commitment
        if self.adversary is not None and self.adversary.active:
            last = self.network.decoder.conv_out.weight
            term, said = self.adversary.term(pictures, drawn, reconstruction, weights, last)
            metrics |= said
            loss = loss + term
        return (loss * weights).sum(), metrics

    def _quantised(self, latents: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes (B, D, h, w) with straight-through gradients, and each row's commitment loss (B,)."""
        with torch.autocast(latents.device.type, enabled=False):
            ids = nearest_codes(latents.detach(), self.network.quantize.embedding.weight)
        codes = self.network.quantize.embedding(ids).permute(0, 3, 1, 2)
        self.ids.append(ids[real].flatten())
        if not latents.requires_grad:  # a frozen encoder is committed to nothing
            return codes, latents.new_zeros(len(latents))
        commitment = (latents - codes.detach()).square().flatten(1).mean(dim=1)
        return latents + (codes - latents).detach(), commitment


class VqganTask:
    """VQGAN training on random square crops at several scales; with `train: decoder` the ids stay what they are.

    Raises:
        ConfigError: for a shape that there is not, or sizes that do not fit.
        UserError: for weights to start from, or to look with, that are missing or something else.
    """

    def __init__(self, config: VqganConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self.pictures = PictureStream(config.input, config.seed)
        self.network = build_vqgan(config).to(device)
        codes = self.network.quantize.embedding.weight
        codes.requires_grad_(False)
        self.codebook = Codebook(codes, decay=config.codebook_decay, revive_below=config.revive_below, seed=config.seed)
        self.codebook.started = config.start_from is not None
        seen, against = config.perceptual, config.adversarial
        lpips = None if seen is None else Lpips.load(seen.vgg, seen.lpips)
        self.adversary = None if against is None else Adversary(against, config.optimizer, config.seed, device)
        self.module = VqganLoss(self.network, config, lpips, self.adversary)
        self.module.quantise = self.codebook.started

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        step = positions[0] // self.config.batch_size
        if step % 2 == 0 and step >= (1 - self.config.whole_share) * self.config.steps:
            return self._whole(positions, weights)
        draws = uniforms(self.config.seed, CHOICE, positions, 1)[:, 0]
        sides = np.array(self.config.resolutions)[(draws * len(self.config.resolutions)).astype(np.int64)]
        pixels, _ = self.pictures.crops(positions, sides, self._crop(int(step)))
        return self._batch(pixels, weights)

    def _crop(self, step: int) -> int:
        """Side of the crops at a step: the curriculum's in equal shares of the steps, `crop` in the last."""
        sides = (*self.config.curriculum, self.config.crop)
        return sides[min(step * len(sides) // self.config.steps, len(sides) - 1)]

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
        care = self._codebook_care(step, latents, ids)
        if self.adversary is not None:
            care |= self.adversary.step(step, learning_rate_scale(step, self.config.steps, self.config.optimizer))
        return care

    def _codebook_care(self, step: int, latents: Tensor, ids: Tensor | None) -> dict[str, float]:
        if not self.codebook.started:
            if step + 1 >= self.config.warm_steps:
                self.codebook.start(latents, step)
                self.module.quantise = True
            return {}
        assert ids is not None
        if self.config.train == "decoder":
            return self.codebook.watch(ids)
        progress = step / self.config.steps
        revive = progress < self.config.revive_until
        return self.codebook.update(latents, ids, step, revive=revive, rate=self.config.rate_weight)

    def skipped(self) -> None:
        self.module.latents.clear()
        self.module.ids.clear()
        if self.adversary is not None:
            self.adversary.forget()

    def keys(self, positions: NDArray[np.int64]) -> list[str]:
        return self.pictures.keys(positions)

    def extra_state(self) -> dict[str, Tensor]:
        against = {} if self.adversary is None else self.adversary.state()
        return {**self.codebook.state(), **{f"{ADVERSARY}{name}": value for name, value in against.items()}}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.codebook.load(state)
        if self.adversary is not None:
            own = {name.removeprefix(ADVERSARY): value for name, value in state.items() if name.startswith(ADVERSARY)}
            self.adversary.load(own)
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
        again = vqgan.decode(ids)
        counts = torch.bincount(torch.from_numpy(ids).flatten(), minlength=vqgan.codes)
        return {
            "psnr": psnr(pixels, again),
            "ssim": ssim(pixels, again),
            "codebook_used": float((counts > 0).float().mean()),
            "codebook_perplexity": perplexity(counts),
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


def _edges(error: Tensor) -> Tensor:
    """Mean L1 of horizontal and vertical differences of the error, a row (B,): blurred edges cost what they lose."""
    across = (error[..., 1:] - error[..., :-1]).abs().flatten(1).mean(dim=1)
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().flatten(1).mean(dim=1)
    return across + down
