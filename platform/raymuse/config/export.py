"""Trained parts to one model folder."""

from typing import Literal

from pydantic import Field

from raymuse.config.base import Address, StageConfig, runtime
from raymuse.config.drawing import LoraChoice
from raymuse.config.sampling import SamplingConfig


class ExportConfig(StageConfig, LoraChoice):
    """Assemble VQGAN, text encoder and transformers in diffusers' layout, with a model card."""

    stage: Literal["export"] = "export"
    vqgan: Address
    text_encoder: Address
    base: Address = Field(description="output of train-base, or a model folder")
    superres: Address | None = Field(None, description="output of train-superres, or a model folder")
    superres_vqgan: Address | None = Field(
        None, description="whose ids the super-resolution draws, where they are not those of `vqgan`"
    )
    critic: Address | None = Field(None, description="output of train-critic, or a model folder")
    weights: Literal["ema", "raw"] = "ema"
    variants: tuple[Literal["fp16", "bf16"], ...] = Field(
        (), description="the weights once more in these, as NAME.fp16.safetensors: opened with variant="
    )
    lora_apart: bool = Field(False, description="put the LoRAs into lora/ of the folder, and not into the weights")
    licence: str | None = runtime(None, "on the model card, as the Hub knows it, such as apache-2.0")
    scores: Address | None = Field(None, description="output of score, for the model card")
    push_to: str | None = runtime(
        None, "owner/name on the Hugging Face Hub to send the folder to", pattern=r"^[\w.-]+/[\w.-]+$"
    )
    push_private: bool = runtime(True, "make it a private repository, where there is none yet")
    name: str = Field("raymuse-model", description="name on the model card and in the registry")
    alias: str | None = runtime(
        None, "put the model into MLflow's registry, where a server is named, as the version that this alias means"
    )
    micro_conditioning: tuple[float, float, float, float, float] | None = Field(
        None, description="width, height, crop top, crop left, aesthetic; null: the drawn size, 0, 0, 6"
    )
    base_sampling: SamplingConfig = SamplingConfig()
    superres_sampling: SamplingConfig = SamplingConfig(steps=8)
