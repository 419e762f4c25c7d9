"""What aMUSEd's base transformer is built of, between its ids and its logits.

Shape legend: see `uvit`. Parameter names and shapes are those of diffusers' `UVit2DModel`.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymuse.models.layers import Attention, Block, FeedForward, Prepared, RMSNorm
from raymuse.models.norms import response_norm
from raymuse.models.uvit_shape import UVitConfig

_FIXED_EPS = 1e-6  # of the attention blocks' norms: upstream does not take it from the config


class TokenEmbedding(nn.Module):
    """Ids (B, h, w) to (B, h, w, C)."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.in_channels)
        self.layer_norm = RMSNorm(config.in_channels, config.layer_norm_eps, config.ln_elementwise_affine)
        self.conv = PointwiseConv(config.in_channels, config.block_out_channels, config.use_bias)

    def forward(self, ids_Bhw: Tensor) -> Tensor:
        out: Tensor = self.conv(self.layer_norm(self.embeddings(ids_Bhw)))
        return out


class UVitHead(nn.Module):
    """Features (..., C) to logits (..., K)."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        self.conv1 = PointwiseConv(config.block_out_channels, config.in_channels, config.use_bias)
        self.layer_norm = RMSNorm(config.in_channels, config.layer_norm_eps, config.ln_elementwise_affine)
        self.conv2 = PointwiseConv(config.in_channels, config.codebook_size, config.use_bias)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.layer_norm(self.conv1(features)))
        return out


class ConditionEmbedding(nn.Module):
    """Pooled text and micro-condition sinusoids, (B, P + 5 sinusoids), to (B, D)."""

    def __init__(self, given: int, width: int, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(given, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class ConvStage(nn.Module):
    """The convolutional blocks on one side of the transformer, and the grid's resampling before or after."""

    def __init__(self, config: UVitConfig, *, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        count = config.num_res_blocks
        self.downsample = Resample(config, nn.Conv2d) if downsample else None
        self.res_blocks = nn.ModuleList(ConvNextBlock(config) for _ in range(count))
        self.attention_blocks = nn.ModuleList(CrossAttentionBlock(config) for _ in range(count))
        self.upsample = Resample(config, nn.ConvTranspose2d) if upsample else None

    def enter(self, x_BhwC: Tensor) -> Tensor:
        return x_BhwC if self.downsample is None else self.downsample(x_BhwC)

    def blocks(self) -> list[Block]:
        """Convolution and attention in turn."""
        pairs = zip(self.res_blocks, self.attention_blocks, strict=True)
        return [cast(Block, block) for pair in pairs for block in pair]

    def leave(self, x_BhwC: Tensor) -> Tensor:
        return x_BhwC if self.upsample is None else self.upsample(x_BhwC)


class Resample(nn.Module):
    """Halve the grid by a strided 2x2 convolution, or double it by its transpose."""

    def __init__(self, config: UVitConfig, kind: type[nn.Conv2d] | type[nn.ConvTranspose2d]) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.norm = RMSNorm(channels, config.layer_norm_eps, config.ln_elementwise_affine)
        self.conv = kind(channels, channels, kernel_size=2, stride=2, bias=config.use_bias)

    def forward(self, x_BhwC: Tensor) -> Tensor:
        return _convolve(self.conv, self.norm(x_BhwC))


class ConvNextBlock(Block):
    """Depthwise 3x3 and pointwise MLP (ConvNeXt V2, arXiv 2301.00808), scaled and shifted by the condition.

    The depthwise convolution's zero padding is the model's only source of position.
    """

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        channels, bias = config.block_out_channels, config.use_bias
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=bias)
        self.norm = RMSNorm(channels, config.layer_norm_eps, config.ln_elementwise_affine)
        self.channelwise_linear_1 = nn.Linear(channels, 4 * channels, bias=bias)
        self.channelwise_norm = GlobalResponseNorm(4 * channels)
        self.channelwise_linear_2 = nn.Linear(4 * channels, channels, bias=bias)
        self.channelwise_dropout = nn.Dropout(config.hidden_dropout)
        self.cond_embeds_mapper = nn.Linear(config.hidden_size, 2 * channels, bias=bias)

    def prepare(self, *context: Tensor) -> Prepared:
        _, embedding_BD = context
        return (self.cond_embeds_mapper(F.silu(embedding_BD)),)

    def forward(self, x_BhwC: Tensor, *prepared: Tensor) -> Tensor:
        inner = F.gelu(self.channelwise_linear_1(self.norm(_convolve(self.depthwise, x_BhwC))))
        out = self.channelwise_linear_2(self.channelwise_norm(inner))
        return _modulate(x_BhwC + self.channelwise_dropout(out), prepared[0])


