"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from raymuse.config.training import OptimizerConfig
from raymuse.training.adam8bit import build_adamw_8bit
from raymuse.training.lion import Lion
from raymuse.training.muon import Muon

FIRST_AND_LAST = (
    *("encoder.conv_in", "decoder.conv_out"),  # VQModel
    *("vision_model.embeddings.patch_embedding", "visual_projection", "text_projection"),  # CLIPModel
    "mlm_layer.conv2",  # UVit
    *("low_skip.conv", "mlm_head.logits"),  # SuperRes
    "critic_head.logit",  # UVit, MaskGit
)
"""Endings of the names of modules that read pixels or low-res ids, or whose output is the answer: AdamW trains them, as
embeddings."""


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer that the config names; weight decay on matrices and kernels only: not on biases, norms, embeddings.

    Args:
        fused: take PyTorch's fused AdamW. On a CPU it rounds the last few numbers of a tensor otherwise than the rest:
            where a shard ends changes bits.

    Raises:
        UserError: for one that is not installed.
    """
    kept = [p for p in model.parameters() if p.requires_grad]
    plain = {id(p) for p in _undecayed(model)}
    hidden = {id(p) for p in hidden_matrices(model)} if config.name == "muon" else set()
    rest = [p for p in kept if id(p) not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if id(p) not in plain], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if id(p) in plain], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    if config.name == "lion":
        return Lion(groups, lr=config.lr, betas=betas)
    if config.name == "adamw-8bit":
        return build_adamw_8bit(groups, lr=config.lr, betas=betas, eps=config.epsilon)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.epsilon, fused=fused)
    if config.name == "adamw":
        return adamw
    matrices = [p for p in kept if id(p) in hidden]
    return Muon(matrices, adamw, lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=config.weight_decay)


def hidden_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """What Muon is for: weights of linears and convolutions between the first layer and the last.

    That is, a module's `weight` of two or more dimensions, but for embeddings, for grouped convolutions (many small
    kernels side by side, no linear map of the whole input), and for the modules of `FIRST_AND_LAST`. Projections that
    are stacked in one weight (GEGLU's value and gate, an adaptive norm's scale and shift) count as the one matrix
    that they are; a transposed convolution's is (input, rest).
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or isinstance(module, nn.Embedding):
            continue
        if getattr(module, "groups", 1) == 1 and not f".{name}".endswith(tuple(f".{end}" for end in FIRST_AND_LAST)):
            yield weight


def learning_rate_scale(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the learning rate at a step (from 0): linear warm-up, then the schedule down to `final_lr`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "constant":
        return 1.0
    shape = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + (1 - config.final_lr) * shape


def _undecayed(model: nn.Module) -> Iterable[nn.Parameter]:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(module, nn.Embedding):
                yield parameter
