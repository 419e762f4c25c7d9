"""The shape of aMUSEd's base transformer: its sizes, under diffusers' names, and what of them cannot work."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from raymuse.models.layers import positive_fields

MICRO_CONDITIONS = 5
"""Original width, original height, crop top, crop left, aesthetic score, in this order."""


@dataclass(frozen=True, kw_only=True)
class UVitConfig:
    """Shape of a UVit, with the field names and defaults of diffusers' `UVit2DModel`: those of amused-256."""

    hidden_size: int = 1024
    use_bias: bool = False
    hidden_dropout: float = 0.0
    cond_embed_dim: int = 768  # width of the pooled text embedding
    micro_cond_encode_dim: int = 256  # sinusoids per micro-condition
    micro_cond_embed_dim: int = 1280  # of all five micro-conditions
    encoder_hidden_size: int = 768  # width of the text states
    vocab_size: int = 8256  # codes, padding, and last the mask id
    codebook_size: int = 8192
    in_channels: int = 768  # width of the token embedding
    block_out_channels: int = 768
    num_res_blocks: int = 3  # on each side of the transformer
    downsample: bool = False  # halve the grid before the transformer (amused-512)
    upsample: bool = False
    block_num_heads: int = 12
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    attention_dropout: float = 0.0
    intermediate_size: int = 2816
    layer_norm_eps: float = 1e-6
    ln_elementwise_affine: bool = True
    sample_size: int = 64  # grid side the model was made for; the network itself takes any
    self_conditioning: bool = False  # reads its own features of the step before; diffusers has none
    self_critic: bool = False  # tells with a second head which ids are true; diffusers has none

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("UVitConfig: " + "; ".join(problems))

    @property
    def mask_id(self) -> int:
        """The id of a hidden position: the last of the vocabulary."""
        return self.vocab_size - 1

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UVitConfig":
        """From the contents of a `transformer/config.json`; keys that start with "_" are bookkeeping.

        Raises ValueError for a key that no field matches: dropping one silently would change the network.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(given.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"UVitConfig: unknown keys {', '.join(unknown)} in a {config.get('_class_name')} config")
        return cls(**given)

    def to_diffusers(self) -> dict[str, Any]:
        """The contents of a `transformer/config.json` that diffusers' `UVit2DModel.from_config` takes.

        With what diffusers has not, it has another class name.
        """
        record = asdict(self)
        own = {name: record.pop(name) for name in ("self_conditioning", "self_critic")}
        if any(own.values()):
            return {"_class_name": "UVit", **record, **own}
        return {"_class_name": "UVit2DModel", **record}

    def _problems(self) -> list[str]:
        problems = positive_fields(self, [field.name for field in fields(self) if field.type is int])
        if problems:
            return problems
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.block_out_channels % self.block_num_heads:
            problems.append(
                f"block_out_channels {self.block_out_channels} is not a multiple of "
                f"block_num_heads {self.block_num_heads}"
            )
        if self.micro_cond_encode_dim % 2:
            problems.append(f"micro_cond_encode_dim {self.micro_cond_encode_dim} must be even (cosines and sines)")
        if self.micro_cond_embed_dim != MICRO_CONDITIONS * self.micro_cond_encode_dim:
            problems.append(
                f"micro_cond_embed_dim {self.micro_cond_embed_dim} must be {MICRO_CONDITIONS} x "
                f"micro_cond_encode_dim = {MICRO_CONDITIONS * self.micro_cond_encode_dim}"
            )
        if self.vocab_size <= self.codebook_size:
            problems.append(
                f"vocab_size {self.vocab_size} must be above codebook_size {self.codebook_size}: "
                "the last id is the mask"
            )
        if self.downsample != self.upsample:
            problems.append("downsample and upsample must be set together, or the logits do not fit the ids' grid")
        if self.layer_norm_eps <= 0:
            problems.append(f"layer_norm_eps {self.layer_norm_eps} must be above 0")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} must be in [0, 1)")
        return problems
