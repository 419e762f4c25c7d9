"""Prompts to pictures through a real Serve: all of them, once, the same whatever was killed or resumed."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import tiny
from processes import children_named, wait_until
from raymuse.cli import batch
from raymuse.cli.app import main
from raymuse.cli.words import generate_config
from raymuse.config.edit import RepeatConfig
from raymuse.config.errors import TooManyRejects, UserError
from raymuse.config.generate import GenerateConfig
from raymuse.drawing.model_folder import model_sha256
from raymuse.pipeline import Pipeline, image_seed
from raymuse.serving.asked import Drawing, DrawRequest
from raymuse.serving.checker import open_checker
from raymuse.serving.engines import TRIES, _measured, actor_engine, ask
from raymuse.serving.limit import Limit, measure
from raymuse.serving.progress import Done, Progress
from raymuse.stages.edit import repeat
from raymuse.stages.generate import generate, plan_parts, survey
from raymuse.storage.batch_check import batch_state, check_batch
from raymuse.storage.manifest import FileRecord
from raymuse.storage.pictures import png_facts
from raymuse.storage.prompts import Asked, read_prompts
from raymuse.storage.rejects import Reason
from raymuse.tracking.run import Run

PROMPTS = ["a red circle", "a blue star", "a green square", "", *(f"a yellow ring number {n}" for n in range(8))]
ASKED = {1: {"negative": "red", "steps": 2, "guidance": 1.5}, 2: {"seed": 77}}  # by rows of their own
SAMPLES, SEED = 2, 5


@pytest.fixture(scope="module")
def drawn(model: str, http_port: int, tmp_path_factory: pytest.TempPathFactory) -> GenerateConfig:
    """The config of an undisturbed run of 24 pictures in three parts, two of them of an empty prompt."""
    folder = tmp_path_factory.mktemp("drawn")
    lines = [{"prompt": prompt, **ASKED.get(index, {})} for index, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = GenerateConfig(
        output=str(folder / "images"),
        model=model,
        prompts=str(folder / "prompts.jsonl"),
        samples=SAMPLES,
        seed=SEED,
        pictures_per_part=8,
        batch_size=4,
        max_reject_fraction=0.2,
    )
    generate(config, Run.off())
    return config


def changed(config: GenerateConfig, output: Path, **changes: object) -> GenerateConfig:
    return GenerateConfig.model_validate({**config.model_dump(), "output": str(output), **changes})


def rows(folder: str | Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(f"{folder}/manifest.parquet").to_pylist()
    return table


def files(folder: str | Path) -> dict[str, bytes]:
    """Every member of every part, by name."""
    found = {}
    for path in sorted(Path(folder, "parts").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                found[member.name] = stream.read()
    return found


def pixels(folder: str | Path) -> dict[str, bytes]:
    """The pixels of every picture, bases too, by name."""
    pictures = {name: data for name, data in files(folder).items() if name.endswith(".png")}
    return {name: np.asarray(Image.open(io.BytesIO(data))).tobytes() for name, data in pictures.items()}


# --- what a run leaves


def test_the_manifest_holds_every_picture_in_the_order_of_the_prompts(drawn: GenerateConfig) -> None:
    table = rows(drawn.output)
    wanted = [(index, sample) for index in range(12) for sample in range(SAMPLES) if PROMPTS[index]]
    assert [(row["index"], row["sample"]) for row in table] == wanted
    assert [row["prompt"] for row in table] == [PROMPTS[index] for index, _ in wanted]
    seeds = {(index, sample): image_seed(SEED, index, sample) for index, sample in wanted}
    seeds |= {(2, 0): 77, (2, 1): image_seed(77, 0, 1)}
    assert [row["seed"] for row in table] == [seeds[place] for place in wanted]
    assert {(row["width"], row["height"]) for row in table} == {(64, 64)}
    asked = {row["index"]: (row["steps"], row["guidance"], row["negative"]) for row in table}
    assert asked == {index: (2, 1.5, "red") if index == 1 else (3, 2.0, "") for index, _ in wanted}
    assert {row["part"] for row in table} == {"part-000000", "part-000001", "part-000002"}
    names = files(drawn.output)
    assert set(names) == {row["key"] + ending for row in table for ending in (".png", ".base.png", ".json")}


def test_an_empty_prompt_is_a_reject_and_the_counts_add_up(drawn: GenerateConfig) -> None:
    rejects = pq.read_table(f"{drawn.output}/rejects").to_pylist()
    assert [(row["key"], row["reason"]) for row in rejects] == [
        ("000000003-0", "empty_prompt"),
        ("000000003-1", "empty_prompt"),
    ]
    success = json.loads(Path(drawn.output, "_SUCCESS").read_text())
    assert (success["rows"], success["rejects"]) == (22, 2)


def test_loras_are_merged_where_serve_draws_and_the_job_is_held_against_its_hardwares_limit(
    drawn: GenerateConfig,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One LoRA for all rows, others for those that name them."""
    monkeypatch.setattr("raymuse.stages.generate.MEASURED_FROM", 1)
    adapter, ink = (tiny.write_adapter(tmp_path / name, model) for name in ("adapter", "ink"))
    lines: list[dict[str, Any]] = [
        {"prompt": "a red circle"},
        {"prompt": "a blue star", "lora": "ink"},
        {"prompt": "a blue star", "lora": "ink", "lora_scale": 0.5},
        {"prompt": "a blue star", "lora": "oil"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = changed(
        drawn,
        tmp_path / "styled",
        prompts=str(tmp_path / "p.jsonl"),
        samples=1,
        lora=adapter,
        lora_scales=[0.5],
        styles={"ink": ink},
        most_styles=1,
        pictures_per_part=2,
        price_per_hour=36,
        max_reject_fraction=0.25,
    )
    generate(config, Run.off())
    found = pixels(config.output)
    merged = [{adapter: 0.5}, {adapter: 0.5, ink: 1.0}, {adapter: 0.5, ink: 0.5}]
    for index, (line, lora) in enumerate(zip(lines, merged, strict=False)):
        alone = Pipeline.load(model, batch_size=4, lora=lora)([line["prompt"]], seeds=[image_seed(SEED, index, 0)])
        assert found[f"{index:09d}-0.png"] == alone.pixels[0].tobytes()
    assert found["000000000-0.png"] != pixels(drawn.output)["000000000-0.png"]
    assert found["000000001-0.png"] != found["000000002-0.png"]
    assert [row["model"] for row in rows(config.output)] == [model_sha256(model, lora)[:16] for lora in merged]
    (reject,) = pq.read_table(f"{config.output}/rejects").to_pylist()
    assert reject["detail"] == "lora: 'oil' is none of the job's styles, which are: ink"
    (tmp_path / "a.png").write_bytes(files(config.output)["000000002-0.png"])
    again = RepeatConfig(
        model=model,
        lora=(adapter, ink),
        lora_scales=(0.5, 0.5),
        picture=str(tmp_path / "a.png"),
        output=str(tmp_path / "again.png"),
    )
    assert Path(repeat(again)).read_bytes() == files(config.output)["000000002-0.png"]
    said = capsys.readouterr().out
    assert re.search(r"a replica can do [\d.]+ TFLOP/s \(measured with a product of fp32 matrices\)", said)
    told = re.findall(r"([\d.]+)% of the hardware's limit  cost ([\d.]+)", said)
    assert len(told) == 2
    assert all(0 < float(share) < 100 and float(cost) >= 0 for share, cost in told)


def test_too_many_rejects_are_told_after_the_work(drawn: GenerateConfig) -> None:
    strict = changed(drawn, Path(drawn.output), max_reject_fraction=0.05)
    with pytest.raises(TooManyRejects, match="2 of 24 inputs"):
        generate(strict, Run.off())


def test_each_png_says_how_it_was_made(drawn: GenerateConfig) -> None:
    names = files(drawn.output)
    for row in rows(drawn.output):
        for ending in (".png", ".base.png"):
            facts = png_facts(names[row["key"] + ending])
            assert facts["seed"] == row["seed"]
            assert facts["prompt"] == row["prompt"]
            width, height = Image.open(io.BytesIO(names[row["key"] + ending])).size
            assert (facts["width"], facts["height"]) == (width, height)
            assert facts.pop("base", False) == (ending == ".base.png")
            assert {**facts, "width": 64, "height": 64} == json.loads(names[row["key"] + ".json"])


def test_pictures_are_those_of_the_pipeline_alone(drawn: GenerateConfig) -> None:
    pipeline = Pipeline.load(drawn.model, batch_size=drawn.batch_size)
    seen = pixels(drawn.output)
    table = rows(drawn.output)
    for row in table:
        options = {name: row[name] for name in ("negative", "steps", "guidance", "temperature")}
        (alone,) = pipeline([row["prompt"]], seeds=[row["seed"]], **options).pictures
        assert seen[row["key"] + ".png"] == alone.pixels.tobytes()
        assert seen[row["key"] + ".base.png"] == alone.base_pixels.tobytes()
    assert len(set(seen.values())) == len(seen), "pictures that are all the same would prove nothing"


def test_the_contact_sheets_show_the_prompts(drawn: GenerateConfig) -> None:
    page = Path(drawn.output, "contact_sheet.html").read_text()
    assert all(f"<figcaption>{prompt}</figcaption>" in page for prompt in PROMPTS if prompt)
    assert page.count("<figure>") == 22
    assert page.count("<img ") == 44  # base and super-resolved
    sheet = Image.open(Path(drawn.output, "contact_sheet.png"))
    assert sheet.width > 6 * 2 * 64


# --- the same pictures, whatever happens


def test_replicas_killed_in_the_middle_other_parts_fewer_cores_and_two_shards_change_no_picture(
    drawn: GenerateConfig, tmp_path: Path
) -> None:
    """Half of the job by each engine, each of which is killed once."""
    how: dict[str, Any] = {"pictures_per_part": 4, "in_flight": 1, "cpus_per_replica": 1}
    engines = {"serve": "ServeReplica:raymuse-generate", "actors": "ray::GeneratorActor"}
    shards = []
    for number, (engine, title) in enumerate(engines.items(), 1):
        folder, killed = tmp_path / engine, list[int]()
        killer = threading.Thread(target=_kill_after_the_first_part, args=(folder, title, killed), daemon=True)
        killer.start()
        generate(changed(drawn, folder, engine=engine, shard=f"{number}/2", **how), Run.off())
        killer.join()
        assert len(killed) == 1
        shards.append(folder)
    parts = [sorted(path.stem for path in (shard / "parts").glob("*.tar")) for shard in shards]
    assert parts == [[f"part-{number:06d}" for number in of] for of in ((0, 2, 4), (1, 3, 5))]
    assert sorted(row["key"] for shard in shards for row in rows(shard)) == [row["key"] for row in rows(drawn.output)]
    assert pixels(shards[0]) | pixels(shards[1]) == pixels(drawn.output)
    assert [batch_state(str(shard)).planned for shard in shards] == [12, 12]
    assert sum(json.loads((shard / "_SUCCESS").read_text())["rejects"] for shard in shards) == 2
    with pytest.raises(ValidationError, match="3/2 names a shard beyond the last"):
        changed(drawn, tmp_path, shard="3/2")


def _kill_after_the_first_part(folder: Path, title: str, killed: list[int]) -> None:
    wait_until(lambda: list((folder / "_manifest").glob("part-*.json")), 300)
    for replica in children_named(title):
        replica.kill()
        killed.append(replica.pid)


def test_a_request_that_fails_costs_its_neighbours_nothing(drawn: GenerateConfig) -> None:
    good = [DrawRequest(prompt, seed, "", 2, 1.0, 0.5) for seed, prompt in enumerate(["a red circle", "a blue star"])]
    bad = DrawRequest("a green square", 7, "", 0, 1.0, 0.5)  # no steps leave every id masked
    with actor_engine(drawn, "neighbours") as draw:
        together = ask(draw, good)
        answers = ask(draw, [good[0], bad, good[1]])
        limit = draw.limit(None)
    assert limit is not None
    assert limit.peak > 1e9
    wait_until(lambda: not children_named("ray::GeneratorActor"), 20)
    assert isinstance(answers[1], Exception)
    for answer, expected in zip((answers[0], answers[2]), together, strict=True):
        assert isinstance(answer, Drawing)
        assert isinstance(expected, Drawing)
        assert np.array_equal(answer.pixels, expected.pixels)


def test_a_lost_part_is_drawn_again_to_the_same_bytes(drawn: GenerateConfig) -> None:
    folder = Path(drawn.output)
    before, manifest = files(folder), (folder / "manifest.parquet").read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "parts").glob("*.tar")}
    lost = folder / "parts/part-000001.tar"
    del kept[lost]
    for path in (folder / "_manifest/part-000001.json", folder / "_SUCCESS", lost, folder / "manifest.parquet"):
        path.unlink()
    generate(drawn, Run.off())
    assert files(folder) == before
    assert (folder / "manifest.parquet").read_bytes() == manifest
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_no_application_stays_behind_and_serve_goes_on(drawn: GenerateConfig) -> None:
    assert not [name for name in serve.status().applications if name.startswith("raymuse-generate")]
    assert serve.status().proxies


