"""What the generator is asked for and answers. Imports no torch: the API's process starts in half the time without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError

from raymuse.config.edit import STRENGTH, Task
from raymuse.config.sampling import Options

if TYPE_CHECKING:
    from raymuse.drawing.tasks import Request
    from raymuse.pipeline import Pipeline

LOST = (RayActorError, ObjectLostError, NodeDiedError)
"""What a replica's end looks like to whoever waits for it: itself gone, or its answer, which lay on its node."""


@dataclass(frozen=True)
class Editing:
    """What is done to a picture, uint8 (H, W, 3); see `Pipeline.edit`."""

    task: Task
    picture: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None = None
    strength: float = STRENGTH
    sides: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True)
class DrawRequest:
    """One picture to draw; None takes the model's own default.

    Attributes:
        sampling: options beside steps, guidance and temperature.
        superres: those of the super-resolution.
    """

    prompt: str
    seed: int
    negative: str = ""
    steps: int | None = None
    guidance: float | None = None
    temperature: float | None = None
    size: tuple[int, int] | None = None
    editing: Editing | None = None
    style: str | None = None
    style_scale: float = 1.0
    sampling: Options = field(default_factory=Options)
    superres: Options = field(default_factory=Options)

    @property
    def options(self) -> Options:
        given = {"steps": self.steps, "guidance": self.guidance, "temperature": self.temperature}
        return {**self.sampling, **cast(Options, {name: value for name, value in given.items() if value is not None})}

    def of(self, pipeline: Pipeline) -> Request:
        """The same as `pipeline` draws it. A picture to edit is fitted to `size`, or else to the model's own.

        Raises:
            UserError: for what the model cannot draw.
        """
        if self.editing is None:
            superres = self.superres
            return pipeline.request(self.prompt, self.seed, self.negative, self.size, superres=superres, **self.options)
        settings, editing = pipeline.settings, self.editing
        side = settings.base_size if editing.task == "super-resolution" else settings.size
        how: Any = {"strength": editing.strength, "sides": editing.sides, "size": self.size or (side, side)}
        how["superres"] = self.superres
        return pipeline.edit_request(
            editing.task,
            self.prompt,
            editing.picture,
            self.seed,
            self.negative,
            editing.mask,
            **how,
            **self.options,
        )


@dataclass(frozen=True)
class Drawing:
    """One drawn picture, uint8 (H, W, 3), and the base's own.

    Attributes:
        refused: why the checker says that nobody may get it.
    """

    pixels: NDArray[np.uint8]
    base_pixels: NDArray[np.uint8]
    refused: str | None = None
