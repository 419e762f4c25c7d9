"""Pictures and captions to token shards, once, through frozen encoders."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raymuse.config.base import Address, AddressMark, StageConfig, runtime


class PretokenizeConfig(StageConfig):
    """Image shards to token shards with a frozen VQGAN and a frozen CLIP text encoder."""

    stage: Literal["pretokenize"] = "pretokenize"
    input: Address = Field(description="image shards, or a folder of captioned images")
    vqgan: Address = Field(description="folder (or Hugging Face id) of the VQGAN")
    low_vqgan: Annotated[str, AddressMark()] | None = Field(None, description="another VQGAN for the low-res ids")
    text_encoder: Address = Field(description="folder (or Hugging Face id) with text_encoder/ and tokenizer/")
    resolution: int = Field(256, ge=8, description="side of the square crop, pixels")
    low_resolution: int | None = Field(None, ge=8, description="also encode the crop at this size (super-resolution)")
    crop: Literal["center", "random"] = "center"
    crops_per_picture: int = Field(1, ge=1)
    flip: bool = Field(False, description="add a mirrored twin of every crop")
    text: Literal["states", "ids"] = Field("states", description="store what CLIP said, or only the text ids")
    aesthetic: float = Field(6.0, description="aesthetic score of pictures that bring none")
    seed: int = 0
    pictures_per_part: int = Field(1000, ge=1, description="pictures a part, where the input is no tar shard")
    chunk_size: int = Field(64, ge=1, description="crops encoded at once; part of the plan, so it never varies")
    max_pixels: int = Field(50_000_000, ge=1, description="larger pictures are rejected before they are decoded")
    max_reject_fraction: float = runtime(0.05, "more rejects than this share: exit code 3", ge=0, le=1)
    decoders: int = runtime(1, "decode tasks at a time", ge=1)
    encoders: int = runtime(1, "encoder actors", ge=1)
    gpus_per_encoder: float = runtime(0.0, "share of a GPU for an encoder", ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _low_is_lower(self) -> "PretokenizeConfig":
        if self.low_resolution is not None and self.low_resolution >= self.resolution:
            raise ValueError(f"low_resolution={self.low_resolution} must be below resolution={self.resolution}")
        return self
