"""The VQGAN's network, with the names of diffusers' `VQModel`: its folders load here, and ours there.

It is our own since diffusers' takes four seconds to import, in every process that holds one.

Shapes: B pictures, H W pixels, h w grid of ids with h = H / factor, D channels.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of the group norms


@dataclass(frozen=True)
class VqModelConfig:
    """Shape of a VqModel, with the field names of diffusers' `VQModel`; the defaults are those of aMUSEd's."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ()  # the one kind there is, as often as there are blocks
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 64
    sample_size: int = 256
    num_vq_embeddings: int = 8192
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None  # width of a code; None: latent_channels
    scaling_factor: float = 0.18215  # unused
    norm_type: str = "group"
    mid_block_add_attention: bool = False
    lookup_from_codebook: bool = True  # says how diffusers decodes
    force_upcast: bool = False  # unused

    def __post_init__(self) -> None:
        blocks = len(self.block_out_channels)
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            object.__setattr__(self, name, tuple(getattr(self, name)) or (kind,) * blocks)
            if getattr(self, name) != (kind,) * blocks:
                raise ValueError(f"{name} must be {kind}, {blocks} times as block_out_channels is long")
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        if self.act_fn not in ("silu", "swish") or self.norm_type != "group":
            raise ValueError(f"act_fn {self.act_fn!r}, norm_type {self.norm_type!r}: only silu and group are built")
        sizes = [self.layers_per_block, self.latent_channels, self.num_vq_embeddings, *self.block_out_channels]
        if not self.block_out_channels or min(sizes) < 1:
            raise ValueError("block_out_channels, layers_per_block, latent_channels, num_vq_embeddings: all above 0")
        if wrong := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            raise ValueError(f"block_out_channels {wrong} are no multiples of norm_num_groups={self.norm_num_groups}")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VqModelConfig":
        """From the contents of a `vqvae/config.json`; keys that start with "_" are bookkeeping.

        What it leaves out is as diffusers' own defaults have it.

        Raises:
            ValueError: for a key that no field matches, or a kind of network that is not built here.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(given.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown keys {', '.join(unknown)} in a {config.get('_class_name')} config")
        return cls(**{**_DIFFUSERS_DEFAULTS, **given})

    def to_diffusers(self) -> dict[str, Any]:
        """The contents of a `vqvae/config.json` that diffusers' `VQModel.from_config` takes."""
        return {"_class_name": "VQModel", **asdict(self)}

    @property
    def factor(self) -> int:
        """Pixels a side of one id's cell."""
        return int(2 ** (len(self.block_out_channels) - 1))


_DIFFUSERS_DEFAULTS = {
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 3,
    "sample_size": 32,
    "num_vq_embeddings": 256,
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
}


class VqModel(nn.Module):
    """Encoder, codebook and decoder. What is a picture's nearest code, `vqgan.nearest_codes` says."""

    def __init__(self, config: VqModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vq_embed_dim or config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, width, 1)
        self.quantize = Codes(config.num_vq_embeddings, width)
        self.post_quant_conv = nn.Conv2d(width, config.latent_channels, 1)
        self.decoder = Decoder(config)

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to what is then rounded to codes, (B, D, h, w)."""
        latents: Tensor = self.quant_conv(self.encoder(pixels))
        return latents

    def draw(self, codes: Tensor) -> Tensor:
        """Codes (B, D, h, w) to pixels (B, 3, H, W)."""
        pixels: Tensor = self.decoder(self.post_quant_conv(codes))
        return pixels


class Codes(nn.Module):
    """The codebook (C, D), of codes near 0."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        nn.init.uniform_(self.embedding.weight, -1 / count, 1 / count)


class Encoder(nn.Module):
    """(B, 3, H, W) to (B, D, h, w)."""

    def __init__(self, config: VqModelConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Down(before, width, config, last=number == len(widths) - 1)
            for number, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = Middle(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.conv_in(pixels)
        for block in self.down_blocks:
            hidden = block(hidden)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(hidden))))
        return out


class Decoder(nn.Module):
    """(B, D, h, w) to (B, 3, H, W)."""

    def __init__(self, config: VqModelConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        self.mid_block = Middle(widths[0], config)
        self.up_blocks.extend(
            Up(before, width, config, last=number == len(widths) - 1)
            for number, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(codes))
        for block in self.up_blocks:
            hidden = block(hidden)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return out


class Down(nn.Module):
    """Residual blocks, and then half the grid, but for the last."""

    def __init__(self, before: int, width: int, config: VqModelConfig, *, last: bool) -> None:
        super().__init__()
        self.resnets = _residuals(config.layers_per_block, before, width, config.norm_num_groups)
        self.downsamplers = None if last else nn.ModuleList([Halve(width)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *(self.downsamplers or ())):
            x = block(x)
        return x


class Up(nn.Module):
    """Residual blocks, one more than on the way down, and then twice the grid, but for the last."""

    def __init__(self, before: int, width: int, config: VqModelConfig, *, last: bool) -> None:
        super().__init__()
        self.resnets = _residuals(config.layers_per_block + 1, before, width, config.norm_num_groups)
        self.upsamplers = None if last else nn.ModuleList([Double(width)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *(self.upsamplers or ())):
            x = block(x)
        return x


def _residuals(count: int, before: int, width: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(Residual(before if number == 0 else width, width, groups) for number in range(count))


class Middle(nn.Module):
    """Two residual blocks, and attention over the grid between them where the config has it."""

    def __init__(self, width: int, config: VqModelConfig) -> None:
        super().__init__()
        groups = config.norm_num_groups
        first = Residual(width, width, groups)
        self.attentions = nn.ModuleList([Attention(width, groups)] if config.mid_block_add_attention else [])
        self.resnets = nn.ModuleList([first, Residual(width, width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        x = first(x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = second(x)
        return out


class Residual(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, the sum in `width` channels."""

    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, EPS)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = None if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden
        return out


class Attention(nn.Module):
    """One head of self-attention over the grid, added to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        flat = self.group_norm(x.flatten(2)).transpose(1, 2)[:, None]  # (B, 1, h w, D)
        seen = F.scaled_dot_product_attention(self.to_q(flat), self.to_k(flat), self.to_v(flat))
        out: Tensor = self.to_out[0](seen[:, 0]).transpose(1, 2).reshape(x.shape)
        return out + x


class Halve(nn.Module):
    """A convolution of stride 2, padded at the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Double(nn.Module):
    """Every cell four times, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out
