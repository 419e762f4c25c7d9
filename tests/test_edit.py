"""Pictures from pictures: what each task keeps, draws and refuses, and that a batch changes nothing of it."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from raymuse.cli.app import main
from raymuse.config.errors import ConfigError, UserError
from raymuse.datasets import shapes
from raymuse.drawing.inputs import read_mask, read_picture
from raymuse.drawing.model_folder import model_sha256
from raymuse.drawing.tasks import UNKNOWN, from_picture, resampled, touched
from raymuse.encoding.pictures import downscale
from raymuse.models.clip import Clip
from raymuse.pipeline import Drawn, Pipeline, image_seed
from raymuse.storage.pictures import png_bytes, png_facts

SIDE = tiny.SIDE
PROMPTS = [f"a picture of {word}" for word in ("one", "two", "three", "four", "five", "six", "seven")]
SEEDS = list(range(100, 107))
PICTURES = [np.asarray(sample.image) for sample in shapes.samples(7, 1, SIDE, held_out=False)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("encoders")
    return tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))


@pytest.fixture(scope="module", params=["base", "cascade"])
def pipeline(request: pytest.FixtureRequest, encoders: str, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("model") / request.param
    return Pipeline.load(tiny.write_model(folder, encoders, cascade=request.param == "cascade"), batch_size=8)


def low_ids(pipeline: Pipeline, picture: np.ndarray) -> np.ndarray:
    side = pipeline.settings.base_size * picture.shape[0] // pipeline.settings.size
    return pipeline.vqgan.encode(downscale(picture, side)[None])[0]


def box(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


MASKS = [
    box(0, 0, 32, 5),
    box(8, 8, 16, 16),
    box(31, 31, 1, 1),
    box(0, 0, 32, 31),
    box(3, 4, 9, 20),
    box(0, 16, 32, 16),
]
MASKS += [box(16, 0, 16, 32)]


def edit(pipeline: Pipeline, task: Any, numbers: Sequence[int], **options: Any) -> Drawn:
    if task == "inpaint":
        options["masks"] = [MASKS[number] for number in numbers]
    if task == "super-resolution":
        pictures = [downscale(PICTURES[number], pipeline.settings.base_size) for number in numbers]
    else:
        pictures = [PICTURES[number] for number in numbers]
    prompts, seeds = [PROMPTS[number] for number in numbers], [SEEDS[number] for number in numbers]
    return pipeline.edit(task, prompts, pictures, seeds=seeds, **options)


# --- image-to-image


def test_strength_0_keeps_the_picture_and_1_ignores_it(pipeline: Pipeline) -> None:
    kept = edit(pipeline, "image-to-image", range(7), strength=0)
    assert np.array_equal(kept.base_ids, np.stack([low_ids(pipeline, picture) for picture in PICTURES]))
    ignored = edit(pipeline, "image-to-image", range(7), strength=1)
    assert np.array_equal(ignored.ids, pipeline(PROMPTS, seeds=SEEDS).ids)


def test_the_stronger_the_fewer_ids_are_known(pipeline: Pipeline) -> None:
    ids = low_ids(pipeline, PICTURES[0])
    sampling = pipeline.settings.base.model_copy(update={"steps": 10})
    stages = [from_picture(ids, sampling, strength, 7) for strength in (0.2, 0.5, 0.8, 1.0)]
    unknown = [int((stage.ids == UNKNOWN).sum()) for stage in stages]
    assert unknown == sorted(set(unknown))
    assert unknown[-1] == ids.size
    assert [len(stage.course.remaining) for stage in stages] == [2, 5, 8, 10]
    for stage in stages[:-1]:
        known = stage.ids != UNKNOWN
        assert np.array_equal(stage.ids[known], ids[known])
    other = from_picture(ids, sampling, 0.5, 8)
    assert not np.array_equal(other.ids == UNKNOWN, stages[1].ids == UNKNOWN)


# --- inpaint and outpaint


def test_inpainting_leaves_every_known_id_and_draws_the_others(pipeline: Pipeline) -> None:
    drawn = edit(pipeline, "inpaint", range(7))
    for number, (picture, mask) in enumerate(zip(PICTURES, MASKS, strict=True)):
        own = low_ids(pipeline, picture)
        open_cells = touched(mask, own.shape)
        assert np.array_equal(drawn.base_ids[number][~open_cells], own[~open_cells])
        if pipeline.superres_vqgan is not None:
            own = pipeline.superres_vqgan.encode(picture[None])[0]
            open_cells = touched(mask, own.shape)
            assert np.array_equal(drawn.ids[number][~open_cells], own[~open_cells])
    assert not np.array_equal(drawn.ids, edit(pipeline, "inpaint", range(7), guidance=9.0).ids)


def test_a_cell_is_open_where_one_pixel_of_it_is_masked() -> None:
    assert touched(box(3, 4, 1, 1), (8, 8)).sum() == 1
    assert touched(box(3, 4, 2, 1), (8, 8)).sum() == 2
    assert touched(box(0, 0, 32, 32), (8, 8)).all()


def test_pasting_puts_the_pictures_own_pixels_back(pipeline: Pipeline) -> None:
    plain, pasted = (edit(pipeline, "inpaint", range(7), paste=paste) for paste in (False, True))
    for number, mask in enumerate(MASKS):
        assert np.array_equal(pasted.pixels[number][~mask], PICTURES[number][~mask])
        assert np.array_equal(pasted.pixels[number][mask], plain.pixels[number][mask])
    assert np.array_equal(plain.ids, pasted.ids)


def test_outpainting_grows_the_canvas_and_keeps_what_was_there(encoders: str, tmp_path: Path) -> None:
    pipeline = Pipeline.load(tiny.write_model(tmp_path / "base", encoders), batch_size=2)
    drawn = pipeline.edit(
        "outpaint", PROMPTS[:2], PICTURES[:2], seeds=SEEDS[:2], sides=(8, 0, 16, 4), paste=True, steps=3
    )
    assert drawn.pixels.shape == (2, 36, 56, 3)
    assert np.array_equal(drawn.pixels[:, :32, 8:40], np.stack(PICTURES[:2]))
    canvas = np.pad(PICTURES[0], ((0, 4), (8, 16), (0, 0)), mode="edge")
    own = pipeline.vqgan.encode(canvas[None])[0]
    assert np.array_equal(drawn.ids[0][:8, 2:10], own[:8, 2:10])
    assert len(np.unique(drawn.ids[0][8:])) > 1


# --- mask-free editing, super-resolution


def test_mask_free_editing_draws_a_few_ids_a_round(pipeline: Pipeline) -> None:
    once = edit(pipeline, "mask-free", range(7), rounds=1, share=0.25)
    for number, picture in enumerate(PICTURES):
        own = low_ids(pipeline, picture)
        assert 0 <= (once.base_ids[number] != own).sum() <= round(0.25 * own.size)
    many = edit(pipeline, "mask-free", range(7), rounds=20, share=0.25)
    assert (many.base_ids != once.base_ids).any()
    stage = resampled(own, pipeline.settings.base, 3, rounds=20, share=0.25)
    assert stage.course.hide is not None
    assert (stage.course.hide.sum(axis=1) == round(0.25 * own.size)).all()
    assert len({row.tobytes() for row in stage.course.hide}) > 10


def test_super_resolution_takes_the_picture_as_its_base(pipeline: Pipeline) -> None:
    if pipeline.superres is None:
        with pytest.raises(UserError, match=r"no super-resolution: its folder holds no superres/"):
            edit(pipeline, "super-resolution", range(7))
        return
    drawn = edit(pipeline, "super-resolution", range(7))
    assert np.array_equal(drawn.base_ids, np.stack([low_ids(pipeline, picture) for picture in PICTURES]))
    assert drawn.pixels.shape == (7, SIDE, SIDE, 3)


# --- what a batch must not change

ASKED: dict[str, dict[str, Any]] = {
    "image-to-image": {"strength": 0.6},
    "inpaint": {},
    "outpaint": {"sides": (0, 0, 0, 16)},
    "mask-free": {"rounds": 4, "share": 0.2},
}


@pytest.mark.parametrize("task", ASKED)
def test_an_edited_picture_does_not_depend_on_its_batch(task: str, pipeline: Pipeline) -> None:
    if task == "outpaint" and pipeline.superres is not None:
        with pytest.raises(UserError, match="the super-resolution draws at most 32 on a side"):
            edit(pipeline, task, range(7), **ASKED[task])
        return
    together = edit(pipeline, task, range(7), **ASKED[task])
    assert len({picture.ids.tobytes() for picture in together.pictures}) == 7
    for numbers in ([0], [6, 2, 5, 0, 1, 4, 3], [1, 3], [0] * 9 + [4]):
        again = edit(pipeline, task, numbers, **ASKED[task])
        assert np.array_equal(again.ids, together.ids[list(numbers)])


def test_requests_of_any_kind_are_drawn_together_as_they_are_alone(pipeline: Pipeline) -> None:
    settings = [{}, {"steps": 2}, {"steps": 9, "guidance": 1.0}, {"guidance": 7.0, "guidance_schedule": "linear"}]
    settings += [{"order": "halton"}, {"guidance_span": (0.0, 0.5)}, {"top_k": 1, "temperature": 0.0}]
    requests = [
        pipeline.request(prompt, seed, **chosen) for prompt, seed, chosen in zip(PROMPTS, SEEDS, settings, strict=True)
    ]
    together = pipeline.draw(requests)
    for prompt, seed, chosen, picture in zip(PROMPTS, SEEDS, settings, together, strict=True):
        assert np.array_equal(pipeline([prompt], seeds=[seed], **chosen).ids[0], picture.ids)


def test_sizes_mix_in_one_call(encoders: str, tmp_path: Path) -> None:
    pipeline = Pipeline.load(tiny.write_model(tmp_path / "base", encoders), batch_size=4)
    sizes = [(32, 32), (48, 16), (16, 48), (48, 16)]
    drawn = pipeline(PROMPTS[:4], seeds=SEEDS[:4], size=sizes)
    assert [image.size for image in drawn.images] == sizes
    for number, size in enumerate(sizes):
        alone = pipeline([PROMPTS[number]], seeds=[SEEDS[number]], size=list(size))
        assert np.array_equal(alone.ids[0], drawn.pictures[number].ids)


def test_inpainting_leaves_the_schedule_of_other_pictures_alone(pipeline: Pipeline) -> None:
    """diffusers' inpainting pipeline makes the scheduler that it shares linear, for good."""
    before = pipeline(PROMPTS[:2], seeds=SEEDS[:2]).ids
    edit(pipeline, "inpaint", [0, 1])
    assert np.array_equal(pipeline(PROMPTS[:2], seeds=SEEDS[:2]).ids, before)


