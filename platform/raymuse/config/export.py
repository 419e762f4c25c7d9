"""Trained parts to one model folder."""

from typing import Annotated, Literal

from pydantic import Field

from raymuse.config.base import Address, AddressMark, StageConfig, runtime
from raymuse.config.drawing import LoraChoice
from raymuse.config.sampling import SamplingConfig


class ExportConfig(StageConfig, LoraChoice):
    """Assemble VQGAN, text encoder and transformers in diffusers' layout, with a model card."""

    stage: Literal["export"] = "export"
    vqgan: Address
    text_encoder: Address
    base: Address = Field(description="output of train-base, or a model folder")
    superres: Annotated[str, AddressMark()] | None = Field(
        None, description="output of train-superres, or a model folder"
    )
    critic: Annotated[str, AddressMark()] | None = Field(None, description="output of train-critic, or a model folder")
    weights: Literal["ema", "raw"] = "ema"
    name: str = Field("raymuse-model", description="name on the model card and in the registry")
    alias: str | None = runtime(
        None, "put the model into MLflow's registry, where a server is named, as the version that this alias means"
    )
    micro_conditioning: tuple[float, float, float, float, float] | None = Field(
        None, description="width, height, crop top, crop left, aesthetic; None: the drawn size, 0, 0, 6"
    )
    base_sampling: SamplingConfig = SamplingConfig()
    superres_sampling: SamplingConfig = SamplingConfig(steps=8)
