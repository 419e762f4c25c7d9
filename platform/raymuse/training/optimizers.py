"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from raymuse.config.training import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and kernels only: not on biases, norms or embeddings."""
    kept = [p for p in model.parameters() if p.requires_grad]
    plain = {id(p) for p in _undecayed(model)}
    groups = [
        {"params": [p for p in kept if id(p) not in plain], "weight_decay": config.weight_decay},
        {"params": [p for p in kept if id(p) in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


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
