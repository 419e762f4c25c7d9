"""StyleDrop: from one picture to a style in two rounds, candidates chosen by hand or by CLIP, each round resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

import tiny
from raymuse.config.errors import UserError
from raymuse.config.load import from_values, load
from raymuse.config.styledrop import SUBJECTS, StyledropConfig
from raymuse.storage.images import Picture, list_shards, read_shard
from raymuse.storage.manifest import read_finished
from raymuse.styledrop import choose, read_candidates, styledrop
from raymuse.tracking.run import Run


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model folder of random weights, and its encoders with a CLIP of both towers."""
    root = tmp_path_factory.mktemp("parts")
    encoders = tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))
    return tiny.write_model(root / "model", encoders), encoders


def config_of(root: Path, parts: tuple[str, str], **changes: Any) -> StyledropConfig:
    model, encoders = parts
    picture = root / "a_house in watercolour style.jpg"
    if not picture.exists():
        noise = np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(picture)
    places = {"input": "-", "output": "-"}
    values = {
        "picture": str(picture),
        "output": str(root / "out"),
        "pretokenize": {**places, "vqgan": encoders, "text_encoder": encoders, "resolution": tiny.SIDE},
        "train": {
            **places,
            "start_from": model,
            "lora": {"rank": 2},
            "steps": 3,
            "batch_size": 1,
            "workers": 0,
            "checkpoint": {"every": 3},
        },
        "generate": {"prompts": "-", "output": "-", "model": model, "engine": "actors", "cpus_per_replica": 1},
        **changes,
    }
    config = from_values("styledrop", values)
    assert isinstance(config, StyledropConfig)
    return config


def test_the_file_name_is_the_caption_and_its_end_the_style(tmp_path: Path, parts: tuple[str, str]) -> None:
    config = config_of(tmp_path, parts)
    assert (config.told, config.style) == ("a house in watercolour style", "in watercolour style")
    assert config_of(tmp_path, parts, caption="a cat in ink").style == "in ink"
    with pytest.raises(UserError, match="'a cat' names no style"):
        config_of(tmp_path, parts, caption="a cat")
    with pytest.raises(UserError, match=r"train\.lora: StyleDrop trains a LoRA"):
        config_of(tmp_path, parts, train={"input": "-", "output": "-", "steps": 3})
    assert isinstance(load("styledrop", ["picture=a cat in ink.png"]), StyledropConfig)


def test_two_rounds_chosen_by_hand_and_each_is_resumed(
    ray_cluster: Cluster, tmp_path: Path, parts: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    candidates = styledrop(config_of(tmp_path, parts), Run.off(), None)
    assert candidates == str(out / "candidates")
    assert "go on with the numbers that you keep" in capsys.readouterr().out
    drawn = read_candidates(candidates)
    assert [one.row.prompt for one in drawn] == [f"{subject} in watercolour style" for subject in SUBJECTS]
    assert Image.open(out / "candidates.png").width > 100
    made = {path: path.stat().st_mtime_ns for path in out.glob("first/**/*.safetensors")}
    with pytest.raises(UserError, match="caption was 'a house in watercolour style' and is now 'a cat in ink'"):
        styledrop(config_of(tmp_path, parts, caption="a cat in ink"), Run.off(), None)
    with pytest.raises(UserError, match=r"there is no candidate 13; candidates\.png has 1 to 12"):
        styledrop(config_of(tmp_path, parts, kept=[13]), Run.off(), None)
    images = styledrop(config_of(tmp_path, parts, kept=[5, 2]), Run.off(), None)
    assert images == str(out / "images")
    assert {path: path.stat().st_mtime_ns for path in made} == made, "the first round is not done again"
    (shard,) = list_shards(str(out / "second" / "pictures"))
    learned = [row for row in read_shard(shard) if isinstance(row, Picture)]
    assert [row.captions for row in learned] == [(drawn[1].row.prompt,), (drawn[4].row.prompt,)]
    assert sum(part.rows for part in read_finished(images, "generate").values()) == len(SUBJECTS)
    assert (Path(images) / "contact_sheet.html").exists()
    firsts, seconds = drawn, read_candidates(images)
    assert any((one.pixels != other.pixels).any() for one, other in zip(firsts, seconds, strict=True))
    by_clip = config_of(tmp_path, parts, clip=parts[1], keep=3)
    best = choose(by_clip, drawn)
    assert len(best) == 3
    assert best == sorted(best)
