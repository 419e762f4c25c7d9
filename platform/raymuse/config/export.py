"""Trained parts to one model folder."""

from typing import Annotated, Literal

from pydantic import Field

from raymuse.config.base import Address, AddressMark, Config, MaskingSchedule, StageConfig


class SamplingConfig(Config):
    """How a model draws by default; stored with it, since the best values belong to the weights."""

    steps: int = Field(12, ge=1)
    guidance: float = Field(4.0, ge=0, description="1: no guidance; logits = uncond + guidance (cond - uncond)")
    temperature: float = Field(2.0, ge=0, description="Gumbel noise on the confidence at the first step, falling to 0")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest codes that together have this share")
    masking: MaskingSchedule = "cosine"


class ExportConfig(StageConfig):
    """Assemble VQGAN, text encoder and transformers in diffusers' layout, with a model card."""

    stage: Literal["export"] = "export"
    vqgan: Address
    text_encoder: Address
    base: Address = Field(description="output of train-base")
    superres: Annotated[str, AddressMark()] | None = Field(None, description="output of train-superres")
    weights: Literal["ema", "raw"] = "ema"
    name: str = Field("raymuse-model", description="name on the model card and in the registry")
    micro_conditioning: tuple[float, float, float, float, float] | None = Field(
        None, description="width, height, crop top, crop left, aesthetic; None: the drawn size, 0, 0, 6"
    )
    base_sampling: SamplingConfig = SamplingConfig()
    superres_sampling: SamplingConfig = SamplingConfig(steps=8)
