"""Sweeps and comparisons: every combination drawn once, the same as generate draws it, with its table and pictures."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import fidelity_reference
import tiny
from raymuse.cli.words import compare_config, sweep_config
from raymuse.config.errors import UserError
from raymuse.config.load import from_values
from raymuse.config.score import CompareConfig, SweepConfig
from raymuse.models.clip import Clip, clip_fingerprint
from raymuse.pipeline import Pipeline, image_seed
from raymuse.stages.compare import compare, label_of, read_comparison
from raymuse.stages.sweep import read_sweep, sweep
from raymuse.storage.contact_sheet import Entry, sheet_html, sheet_png
from raymuse.tracking.run import Run

PROMPTS = [
    "a large red circle on a white background",
    "a small blue square on a black background",
    "a large green triangle on a white background",
    "a small red star on a yellow background",
    "a large cyan circle on a black background",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cascade of random weights, a CLIP, and real pictures: `model`, `clip`, `reference`."""
    root = tmp_path_factory.mktemp("made")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    model = tiny.write_model(root / "model", encoders, cascade=True)
    return {"model": model, "clip": encoders, "reference": shards}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)


# --- configs, without Ray


def test_an_option_takes_a_value_or_a_list(prompts: str) -> None:
    words = ["runs/model", f"prompts={prompts}", "output=o", "guidance=[1,2]", "steps=6", "masking=linear"]
    config = sweep_config([*words, "guidance_span=[0,0.5]"])
    choices = {"steps": (6,), "guidance": (1.0, 2.0), "guidance_span": ((0.0, 0.5),), "masking": ("linear",)}
    assert config.choices == choices
    assert config.model == "runs/model"
    for wrong, said in (
        ("guidance=[]", r"guidance=\[\] has no value to try"),
        ("steps=[6,6]", r"steps=\[6, 6\] names a value twice"),
        ("masking=[cosine,sine]", "masking"),
    ):
        with pytest.raises(UserError, match=said):
            sweep_config([*words, wrong])
    with pytest.raises(UserError, match=r"raymuse score --sweep needs a model folder or a recipe"):
        sweep_config([])


