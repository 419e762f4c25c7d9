"""What a step of a masked training takes, found without taking it: its passes run on tensors that have no numbers.

PyTorch's meta and fake tensors know shapes, dtypes and storages alone; fake ones, at twice the cost, also on which
device they would lie, which autocast goes by. So the real network, with its real backward pass and recomputation, is
counted operation by operation on a machine that could not hold it. Work and memory grow by the same amount a layer: two
shallow networks are run, and the rest is a straight line.

B samples, h w grid, T text tokens, E text width, P pooled width, K codes.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from raymuse.config.training import CriticConfig, GeneratorConfig, LoraConfig, MaskedConfig, Precision
from raymuse.masking import mean_masking_ratio
from raymuse.models import lora
from raymuse.models.base import Base, BaseShape, new_base
from raymuse.models.superres import SuperRes, SuperResConfig

Shape = BaseShape | SuperResConfig
CLIP_TOKENS, T5_TOKENS, CLIP_WIDTHS = 77, 256, (768, 1024, 1280)
SHALLOW = 1, 2  # layers of the networks that are run


@dataclass(frozen=True)
class Sizes:
    """What is put into a network at once.

    Attributes:
        masked: share of the ids that are masked, and so have logits.
        low: grid of the low-res ids, of a super-resolution.
    """

    batch: int
    grid: tuple[int, int]
    text_tokens: int
    masked: float = 1.0
    low: tuple[int, int] = (1, 1)


def outline(shape: Shape, adapter: LoraConfig | None) -> Base | SuperRes:
    """A network without numbers (on the meta device), with a LoRA where there is one."""
    with torch.device("meta"):
        network: Base | SuperRes = SuperRes(shape) if isinstance(shape, SuperResConfig) else new_base(shape)
        if adapter is not None:
            lora.insert(network, adapter.rank, adapter.alpha, adapter.targets, 0)
    return network


@lru_cache(maxsize=64)
def flops(shape: Shape, sizes: Sizes, adapter: LoraConfig | None, recompute: bool, backward: bool = True) -> float:
    """Floating-point operations (a multiply-add is two) of a forward and backward pass, or a forward pass alone."""

    def count(network: Base | SuperRes) -> float:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _step(network, sizes, "fp32", backward)
        return float(counter.get_total_flops())

    return _over_layers(shape, adapter, recompute, count)


def work(config: MaskedConfig, shape: Shape, sizes: Sizes) -> float:
    """Floating-point operations of a sample's passes in a training, without what gradient checkpointing repeats.

    As many ids have logits as are masked in the mean over the training's draws; all where known ids count as well.
    """
    generator = config if isinstance(config, GeneratorConfig) else None
    whole = generator is None or generator.unmasked_weight > 0
    masked = 1.0 if whole else mean_masking_ratio(config.masking, config.min_masking_ratio)
    one = replace(sizes, batch=1, masked=masked)
    found = flops(shape, one, None if generator is None else generator.lora, recompute=False)
    if isinstance(config, CriticConfig):
        found += flops(shape, one, None, recompute=False, backward=False)  # the base, of the same shape
    return found


@lru_cache(maxsize=64)
def activations(shape: Shape, sizes: Sizes, adapter: LoraConfig | None, recompute: bool, precision: Precision) -> float:
    """Bytes at the fullest moment of a step beside the weights and their gradients, which lie there before."""

    def peak(network: Base | SuperRes) -> float:
        with FakeTensorMode():
            _to_fakes(network)
            held = [*network.parameters()]
            for parameter in held:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
                    held.append(parameter.grad)  # type: ignore[arg-type]
            with _Living(held) as living:
                _step(network, sizes, precision, True)
        return float(living.peak)

    return _over_layers(shape, adapter, recompute, peak)


def _over_layers(
    shape: Shape, adapter: LoraConfig | None, recompute: bool, measure: Callable[[Base | SuperRes], float]
) -> float:
    """The measure of the whole network, along the line through two shallow ones."""
    found = []
    for layers in SHALLOW:
        network = outline(replace(shape, num_hidden_layers=layers), adapter)
        network.gradient_checkpointing = recompute
        found.append(measure(network))
    first, second = found
    return first + (shape.num_hidden_layers - SHALLOW[0]) * (second - first)


def _to_fakes(network: nn.Module) -> None:
    """Fake tensors of the CPU in the place of the weights; inside a FakeTensorMode."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)


def _step(network: Base | SuperRes, sizes: Sizes, precision: Precision, backward: bool) -> None:
    """The passes of `MaskedLoss`, its metrics included."""
    shape, batch = network.config, sizes.batch
    states_BTE = torch.zeros(batch, sizes.text_tokens, shape.encoder_hidden_size)
    ids_Bhw = torch.zeros(batch, *sizes.grid, dtype=torch.int64)
    count = round(ids_Bhw.numel() * sizes.masked)
    places = torch.zeros(count, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"), _no_grad_unless(backward):
        told: Any
        if isinstance(network, SuperRes):
            told = network.condition(states_BTE, torch.zeros(batch, *sizes.low, dtype=torch.int64))
        else:
            pooled_BP = torch.zeros(batch, getattr(shape, "cond_embed_dim", 1))
            told = network.condition(states_BTE, pooled_BP, torch.zeros(batch, 5))
        before: Tensor | None = None
        if shape.self_conditioning:
            with torch.no_grad():
                before = network.features(ids_Bhw, told)
        features: Tensor = network.features(ids_Bhw, told, None, before)
        logits_NK = network.head(features.flatten(0, 2)[places]).float()
        if shape.codebook_size == 1:
            loss = F.binary_cross_entropy_with_logits(logits_NK[:, 0], logits_NK[:, 0].detach(), reduction="sum")
        else:
            loss = F.cross_entropy(logits_NK, places, reduction="sum")
            log_probabilities = logits_NK.detach().log_softmax(dim=-1)
            _ = (log_probabilities.exp() * log_probabilities).sum()
            del log_probabilities
        if not isinstance(network, SuperRes) and network.critic_head is not None:
            judged = network.judge(network.features(ids_Bhw, told))[..., 0].float()
            loss = loss + F.binary_cross_entropy_with_logits(judged, judged.detach(), reduction="sum")
    if backward:
        loss.backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _no_grad_unless(backward: bool) -> Iterator[None]:
    with torch.set_grad_enabled(backward):
        yield


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are made inside and still referred to; those of `held` are not counted."""

    def __init__(self, held: list[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # autocast asks it of every tensor: more than half of all calls
            return args[0].fake_device
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return made

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size
