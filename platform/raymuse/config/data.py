"""The stage that turns any source of captioned pictures into image shards with held-out prompts."""

from typing import Literal

from pydantic import Field

from raymuse.config.base import StageConfig, runtime


class DataConfig(StageConfig):
    """Draw, or gather, captioned pictures: `output/train`, `output/test` and `output/prompts.jsonl`."""

    stage: Literal["data"] = "data"
    source: str = Field(
        "shapes", description="`shapes`, `emoji`, or captioned images: a folder, tars, Parquet, a Hugging Face data set"
    )
    train: int = Field(6000, ge=1, description="training pictures; a folder gives at most what it has")
    test: int = Field(256, ge=1, description="held-out pictures, whose captions become the test prompts")
    resolution: int = Field(64, ge=16, description="side of a drawn picture, pixels")
    two_objects: float = Field(0.3, ge=0, le=1, description="share of pictures with two objects (shapes only)")
    pictures_per_shard: int = Field(500, ge=1)
    seed: int = 0
    workers: int = runtime(2, "shards written at a time", ge=1)
