"""The whole flow in one config: each section is a stage's own config, with paths relative to `workdir`."""

from typing import Literal

from pydantic import Field

from raymuse.config.base import Address, Config, runtime
from raymuse.config.data import DataConfig
from raymuse.config.export import ExportConfig
from raymuse.config.generate import GenerateConfig
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.score import ScoreConfig
from raymuse.config.training import BaseConfig, ClipConfig, SuperresConfig, VqganConfig


class RayConfig(Config):
    """The local cluster that a flow starts for itself."""

    num_cpus: int = runtime(4, "logical cores; the flow's own actors need at least 3", ge=3)
    object_store_gib: float = runtime(0.5, "shared memory for Ray's objects, GiB", ge=0.1)
    dashboard: bool = runtime(True, "start Ray's dashboard on loopback")


class FlowConfig(Config):
    """Data to scores, stage by stage, in one folder."""

    stage: Literal["flow"] = "flow"
    name: str = Field("demo", description="MLflow experiment and registered model")
    workdir: Address = runtime("runs/demo", "everything the flow writes")
    ray: RayConfig = runtime(RayConfig(), "local cluster")
    minutes: float | None = runtime(
        None, "that the flow may take: on a slow machine the trainings' budgets are what it leaves of them", gt=0
    )
    data: DataConfig
    vqgan: VqganConfig
    clip: ClipConfig
    pretokenize: PretokenizeConfig
    base: BaseConfig
    superres: SuperresConfig
    export: ExportConfig
    generate: GenerateConfig
    score: ScoreConfig
