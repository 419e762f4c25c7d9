"""aMUSEd's base transformer: masked image-token ids and text to logits over the codebook.

Shape legend, used in names: B batch, h w token grid, T text tokens, E text width, P pooled text width,
C channels of the convolution blocks (`block_out_channels`), D transformer width (`hidden_size`), K codebook size.

Source: aMUSEd (Patil et al., arXiv 2401.01808), a U-ViT (Hoogeboom et al., arXiv 2301.11093) over token ids.
Parameter names and shapes are those of diffusers' `UVit2DModel`, so that checkpoints move both ways.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymuse.models.layers import (
    Attention,
    Block,
    CriticHead,
    FeedForward,
    Prepared,
    RMSNorm,
    SelfConditioning,
    cells,
    initialise_weights,
    positive_fields,
    run_blocks,
)

MICRO_CONDITIONS = 5
"""Original width, original height, crop top, crop left, aesthetic score, in this order."""

_FIXED_EPS = 1e-6  # of the attention blocks' norms: upstream does not take it from the config


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


class Condition(NamedTuple):
    """What a UVit knows beside the ids; constant over the sampling steps. First axes are the batch."""

    text: Tensor  # (B, T, D), projected and normed text states
    embedding: Tensor  # (B, D), pooled text and micro-conditions: the input of every adaptive norm
    prepared: tuple[Prepared, ...] = ()  # per block, filled by UVit.precompute; empty while training

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, to copy rows of one condition into another's buffers."""
        return [self.text, self.embedding, *(tensor for block in self.prepared for tensor in block)]

    def rows(self, index: Tensor | slice) -> "Condition":
        """The samples `index` of the batch (repeats allowed)."""
        prepared = tuple(tuple(tensor[index] for tensor in block) for block in self.prepared)
        return Condition(self.text[index], self.embedding[index], prepared)


