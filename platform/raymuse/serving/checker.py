"""Who looks at drawn pictures before anybody gets them: a classifier of a local folder, or a function of the user's."""

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from raymuse.config.errors import UserError
from raymuse.config.generate import CheckingConfig

Check = Callable[[NDArray[np.uint8]], str | None]
"""Why a picture, uint8 (H, W, 3), is refused; None: it is not."""

WEIGHTS = "model.safetensors"
FILES = ("config.json", "preprocessor_config.json", WEIGHTS)


def open_checker(config: CheckingConfig, device: str = "cpu") -> Check | None:
    """The checker that a config names; None: it names none.

    Raises:
        UserError: for a folder that holds no classifier, unknown labels, and a function that is not there.
    """
    if config.checker is None:
        return None
    if config.checker_function is not None:
        return _function(*config.checker_function)
    return Classifier(config.checker, config.checker_refuses, config.checker_threshold, device)


def checker_facts(config: CheckingConfig) -> dict[str, str]:
    """What decides which pictures are refused, for a manifest: nothing without a checker."""
    if config.checker is None:
        return {}
    if config.checker_function is not None:
        return {"checker": config.checker}
    said = hashlib.sha256()
    for name in FILES:  # labels, how pictures are prepared, weights: each of them can turn a verdict
        with Path(config.checker, name).open("rb") as file:
            said.update(hashlib.file_digest(file, "sha256").digest())
    refuses = ",".join(sorted(config.checker_refuses))
    return {"checker": f"{said.hexdigest()[:16]} {refuses} {config.checker_threshold:g}"}


class Classifier:
    """An image classifier as transformers saves it, such as a ViT that tells safe pictures from unsafe ones.

    Args:
        folder: of `FILES`.
        refuses: labels of it; their probabilities are added up.
        threshold: a picture is refused from this sum on.
    """

    def __init__(self, folder: str, refuses: tuple[str, ...], threshold: float, device: str) -> None:
        missing = [name for name in FILES if not Path(folder, name).is_file()]
        if missing:
            raise UserError(
                f"checker {folder} holds no {', '.join(missing)}: give the folder of a transformers image classifier "
                "with its weights as safetensors, or MODULE:FUNCTION."
            )
        known = json.loads(Path(folder, "config.json").read_text()).get("id2label", {})
        labels = {str(label): int(place) for place, label in known.items()}
        if not refuses or (unknown := [label for label in refuses if label not in labels]):
            wrong = f"has no label {unknown[0]}" if refuses else "needs checker_refuses"
            raise UserError(f"checker {folder} {wrong}: its labels are {', '.join(labels) or 'not named'}.")
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        how = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            network, told = AutoModelForImageClassification.from_pretrained(folder, **how)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(f"checker {folder} cannot be opened as an image classifier: {error}") from error
        if lacking := sorted(told["missing_keys"]):  # transformers would draw them at random
            raise UserError(f"checker {folder} holds no whole classifier: {WEIGHTS} lacks {', '.join(lacking[:3])}.")
        self.network, self.device = network.to(device).eval(), device
        self.refuses, self.threshold = {label: labels[label] for label in refuses}, threshold

    def __call__(self, pixels: NDArray[np.uint8]) -> str | None:
        """Labels with their probabilities, where they say that the picture is refused."""
        found = self.scores(pixels)
        if not sum(found.values()) < self.threshold:  # also what is not a number is refused
            return ", ".join(f"{label} {score:.2f}" for label, score in found.items())
        return None

    @torch.no_grad()
    def scores(self, pixels: NDArray[np.uint8]) -> dict[str, float]:
        """The probability of each label for which a picture is refused."""
        given = self.processor(images=[pixels], return_tensors="pt", input_data_format="channels_last")
        scores = self.network(given["pixel_values"].to(self.device)).logits[0].float().softmax(0)
        return {label: float(scores[place]) for label, place in self.refuses.items()}


def _function(module: str, name: str) -> Check:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"checker {module}:{name} cannot be imported: {error}. Put it on PYTHONPATH.") from error
    if not callable(found):
        raise UserError(f"checker {module}:{name} is no function.")
    check: Check = found
    return check
