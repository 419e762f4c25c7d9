"""Which model checks which recipe: the value of its `stage` key decides."""

from raymuse.config.base import Config
from raymuse.config.data import DataConfig
from raymuse.config.edit import EditConfig, RepeatConfig
from raymuse.config.export import ExportConfig
from raymuse.config.flow import FlowConfig
from raymuse.config.generate import GenerateConfig, ServeConfig
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.score import CompareConfig, ScoreConfig, SweepConfig
from raymuse.config.styledrop import StyledropConfig
from raymuse.config.training import BaseConfig, ClipConfig, CriticConfig, SuperresConfig, VqganConfig

STAGES: dict[str, type[Config]] = {
    "data": DataConfig,
    "train-vqgan": VqganConfig,
    "train-clip": ClipConfig,
    "pretokenize": PretokenizeConfig,
    "train-base": BaseConfig,
    "train-superres": SuperresConfig,
    "train-critic": CriticConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "edit": EditConfig,
    "repeat": RepeatConfig,
    "serve": ServeConfig,
    "score": ScoreConfig,
    "sweep": SweepConfig,
    "compare": CompareConfig,
    "styledrop": StyledropConfig,
    "flow": FlowConfig,
}
