"""What the token transformers share: norms, attention, MLPs, positions, heads, running blocks, initial weights.

Shape legend, used in names: B batch, h w token grid (H W of high resolution), G any number of grid axes,
T context tokens, N heads, d width of a head, D width, K codebook size.

Activations stay channels-last, (B, h, w, D), from the embedding to the logits: every norm and linear works on
the last axis, attention flattens the grid by itself, and only the few real convolutions need a permutation.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raymuse.models.norms import rms_norm

Prepared = tuple[Tensor, ...]
"""What a block derives from its context alone: keys, values, modulations. First axes are the batch."""


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis (Zhang and Sennrich, arXiv 1910.07467); statistics in fp32."""

    def __init__(self, width: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # which has no fused kernel
            return rms_norm(x, self.weight, self.eps)
        # The fused kernel wants one dtype, and accumulates in fp32 whatever it is.
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (self.width,), weight, self.eps)


class GEGLU(nn.Module):
    """`value * gelu(gate)`, both projected from the input (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.proj(x)
        value, gate = projected.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU MLP, (B, G..., D) to (B, G..., D)."""

    def __init__(self, width: int, inner: int, bias: bool, dropout: float) -> None:
        super().__init__()
        # The indices 0 and 2 are part of diffusers' parameter names.
        self.net = nn.Sequential(GEGLU(width, inner, bias), nn.Dropout(dropout), nn.Linear(inner, width, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class SelfConditioning(nn.Module):
    """What a network's features of the ids before add to the embedding of those now, (B, h, w, D) to (B, h, w, D).

    Chen et al., "Analog Bits", arXiv 2208.04202, section 2.3; in masked-image models by lucidrains' muse-maskgit. It
    starts at zero, and of features that are 0 it makes 0: so does a first step, which has none.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.ff = FeedForward(width, 2 * width, False, 0.0)

    def forward(self, features_BhwD: Tensor) -> Tensor:
        out: Tensor = self.ff(self.norm(features_BhwD))
        return out


class GridPositions(nn.Module):
    """Learned row and column embeddings of the high-res grid, which the low-res grid shares.

    A low-res cell's position is the mean of those of the `scale x scale` high-res cells that it covers. So which cell
    lies under which is in the embeddings from the first step, and only attention has to learn to use it.
    """

    def __init__(self, side: int, scale: int, width: int) -> None:
        super().__init__()
        self.scale = scale
        self.rows = nn.Embedding(side, width)
        self.columns = nn.Embedding(side, width)

    def forward(self, ids_BHW: Tensor, *, coarse: bool) -> Tensor:
        """(H, W, D) for a grid of ids' shape, at the low resolution if coarse."""
        height, width = ids_BHW.shape[1:]
        rows, columns = (self._side(self.rows, height, coarse), self._side(self.columns, width, coarse))
        return rows[:, None] + columns[None, :]

    def _side(self, table: nn.Embedding, cells: int, coarse: bool) -> Tensor:
        # Called, not sliced: ZeRO-3 gathers a parameter when its module runs.
        group = self.scale if coarse else 1
        vectors: Tensor = table(torch.arange(cells * group, device=table.weight.device))
        return vectors.reshape(cells, group, -1).mean(1)


class MuseHead(nn.Module):
    """The output MLP of Muse's two transformers: (..., D) to logits (..., K)."""

    def __init__(self, width: int, codes: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width, bias=False)
        self.norm = RMSNorm(width, eps)
        self.logits = nn.Linear(width, codes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.logits(self.norm(F.gelu(self.dense(features))))
        return out


class CriticHead(nn.Module):
    """Of a network that judges ids itself: features (..., D) to how true each id looks, a logit (..., 1)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.logit = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.logit(self.norm(features))
        return out


class Attention(nn.Module):
    """Multi-head attention in two halves, so that keys and values of a constant context are computed once.

    `attention(x, *attention.keys_values(context))`; self-attention passes x as its own context.
    """

    def __init__(self, width: int, heads: int, *, bias: bool, dropout: float, qk_norm_eps: float | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width, bias=bias), nn.Dropout(dropout))
        self.norm_q = RMSNorm(width // heads, qk_norm_eps) if qk_norm_eps is not None else None
        self.norm_k = RMSNorm(width // heads, qk_norm_eps) if qk_norm_eps is not None else None

    def keys_values(self, context_BGD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, N, T, D/N), where T counts the context's grid or sequence."""
        key = self._heads(self.to_k(context_BGD))
        value = self._heads(self.to_v(context_BGD))
        return (key if self.norm_k is None else self.norm_k(key)), value

    def forward(self, x_BGD: Tensor, key_BNTd: Tensor, value_BNTd: Tensor, bias_B11T: Tensor | None = None) -> Tensor:
        """Each position of x_BGD attends to every key, whose scores the bias adds to; returns x_BGD's shape."""
        query = self._heads(self.to_q(x_BGD))
        if self.norm_q is not None:
            query = self.norm_q(query)
        mixed = F.scaled_dot_product_attention(query, key_BNTd, value_BNTd, bias_B11T)
        out: Tensor = self.to_out(mixed.transpose(1, 2).reshape(x_BGD.shape))
        return out

    def _heads(self, x_BGD: Tensor) -> Tensor:
        batch, width = x_BGD.shape[0], x_BGD.shape[-1]
        return x_BGD.reshape(batch, -1, self.heads, width // self.heads).transpose(1, 2)


class Block(nn.Module, ABC):
    """A residual block: `block(x, *block.prepare(*context))`.

    `prepare` holds all that depends on the context only. In sampling it runs once for all steps; in training
    it runs with the block, inside the recomputed region where gradient checkpointing is on.
    """

    @abstractmethod
    def prepare(self, *context: Tensor) -> Prepared: ...

    @abstractmethod
    def forward(self, x_BhwD: Tensor, *prepared: Tensor) -> Tensor: ...


def cells(x_BhwD: Tensor, at_BM: Tensor) -> Tensor:
    """Some cells of each grid, by their row-major number: (B, M, 1, D), a grid of one column."""
    x_BLD = x_BhwD.flatten(1, 2)
    return x_BLD.gather(1, at_BM[:, :, None].expand(-1, -1, x_BLD.shape[-1]))[:, :, None]


def run_blocks(
    blocks: Iterable[nn.Module],
    x_BhwD: Tensor,
    context: tuple[Tensor, ...],
    prepared: Sequence[Prepared] = (),
    *,
    recompute: bool = False,
    at_BM: Tensor | None = None,
) -> Tensor:
    """Blocks in a row. `prepared`: one entry a block, or empty to prepare on the way.

    recompute: gradient checkpointing, i.e. keep each block's input only, and run the block again for its gradient.
    at_BM: the last block's output is needed at these `cells` alone; it then takes `at_BM`, too, and comes prepared.
    """
    last = len(prepared) - 1
    for index, block in enumerate(blocks):
        if prepared and at_BM is not None and index == last:
            x_BhwD = block(x_BhwD, *prepared[index], at_BM=at_BM)
        elif prepared:
            x_BhwD = block(x_BhwD, *prepared[index])
        elif recompute and torch.is_grad_enabled():
            x_BhwD = checkpoint(_prepare_and_run, block, x_BhwD, *context, use_reentrant=False)
        else:
            x_BhwD = _prepare_and_run(block, x_BhwD, *context)
    return x_BhwD


def _prepare_and_run(block: nn.Module, x_BhwD: Tensor, *context: Tensor) -> Tensor:
    assert isinstance(block, Block)
    out: Tensor = block(x_BhwD, *block.prepare(*context))
    return out


def positive_fields(config: object, names: Iterable[str]) -> list[str]:
    """A complaint for each named integer field below 1."""
    return [f"{name} is {value}, must be at least 1" for name in names if (value := getattr(config, name)) < 1]


def token_shape_problems(config: Any) -> list[str]:
    """What is wrong with the sizes that Muse's two transformers share, a sentence each."""
    problems = positive_fields(config, [field.name for field in fields(config) if field.type is int])
    if problems:
        return problems
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        problems.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    if config.vocab_size <= config.codebook_size:
        problems.append(
            f"vocab_size {config.vocab_size} must be above codebook_size {config.codebook_size}: "
            "the last id is the mask"
        )
    if config.layer_norm_eps <= 0:
        problems.append(f"layer_norm_eps {config.layer_norm_eps} must be above 0")
    if not 0 <= config.dropout < 1:
        problems.append(f"dropout {config.dropout} must be in [0, 1)")
    return problems


def initialise_weights(
    model: nn.Module,
    seed: int,
    *,
    embedding_std: float,
    zero: Collection[str],
    residual: Collection[str],
    depth: int,
) -> None:
    """Fresh weights, the same on every machine for one seed; works whatever device and dtype the model is on.

    Normals truncated at two deviations, as MaskGIT and open-muse use, with two changes: their fixed deviation of
    0.02 becomes 0.64 / sqrt(fan-in), which is 0.02 at their width of 1024 and does not shrink the signal of a
    narrow model; and layers that end a residual branch are divided by sqrt(2 depth) (GPT-2), so that the sum does
    not grow with depth.

    The last layer follows the same rule although it starts the loss at log(codes) + 0.16: on a toy task, a sixth of
    it took up to twice the steps to the same loss.

    zero, residual: endings of module names (whole components); adaptive-norm linears start at zero, so that every
    condition starts as "no modulation". embedding_std: of token and position embeddings; where they enter the
    residual stream un-normed, too small a value drowns them under the first blocks' output.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or isinstance(module, RMSNorm | nn.LayerNorm):
            _reset_other(module)
            continue
        std = embedding_std if isinstance(module, nn.Embedding) else 0.64 / math.sqrt(_fan_in(module, weight))
        if _ends_with(name, residual):
            std /= math.sqrt(2 * depth)
        _draw(weight, std, generator)
        if _ends_with(name, zero):
            nn.init.zeros_(weight)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(bias)


def _ends_with(name: str, endings: Collection[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    # A transposed convolution stores (in, out, kh, kw); with stride = kernel each output sees one kernel cell.
    return weight.shape[0] if isinstance(module, nn.ConvTranspose2d) else weight[0].numel()


def _draw(weight: Tensor, std: float, generator: torch.Generator) -> None:
    # Drawn in fp32 on the CPU: the numbers then do not depend on where the model lives.
    fresh = torch.empty(weight.shape, device="cpu")
    nn.init.trunc_normal_(fresh, std=std, a=-2 * std, b=2 * std, generator=generator)
    with torch.no_grad():
        weight.copy_(fresh)


def _reset_other(module: nn.Module) -> None:
    """Norms to identity; global response norms (gamma, beta) to zero, which is identity for them."""
    for name, parameter in module.named_parameters(recurse=False):
        nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
