"""Muse's super-resolution transformer: masked high-resolution ids, text and low-resolution ids to logits.

Shape legend, used in names: B batch, H W high-res grid, h w low-res grid, T text tokens, E text width,
D model width, S = T + h w context positions, K codebook size.

Source: Muse (Chang et al., arXiv 2301.00704), section 2.4: self-attention layers over the low-res ids, their
output concatenated to the text states along the sequence, and that cross-attended by the high-res ids. Where the
paper is silent the blocks are aMUSEd's (RMSNorm, GEGLU, no biases). Self-attention over the high-res grid is
full, not Muse's multi-axis: with a fused kernel 64x64 positions fit in memory.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from raymuse.models.layers import (
    Attention,
    Block,
    FeedForward,
    GridPositions,
    MuseHead,
    Prepared,
    RMSNorm,
    SelfConditioning,
    cells,
    initialise_weights,
    run_blocks,
    token_shape_problems,
)


@dataclass(frozen=True, kw_only=True)
class SuperResConfig:
    """Shape of a SuperRes. The defaults are what Muse pairs with its 3B base, but for CLIP-L's text width.

    Muse: hidden 1024, MLP 4096, 16 low-res layers over 16x16 ids, 32 layers over 64x64 ids, 8192 codes, text
    width 4096 (T5-XXL). The small pair (632M base) has a 268M super-res model.
    """

    hidden_size: int = 1024
    num_hidden_layers: int = 32  # over the high-res ids
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    low_res_layers: int = 16  # self-attention over the low-res ids, at the same hidden_size
    encoder_hidden_size: int = 768  # width of the text states
    vocab_size: int = 8256  # high-res codes, padding, and last the mask id
    codebook_size: int = 8192
    low_vocab_size: int = 8256  # ids the low-res grid may hold; its VQGAN may be another
    low_grid: int = 16  # largest low-res side
    high_grid: int = 64  # largest high-res side, a multiple of low_grid
    low_res_skip: bool = False  # add to each high-res cell what lies under and beside it; not in the paper
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    self_conditioning: bool = False  # reads its own features of the step before; not in the paper

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("SuperResConfig: " + "; ".join(problems))

    @property
    def mask_id(self) -> int:
        """The id of a hidden high-res position: the last of the vocabulary."""
        return self.vocab_size - 1

    @property
    def scale(self) -> int:
        """High-res cells per low-res cell, along one side."""
        return self.high_grid // self.low_grid

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SuperResConfig":
        """From `to_dict`'s result. Unknown keys raise ValueError, but for those that start with "_"."""
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(given.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"SuperResConfig: unknown keys {', '.join(unknown)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `superres/config.json`."""
        return {"_class_name": "SuperRes", **asdict(self)}

    def _problems(self) -> list[str]:
        problems = token_shape_problems(self)
        if self.low_grid > 0 and self.high_grid % self.low_grid:
            problems.append(f"high_grid {self.high_grid} is not a multiple of low_grid {self.low_grid}")
        return problems


class Condition(NamedTuple):
    """What a SuperRes knows beside the high-res ids; constant over the sampling steps. First axes: batch.

    Text and low-res stay apart, so that a caller can replace the one (dropped or negative text) and keep the
    other.
    """

    text: Tensor  # (B, T, D), projected and normed text states
    low: Tensor  # (B, h, w, D), normed output of the low-res encoder
    prepared: tuple[Prepared, ...] = ()  # per block, filled by SuperRes.precompute; empty while training
    spread: tuple[Tensor, ...] = ()  # (B, H, W, D), the low-res cells over the high-res grid, likewise


class SuperRes(nn.Module):
    """See the module's docstring. `gradient_checkpointing` trades a second forward for activation memory."""

    def __init__(self, config: SuperResConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, eps = config.hidden_size, config.layer_norm_eps
        self.text_proj = nn.Linear(config.encoder_hidden_size, width, bias=False)
        self.text_norm = RMSNorm(width, eps)
        self.positions = GridPositions(config.high_grid, config.scale, width)
        self.low_embed = nn.Embedding(config.low_vocab_size, width)
        self.low_layers = nn.ModuleList(LowResLayer(config) for _ in range(config.low_res_layers))
        self.low_norm = RMSNorm(width, eps)
        self.embed = nn.Embedding(config.vocab_size, width)
        self.low_skip = LowResSkip(width, config.scale) if config.low_res_skip else None
        self.layers = nn.ModuleList(HighResLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(width, eps)
        self.mlm_head = MuseHead(width, config.codebook_size, eps)
        self.self_conditioning = SelfConditioning(width, eps) if config.self_conditioning else None

    def condition(
        self, text_states_BTE: Tensor, low_ids_Bhw: Tensor, low_means_BhwD: Tensor | None = None
    ) -> Condition:
        """From text states and the low-res ids. Raises ValueError for a grid larger than the config's.

        Args:
            low_means_BhwD: in place of the ids' own embeddings, e.g. the mean of all by how likely each is; None: them.
        """
        _check_side("low-res", low_ids_Bhw, self.config.low_grid)
        own = self.low_embed(low_ids_Bhw) if low_means_BhwD is None else low_means_BhwD.to(self.low_embed.weight)
        embedded = own + self.positions(low_ids_Bhw, coarse=True)
        low_BhwD = run_blocks(self.low_layers, embedded, (), recompute=self.gradient_checkpointing)
        return Condition(self._read(text_states_BTE), self.low_norm(low_BhwD))

    def retold(self, condition: Condition, text_states_BTE: Tensor) -> Condition:
        """The same low-res ids under another text, without reading them again."""
        return Condition(self._read(text_states_BTE), condition.low)

    def precompute(self, condition: Condition) -> Condition:
        """The same condition with every block's keys and values and the skip, for sampling many steps from it."""
        context_BSD = _join(condition)
        blocks = [cast(Block, layer) for layer in self.layers]
        prepared = tuple(block.prepare(context_BSD) for block in blocks)
        return condition._replace(prepared=prepared, spread=self._spread(condition))

    def features(
        self, ids_BHW: Tensor, condition: Condition, at_BM: Tensor | None = None, before_BHWD: Tensor | None = None
    ) -> Tensor:
        """What the head reads, (B, H, W, D). Raises ValueError if the grid does not fit the condition's.

        Args:
            at_BM: cells that they are wanted of alone, by their row-major number: (B, M, 1, D); None: all.
            before_BHWD: the features of the step before, of a model with self-conditioning; None: there was none.
        """
        self._check_grid(ids_BHW, condition)
        context = () if condition.prepared else (_join(condition),)
        embedded = self.embed(ids_BHW) + self.positions(ids_BHW, coarse=False)
        if self.self_conditioning is not None and before_BHWD is not None:
            embedded = embedded + self.self_conditioning(before_BHWD)
        for spread in condition.spread or self._spread(condition):
            embedded = embedded + spread
        recompute = self.gradient_checkpointing
        x_BHWD = run_blocks(self.layers, embedded, context, condition.prepared, recompute=recompute, at_BM=at_BM)
        out: Tensor = self.norm(x_BHWD)
        return out

    def head(self, features: Tensor) -> Tensor:
        """Logits (..., K) of features (..., D) of any leading shape: training gathers masked positions first."""
        logits: Tensor = self.mlm_head(features)
        return logits

    def forward(self, ids_BHW: Tensor, text_states_BTE: Tensor, low_ids_Bhw: Tensor) -> Tensor:
        """Logits (B, H, W, K)."""
        return self.head(self.features(ids_BHW, self.condition(text_states_BTE, low_ids_Bhw)))

    def initialise(self, seed: int) -> None:
        """Fresh weights, the same for one seed on every device; see `initialise_weights`."""
        initialise_weights(
            self,
            seed,
            embedding_std=0.3,  # a toy task took half as long again with 0.02, a quarter with 1
            zero=("self_conditioning.ff.net.2",),
            residual=("to_out.0", "ff.net.2"),
            depth=self.config.num_hidden_layers,
        )

    def _read(self, text_states_BTE: Tensor) -> Tensor:
        text_BTD: Tensor = self.text_norm(self.text_proj(text_states_BTE.to(self.text_proj.weight.dtype)))
        return text_BTD

    def _spread(self, condition: Condition) -> tuple[Tensor, ...]:
        return () if self.low_skip is None else (self.low_skip(condition.low),)

    def _check_grid(self, ids_BHW: Tensor, condition: Condition) -> None:
        _check_side("high-res", ids_BHW, self.config.high_grid)
        high, low, scale = tuple(ids_BHW.shape[1:]), tuple(condition.low.shape[1:3]), self.config.scale
        if high != (low[0] * scale, low[1] * scale):
            raise ValueError(f"high-res grid {high} must be {scale} times the low-res grid {low}")


class LowResSkip(nn.Module):
    """Low-res cells (B, h, w, D) spread over the high-res grid (B, H, W, D): a 3x3 convolution a sub-cell.

    Attention has to learn first which low-res cells lie under and beside a high-res one; this says it.
    """

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(width, scale * scale * width, kernel_size=3, padding=1, bias=False)

    def forward(self, low_BhwD: Tensor) -> Tensor:
        batch, height, width, channels = low_BhwD.shape
        seen = self.conv(low_BhwD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        spread: Tensor = seen.reshape(batch, height, width, self.scale, self.scale, channels)
        return spread.permute(0, 1, 3, 2, 4, 5).reshape(batch, height * self.scale, width * self.scale, channels)


class LowResLayer(Block):
    """Self-attention and GEGLU MLP, pre-norm."""

    def __init__(self, config: SuperResConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = RMSNorm(width, eps)
        self.attn1 = _attention(config)
        self.norm2 = RMSNorm(width, eps)
        self.ff = FeedForward(width, config.intermediate_size, False, config.dropout)

    def prepare(self, *context: Tensor) -> Prepared:
        return ()

    def forward(self, x_BhwD: Tensor, *prepared: Tensor) -> Tensor:
        normed = self.norm1(x_BhwD)
        x_BhwD = x_BhwD + self.attn1(normed, *self.attn1.keys_values(normed))
        out: Tensor = x_BhwD + self.ff(self.norm2(x_BhwD))
        return out


class HighResLayer(Block):
    """Self-attention, attention over text and low-res cells, GEGLU MLP, pre-norm."""

    def __init__(self, config: SuperResConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = RMSNorm(width, eps)
        self.attn1 = _attention(config)
        self.norm2 = RMSNorm(width, eps)
        self.attn2 = _attention(config)
        self.norm3 = RMSNorm(width, eps)
        self.ff = FeedForward(width, config.intermediate_size, False, config.dropout)

    def prepare(self, *context: Tensor) -> Prepared:
        (context_BSD,) = context
        return self.attn2.keys_values(context_BSD)

    def forward(self, x_BhwD: Tensor, *prepared: Tensor, at_BM: Tensor | None = None) -> Tensor:
        key, value = prepared
        normed = self.norm1(x_BhwD)
        own = self.attn1.keys_values(normed)
        if at_BM is not None:
            x_BhwD, normed = cells(x_BhwD, at_BM), cells(normed, at_BM)
        x_BhwD = x_BhwD + self.attn1(normed, *own)
        x_BhwD = x_BhwD + self.attn2(self.norm2(x_BhwD), key, value)
        out: Tensor = x_BhwD + self.ff(self.norm3(x_BhwD))
        return out


def _attention(config: SuperResConfig) -> Attention:
    eps = config.layer_norm_eps if config.qk_norm else None
    return Attention(
        config.hidden_size, config.num_attention_heads, bias=False, dropout=config.dropout, qk_norm_eps=eps
    )


def _join(condition: Condition) -> Tensor:
    """Text states, then the low-res cells row by row: (B, S, D)."""
    return torch.cat([condition.text, condition.low.flatten(1, 2)], dim=1)


def _check_side(name: str, ids_BHW: Tensor, largest: int) -> None:
    if max(ids_BHW.shape[1:]) > largest:
        raise ValueError(f"{name} grid {tuple(ids_BHW.shape[1:])} is larger than {largest} on a side")
