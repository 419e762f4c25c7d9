"""How good the pictures are."""

from typing import Annotated, Literal

from pydantic import Field

from raymuse.config.base import Address, AddressMark, StageConfig, runtime


class ScoreConfig(StageConfig):
    """Judge generated pictures beside ground truth and the VQGAN's round trip (the ceiling)."""

    stage: Literal["score"] = "score"
    images: Address = Field(description="output of generate")
    model: Address = Field(description="model folder, for the VQGAN's round trip")
    clip: Address = Field(description="folder of a CLIP with both towers")
    truth: Annotated[str, AddressMark()] | None = Field(
        None, description="image shards with the prompts' true pictures"
    )
    judge: Literal["auto", "shapes", "none"] = Field(
        "auto", description="the exact judge of drawn shapes; auto: where the captions are of that world"
    )
    batch_size: int = Field(64, ge=1)
    workers: int = runtime(1, "scoring actors", ge=1)
