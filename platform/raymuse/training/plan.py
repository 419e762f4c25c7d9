"""What a masked training would take: parameters, work, memory by ZeRO stage.

Nothing is built: the network is an outline, and its step is counted on fake tensors. Where there
are no token shards yet, the recipe's `model` says what they would.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from raymuse.config.errors import ConfigError
from raymuse.config.training import BaseConfig, CriticConfig, GeneratorConfig, MaskedConfig, SuperresConfig
from raymuse.drawing.model_folder import trained_part
from raymuse.models.base import BaseShape, read_shape
from raymuse.models.superres import SuperResConfig
from raymuse.models.uvit import UVitConfig
from raymuse.models.weights import HUB, require_safetensors
from raymuse.storage.folder import Folder
from raymuse.training.critic import critics_shape
from raymuse.training.crops import survey_folder
from raymuse.training.loop import micro_batches
from raymuse.training.measure import CLIP_TOKENS, CLIP_WIDTHS, T5_TOKENS, Shape, Sizes, activations, outline, work
from raymuse.training.optimizers import hidden_matrices
from raymuse.training.start import base_shape, fresh_shape, grown_shape, require_fit, shape_of, superres_shape
from raymuse.training.tokens import TokenStream

BUCKET, GATHERED = 500_000_000, 1_050_000_000  # DeepSpeed's: numbers reduced at once; that ZeRO-3 holds gathered
MOMENTS = {"adamw": 8.0, "muon": 8.0, "lion": 4.0, "adamw-8bit": 2.03, "adafactor": 0.01}
"""Bytes a parameter; of Muon those that AdamW trains, its own having 4."""
PUBLISHED = {
    "amused/amused-256": UVitConfig(sample_size=16),
    "amused/amused-512": UVitConfig(sample_size=32, downsample=True, upsample=True),
}
"""Shapes that need no download."""


@dataclass(frozen=True)
class Memory:
    """Bytes that lie on a worker from step to step, at one ZeRO stage; and what a step of the optimizer adds."""

    weights: float
    gradients: float
    state: float  # moments, the average, and the copy of the weights that ZeRO updates
    buffers: float  # DeepSpeed's
    update: float

    def total(self, activations: float) -> float:
        """At the fullest moment of a step: of its passes, or of the update."""
        return self.weights + self.gradients + self.state + self.buffers + max(activations, self.update)


@dataclass(frozen=True)
class Plan:
    """The numbers of a masked training.

    Attributes:
        rows: of the token shards; None where there are none yet.
        judged: parameters of a critic's base.
        text: parameters of a text encoder that reads captions in the step.
    """

    config: MaskedConfig
    shape: Shape
    sizes: Sizes
    rows: int | None
    judged: int
    text: int

    @cached_property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self._network.parameters() if p.requires_grad)

    @cached_property
    def still(self) -> int:
        """Parameters that compute and are not trained."""
        return self.judged + self.text + sum(p.numel() for p in self._network.parameters() if not p.requires_grad)

    @cached_property
    def moments(self) -> float:
        """Bytes that the optimizer keeps."""
        name = self.config.optimizer.name
        muon = sum(p.numel() for p in hidden_matrices(self._network)) if name == "muon" else 0
        return MOMENTS[name] * (self.trained - muon) + 4.0 * muon

    @cached_property
    def flops(self) -> float:
        """Of a sample's passes, as the mathematics has them: without what gradient checkpointing repeats."""
        return work(self.config, self.shape, self.sizes)

    def activations(self, recompute: bool) -> float:
        """Bytes of a micro batch's passes at their fullest, were all ids masked."""
        return activations(self.shape, self.sizes, self._adapter, recompute, self.config.precision)

    def memory(self, stage: int) -> Memory:
        """At that ZeRO stage, or with plain data parallelism (0)."""
        count, parts = 4.0 * self.trained, max(1, self.config.workers)
        offload = self.config.zero.offload and stage in (1, 2)
        zero = self.config.zero.model_copy(update={"stage": stage, "offload": offload})
        exact = stage < 3 and self.config.model_copy(update={"zero": zero}).exact
        average = count if self.config.ema_decay else 0.0
        state = self.moments + average + (count if stage in (1, 2) else 0.0)
        gathered = 4.0 * min(self.trained + self.still, GATHERED) if stage == 3 else 0.0
        return Memory(
            weights=(count + 4.0 * (self.still - self.text)) / (parts if stage == 3 else 1) + 4.0 * self.text,
            gradients=4 * count if exact else count / (parts if stage >= 2 else 1),
            state=0.0 if offload else state / (parts if stage >= 1 else 1),
            buffers=(4.0 * BUCKET if stage >= 1 else 0.0) + gathered,
            update=0.0 if offload else 2 * count / parts if stage else count,
        )

    @property
    def _adapter(self) -> Any:
        return self.config.lora if isinstance(self.config, GeneratorConfig) else None

    @cached_property
    def _network(self) -> nn.Module:
        return outline(self.shape, self._adapter)


