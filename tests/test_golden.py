"""Known pixels of published weights: drawn as diffusers draws them, and told apart from others."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import tiny
from raymuse.cli.app import main
from raymuse.drawing import golden
from raymuse.drawing.golden import corner
from raymuse.pipeline import Pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("golden")
    encoders = tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))
    return tiny.write_model(root / "model", encoders)


def test_the_pixels_are_those_that_diffusers_draws(folder: str) -> None:
    theirs = diffusers.AmusedPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    wanted = theirs("dog", generator=generator, num_inference_steps=2, output_type="np").images[0, -3:, -3:, -1]
    ours = Pipeline.load(folder)
    np.testing.assert_allclose(corner(ours.text, ours.base, ours.vqgan), wanted.ravel(), atol=1e-5)


def test_the_command_says_pass_or_fail(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = Pipeline.load(folder)
    drawn = corner(ours.text, ours.base, ours.vqgan)
    monkeypatch.setitem(golden.GOLDEN, tiny.SIDE, tuple(drawn + 0.002))
    assert main(["verify-weights", folder]) == 0
    assert "pass: largest difference 0.0020, allowed 0.003" in capsys.readouterr().out
    monkeypatch.setitem(golden.GOLDEN, tiny.SIDE, tuple(drawn + 0.004))
    assert main(["verify-weights", folder]) == 1
    assert "FAIL: largest difference 0.0040" in capsys.readouterr().out


def test_a_model_of_another_size_has_no_known_pixels(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-weights", folder]) == 2
    assert "a model of 32 px: published values exist for amused-256 and amused-512" in capsys.readouterr().err
    assert main(["verify-weights", str(Path(folder) / "nothing")]) == 2
