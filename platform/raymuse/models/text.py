"""The frozen CLIP text encoder: captions to the states and the pooled vector that condition the transformers.

B captions, T tokens, E width, P pooled width. States are `hidden_states[-2]` (not normed), pooled is the projected
`text_embeds`; every caption is padded to T and no attention mask is used (aMUSEd).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from raymuse.models.weights import require_safetensors, without_bars


@dataclass(frozen=True)
class TextEncoder:
    """A frozen CLIP text tower with its tokenizer."""

    network: CLIPTextModelWithProjection
    tokenizer: Any

    @classmethod
    def load(cls, folder_or_id: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "TextEncoder":
        """Load `text_encoder/` and `tokenizer/` from a model folder or a Hugging Face id; safetensors only."""
        without_bars()
        root, subfolder = require_safetensors(folder_or_id, "text_encoder")
        network = CLIPTextModelWithProjection.from_pretrained(
            root, subfolder=subfolder or "", use_safetensors=True, dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(root, subfolder="tokenizer" if subfolder else "")
        return cls(network.eval().requires_grad_(False).to(device), tokenizer)

    @property
    def length(self) -> int:
        """Tokens that every caption is padded or cut to."""
        return int(min(self.tokenizer.model_max_length, self.network.config.max_position_embeddings))

    @property
    def width(self) -> int:
        return int(self.network.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        return int(self.network.config.projection_dim)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text ids (B, T) and which of them are real (bool, B, T)."""
        out = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return out.input_ids, out.attention_mask.bool()

    @torch.no_grad()
    def encode(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Text ids (B, T) to states (B, T, E) and pooled vectors (B, P)."""
        out = self.network(text_ids.to(self.network.device), output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to states (B, T, E) and pooled vectors (B, P)."""
        return self.encode(self.tokenize(captions)[0])