def test_the_variations_of_a_prompt_stand_together(pipeline: Pipeline) -> None:
    """diffusers' `num_images_per_prompt` deals them out in turn: a, b, a, b."""
    seeds = [image_seed(seed, 0, sample) for seed in SEEDS[:2] for sample in range(2)]
    drawn = pipeline([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], seeds=seeds)
    for number, picture in enumerate(drawn.pictures):
        alone = pipeline([PROMPTS[number // 2]], seeds=[seeds[number]])
        assert np.array_equal(alone.ids[0], picture.ids)


# --- sampling


@pytest.mark.parametrize(
    "options",
    [
        *({"masking": name} for name in ("linear", "arccos", "square", "root", "power", "sigmoid")),
        *({"order": name} for name in ("halton", "random")),
        *({"guidance_schedule": name} for name in ("linear", "cosine")),
        {"top_k": 2},
        {"top_p": 0.3},
        {"end_temperature": 30.0},
    ],
    ids=str,
)
def test_every_option_draws_whole_pictures_of_its_own(options: dict[str, Any], pipeline: Pipeline) -> None:
    plain, other = pipeline(PROMPTS, seeds=SEEDS), pipeline(PROMPTS, seeds=SEEDS, **options)
    assert not np.array_equal(plain.base_ids, other.base_ids)
    assert 0 <= other.base_ids.min() <= other.base_ids.max() < tiny.CODES


def test_known_ids_stay_and_the_others_are_told_step_by_step(pipeline: Pipeline) -> None:
    grid = pipeline(PROMPTS[:1], seeds=[1]).base_ids.shape[1:]
    known = np.full((3, *grid), UNKNOWN)
    known[:, 0] = 5
    seen: list[np.ndarray] = []
    drawn = pipeline(PROMPTS[:3], seeds=SEEDS[:3], ids=known, steps=4, on_step=lambda step, ids: seen.append(ids))
    assert (drawn.base_ids[:, 0] == 5).all()
    assert [ids.shape for ids in seen] == [(3, *grid)] * 4
    masked = [(ids == pipeline.base.config.mask_id).sum() for ids in seen]
    assert masked == sorted(masked, reverse=True)
    assert masked[-1] == 0
    assert np.array_equal(seen[-1], drawn.base_ids)


def test_the_best_of_several_is_what_clip_finds_nearest(pipeline: Pipeline, encoders: str) -> None:
    clip = Clip.load(encoders)
    best = pipeline.best_of(5, clip, PROMPTS[:3], seeds=SEEDS[:3], steps=2)
    assert len({picture.ids.tobytes() for picture in best.pictures}) == 3
    for prompt, seed, picture in zip(PROMPTS, SEEDS, best.pictures, strict=False):
        seeds = [image_seed(seed, 0, sample) for sample in range(5)]
        drawn = pipeline([prompt] * 5, seeds=seeds, steps=2)
        scores = clip.score(drawn.pixels, [prompt] * 5)
        assert np.array_equal(drawn.ids[scores.argmax()], picture.ids)


def test_steps_without_guidance_need_one_pass_of_one_row_each(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    features = pipeline.base.features

    def counted(ids: Any, *known: Any) -> Any:
        rows.append(len(ids))
        return features(ids, *known)

    monkeypatch.setattr(pipeline.base, "features", counted)
    pipeline(PROMPTS, seeds=SEEDS, steps=4, guidance=3.0, guidance_span=(0.0, 0.5))
    assert rows == [16, 16, 8, 8]


# --- what is refused

SAID: list[tuple[Callable[[Pipeline], object], str]] = [
    (lambda p: p.edit("inpaint", ["a"], PICTURES[:1], seeds=[1]), r"^inpaint takes one mask a picture"),
    (lambda p: p.edit("mask-free", ["a"], PICTURES[:1], seeds=[1], masks=MASKS[:1]), r"^mask-free takes no masks"),
    (
        lambda p: p.edit("image-to-image", ["a", "b"], PICTURES[:1], seeds=[1, 2]),
        r"^2 prompts and 1 pictures differ",
    ),
    (
        lambda p: p.edit("inpaint", ["a", "b"], PICTURES[:2], seeds=[1, 2], masks=MASKS[:1]),
        r"^2 prompts and 1 masks differ",
    ),
    (lambda p: edit(p, "image-to-image", [0], strength=1.5), r"^strength 1.5 is outside \[0, 1\]"),
    (lambda p: edit(p, "outpaint", [0]), r"at least one above 0"),
    (lambda p: edit(p, "outpaint", [0], sides=(3, 0, 0, 0)), r"^35 x 32 pixels: this model draws in cells of \d"),
    (lambda p: edit(p, "paint-by-numbers", [0]), r"^there is no task 'paint-by-numbers'; there are image-to-image"),
    (lambda p: p(["a"], seeds=[-1]), r"^seed -1: seeds are whole numbers from 0"),
    (lambda p: p(["a"], seeds=[1], size=(30, 32)), r"^30 x 32 pixels: this model draws in cells of \d"),
    (lambda p: p(["a"], seeds=[1], ids=np.zeros((1, 2, 2), int)), r"^known ids of shape \(2, 2\)"),
    (lambda p: p.edit("mask-free", ["a"], PICTURES[:1], seeds=[1], share=0.0), r"share in \(0, 1\]"),
    (
        lambda p: p.edit("inpaint", ["a"], PICTURES[:1], seeds=[1], masks=[MASKS[0][:16]]),
        r"^the mask has 32 x 16 pixels and its picture 32 x 32",
    ),
    (
        lambda p: p.edit("inpaint", ["a"], PICTURES[:1], seeds=[1], masks=[box(0, 0, 0, 0)]),
        r"^the mask marks nothing",
    ),
]


@pytest.mark.parametrize(("asked", "said"), SAID)
def test_what_does_not_fit_is_said_before_any_work(
    asked: Callable[[Pipeline], object], said: str, pipeline: Pipeline
) -> None:
    with pytest.raises(UserError, match=said):
        asked(pipeline)


def test_a_wrong_option_is_said_with_the_nearest(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match=r"masking: must be .*; was 'cosin'; did you mean cosine"):
        pipeline(["a"], seeds=[1], masking="cosin")  # type: ignore[typeddict-item]
    with pytest.raises(ConfigError, match=r"guidance_span 0\.8, 0\.2: two shares of the steps"):
        pipeline(["a"], seeds=[1], guidance_span=(0.8, 0.2))
    with pytest.raises(ConfigError, match="stepps: no such key; did you mean steps"):
        pipeline(["a"], seeds=[1], stepps=3)  # type: ignore[call-arg]


def test_a_prompt_that_is_too_long_is_cut_and_said(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match=r"^1 prompts have more than 24 tokens.* as of: 'a red circle a red"):
        pipeline(["a red circle " * 30, "a"], seeds=[1, 2])


# --- the commands


@pytest.fixture(scope="module")
def folder(encoders: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("commands") / "model", encoders, cascade=True)


def test_raymuse_edit_writes_what_python_draws(folder: str, tmp_path: Path) -> None:
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    Image.fromarray(MASKS[1]).save(tmp_path / "m.png")
    words = [
        "task=inpaint",
        f"picture={tmp_path}/a.png",
        f"mask={tmp_path}/m.png",
        "prompt=a small blue star",
        "seed=7",
    ]
    words += [f"output={tmp_path}/b.png", "sampling.steps=3", "samples=2"]
    assert main(["edit", folder, *words]) == 0
    pipeline = Pipeline.load(folder, batch_size=1)
    for sample in range(2):
        data = (tmp_path / f"b-{sample}.png").read_bytes()
        facts = png_facts(data)
        assert facts["seed"] == image_seed(7, 0, sample)
        assert (facts["task"], facts["prompt"], facts["sampling"]) == ("inpaint", "a small blue star", {"steps": 3})
        drawn = pipeline.edit(
            "inpaint", ["a small blue star"], PICTURES[:1], masks=MASKS[1:2], seeds=[facts["seed"]], steps=3
        )
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"b-{sample}.png")), drawn.pixels[0])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("task=paint", "task: must be .*; was 'paint'"),
        ("output=b.jpg", "pictures are written as .png"),
        ("output=nowhere/b.png", "there is no folder"),
        ("picture=nothing.png", "the picture nothing.png does not exist"),
        ("sampling.order=haltn", "order: must be .* did you mean halton"),
        ("strength=2", "strength: must be at most 1"),
        ("seed=-1", "seed: must be at least 0"),
    ],
)
def test_a_wrong_edit_is_one_sentence_and_writes_nothing(
    word: str, said: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    words = {"task": "image-to-image", "picture": f"{tmp_path}/a.png", "prompt": "x", "output": f"{tmp_path}/b.png"}
    key, _, value = word.partition("=")
    assert main(["edit", folder, *(f"{name}={given}" for name, given in {**words, key: value}.items())]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_is_drawn_once_more_from_its_file(
    folder: str, encoders: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline.load(folder, batch_size=4)
    drawn = pipeline(["a small blue star", "a"], seeds=[7, 8], steps=3, negative="red")
    facts = {"prompt": "a small blue star", "negative": "red", "seed": 7, "steps": 3, "batch_size": 4}
    facts |= {"guidance": 3.0, "temperature": 2.0, "model": model_sha256(folder)[:16], "part": "part-000000"}
    words = ["generate", "--from-png", f"{tmp_path}/a.png", f"output={tmp_path}/b.png"]
    for pixels in (drawn.base_pixels[0], drawn.pixels[0]):
        own = {**facts, "width": pixels.shape[1], "height": pixels.shape[0]}
        (tmp_path / "a.png").write_bytes(png_bytes(pixels, own))
        assert main([*words, f"model={folder}"]) == 0
        assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    other = tiny.write_model(tmp_path / "other", encoders)
    assert main([*words, f"model={other}"]) == 2
    assert "was drawn by another model" in capsys.readouterr().err
    Image.fromarray(drawn.pixels[0]).save(tmp_path / "a.png")
    assert main([*words, f"model={folder}"]) == 2
    assert "does not say how it was drawn" in capsys.readouterr().err


# --- pictures as people have them


def test_pictures_come_as_files_arrays_and_pillows(tmp_path: Path) -> None:
    own = PICTURES[0]
    Image.fromarray(own).save(tmp_path / "a.png")
    for given in (own, Image.fromarray(own), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(read_picture(given), own)
    clear = Image.fromarray(own).convert("RGBA")
    clear.putalpha(0)
    assert (read_picture(clear) == 255).all()
    assert np.array_equal(read_picture(own[:, :, 0])[:, :, 2], own[:, :, 0])
    with pytest.raises(UserError, match=r"float64 \(32, 32, 3\): arrays must be uint8"):
        read_picture(own / 255)
    with pytest.raises(UserError, match=r"nothing.png does not exist"):
        read_picture(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text.png cannot be read as a picture"):
        read_picture(tmp_path / "text.png")


def test_masks_are_white_where_to_draw(tmp_path: Path) -> None:
    mask = box(3, 4, 5, 6)
    for given in (mask, mask.astype(np.uint8) * 255, Image.fromarray(mask), Image.fromarray(mask).convert("RGB")):
        assert np.array_equal(read_mask(given), mask)


def test_pictures_and_masks_are_fitted_to_a_size_together(pipeline: Pipeline) -> None:
    large = np.repeat(np.repeat(PICTURES[0], 2, axis=0), 3, axis=1)  # 64 high, 96 wide: cut at the sides
    mask = np.zeros((64, 96), dtype=bool)
    mask[:, :48] = True
    drawn = pipeline.edit("inpaint", ["a"], [large], seeds=[1], masks=[mask], size=(32, 32), paste=True)
    assert drawn.pixels.shape == (1, 32, 32, 3)
    wide = np.asarray(Image.fromarray(large).resize((48, 32), Image.Resampling.BILINEAR))[:, 8:40]
    assert np.array_equal(drawn.pixels[0][:, 17:], wide[:, 17:])
