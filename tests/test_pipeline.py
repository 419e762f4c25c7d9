"""The model folder and what it draws: a picture depends on its prompt and seed, and diffusers opens the same folder."""

import html
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from raymuse.config.errors import UserError
from raymuse.pipeline import Drawn, Pipeline, image_seed
from raymuse.storage.contact_sheet import Entry, sheet_html, sheet_png
from raymuse.storage.folder import Folder
from raymuse.storage.generated import PictureRow, read_part, rows_table
from raymuse.storage.pictures import png_bytes, png_facts
from raymuse.storage.webdataset_writer import write_tar

PROMPTS = [
    "a small red circle on a white background",
    "a large blue square left of a small green star on a black background",
    "",
    "猫 & <b>dogs</b>",
    "a yellow triangle",
    "a gray background",
    "a large cyan star on a white background",
]
SEEDS = [image_seed(0, number, 0) for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("encoders")
    return tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))


@pytest.fixture(scope="module")
def folder(encoders: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "base", encoders)


@pytest.fixture(scope="module")
def cascade_folder(encoders: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "cascade", encoders, cascade=True)


@pytest.fixture(scope="module", params=["base", "cascade"])
def pipeline(request: pytest.FixtureRequest, folder: str, cascade_folder: str) -> Pipeline:
    return Pipeline.load(folder if request.param == "base" else cascade_folder, batch_size=8)


