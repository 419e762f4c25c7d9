"""Care of a VQGAN's codebook: start from data, moving averages, revival of dead codes; alike on every rank.

Moving-average updates after van den Oord et al. (arXiv 1711.00937, appendix A.1), revival after Jukebox
(arXiv 2005.00341, section 3.1). All ranks see the same gathered latents and counts, so all hold the same codes.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymuse.training.engine import global_sum, rank_and_world

KMEANS_ROUNDS = 10


class Codebook:
    """The codes (K, D) of a network, with how often each is used.

    Args:
        weight: the embedding's own tensor, changed in place.
        decay: of the moving averages.
        revive_below: a code whose average use per step falls below restarts from a latent of the batch.
    """

    def __init__(self, weight: Tensor, *, decay: float, revive_below: float, seed: int) -> None:
        self.weight = weight
        self.decay = decay
        self.revive_below = revive_below
        self.seed = seed
        self.started = False
        self.counts = torch.ones(len(weight), device=weight.device)
        self.sums = weight.detach().clone()
        self.revived = 0

    def start(self, latents: Tensor, step: int) -> None:
        """First codes: k-means over the global batch's latents (N, D). Collective."""
        pool = _gather(latents)
        chosen = self._generator(step).choice(len(pool), len(self.weight), replace=len(pool) < len(self.weight))
        codes = pool[torch.from_numpy(chosen).to(pool.device)].clone()
        for _ in range(KMEANS_ROUNDS):
            counts, sums = _assign(pool, torch.cdist(pool, codes).argmin(dim=1), len(codes))
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
        self.weight.copy_(codes)
        self.counts = torch.ones(len(codes), device=codes.device)
        self.sums = codes.clone()
        self.started = True

    def update(self, latents: Tensor, ids: Tensor, step: int, *, revive: bool) -> dict[str, float]:
        """Move the codes towards the latents (N, D) that chose them; usage of this step. Collective."""
        counts, sums = _assign(latents, ids, len(self.weight))
        counts, sums = global_sum(counts), global_sum(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        alive = self.counts >= self.revive_below
        self.weight[alive] = self.sums[alive] / self.counts[alive, None]
        if revive and not bool(alive.all()):
            self._revive(~alive, latents, step)
        share = counts / counts.sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        return {
            "codebook_usage": float((self.counts >= self.revive_below).float().mean()),
            "codebook_perplexity": math.exp(float(entropy)),
            "codes_revived": float(self.revived),
        }

    def state(self) -> dict[str, Tensor]:
        return {
            "codes": self.weight.detach().clone(),
            "counts": self.counts,
            "sums": self.sums,
            "started": torch.tensor([int(self.started), self.revived]),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.weight.copy_(state["codes"])
        self.counts, self.sums = state["counts"].clone(), state["sums"].clone()
        self.started, self.revived = bool(state["started"][0]), int(state["started"][1])

    def _revive(self, dead: Tensor, latents: Tensor, step: int) -> None:
        pool = _gather(latents)
        chosen = torch.from_numpy(self._generator(step).integers(len(pool), size=int(dead.sum()))).to(pool.device)
        self.weight[dead] = pool[chosen]
        self.sums[dead] = pool[chosen]
        self.counts[dead] = 1.0
        self.revived += int(dead.sum())

    def _generator(self, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64)))


def _assign(latents: Tensor, ids: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many latents chose each code (K,), and their sums (K, D)."""
    counts = torch.bincount(ids, minlength=codes).float()
    sums = torch.zeros(codes, latents.shape[1], device=latents.device).index_add_(0, ids, latents)
    return counts, sums


def _gather(latents: Tensor) -> Tensor:
    """All ranks' latents, in the order of the ranks, however many each has. Collective."""
    rank, world = rank_and_world()
    if world == 1:
        return latents
    sizes = torch.zeros(world, dtype=torch.int64)
    sizes[rank] = len(latents)
    global_sum(sizes)
    padded = latents.new_zeros(int(sizes.max()), latents.shape[1])
    padded[: len(latents)] = latents
    pieces = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes.tolist(), strict=True)])
