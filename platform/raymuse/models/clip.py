"""Both towers of a CLIP, for scores: how well pictures and captions agree.

B pictures or captions, P projected width.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from raymuse.config.errors import UserError
from raymuse.models.vqgan import to_unit
from raymuse.models.weights import require_safetensors, weights_sha256, without_bars

if TYPE_CHECKING:
    from transformers import CLIPModel  # seconds to import, and many import this module

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESSOR = "preprocessor_config.json"


def normalise(pixels: NDArray[np.uint8], side: int, device: str | torch.device = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) to CLIP's floats (B, 3, side, side): bicubic resize, then mean and deviation."""
    unit = to_unit(pixels, device)
    if unit.shape[-1] != side:
        unit = F.interpolate(unit, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (unit - mean) / std


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP with its tokenizer.

    Attributes:
        processor: transformers' preprocessing of pictures; None: `normalise`, which our own CLIPs are trained with.
    """

    network: "CLIPModel"
    tokenizer: Any
    processor: Any = None

    @classmethod
    def load(cls, folder_or_id: str, device: str = "cpu") -> "Clip":
        """From a folder with `clip/` and `tokenizer/`, a plain CLIP folder, or a Hugging Face id; safetensors only.

        Raises:
            UserError: it is missing, has pickled weights alone, or is no CLIP with both towers.
        """
        from transformers import AutoTokenizer, CLIPModel

        without_bars()
        root, subfolder = require_safetensors(folder_or_id, "clip")
        kind = json.loads(Path(root, subfolder or "", "config.json").read_text()).get("model_type")
        if kind != "clip":
            raise UserError(f"{folder_or_id} is a {kind}, no CLIP with both towers (model_type clip): name such a one.")
        network = CLIPModel.from_pretrained(root, subfolder=subfolder or "", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(root, subfolder="tokenizer" if _beside(root) else "")
        return cls(network.eval().requires_grad_(False).to(device), tokenizer, _processor(Path(root, subfolder or "")))

    @torch.no_grad()
    def embed(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Projected image features (B, P), of whatever length, of pictures uint8 (B, H, W, 3); on the CPU."""
        device = self.network.device
        if self.processor is None:
            inputs = normalise(pixels, int(self.network.config.vision_config.image_size), device)
        else:
            inputs = self.processor(images=list(pixels), return_tensors="pt")["pixel_values"].to(device)
        seen = self.network.vision_model(pixel_values=inputs).pooler_output
        projected: Tensor = self.network.visual_projection(seen)
        return projected.cpu()

    def images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Unit vectors (B, P) of pictures uint8 (B, H, W, 3)."""
        return F.normalize(self.embed(pixels), dim=-1)

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
        read = self.network.text_model(input_ids=ids.to(self.network.device)).pooler_output
        return F.normalize(self.network.text_projection(read), dim=-1).cpu()

    def score(self, pixels: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float32]:
        """Cosine of every picture with its caption (B,), in [-1, 1] (Hessel et al., arXiv 2104.08718, unscaled)."""
        return (self.images(pixels) * self.texts(captions)).sum(dim=-1).numpy()


def clip_fingerprint(folder_or_id: str) -> dict[str, str]:
    """What decides the features of pictures: sha256 of the weights, and of what says how pictures are prepared.

    Raises:
        UserError: as `Clip.load`.
    """
    root, subfolder = require_safetensors(folder_or_id, "clip")
    said = Path(root, subfolder or "", PREPROCESSOR)
    prepared = hashlib.sha256(said.read_bytes()).hexdigest() if said.exists() else "as our own CLIPs are trained"
    return {"weights": weights_sha256(folder_or_id, "clip"), "preprocessing": prepared}


def _processor(folder: Path) -> Any:
    """CLIP's own preprocessing where the folder says it (Pillow's resize, as OpenAI's); None: it is one of ours."""
    if not (folder / PREPROCESSOR).exists():
        return None
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil.from_pretrained(folder)


def _beside(root: str) -> bool:
    return (Path(root) / "tokenizer").exists()
