"""A device that is not the CPU, on a machine without one: its tensors hold CPU tensors, and no operation takes both.

As a GPU does, it refuses an operation on tensors of the CPU and its own (numbers without dimensions aside), `numpy()`
of its own, and what the CPU's own kernels alone can do. So code that runs on it moves what it should. It says nothing
of a GPU's numbers, memory or speed. PyTorch knows it by a name that it has for a backend that is not built in.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

ELSEWHERE = "lazy"  # of PyTorch's names for devices, one whose backward pass runs in the CPU's thread
_aten = torch.ops.aten
_MOVE = (_aten._to_copy.default, _aten.copy_.default)
_TAKE = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)  # whose indices may lie on the CPU


class There(Tensor):
    """A tensor elsewhere."""

    held: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        like = {"strides": held.stride(), "dtype": held.dtype, "requires_grad": held.requires_grad}
        made: There = Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(ELSEWHERE), **like)
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()  # PyTorch has none for a class of its user

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees what makes tensors as well, which none of `There` is part of."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in given if isinstance(tensor, There)]
    if there and function not in _MOVE:
        beside = args[:1] if function in _TAKE else given
        here = [
            tuple(one.shape) for one in beside if isinstance(one, Tensor) and not isinstance(one, There) and one.dim()
        ]
        if here:
            raise RuntimeError(f"{function} on tensors elsewhere and on the CPU; these of shapes {here} are on the CPU")
    device = kwargs.get("device")
    stays_there = bool(there) if device is None else torch.device(device).type == ELSEWHERE
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    out = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if function is _aten.copy_.default:
        return args[0]
    same = {id(_held(tensor)): tensor for tensor in given}  # what works in place gives back what it was given

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else There(value) if stays_there else value

    return tree_map(placed, out)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, There) else value


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside, `ELSEWHERE` is a device that tensors and modules can be moved to."""
    supported, autocast = optimizer._get_fused_kernels_supported_devices, torch.autocast
    flatten, save = safetensors.torch._flatten_as_ptr, PreTrainedModel.save_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*supported(), ELSEWHERE])
        patch.setattr(torch, "autocast", lambda kind, *a, **k: autocast("cpu" if kind == ELSEWHERE else kind, *a, **k))
        patch.setattr(torch, ELSEWHERE, torch.cpu, raising=False)  # recomputation asks for its random numbers' state
        # These two write what lies on a GPU as well.
        patch.setattr(safetensors.torch, "_flatten_as_ptr", lambda state, *a: flatten(tree_map(_held, state), *a))
        patch.setattr(PreTrainedModel, "save_pretrained", lambda self, *a, **k: save(_on_cpu(self), *a, **k))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes it on the CPU and moves it
        try:
            with _Everywhere():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def _on_cpu(network: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(network).to("cpu")