class UVit(nn.Module):
    """See the module's docstring. `gradient_checkpointing` trades a second forward for activation memory."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        bias, eps, affine = config.use_bias, config.layer_norm_eps, config.ln_elementwise_affine
        channels, width = config.block_out_channels, config.hidden_size
        self.encoder_proj = nn.Linear(config.encoder_hidden_size, width, bias=bias)
        self.encoder_proj_layer_norm = RMSNorm(width, eps, affine)
        self.embed = TokenEmbedding(config)
        self.cond_embed = ConditionEmbedding(config.micro_cond_embed_dim + config.cond_embed_dim, width, bias)
        self.down_block = ConvStage(config, downsample=config.downsample)
        self.project_to_hidden_norm = RMSNorm(channels, eps, affine)
        self.project_to_hidden = nn.Linear(channels, width, bias=bias)
        self.transformer_layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.project_from_hidden_norm = RMSNorm(width, eps, affine)
        self.project_from_hidden = nn.Linear(width, channels, bias=bias)
        self.up_block = ConvStage(config, upsample=config.upsample)
        self.mlm_layer = MlmHead(config)
        self.self_conditioning = SelfConditioning(channels, eps) if config.self_conditioning else None
        self.critic_head = CriticHead(channels, eps) if config.self_critic else None

    def condition(self, text_states_BTE: Tensor, pooled_BP: Tensor, micro_B5: Tensor) -> Condition:
        """From the text encoder's penultimate states and projected pooled state, and the micro-conditions.

        The five micro-conditions are those of MICRO_CONDITIONS, in pixels, with the score last.
        """
        dtype = self.encoder_proj.weight.dtype
        text_BTD = self.encoder_proj_layer_norm(self.encoder_proj(text_states_BTE.to(dtype)))
        micro = sinusoids(micro_B5, self.config.micro_cond_encode_dim).flatten(1)
        embedding_BD = self.cond_embed(torch.cat([pooled_BP.to(dtype), micro.to(dtype)], dim=1))
        return Condition(text_BTD, embedding_BD)

    def precompute(self, condition: Condition) -> Condition:
        """The same condition with every block's keys, values and modulations: for many steps from it."""
        prepared = tuple(block.prepare(condition.text, condition.embedding) for block in self._blocks())
        return condition._replace(prepared=prepared)

    def features(
        self, ids_Bhw: Tensor, condition: Condition, at_BM: Tensor | None = None, before_BhwC: Tensor | None = None
    ) -> Tensor:
        """What the head reads, (B, h, w, C). Raises ValueError for an odd grid if the model down-samples.

        Args:
            at_BM: cells that they are wanted of alone, by their row-major number: (B, M, 1, C); None: all.
            before_BhwC: the features of the step before, of a model with self-conditioning; None: there was none.
        """
        self._check_grid(ids_Bhw)
        n_down, n_layers = len(self.down_block.blocks()), len(self.transformer_layers)
        context, prepared = (condition.text, condition.embedding), condition.prepared
        recompute = self.gradient_checkpointing
        x = self.embed(ids_Bhw)
        if self.self_conditioning is not None and before_BhwC is not None:
            x = x + self.self_conditioning(before_BhwC)
        x = self.down_block.enter(x)
        x = run_blocks(self.down_block.blocks(), x, context, prepared[:n_down], recompute=recompute)
        x = self.project_to_hidden(self.project_to_hidden_norm(x))
        x = run_blocks(self.transformer_layers, x, context, prepared[n_down : n_down + n_layers], recompute=recompute)
        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        x = run_blocks(self.up_block.blocks(), x, context, prepared[n_down + n_layers :], recompute=recompute)
        x = self.up_block.leave(x)
        return x if at_BM is None else cells(x, at_BM)

    def head(self, features: Tensor) -> Tensor:
        """Logits (..., K) of features (..., C) of any leading shape: training gathers masked positions first."""
        logits: Tensor = self.mlm_layer(features)
        return logits

    def judge(self, features: Tensor) -> Tensor:
        """How true the ids look that the features (..., C) are of, a logit (..., 1); of a `self_critic` alone."""
        assert self.critic_head is not None
        logit: Tensor = self.critic_head(features)
        return logit

    def forward(self, ids_Bhw: Tensor, text_states_BTE: Tensor, pooled_BP: Tensor, micro_B5: Tensor) -> Tensor:
        """Logits (B, h, w, K)."""
        return self.head(self.features(ids_Bhw, self.condition(text_states_BTE, pooled_BP, micro_B5)))

    def initialise(self, seed: int) -> None:
        """Fresh weights, the same for one seed on every device; see `initialise_weights`."""
        initialise_weights(
            self,
            seed,
            embedding_std=0.02,  # a norm follows
            zero=("norm1.linear", "norm2.linear", "norm3.linear", "cond_embeds_mapper", "self_conditioning.ff.net.2"),
            residual=("to_out.0", "ff.net.2", "channelwise_linear_2"),
            depth=self.config.num_hidden_layers + 2 * self.config.num_res_blocks,
        )

    def _blocks(self) -> list[Block]:
        layers = [cast(Block, layer) for layer in self.transformer_layers]
        return [*self.down_block.blocks(), *layers, *self.up_block.blocks()]

    def _check_grid(self, ids_Bhw: Tensor) -> None:
        height, width = ids_Bhw.shape[1:]
        if self.config.downsample and (height % 2 or width % 2):
            raise ValueError(f"grid {height}x{width}: a model that down-samples needs even sides")


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


class MlmHead(nn.Module):
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
        # The sum of squares by hand: vector_norm over inner axes is 15 times slower on a CPU.
        strength = x_BhwC.float().square().sum(dim=(1, 2), keepdim=True).clamp(min=1e-24).sqrt()
        relative = strength / (strength.mean(dim=-1, keepdim=True) + 1e-6)
        # One multiply-add over the big tensor: x (1 + gamma relative) + beta.
        return torch.addcmul(self.beta.to(x_BhwC.dtype), x_BhwC, (1 + self.gamma * relative).to(x_BhwC.dtype))


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


def sinusoids(values: Tensor, size: int) -> Tensor:
    """Cosines then sines of `values` (...) at `size / 2` frequencies from 1 down to 1/10000: (..., size), fp32.

    Vaswani et al., arXiv 1706.03762, section 3.5. In half precision a pixel size's phase is off by whole radians.
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    phases = values.float()[..., None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


def _convolve(conv: nn.Module, x_BhwC: Tensor) -> Tensor:
    out_BChw: Tensor = conv(x_BhwC.permute(0, 3, 1, 2))
    return out_BChw.permute(0, 2, 3, 1)


def _modulate(x_BhwC: Tensor, modulation_B2C: Tensor) -> Tensor:
    scale, shift = modulation_B2C[:, None, None, :].chunk(2, dim=-1)
    return torch.addcmul(shift, x_BhwC, 1 + scale)
