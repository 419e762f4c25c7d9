"""Care of a VQGAN's codebook: start from data, moving averages, revival of dead codes; alike on every rank.

Moving-average updates after van den Oord et al. (arXiv 1711.00937, appendix A.1), revival after Jukebox
(arXiv 2005.00341, section 3.1), prices after Chou, Lookabaugh & Gray, "Entropy-constrained vector quantization"
(1989). All ranks see the same gathered latents and counts, so all hold the same codes.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymuse.training.engine import global_sum, rank_and_world

KMEANS_ROUNDS = 10
LEAST_SHARE = 1e-5  # of the ids, that a code is taken to have when its price is set


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
        self.distortion = torch.zeros(1, device=weight.device)  # moving average of a latent's squared distance
        self.revived = 0

    def start(self, latents: Tensor, step: int) -> None:
        """First codes: k-means++ over the global batch's latents (N, D). Collective."""
        pool = _gather(latents)
        codes = spread(pool, len(self.weight), None, self._generator(step))
        for _ in range(KMEANS_ROUNDS):
            counts, sums = _assign(pool, torch.cdist(pool, codes).argmin(dim=1), len(codes))
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
        self.weight.copy_(codes)
        self.counts = torch.ones(len(codes), device=codes.device)
        self.sums = codes.clone()
        self.started = True

    def update(self, latents: Tensor, ids: Tensor, step: int, *, revive: bool, rate: float = 0.0) -> dict[str, float]:
        """Move the codes towards the latents (N, D) that chose them; usage of this step. Collective.

        With a `rate` above 0 the last coordinate of all latents must be 0: see `_price`.
        """
        counts, sums = _assign(latents, ids, len(self.weight))
        counts, sums = global_sum(counts), global_sum(sums)
        if rate > 0:
            self._follow_distortion(latents, ids, counts)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        alive = self.counts >= self.revive_below
        self.weight[alive] = self.sums[alive] / self.counts[alive, None]
        if revive and not bool(alive.all()):
            self._revive(~alive, latents, step)
        if rate > 0:
            self._price(rate)
        return self._usage(counts)

    def watch(self, ids: Tensor) -> dict[str, float]:
        """Usage of this step's ids (N,); the codes stay as they are. Collective."""
        counts = global_sum(torch.bincount(ids, minlength=len(self.weight)).float())
        self.counts.lerp_(counts, 1 - self.decay)
        return self._usage(counts)

    def _usage(self, counts: Tensor) -> dict[str, float]:
        return {
            "codebook_usage": float((self.counts >= self.revive_below).float().mean()),
            "codebook_perplexity": perplexity(counts),
            "codes_revived": float(self.revived),
        }

    def state(self) -> dict[str, Tensor]:
        return {
            "codes": self.weight.detach().clone(),
            "counts": self.counts,
            "sums": self.sums,
            "distortion": self.distortion,
            "started": torch.tensor([int(self.started), self.revived]),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.weight.copy_(state["codes"])
        device = self.weight.device
        self.counts, self.sums, self.distortion = (
            state[name].to(device, copy=True) for name in ("counts", "sums", "distortion")
        )
        self.started, self.revived = bool(state["started"][0]), int(state["started"][1])

    def _revive(self, dead: Tensor, latents: Tensor, step: int) -> None:
        fresh = spread(_gather(latents), int(dead.sum()), self.weight[~dead], self._generator(step))
        self.weight[dead] = fresh
        self.sums[dead] = fresh
        self.counts[dead] = 1.0
        self.revived += int(dead.sum())

    def _follow_distortion(self, latents: Tensor, ids: Tensor, counts: Tensor) -> None:
        """Mean squared distance of the latents to the codes that they chose, prices apart. Collective."""
        squared = global_sum((latents - self.weight[ids])[:, :-1].square().sum().view(1)) / counts.sum()
        self.distortion.lerp_(squared, 1 - self.decay if bool(self.distortion > 0) else 1.0)

    def _price(self, rate: float) -> None:
        """Write the price of every code, `rate` times the mean distortion times -log p(code), into its last coordinate.

        Latents are 0 there, so the squared distance to a code is that of before plus its price, and the nearest code
        is the one of least distortion and price together: what differs too little to be worth the bits shares a code.
        """
        nats = -(self.counts / self.counts.sum()).clamp(min=LEAST_SHARE).log()
        self.weight[:, -1] = (rate * self.distortion * nats).sqrt()

    def _generator(self, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64)))


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of how often each code (K,) was chosen: as many equally frequent codes would say as much."""
    share = counts / counts.sum()
    return math.exp(-float((share * share.clamp(min=1e-12).log()).sum()))


def spread(pool: Tensor, count: int, codes: Tensor | None, generator: np.random.Generator) -> Tensor:
    """`count` of the latents (N, D), each drawn with probability proportional to its squared distance from all codes.

    So what is rare and badly served gets a code, and the background, which is most of any batch, does not get them
    all (k-means++, Arthur & Vassilvitskii 2007). `codes` (K, D) are those that stand already.
    """
    distances = torch.full((len(pool),), math.inf) if codes is None else torch.cdist(pool, codes).amin(dim=1).cpu()
    chosen: list[Tensor] = []
    for draw in generator.random(count):
        weights = distances.square() if distances.isfinite().all() else torch.ones(len(pool))
        cumulative = weights.double().cumsum(0) + 1e-12
        place = min(int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True)), len(pool) - 1)
        chosen.append(pool[place])
        distances = torch.minimum(distances, (pool - pool[place]).norm(dim=1).cpu())
    return torch.stack(chosen)


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
    sizes = global_sum(sizes)
    padded = latents.new_zeros(int(sizes.max()), latents.shape[1])
    padded[: len(latents)] = latents
    pieces = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes.tolist(), strict=True)])
