"""The price table: machines, GPUs, and the speeds that a plan counts with. `prices.yaml` is what is shipped."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from raymuse.config.base import Config
from raymuse.config.errors import ConfigError, UserError


class Machine(Config):
    """What a machine has, and what its hour costs."""

    cpus: float = Field(gt=0)
    gpus: int = Field(0, ge=0)
    gpu: str | None = None
    on_demand: float = Field(ge=0)
    spot: float | None = Field(None, ge=0)

    def hour(self, spot: bool) -> float:
        """The price of an hour; that on demand where no spot price is known."""
        return self.spot if spot and self.spot is not None else self.on_demand


class Gpu(Config):
    """What a GPU reaches in large bf16 products, TFLOP/s, and what its hour costs in a pod."""

    tflops: float = Field(gt=0)
    hour: float = Field(ge=0)


class Pods(Config):
    """An hour of a pod's core and GiB."""

    cpu: float = Field(ge=0)
    memory_gib: float = Field(ge=0)


class Core(Config):
    """What a core reaches, TFLOP/s, and the pictures that it decodes a second."""

    tflops: float = Field(gt=0)
    pictures_per_second: float = Field(gt=0)


class Reached(Config):
    """Share of a GPU's TFLOP/s that a stage reaches."""

    pretokenize: float = Field(gt=0, le=1)
    train: float = Field(gt=0, le=1)
    generate: float = Field(gt=0, le=1)


class Prices(Config):
    """The whole table."""

    currency: str
    machines: dict[str, Machine]
    pods: Pods
    gpus: dict[str, Gpu]
    reached: Reached
    core: Core


def shipped() -> Path:
    """Where the shipped table lies, to be copied."""
    return Path(str(resources.files("raymuse") / "clusters" / "prices.yaml"))


def read_prices(path: Path | None) -> Prices:
    """The table of a file; None: the shipped one.

    Raises:
        UserError: the file cannot be read, or is no such table.
    """
    path = path or shipped()
    try:
        values: Any = yaml.safe_load(path.read_text("utf-8"))
        prices = Prices.model_validate(values)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(str(path), found) from None
    unknown = {
        name: machine.gpu
        for name, machine in prices.machines.items()
        if machine.gpus and machine.gpu not in prices.gpus
    }
    if unknown:
        raise ConfigError(
            str(path), [f"machines.{name}.gpu: there is no {gpu} under gpus" for name, gpu in unknown.items()]
        )
    return prices
