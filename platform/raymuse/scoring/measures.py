"""The frozen networks that look at pictures, and what they say of a batch: a row each, and features.

Features of B pictures, by name: `clip` (B, P) CLIP's projected image features, `inception` (B, 2048) and `logits`
(B, 1008) of FID's Inception, `vqgan` (B, C) the VQGAN encoder's middle block averaged over the grid. `codes` (K,)
counts the ids that the VQGAN's codebook gives them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from raymuse.config.errors import UserError
from raymuse.config.score import MeasuresConfig
from raymuse.datasets.judge import judge, nearest_render
from raymuse.datasets.scenes import parse
from raymuse.models.clip import Clip, clip_fingerprint
from raymuse.models.inception import PREPROCESSING, Inception, inception_sha256
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import weights_sha256

Pixels = NDArray[np.uint8]
Row = dict[str, Any]
Features = dict[str, NDArray[Any]]

CODES = "codes"
SETS = ("inception", "clip", "vqgan")
"""The features by which sets of pictures are compared."""


@dataclass(frozen=True)
class Subject:
    """What a batch's pictures are.

    Attributes:
        kind: truth, vqgan, vqgan_low, base, cascade, picture, a, b.
        keys, prompts: of each picture.
        side: of the final picture, for the render error.
    """

    kind: str
    keys: Sequence[str]
    prompts: Sequence[str]
    side: int


class Measures:
    """All that a config asks for, loaded.

    Args:
        model: folder whose VQGAN looks too; None: none does.
    """

    def __init__(self, config: MeasuresConfig, model: str | None) -> None:
        device = "cuda" if config.gpus_per_worker > 0 else "cpu"
        self.config = config
        self.clip = Clip.load(config.clip, device) if config.clip is not None else None
        self.inception = Inception.load(config.inception, device) if config.inception is not None else None
        self.vqgan = Vqgan.load(model, device) if model is not None else None

    def features(self, pixels: Pixels) -> Features:
        """Of pictures uint8 (B, H, W, 3)."""
        found: Features = {}
        if self.inception is not None:
            seen = self.inception.see(pixels)
            found |= {"inception": seen.features, "logits": seen.logits}
        if self.clip is not None:
            found["clip"] = self.clip.embed(pixels).float().numpy()
        if self.vqgan is not None and not any(side % self.vqgan.factor for side in pixels.shape[1:3]):
            pooled, ids = self.vqgan.pooled(pixels)
            found |= {"vqgan": pooled, CODES: np.bincount(ids.ravel(), minlength=self.vqgan.codes)}
        return found

    def look(self, pixels: Pixels, subject: Subject) -> tuple[list[Row], Features]:
        """A row a picture of uint8 (B, H, W, 3), and their features."""
        found = self.features(pixels)
        fits: list[float | None] = [None] * len(pixels)
        if self.clip is not None:
            seen = F.normalize(torch.from_numpy(found["clip"]), dim=-1)
            fits = (seen * self.clip.texts(subject.prompts)).sum(dim=-1).tolist()
        rows = [
            {"key": key, "prompt": prompt, "kind": subject.kind, "clip_score": fit}
            | self._verdict(picture, prompt, subject.side)
            for key, prompt, fit, picture in zip(subject.keys, subject.prompts, fits, pixels, strict=True)
        ]
        return rows, found

    def _verdict(self, picture: Pixels, prompt: str, side: int) -> Row:
        if not is_judged(self.config.judge, prompt):
            return {"attributes": None, "correct": None, "render_error": None}
        verdict = judge(picture, prompt)
        error = render_error(picture, prompt, side)
        return {"attributes": dict(verdict.attributes), "correct": verdict.correct, "render_error": error}


def is_judged(judge: str, caption: str) -> bool:
    """Whether the judge looks at a picture of that caption; `judge` is the config's word."""
    if judge != "auto":
        return judge == "shapes"
    try:
        parse(caption)
    except UserError:
        return False
    return True


def extractors(config: MeasuresConfig, model: str | None) -> dict[str, dict[str, str]]:
    """What decides the features, by their names: the weights' sha256, and how pictures are prepared.

    Raises:
        UserError: for weights that are missing.
    """
    found: dict[str, dict[str, str]] = {}
    if config.inception is not None:
        found["inception"] = {"weights": inception_sha256(config.inception), "preprocessing": PREPROCESSING}
    if config.clip is not None:
        found["clip"] = clip_fingerprint(config.clip)
    if model is not None:
        found["vqgan"] = {"weights": weights_sha256(model, "vqvae"), "preprocessing": "mean of the middle block"}
    return found


def joined(parts: Sequence[Mapping[str, NDArray[Any]]]) -> Features:
    """The features of several batches, in their order; counts of codes added up."""
    names = dict.fromkeys(name for part in parts for name in part)
    found: Features = {}
    for name in names:
        arrays = [part[name] for part in parts if name in part]
        found[name] = np.sum(arrays, axis=0) if name.endswith(CODES) else np.concatenate(arrays)
    return found


def render_error(pixels: Pixels, caption: str, side: int) -> float:
    """Root mean square of a picture, enlarged to `side` (bicubic), against the clean render that fits it best.

    In grey levels of 255. The render is fitted to the enlarged picture: see `judge.nearest_render`.
    """
    enlarged = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    difference = enlarged.astype(np.float64) - nearest_render(enlarged, caption)
    return float(np.sqrt((difference**2).mean()))
