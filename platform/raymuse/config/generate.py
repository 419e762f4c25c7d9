"""Prompts to pictures, and the deployed application."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raymuse.config.base import Address, Config, StageConfig, runtime
from raymuse.config.drawing import DrawingConfig, GraphsChoice, PrecisionChoice
from raymuse.config.errors import UserError


class CheckingConfig(Config):
    """Who looks at every drawn picture before anybody gets it; nobody unless asked for."""

    checker: str | None = runtime(
        None,
        "folder of a transformers image classifier, or MODULE:FUNCTION, which takes a uint8 array (H, W, 3) and "
        "returns why the picture is refused, or None; null: pictures are not looked at",
    )
    checker_refuses: tuple[str, ...] = runtime((), "labels of the classifier for which a picture is refused")
    checker_threshold: float = runtime(0.5, "share of those labels together from which it is refused", gt=0, le=1)

    @model_validator(mode="after")
    def _labels_are_of_a_classifier(self) -> "CheckingConfig":
        if self.checker is None and self.checker_refuses:
            raise ValueError("checker_refuses names labels of a checker, and checker is not given")
        if self.checker_function is not None and self.checker_refuses:
            raise ValueError(f"checker_refuses names labels of a classifier's folder, and {self.checker} is a function")
        return self

    @property
    def checker_function(self) -> tuple[str, str] | None:
        """Module and function; None: the checker is a folder, or there is none."""
        module, colon, name = (self.checker or "").partition(":")
        return (module, name) if colon and re.fullmatch(r"[\w.]+:\w+", self.checker or "") else None


class GenerateConfig(StageConfig, DrawingConfig, PrecisionChoice, GraphsChoice, CheckingConfig):
    """Draw every prompt of a file, exactly once, with a manifest and a contact sheet."""

    stage: Literal["generate"] = "generate"
    prompts: Address = Field(
        description="txt (a prompt a line), jsonl, csv or parquet with a column `prompt`, or a folder of save_to_disk"
    )
    samples: int = Field(1, ge=1, description="pictures a prompt")
    seed: int = Field(0, description="run seed; a picture's own seed follows from it and its index")
    steps: int | None = Field(None, ge=1, description="null: the model's own default, as for all below")
    guidance: float | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    sampling: dict[str, Any] = Field({}, description="other changes to the model's own: sampling.top_p=0.5 ...")
    superres_sampling: dict[str, Any] = Field({}, description="the same for a cascade's super-resolution")
    negative: str = ""
    deny: Address | None = Field(
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
    engine: Literal["serve", "actors", "online"] = runtime(
        "serve",
        "who draws: replicas of the cluster's Serve for this job, actors of this job alone, which start sooner, or "
        "the replicas of the `raymuse serve` that runs on the cluster, which begin what people ask for first",
    )
    styles: dict[str, str] = runtime({}, "LoRAs by name, of which a row's column `lora` names one")
    most_styles: int = runtime(4, "styles that a replica holds at a time, each with its own weights", ge=1)
    replicas: int = runtime(1, "Serve replicas, or actors", ge=1)
    cpus_per_replica: float = runtime(2, "cores a replica: so many batches at a time, without a GPU", gt=0)
    gpus_per_replica: float = runtime(0.0, "share of a GPU a replica", ge=0)
    pictures_anywhere: bool = runtime(
        False, "rows may name pictures by any path or address, and not only files beside the prompts: trust the rows"
    )
    in_flight: int = runtime(4, "parts on their way at a time", ge=1)
    peak_tflops: float | None = runtime(
        None, "what one replica's hardware can do, in TFLOP/s, to say how much of it is used; null: measured", gt=0
    )
    price_per_hour: float = runtime(0.0, "of all machines together, for the cost that is told; 0: none is", ge=0)
    max_reject_fraction: float = runtime(0.05, "more failures than this share: exit code 3", ge=0, le=1)

    @property
    def split(self) -> tuple[int, int]:
        """Which of how many shards it draws, counted from 0."""
        first, _, count = (self.shard or "1/1").partition("/")
        return int(first) - 1, int(count)

    @field_validator("sampling")
    @classmethod
    def _said_once(cls, sampling: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(sampling.keys() & {"steps", "guidance", "temperature"}):
            raise ValueError(f"{own[0]} is a field of its own: write {own[0]}=... instead of sampling.{own[0]}=...")
        return sampling

    @field_validator("shard")
    @classmethod
    def _shard_is_one_of_them(cls, shard: str | None) -> str | None:
        if shard is not None and int(shard.partition("/")[0]) > int(shard.partition("/")[2]):
            raise ValueError(f"{shard} names a shard beyond the last: the first of four is 1/4, the last 4/4")
        return shard


class ServedModel(DrawingConfig, PrecisionChoice, GraphsChoice):
    """One model behind the address, with replicas of its own."""

    styles: dict[str, str] = Field(
        {}, description="LoRAs by name, for requests to choose: styles.ink=runs/ink/model is the model NAME:ink"
    )
    most_styles: int = runtime(4, "styles that a replica holds at a time, each with its own weights", ge=1)
    batch_size: int = Field(16, ge=1, description="one padded batch; part of the numerics")
    max_queue: int = runtime(64, "pictures that wait beyond those that are drawn; more are answered 429", ge=1)
    replicas: int = runtime(1, "Serve replicas; with max_replicas the fewest", ge=1)
    max_replicas: int | None = runtime(None, "Serve starts so many when pictures wait, and ends them later", ge=1)
    cpus_per_replica: float = runtime(1, "cores a replica: so many batches at a time, without a GPU", gt=0)
    gpus_per_replica: float = runtime(0.0, "share of a GPU a replica", ge=0)

    @model_validator(mode="after")
    def _most_is_most(self) -> "ServedModel":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}")
        return self


class ServeConfig(ServedModel, CheckingConfig):
    """Deploy model folders behind HTTP."""

    stage: Literal["serve"] = "serve"
    name: str | None = Field(None, description="what the model is called; null: as its folder", pattern=r"^[\w.-]+$")
    models: dict[str, ServedModel] = Field(
        {},
        description="more models by name: models.emoji=runs/emoji/model, or models.emoji.model=... with "
        "models.emoji.replicas=2 and whatever else a model has",
    )
    host: str = runtime("127.0.0.1", "address to listen on")
    port: int = runtime(8000, "port to listen on; 0: any free one", ge=0, le=65535)
    api_key_file: str | None = runtime(
        None, "file with the API keys, one a line; null: RAYMUSE_API_KEY, or no key on loopback"
    )
    deadline: float = runtime(120.0, "seconds until a request that is not done is answered 504", gt=0)
    deny: str | None = runtime(None, "text file of words and phrases, one a line: prompts with one are refused")
    traces: str | None = runtime(
        None, "MLflow server that is told of every request for pictures, its prompt too; null: none is told"
    )

    @property
    def called(self) -> str:
        """The first model's name: the one given, the registry's, or its folder's."""
        registered = re.match(r"models:/([^/@]+)", self.model)
        return self.name or (registered[1] if registered else Path(self.model).resolve().name)

    @field_validator("models", mode="before")
    @classmethod
    def _folder_alone(cls, models: Any) -> Any:
        if not isinstance(models, dict):
            return models
        return {name: {"model": one} if isinstance(one, str) else one for name, one in models.items()}

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "ServeConfig":
        wrong = [name for name in self.models if not re.fullmatch(r"[\w.-]+", name)]
        if wrong:
            raise ValueError(f"models.{wrong[0]}: a name is made of letters, digits, _, - and .")
        if self.name in self.models:
            raise ValueError(f"name={self.name} is also in models: give each model a name of its own")
        return self


def models_of(config: ServeConfig) -> dict[str, ServedModel]:
    """The models by their names, the first being the one that requests get who name none.

    Raises:
        UserError: a folder's name is no name for a model, or another's.
    """
    name = config.called
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{config.model}: {name!r} is no name that clients can ask for: give one with name=...")
    if name in config.models:
        raise UserError(f"two models are called {name!r}: give the first another name with name=...")
    return {name: config, **config.models}
