"""One picture from another."""

from typing import Any, Literal

from pydantic import Field

from raymuse.config.base import Address
from raymuse.config.drawing import DrawingConfig, PrecisionChoice

Task = Literal["image-to-image", "inpaint", "outpaint", "mask-free", "super-resolution"]

STRENGTH = 0.8
ROUNDS, SHARE = 100, 0.08  # Muse, section 4.5


class EditConfig(DrawingConfig, PrecisionChoice):
    """Draw from a picture and a prompt, at once and without Ray."""

    stage: Literal["edit"] = "edit"
    task: Task = Field(description="what is kept of the picture: see docs/generate.md")
    picture: Address = Field(description="the file to start from")
    prompt: str = Field(description="what the result shows")
    negative: str = ""
    output: Address = Field("edited.png", description="PNG to write; of several samples NAME-0.png, NAME-1.png, ...")
    mask: Address | None = Field(None, description="inpaint: a picture as large as the other, white where to draw")
    strength: float = Field(STRENGTH, ge=0, le=1, description="image-to-image: 0 keeps the picture, 1 ignores it")
    sides: tuple[int, int, int, int] = Field(
        (0, 0, 0, 0), description="outpaint: pixels to add at the left, top, right and bottom"
    )
    rounds: int = Field(ROUNDS, ge=1, description="mask-free: how often a share of the ids is drawn again")
    share: float = Field(SHARE, gt=0, le=1, description="mask-free: that share")
    paste: bool = Field(False, description="inpaint, outpaint: put the picture's own pixels back outside the mask")
    size: tuple[int, int] | None = Field(
        None, description="width and height to which picture and mask are first resized and cut; null: as they are"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the picture; those of more samples follow from it")
    samples: int = Field(1, ge=1, description="how many variations")
    sampling: dict[str, Any] = Field({}, description="changes to the model's own: sampling.steps=18 ...")
    superres_sampling: dict[str, Any] = Field({}, description="the same for a cascade's super-resolution")


class RepeatConfig(DrawingConfig):
    """Draw a picture of `raymuse generate` once more, from what its file says."""

    stage: Literal["repeat"] = "repeat"
    picture: Address = Field(description="PNG that `raymuse generate` wrote")
    output: Address = Field("repeated.png", description="PNG to write")