def test_rows_draw_other_sizes_and_edit_pictures(drawn: GenerateConfig, model: str, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    area = np.zeros((64, 64), dtype=bool)
    area[:32] = True
    (tmp_path / "of").mkdir()
    Image.fromarray(picture).save(tmp_path / "of/picture.png")
    Image.fromarray(area).save(tmp_path / "of/mask.png")
    Image.fromarray(np.zeros_like(area)).save(tmp_path / "of/empty.png")
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "size": "64x32", "seed": 1, "top_k": 5, "order": "halton", "guidance_to": 0.5},
        {"prompt": "b", "image": "of/picture.png", "mask": "of/mask.png", "seed": 2},
        {"prompt": "c", "image": "of/picture.png", "strength": 0.5, "seed": 3},
        {"prompt": "d", "image": "of/nothing.png"},
        {"prompt": "e", "image": "p.jsonl"},
        {"prompt": "f", "image": "of/picture.png", "mask": "of/empty.png"},
        {"prompt": "g", "size": "63x64"},
        {"prompt": "h", "strength": 0.5},
        {"prompt": "a Bad, bad; STAR!"},
        {"prompt": "bad stars"},
        {"prompt": "j", "image": str(tmp_path / "of/picture.png")},
        {"prompt": "k", "image": "of/../../secret.png"},
        {"prompt": "l", "masking": "cosin"},
    ]
    (tmp_path / "deny.txt").write_text("# what we do not draw\n\nbad star\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = changed(
        drawn,
        tmp_path / "images",
        prompts=str(tmp_path / "p.jsonl"),
        samples=1,
        max_reject_fraction=1,
        deny=str(tmp_path / "deny.txt"),
        temperature=0.7,
        sampling={"end_temperature": 0.2, "top_k": 7},
        superres_sampling={"top_p": 0.9, "steps": 2},
        precision="bf16",
        traced=True,
    )
    generate(config, Run.off())
    assert [(row["prompt"], row["task"], row["width"], row["height"]) for row in rows(config.output)] == [
        ("a", "", 64, 32),
        ("b", "inpaint", 64, 64),
        ("c", "image-to-image", 64, 64),
        ("bad stars", "", 64, 64),
    ]
    pipeline = Pipeline.load(model, batch_size=config.batch_size, precision="bf16")
    every: Any = {"temperature": 0.7, "end_temperature": 0.2, "top_k": 7, "superres": {"top_p": 0.9, "steps": 2}}
    own = {**every, "top_k": 5, "order": "halton", "guidance_span": (0.0, 0.5)}
    alone = [
        pipeline(["a"], seeds=[1], size=(64, 32), **own),
        pipeline.edit("inpaint", ["b"], [picture], masks=[area], seeds=[2], **every),
        pipeline.edit("image-to-image", ["c"], [picture], seeds=[3], strength=0.5, **every),
    ]
    found = pixels(config.output)
    assert [found[f"{n:09d}-0.png"] for n in range(3)] == [drawing.pixels.tobytes() for drawing in alone]
    rejects = pq.read_table(f"{config.output}/rejects").to_pylist()
    said = {str(int(row["key"].split("-")[0])): (row["reason"], row["detail"]) for row in rejects}
    for key, reason, words in [
        ("3", "bad_parameter", "nothing.png cannot be read"),
        ("4", "undecodable", ""),
        ("5", "bad_parameter", "the mask marks nothing"),
        ("6", "bad_parameter", "63 x 64 pixels: this model draws in cells of 8"),
        ("7", "bad_parameter", "need an image"),
        ("8", "denied", "'bad star' stands in"),
        ("10", "bad_parameter", "does not lie beside the prompts"),
        ("11", "bad_parameter", "does not lie beside the prompts"),
        ("12", "bad_parameter", "masking: must be"),
    ]:
        assert said[key][0] == reason, said
        assert words in said[key][1]
    assert check_batch(config.output).problems == []
    repeated = RepeatConfig(model=model, picture=str(tmp_path / "a.png"), output=str(tmp_path / "again.png"))
    for name in ("000000000-0.png", "000000000-0.base.png"):
        Path(repeated.picture).write_bytes(files(config.output)[name])
        assert Path(repeat(repeated)).read_bytes() == files(config.output)[name]
    Path(repeated.picture).write_bytes(files(config.output)["000000001-0.png"])
    with pytest.raises(UserError, match="drawn from another picture"):
        repeat(repeated)