class GlobalResponseNorm(nn.Module):
    """Channels compete by their norm over the grid (ConvNeXt V2, section 3). Norms in fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x_BhwC: Tensor) -> Tensor:
        return response_norm(x_BhwC, self.gamma, self.beta)


class CrossAttentionBlock(Block):
    """Two attentions over the text and no MLP. Both are cross-attentions, as upstream."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        channels, bias = config.block_out_channels, config.use_bias
        fits = config.hidden_size == channels
        self.kv_mapper = None if fits else nn.Linear(config.hidden_size, channels, bias=bias)
        self.norm1 = RMSNorm(channels, _FIXED_EPS)
        self.attn1 = Attention(channels, config.block_num_heads, bias=bias, dropout=config.attention_dropout)
        self.norm2 = RMSNorm(channels, _FIXED_EPS)
        self.attn2 = Attention(channels, config.block_num_heads, bias=bias, dropout=config.attention_dropout)

    def prepare(self, *context: Tensor) -> Prepared:
        text_BTD, _ = context
        text_BTC = text_BTD if self.kv_mapper is None else self.kv_mapper(F.silu(text_BTD))
        return (*self.attn1.keys_values(text_BTC), *self.attn2.keys_values(text_BTC))

    def forward(self, x_BhwC: Tensor, *prepared: Tensor) -> Tensor:
        key1, value1, key2, value2 = prepared
        x_BhwC = x_BhwC + self.attn1(self.norm1(x_BhwC), key1, value1)
        out: Tensor = x_BhwC + self.attn2(self.norm2(x_BhwC), key2, value2)
        return out


class TransformerLayer(Block):
    """Self-attention, attention over the text, GEGLU MLP, each behind an adaptive norm."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        width, bias, eps = config.hidden_size, config.use_bias, config.layer_norm_eps
        heads, dropout, affine = (
            config.num_attention_heads,
            config.hidden_dropout,
            config.ln_elementwise_affine,
        )
        self.norm1 = AdaptiveNorm(RMSNorm(width, eps, affine), width, bias)
        self.attn1 = Attention(width, heads, bias=bias, dropout=dropout)
        self.norm2 = AdaptiveNorm(RMSNorm(width, eps, affine), width, bias)
        self.attn2 = Attention(width, heads, bias=bias, dropout=dropout)
        # Upstream's third norm is a LayerNorm; released weights need it so.
        self.norm3 = AdaptiveNorm(nn.LayerNorm(width, eps, affine, bias), width, bias)
        self.ff = FeedForward(width, config.intermediate_size, bias, dropout)

    def prepare(self, *context: Tensor) -> Prepared:
        text_BTD, embedding_BD = context
        activated = F.silu(embedding_BD)
        modulations = [norm.linear(activated) for norm in (self.norm1, self.norm2, self.norm3)]
        return (*modulations, *self.attn2.keys_values(text_BTD))

    def forward(self, x_BhwD: Tensor, *prepared: Tensor) -> Tensor:
        modulation1, modulation2, modulation3, key, value = prepared
        normed = self.norm1(x_BhwD, modulation1)
        x_BhwD = x_BhwD + self.attn1(normed, *self.attn1.keys_values(normed))
        x_BhwD = x_BhwD + self.attn2(self.norm2(x_BhwD, modulation2), key, value)
        out: Tensor = x_BhwD + self.ff(self.norm3(x_BhwD, modulation3))
        return out


class AdaptiveNorm(nn.Module):
    """A norm whose output is scaled and shifted by what `linear` makes of the condition embedding."""

    def __init__(self, norm: nn.Module, width: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width, bias=bias)
        self.norm = norm

    def forward(self, x_BhwD: Tensor, modulation_B2D: Tensor) -> Tensor:
        return _modulate(self.norm(x_BhwD), modulation_B2D)


class PointwiseConv(nn.Module):
    """A 1x1 convolution over the last axis of any shape: a linear with a convolution's weight."""

    def __init__(self, given: int, made: int, bias: bool) -> None:
        super().__init__()
        like = nn.Conv2d(given, made, kernel_size=1, bias=bias)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


def _convolve(conv: nn.Module, x_BhwC: Tensor) -> Tensor:
    out_BChw: Tensor = conv(x_BhwC.permute(0, 3, 1, 2))
    return out_BChw.permute(0, 2, 3, 1)


def _modulate(x_BhwC: Tensor, modulation_B2C: Tensor) -> Tensor:
    scale, shift = modulation_B2C[:, None, None, :].chunk(2, dim=-1)
    return torch.addcmul(shift, x_BhwC, 1 + scale)
