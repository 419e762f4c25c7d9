"""Pictures and captions to ids and text states through frozen encoders: stored once, or while a training runs."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from raymuse.config.base import Address, Config, StageConfig, runtime

_BUCKET = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


class FilterConfig(Config):
    """Which pictures to leave out by what is known of them. A filter is a wish, not a fault: what it leaves out is
    counted and listed with its reason, and does not count against `max_reject_fraction`.
    """

    min_side: int = Field(1, ge=1, description="shortest side, pixels before any resize")
    max_aspect: float = Field(32.0, ge=1, le=32, description="long side over short side")
    min_aesthetic: float | None = Field(None, description="lowest `aesthetic` score")
    max_watermark: float | None = Field(None, description="highest `pwatermark`, 0 to 1")
    max_unsafe: float | None = Field(None, description="highest `punsafe`, 0 to 1")
    languages: tuple[str, ...] = Field((), description="`language` codes to keep, such as [en, de]; empty: all")
    min_caption: int = Field(1, ge=1, description="characters; shorter captions are left out")
    max_caption: int | None = Field(None, ge=1, description="characters; longer captions are left out")
    unknown: Literal["keep", "drop"] = Field("keep", description="pictures whose metadata lacks what a filter asks")

    @model_validator(mode="after")
    def _leaves_something(self) -> "FilterConfig":
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ValueError(f"max_caption={self.max_caption} is below min_caption={self.min_caption}")
        return self


class EncodingConfig(Config):
    """Which captioned pictures are read, how they are cut, and by which frozen encoders they become ids and states."""

    input: Address | tuple[Address, ...] = Field(
        description="tars, a folder of captioned images, Parquet, a saved Hugging Face data set, or "
        "hf://datasets/OWNER/NAME; several as a list"
    )
    split: str = Field("train", description="of a Hugging Face data set")
    image_column: str | None = Field(None, description="of Parquet and Hugging Face data sets; found where not said")
    caption_column: str | None = Field(None, description="column, or field of the .json; found where not said")
    caption_prefix: str = Field("", description="put before every caption")
    bad_captions: Literal["reject", "repair"] = Field(
        "reject", description="captions that are not UTF-8: reject the picture, or read their odd bytes as Latin-1"
    )
    background: str = Field("#ffffff", description="what transparent pixels show, #rrggbb")
    filters: FilterConfig = Field(default_factory=FilterConfig)
    vqgan: Address = Field(description="folder (or Hugging Face id) of the VQGAN")
    low_vqgan: Address | None = Field(None, description="another VQGAN for the low-res ids")
    text_encoder: Address = Field(description="folder (or Hugging Face id) with text_encoder/ and tokenizer/: CLIP, T5")
    text_length: int | None = Field(None, ge=1, le=512, description="tokens a caption; default: CLIP 77, T5 256")
    resolution: int = Field(256, ge=8, description="side of the square crop, pixels")
    low_resolution: int | None = Field(None, ge=8, description="also encode the crop at this size (super-resolution)")
    crop: Literal["center", "random"] = "center"
    text: Literal["states", "ids"] = Field("states", description="store what the text encoder said, or only text ids")
    aesthetic: float = Field(6.0, description="aesthetic score of pictures that bring none")
    seed: int = 0
    pictures_per_part: int = Field(1000, ge=1, description="pictures a part, where the input is no tar shard")
    chunk_size: int = Field(64, ge=1, description="crops encoded at once; part of the plan, so it never varies")
    max_pixels: int = Field(50_000_000, ge=1, description="larger pictures are rejected before they are decoded")
    max_reject_fraction: float = runtime(0.05, "more faulty rows than this share: exit code 3", ge=0, le=1)
    decoders: int = runtime(1, "decode tasks at a time", ge=1)
    encoders: int = runtime(1, "encoder actors, at most", ge=1)
    min_encoders: int | None = runtime(None, "encoder actors, at least: fewer start, more come as work waits", ge=1)
    gpus_per_encoder: float = runtime(0.0, "share of a GPU for an encoder", ge=0)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,) if isinstance(self.input, str) else self.input

    @property
    def device(self) -> str:
        """Of PyTorch, where an encoder counts."""
        return "cuda" if self.gpus_per_encoder > 0 else "cpu"

    def low_shape(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        """(height, width) of a crop's low-resolution twin, pixels, where there is one."""
        if self.low_resolution is None:
            return None
        height, width = (side * self.low_resolution // self.resolution for side in shape)
        return height, width

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue

    @field_validator("input")
    @classmethod
    def _some_input(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("name at least one input")
        return value

    @field_validator("background")
    @classmethod
    def _is_colour(cls, value: str) -> str:
        if not _COLOUR.fullmatch(value):
            raise ValueError(f"{value!r} is no colour: write #rrggbb, such as #ffffff")
        return value

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.low_resolution is not None and self.low_resolution >= self.resolution:
            raise ValueError(f"low_resolution={self.low_resolution} must be below resolution={self.resolution}")
        if self.low_vqgan is not None and self.low_resolution is None:
            raise ValueError("low_vqgan needs low_resolution: there are no low-res ids without it")
        if self.min_encoders is not None and self.min_encoders > self.encoders:
            raise ValueError(f"min_encoders={self.min_encoders} is above encoders={self.encoders}")
        return self


class PretokenizeConfig(EncodingConfig, StageConfig):
    """Captioned pictures to token shards with a frozen VQGAN and a frozen text encoder."""

    stage: Literal["pretokenize"] = "pretokenize"
    duplicates: Literal["keep", "count", "drop"] = Field(
        "keep", description="pictures of the same pixels: look for them (one more reading of the input), and drop them"
    )
    near_duplicates: int | None = Field(
        None, ge=0, le=16, description="with `duplicates`: also pictures whose perceptual hashes differ in so many bits"
    )
    buckets: tuple[str, ...] = Field(
        (), description="crops of other shapes, HEIGHTxWIDTH in pixels: a picture takes the nearest in aspect ratio"
    )
    crops_per_picture: int = Field(1, ge=1)
    flip: bool = Field(False, description="add a mirrored twin of every crop")
    price_per_hour: float = runtime(0.0, "of all machines together, for the cost that --dry-run says", ge=0)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every kind of crop, pixels: the buckets, or the one square."""
        return tuple(_shape(bucket) for bucket in self.buckets) or ((self.resolution, self.resolution),)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (crops := self.crops_per_picture * (2 if self.flip else 1)) > self.chunk_size:
            raise ValueError(f"{crops} crops a picture do not fit one chunk: chunk_size={self.chunk_size}")
        for bucket in self.buckets:
            shape = _shape(bucket)
            if self.low_resolution and any(side * self.low_resolution % self.resolution for side in shape):
                raise ValueError(f"bucket {bucket} has no whole low-resolution twin at {self.low_resolution}")
        if len(set(self.buckets)) != len(self.buckets):
            raise ValueError("a bucket stands twice in the list")
        if self.near_duplicates is not None and self.duplicates == "keep":
            raise ValueError("near_duplicates needs duplicates=count or duplicates=drop")
        return self


class StreamConfig(EncodingConfig):
    """Pictures that a training encodes while it runs, in place of token shards: every epoch cuts them anew."""

    crop: Literal["center", "random"] = Field("random", description="random: another place every epoch")
    flip: bool = Field(False, description="mirror each crop with probability 1/2")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the crops, pixels: the one square."""
        return ((self.resolution, self.resolution),)


def _shape(bucket: str) -> tuple[int, int]:
    match = _BUCKET.fullmatch(bucket)
    if match is None:
        raise ValueError(f"bucket {bucket!r}: write HEIGHTxWIDTH in pixels, such as 320x192")
    return int(match[1]), int(match[2])
