"""How good the pictures are."""

from typing import Annotated, Any, Literal, get_origin

from pydantic import BeforeValidator, Field, model_validator
from pydantic.fields import FieldInfo

from raymuse.config.base import Address, Config, StageConfig, runtime
from raymuse.config.drawing import DrawingConfig, LoraChoice
from raymuse.config.sampling import given_options, with_options

By = Literal["auto", "accuracy", "clip_score", "fid", "kid", "clip_fid", "vqgan_fd", "inception_score"]


class MeasuresConfig(Config):
    """What looks at the pictures, and what they are held against."""

    clip: Address | None = Field(
        None, description="CLIP with both towers, for CLIP score and CLIP-FID: folder, or hf://OWNER/NAME"
    )
    inception: Address | None = Field(
        None, description="file of FID's Inception weights, for FID, KID, precision, recall and Inception score"
    )
    judge: Literal["auto", "shapes", "none"] = Field(
        "auto", description="the exact judge of drawn shapes; auto: where the captions are of that world"
    )
    reference: Address | None = Field(
        None, description="real pictures that the drawn ones are held against as a set: shards of any kind"
    )
    statistics: Address | None = Field(
        None,
        description="file of the real pictures' statistics: written from `reference` where it is missing, else read "
        "and checked; or a .npz with mu and sigma",
    )
    trust_statistics: bool = Field(
        False, description="take a .npz with mu and sigma for those of this Inception, which the file does not say"
    )
    reference_side: int | None = Field(
        None, ge=8, description="pixels a side that real pictures are resized and cropped to; null: the drawn ones'"
    )
    kid_subsets: int = Field(100, ge=1, description="random subsets that KID is averaged over")
    kid_subset_size: int = Field(1000, ge=2, description="pictures a subset, of either side")
    neighbours: int = Field(3, ge=1, description="k of precision and recall")
    kept_features: int = Field(
        10_000, ge=2, description="pictures of either side that KID, precision and recall look at: the first so many"
    )
    batch_size: int = Field(64, ge=1)
    workers: int = runtime(1, "scoring actors; 0: this process does it, without Ray", ge=0)
    gpus_per_worker: float = runtime(0.0, "share of a GPU an actor", ge=0)

    @model_validator(mode="after")
    def _statistics_have_an_extractor(self) -> "MeasuresConfig":
        if self.trust_statistics and not (self.statistics or "").endswith(".npz"):
            raise ValueError("trust_statistics is for statistics=FILE.npz, which does not say what made it")
        return self


class ScoreConfig(StageConfig, MeasuresConfig):
    """Judge generated pictures beside ground truth and the VQGAN's round trip (the ceiling)."""

    stage: Literal["score"] = "score"
    images: Address = Field(description="output of generate")
    model: Address | None = Field(
        None, description="model folder, for the VQGAN's round trip, its features, and how its codebook is used"
    )
    truth: Address | None = Field(None, description="image shards with the prompts' true pictures")
    pictures: int | None = Field(
        None, ge=1, description="how many pictures a protocol asks for: another number is refused; null: any"
    )


class DrawnConfig(StageConfig, MeasuresConfig):
    """Pictures that are drawn to be measured at once."""

    samples: int = Field(1, ge=1, description="pictures a prompt")
    seed: int = Field(0, description="run seed, as of generate: the same seed draws the same pictures")
    negative: str = ""
    size: tuple[int, int] | None = Field(None, description="width and height in whole cells")
    pictures_per_part: int = Field(64, ge=1)
    draw_batch: int = Field(16, ge=1, description="one padded batch of drawing; part of the numerics")


def _as_choices(value: Any, several: bool) -> Any:
    """One value as the only choice of its kind; None: the model's own. `several`: a value is itself a list."""
    first = value[0] if several and value and isinstance(value, (list, tuple)) else value
    return value if value is None or isinstance(first, (list, tuple)) else (value,)


def _choices(field: FieldInfo) -> Any:
    """The type of an option that takes a value or a list; what values may be is asked of each combination."""
    kind: Any = field.annotation
    several = get_origin(kind) is tuple
    as_choices = BeforeValidator(lambda value: _as_choices(value, several))
    return Annotated[tuple[kind, ...] | None, Field(description=field.description), as_choices]


@with_options(_choices)
class SweepConfig(DrawnConfig, DrawingConfig):
    """Draw the same prompts and seeds with every combination of sampling options, and measure each.

    Every option of sampling takes a value or a list; what is not given is as the model says.
    """

    stage: Literal["sweep"] = "sweep"
    prompts: Address = Field(description="txt (a prompt a line), jsonl, csv or Parquet with a column `prompt`")
    by: By = Field(
        "auto",
        description="what the best row is best by; auto: the judge, else FID where there is one, else CLIP score",
    )

    @model_validator(mode="after")
    def _lists_have_values(self) -> "SweepConfig":
        for name, values in self.choices.items():
            if len(values) == 0:
                raise ValueError(f"{name}=[] has no value to try: name some, or leave it out")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} names a value twice")
        return self

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The values to try, by option, of the options that are given."""
        return given_options(self)


@with_options()
class SideConfig(LoraChoice):
    """One of the two that are compared: finished pictures, or a model and how it draws; null: as it says."""

    images: Address | None = Field(None, description="output of generate")
    model: Address | None = Field(None, description="model folder, to draw the prompts with")
    label: str | None = Field(None, description="what it is called; null: its address, or what it differs by")

    @model_validator(mode="after")
    def _one_source(self) -> "SideConfig":
        if (self.images is None) == (self.model is None):
            raise ValueError("give either images (finished pictures) or model (which draws them)")
        if self.images is not None and (self.options or self.adapters):
            raise ValueError(f"{', '.join([*self.options, *(['lora'] if self.adapters else [])])} draw: give a model")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The sampling options that are given."""
        return given_options(self)


class CompareConfig(DrawnConfig):
    """Two models, or two ways to draw, side by side on the same prompts and seeds."""

    stage: Literal["compare"] = "compare"
    a: SideConfig
    b: SideConfig
    prompts: Address | None = Field(None, description="prompts to draw, of sides that are models")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the intervals")
    resamples: int = Field(10_000, ge=100, description="bootstrap samples of the prompts")

    @model_validator(mode="after")
    def _models_have_prompts(self) -> "CompareConfig":
        if self.prompts is None and (self.a.model or self.b.model):
            raise ValueError("a side is a model, which needs prompts=FILE to draw")
        return self
