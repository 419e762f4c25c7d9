"""Muse's base transformer: masked image-token ids and text states to logits over the codebook.

Shape legend, used in names: B batch, h w token grid, T text tokens, E text width, D model width, K codebook size.

Source: Muse (Chang et al., arXiv 2301.00704), sections 2.1 and 2.3: image ids embedded, with learned 2-D positions;
layers of self-attention, cross-attention to the text encoder's states (projected to the model's width), and an MLP;
an MLP to the logits. Where the paper is silent the layers are pre-normed by RMSNorm and have no biases, as in the
super-resolution. The MLP of a layer is two matrices with a GELU between them: so 48 layers of 2048 and 8192 have the
paper's 3B parameters, which a gated one would miss by 0.8B.

Text tokens that say nothing (states wholly zero, as T5's padding is) are not attended to.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from raymuse.models.layers import (
    Attention,
    Block,
    CriticHead,
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

SILENT = -30_000.0
"""Added to the scores of padding: their softmax is 0 exactly, and finite where a row has nothing else, also in fp16."""


@dataclass(frozen=True, kw_only=True)
class MaskGitConfig:
    """Shape of a MaskGit. The defaults are Muse's 3B base, which reads T5-XXL."""

    hidden_size: int = 2048
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    intermediate_size: int = 8192
    encoder_hidden_size: int = 4096  # width of the text states
    vocab_size: int = 8256  # codes, padding, and last the mask id
    codebook_size: int = 8192
    sample_size: int = 16  # largest grid side: positions are learned
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    self_conditioning: bool = False  # reads its own features of the step before
    self_critic: bool = False  # tells with a second head which ids are true

    def __post_init__(self) -> None:
        if problems := token_shape_problems(self):
            raise ValueError("MaskGitConfig: " + "; ".join(problems))

    @property
    def mask_id(self) -> int:
        """The id of a hidden position: the last of the vocabulary."""
        return self.vocab_size - 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "MaskGitConfig":
        """From `to_dict`'s result. Unknown keys raise ValueError, but for those that start with "_"."""
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := sorted(given.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"MaskGitConfig: unknown keys {', '.join(unknown)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `transformer/config.json`."""
        return {"_class_name": "MaskGit", **asdict(self)}


class Condition(NamedTuple):
    """What a MaskGit knows beside the ids; constant over the sampling steps. First axes are the batch."""

    text: Tensor  # (B, T, D), projected and normed text states
    bias: Tensor  # (B, 1, 1, T), added to the attention's scores: 0, or SILENT for padding
    prepared: tuple[Prepared, ...] = ()  # per layer, filled by MaskGit.precompute; empty while training


class MaskGit(nn.Module):
    """See the module's docstring. `gradient_checkpointing` trades a second forward for activation memory."""

    def __init__(self, config: MaskGitConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, eps = config.hidden_size, config.layer_norm_eps
        self.text_proj = nn.Linear(config.encoder_hidden_size, width, bias=False)
        self.text_norm = RMSNorm(width, eps)
        self.embed = nn.Embedding(config.vocab_size, width)
        self.positions = GridPositions(config.sample_size, 1, width)
        self.layers = nn.ModuleList(MaskGitLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(width, eps)
        self.mlm_head = MuseHead(width, config.codebook_size, eps)
        self.self_conditioning = SelfConditioning(width, eps) if config.self_conditioning else None
        self.critic_head = CriticHead(width, eps) if config.self_critic else None

    def condition(self, text_states_BTE: Tensor, pooled_BP: Tensor, micro_B5: Tensor) -> Condition:
        """From the text encoder's states. Muse knows neither a pooled vector nor micro-conditions: these are what a
        U-ViT is told beside, and not read, so that either base stands in the other's place.
        """
        real_BT = (text_states_BTE != 0).any(dim=-1)
        text_BTD = self.text_norm(self.text_proj(text_states_BTE.to(self.text_proj.weight.dtype)))
        bias_BT = torch.zeros(real_BT.shape, dtype=text_BTD.dtype, device=text_BTD.device)
        return Condition(text_BTD, bias_BT.masked_fill(~real_BT, SILENT)[:, None, None, :])

    def precompute(self, condition: Condition) -> Condition:
        """The same condition with every layer's keys and values: for many steps from it."""
        layers = [cast(Block, layer) for layer in self.layers]
        prepared = tuple(layer.prepare(condition.text, condition.bias) for layer in layers)
        return condition._replace(prepared=prepared)

    def features(
        self, ids_Bhw: Tensor, condition: Condition, at_BM: Tensor | None = None, before_BhwD: Tensor | None = None
    ) -> Tensor:
        """What the head reads, (B, h, w, D). Raises ValueError for a grid larger than the config's.

        Args:
            at_BM: cells that they are wanted of alone, by their row-major number: (B, M, 1, D); None: all.
            before_BhwD: the features of the step before, of a model with self-conditioning; None: there was none.
        """
        if max(ids_Bhw.shape[1:]) > self.config.sample_size:
            raise ValueError(f"grid {tuple(ids_Bhw.shape[1:])} is larger than {self.config.sample_size} on a side")
        embedded = self.embed(ids_Bhw) + self.positions(ids_Bhw, coarse=False)
        if self.self_conditioning is not None and before_BhwD is not None:
            embedded = embedded + self.self_conditioning(before_BhwD)
        context = (condition.text, condition.bias)
        recompute = self.gradient_checkpointing
        x_BhwD = run_blocks(self.layers, embedded, context, condition.prepared, recompute=recompute, at_BM=at_BM)
        out: Tensor = self.norm(x_BhwD)
        return out

    def head(self, features: Tensor) -> Tensor:
        """Logits (..., K) of features (..., D) of any leading shape: training gathers masked positions first."""
        logits: Tensor = self.mlm_head(features)
        return logits

    def judge(self, features: Tensor) -> Tensor:
        """How true the ids look that the features (..., D) are of, a logit (..., 1); of a `self_critic` alone."""
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
            embedding_std=0.3,  # as the super-resolution's
            zero=("self_conditioning.ff.net.2",),
            residual=("to_out.0", "mlp.2"),
            depth=self.config.num_hidden_layers,
        )


class MaskGitLayer(Block):
    """Self-attention, attention over the text, MLP, pre-norm."""

    def __init__(self, config: MaskGitConfig) -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.norm1, self.norm2, self.norm3 = (RMSNorm(width, eps) for _ in range(3))
        self.attn1, self.attn2 = (_attention(config) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(width, inner, bias=False),
            nn.GELU(),
            nn.Linear(inner, width, bias=False),
            nn.Dropout(config.dropout),
        )

    def prepare(self, *context: Tensor) -> Prepared:
        text_BTD, bias_B11T = context
        return (*self.attn2.keys_values(text_BTD), bias_B11T)

    def forward(self, x_BhwD: Tensor, *prepared: Tensor, at_BM: Tensor | None = None) -> Tensor:
        key, value, bias = prepared
        normed = self.norm1(x_BhwD)
        own = self.attn1.keys_values(normed)
        if at_BM is not None:
            x_BhwD, normed = cells(x_BhwD, at_BM), cells(normed, at_BM)
        x_BhwD = x_BhwD + self.attn1(normed, *own)
        x_BhwD = x_BhwD + self.attn2(self.norm2(x_BhwD), key, value, bias)
        out: Tensor = x_BhwD + self.mlp(self.norm3(x_BhwD))
        return out


def _attention(config: MaskGitConfig) -> Attention:
    eps = config.layer_norm_eps if config.qk_norm else None
    return Attention(
        config.hidden_size, config.num_attention_heads, bias=False, dropout=config.dropout, qk_norm_eps=eps
    )
