"""Training a small CLIP on the pairs: a tokenizer from the captions, then two towers, contrastively.

B pairs over all ranks, T text tokens, P projected width (Radford et al., arXiv 2103.00020, figure 3).
"""

import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from numpy.typing import NDArray
from PIL import Image
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from raymuse.config.errors import ConfigError
from raymuse.config.training import ClipConfig, Precision
from raymuse.models.clip import Clip, normalise
from raymuse.models.weights import without_bars
from raymuse.training.pictures import PictureStream
from raymuse.training.task import Batch, Loss, Stateless, network_weights, sheet

START, END = "<|startoftext|>", "<|endoftext|>"
SHAPE = {"width": 512, "layers": 12, "heads": 8, "projection": 512, "patch_size": 16}


class ClipLoss(Loss):
    """Symmetric cross-entropy of every picture against all captions of the global batch, and back; summed over rows.

    Pairs whose captions are equal share the target: neither is a wrong answer for the other.
    """

    def __init__(self, network: CLIPModel, precision: Precision) -> None:
        super().__init__(precision)
        self.network = network

    def sums(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        seen = self.network.visual_projection(self.network.vision_model(pixel_values=batch["pixels"]).pooler_output)
        read = self.network.text_projection(self.network.text_model(input_ids=batch["text_ids"]).pooler_output)
        with torch.autocast(seen.device.type, enabled=False):
            return self._contrast(seen.float(), read.float(), batch)

    def _contrast(self, seen: Tensor, read: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of pictures and captions as projected, (B of this rank, P) each."""
        seen, read = F.normalize(seen, dim=-1), F.normalize(read, dim=-1)
        scale = self.network.logit_scale.exp().clamp(max=100)
        everywhere = [_gathered(tensor) for tensor in (seen, read, batch["text_ids"], batch["weights"])]
        targets = self._targets(batch["text_ids"], everywhere[2], everywhere[3])
        padding = everywhere[3] == 0
        to_text = (scale * seen @ everywhere[1].T).masked_fill(padding, -math.inf)
        to_picture = (scale * read @ everywhere[0].T).masked_fill(padding, -math.inf)
        rows = (_cross_entropy(to_text, targets) + _cross_entropy(to_picture, targets)) / 2
        right = targets.gather(1, to_text.argmax(dim=1, keepdim=True))[:, 0] > 0
        return (rows * batch["weights"]).sum(), {"accuracy": (right * batch["weights"]).sum().detach()}

    @staticmethod
    def _targets(mine: Tensor, all_ids: Tensor, weights: Tensor) -> Tensor:
        same = (mine[:, None] == all_ids[None]).all(dim=-1) * weights
        return same / same.sum(dim=1, keepdim=True).clamp(min=1)


class ClipTask(Stateless):
    """CLIP training; the tokenizer is trained from the captions when the task is built, the same on every rank."""

    def __init__(self, config: ClipConfig, device: str = "cpu") -> None:
        share_size = -(-config.batch_size // max(1, config.min_workers or config.workers))
        if config.micro_batch_size is not None and config.micro_batch_size < share_size:
            wrong = f"micro_batch_size={config.micro_batch_size}: a pair is held against all others of its step, so"
            raise ConfigError(config.stage, [f"{wrong} leave it out, or use more workers"])
        self.config = config
        self.device = device
        self.pictures = PictureStream(config.input, config.seed)
        captions = (self.pictures.index.captions(number)[0] for number in range(len(self.pictures.index)))
        self.tokenizer = train_tokenizer(captions, config.vocabulary, config.text_length)
        self.network = build_clip(config, len(self.tokenizer), self.tokenizer.eos_token_id)
        self.module = ClipLoss(self.network, config.precision)

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        side = self.config.resolution
        pixels, captions = self.pictures.crops(positions, np.full(len(positions), side), side)
        ids = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.config.text_length,
            return_tensors="pt",
        ).input_ids
        return {
            "pixels": normalise(pixels, side, self.device),
            "text_ids": ids.to(self.device),
            "weights": torch.from_numpy(weights).to(self.device),
        }

    def count(self, batch: Batch) -> float:
        return float(batch["weights"].sum())

    def keys(self, positions: NDArray[np.int64]) -> list[str]:
        return self.pictures.keys(positions)

    def sample(self, weights: dict[str, Tensor]) -> Image.Image:
        """Sixteen pictures in a row, and under each the picture whose caption fits it best."""
        clip = Clip(self._network_with(weights), self.tokenizer)
        positions = np.arange(min(64, len(self.pictures.index)))
        side = self.config.resolution
        pixels, captions = self.pictures.crops(positions, np.full(len(positions), side), side)
        best = (clip.images(pixels[:16]) @ clip.texts(captions).T).argmax(dim=1).numpy()
        return sheet([pixels[:16], pixels[best]])

    def save(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """`clip/` (both towers), `text_encoder/` and `tokenizer/`, as a model folder holds them."""
        without_bars()
        network = self._network_with(weights)
        network.save_pretrained(folder / "clip", safe_serialization=True)
        text = CLIPTextModelWithProjection(network.config.text_config)
        own = network.state_dict()
        text.load_state_dict({name: own[name] for name in text.state_dict()}, strict=True)
        text.save_pretrained(folder / "text_encoder", safe_serialization=True)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        return {"vocabulary": len(self.tokenizer)}

    def _network_with(self, weights: dict[str, Tensor]) -> CLIPModel:
        network = copy.deepcopy(self.network).eval()
        network.load_state_dict({**network.state_dict(), **network_weights(weights)}, strict=True)
        return network


def train_tokenizer(captions: Iterable[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """Byte-level BPE as CLIP's: 256 bytes, 256 bytes that end a word, merges, start and end; no text is unknown.

    The same for the same captions, in every process: of pairs that are equally frequent the trainer takes the one whose
    parts it numbered first, and unless told of bytes that end a word it numbers these in the order of a hash map.
    """
    trained = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [byte + "</w>" for byte in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, end_of_word_suffix="</w>", special_tokens=[*alphabet, *ends], show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    merges = merges[: max(0, vocabulary - len(alphabet) - len(ends) - 2)]
    words = [*alphabet, *ends, *("".join(pair) for pair in merges), START, END]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def build_clip(config: ClipConfig, vocabulary: int, end_id: int) -> CLIPModel:
    """A fresh `CLIPModel` of the recipe's shape.

    Raises:
        ConfigError: for unknown fields of `model`, and sizes that do not fit.
    """
    unknown = sorted(set(config.model) - set(SHAPE))
    if unknown:
        known = ", ".join(SHAPE)
        raise ConfigError(config.stage, [f"model.{name}: no such field; it has {known}" for name in unknown])
    shape = {**SHAPE, **config.model}
    tower = {
        "hidden_size": shape["width"],
        "intermediate_size": 4 * shape["width"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "projection_dim": shape["projection"],
    }
    text = {
        "vocab_size": vocabulary,
        "max_position_embeddings": config.text_length,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
    }
    vision = {"image_size": config.resolution, "patch_size": shape["patch_size"]}
    problems = []
    if shape["width"] % shape["heads"]:
        problems.append(f"model.width={shape['width']} is no multiple of model.heads={shape['heads']}")
    if shape["patch_size"] > config.resolution:
        problems.append(f"model.patch_size={shape['patch_size']} is above resolution={config.resolution}")
    if problems:
        raise ConfigError(config.stage, problems)
    torch.manual_seed(config.seed)
    whole = CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, **vision}, projection_dim=shape["projection"]
    )
    return CLIPModel(whole).train()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """A row's loss (B,) against soft targets (B, B'); columns of -inf count nothing."""
    logs = F.log_softmax(logits, dim=1).masked_fill(targets == 0, 0.0)
    return -(targets * logs).sum(dim=1)


def _gathered(mine: Tensor) -> Tensor:
    """All ranks' rows in the order of the ranks, with gradients. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    if mine.requires_grad:
        return torch.cat(dist_nn.all_gather(mine))  # type: ignore[no-untyped-call]
    pieces = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, mine.contiguous())
    return torch.cat(pieces)