def test_two_words_are_two_folders_of_pictures_or_two_models(prompts: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/manifest.parquet").touch()
    config = compare_config((str(tmp_path / "images"), "runs/model"), [f"prompts={prompts}", "output=o", "b.steps=6"])
    assert (config.a.images, config.a.model) == (str(tmp_path / "images"), None)
    assert (config.b.images, config.b.model, config.b.options) == (None, "runs/model", {"steps": 6})
    with pytest.raises(UserError, match="a side is a model, which needs prompts=FILE to draw"):
        compare_config(("one", "two"), ["output=o"])
    with pytest.raises(UserError, match="steps draw: give a model"):
        compare_config((str(tmp_path / "images"), "two"), ["output=o", "a.steps=3", f"prompts={prompts}"])


def sides(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, str]:
    config = from_values("compare", {"a": a, "b": b, "prompts": "p", "output": "o"})
    assert isinstance(config, CompareConfig)
    return label_of(config.a, config.b), label_of(config.b, config.a)


def test_sides_are_called_by_what_they_differ_in() -> None:
    assert sides({"model": "m", "guidance": 2}, {"model": "m"}) == ("guidance=2.0", "the model's defaults")
    assert sides({"model": "m"}, {"model": "n", "steps": 6}) == ("m", "n steps=6")
    assert sides({"model": "m", "lora": "ink"}, {"model": "m", "label": "plain"}) == ("ink", "plain")


def test_a_sheet_frames_the_better_picture_and_says_both_scores() -> None:
    grey = np.full((64, 64, 3), 90, np.uint8)
    entry = Entry("two <things>", (grey, grey), ("0.31", "right 0.35"), best=1)
    sheet = np.asarray(sheet_png([entry], ("a", "b"), "1 pair"))
    assert (sheet[41, 8 + 96 + 2 + 1] == (0, 121, 90)).all()
    assert (sheet[41, 8 + 1] == 90).all()
    page = sheet_html([entry], ("a", "b"), "1 pair", [["by", "wins"], ["CLIP score", "1"]])
    assert "<span class=best>right 0.35</span>" in page
    assert "<td>CLIP score</td>" in page
    assert "two &lt;things&gt;" in page


# --- the whole; on Ray it is in test_score.py


def test_a_sweep_draws_every_combination_once_and_names_the_best(
    made: dict[str, str], prompts: str, tmp_path: Path
) -> None:
    values = {**made, "prompts": prompts, "output": str(tmp_path / "sweep"), "workers": 0}
    values |= {"steps": [2, 3], "guidance": [1.0, 2.0], "pictures_per_part": 3, "by": "clip_score"}
    config = from_values("sweep", values)
    assert isinstance(config, SweepConfig)
    table = read_sweep(sweep(config, Run.off()))
    assert [point["options"] for point in table["points"]] == [
        {"steps": steps, "guidance": guidance} for steps in (2, 3) for guidance in (1.0, 2.0)
    ]
    best = max(table["points"], key=lambda point: point["figures"]["clip_score"])
    assert table["best"] == best
    assert table["said"].startswith(f"best by clip_score: steps={best['options']['steps']} guidance=")
    for point in table["points"]:
        assert point["pictures"] == len(PROMPTS)
        assert point["rate"] > 0
        assert {"accuracy", "clip_score", "clip_fid", "vqgan_fd", "codes_used"} <= set(point["figures"])
    assert_drawn_as_by_the_pipeline(config, table)
    for name in ("sweep.png", "samples.png"):
        assert Image.open(Path(config.output, name)).width > 300
    assert_a_resume_draws_what_is_missing_alone(config, table)


def assert_drawn_as_by_the_pipeline(config: SweepConfig, table: dict[str, Any]) -> None:
    """The pictures on the sheet have the seeds that generate would give them, and each row's options."""
    pipeline = Pipeline.load(config.model, batch_size=config.draw_batch)
    for point in (table["points"][0], table["points"][3]):
        rows = pq.read_table(f"{config.output}/parts/{point['way']}-000000.parquet").to_pylist()
        seeds = [image_seed(0, index, 0) for index in range(3)]
        drawn = pipeline(PROMPTS[:3], seeds=seeds, **point["options"]).pixels
        shown = np.stack([np.asarray(Image.open(io.BytesIO(row["png"]))) for row in rows])
        np.testing.assert_array_equal(shown, drawn)


def assert_a_resume_draws_what_is_missing_alone(config: SweepConfig, table: dict[str, Any]) -> None:
    output = Path(config.output)
    kept = output / "parts/p001-000000.parquet"
    before = kept.stat().st_mtime_ns
    for name in ("_SUCCESS", "_manifest/p002-000001.json", "parts/p002-000001.parquet", "sweep.json"):
        (output / name).unlink()
    again = read_sweep(sweep(config, Run.off()))
    assert [point["figures"] for point in again["points"]] == [point["figures"] for point in table["points"]]
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"steps was \[2, 3\] and is now \[2, 4\]"):
        sweep(config.model_copy(update={"steps": (2, 4)}), Run.off())


