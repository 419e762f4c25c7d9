"""Norms as autograd functions of few passes over memory: on a CPU these, and not arithmetic, are their time.

Left to PyTorch's own operations, each norm of a training step goes a dozen times over a tensor that does not fit the
cache, and the norms together take a quarter of the step. Statistics are in fp32 (fp64 for fp64), results in x's dtype.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

_LEAST = 1e-12  # strength of a channel that is 0 throughout


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last axis, as `torch.nn.functional.rms_norm` has it."""
    return cast(Tensor, _RmsNorm.apply(x, weight, eps))  # type: ignore[no-untyped-call]


def response_norm(x_BhwC: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """`x (1 + gamma n_c / mean(n_c)) + beta`, n_c a channel's norm over the grid (ConvNeXt V2, section 3).

    gamma, beta: (1, 1, 1, C).
    """
    return cast(Tensor, _ResponseNorm.apply(x_BhwC, gamma, beta))  # type: ignore[no-untyped-call]


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_exact(x))
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed: Tensor = (x * inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return normed if weight is None else normed * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        normed, inverse, weight = ctx.saved_tensors
        along, by_weight = grad * normed, None
        if weight is None:
            share = along.sum(-1, keepdim=True, dtype=inverse.dtype)
        else:
            by_weight = along.flatten(0, -2).sum(0, dtype=inverse.dtype).to(weight.dtype)
            share = (along.to(weight.dtype) @ weight)[..., None].to(inverse.dtype)
            grad = grad * weight.to(grad.dtype)
        return torch.addcmul(grad, normed, share.div_(-normed.shape[-1])).mul_(inverse).to(grad.dtype), by_weight, None


class _ResponseNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        # The sum of squares by hand: vector_norm over inner axes is 15 times slower on a CPU.
        strength = x.to(_exact(x)).square().sum((1, 2), keepdim=True).sqrt_().clamp_(min=_LEAST)
        mean = strength.mean(-1, keepdim=True).add_(1e-6)
        ctx.save_for_backward(x, gamma, strength, mean)
        return torch.addcmul(beta.to(x.dtype), x, (1 + gamma * (strength / mean)).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        x, gamma, strength, mean = ctx.saved_tensors
        relative = strength / mean
        of_scale = (grad * x).sum((1, 2), keepdim=True, dtype=strength.dtype)
        of_relative = of_scale * gamma
        of_mean = (of_relative * relative).sum(-1, keepdim=True) / strength.shape[-1]
        # Of each channel's own values; in fp16 it would overflow. None at the least strength, where the slope ends.
        pull = ((of_relative - of_mean) / (mean * strength)).where(strength > _LEAST, 0.0)
        by_x = torch.addcmul(grad * (1 + gamma * relative).to(x.dtype), x, pull).to(x.dtype)
        by_gamma = (of_scale * relative).sum(0, keepdim=True).to(gamma.dtype)
        return by_x, by_gamma, grad.sum((0, 1, 2), dtype=strength.dtype).to(gamma.dtype).view_as(gamma)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
