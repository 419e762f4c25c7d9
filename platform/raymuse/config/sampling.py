"""How ids are drawn.

A new option is a field of `SamplingConfig` and, for type checkers, of `Options`: prompts' columns, the HTTP API, sweeps
and comparisons have their fields from there.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self, TypedDict, TypeVar

from pydantic import BaseModel, Field, create_model, model_validator
from pydantic.fields import FieldInfo

from raymuse.config.base import Config

# Names of masking.SCHEDULES, masking.GUIDANCE_SCHEDULES and of what `sampler` keeps first, so that a wrong one is said
# with the config and not at the first draw.
MaskingSchedule = Literal["cosine", "linear", "arccos", "square", "root", "power", "sigmoid"]
GuidanceSchedule = Literal["constant", "linear", "cosine"]
Order = Literal["confidence", "critic", "halton", "random"]
Decode = Literal["drawn", "mean"]


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
    masking: MaskingSchedule = Field("cosine", description="schedule of the share that is masked")
    order: Order = Field("confidence", description="which ids are kept first")
    guidance_every: int = Field(
        1, ge=1, description="2: what guidance adds is computed at every second step that has it, and kept in between"
    )
    masked_only: bool = Field(False, description="compute what only unknown ids need for these alone")
    decode: Decode = Field(
        "drawn", description="of each cell the code that was drawn, or the mean of all by their probabilities then"
    )

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
    decode: Decode


RUN_ALONE = frozenset({"guidance_every", "masked_only"})
"""Options of a whole run: no row of prompts and no request has its own."""

REQUESTED = tuple(
    name for name in SamplingConfig.model_fields if name not in {"steps", "guidance", "guidance_span"} | RUN_ALONE
)
"""Options that a row of prompts and a request may have under their own names."""

M = TypeVar("M", bound=BaseModel)


def own_or_none(field: FieldInfo) -> Any:
    """The type of a field that is an option, or None: as the model has it."""
    kind: Any = field.annotation
    return Annotated[(kind | None, Field(description=field.description), *field.metadata)]


def with_options(
    kind: Callable[[FieldInfo], Any] = own_or_none, names: Iterable[str] = tuple(SamplingConfig.model_fields)
) -> Callable[[type[M]], type[M]]:
    """Gives a class of settings the options of `SamplingConfig` as fields, each None by default.

    Args:
        kind: an option's type there.
        names: of the options. Fields that the class declares itself stay as they are.
    """

    def extended(settings: type[M]) -> type[M]:
        options = {name: SamplingConfig.model_fields[name] for name in names if name not in settings.model_fields}
        fields: dict[str, Any] = {name: (kind(field), None) for name, field in options.items()}
        return create_model(
            settings.__name__,
            __base__=settings,
            __module__=settings.__module__,
            __doc__=settings.__doc__,
            **fields,
        )

    return extended


def given_options(settings: BaseModel, names: Iterable[str] = tuple(SamplingConfig.model_fields)) -> dict[str, Any]:
    """The options that such settings give, by name."""
    values = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
