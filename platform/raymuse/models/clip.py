"""Both towers of a CLIP, for scores: how well pictures and captions agree.

B pictures or captions, P projected width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from raymuse.models.vqgan import to_unit
from raymuse.models.weights import require_safetensors, without_bars

if TYPE_CHECKING:
    from transformers import CLIPModel  # seconds to import, and many import this module

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: NDArray[np.uint8], side: int, device: str | torch.device = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) to CLIP's floats (B, 3, side, side): bicubic resize, then mean and deviation."""
    unit = to_unit(pixels, device)
    if unit.shape[-1] != side:
        unit = F.interpolate(unit, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (unit - mean) / std


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP with its tokenizer."""

    network: "CLIPModel"
    tokenizer: Any

    @classmethod
    def load(cls, folder_or_id: str) -> "Clip":
        """From a folder with `clip/` and `tokenizer/`, a plain CLIP folder, or a Hugging Face id; safetensors only."""
        from transformers import AutoTokenizer, CLIPModel

        without_bars()
        root, subfolder = require_safetensors(folder_or_id, "clip")
        network = CLIPModel.from_pretrained(root, subfolder=subfolder or "", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(root, subfolder="tokenizer" if _beside(root) else "")
        return cls(network.eval().requires_grad_(False), tokenizer)

    @torch.no_grad()
    def images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Unit vectors (B, P) of pictures uint8 (B, H, W, 3)."""
        side = int(self.network.config.vision_config.image_size)
        seen = self.network.vision_model(pixel_values=normalise(pixels, side)).pooler_output
        return F.normalize(self.network.visual_projection(seen), dim=-1)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (B, P) of captions."""
        ids = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=int(self.network.config.text_config.max_position_embeddings),
            return_tensors="pt",
        ).input_ids
        read = self.network.text_model(input_ids=ids).pooler_output
        return F.normalize(self.network.text_projection(read), dim=-1)

    def score(self, pixels: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float32]:
        """Cosine of every picture with its caption (B,), in [-1, 1] (Hessel et al., arXiv 2104.08718, unscaled)."""
        return (self.images(pixels) * self.texts(captions)).sum(dim=-1).numpy()


def _beside(root: str) -> bool:
    return (Path(root) / "tokenizer").exists()
