"""Where a trained model comes from: code, data and parent; and what it took."""

import json
from pathlib import Path
from typing import Any

import torch

from raymuse.config.training import CriticConfig, GeneratorConfig, MaskedConfig, TrainConfig, VqganConfig
from raymuse.tracking.provenance import own_commit, own_version

RECORD = "training.json"


def code_version() -> str:
    """raymuse's version, with the commit where it runs from a checkout, `-dirty` where that was changed."""
    version, commit = own_version() or "not installed", own_commit()
    return version if commit is None else f"{version} ({commit})"


def lineage(config: TrainConfig) -> dict[str, Any]:
    """Code, data and parent of a training, whose output's manifest knows the fingerprints of what it reads."""
    identity = Path(config.output) / "_manifest" / "config.json"
    known = json.loads(identity.read_text()) if identity.exists() else {}
    parent = None
    if isinstance(config, GeneratorConfig | VqganConfig):
        parent = config.start_from
    elif isinstance(config, CriticConfig):
        parent = config.base
    return {
        "code": code_version(),
        "data": known.get("data"),
        "input": config.source if isinstance(config, MaskedConfig) else getattr(config, "input", None),
        "parent": parent,
    }


def lineage_params(config: TrainConfig) -> dict[str, Any]:
    """The same for a run's parameters, under names that no field of a config has."""
    return {f"lineage.{name}": value for name, value in lineage(config).items()}


def write_record(config: TrainConfig, steps: int, world: int, worker_seconds: float, loss: float | None) -> None:
    """`training.json` of the output: for the model card, and for whoever finds the folder."""
    record = {
        "stage": type(config).model_fields["stage"].default,
        **lineage(config),
        "steps": steps,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "workers": world,
        "device": torch.cuda.get_device_name() if config.use_gpu else "CPU",
        "worker_hours": worker_seconds / 3600,
        "loss": loss,
    }
    (Path(config.output) / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
