"""Prompts to pictures, and the deployed application."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raymuse.config.base import Address, AddressMark, StageConfig, runtime
from raymuse.config.drawing import DrawingConfig


class GenerateConfig(StageConfig, DrawingConfig):
    """Draw every prompt of a file, exactly once, with a manifest and a contact sheet."""

    stage: Literal["generate"] = "generate"
    prompts: Address = Field(description="txt (a prompt a line), jsonl or csv with a column `prompt`")
    samples: int = Field(1, ge=1, description="pictures a prompt")
    seed: int = Field(0, description="run seed; a picture's own seed follows from it and its index")
    steps: int | None = Field(None, ge=1, description="None: the model's own default, as for all below")
    guidance: float | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    negative: str = ""
    deny: Annotated[str, AddressMark()] | None = Field(
        None, description="text file of words and phrases, one a line: prompts with one of them are rejected, not drawn"
    )
    size: tuple[int, int] | None = Field(None, description="width and height in whole cells")
    keep_base: bool = Field(True, description="also write the base picture beside a cascade's")
    pictures_per_part: int = Field(64, ge=1)
    shard: str | None = Field(
        None,
        pattern=r"^[1-9]\d*/[1-9]\d*$",
        description="I/N: every N-th part from the I-th alone, of a job split by hand",
    )
    batch_size: int = Field(16, ge=1, description="one padded batch; part of the numerics, so it is fixed")
    engine: Literal["serve", "actors"] = runtime(
        "serve", "who draws: replicas of the cluster's Serve, or actors of this job alone, which start sooner"
    )
    replicas: int = runtime(1, "Serve replicas, or actors", ge=1)
    cpus_per_replica: float = runtime(2, "cores a replica: so many batches at a time, without a GPU", gt=0)
    gpus_per_replica: float = runtime(0.0, "share of a GPU a replica", ge=0)
    pictures_anywhere: bool = runtime(
        False, "rows may name pictures by any path or address, and not only files beside the prompts: trust the rows"
    )
    in_flight: int = runtime(4, "parts on their way at a time", ge=1)
    max_reject_fraction: float = runtime(0.05, "more failures than this share: exit code 3", ge=0, le=1)

    @property
    def split(self) -> tuple[int, int]:
        """Which of how many shards it draws, counted from 0."""
        first, _, count = (self.shard or "1/1").partition("/")
        return int(first) - 1, int(count)

    @field_validator("shard")
    @classmethod
    def _shard_is_one_of_them(cls, shard: str | None) -> str | None:
        if shard is not None and int(shard.partition("/")[0]) > int(shard.partition("/")[2]):
            raise ValueError(f"{shard} names a shard beyond the last: the first of four is 1/4, the last 4/4")
        return shard


class ServeConfig(DrawingConfig):
    """Deploy a model folder behind HTTP."""

    stage: Literal["serve"] = "serve"
    host: str = runtime("127.0.0.1", "address to listen on")
    port: int = runtime(8000, "port to listen on; 0: any free one", ge=0, le=65535)
    styles: dict[str, str] = Field(
        {}, description="LoRAs by name, for requests to choose: styles.ink=runs/ink/model is the model NAME:ink"
    )
    most_styles: int = runtime(4, "styles that a replica holds at a time, each with its own weights", ge=1)
    api_key_file: str | None = runtime(
        None, "file with the API keys, one a line; None: RAYMUSE_API_KEY, or no key on loopback"
    )
    batch_size: int = Field(16, ge=1, description="one padded batch; part of the numerics")
    max_queue: int = runtime(64, "pictures that wait beyond those that are drawn; more are answered 429", ge=1)
    deadline: float = runtime(120.0, "seconds until a request that is not done is answered 504", gt=0)
    replicas: int = runtime(1, "Serve replicas; with max_replicas the fewest", ge=1)
    max_replicas: int | None = runtime(None, "Serve starts so many when pictures wait, and ends them later", ge=1)
    cpus_per_replica: float = runtime(1, "cores a replica: so many batches at a time, without a GPU", gt=0)
    gpus_per_replica: float = runtime(0.0, "share of a GPU a replica", ge=0)

    @model_validator(mode="after")
    def _most_is_most(self) -> "ServeConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}")
        return self
