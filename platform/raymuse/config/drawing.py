"""Who draws: a model folder, and the LoRAs that are merged into it."""

from typing import Literal

from pydantic import Field, model_validator

from raymuse.config.base import Address, Config, runtime

DrawPrecision = Literal["fp32", "bf16", "fp16"]


class LoraChoice(Config):
    """LoRAs and how much of each."""

    lora: Address | tuple[Address, ...] = Field(
        (), description="LoRA to merge: `model` of a training with lora, or peft's or diffusers'; several as a list"
    )
    lora_scales: float | tuple[float, ...] = Field(1.0, description="how much of each: one for all, or a list")

    @model_validator(mode="after")
    def _one_scale_each(self) -> "LoraChoice":
        if isinstance(self.lora_scales, tuple) and len(self.lora_scales) != len(self._loras):
            raise ValueError(f"{len(self._loras)} in lora and {len(self.lora_scales)} in lora_scales: give one each")
        return self

    @model_validator(mode="after")
    def _each_once(self) -> "LoraChoice":
        if len(set(self._loras)) < len(self._loras):
            raise ValueError(f"lora names one of {', '.join(self._loras)} twice")
        return self

    @property
    def adapters(self) -> dict[str, float]:
        """Address and scale of every LoRA."""
        scales = self.lora_scales if isinstance(self.lora_scales, tuple) else [self.lora_scales] * len(self._loras)
        return dict(zip(self._loras, scales, strict=True))

    @property
    def _loras(self) -> tuple[str, ...]:
        return (self.lora,) if isinstance(self.lora, str) else self.lora


class DrawingConfig(LoraChoice):
    """What every config that draws has."""

    model: Address = Field(description="model folder")


class PrecisionChoice(Config):
    """Of configs that say how exactly is drawn."""

    precision: DrawPrecision = Field("fp32", description="of the transformers; VQGAN and text encoder are fp32 always")


class GraphsChoice(Config):
    """How the kernels of a sampling step are started; the pictures are the same."""

    cuda_graphs: bool = runtime(False, "start each sampling step's kernels by one call; needs gpus_per_replica")
    traced: bool = runtime(False, "record the transformers' operations once and repeat them without Python between")

    @model_validator(mode="after")
    def _graphs_need_a_gpu(self) -> "GraphsChoice":
        if self.cuda_graphs and not getattr(self, "gpus_per_replica", 0):
            raise ValueError("cuda_graphs=true needs a GPU: set gpus_per_replica, too")
        if self.cuda_graphs and self.traced:
            raise ValueError("traced=true does what cuda_graphs=true does already: take one of the two")
        return self
