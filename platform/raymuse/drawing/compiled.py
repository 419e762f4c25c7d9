"""A transformer whose blocks are compiled: fewer and fused kernels, for seconds of compilation at their first use."""

import copy
import os
import shutil
from typing import TypeVar

from torch import nn

from raymuse.config.errors import UserError
from raymuse.models.layers import Block

N = TypeVar("N", bound=nn.Module)


def compile_blocks(network: N, backend: str) -> N:
    """A copy with compiled blocks; it shares the weights.

    Blocks of one kind are compiled once for all of them, and again for every other shape of their input.

    Args:
        backend: of `torch.compile`.

    Raises:
        UserError: where there is no C++ compiler, which "inductor" calls on a CPU.
    """
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if backend == "inductor" and not any(name and shutil.which(name) for name in compilers):
        raise UserError("compiling needs a C++ compiler, and there is none on the PATH: install g++, or draw without.")
    weights = list(network.parameters())
    compiled = copy.deepcopy(network, {id(weight): weight for weight in weights})
    for module in compiled.modules():
        if isinstance(module, Block):
            module.compile(backend=backend, fullgraph=True, dynamic=False)
    return compiled


def is_compiled(network: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in network.modules())
