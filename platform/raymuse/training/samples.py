"""What a user's prompts tell a network that is drawn from while it trains.

B prompts, h w grid.
"""

from typing import Any

import torch
from torch import Tensor

from raymuse.config.errors import UserError
from raymuse.config.sampling import SamplingConfig
from raymuse.config.training import GeneratorConfig
from raymuse.drawing.model_folder import load_base, trained_part
from raymuse.drawing.sampler import Course, Draws, sample_ids
from raymuse.models.text import TextEncoder
from raymuse.training.task import Batch
from raymuse.training.tokens import TokenStream

AESTHETIC = 6.0  # of aMUSEd's own defaults


def told_by(prompts: tuple[str, ...], config: GeneratorConfig, stream: TokenStream, factor: int, device: str) -> Batch:
    """The conditions of the prompts, and of the empty caption under `free_`: guidance is away from that.

    Args:
        factor: pixels of a cell's side.
    """
    assert config.text_encoder is not None
    text = TextEncoder.load(config.text_encoder, device)
    size = [float(side * factor) for side in reversed(stream.grid)]
    told: Batch = {"micro": torch.tensor([[*size, 0.0, 0.0, AESTHETIC]] * len(prompts), device=device)}
    for prefix, captions in (("", list(prompts)), ("free_", [""] * len(prompts))):
        ids = text.tokenize(captions)[0]
        states, pooled = text.encode(ids)
        told |= {f"{prefix}text_ids": ids.to(device), f"{prefix}states": states, f"{prefix}pooled": pooled}
    if told["states"].shape[1] != stream.empty_states.shape[1]:
        raise UserError(
            f"samples.prompts: {config.text_encoder} makes {told['states'].shape[1]} tokens a caption, and the token "
            f"shards hold {stream.empty_states.shape[1]}: leave the prompts out, or pretokenize at its own text_length."
        )
    return told


def low_ids_by(address: str, told: Batch, grid: tuple[int, int], sampling: SamplingConfig) -> Tensor:
    """Low-res ids (B, h, w) that a base draws for the prompts."""
    device = told["states"].device
    base: Any = load_base(trained_part(address, "transformer"), str(device))
    micro = told["micro"]
    return drawn(
        base,
        base.condition(told["states"], told["pooled"], micro),
        base.condition(told["free_states"], told["free_pooled"], micro),
        grid,
        sampling,
        len(micro),
    )


@torch.no_grad()
def drawn(
    network: Any, told: Any, free: Any | None, grid: tuple[int, int], sampling: SamplingConfig, count: int
) -> Tensor:
    """Ids (B, h, w) from nothing, a seed a picture that is its number."""
    course = Course.of(sampling, grid[0] * grid[1])
    weight = next(iter(network.parameters()))
    return sample_ids(
        network,
        told,
        free if course.guided else None,
        ids=torch.full((count, *grid), network.config.mask_id, device=weight.device),
        seeds=list(range(count)),
        courses=[course] * count,
        draws=Draws.of(sampling),
    )
