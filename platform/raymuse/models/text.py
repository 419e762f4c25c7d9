"""Frozen text encoders: captions to the states and the pooled vector that condition the transformers.

B captions, T tokens, E width, P pooled width. Every caption is padded to T.

CLIP, as aMUSEd uses it: states are `hidden_states[-2]` (not normed), pooled is the projected `text_embeds`, and no
attention mask is used. T5, as Muse uses it (Chang et al., arXiv 2301.00704, section 2.1): states are the encoder's
last hidden state, under the attention mask, zero where there is only padding. Muse has no pooled vector; aMUSEd's
adaptive norms need one, so ours is the mean of the states over the real tokens (P = E).

transformers takes four seconds to import, and a training from stored states never needs it: it is imported in use.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymuse.config.errors import UserError
from raymuse.models.weights import require_safetensors, tokenizer_folder, without_bars

T5_LENGTH = 256


@dataclass(frozen=True)
class TextEncoder(ABC):
    """A frozen text tower with its tokenizer.

    Args:
        network: transformers' model.
        tokenizer: transformers' tokenizer.
        length: T, tokens that every caption is padded or cut to.
    """

    network: Any
    tokenizer: Any
    length: int

    @staticmethod
    def load(
        folder_or_id: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        length: int | None = None,
        variant: str | None = None,
    ) -> "TextEncoder":
        """Load from a model folder (`text_encoder/` and `tokenizer/`), or a folder or Hugging Face id with all in one.

        Args:
            folder_or_id: safetensors only. A full T5 does: of its weights only the encoder's are read.
            device: where it runs.
            dtype: that it computes in.
            length: T; by default what the tokenizer says, at most CLIP's positions (77) or 256 for T5.
            variant: of the weights' files, e.g. "fp16".

        Raises:
            UserError: for what is missing, pickled, damaged, neither CLIP nor T5, or too short for the length.
        """
        without_bars()
        root, folder, (encoder, tower) = _found(folder_or_id, variant)
        network = _network(tower, folder, dtype, variant).eval().requires_grad_(False).to(device)
        return encoder(network, _tokenizer(root), _length_of(root, folder, encoder, length, folder_or_id))

    @staticmethod
    @abstractmethod
    def longest(config: Any) -> tuple[int, bool]:
        """Tokens a caption by default, and whether the network can read no more."""

    @property
    @abstractmethod
    def pooled_width(self) -> int:
        """P."""

    @abstractmethod
    def forward(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`, with gradients where the network has weights that are trained."""

    @torch.no_grad()
    def encode(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Text ids (B, T) to states (B, T, E) and pooled vectors (B, P)."""
        return self.forward(text_ids)

    @property
    def width(self) -> int:
        """E."""
        return int(self.network.config.hidden_size)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text ids (B, T) and which of them are real (bool, B, T): a row's first ones."""
        out = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return out.input_ids, out.attention_mask.bool()

    def truncated(self, captions: Sequence[str]) -> list[str]:
        """The captions that have more tokens than fit; what is beyond is cut off."""
        if not captions:
            return []
        tokens = self.tokenizer(list(captions), padding=False, truncation=False, verbose=False).input_ids
        return [caption for caption, ids in zip(captions, tokens, strict=True) if len(ids) > self.length]

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to states (B, T, E) and pooled vectors (B, P)."""
        return self.encode(self.tokenize(captions)[0])


class ClipText(TextEncoder):
    """CLIP's text tower with its projection."""

    @staticmethod
    def longest(config: Any) -> tuple[int, bool]:
        return int(getattr(config, "text_config", config).max_position_embeddings), True

    @property
    def pooled_width(self) -> int:
        return int(self.network.config.projection_dim)

    def forward(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.network(text_ids.to(self.network.device), output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds


class T5Text(TextEncoder):
    """The encoder of a T5, mT5 or UMT5."""

    @staticmethod
    def longest(config: Any) -> tuple[int, bool]:
        return T5_LENGTH, False  # its positions are relative

    @property
    def pooled_width(self) -> int:
        return self.width

    def forward(self, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = text_ids.to(self.network.device)
        real = self._real(ids)
        said = self.network(input_ids=ids, attention_mask=real.long()).last_hidden_state
        states = said.masked_fill(~real[..., None], 0)
        pooled = states.float().sum(dim=1) / real.sum(dim=1, keepdim=True).clamp(min=1)
        return states, pooled.to(states.dtype)

    def _real(self, text_ids: Tensor) -> Tensor:
        """Which tokens are no padding (bool, B, T): all up to the last other one, the </s> that ends every caption.

        So a caption that spells out "<pad>" keeps what follows it.
        """
        other = (text_ids != int(self.tokenizer.pad_token_id)).long()
        return other.flip(1).cumsum(dim=1).flip(1) > 0


_KINDS: dict[str, tuple[type[TextEncoder], str]] = {
    "clip": (ClipText, "CLIPTextModelWithProjection"),
    "clip_text_model": (ClipText, "CLIPTextModelWithProjection"),
    "t5": (T5Text, "T5EncoderModel"),
    "mt5": (T5Text, "MT5EncoderModel"),
    "umt5": (T5Text, "UMT5EncoderModel"),
}


def text_length(folder_or_id: str, asked: int | None = None) -> int:
    """T as `TextEncoder.load` sets it, without reading the weights.

    Raises:
        UserError: as `load`, but for the weights.
    """
    root, folder, (encoder, _) = _found(folder_or_id, None)
    return _length_of(root, folder, encoder, asked, folder_or_id)


def _length_of(root: Path, folder: Path, encoder: type[TextEncoder], asked: int | None, name: str) -> int:
    from transformers import AutoConfig

    longest = encoder.longest(AutoConfig.from_pretrained(folder))
    return _length(longest, _tokenizer(root), asked, name)


def _found(folder_or_id: str, variant: str | None) -> tuple[Path, Path, tuple[type[TextEncoder], str]]:
    """The model folder, the one with the weights in it, and what kind of encoder they are."""
    root, subfolder = require_safetensors(folder_or_id, "text_encoder", variant)
    folder = Path(root, subfolder or "")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in _KINDS:
        raise UserError(f"{folder_or_id} holds a {kind!r}: a text encoder is CLIP or T5 ({', '.join(_KINDS)}).")
    return Path(root), folder, _KINDS[kind]


def _network(tower: str, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """transformers' model from a folder. Raises UserError where weights are damaged, or some are missing."""
    import transformers

    try:
        with _without_reports():
            network, loaded = getattr(transformers, tower).from_pretrained(
                folder, variant=variant, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # of safetensors, transformers and torch, for files that are cut or do not fit
        raise UserError(f"{folder}: the weights cannot be read: {' '.join(str(error).split())[:300]}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"{folder}: {len(missing)} weights are missing, such as {missing[0]}: they are not its config.json's."
        )
    return network


def _tokenizer(root: Path) -> Any:
    """The tokenizer in `tokenizer/`, or beside the weights. Raises UserError where it cannot be read."""
    folder = tokenizer_folder(root)
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises what its parsers raise, and ImportError for a sentencepiece model
        raise UserError(
            f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]} "
            "Save it as tokenizer.json (save_pretrained writes one) where it can be read."
        ) from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _length(longest: tuple[int, bool], tokenizer: Any, asked: int | None, name: str) -> int:
    most, fixed = longest
    if asked is None:
        return int(min(tokenizer.model_max_length, most))
    if fixed and asked > most:
        raise UserError(f"text_length={asked} is more than {name} can read: it has {most} positions.")
    if asked <= (added := tokenizer.num_special_tokens_to_add()):
        raise UserError(
            f"text_length={asked} leaves no room for a caption: the tokenizer adds {added} tokens of its own."
        )
    return asked


@contextmanager
def _without_reports() -> Iterator[None]:
    """transformers reports a full T5's decoder as unexpected weights; what is missing is checked here."""
    import transformers

    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
