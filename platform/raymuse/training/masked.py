"""Masked-image training of the base and the super-resolution transformer from token shards.

B samples, h w grid, N masked positions, C codes, T text tokens, E text width, P pooled width.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from raymuse.config.errors import ConfigError, UserError
from raymuse.config.sampling import SamplingConfig
from raymuse.config.training import BaseConfig, LoraConfig, MaskedConfig, Precision, SuperresConfig
from raymuse.drawing.model_folder import load_superres, load_uvit, local_folder
from raymuse.drawing.sampler import Course, sample_ids
from raymuse.masking import CAPTION, DROPOUT, LOW_NOISE, hide, uniforms
from raymuse.models import lora
from raymuse.models.network_files import save_network
from raymuse.models.superres import SuperRes, SuperResConfig
from raymuse.models.text import TextEncoder
from raymuse.models.uvit import UVit, UVitConfig
from raymuse.models.vqgan import Vqgan
from raymuse.storage.tokens import Rows, TokenStore
from raymuse.training.engine import Engine
from raymuse.training.order import SampleOrder
from raymuse.training.task import Batch, Loss, network_weights, sheet

SAMPLES = 16
FIXED = ("codebook_size", "encoder_hidden_size", "cond_embed_dim", "low_vocab_size")
"""What data and text encoder decide of a network that a training starts from."""


class MaskedLoss(Loss):
    """Cross-entropy on the masked positions alone, summed; normalised by the global count elsewhere.

    Args:
        text: an encoder that is trained as well; the batch then has `text_ids`, not what they were encoded to.
    """

    def __init__(
        self,
        network: UVit | SuperRes,
        label_smoothing: float,
        precision: Precision = "fp32",
        text: TextEncoder | None = None,
    ) -> None:
        super().__init__(precision)
        self.network = network
        self.label_smoothing = label_smoothing
        self.text = text
        self.text_network = None if text is None else text.network

    def sums(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.network.features(batch["ids"], self.condition(batch))
        logits_NC = self.network.head(features[batch["mask"]])
        targets_N = batch["targets"][batch["mask"]]
        loss = F.cross_entropy(logits_NC.float(), targets_N, reduction="sum", label_smoothing=self.label_smoothing)
        right = (logits_NC.argmax(dim=-1) == targets_N).sum()
        return loss, {"accuracy": right.detach()}

    def condition(self, batch: Batch) -> Any:
        if self.text is None:
            states, pooled = batch["states"], batch["pooled"]
        else:
            states, pooled = self.text.forward(batch["text_ids"])
        if isinstance(self.network, SuperRes):
            return self.network.condition(states, batch["low_ids"])
        return self.network.condition(states, pooled, batch["micro"])


class MaskedTask:
    """Base or super-resolution training, by the config's type.

    Raises:
        ConfigError: for a shape or schedule that there is not.
        UserError: where shards, text encoder and config do not fit together.
    """

    def __init__(self, config: BaseConfig | SuperresConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self.store = TokenStore(config.input)
        self.order = SampleOrder(self.store.sizes, config.seed)
        self.grid = self.store.grid(config.ids)
        self.text = self._text_encoder()
        self.codes = self.store.codes(config.ids)
        self.empty_ids = torch.from_numpy(self.store.empty.text_ids.astype(np.int64))
        self.empty_states, self.empty_pooled = self._said(
            self.empty_ids, self.store.empty.text_states, self.store.empty.pooled
        )
        self.module = self._build()
        self.network = self.module.network

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        rows = self.store.rows(self.order.rows(positions), uniforms(self.config.seed, CAPTION, positions, 1)[:, 0])
        ids = torch.from_numpy(rows.image_ids if self.config.ids == "image_ids" else _low(rows.low_ids))
        hidden = hide(
            ids.flatten(1),
            positions,
            seed=self.config.seed,
            mask_id=self.network.config.mask_id,
            schedule=self.config.masking,
            min_ratio=self.config.min_masking_ratio,
        )
        dropped = uniforms(self.config.seed, DROPOUT, positions, 1)[:, 0] < self.config.caption_dropout
        batch = {
            "ids": hidden.ids.view_as(ids),
            "targets": ids,
            "mask": hidden.mask.view_as(ids) & (torch.from_numpy(weights) > 0)[:, None, None],
            "micro": torch.from_numpy(rows.micro),
            **self._text(rows, torch.from_numpy(dropped)),
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

    def count(self, batch: Batch) -> float:
        return float(batch["mask"].sum())

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """There is none."""

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
        count = min(SAMPLES, len(self.store))
        rows = self.store.rows(range(count), np.zeros(count))
        truth = rows.image_ids if self.config.ids == "image_ids" else _low(rows.low_ids)
        batch = {"micro": torch.from_numpy(rows.micro), **self._text(rows, torch.zeros(count, dtype=torch.bool))}
        if rows.low_ids is not None:
            batch["low_ids"] = torch.from_numpy(rows.low_ids)
        sampling = SamplingConfig(temperature=0.5, guidance=1)
        with torch.no_grad():
            ids = sample_ids(
                module.network,
                module.condition({name: tensor.to(self.device) for name, tensor in batch.items()}),
                None,
                ids=torch.full((count, *self.grid), self.network.config.mask_id, device=self.device),
                seeds=list(range(count)),
                courses=[Course.of(sampling, self.grid[0] * self.grid[1])] * count,
            )
        vqgan = Vqgan.load(self.config.vqgan, self.device)
        return sheet([vqgan.decode(truth), vqgan.decode(ids)])

    def save(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        if self.config.lora is None:
            # A fresh network to write, since under ZeRO-3 the trained one holds only shards.
            network, config = self.network, self.network.config
            fresh = UVit(network.config) if isinstance(network, UVit) else SuperRes(network.config)
            record = config.to_diffusers() if isinstance(config, UVitConfig) else config.to_dict()
            save_network(fresh, record, folder, network_weights(weights))
        else:
            parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
            for name, value in weights.items():
                child, _, rest = name.partition(".")
                parts["text_encoder" if child == "text_network" else self.part][rest] = value
            lora.save(parts, self.config.lora.alpha, folder)
        return {"parameters": sum(value.numel() for value in weights.values()), "grid": list(self.grid)}

    @property
    def part(self) -> str:
        """The trained network's folder within a model folder."""
        return "superres" if isinstance(self.config, SuperresConfig) else "transformer"

    def _build(self) -> MaskedLoss:
        """The loss with a network as it stands before the first step."""
        config = self.config
        network: UVit | SuperRes
        if config.start_from is not None:
            network = self._loaded(config.start_from)
        elif isinstance(config, BaseConfig):
            network = UVit(shape_of(UVitConfig, config, self._uvit_shape()))
            network.initialise(config.seed)
        else:
            network = SuperRes(shape_of(SuperResConfig, config, self._superres_shape()))
            network.initialise(config.seed)
        network.gradient_checkpointing = config.gradient_checkpointing
        text = None
        if config.lora is not None:
            lora.insert(network, config.lora.rank, config.lora.alpha, config.lora.targets, config.seed)
            text = self._adapted_text(config.lora)
        return MaskedLoss(network, config.label_smoothing, config.precision, text)

    def _loaded(self, address: str) -> UVit | SuperRes:
        """The network of a model folder, all its weights to be trained, checked against the token shards."""
        folder = local_folder(address) / self.part
        network: UVit | SuperRes
        if isinstance(self.config, SuperresConfig):
            network, known = load_superres(folder), self._superres_shape()
        else:
            network, known = load_uvit(folder), self._uvit_shape()
        facts = asdict(network.config)
        wrong = [
            f"{name} is {facts[name]} and must be {known[name]}"
            for name in FIXED
            if name in facts and facts[name] != known[name]
        ]
        if wrong:
            raise UserError(
                f"{folder} was made for another VQGAN or text encoder than {self.config.input}: {', '.join(wrong)}. "
                "Pretokenize with the parts of that model folder."
            )
        return network.requires_grad_(True).train()

    def _adapted_text(self, shape: LoraConfig) -> TextEncoder | None:
        """The text encoder with an adapter of its own, where the recipe wants one."""
        if not shape.text_targets:
            return None
        if self.config.text_encoder is None or self.text is None:
            raise UserError(
                "lora.text_targets: the text encoder can only be trained where the token shards hold text ids "
                "(pretokenize with text=ids) and text_encoder names its folder."
            )
        text = TextEncoder.load(self.config.text_encoder, self.device)
        lora.insert(text.network, shape.rank, shape.alpha, shape.text_targets, self.config.seed + 1)
        return text

    def _uvit_shape(self) -> dict[str, Any]:
        """What the data decides: widths of the text, codes, and the mask's id after them."""
        return {
            "encoder_hidden_size": self.empty_states.shape[-1],
            "cond_embed_dim": self.empty_pooled.shape[-1],
            "codebook_size": self.codes,
            "vocab_size": self.codes + 64,
            "sample_size": self.grid[0],
        }

    def _superres_shape(self) -> dict[str, Any]:
        low = self.store.grid("low_ids")
        return {
            "encoder_hidden_size": self.empty_states.shape[-1],
            "codebook_size": self.codes,
            "vocab_size": self.codes + 64,
            "low_vocab_size": self.store.codes("low_ids"),
            "low_grid": max(low),
            "high_grid": max(self.grid),
        }

    def _text_encoder(self) -> TextEncoder | None:
        if self.store.has_states:
            return None
        if self.config.text_encoder is None:
            raise UserError(
                f"{self.config.input} holds text ids, not states: set text_encoder to the encoder's folder."
            )
        return TextEncoder.load(self.config.text_encoder, self.device)

    def _said(
        self, text_ids: Tensor, states: NDArray[Any] | None, pooled: NDArray[Any] | None
    ) -> tuple[Tensor, Tensor]:
        """States (B, T, E) and pooled (B, P): as stored, or from the frozen encoder now."""
        if states is not None and pooled is not None:
            return torch.tensor(states, dtype=torch.float32), torch.tensor(pooled, dtype=torch.float32)
        assert self.text is not None
        return self.text.encode(text_ids)

    def _text(self, rows: Rows, dropped: Tensor) -> Batch:
        """What the network is told: states and pooled, or the ids of an encoder that is trained as well.

        Where `dropped` (B,), all of it is the empty caption's.
        """
        text_ids = torch.from_numpy(rows.text_ids)
        if self.module.text is not None:
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


def shape_of(kind: Callable[..., Any], config: MaskedConfig, known: dict[str, Any]) -> Any:
    """The network's own config from the recipe's `model` and what the data decides.

    Raises:
        ConfigError: naming fields that the network does not have, and sizes that do not fit.
    """
    allowed = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in config.model if name not in allowed]
    if unknown:
        problems = [f"model.{name}: no such field; it has {', '.join(sorted(allowed))}" for name in unknown]
        raise ConfigError(config.stage, problems)  # type: ignore[attr-defined]
    try:
        return kind(**{**known, **config.model})
    except (ValueError, TypeError) as error:
        raise ConfigError(config.stage, [f"model: {error}"]) from error  # type: ignore[attr-defined]


def _low(ids: NDArray[np.int64] | None) -> NDArray[np.int64]:
    if ids is None:
        raise UserError("these token shards hold no low_ids: pretokenize with low_resolution=...")
    return ids
