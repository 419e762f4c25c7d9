"""The style of one picture, in two rounds of fine-tuning (StyleDrop; Sohn et al., arXiv 2306.00983)."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from raymuse.config.base import Address, StageConfig
from raymuse.config.generate import GenerateConfig
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import BaseConfig

SUBJECTS = (
    "a cat",
    "a house",
    "a tree",
    "a boat",
    "a bird",
    "a bicycle",
    "a mountain",
    "a flower",
    "a portrait of a woman",
    "a cup",
    "a horse",
    "a bridge",
)
"""What is drawn in the style where no prompts are given."""
_STYLE = re.compile(r"\bin\b.*\Z", re.DOTALL)


class StyledropConfig(StageConfig):
    """Learn a style from one picture: a LoRA, pictures drawn with it, and a second LoRA from the best of these."""

    stage: Literal["styledrop"] = "styledrop"
    picture: Address = Field(description="the picture whose style is learned")
    caption: str | None = Field(
        None, description='says what it shows and how, as in "a house in watercolour style"; null: its file name'
    )
    prompts: Address | None = Field(
        None, description="file of prompts in that style; null: a dozen subjects with the caption's words from `in` on"
    )
    keep: int = Field(8, ge=1, description="candidates that the second round learns from, the best by CLIP score")
    clip: Address | None = Field(
        None, description="folder or Hugging Face id of a CLIP with both towers; null: choose by hand, with `kept`"
    )
    kept: tuple[int, ...] = Field((), description="numbers of the candidates to learn from, read off candidates.png")
    pretokenize: PretokenizeConfig = Field(description="how pictures become ids; its `input` and `output` are set")
    train: BaseConfig = Field(description="both rounds; its `input` and `output` are set, its `seed` is the first's")
    generate: GenerateConfig = Field(
        description="candidates, and the last pictures; `prompts`, `output`, `lora` are set"
    )

    @property
    def told(self) -> str:
        """The caption."""
        return self.caption or Path(self.picture).stem.replace("_", " ")

    @property
    def style(self) -> str:
        """The caption's words that name the style: "in watercolour style"."""
        found = _STYLE.search(self.told)
        return found[0] if found else ""

    @model_validator(mode="after")
    def _names_a_style(self) -> "StyledropConfig":
        if not self.style and self.prompts is None:
            raise ValueError(
                f"the caption {self.told!r} names no style: let it end as `... in watercolour style`, or give prompts"
            )
        if self.train.lora is None:
            raise ValueError("train.lora: StyleDrop trains a LoRA; give train.lora.rank")
        return self
