"""Checkers of drawn pictures: a real classifier's folder, and functions."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

import tiny
from raymuse.config.errors import UserError
from raymuse.config.generate import CheckingConfig
from raymuse.serving.checker import FILES, checker_facts, open_checker

DREW = np.random.default_rng(0)
PICTURES = [DREW.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(12)]
PICTURES += [np.full((64, 64, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_checker(tmp_path_factory.mktemp("checker"), PICTURES)["checker"])


def test_a_classifier_refuses_what_it_gives_the_label(folder: str) -> None:
    network = ViTForImageClassification.from_pretrained(folder).eval()
    scores = []
    for pixels in PICTURES:  # as its preprocessor_config.json has it, by hand: 32 x 32 bilinear, to [-1, 1]
        small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
        given = torch.from_numpy((small / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
        with torch.no_grad():
            scores.append(float(network(given).logits.softmax(1)[0, 1]))
    between = sorted(scores)[len(scores) // 2 - 1 : len(scores) // 2 + 1]
    assert between[1] - between[0] > 1e-5
    for threshold in (0.01, sum(between) / 2, 0.99):
        check = open_checker(CheckingConfig(checker=folder, checker_refuses=("unsafe",), checker_threshold=threshold))
        assert check is not None
        said = [check(pixels) for pixels in PICTURES]
        assert [one is not None for one in said] == [score >= threshold for score in scores]
        assert {one for one in said if one is not None} == {f"unsafe {s:.2f}" for s in scores if s >= threshold}


def test_a_classifier_that_says_nothing_clear_refuses(folder: str) -> None:
    check = open_checker(CheckingConfig(checker=folder, checker_refuses=("unsafe",)))
    check.network.classifier.bias.data.fill_(float("nan"))  # type: ignore[union-attr]
    assert check is not None
    assert check(PICTURES[0]) == "unsafe nan"


def test_a_function_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_checks.py").write_text("def dark(pixels):\n    return 'dark' if pixels.mean() < 64 else None\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = open_checker(CheckingConfig(checker="own_checks:dark"))
    assert check is not None
    assert [check(np.full((8, 8, 3), grey, np.uint8)) for grey in (0, 200)] == ["dark", None]
    assert checker_facts(CheckingConfig(checker="own_checks:dark")) == {"checker": "own_checks:dark"}
    for name, said in (("own_checks:light", "cannot be imported"), ("own_checks:__name__", "is no function")):
        with pytest.raises(UserError, match=said):
            open_checker(CheckingConfig(checker=name))
    del sys.modules["own_checks"]


@pytest.mark.parametrize("name", FILES)
def test_whatever_turns_a_verdict_is_a_fact_of_the_checker(folder: str, tmp_path: Path, name: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    asked = CheckingConfig(checker=str(other), checker_refuses=("unsafe",))
    before = checker_facts(asked)
    assert before == checker_facts(CheckingConfig(checker=folder, checker_refuses=("unsafe",)))
    (other / name).write_bytes((other / name).read_bytes() + b" ")
    assert checker_facts(asked) != before


def test_without_a_checker_nothing_is_checked() -> None:
    assert open_checker(CheckingConfig()) is None
    assert checker_facts(CheckingConfig()) == {}


@pytest.mark.parametrize(
    ("refuses", "said"),
    [(("nude",), "has no label nude: its labels are safe, unsafe"), ((), "needs checker_refuses: its labels are safe")],
)
def test_labels_must_be_the_classifiers(folder: str, refuses: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_checker(CheckingConfig(checker=folder, checker_refuses=refuses))


def test_a_folder_that_is_no_classifier_is_a_sentence(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json, preprocessor_config\.json, model\.safetensors"):
        open_checker(CheckingConfig(checker=str(tmp_path), checker_refuses=("x",)))
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes(Path(folder, name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"holds no model\.safetensors: .* as safetensors"):
        open_checker(CheckingConfig(checker=str(tmp_path), checker_refuses=("unsafe",)))
    weights = load_file(Path(folder, "model.safetensors"))
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors lacks classifier\.weight"):
        open_checker(CheckingConfig(checker=str(tmp_path), checker_refuses=("unsafe",)))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be opened as an image classifier"):
        open_checker(CheckingConfig(checker=str(tmp_path), checker_refuses=("unsafe",)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checker_refuses": ("a",)}, "checker is not given"),
        ({"checker": "a.b:c", "checker_refuses": ("a",)}, "is a function"),
        ({"checker_threshold": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CheckingConfig(**given)
