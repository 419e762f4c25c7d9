"""What the words after a command mean: a recipe, or what stands for one, and KEY=VALUE overrides."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from raymuse.config.errors import UserError

if TYPE_CHECKING:
    from raymuse.config.base import Config
    from raymuse.config.data import DataConfig
    from raymuse.config.generate import GenerateConfig
    from raymuse.config.score import CompareConfig, SweepConfig

    C = TypeVar("C", bound=Config)

SCORES = ("score", "sweep", "compare")
TRAININGS = ("train-vqgan", "train-clip", "train-base", "train-superres", "train-critic")


def split(words: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """The first word, where it is no override, and all overrides."""
    rest = list(words or [])
    if rest and "=" not in rest[0]:
        return rest[0], rest[1:]
    return None, rest


def is_data(word: str) -> bool:
    """Whether a word is meant as a folder, file or address of data, and not as a recipe's name or file."""
    if word.partition(":")[0].endswith((".yaml", ".yml")):
        return False
    return "/" in word or word.endswith((".tar", ".parquet")) or Path(word).is_dir()


def config_for(model: "type[C]", command: str, words: Sequence[str] | None, stages: Collection[str]) -> "C":
    """The checked config that a command's words ask for.

    Args:
        model: what the config must be.
        command: the command, for messages.
        words: recipe and overrides.
        stages: the stages that the command runs.

    Raises:
        UserError: no recipe is given, or it is wrong.
    """
    from raymuse.config.load import load

    word, changes = split(words)
    config = load(word or _no_recipe(command, stages), changes, stages)
    assert isinstance(config, model)
    return config


def generate_config(words: Sequence[str] | None) -> "GenerateConfig":
    """The checked config of `raymuse generate`, whose first word may be a file of prompts instead of a recipe."""
    from raymuse.config.generate import GenerateConfig
    from raymuse.config.load import from_values
    from raymuse.storage.prompts import is_prompts

    word, changes = split(words)
    given = word is None and any(change.startswith("prompts=") for change in changes)
    if not given and not (word is not None and is_prompts(word)):
        return config_for(GenerateConfig, "generate", words, ("generate",))
    config = from_values("generate", {} if word is None else {"prompts": word}, changes)
    assert isinstance(config, GenerateConfig)
    return config


def data_config(words: Sequence[str] | None) -> "DataConfig":
    """The checked config of `raymuse data`, whose first word may be a source instead of a recipe."""
    from raymuse.config.data import DataConfig
    from raymuse.config.load import load

    word, changes = split(words)
    if word is None or word == "shapes":
        loaded = load("demo:data", changes, "data")
    elif word == "emoji":
        loaded = load("emoji:data", changes, "data")
    elif is_data(word):
        loaded = load("demo:data", changes, "data").model_copy(update={"source": word})
    else:
        loaded = load(word, changes, "data")
    assert isinstance(loaded, DataConfig)
    return loaded


def sweep_config(words: Sequence[str] | None) -> "SweepConfig":
    """The checked config of `raymuse score --sweep`, whose first word is a model folder or a recipe."""
    from raymuse.config.load import from_values, load
    from raymuse.config.recipe import recipes
    from raymuse.config.score import SweepConfig

    word, changes = split(words)
    if word is None and not any(change.startswith("model=") for change in changes):
        raise UserError(
            "raymuse score --sweep needs a model folder or a recipe: raymuse score --sweep runs/demo/model "
            "prompts=my.txt clip=runs/demo/clip/model guidance=[1,2,4] steps=[6,12] output=sweep"
        )
    shipped = {name for name, _ in recipes()}
    if word is None or (word.partition(":")[0] not in shipped and not word.endswith((".yaml", ".yml"))):
        loaded = from_values("sweep", {} if word is None else {"model": word}, changes)
    else:
        loaded = load(word, changes, "sweep")
    assert isinstance(loaded, SweepConfig)
    return loaded


def compare_config(sides: Sequence[str], words: Sequence[str] | None) -> "CompareConfig":
    """The checked config of `raymuse score --compare A B`: each a model folder, or a finished folder of pictures."""
    from raymuse.config.load import from_values
    from raymuse.config.score import CompareConfig
    from raymuse.storage.folder import Folder

    word, changes = split(words)
    if word is not None:
        raise UserError(f"raymuse score --compare A B takes KEY=VALUE changes beside A and B, not {word!r}.")
    kinds = ["images" if Folder(side).exists("manifest.parquet") else "model" for side in sides]
    given = {name: {kind: side} for name, kind, side in zip(("a", "b"), kinds, sides, strict=True)}
    loaded = from_values("compare", given, changes)
    assert isinstance(loaded, CompareConfig)
    return loaded


def mlflow_uri(given: str | None) -> str | None:
    """The MLflow server that a command reports to or asks: the one given, else the environment's; None: none."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or None


def records_of(workdir: str) -> Path:
    """The folder of what a flow recorded.

    Raises:
        UserError: nothing was.
    """
    folder = Path(workdir) / "mlflow"
    if not folder.is_dir():
        raise UserError(f"there are no MLflow records in {folder}: name a flow's workdir with --workdir.")
    return folder


def require_folder_of(option: str, file: Path | None) -> None:
    """Raise UserError where the file that an option names could not be written, for want of its folder."""
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {file.absolute().parent}; make it first.")


def _no_recipe(command: str, stages: Collection[str]) -> str:
    from raymuse.config.load import recipes_for

    shipped = recipes_for(stages)
    raise UserError(
        f"raymuse {command} needs a recipe: {', '.join(shipped)}, or a YAML file of your own "
        f"(`raymuse config copy {shipped[0]} my.yaml` starts one)."
    )