def test_pictures_that_the_checker_refuses_are_counted_and_the_others_stay(
    drawn: GenerateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, keys = pixels(drawn.output), [row["key"] for row in rows(drawn.output)]
    pictures = {key: np.frombuffer(before[f"{key}.png"], np.uint8).reshape(64, 64, 3) for key in keys}
    checking = tiny.write_checker(tmp_path / "checker", list(pictures.values()))  # some it refuses, and some not
    config = changed(drawn, tmp_path / "checked", **checking, max_reject_fraction=1, engine="actors")
    check = open_checker(config)
    assert check is not None
    said = {key: check(picture) for key, picture in pictures.items()}
    kept = [key for key in keys if said[key] is None]
    assert 0 < len(kept) < len(keys)
    generate(config, Run.off())
    assert "not looked at" not in capsys.readouterr().out
    assert [row["key"] for row in rows(config.output)] == kept
    assert pixels(config.output) == {name: data for name, data in before.items() if name.partition(".")[0] in kept}
    rejects = pq.read_table(f"{config.output}/rejects").to_pylist()
    told = {row["key"]: row["detail"] for row in rejects if row["reason"] == "refused_picture"}
    assert told == {key: reason for key, reason in said.items() if reason is not None}
    assert check_batch(config.output).problems == []
    assert f"refused_picture: {len(told)}" in batch_state(config.output).summary
    with pytest.raises(UserError, match="checker was"):
        generate(config.model_copy(update={"checker_threshold": 0.99}), Run.off())


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this machine lets the tests mount no file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_stops_a_job_with_a_sentence_and_it_goes_on_when_there_is_room(
    drawn: GenerateConfig, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = changed(drawn, small_disk / "images", engine="actors").model_dump(mode="json", exclude_defaults=True)
    recipe.write_text(yaml.safe_dump({"stage": "generate", **values}))
    assert main(["generate", str(recipe)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(
        r"Error: there is no room left for .* \(No space left on device\)\. Make room there .*", said[-1]
    )
    assert not [line for line in said if "Traceback" in line]
    state = batch_state(str(small_disk / "images"))
    assert (state.finished, state.problems) == (False, [])
    assert 0 < state.parts < 3
    assert not list(small_disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    kept = {path: path.stat().st_mtime_ns for path in small_disk.rglob("_manifest/part-*.json")}
    assert main(["generate", str(recipe)]) == 0
    assert files(small_disk / "images") == files(drawn.output)
    assert check_batch(str(small_disk / "images")).problems == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


# --- how it gets on


def test_progress_is_told_to_the_terminal_and_to_mlflow(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[dict[str, float], int]] = []

    class Noted(Run):
        def metrics(self, values: Mapping[str, float], step: int) -> None:
            told.append((dict(values), step))

    limit = Limit(first=2e9, further=1e9, peak=1e15)
    progress = Progress(20, 2, limit, Noted(None, Path()))
    time.sleep(0.05)
    progress.add(Done(pictures=8, failed=2, passes=48), 1)
    progress.add(Done(pictures=10, failed=0, passes=60), 2)
    first, last = (numbers for numbers, _ in told)
    assert [step for _, step in told] == [1, 2]
    assert (first["pictures"], first["failed"], last["pictures"]) == (8, 2, 18)
    seconds = first["pictures"] / first["pictures_per_second"]
    assert first["seconds_left"] == pytest.approx(seconds)  # as long as it took so far: half is done
    assert first["share_of_limit"] == pytest.approx((8 * 2e9 + 40 * 1e9) / seconds / 2e15)
    assert last["seconds_left"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"8 pictures  2 failed  [\d.]+ pictures/s  [\d.]+% of the hardware's limit  10 left, 0:00:0\d", lines[0]
    )


def test_a_replica_that_dies_while_it_is_measured_costs_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymuse.serving.engines.time", SimpleNamespace(sleep=lambda seconds: None))
    asked: list[int] = []

    def dies(times: int) -> Limit:
        asked.append(times)
        if asked.count(times) <= times:
            raise RayActorError
        return Limit(3.0, 2.0, 1.0)

    assert _measured(lambda: dies(2)) == Limit(3.0, 2.0, 1.0)
    assert _measured(lambda: dies(TRIES)) is None
    assert [asked.count(times) for times in (2, TRIES)] == [3, TRIES]


def test_the_cost_of_a_picture_is_that_of_its_network_calls(drawn: GenerateConfig) -> None:
    pipeline = Pipeline.load(drawn.model, batch_size=1)
    limit = measure(pipeline, 1, peak=1e12)
    for steps, guidance, passes in ((1, 1.0, 1), (5, 1.0, 5), (3, 2.0, 6)):
        with FlopCounterMode(display=False) as counter:
            pipeline.draw([pipeline.request("a", 0, steps=steps, guidance=guidance)])
        # the negative prompt is read once more than a picture without guidance needs it
        assert limit.work(1, passes) == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert limit.peak == 1e12
    assert 1e9 < measure(pipeline, 1).peak < 1e13


# --- a part of a job, and what was done


def test_a_whole_batch_is_whole(drawn: GenerateConfig) -> None:
    state = check_batch(drawn.output)
    assert (state.problems, state.leftovers) == ([], [])
    assert (state.finished, state.planned, state.drawn, state.failed, state.parts) == (True, 24, 22, 2, 3)
    assert "finished: 22 of 24 pictures, 2 failed, 3 parts" in state.summary
    assert state.summary.endswith("empty_prompt: 2")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: flip(folder / "parts/part-000001.tar"), "parts/part-000001.tar: .* with another sum"),
        (lambda folder: (folder / "rows/part-000002.parquet").unlink(), "rows/part-000002.parquet: it cannot be read"),
        (
            lambda folder: rerecorded(folder, "part-000000"),
            "part-000000: 6 rows and 2 rejects, the manifest says 7 and 2",
        ),
        (lambda folder: swapped(folder), "part-000001: the rows and the pictures in its tar differ"),
        (lambda folder: cut(folder / "manifest.parquet"), "manifest.parquet: 20 rows for 22 pictures"),
    ],
    ids=["flipped byte", "lost file", "wrong count", "other rows", "short table"],
)
def test_what_is_wrong_with_a_batch_is_said(
    harm: Callable[[Path], None], said: str, drawn: GenerateConfig, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(drawn.output, tmp_path / "images"))
    harm(folder)
    (folder / "parts/part-000009.tar").touch()
    state = check_batch(str(folder))
    assert any(re.match(said, problem) for problem in state.problems), state.problems
    assert state.leftovers == ["parts/part-000009.tar"]
    result = CliRunner().invoke(batch.app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert all(problem in result.output for problem in state.problems)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))


def rerecorded(folder: Path, part: str, **changes: Any) -> None:
    path = folder / f"_manifest/{part}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "rows": record["rows"] + 1, **changes}))


def swapped(folder: Path) -> None:
    """One part's rows in place of another's, sums and all."""
    data = (folder / "rows/part-000002.parquet").read_bytes()
    (folder / "rows/part-000001.parquet").write_bytes(data)
    path = folder / "_manifest/part-000001.json"
    record = json.loads(path.read_text())
    for file in record["files"]:
        if file["name"].startswith("rows/"):
            file.update(asdict(FileRecord.of(file["name"], data)))
    path.write_text(json.dumps(record))


def cut(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(2), path)


def test_what_is_no_batch_is_refused(tmp_path: Path, shards: str) -> None:
    for folder, said in ((str(tmp_path), "holds no batch"), (shards, "is the output of `raymuse data`")):
        with pytest.raises(UserError, match=said):
            batch_state(folder)


# --- prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\n\nein Bär\n"),
        ("p.jsonl", '{"prompt": "a cat", "key": "x"}\n\n{"prompt": "", "key": null}\n{"prompt": "ein Bär"}\n'),
        ("p.csv", '\ufeffkey,prompt\r\nx,a cat\r\n,\r\n,"ein Bär"\r\n'),
    ],
)
def test_prompts_come_from_text_json_lines_and_tables(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    read = list(read_prompts(str(tmp_path / name)))
    assert [(one.index, one.prompt) for one in read] == [(0, "a cat"), (1, ""), (2, "ein Bär")]
    assert [one.key for one in read] == (["", "", ""] if name == "p.txt" else ["x", "", ""])


def test_a_row_says_how_it_is_drawn_and_a_wrong_one_keeps_its_place(drawn: GenerateConfig, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "negative": "b", "seed": 7, "samples": 2, "steps": 3, "guidance": 1.5, "other": "x"},
        {"prompt": "b", "steps": 0, "guidance": "much"},
        {"prompt": "c"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.csv").write_text(
        "prompt,negative,seed,samples,steps,guidance,other\na,b,7,2,3,1.5,x\nb,,,,0,much,\nc,,,,,,\n"
    )
    pq.write_table(pa.Table.from_pylist([rows[0], {"prompt": "b", "steps": 0}, rows[2]]), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.csv", "p.parquet"):
        first, wrong, last = read_prompts(str(tmp_path / name))
        asked = first.asked
        assert (asked.negative, asked.seed, asked.samples, asked.steps, asked.guidance) == ("b", 7, 2, 3, 1.5)
        assert wrong.fault is not None
        assert wrong.fault[0] == Reason.BAD_PARAMETER
        assert "steps: must be at least 1, was 0" in wrong.fault[1]
        assert (last.asked, last.fault) == (Asked(), None)
        wanted = [one for _, part in plan_parts([first, wrong, last], drawn) for one in part]
        run = [image_seed(drawn.seed, 2, sample) for sample in range(drawn.samples)]
        assert [one.seed for one in wanted if one.prompt is first] == [7, image_seed(7, 0, 1)]
        assert [one.seed for one in wanted if one.prompt is last] == run


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.parquet", b"x", "cannot be read as Parquet"),
        ("gone.txt", None, "does not exist"),
        ("p.txt", b"", "holds no prompts"),
        ("p.jsonl", b"\n", "holds no prompts"),
        ("p.docx", b"x", "prompts come as .txt"),
        ("p.csv", b"text,key\na,b\n", "has no column `prompt`; it has text, key"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        ("p.jsonl", b'"a"\n', "line 1 is no JSON object"),
        ("p.txt", b"a cat\ncaf\xe9\n", "line 2 is not UTF-8"),
    ],
)
def test_a_prompt_file_that_cannot_be_read_is_refused_in_a_sentence(
    name: str, data: bytes | None, said: str, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said):
        list(read_prompts(str(tmp_path / name)))


def test_a_command_names_its_prompts_or_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["output=images", "model=runs/demo/model", "shard=2/8"]
    for first in ("my.txt", "s3://bucket/my.parquet", "prompts=my.csv"):
        config = generate_config([first, *words])
        assert config.prompts.endswith(first.removeprefix("prompts="))
        assert (config.output, config.model, config.split) == ("images", "runs/demo/model", (1, 8))
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "set")
    assert generate_config([str(tmp_path / "set"), *words]).prompts == str(tmp_path / "set")
    assert generate_config(["demo:generate", *words]).samples == 1
    (tmp_path / "my.txt").write_text("a\n")
    options = ["--out", str(tmp_path / "out"), "--model", str(tmp_path / "none"), "--shard", "1/2"]
    assert main(["generate", str(tmp_path / "my.txt"), *options]) == 2
    assert "none" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "my.txt")]) == 2
    said = capsys.readouterr().err
    assert "output" in said
    assert "model" in said