def copied(folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def draw(pipeline: Pipeline, numbers: Sequence[int]) -> Drawn:
    return pipeline([PROMPTS[number] for number in numbers], seeds=[SEEDS[number] for number in numbers])


# --- what is drawn


def test_sizes_are_those_of_the_folder(pipeline: Pipeline) -> None:
    drawn = draw(pipeline, [0, 1])
    side = 16 if pipeline.superres else 32
    assert (drawn.pixels.shape, drawn.base_pixels.shape) == ((2, 32, 32, 3), (2, side, side, 3))
    assert (drawn.ids.shape, drawn.base_ids.shape) == ((2, 8, 8), (2, side // 4, side // 4))
    assert drawn.pixels.dtype == np.uint8
    assert 0 <= drawn.ids.min() <= drawn.ids.max() < tiny.CODES
    assert [image.size for image in drawn.images] == [(32, 32), (32, 32)]
    assert len(np.unique(drawn.ids)) > 8  # random weights, but no constant picture


def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    """Alone, among seven, in another order, beside other mates, and in batches of another run: the same ids."""
    together = draw(pipeline, range(7))
    for numbers in ([0], [3], [6, 2, 5, 0, 1, 4, 3], [1, 3], [5, 3], [0] * 9 + [4, 4]):
        again = draw(pipeline, numbers)
        assert np.array_equal(again.ids, together.ids[list(numbers)])
        assert np.array_equal(again.base_ids, together.base_ids[list(numbers)])
        assert np.array_equal(again.pixels, together.pixels[list(numbers)])


def test_prompt_seed_and_parameters_each_change_the_picture(pipeline: Pipeline) -> None:
    first = draw(pipeline, range(7)).base_ids
    assert np.array_equal(first, draw(pipeline, range(7)).base_ids)
    for other in (
        pipeline(PROMPTS[::-1], seeds=SEEDS),
        pipeline(PROMPTS, seeds=SEEDS[::-1]),
        pipeline(PROMPTS, seeds=SEEDS, guidance=1.0),
        pipeline(PROMPTS, seeds=SEEDS, guidance=9.0),
        pipeline(PROMPTS, seeds=SEEDS, steps=2),
        pipeline(PROMPTS, seeds=SEEDS, temperature=50.0),
        pipeline(PROMPTS, seeds=SEEDS, negative="a large blue square"),
    ):
        assert not np.array_equal(first, other.base_ids)


def test_attention_kernels_draw_the_same_and_those_that_cannot_are_refused(folder: str) -> None:
    drawn = {
        kernel: Pipeline.load(folder, batch_size=4, attention=kernel)(PROMPTS[:3], seeds=SEEDS[:3]).ids
        for kernel in ("auto", "flash", "math")
    }
    assert np.array_equal(drawn["flash"], drawn["auto"])
    assert np.mean(drawn["math"] == drawn["auto"]) > 0.9
    with pytest.raises(UserError, match=r"attention='memory-efficient' cannot be computed in fp32 on cpu"):
        Pipeline.load(folder, attention="memory-efficient")
    seen = []
    pipeline = Pipeline.load(folder, batch_size=4, attention="math")
    pipeline(PROMPTS[:1], seeds=[0], on_step=lambda step, ids: seen.append(torch.backends.cuda.flash_sdp_enabled()))
    assert seen
    assert not any(seen)
    assert torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(UserError, match="there are auto, flash, memory-efficient, math"):
        Pipeline.load(folder, attention="fast")  # type: ignore[arg-type]


def test_one_negative_prompt_serves_many_prompts(pipeline: Pipeline) -> None:
    one = pipeline(PROMPTS, seeds=SEEDS, negative="a black background")
    each = pipeline(PROMPTS, seeds=SEEDS, negative=["a black background"] * 7)
    assert np.array_equal(one.ids, each.ids)
    mixed = pipeline(PROMPTS[:2], seeds=SEEDS[:2], negative=["a black background", ""])
    assert np.array_equal(mixed.ids[0], one.ids[0])
    assert np.array_equal(mixed.ids[1], draw(pipeline, [1]).ids[0])


def test_lengths_that_differ_are_said(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match=r"^2 prompts and 1 seeds differ"):
        pipeline(["a", "b"], seeds=[1])
    with pytest.raises(UserError, match=r"^2 prompts and 3 negatives differ"):
        pipeline(["a", "b"], seeds=[1, 2], negative=["", "", ""])
    with pytest.raises(UserError, match=r"^no prompts"):
        pipeline([], seeds=[])


def test_one_pipelines_parameters_leave_another_alone(folder: str) -> None:
    first, second = Pipeline.load(folder, batch_size=2), Pipeline.load(folder, batch_size=2)
    before = first(PROMPTS[:2], seeds=[1, 2]).ids
    settings = first.settings
    second(PROMPTS[:2], seeds=[1, 2], steps=3, guidance=9.0, temperature=0.1)
    first(PROMPTS[:2], seeds=[1, 2], steps=1)
    assert first.settings is settings
    assert np.array_equal(first(PROMPTS[:2], seeds=[1, 2]).ids, before)


def test_the_super_resolution_reads_the_base_ids(cascade_folder: str) -> None:
    pipeline = Pipeline.load(cascade_folder, batch_size=2)
    low = np.random.default_rng(0).integers(0, tiny.CODES, (2, 4, 4))
    drawn = pipeline(["a", "a"], seeds=[5, 5], ids=low)
    assert np.array_equal(drawn.base_ids, low)
    assert not np.array_equal(drawn.ids[0], drawn.ids[1])


def test_image_seeds_are_63_bits_and_all_differ() -> None:
    seeds = {image_seed(run, prompt, sample) for run in range(3) for prompt in range(200) for sample in range(3)}
    assert len(seeds) == 1800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert image_seed(1, 11, 1) != image_seed(11, 1, 1)


# --- the folder


def test_diffusers_opens_the_folder_and_draws(folder: str) -> None:
    theirs = diffusers.AmusedPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    pictures = theirs(
        PROMPTS[:2],
        num_inference_steps=3,
        guidance_scale=3.0,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert pictures.shape == (2, 32, 32, 3)
    assert theirs.scheduler.config.mask_token_id == tiny.CODES + 63


def test_diffusers_computes_the_same_logits(folder: str) -> None:
    """So a folder means the same to both: text, micro-conditions, transformer."""
    theirs, ours = diffusers.AmusedPipeline.from_pretrained(folder), Pipeline.load(folder)
    ids = torch.randint(tiny.CODES, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    tokens = theirs.tokenizer(PROMPTS[:2], padding="max_length", truncation=True, return_tensors="pt").input_ids
    said = theirs.text_encoder(tokens, output_hidden_states=True)
    micro = torch.tensor([ours.settings.micro_conditioning] * 2)
    with torch.no_grad():
        wanted = theirs.transformer(ids, said.hidden_states[-2], said.text_embeds, micro)
        condition = ours.base.condition(*ours.text(PROMPTS[:2]), micro)
        logits = ours.base.head(ours.base.features(ids, condition))
    torch.testing.assert_close(logits.permute(0, 3, 1, 2), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changed", [Pipeline.packed, lambda pipeline: pipeline.compiled("aot_eager"), Pipeline.traced])
def test_packed_compiled_and_traced_networks_draw_the_same(
    pipeline: Pipeline, changed: Callable[..., Pipeline]
) -> None:
    other = changed(pipeline)
    ids = torch.randint(tiny.CODES, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    logits = []
    for one in (pipeline, other):
        condition = one.base.condition(*one.text(PROMPTS[:2]), torch.tensor([one.settings.micro_conditioning] * 2))
        logits.append(one.base.head(one.base.features(ids, one.base.precompute(condition))))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    together = draw(other, range(7))
    for numbers in ([0], [6, 2, 5, 0, 1, 4, 3]):
        assert np.array_equal(draw(other, numbers).ids, together.ids[list(numbers)])
    assert np.mean(together.ids == draw(pipeline, range(7)).ids) > 0.9
    for again in (lambda: other.styled({"anything": 1.0}), other.packed, other.compiled, other.traced):
        with pytest.raises(UserError, match=r"starts from plain weights: call styled\(\) first"):
            again()


def test_a_traced_network_draws_the_very_same_ids_at_every_size(pipeline: Pipeline) -> None:
    traced, side = pipeline.traced(), pipeline.settings.size
    for size in (None, (side, side // 2), None):
        drawn, wanted = (one(PROMPTS, seeds=range(len(PROMPTS)), size=size) for one in (traced, pipeline))
        assert np.array_equal(drawn.ids, wanted.ids)
        assert np.array_equal(drawn.base_ids, wanted.base_ids)


def test_compiling_without_a_compiler_is_said(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="compiling needs a C\\+\\+ compiler"):
        pipeline.compiled()


@pytest.mark.parametrize("downsample", [False, True], ids=["256", "512"])
def test_without_chance_diffusers_draws_the_same_ids_step_by_step(
    downsample: bool, encoders: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy codes, no noise, guidance: equal logits and equal ids at every step, for both published shapes.

    Four blocks a side tell all positions apart: of equally sure ones diffusers masks fewer than the schedule says.
    """
    shape = {"downsample": downsample, "upsample": downsample, "num_res_blocks": 4}
    folder = tiny.write_model(tmp_path / "model", encoders, **shape)
    theirs, ours = diffusers.AmusedPipeline.from_pretrained(folder), Pipeline.load(folder, batch_size=len(PROMPTS))
    theirs.set_progress_bar_config(disable=True)
    monkeypatch.setattr(torch, "multinomial", lambda given, *_, **__: given.argmax(dim=-1, keepdim=True))
    logits: dict[str, list[torch.Tensor]] = {"theirs": [], "ours": []}
    head, forward = ours.base.head, theirs.transformer.forward

    def our_head(features: torch.Tensor) -> torch.Tensor:
        logits["ours"].append(head(features))
        return logits["ours"][-1]

    def their_forward(*given: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        free, conditional = forward(*given, **named).chunk(2)
        logits["theirs"].append(torch.cat([conditional, free]).permute(0, 2, 3, 1))
        return torch.cat([free, conditional])

    monkeypatch.setattr(ours.base, "head", our_head)
    monkeypatch.setattr(theirs.transformer, "forward", their_forward)
    steps: dict[str, list[np.ndarray]] = {"theirs": [], "ours": []}
    theirs(
        PROMPTS,
        num_inference_steps=7,
        guidance_scale=3.0,
        temperature=(0, 0),
        output_type="latent",
        callback=lambda step, time, ids: steps["theirs"].append(ids.numpy().copy()),
    )
    ours(
        PROMPTS,
        seeds=SEEDS,
        steps=7,
        guidance=3.0,
        temperature=0.0,
        top_k=1,
        on_step=lambda step, ids: steps["ours"].append(ids),
    )
    assert len(steps["ours"]) == len(steps["theirs"]) == 7
    for mine, other in zip(logits["ours"], logits["theirs"], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    for mine, other in zip(steps["ours"], steps["theirs"], strict=True):
        assert np.array_equal(mine, other.reshape(mine.shape))


@pytest.mark.parametrize(
    "names",
    [
        ("diffusion_pytorch_model.fp16.safetensors",),
        (
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        ),
        (
            "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
            "diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
        ),
    ],
    ids=["one file", "shards", "shards as they were named before"],
)
def test_the_weights_of_a_variant_are_read_by_either_naming(
    names: tuple[str, ...], folder: str, tmp_path: Path
) -> None:
    place = copied(folder, tmp_path)
    for part, stem in (("vqvae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (place / part / f"{stem}.safetensors").rename(place / part / f"{stem}.fp16.safetensors")
    plain = place / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = sorted(load_file(plain).items())
    plain.unlink()
    for number, name in enumerate(names):
        share = {key: value.half() for key, value in weights[number :: len(names)]}
        save_file(share, plain.with_name(name), metadata={"format": "pt"})
    half = Pipeline.load(str(place), variant="fp16", batch_size=8)
    for key, value in half.base.state_dict().items():
        assert torch.equal(value, dict(weights)[key].half().float())
    with pytest.raises(UserError, match=r"has no weights without a variant; it has the variants fp16\.$"):
        Pipeline.load(str(place))
    with pytest.raises(UserError, match=r"has no weights of the variant 'bf16'"):
        Pipeline.load(str(place), variant="bf16")


def test_parts_that_do_not_belong_together_are_refused(encoders: str, tmp_path: Path) -> None:
    for number, (change, said) in enumerate(
        [
            ({"codebook_size": 40}, "codebook_size is 40 and must be 32"),
            ({"encoder_hidden_size": 24}, "encoder_hidden_size is 24 and must be 16"),
            ({"cond_embed_dim": 9}, "cond_embed_dim is 9 and must be 8"),
        ]
    ):
        folder = tiny.write_model(tmp_path / str(number), encoders, **change)
        with pytest.raises(UserError, match=f"transformer/ does not belong to this VQGAN and text encoder: {said}"):
            Pipeline.load(folder)


def test_a_plain_diffusers_folder_gets_amuseds_defaults(folder: str, tmp_path: Path) -> None:
    place = copied(folder, tmp_path)
    (place / "generation_config.json").unlink()
    settings = Pipeline.load(str(place)).settings
    assert (settings.size, settings.base.guidance, settings.base.steps) == (256, 4.0, 12)
    assert settings.micro_conditioning == (256, 256, 0, 0, 6)


def test_settings_come_back_as_they_were_saved(cascade_folder: str) -> None:
    settings = Pipeline.load(cascade_folder).settings
    assert (settings.base_size, settings.size, settings.base.steps, settings.base.guidance) == (16, 32, 5, 3.0)
    assert settings.superres is not None
    assert (settings.superres.steps, settings.superres.guidance) == (3, 2.0)


@pytest.mark.parametrize("part", ["transformer", "vqvae", "text_encoder", "superres"])
def test_pickled_weights_are_refused_with_the_way_out(part: str, cascade_folder: str, tmp_path: Path) -> None:
    place = copied(cascade_folder, tmp_path)
    for path in (place / part).glob("*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    with pytest.raises(
        UserError, match=r"is a pickle, which can run code and is not read\)\. Convert it: load it"
    ) as error:
        Pipeline.load(str(place))
    assert str(place / part) in str(error.value)


@pytest.mark.parametrize("part", ["transformer", "vqvae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_one_sentence(part: str, folder: str, tmp_path: Path) -> None:
    place = copied(folder, tmp_path)
    shutil.rmtree(place / part)
    with pytest.raises(UserError, match=f"^[^\n]*has no {part}/: it is no model folder. `raymuse export` writes one.$"):
        Pipeline.load(str(place))


@pytest.mark.parametrize("part", ["transformer", "superres", "vqvae", "text_encoder"])
def test_a_part_without_its_config_is_one_sentence(part: str, cascade_folder: str, tmp_path: Path) -> None:
    place = copied(cascade_folder, tmp_path)
    (place / part / "config.json").unlink()
    with pytest.raises(UserError, match=f"^[^\n]*{part}[^\n]*config.json[^\n]*$"):
        Pipeline.load(str(place))


@pytest.mark.parametrize("part", ["transformer", "superres"])
@pytest.mark.parametrize("damage", ["missing", "other shape", "truncated"])
def test_weights_that_do_not_fit_are_said_in_one_sentence(
    part: str, damage: str, cascade_folder: str, tmp_path: Path
) -> None:
    path = copied(cascade_folder, tmp_path) / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    if damage == "missing":
        del weights[name]
    elif damage == "other shape":
        weights[name] = torch.zeros(3, 3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"^[^\n]*{part}[^\n]*$"):
        Pipeline.load(str(path.parents[1]))


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*does not exist[^\n]*$"):
        Pipeline.load(str(tmp_path / "nothing"))


# --- pictures on disk


def noise(side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_a_png_carries_how_it_was_made() -> None:
    facts = {"prompt": "猫 & <b>", "seed": 2**63 - 1, "guidance": 4.5, "nested": {"a": [1, None]}}
    data = png_bytes(noise(), facts)
    assert png_facts(data) == facts
    assert png_bytes(noise(), dict(reversed(facts.items()))) == data
    assert png_facts(png_bytes(noise(), {})) == {}


def test_a_png_of_another_program_carries_nothing(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.png")
    assert png_facts((tmp_path / "a.png").read_bytes()) == {}
    Image.fromarray(noise()).save(tmp_path / "a.jpg")
    assert png_facts((tmp_path / "a.jpg").read_bytes()) == {}


def row(number: int, part: str) -> PictureRow:
    return PictureRow(
        index=number,
        sample=0,
        key=f"{number:09d}-0",
        source_key="",
        prompt=PROMPTS[number],
        negative="",
        seed=SEEDS[number],
        width=8,
        height=8,
        steps=12,
        guidance=4.0,
        temperature=2.0,
        batch_size=16,
        model="abc",
        part=part,
    )


def test_a_part_of_pictures_reads_back_with_its_rows(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    rows = [row(number, "part-000000") for number in range(3)]
    for one in rows:
        members.append((f"{one.key}.png", png_bytes(noise(seed=one.index), {})))
        if one.index == 1:
            members.append((f"{one.key}.base.png", png_bytes(noise(4), {})))
        members.append((f"{one.key}.json", tiny.json_bytes(one.__dict__)))
    (tmp_path / "parts").mkdir()
    write_tar(tmp_path / "parts" / "part-000000.tar", members)
    read = list(read_part(Folder(str(tmp_path)), "part-000000"))
    assert [one.row for one in read] == rows
    assert all(np.array_equal(one.pixels, noise(seed=one.row.index)) for one in read)
    assert [one.base_pixels is None for one in read] == [True, False, True]
    assert rows_table(rows)["seed"].to_pylist() == SEEDS[:3]


# --- contact sheets


def entries(count: int, labels: int = 2) -> list[Entry]:
    return [Entry(PROMPTS[number % 7], tuple(noise(seed=number) for _ in range(labels))) for number in range(count)]


def test_a_page_holds_every_prompt_escaped_and_every_picture() -> None:
    title, labels = "<script>alert(1)</script>", ("base", 'high "res"')
    page = sheet_html(entries(7), labels, title)
    for prompt in PROMPTS:
        assert f"<figcaption>{html.escape(prompt)}</figcaption>" in page
    assert "<b>dogs" not in page
    assert "alert(1)</script>" not in page.replace(html.escape(title), "")
    assert page.count("<img ") == 14
    assert page.count("data:image/png;base64,") == 14
    assert 'alt="high &quot;res&quot;"' in page
    assert "http" not in page  # it opens anywhere, also without a network


@pytest.mark.parametrize("count", [0, 1, 6, 7, 36])
def test_a_sheet_shows_every_picture(count: int) -> None:
    sheet = sheet_png(entries(count), ("base", "super-resolution"), "title")
    pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    for number in range(count):
        colour = noise(seed=number)[0, 0]
        assert (pixels == colour).all(axis=1).sum() >= 12 * 12  # an 8 px picture grows to 96 without smoothing


def test_a_sheets_prompts_are_drawn_under_the_pictures() -> None:
    with_prompt = sheet_png([Entry("a red circle", (noise(),))], ("picture",), "t")
    without = sheet_png([Entry("", (noise(),))], ("picture",), "t")
    changed = np.argwhere((np.asarray(with_prompt) != np.asarray(without)).any(axis=2))
    assert len(changed) > 20
    assert changed[:, 0].min() >= 40 + 96
