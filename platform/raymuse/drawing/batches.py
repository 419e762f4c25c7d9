"""Requests to pictures, a batch of one shape at a time."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymuse.drawing.attention import attention_by
from raymuse.drawing.inputs import Mask, Pixels
from raymuse.drawing.networks import Networks
from raymuse.drawing.sampler import Course, Judge, OnStep, TokenTransformer, sample_ids
from raymuse.drawing.tasks import UNKNOWN, Ids, Request, Stage
from raymuse.masking import CHOICE, CONFIDENCE, HIGH_CHOICE, HIGH_CONFIDENCE


@dataclass(frozen=True)
class Picture:
    """One drawn picture, uint8 (H, W, 3) with its ids (h, w), and the base's own where a cascade drew it."""

    pixels: NDArray[np.uint8]
    base_pixels: NDArray[np.uint8]
    ids: Ids
    base_ids: Ids


def draw(networks: Networks, requests: Sequence[Request], on_step: OnStep | None = None) -> list[Picture]:
    """See `Pipeline.draw`."""
    if cut := networks.text.truncated(list(dict.fromkeys(request.prompt for request in requests))):
        warnings.warn(
            f"{len(cut)} prompts have more than {networks.text.length} tokens, and what is beyond is not read, as of: "
            f"{cut[0][:80]!r}",
            stacklevel=3,
        )
    drawn: dict[int, Picture] = {}
    for places in _batches(requests, networks.batch_size):
        batch = [requests[place] for place in places]
        with attention_by(networks.attention):
            drawn.update(zip(places, _draw(networks, batch, on_step), strict=True))
    return [drawn[place] for place in range(len(requests))]


@torch.no_grad()
def _draw(networks: Networks, requests: Sequence[Request], on_step: OnStep | None) -> Iterator[Picture]:
    """One batch, padded to `batch_size` rows with rows that have nothing to draw."""
    first, spare = requests[0], networks.batch_size - len(requests)
    blank = replace(first, prompt="", negative="", seed=0, base=_still(first.base), high=_still(first.high), paste=None)
    rows = [*requests, *[blank] * spare]
    states, pooled = _said(networks, [row.prompt for row in rows])
    free_states, free_pooled = _said(networks, [row.negative for row in rows])
    micro = _micro(networks, first.base.ids.shape, len(rows))
    base_ids = _sample(
        networks.base,
        networks.base.condition(states, pooled, micro),
        lambda: networks.base.condition(free_states, free_pooled, micro),
        [row.base for row in rows],
        [row.seed for row in rows],
        (CHOICE, CONFIDENCE),
        None if on_step is None else lambda step, ids: on_step(step, ids[: len(requests)]),
        states.device,
        _judge(networks, states, pooled, micro) if first.base.draws.order == "critic" else None,
    )
    base_pixels = networks.vqgan.decode(base_ids)
    ids, pixels = base_ids, base_pixels
    if first.high is not None:
        assert networks.superres is not None
        assert networks.superres_vqgan is not None
        superres, condition = networks.superres, networks.superres.condition(states, base_ids)
        ids = _sample(
            superres,
            condition,
            lambda: superres.retold(condition, free_states),
            [row.high for row in rows if row.high is not None],
            [row.seed for row in rows],
            (HIGH_CHOICE, HIGH_CONFIDENCE),
            None,
            states.device,
        )
        pixels = networks.superres_vqgan.decode(ids)
    arrays = (pixels, base_pixels, ids.cpu().numpy(), base_ids.cpu().numpy())
    for request, *parts in zip(requests, *(array[: len(requests)] for array in arrays), strict=True):
        yield _pasted(Picture(*parts), request.paste)


def _sample(
    network: TokenTransformer,
    condition: Any,
    free: Any,
    stages: Sequence[Stage],
    seeds: Sequence[int],
    streams: tuple[int, int],
    on_step: OnStep | None,
    device: torch.device,
    critic: Judge | None = None,
) -> Tensor:
    """Ids (B, h, w). `free` makes the unconditional condition, where a course needs it."""
    ids = torch.from_numpy(np.stack([stage.ids for stage in stages])).to(device)
    return sample_ids(
        network,
        condition,
        free() if any(stage.course.guided for stage in stages) else None,
        ids=torch.where(ids == UNKNOWN, int(network.config.mask_id), ids),
        seeds=seeds,
        courses=[stage.course for stage in stages],
        draws=stages[0].draws,
        streams=streams,
        on_step=on_step,
        critic=critic,
    )


def _judge(networks: Networks, states: Tensor, pooled: Tensor, micro: Tensor) -> Judge:
    """What the critic says of ids, its part of the condition computed once."""
    critic = networks.critic
    assert critic is not None, "Pipeline asks for it before any work"
    condition = critic.precompute(critic.condition(states, pooled, micro))
    return lambda ids: critic.head(critic.features(ids, condition)).squeeze(-1)


def _said(networks: Networks, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States and pooled vectors of B prompts, of which each is encoded once. B rows, whatever they say."""
    distinct = list(dict.fromkeys(prompts))
    states, pooled = networks.text([*distinct, *[""] * (len(prompts) - len(distinct))])
    places = torch.tensor([distinct.index(prompt) for prompt in prompts], device=states.device)
    return states[places], pooled[places]


def _micro(networks: Networks, grid: tuple[int, ...], count: int) -> Tensor:
    """Micro-conditions (B, 5): the model's own, with width and height in proportion to the size that is drawn."""
    width, height, top, left, aesthetic = networks.settings.micro_conditioning
    side = networks.settings.base_size // networks.vqgan.factor
    row = [width * grid[1] / side, height * grid[0] / side, top, left, aesthetic]
    return torch.tensor([row] * count, device=networks.vqgan.network.device)


def _batches(requests: Sequence[Request], most: int) -> Iterator[list[int]]:
    """Places of the requests that share a shape, at most so many at a time."""
    shapes = list(dict.fromkeys(request.shape for request in requests))
    order = sorted(range(len(requests)), key=lambda place: shapes.index(requests[place].shape))
    for _, group in groupby(order, key=lambda place: requests[place].shape):
        places = list(group)
        yield from (places[start : start + most] for start in range(0, len(places), most))


def _still(stage: Stage | None) -> Any:
    """A stage of the same shape with nothing to draw."""
    if stage is None:
        return None
    return replace(stage, ids=np.zeros_like(stage.ids), course=Course([], [], []))


def _pasted(picture: Picture, paste: tuple[Pixels, Mask] | None) -> Picture:
    if paste is None:
        return picture
    own, mask = paste
    return replace(picture, pixels=np.where(mask[:, :, None], picture.pixels, own))