def test_prompts_come_from_a_saved_data_set(tmp_path: Path) -> None:
    rows = [{"prompt": f"a cat {number}", "seed": number} for number in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set", num_shards=2)
    read = list(read_prompts(str(tmp_path / "set")))
    assert [(one.index, one.prompt, one.asked.seed) for one in read] == [(n, f"a cat {n}", n) for n in range(5)]
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no data set as `Dataset\.save_to_disk` writes it"):
        list(read_prompts(str(tmp_path / "set")))


def write_many(path: Path, count: int) -> None:
    """Prompts of a kind of table."""
    said = [f"a star number {number}" for number in range(count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": said}), path, row_group_size=1000)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in said))
    else:
        path.write_text("\n".join([*(["prompt"] if path.suffix == ".csv" else []), *said]) + "\n")


def planned(config: GenerateConfig) -> tuple[int, int, int]:
    """Pictures by the survey and by the plan, and the most bytes that were held for it."""
    tracemalloc.start()
    try:
        pictures = survey(config).pictures
        wanted = sum(len(part) for _, part in plan_parts(read_prompts(config.prompts), config))
        return pictures, wanted, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.parquet"])
def test_ten_times_the_prompts_take_no_more_memory(name: str, drawn: GenerateConfig, tmp_path: Path) -> None:
    held = []
    for count in (1_000, 1_000, 10_000):  # the first reads also fill caches
        write_many(tmp_path / name, count)
        pictures, wanted, most = planned(changed(drawn, tmp_path / "none", prompts=str(tmp_path / name)))
        assert pictures == wanted == count * SAMPLES
        held.append(most)
    assert held[2] < held[1] + 2_000_000  # of which a store's own read-ahead is one


@pytest.mark.soak
def test_a_million_prompts_take_no_more_memory_than_a_thousand(drawn: GenerateConfig, tmp_path: Path) -> None:
    sizes = {}
    for count in (1_000, 1_000_000):
        write_many(tmp_path / "p.jsonl", count)
        config = changed(drawn, tmp_path / "none", prompts=str(tmp_path / "p.jsonl"))
        source = (
            "import sys\n"
            "from raymuse.config.generate import GenerateConfig\n"
            "from raymuse.stages.generate import plan_parts, survey\n"
            "from raymuse.storage.prompts import read_prompts\n"
            "config = GenerateConfig.model_validate_json(sys.stdin.read())\n"
            "wanted = sum(len(part) for _, part in plan_parts(read_prompts(config.prompts), config))\n"
            "pictures = survey(config).pictures\n"
            "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"  # its own, not its parent's
            "print(pictures, wanted, status['VmHWM'].split()[0])\n"
        )
        given = config.model_dump_json()
        done = subprocess.run([sys.executable, "-c", source], input=given, capture_output=True, text=True, check=True)
        pictures, wanted, sizes[count] = map(int, done.stdout.split())
        assert pictures == wanted == count * SAMPLES
    assert sizes[1_000_000] < sizes[1_000] + 20 * 1024  # KiB


def test_another_seed_or_model_on_the_same_output_is_refused(drawn: GenerateConfig, base_model: str) -> None:
    for change in ({"seed": 6}, {"model": base_model}):
        with pytest.raises(UserError, match="was made with another config"):
            generate(changed(drawn, Path(drawn.output), **change), Run.off())
