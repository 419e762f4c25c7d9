"""A training that encodes as it runs: the batches that token shards would give, on any number of workers."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from ray.cluster_utils import Cluster

import tiny
from processes import children_named, wait_until
from raymuse import masking
from raymuse.config.errors import UserError
from raymuse.config.load import from_values
from raymuse.config.training import BaseConfig, SuperresConfig
from raymuse.datasets import shapes
from raymuse.encoding.survey import Survey
from raymuse.stages.train import train
from raymuse.storage import checkpoint
from raymuse.storage.tar_scan import scan_tar
from raymuse.storage.webdataset_writer import write_shard
from raymuse.tracking.run import Run
from raymuse.training import order
from raymuse.training.alone import opened
from raymuse.training.build import build_engine, build_task
from raymuse.training.crops import CropPlan
from raymuse.training.evaluation import evaluation_of
from raymuse.training.order import share
from raymuse.training.streamed import here, piece_of
from raymuse.training.surveying import prepare
from raymuse.training.task import Batch, Task
from trainings import fit, losses_of

BATCH = 8


def write_wide(folder: Path) -> str:
    """48 pictures in three shards, wider than high, so that there are 13 places to cut them."""
    folder.mkdir(exist_ok=True)
    for number in range(3):
        drawn = shapes.samples(16, 0, 40, held_out=False, start=number * 16)
        rows = ((one.key, _widened(one.image), one.caption, {}) for one in drawn)
        write_shard(folder / f"{number:05d}.tar", rows)
    return str(folder)


def _widened(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.pad(np.asarray(image), ((0, 0), (0, 15), (0, 0)), "wrap"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_wide(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoders(pictures: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_encoders(tmp_path_factory.mktemp("encoders"), pictures)


def stream_of(pictures: str, encoders: str, **changes: Any) -> dict[str, Any]:
    encoding = {"vqgan": encoders, "text_encoder": encoders, "resolution": tiny.SIDE, "low_resolution": tiny.LOW_SIDE}
    return {"input": pictures, "chunk_size": 12, **encoding, **changes}


def config_of(root: Path, pictures: str, encoders: str, **changes: Any) -> BaseConfig:
    return tiny.base_config(root, "", ids="image_ids", stream=stream_of(pictures, encoders, **changes))


def batch_of(task: Task, step: int, rank: int = 0, world: int = 1) -> Batch:
    return task.batch(*share(step, BATCH, rank, world))


def flat(batch: Batch, name: str) -> NDArray[Any]:
    return batch[name].float().flatten(1).numpy()


@pytest.mark.parametrize(("crop", "text"), [("center", "states"), ("random", "ids")])
def test_batches_are_those_of_token_shards_of_the_same_crops(
    pictures: str, encoders: str, tmp_path: Path, crop: str, text: str
) -> None:
    """Ids, targets, masks, text and micro-conditions, with low-res noise, from one chunk into the next."""
    tokens = tiny.write_tokens(tmp_path / "tokens", pictures, encoders, crop=crop, text=text)
    stored = tiny.superres_config(tmp_path, tokens, text_encoder=encoders)
    stream = stream_of(pictures, encoders, crop=crop, text=text)
    config = SuperresConfig.model_validate({**stored.model_dump(), "input": "", "stream": stream})
    prepare(config)
    ours, theirs = build_task(config), build_task(stored)
    for step in range(6):  # an epoch
        mine, shards = batch_of(ours, step), batch_of(theirs, step)
        assert mine.keys() == shards.keys()
        for name in mine:
            assert mine[name].dtype == shards[name].dtype
            assert mine[name].equal(shards[name]), (step, name)
    positions = np.arange(20)
    assert ours.keys(positions) == theirs.keys(positions)


def test_losses_are_those_of_token_shards(pictures: str, encoders: str, tmp_path: Path) -> None:
    tokens = tiny.write_tokens(tmp_path / "tokens", pictures, encoders)
    changes = {"ids": "image_ids", "steps": 6, "log_every": 1}
    stored = tiny.base_config(tmp_path / "stored", tokens, **changes)
    stream = stream_of(pictures, encoders, crop="center")
    config = tiny.base_config(tmp_path / "streamed", "", stream=stream, **changes)
    prepare(config)
    assert losses_of(config, build_task(config)) == losses_of(stored, build_task(stored))


def test_held_out_shards_of_ids_are_read_by_the_same_encoder(pictures: str, encoders: str, tmp_path: Path) -> None:
    held = tiny.write_tokens(tmp_path / "held", pictures, encoders, text="ids")
    stream = stream_of(pictures, encoders, text="ids")
    values = {"ids": "image_ids", "stream": stream, "evaluation": {"input": held, "rows": 5}}
    config = tiny.base_config(tmp_path, "", **values)
    prepare(config)
    task = build_task(config)
    evaluation = evaluation_of(config, task, 4)
    assert evaluation is not None
    assert np.isfinite(evaluation.measure(build_engine(config, task), None)["eval_loss"])


def test_every_epoch_cuts_and_mirrors_anew(pictures: str, encoders: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, pictures, encoders, crop="random", flip=True)
    config = BaseConfig.model_validate({**config.model_dump(), "steps": 60})
    prepare(config)
    plan = CropPlan.of(config)
    places: dict[str, set[tuple[int, int, bool]]] = {}
    flips = []
    for number in plan.chunks(0, plan.positions):
        for facts in plan.chunk(number).facts:
            places.setdefault(facts.key, set()).add((facts.crop_top, facts.crop_left, facts.flip))
            flips.append(facts.flip)
    assert len(places) == 48
    assert min(len(found) for found in places.values()) >= 6, "of ten epochs"
    assert abs(np.mean(flips) - 0.5) < 3 * 0.5 / len(flips) ** 0.5
    again = CropPlan.of(config).chunk(7)
    assert all(np.array_equal(one, other) for one, other in zip(plan.chunk(7).pixels, again.pixels, strict=True))


@pytest.mark.parametrize("world", [3, 16])
def test_the_workers_rows_are_those_of_one(pictures: str, encoders: str, tmp_path: Path, world: int) -> None:
    """Also where the workers do not divide the batch, and where the batch does not divide the chunks."""
    config = config_of(tmp_path, pictures, encoders)
    prepare(config)
    plan = CropPlan.of(config)
    encoder = _encoder(plan)
    encoded = {number: encoder(plan.chunk(number)) for number in plan.chunks(0, plan.positions)}
    one = build_task(config)
    workers = [
        build_task(
            config,
            pieces=lambda first, stop, rank=rank: (
                piece_of(plan, number, encoded[number], rank, world) for number in plan.chunks(first, stop)
            ),
        )
        for rank in range(world)
    ]
    for step in range(config.steps):
        whole = batch_of(one, step)
        parts = [batch_of(task, step, rank, world) for rank, task in enumerate(workers)]
        for name in whole:
            joined = torch.cat([part[name][part["real"]] for part in parts])
            assert joined.equal(whole[name]), (step, name)


def _encoder(plan: CropPlan) -> Any:
    from raymuse.encoding.encoder import ChunkEncoder

    return ChunkEncoder(plan.stream)


def test_a_resume_encodes_again_less_than_a_chunk(pictures: str, encoders: str, tmp_path: Path) -> None:
    """Step 4 begins at position 32, within the chunk of positions 24 to 35."""
    config = config_of(tmp_path, pictures, encoders)
    prepare(config)
    straight, seen = build_task(config), []
    for step in range(4):
        batch_of(straight, step)

    def noted(first: int, stop: int) -> Any:
        for piece in here(CropPlan.of(config))(first, stop):
            seen.append(piece.number)
            yield piece

    resumed = build_task(config, pieces=noted)
    for step in range(4, 7):
        one, other = batch_of(straight, step), batch_of(resumed, step)
        assert all(one[name].equal(other[name]) for name in one)
    assert seen == [2, 3, 4]


def test_a_long_training_asks_for_one_stretch_after_the_other(
    pictures: str, encoders: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymuse.training.streamed.STRETCH", 2)  # 24 positions, 3 steps
    config = config_of(tmp_path, pictures, encoders)
    prepare(config)
    asked: list[tuple[int, int]] = []

    def noted(first: int, stop: int) -> Any:
        asked.append((first, stop))
        return here(CropPlan.of(config))(first, stop)

    cut = build_task(config, pieces=noted)
    monkeypatch.setattr("raymuse.training.streamed.STRETCH", 100)
    whole = build_task(config)
    for step in range(8):
        one, other = batch_of(cut, step), batch_of(whole, step)
        assert all(one[name].equal(other[name]) for name in one)
    assert asked == [(0, 24), (24, 48), (48, 72)]


def spoil(shard: Path, keys: list[str], part: float) -> None:
    """Overwrite the pictures of these keys from a part of their bytes on."""
    with shard.open("rb") as stream:
        samples = {sample.key: sample for sample in scan_tar(stream).samples}
    data = bytearray(shard.read_bytes())
    for key in keys:
        span = next(span for ending, span in samples[key].members.items() if ending != "txt" and ending != "json")
        begin = span.offset + int(span.size * part)
        data[begin : span.offset + span.size] = b"\0" * (span.offset + span.size - begin)
    shard.write_bytes(bytes(data))


def test_a_picture_that_breaks_leaves_its_place_empty_and_moves_nothing(encoders: str, tmp_path: Path) -> None:
    """One whose header is sound is only found out when it is decoded; it is written down once, not every epoch."""
    pictures = write_wide(tmp_path / "pictures")
    config = config_of(tmp_path, pictures, encoders)
    prepare(config)
    sound = [batch_of(task := build_task(config), 0), *(batch_of(task, step) for step in range(1, 12))]
    spoil(Path(pictures) / "00001.tar", ["000000020", "000000025"], 0.6)
    task = build_task(config)
    empty = []
    for step in range(12):
        batch = batch_of(task, step)
        keys = task.keys(np.arange(step * BATCH, (step + 1) * BATCH))
        broken = torch.tensor([key in ("000000020", "000000025") for key in keys])
        empty += [key for key, lost in zip(keys, broken, strict=True) if lost]
        assert batch["real"].equal(~broken)
        assert not batch["mask"][broken].any()
        assert all(batch[name][~broken].equal(sound[step][name][~broken]) for name in batch)
    assert sorted(empty) == ["000000020", "000000020", "000000025", "000000025"]
    lines = Path(config.output, "stream", "rejects.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["000000020", "000000025"]
    assert {json.loads(line)["source"] for line in lines} == {"00001.tar"}


def test_what_the_headers_tell_is_left_out_before_the_training(encoders: str, tmp_path: Path) -> None:
    pictures = tiny.write_shards(tmp_path / "pictures")
    spoil(Path(pictures) / "00000.tar", ["000000003"], 0)
    Path(pictures, "00002.tar").write_bytes(b"no tar")
    config = config_of(tmp_path, pictures, encoders, max_reject_fraction=0.1)
    prepare(config)
    survey = Survey(f"{config.output}/stream")
    assert survey.sizes == [15, 16]
    assert survey.rejects == {"shard_unreadable": 1, "undecodable": 1}
    task = build_task(config)
    assert all(batch_of(task, step)["real"].all() for step in range(8))
    strict = config_of(tmp_path / "strict", pictures, encoders, max_reject_fraction=0.01)
    with pytest.raises(UserError, match=r"2 of 33 pictures of .* are faulty .*stream/rejects\.parquet"):
        prepare(strict)


def test_a_filter_is_no_fault_and_leaves_no_place(pictures: str, encoders: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no picture of .* can be used \(48 too_small\)"):
        prepare(config_of(tmp_path, pictures, encoders, filters={"min_side": 41}))


def test_pictures_that_cannot_be_read_one_by_one_are_refused(pictures: str, encoders: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    png = io.BytesIO()
    Image.new("RGB", (40, 40)).save(png, "PNG")
    pq.write_table(pa.table({"image": [png.getvalue()], "caption": ["a square"]}), tmp_path / "pictures.parquet")
    with pytest.raises(UserError, match="Turn it into tars first"):
        prepare(config_of(tmp_path, str(tmp_path / "pictures.parquet"), encoders))


def test_another_survey_on_the_same_output_is_refused(pictures: str, encoders: str, tmp_path: Path) -> None:
    opened(config_of(tmp_path, pictures, encoders)).release()
    made = Path(tmp_path, "base", "stream", "survey.json").stat().st_mtime_ns
    opened(config_of(tmp_path, pictures, encoders, decoders=3, min_encoders=1)).release()
    assert Path(tmp_path, "base", "stream", "survey.json").stat().st_mtime_ns == made
    with pytest.raises(UserError, match="stream"):
        opened(config_of(tmp_path, pictures, encoders, flip=True))


def test_a_config_without_data_says_what_to_give() -> None:
    values = {"output": "out", "steps": 3}
    with pytest.raises(UserError, match=r"input: missing \(token shards\)"):
        from_values("train-base", values)
    with pytest.raises(UserError, match="name the token shards, or give `stream`"):
        from_values("train-base", {**values, "input": ""})


def test_decoders_need_no_torch() -> None:
    assert order.ORDER == masking.ORDER
    code = "import sys, raymuse.training.crops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


# --- on Ray


STEPS, EVERY = 12, 2


@pytest.fixture(scope="module")
def killed(
    ray_cluster: Cluster, pictures: str, encoders: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BaseConfig, BaseConfig]:
    """The training with one worker, in this process; and with two of Ray Train's, one of which is killed."""
    root = tmp_path_factory.mktemp("streaming")
    kept = {"every": EVERY, "keep": STEPS}
    options = {"ids": "image_ids", "steps": STEPS, "checkpoint": kept, "max_failures": 1, "ema_decay": 0.9}
    stream = stream_of(pictures, encoders, flip=True)
    alone = tiny.base_config(root / "alone", "", stream=stream, **options)
    prepare(alone)
    fit(alone)
    config = tiny.base_config(root / "killed", "", stream=stream, **{**options, "workers": 2})
    deeds: list[str] = []

    def storm() -> None:
        wait_until(lambda: len(list(Path(config.output).glob("step-*/checkpoint.json"))) > 0, 300)
        children_named("RayTrainWorker")[-1].kill()
        deeds.append("killed")

    thread = threading.Thread(target=storm, daemon=True)
    thread.start()
    train(config, Run.off())
    thread.join()
    assert deeds == ["killed"]
    return alone, config


def test_two_workers_of_which_one_is_killed_have_the_losses_of_one(killed: tuple[BaseConfig, BaseConfig]) -> None:
    losses: list[list[float]] = []
    for config in killed:
        found = [checkpoint.read(checkpoint.folder_of(Path(config.output), step))[0] for step in range(2, 13, EVERY)]
        losses.append([one.state["loss"] for one in found if one is not None])
    assert len(losses[0]) == STEPS // EVERY
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_it_went_on_from_its_checkpoint(killed: tuple[BaseConfig, BaseConfig]) -> None:
    lines = Path(killed[1].output, "progress.log").read_text().splitlines()
    assert len([line for line in lines if line.startswith("going on from step")]) == 1


def test_its_encoders_ended_with_it(killed: tuple[BaseConfig, BaseConfig]) -> None:
    wait_until(lambda: not children_named("_EncodePieces") and not children_named("SplitCoordinator"), 300)
