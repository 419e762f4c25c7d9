"""Norms of few passes give what PyTorch's own operations give, and their gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raymuse.models.norms import response_norm, rms_norm

EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def response_norm_by_definition(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """ConvNeXt V2, Algorithm 1, without its residual."""
    strength = x.square().sum((1, 2), keepdim=True).sqrt()
    return gamma * (x * (strength / (strength.mean(-1, keepdim=True) + EPS))) + beta + x


def test_gradients_are_the_slopes() -> None:
    x, weight, gamma, beta = draw(2, 3, 4, 5), draw(5), draw(1, 1, 1, 5, seed=1), draw(1, 1, 1, 5, seed=2)
    assert torch.autograd.gradcheck(lambda *given: rms_norm(*given, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, EPS), (x,))
    assert torch.autograd.gradcheck(response_norm, (x, gamma, beta))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_is_that_of_pytorch(dtype: torch.dtype, near: float, weighted: bool) -> None:
    x, weight = draw(8, 6, 96, dtype=dtype), draw(96, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    own = weight if weighted else None
    out = rms_norm(x, own, EPS)
    exact = F.rms_norm(x.double(), (96,), None if own is None else own.double(), EPS)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=near, atol=near)
    grads = torch.autograd.grad(out.double().square().sum(), [x, weight][: 1 + weighted])
    wanted = torch.autograd.grad(exact.square().sum(), [x, weight][: 1 + weighted])
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=4 * near, atol=100 * near)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_response_norm_is_its_definition(dtype: torch.dtype, near: float) -> None:
    x = draw(3, 4, 5, 24, dtype=dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, beta = draw(1, 1, 1, 24, dtype=kind, seed=1), draw(1, 1, 1, 24, dtype=kind, seed=2)
    out = response_norm(x, gamma, beta)
    exact = response_norm_by_definition(x.double(), gamma.double(), beta.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=near, atol=near)
    given = [x, gamma, beta]
    grads = torch.autograd.grad(out.double().square().sum(), given)
    wanted = torch.autograd.grad(exact.square().sum(), given)
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=4 * near, atol=100 * near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("strength", [0.0, 1e-4])
def test_a_channel_of_next_to_nothing_stays_finite(dtype: torch.dtype, strength: float) -> None:
    x = (draw(2, 3, 3, 4).detach() * torch.tensor([1.0, strength, 1.0, 1.0])).to(dtype).requires_grad_()
    gamma, beta = draw(1, 1, 1, 4, dtype=torch.float32, seed=1), draw(1, 1, 1, 4, dtype=torch.float32, seed=2)
    out = response_norm(x, gamma, beta)
    for grad in torch.autograd.grad(out.float().square().sum(), (x, gamma, beta)):
        assert grad.isfinite().all()
