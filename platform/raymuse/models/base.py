"""The two base transformers, aMUSEd's and Muse's, behind one: a shape makes a network, a config.json a shape."""

from collections.abc import Mapping
from typing import Any

from raymuse.models.maskgit import MaskGit, MaskGitConfig
from raymuse.models.superres import SuperRes, SuperResConfig
from raymuse.models.uvit import UVit, UVitConfig

Base = UVit | MaskGit
BaseShape = UVitConfig | MaskGitConfig

SHAPES: Mapping[str, type[UVitConfig] | type[MaskGitConfig]] = {"uvit": UVitConfig, "maskgit": MaskGitConfig}


def new_base(shape: BaseShape) -> Base:
    """A network of that shape, its weights as PyTorch starts them."""
    return MaskGit(shape) if isinstance(shape, MaskGitConfig) else UVit(shape)


def read_shape(record: Mapping[str, Any]) -> BaseShape:
    """From the contents of a `transformer/config.json`: ours, or diffusers'. Raises ValueError for unknown keys."""
    ours = record.get("_class_name") == "MaskGit"
    return MaskGitConfig.from_dict(record) if ours else UVitConfig.from_diffusers(record)


def record_of(shape: BaseShape | SuperResConfig) -> dict[str, Any]:
    """The contents of a network's config.json."""
    return shape.to_diffusers() if isinstance(shape, UVitConfig) else shape.to_dict()


def like(network: Base | SuperRes) -> Base | SuperRes:
    """Another network of the same shape."""
    return SuperRes(network.config) if isinstance(network, SuperRes) else new_base(network.config)
