"""Trained parts to one model folder."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raymuse.config.base import Address, AddressMark, Config, MaskingSchedule, StageConfig


class SamplingConfig(Config):
    """How a model draws by default; stored with it, since the best values belong to the weights."""

    steps: int = Field(12, ge=1)
    guidance: float = Field(4.0, ge=0, description="1: no guidance; logits = uncond + guidance (cond - uncond)")
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="rises over the steps")
    guidance_span: tuple[float, float] = Field((0.0, 1.0), description="share of the steps with guidance: from, to")
    temperature: float = Field(2.0, ge=0, description="Gumbel noise on the confidence at the first step")
    end_temperature: float = Field(0.0, ge=0, description="the same at the last step; linear between")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest codes that together have this share")
    top_k: int = Field(0, ge=0, description="draw among so many of the likeliest codes; 0: all")
    masking: MaskingSchedule = "cosine"
    order: Literal["confidence", "halton", "random"] = Field("confidence", description="which ids are kept first")

    @model_validator(mode="after")
    def _span_has_an_inside(self) -> Self:
        first, last = self.guidance_span
        if not 0 <= first <= last <= 1:
            raise ValueError(f"guidance_span {first:g}, {last:g}: two shares of the steps, 0 <= from <= to <= 1")
        return self


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
