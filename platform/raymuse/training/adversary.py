"""A patch discriminator against the VQGAN: Esser et al., "Taming Transformers", arXiv 2012.09841, section 3.1.

It learns to tell pictures from their round trips, patch by patch, in the same step in which the VQGAN learns to fool
it. B pictures, H W pixels, h w patches.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from raymuse.config.training import AdversarialConfig, OptimizerConfig
from raymuse.training.engine import PlainEngine, global_sum

DELTA = 1e-4  # keeps the adaptive scale finite
MOST_SCALE = 1e4
NORM_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Logits (B, 1, h, w), high where a patch of the pictures (B, 3, H, W) in [0, 1] looks real.

    pix2pix's PatchGAN (Isola et al., arXiv 1611.07004, section 3.2.2), but with group norm where that has batch norm:
    what it says of a picture must not depend on which others are in the batch, or the world size would change it.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**number, 8) for number in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number, (before, width) in enumerate(pairwise(widths), start=1):
            stride = 2 if number < layers else 1
            convolution = nn.Conv2d(before, width, 4, stride, padding=1, bias=False)
            blocks += [convolution, nn.GroupNorm(NORM_GROUPS, width), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.blocks(2 * pictures - 1)
        return logits


def least_side(layers: int) -> int:
    """Side of the smallest pictures that a discriminator of so many layers has a patch for."""
    return int(3 * 2**layers)


class Adversary:
    """The discriminator, its optimizer, and the scale of its say in the VQGAN's loss.

    The scale is the ratio of the norms of two gradients at the decoder's last layer, that of the reconstruction and
    that of the adversarial term. Both are those of the whole global batch of the step before, so that neither workers
    nor micro batches change them.
    """

    def __init__(self, config: AdversarialConfig, optimizer: OptimizerConfig, seed: int, device: str) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = PatchDiscriminator(config.channels, config.layers)
        own = OptimizerConfig(
            lr=config.lr, beta1=0.5, beta2=0.9, weight_decay=0.0, warmup_steps=0, clip_norm=optimizer.clip_norm
        )
        self.engine = PlainEngine(self.network, own, device)
        self.active = config.start == 0
        self.scale = torch.zeros(1, device=device)
        self.pulls: list[Tensor] = []  # a micro batch: sums of both gradients at the last layer, and its rows

    def term(
        self, pictures: Tensor, drawn: Tensor, reconstruction: Tensor, weights: Tensor, last: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to the VQGAN's loss, a row (B,), and sums over the rows for the log.

        The gradients of the discriminator's own loss are left in its parameters for `step`; where they are not
        finite the term is none either, so that the step is passed over as a whole.

        Args:
            reconstruction: loss of each row (B,).
            weights: of the rows (B,).
            last: weight of the decoder's last layer.
        """
        frozen = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        fooled = -functional_call(self.network, frozen, (drawn,)).float().flatten(1).mean(dim=1)
        logits = self.network(torch.cat([pictures, drawn.detach()])).float()
        real, fake = logits.chunk(2)
        told = (discriminator_loss(real, fake, self.config.loss) * weights).sum()
        with torch.autocast(drawn.device.type, enabled=False):
            sums = (reconstruction * weights).sum(), (fooled * weights).sum()
            pulls = [torch.autograd.grad(total, last, retain_graph=True)[0].float().flatten() for total in sums]
            self.pulls.append(torch.cat([*pulls, weights.sum().view(1)]))
            told.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        nothing = (told.detach() + norm) * 0  # or not a number
        metrics = {"adversarial": sums[1].detach(), "discriminator": told.detach()}
        return self.config.weight * self.scale * fooled + nothing, metrics

    def step(self, step: int, lr_scale: float) -> dict[str, float]:
        """Train the discriminator on what `term` saw, and measure the scale of the next step. Collective."""
        care: dict[str, float] = {}
        if self.pulls:
            summed = global_sum(torch.stack(self.pulls).sum(dim=0))
            gradients, rows = summed[:-1], summed[-1]
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(rows)
            care = {"adversarial_scale": float(self.scale), "discriminator_grad_norm": self.engine.step(lr_scale)}
            reconstruction, adversarial = (gradients / rows).chunk(2)
            self.scale = (reconstruction.norm() / (adversarial.norm() + DELTA)).clamp(max=MOST_SCALE).view(1)
            self.pulls.clear()
        self.active = step + 1 >= self.config.start
        return care

    def forget(self) -> None:
        """Drop what `term` left behind, of a step that is not taken."""
        self.pulls.clear()
        for parameter in self.network.parameters():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Weights, moments, scale and counts, for a checkpoint."""
        tensors = {
            "scale": self.scale.clone(),
            "counts": torch.tensor([int(self.active), self.engine.updates()]),
        }
        for name in self.engine.parameters:
            tensors[f"weight/{name}"] = self.engine.read(name).clone()
            tensors |= {
                f"{moment}/{name}": self.engine.read(name, moment).clone() for moment in self.engine.moments(name)
            }
        return tensors

    def load(self, state: dict[str, Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self.active = bool(state["counts"][0])
        for name in self.engine.parameters:
            self.engine.write(name, state[f"weight/{name}"])
            for moment in self.engine.moments(name):
                self.engine.write(name, state[f"{moment}/{name}"], moment)
        self.engine.set_updates(int(state["counts"][1]))


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """Loss of each row (B,), of logits (B, 1, h, w) on pictures and on round trips; half of it is for either.

    hinge: max(0, 1 - real) + max(0, 1 + fake) (Lim & Ye, arXiv 1705.02894); vanilla: cross-entropy (Goodfellow et al.,
    arXiv 1406.2661).
    """
    bent, margin = (F.relu, 1.0) if kind == "hinge" else (F.softplus, 0.0)
    return 0.5 * (bent(margin - real) + bent(margin + fake)).flatten(1).mean(dim=1)