def test_what_cannot_be_swept_is_refused_before_anything_is_drawn(
    made: dict[str, str], prompts: str, tmp_path: Path
) -> None:
    values = {**made, "prompts": prompts, "output": str(tmp_path / "sweep"), "workers": 0, "reference": None}
    plain = tmp_path / "plain.txt"
    plain.write_text("a cat\n")
    jsonl = tmp_path / "own.jsonl"
    jsonl.write_text(json.dumps({"prompt": PROMPTS[0], "steps": 5, "lora": "ink", "top_p": 0.5}) + "\n")
    for changes, said in (
        ({"by": "fid"}, "by=fid needs inception, and reference or statistics"),
        ({"order": "critic"}, "has no critic/"),
        ({"by": "accuracy", "prompts": str(plain)}, r"no prompt of .*plain.txt is of drawn shapes"),
        ({"top_p": [0.5, 2.0]}, "top_p: must be at most 1"),
        ({"prompts": str(jsonl)}, "has its own steps, lora, top_p, and here the command says how all are drawn"),
        ({"clip": None, "judge": "none"}, "nothing looks at the pictures"),
    ):
        config = from_values("sweep", {**values, **changes})
        assert isinstance(config, SweepConfig)
        with pytest.raises(UserError, match=said):
            sweep(config, Run.off())
    assert not (tmp_path / "sweep").exists()


def test_two_ways_are_compared_on_the_same_prompts_and_seeds(
    made: dict[str, str], prompts: str, tmp_path: Path
) -> None:
    torch.save(fidelity_reference.inception_state(), tmp_path / "inception.pth")
    model = {"model": made["model"]}
    values = {"a": model, "b": {**model, "steps": 1, "temperature": 0.0}, "clip": made["clip"], "prompts": prompts}
    values |= {"output": str(tmp_path / "compare"), "samples": 2, "resamples": 500, "workers": 0}
    values |= {"inception": str(tmp_path / "inception.pth")}
    config = from_values("compare", values)
    assert isinstance(config, CompareConfig)
    found = read_comparison(compare(config, Run.off()))
    assert found["labels"] == {"a": "the model's defaults", "b": "steps=1 temperature=0.0"}
    for name in ("clip_score", "correct"):
        result = found["by"][name]
        assert (result["pairs"], result["prompts"]) == (10, 5)
        assert result["wins_a"] + result["wins_b"] + result["ties"] == 10
        assert result["difference"]["value"] == pytest.approx(result["mean_a"] - result["mean_b"], abs=1e-6)
    rows = {side: pq.read_table(f"{config.output}/parts/{side}-000000.parquet").to_pylist() for side in "ab"}
    assert [row["seed"] for row in rows["a"]] == [row["seed"] for row in rows["b"]]
    page = Path(config.output, "contact_sheet.html").read_text()
    assert page.count("<figure>") == 10
    assert "steps=1 temperature=0.0 wins" in page
    assert Image.open(Path(config.output, "contact_sheet.png")).width > 300
    assert found["figures"]["a"]["inception_score"] >= 1
    assert "fid" not in found["figures"]["a"]  # which needs a reference


def test_a_clip_with_a_preprocessing_of_its_own_sees_pictures_so(made: dict[str, str], tmp_path: Path) -> None:
    own = tmp_path / "clip"
    shutil.copytree(f"{made['clip']}/clip", own)
    shutil.copytree(f"{made['clip']}/tokenizer", own, dirs_exist_ok=True)
    plain = Clip.load(str(own))
    said = {"do_resize": True, "size": {"shortest_edge": 36}, "resample": 2, "crop_size": {"height": 32, "width": 32}}
    said |= {"do_center_crop": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (own / "preprocessor_config.json").write_text(json.dumps(said))
    clip = Clip.load(str(own))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 96, 3), dtype=np.uint8)
    cropped = [Image.fromarray(x).resize((72, 36), Image.Resampling.BILINEAR).crop((20, 2, 52, 34)) for x in pixels]
    wanted = (torch.from_numpy(np.stack([np.asarray(x) for x in cropped])).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    seen = clip.network.visual_projection(clip.network.vision_model(pixel_values=wanted).pooler_output)
    torch.testing.assert_close(clip.embed(pixels), seen, atol=1e-4, rtol=1e-4)
    assert plain.processor is None
    prints = [clip_fingerprint(folder)["preprocessing"] for folder in (str(own), made["clip"])]
    assert prints[0] != prints[1] == "as our own CLIPs are trained"
    (own / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(UserError, match=r"is a siglip, no CLIP with both towers"):
        Clip.load(str(own))
