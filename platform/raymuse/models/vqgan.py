"""The VQGAN: pictures to token ids and back.

Pictures are uint8 (B, H, W, 3); ids are int64 (B, h, w), row-major, with h = H / factor. Pixels enter the network
in [0, 1], not normalised (aMUSEd).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymuse.config.errors import UserError
from raymuse.models.network_files import load_weights, read_config
from raymuse.models.precision import DTYPES, Precision, float32_products
from raymuse.models.vqmodel import Encoder, VqModel, VqModelConfig
from raymuse.models.weights import require_safetensors


@dataclass(frozen=True)
class Vqgan:
    """A frozen VQGAN with its codebook.

    Args:
        network: the blocks of its encoder may be bf16; all the rest counts in fp32: the first
            convolution, since bf16 rounds the pixels themselves, what follows the blocks, and the nearest code.
        tf32: whether encoder and decoder may use TF32 on CUDA.
    """

    network: VqModel
    tf32: bool = False

    @classmethod
    def load(
        cls, folder_or_id: str, device: str = "cpu", precision: Precision = "fp32", variant: str | None = None
    ) -> "Vqgan":
        """Load from a local folder (itself, or its `vqvae/`) or a Hugging Face id; safetensors only."""
        root, subfolder = require_safetensors(folder_or_id, "vqvae", variant)
        folder = Path(root, subfolder or "")
        try:
            network = VqModel(VqModelConfig.from_diffusers(read_config(folder, "vqvae", variant)))
        except ValueError as error:
            raise UserError(f"{folder}/config.json: {error}") from error
        load_weights(network, folder, variant)
        network = network.eval().requires_grad_(False).to(device)
        if DTYPES[precision] != torch.float32:
            _lower_blocks(network.encoder, DTYPES[precision])
        return cls(network, precision == "tf32")

    @property
    def codes(self) -> int:
        return self.network.config.num_vq_embeddings

    @property
    def codebook(self) -> Tensor:
        """The codes, (C, D)."""
        return self.network.quantize.embedding.weight

    @property
    def factor(self) -> int:
        """Pixels a side of one id's cell."""
        return self.network.config.factor

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Pictures uint8 (B, H, W, 3) to ids (B, h, w)."""
        return self.encode_checked(pixels)[0]

    @torch.no_grad()
    def encode_checked(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids (B, h, w), and of which pictures (B,) all latents are finite: the ids of others mean nothing."""
        network = self.network
        with float32_products("tf32" if self.tf32 else "ieee"):
            seen = network.encoder(to_unit(pixels, network.device))
        with float32_products("ieee"):
            latents = network.quant_conv(seen)
            ids = nearest_codes(latents, network.quantize.embedding.weight)
        return ids.cpu().numpy(), latents.isfinite().flatten(1).all(dim=1).cpu().numpy()

    @torch.no_grad()
    def pooled(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What the encoder's middle block says, averaged over the grid (B, C), and the ids (B, h, w).

        C is the last of `block_out_channels`: 768 in aMUSEd's. Pictures uint8 (B, H, W, 3).
        """
        seen: list[Tensor] = []
        hook = self.network.encoder.mid_block.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output.float().mean(dim=(2, 3)))
        )
        try:
            ids = self.encode(pixels)
        finally:
            hook.remove()
        return seen[0].cpu().numpy(), ids

    def decode(self, ids: Tensor | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Ids (B, h, w) to pictures uint8 (B, H, W, 3)."""
        return to_bytes(self.decode_unit(ids))

    @torch.no_grad()
    def decode_unit(self, ids: Tensor | NDArray[np.int64]) -> Tensor:
        """Ids (B, h, w) to pictures (B, 3, H, W), floats clipped to [0, 1]."""
        return self.decode_codes(self.codebook[torch.as_tensor(ids, device=self.network.device)])

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w, D), or means of some, to pictures (B, 3, H, W), floats clipped to [0, 1]."""
        with float32_products("tf32" if self.tf32 else "ieee"):
            # Stays channels-last: a third faster.
            return self.network.draw(codes.permute(0, 3, 1, 2)).clamp(0, 1)


def _lower_blocks(encoder: Encoder, dtype: torch.dtype) -> None:
    """Store and run the blocks of an encoder in `dtype`; what comes before and after them keeps its own."""
    for blocks in (encoder.down_blocks, encoder.mid_block):
        blocks.to(dtype)
    encoder.conv_in.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))
    encoder.conv_norm_out.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code for latents (B, D, h, w): (B, h, w); distances in fp32."""
    flat = latents.float().permute(0, 2, 3, 1)
    return torch.cdist(flat.reshape(-1, flat.shape[-1]), codebook.float()).argmin(dim=1).view(flat.shape[:3])


def to_unit(
    pixels: NDArray[np.uint8], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 (B, H, W, 3) to floats in [0, 1] (B, 3, H, W)."""
    tensor = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device)
    return tensor.permute(0, 3, 1, 2).to(dtype) / 255


def to_bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """Floats (B, 3, H, W), clipped to [0, 1], to uint8 (B, H, W, 3)."""
    scaled = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
