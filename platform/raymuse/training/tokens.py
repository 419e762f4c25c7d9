"""Token shards, or what is encoded meanwhile, in the training stream's order: ids with some hidden, and what is said.

B samples, h w grid, T text tokens, E text width, P pooled width.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymuse.config.errors import UserError
from raymuse.config.training import MaskedConfig, SuperresConfig
from raymuse.masking import CAPTION, DROPOUT, LOW_NOISE, Rectangles, hide, uniforms
from raymuse.models.text import TextEncoder
from raymuse.storage.shard_cache import ShardCache
from raymuse.storage.tokens import Rows, TokenStore
from raymuse.training.order import SampleOrder
from raymuse.training.streamed import Pieces, Streamed
from raymuse.training.task import Batch


class TokenStream:
    """Batches by stream position; every draw is keyed by (seed, purpose, position).

    Args:
        config: the recipe.
        device: where batches go, and where captions are encoded.
        text_trained: hand out text ids, since the encoder is trained as well.
        pieces: of a config with `stream`, who encodes; None: this process.

    Raises:
        UserError: where shards, text encoder and config do not fit together.
    """

    def __init__(
        self, config: MaskedConfig, device: str, text_trained: bool = False, pieces: Pieces | None = None
    ) -> None:
        self.config = config
        self.device = device
        self.text_trained = text_trained
        self.store = self._stored(config) if config.stream is None else Streamed(config, pieces)
        self.order = SampleOrder(self.store.sizes, config.seed)
        self.grid = self.store.grid(config.ids)
        self.codes = self.store.codes(config.ids)
        self.text = self._text_encoder()
        self.empty_ids = torch.from_numpy(self.store.empty.text_ids.astype(np.int64))
        self.empty_states, self.empty_pooled = self._said(
            self.empty_ids, self.store.empty.text_states, self.store.empty.pooled
        )
        if text_trained:
            self.text = None  # who trains the encoder has one

    @staticmethod
    def _stored(config: MaskedConfig) -> TokenStore:
        return TokenStore(config.input, cache=ShardCache.of(config.shard_cache))

    def keys(self, positions: NDArray[np.int64]) -> list[str]:
        """Keys of the rows at stream positions."""
        return self.store.keys(self.order.rows(positions))

    def encoders(self) -> dict[str, Any]:
        """sha256 of the weights that encoded what the training reads, and of the tokenizer; None: not known."""
        facts = self.store.survey.facts if isinstance(self.store, Streamed) else self.store.config
        vqgan, low = facts.get("vqgan_sha256"), facts.get("low_vqgan_sha256") or facts.get("vqgan_sha256")
        found = {"VQGAN": vqgan if self.config.ids == "image_ids" else low}
        if isinstance(self.config, SuperresConfig):
            found["low-resolution VQGAN"] = low
        return {**found, "text encoder": facts.get("text_encoder_sha256"), "tokenizer": facts.get("tokenizer_sha256")}

    def counts(self) -> dict[str, float]:
        """What is known of the data beside its rows."""
        return {"rejects": float(self.store.rejects)} if isinstance(self.store, Streamed) else {}

    def first(self, count: int) -> tuple[NDArray[np.int64], Batch]:
        """True ids (B, h, w) of the first rows, and what is said of them; few may be missing of pictures."""
        store = self.store
        rows = store.first(count) if isinstance(store, Streamed) else store.rows(range(count), np.zeros(count))
        nothing = torch.zeros(len(rows.micro), dtype=torch.bool)
        batch = {"micro": torch.from_numpy(rows.micro), **self._told(rows, nothing)}
        if rows.low_ids is not None:
            batch["low_ids"] = torch.from_numpy(rows.low_ids)
        return self._ids(rows), {name: tensor.to(self.device) for name, tensor in batch.items()}

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32], mask_id: int) -> Batch:
        """Ids with some hidden, targets, mask (B, h, w), `real` (B,), text and micro-conditions.

        Args:
            weights: (B,) 0 for rows that only pad: none of their ids is in the mask.
        """
        rows = self._rows(positions, uniforms(self.config.seed, CAPTION, positions, 1)[:, 0])
        ids = torch.from_numpy(self._ids(rows))
        hidden = hide(
            ids.flatten(1),
            positions,
            seed=self.config.seed,
            mask_id=mask_id,
            schedule=self.config.masking,
            min_ratio=self.config.min_masking_ratio,
            rectangles=Rectangles(self.config.rectangle_share, self.grid) if self.config.rectangle_share else None,
        )
        real = torch.from_numpy(weights if rows.sound is None else weights * rows.sound) > 0
        dropped = uniforms(self.config.seed, DROPOUT, positions, 1)[:, 0] < self.config.caption_dropout
        batch = {
            "ids": hidden.ids.view_as(ids),
            "targets": ids,
            "mask": hidden.mask.view_as(ids) & real[:, None, None],
            "real": real,
            "micro": torch.from_numpy(rows.micro),
            **self._told(rows, torch.from_numpy(dropped)),
        }
        if isinstance(self.config, SuperresConfig):
            batch["low_ids"] = add_low_noise(
                torch.from_numpy(_low(rows.low_ids)),
                positions,
                self.config.seed,
                self.config.low_noise,
                self.store.codes("low_ids"),
            )
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _rows(self, positions: NDArray[np.int64], draws: NDArray[np.float64]) -> Rows:
        if isinstance(self.store, Streamed):
            return self.store.at(positions, draws)
        return self.store.rows(self.order.rows(positions), draws)

    def _ids(self, rows: Rows) -> NDArray[np.int64]:
        return rows.image_ids if self.config.ids == "image_ids" else _low(rows.low_ids)

    def _text_encoder(self) -> TextEncoder | None:
        if self.store.has_states:
            return None
        if (address := self.config.text_reader) is None:
            raise UserError(
                f"{self.config.input} holds text ids, not states: set text_encoder to the encoder's folder."
            )
        return TextEncoder.load(address, self.device)

    def _said(
        self, text_ids: Tensor, states: NDArray[Any] | None, pooled: NDArray[Any] | None
    ) -> tuple[Tensor, Tensor]:
        """States (B, T, E) and pooled (B, P): as stored, or from the frozen encoder now."""
        if states is not None and pooled is not None:
            return torch.tensor(states, dtype=torch.float32), torch.tensor(pooled, dtype=torch.float32)
        assert self.text is not None
        return self.text.encode(text_ids)

    def _told(self, rows: Rows, dropped: Tensor) -> Batch:
        """What the network is told: states and pooled, or the ids of an encoder that is trained as well.

        Where `dropped` (B,), all of it is the empty caption's.
        """
        text_ids = torch.from_numpy(rows.text_ids)
        if self.text_trained:
            return {"text_ids": torch.where(dropped[:, None], self.empty_ids, text_ids)}
        states, pooled = self._said(text_ids, rows.text_states, rows.pooled)
        dropped = dropped.to(states.device)
        return {
            "states": torch.where(dropped[:, None, None], self.empty_states, states),
            "pooled": torch.where(dropped[:, None], self.empty_pooled, pooled),
        }


def add_low_noise(low_ids: Tensor, positions: NDArray[np.int64], seed: int, most: float, codes: int) -> Tensor:
    """Replace a share of each sample's low-res ids (B, h, w), drawn from U(0, most), by random codes.

    In sampling the low-res ids are generated, so training must not trust them wholly (Muse, section 2.4).
    """
    length = low_ids[0].numel()
    draws = torch.from_numpy(uniforms(seed, LOW_NOISE, positions, 1 + 2 * length))
    replaced = draws[:, 1 : 1 + length] < draws[:, :1] * most
    random_ids = (draws[:, 1 + length :] * codes).long()
    return torch.where(replaced, random_ids, low_ids.flatten(1)).view_as(low_ids)


def _low(ids: NDArray[np.int64] | None) -> NDArray[np.int64]:
    if ids is None:
        raise UserError("these token shards hold no low_ids: pretokenize with low_resolution=...")
    return ids
