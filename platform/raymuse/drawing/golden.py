"""Are these the published weights, and do we compute with them what diffusers does? Nine pixels tell.

diffusers' slow tests of aMUSEd, since removed, held the last 3 x 3 pixels of the blue channel of "dog", drawn in two
steps from a generator seeded with 0, in fp32. Here its scheduler draws with our text encoder, transformer and VQGAN.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.masking import guide
from raymuse.models.base import Base
from raymuse.models.text import TextEncoder
from raymuse.models.uvit import UVit
from raymuse.models.vqgan import Vqgan

PROMPT, STEPS, GUIDANCE, AESTHETIC = "dog", 2, 10.0, 6.0
TOLERANCE = 0.003
# By the pixels of a side.
GOLDEN = {
    256: (0.4011, 0.3992, 0.379, 0.3856, 0.3772, 0.3711, 0.3919, 0.385, 0.3625),
    512: (0.1199, 0.1171, 0.1229, 0.1188, 0.1210, 0.1147, 0.1260, 0.1346, 0.1152),
}


@dataclass(frozen=True)
class Verdict:
    """What was drawn beside what is published, 9 values of [0, 1] each."""

    drawn: NDArray[np.float32]
    published: NDArray[np.float32]

    @property
    def error(self) -> float:
        """The largest difference."""
        return float(np.abs(self.drawn - self.published).max())

    @property
    def passed(self) -> bool:
        return self.error < TOLERANCE


def verify(text: TextEncoder, base: Base, vqgan: Vqgan) -> Verdict:
    """Draw the nine pixels and compare.

    Raises:
        UserError: for a model of another size than the published ones.
    """
    side = base.config.sample_size * vqgan.factor
    if side not in GOLDEN or not isinstance(base, UVit):
        kind = "model" if isinstance(base, UVit) else type(base).__name__
        raise UserError(f"a {kind} of {side} px: published values exist for amused-256 and amused-512.")
    return Verdict(corner(text, base, vqgan), np.array(GOLDEN[side], dtype=np.float32))


@torch.no_grad()
def corner(text: TextEncoder, base: UVit, vqgan: Vqgan) -> NDArray[np.float32]:
    """The last 3 x 3 pixels of the blue channel (9,), in [0, 1]."""
    from diffusers import AmusedScheduler

    cells = base.config.sample_size
    side, device = cells * vqgan.factor, vqgan.network.device
    scheduler = AmusedScheduler(mask_token_id=base.config.mask_id)
    scheduler.set_timesteps(STEPS, temperature=(2, 0), device=device)
    states, pooled = text([PROMPT, ""])
    condition = base.condition(states, pooled, torch.tensor([[side, side, 0, 0, AESTHETIC]] * 2, device=device))
    ids = torch.full((1, cells, cells), base.config.mask_id, device=device)
    generator = torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps:
        conditional, free = base.head(base.features(torch.cat([ids, ids]), condition)).chunk(2)
        logits = guide(conditional, free, GUIDANCE).permute(0, 3, 1, 2)
        ids = scheduler.step(logits, timestep, ids, generator=generator).prev_sample
    pixels: NDArray[np.float32] = vqgan.decode_unit(ids)[0, 2, -3:, -3:].flatten().cpu().numpy()
    return pixels