def plan_of(config: MaskedConfig) -> Plan:
    """The plan of a masked training.

    Raises:
        ConfigError, UserError: for a shape or model that there is not, or that does not fit the token shards.
    """
    bare = config.model_copy(update={"shard_cache": None})  # a plan leaves no copies behind
    stream = TokenStream(bare, "cpu") if _readable(config) else None
    shape = _shape(config, stream)
    side = shape.high_grid if isinstance(shape, SuperResConfig) else shape.sample_size
    low = shape.low_grid if isinstance(shape, SuperResConfig) else 1
    rows, text = None, 0
    if stream is None:
        told = CLIP_TOKENS if shape.encoder_hidden_size in CLIP_WIDTHS else T5_TOKENS
        grid, lows = (side, side), (low, low)
    else:
        told, grid, rows = int(stream.empty_states.shape[1]), stream.grid, len(stream.store)
        lows = stream.store.grid("low_ids") if isinstance(shape, SuperResConfig) else (1, 1)
        text = 0 if stream.text is None else sum(p.numel() for p in stream.text.network.parameters())
    # The base has a head of its own, a few of its many parameters.
    judged = sum(p.numel() for p in outline(shape, None).parameters()) if isinstance(config, CriticConfig) else 0
    micro = micro_batches(config, max(1, config.workers))[0]
    return Plan(config, shape, Sizes(micro, grid, told, low=lows), rows, judged, text)


def _shape(config: MaskedConfig, stream: TokenStream | None) -> Shape:
    if isinstance(config, CriticConfig):
        base = read_shape(_record(trained_part(config.base, "transformer")))
        kind = type(base)
        if stream is not None:
            require_fit(config.base, base, base_shape(stream, kind), config.source)
        made: Shape = shape_of(kind, config, critics_shape(base))
        return made
    assert isinstance(config, BaseConfig | SuperresConfig)
    if isinstance(config, SuperresConfig):
        return fresh_shape(config, stream) if config.start_from is None else _started_superres(config, stream)
    if config.start_from is not None:
        return _started_base(config, config.start_from, stream)
    if stream is None and "sample_size" not in config.model:
        raise ConfigError(
            config.stage,
            [
                f"{_lacking(config)}; to plan without them, model.sample_size must say the side of the "
                "grid, and model.encoder_hidden_size the width of the text"
            ],
        )
    return fresh_shape(config, stream)


def _lacking(config: MaskedConfig) -> str:
    if config.stream is None:
        return f"input: there are no token shards at {config.input}"
    return f"stream: there are no pictures of {config.source} surveyed at {survey_folder(config)}"


def _started_superres(config: SuperresConfig, stream: TokenStream | None) -> SuperResConfig:
    shape = SuperResConfig.from_dict(_record(_folder(str(config.start_from), "superres")))
    if stream is not None:
        require_fit(str(config.start_from), shape, superres_shape(stream), config.source)
    return shape


def _started_base(config: BaseConfig, address: str, stream: TokenStream | None) -> BaseShape:
    """The shape of a base that a training starts from; published ones are known."""
    name = address.removeprefix(HUB)
    shape: BaseShape
    if name in PUBLISHED and not Path(address).exists():
        shape = PUBLISHED[name]
    else:
        shape = read_shape(_record(_folder(address, "transformer")))
    if stream is not None:
        require_fit(address, shape, base_shape(stream, type(shape)), config.source)
    side = config.model.get("sample_size", shape.sample_size) if stream is None else stream.grid[0]
    return grown_shape(shape, config, side)


def _folder(address: str, part: str) -> Path:
    root, subfolder = require_safetensors(address, part)
    return Path(root, subfolder or "")


def _record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def _readable(config: MaskedConfig) -> bool:
    """Whether there is data to plan by: token shards, or a survey of pictures."""
    if config.stream is not None:
        return Folder(survey_folder(config)).exists("survey.json")
    return _exists(config.input)


def _exists(address: str) -> bool:
    return Folder(address).exists("_SUCCESS") or Folder(address).exists("_manifest") or Path(address).exists()
