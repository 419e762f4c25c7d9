"""How ids are drawn."""

from typing import Literal, Self, TypedDict

from pydantic import Field, model_validator

from raymuse.config.base import Config

# Names of masking.SCHEDULES, masking.GUIDANCE_SCHEDULES and of what `sampler` keeps first, so that a wrong one is said
# with the config and not at the first draw.
MaskingSchedule = Literal["cosine", "linear", "arccos", "square", "root", "power", "sigmoid"]
GuidanceSchedule = Literal["constant", "linear", "cosine"]
Order = Literal["confidence", "critic", "halton", "random"]


class SamplingConfig(Config):
    """How a model draws by default; stored with it, since the best values belong to the weights."""

    steps: int = Field(12, ge=1)
    guidance: float = Field(4.0, ge=0, description="1: no guidance; logits = uncond + guidance (cond - uncond)")
    guidance_schedule: GuidanceSchedule = Field("constant", description="rises over the steps")
    guidance_span: tuple[float, float] = Field((0.0, 1.0), description="share of the steps with guidance: from, to")
    temperature: float = Field(2.0, ge=0, description="Gumbel noise on the confidence at the first step")
    end_temperature: float = Field(0.0, ge=0, description="the same at the last step; linear between")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest codes that together have this share")
    top_k: int = Field(0, ge=0, description="draw among so many of the likeliest codes; 0: all")
    masking: MaskingSchedule = "cosine"
    order: Order = Field("confidence", description="which ids are kept first")
    guidance_every: int = Field(
        1, ge=1, description="2: what guidance adds is computed at every second step that has it, and kept in between"
    )
    masked_only: bool = Field(False, description="compute what only unknown ids need for these alone")

    @model_validator(mode="after")
    def _span_has_an_inside(self) -> Self:
        first, last = self.guidance_span
        if not 0 <= first <= last <= 1:
            raise ValueError(f"guidance_span {first:g}, {last:g}: two shares of the steps, 0 <= from <= to <= 1")
        return self


class Options(TypedDict, total=False):
    """The same for one call, where not as the model's own settings say."""

    steps: int
    guidance: float
    guidance_schedule: GuidanceSchedule
    guidance_span: tuple[float, float]
    temperature: float
    end_temperature: float
    top_p: float
    top_k: int
    masking: MaskingSchedule
    order: Order
    guidance_every: int
    masked_only: bool
