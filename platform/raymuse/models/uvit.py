"""aMUSEd's base transformer: masked image-token ids and text to logits over the codebook.

Shape legend, used in names: B batch, h w token grid, T text tokens, E text width, P pooled text width,
C channels of the convolution blocks (`block_out_channels`), D transformer width (`hidden_size`), K codebook size.

Source: aMUSEd (Patil et al., arXiv 2401.01808), a U-ViT (Hoogeboom et al., arXiv 2301.11093) over token ids.
Parameter names and shapes are those of diffusers' `UVit2DModel`, so that checkpoints move both ways.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from raymuse.models.layers import (
    Block,
    CriticHead,
    Prepared,
    RMSNorm,
    SelfConditioning,
    cells,
    initialise_weights,
    run_blocks,
)
from raymuse.models.uvit_blocks import ConditionEmbedding, ConvStage, TokenEmbedding, TransformerLayer, UVitHead
from raymuse.models.uvit_shape import UVitConfig as UVitConfig  # a network and its shape go together


class Condition(NamedTuple):
    """What a UVit knows beside the ids; constant over the sampling steps. First axes are the batch."""

    text: Tensor  # (B, T, D), projected and normed text states
    embedding: Tensor  # (B, D), pooled text and micro-conditions: the input of every adaptive norm
    prepared: tuple[Prepared, ...] = ()  # per block, filled by UVit.precompute; empty while training


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
        self.mlm_layer = UVitHead(config)
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


def sinusoids(values: Tensor, size: int) -> Tensor:
    """Cosines then sines of `values` (...) at `size / 2` frequencies from 1 down to 1/10000: (..., size), fp32.

    Vaswani et al., arXiv 1706.03762, section 3.5. In half precision a pixel size's phase is off by whole radians.
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    phases = values.float()[..., None] * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([phases.cos(), phases.sin()], dim=-1)
