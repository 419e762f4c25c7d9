"""Masked-image training of the base and the super-resolution transformer from token shards.

B samples, h w grid, N masked positions, C codes, T text tokens, E text width, P pooled width.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from raymuse.config.errors import UserError
from raymuse.config.training import BaseConfig, LoraConfig, Precision, SuperresConfig
from raymuse.masking import CRITIC, FED_BACK, mean_masking_ratio, pick, uniforms
from raymuse.models import lora
from raymuse.models.base import Base, like, record_of
from raymuse.models.network_files import save_network
from raymuse.models.superres import SuperRes
from raymuse.models.text import TextEncoder
from raymuse.models.vqgan import Vqgan
from raymuse.training.engine import Engine
from raymuse.training.samples import drawn, low_ids_by, told_by
from raymuse.training.start import first_network
from raymuse.training.streamed import Pieces
from raymuse.training.task import Batch, Loss, Stateless, network_weights, sheet
from raymuse.training.tokens import TokenStream

SAMPLES = 16
DECILES = 10


class MaskedLoss(Loss):
    """Cross-entropy on the masked positions, summed, and to a weight on the others; normalised elsewhere.

    Args:
        label_smoothing: of the masked positions.
        text: an encoder that is trained as well; the batch then has `text_ids`, not what they were encoded to.
        unmasked_weight: of the other positions; 0: they are not computed.
        critic_weight: of a self-critic's loss, a mean over all positions, beside the mean of the loss.
        positions: that the loss is divided by, per position of a grid, in the mean (the critic's is, too).
    """

    def __init__(
        self,
        network: Base | SuperRes,
        label_smoothing: float,
        precision: Precision = "fp32",
        text: TextEncoder | None = None,
        unmasked_weight: float = 0.0,
        critic_weight: float = 1.0,
        positions: float = 1.0,
    ) -> None:
        super().__init__(precision)
        self.critic_weight = critic_weight * positions
        self.unmasked_weight = unmasked_weight
        self.network = network
        self.label_smoothing = label_smoothing
        self.text = text
        self.text_network = None if text is None else text.network

    def sums(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        condition = self.condition(batch)
        features = self.network.features(batch["ids"], condition, None, self._fed_back(batch, condition))
        mask = batch["mask"]
        logits_NC = self.network.head(features[mask]).float()
        targets_N = batch["targets"][mask]
        loss = F.cross_entropy(logits_NC, targets_N, reduction="sum", label_smoothing=self.label_smoothing)
        metrics = masked_metrics(logits_NC.detach(), targets_N, mask)
        if self.unmasked_weight > 0:
            known = ~mask & batch["real"][:, None, None]
            logits_KC = self.network.head(features[known]).float()
            loss = loss + self.unmasked_weight * F.cross_entropy(logits_KC, batch["targets"][known], reduction="sum")
        if "draws" in batch:
            told, more = self._judged(batch, condition, logits_NC.detach())
            loss, metrics = loss + self.critic_weight * told, {**metrics, **more}
        return loss, metrics

    def _fed_back(self, batch: Batch, condition: Any) -> Tensor | None:
        """Features (B, h, w, D) of a pass without gradients, of the samples that are to see them; of the others 0.

        All samples pass, so that every rank does the same work and a sample's features do not depend on its batch.
        """
        if "fed_back" not in batch:
            return None
        # Its copies of the weights in low precision have no gradients: they must not serve the pass that has.
        with torch.no_grad(), self.autocast(batch["ids"].device.type, cache=False):
            features = self.network.features(batch["ids"], condition)
        fed_back: Tensor = features * batch["fed_back"][:, None, None, None]
        return fed_back

    def _judged(self, batch: Batch, condition: Any, logits_NC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Binary cross-entropy of "this id is the true one" with a draw where ids were hidden, summed over the rows.

        The network judges what it drew itself, as lucidrains' muse-maskgit has it (`SelfCritic`).
        """
        assert not isinstance(self.network, SuperRes)
        drawn_N = pick(logits_NC.softmax(dim=-1), batch["draws"][batch["mask"]])
        filled = batch["ids"].masked_scatter(batch["mask"], drawn_N)
        true = (filled == batch["targets"]).float()
        logits = self.network.judge(self.network.features(filled, condition))[..., 0].float()
        real = batch["real"][:, None, None].float()
        loss = (F.binary_cross_entropy_with_logits(logits, true, reduction="none") * real).sum()
        of = real.sum() * true[0].numel()
        right = ((logits > 0) == (true > 0)).float()
        metrics = {"critic_loss": loss.detach(), "critic_accuracy": (right * real).sum()}
        return loss, {**metrics, **{f"{name}:of": of for name in metrics}}

    def condition(self, batch: Batch) -> Any:
        if self.text is None:
            states, pooled = batch["states"], batch["pooled"]
        else:
            states, pooled = self.text.forward(batch["text_ids"])
        if isinstance(self.network, SuperRes):
            return self.network.condition(states, batch["low_ids"])
        return self.network.condition(states, pooled, batch["micro"])


class MaskedTask(Stateless):
    """Base or super-resolution training, by the config's type.

    Raises:
        ConfigError: for a shape or schedule that there is not.
        UserError: where shards, text encoder and config do not fit together.
    """

    def __init__(self, config: BaseConfig | SuperresConfig, device: str = "cpu", pieces: Pieces | None = None) -> None:
        self.config = config
        self.device = device
        self.stream = TokenStream(config, device, bool(config.lora and config.lora.text_targets), pieces)
        self.module = self._build()
        self.network = self.module.network

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        batch = self.stream.batch(positions, weights, self.network.config.mask_id)
        seed, shape, device = self.config.seed, self.network.config, batch["ids"].device
        if shape.self_conditioning:
            chosen = uniforms(seed, FED_BACK, positions, 1)[:, 0] < self.config.fed_back_share
            batch["fed_back"] = torch.from_numpy(chosen.astype(np.float32)).to(device)
        if getattr(shape, "self_critic", False):
            draws = torch.from_numpy(uniforms(seed, CRITIC, positions, batch["ids"][0].numel()))
            batch["draws"] = draws.to(device).view_as(batch["ids"])
        return batch

    def count(self, batch: Batch) -> float:
        masked = float(batch["mask"].sum())
        if self.config.unmasked_weight == 0:
            return masked
        return masked + self.config.unmasked_weight * (float(batch["real"].sum()) * batch["mask"][0].numel() - masked)

    def keys(self, positions: NDArray[np.int64]) -> list[str]:
        return self.stream.keys(positions)

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        return self.stream.counts()

    def sample(self, weights: dict[str, Tensor]) -> Image.Image | None:
        """The first rows of the store drawn anew from their captions, under the truth as the VQGAN decodes it."""
        if self.config.vqgan is None:
            return None
        module = self._build().eval()
        missing, unknown = module.load_state_dict(weights, strict=False)
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert not unknown, unknown
        assert not trained.intersection(missing), missing
        module.to(self.device)
        count, grid = min(SAMPLES, len(self.stream.store)), self.stream.grid
        vqgan = Vqgan.load(self.config.vqgan, self.device)
        wanted = self.config.samples
        if wanted.prompts:
            return sheet([vqgan.decode(self._prompted(module, vqgan.factor))])
        truth, told = self.stream.first(count)
        count = len(truth)
        free = {**told, **self._without_words(count)}
        with torch.no_grad():
            ids = drawn(module.network, module.condition(told), module.condition(free), grid, wanted.sampling, count)
        return sheet([vqgan.decode(truth), vqgan.decode(ids)])

    def _without_words(self, count: int) -> Batch:
        """What an empty caption tells, so many times."""
        if self.stream.text_trained:
            return {"text_ids": self.stream.empty_ids.expand(count, -1).to(self.device)}
        empty = {"states": self.stream.empty_states, "pooled": self.stream.empty_pooled}
        return {name: value.expand(count, *value.shape[1:]).to(self.device) for name, value in empty.items()}

    def _prompted(self, module: MaskedLoss, factor: int) -> Tensor:
        """Ids (B, h, w) drawn for the user's prompts, of a super-resolution from what its base draws for them."""
        wanted, grid = self.config.samples, self.stream.grid
        told = told_by(wanted.prompts, self.config, self.stream, factor, self.device)
        if wanted.base is not None and isinstance(self.config, SuperresConfig):
            low_grid = self.stream.store.grid("low_ids")
            told["low_ids"] = low_ids_by(wanted.base, told, low_grid, wanted.sampling)
        free = {**told, **{name: told[f"free_{name}"] for name in ("states", "pooled", "text_ids")}}
        with torch.no_grad():
            conditions = module.condition(told), module.condition(free)
            return drawn(module.network, *conditions, grid, wanted.sampling, len(wanted.prompts))

    def save(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        if self.config.lora is None:
            # A fresh network to write, since under ZeRO-3 the trained one holds only shards.
            record = record_of(self.network.config)
            save_network(like(self.network), record, folder, network_weights(weights))
        else:
            parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
            for name, value in weights.items():
                child, _, rest = name.partition(".")
                parts["text_encoder" if child == "text_network" else self.part][rest] = value
            lora.save(parts, self.config.lora.alpha, folder)
        return {"parameters": sum(value.numel() for value in weights.values()), "grid": list(self.stream.grid)}

    @property
    def part(self) -> str:
        """The trained network's folder within a model folder."""
        return "superres" if isinstance(self.config, SuperresConfig) else "transformer"

    def _build(self) -> MaskedLoss:
        """The loss with a network as it stands before the first step."""
        config = self.config
        network = first_network(config, self.stream)
        network.gradient_checkpointing = config.gradient_checkpointing
        text = None
        if config.lora is not None:
            lora.insert(network, config.lora.rank, config.lora.alpha, config.lora.targets, config.seed)
            text = self._adapted_text(config.lora)
        masked = mean_masking_ratio(config.masking, config.min_masking_ratio)
        return MaskedLoss(
            network,
            config.label_smoothing,
            config.precision,
            text,
            config.unmasked_weight,
            config.critic_weight if isinstance(config, BaseConfig) else 1.0,
            masked + config.unmasked_weight * (1 - masked),
        )

    def _adapted_text(self, shape: LoraConfig) -> TextEncoder | None:
        """The text encoder with an adapter of its own, where the recipe wants one."""
        if not shape.text_targets:
            return None
        if self.config.text_reader is None or self.stream.store.has_states:
            raise UserError(
                "lora.text_targets: the text encoder can only be trained where the token shards hold text ids "
                "(pretokenize with text=ids, or stream.text=ids) and text_encoder names its folder."
            )
        text = TextEncoder.load(self.config.text_reader, self.device)
        lora.insert(text.network, shape.rank, shape.alpha, shape.text_targets, self.config.seed + 1)
        return text


def masked_metrics(logits_NC: Tensor, targets_N: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums over the masked positions: right guesses, the guesses' entropy (nats), and the loss by masking ratio.

    `loss_at_0.3` is the loss of the samples of which 30 to 40 % are masked: a few masks are easy, many are hard, and
    the mean over all hides which of them is still learned (open-muse logs the same).
    """
    log_probabilities = logits_NC.log_softmax(dim=-1)
    losses_N = -log_probabilities.gather(-1, targets_N[:, None]).squeeze(-1)
    counts_B = mask.flatten(1).sum(dim=1)
    metrics = {
        "accuracy": (logits_NC.argmax(dim=-1) == targets_N).sum(),
        "accuracy:of": counts_B.sum(),
        "entropy": -(log_probabilities.exp() * log_probabilities).sum(),
        "entropy:of": counts_B.sum(),
    }
    deciles_B = (counts_B * DECILES // (mask[0].numel() + 1)).clamp(max=DECILES - 1)
    deciles_N = deciles_B.repeat_interleave(counts_B)
    sums = torch.zeros(2, DECILES, device=losses_N.device)
    sums[0].index_add_(0, deciles_N, losses_N)
    sums[1].index_add_(0, deciles_N, torch.ones_like(losses_N))
    for number in range(DECILES):
        name = f"loss_at_{number / DECILES}"
        metrics |= {name: sums[0, number], f"{name}:of": sums[1, number]}
    return metrics
