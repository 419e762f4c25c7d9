"""Training a token critic (Lezama et al., "Improved Masked Image Generation with Token-Critic", arXiv 2209.04439).

The base, which stays as it is, fills the hidden ids of a picture by one draw; the critic is shown the whole and tells
which ids are not the true ones. Sampling then keeps what the critic believes, not what the base was sure of.

B samples, h w grid, N masked positions, C codes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from raymuse.config.errors import UserError
from raymuse.config.training import CriticConfig, Precision
from raymuse.drawing.model_folder import load_base, trained_part
from raymuse.masking import CRITIC, pick, uniforms
from raymuse.models.base import Base, BaseShape, new_base, record_of
from raymuse.models.network_files import save_network
from raymuse.training.start import base_shape, require_fit, shape_of
from raymuse.training.streamed import Pieces
from raymuse.training.task import Batch, Loss, Stateless, network_weights
from raymuse.training.tokens import TokenStream


class CriticLoss(Loss):
    """Binary cross-entropy of "this id is the true one", over all positions of the real rows, summed."""

    def __init__(self, network: Base, base: Base, precision: Precision) -> None:
        super().__init__(precision)
        self.network = network
        self.base = base

    def sums(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        told = batch["states"], batch["pooled"], batch["micro"]
        filled = self._filled(batch, told)
        true = (filled == batch["targets"]).float()
        condition: Any = self.network.condition(*told)
        logits = self.network.head(self.network.features(filled, condition))[..., 0].float()
        real = batch["real"][:, None, None].float()
        loss = (F.binary_cross_entropy_with_logits(logits, true, reduction="none") * real).sum()
        right = ((logits > 0) == (true > 0)).float()
        return loss, {"accuracy": (right * real).sum(), "true_share": (true * real).sum()}

    @torch.no_grad()
    def _filled(self, batch: Batch, told: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Ids (B, h, w) with a draw of the base where they were hidden."""
        mask = batch["mask"]
        condition: Any = self.base.condition(*told)
        features = self.base.features(batch["ids"], condition)
        probabilities_NC = self.base.head(features[mask]).float().softmax(dim=-1)
        return batch["ids"].masked_scatter(mask, pick(probabilities_NC, batch["draws"][mask]))


def critics_shape(shape: BaseShape) -> dict[str, Any]:
    """The fields of a critic's shape by default: the base's, with one logit an id."""
    return {**asdict(shape), "codebook_size": 1, "self_conditioning": False, "self_critic": False}


class CriticTask(Stateless):
    """Critic training on the base's own token shards.

    Raises:
        ConfigError: for a shape that there is not.
        UserError: for a base that is not trained to the end, or was made for other parts.
    """

    def __init__(self, config: CriticConfig, device: str = "cpu", pieces: Pieces | None = None) -> None:
        self.config = config
        self.stream = TokenStream(config, device, pieces=pieces)
        base = load_base(trained_part(config.base, "transformer"))
        kind = type(base.config)
        known = base_shape(self.stream, kind)
        if base.config.sample_size != known["sample_size"]:
            raise UserError(
                f"{config.base} draws a grid of {base.config.sample_size}, and {config.ids} of {config.source} are "
                f"{known['sample_size']} a side: set ids to what the base was trained on."
            )
        require_fit(config.base, base.config, known, config.source)
        self.network = new_base(shape_of(kind, config, critics_shape(base.config)))
        self.network.initialise(config.seed)
        self.network.gradient_checkpointing = config.gradient_checkpointing
        self.module = CriticLoss(self.network, base, config.precision)

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        batch = self.stream.batch(positions, weights, self.network.config.mask_id)
        draws = torch.from_numpy(uniforms(self.config.seed, CRITIC, positions, batch["ids"][0].numel()))
        return {**batch, "draws": draws.to(batch["ids"].device).view_as(batch["ids"])}

    def count(self, batch: Batch) -> float:
        return float(batch["real"].sum()) * batch["mask"][0].numel()

    def keys(self, positions: NDArray[np.int64]) -> list[str]:
        return self.stream.keys(positions)

    def sample(self, weights: dict[str, Tensor]) -> Image.Image | None:
        return None  # what a critic is worth shows in pictures that it ordered: `raymuse generate`, `score`

    def save(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        config = self.network.config
        save_network(new_base(config), record_of(config), folder, network_weights(weights))
        return {"parameters": sum(value.numel() for value in weights.values())}
