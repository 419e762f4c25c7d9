"""Captioned pictures from any source to image shards: nothing lost, nothing held out that is trained on."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from raymuse.config.data import DataConfig
from raymuse.config.errors import UserError
from raymuse.datasets.scenes import is_held_out, parse
from raymuse.stages.data import make_data
from raymuse.storage.images import Picture, list_shards, read_shard
from raymuse.storage.webdataset_writer import encode
from raymuse.tracking.run import Run

pytestmark = pytest.mark.usefixtures("ray_cluster")


def made(output: Path, **changes: object) -> Path:
    values: dict[str, object] = {"train": 20, "test": 5, "pictures_per_shard": 8, "resolution": 32}
    return Path(make_data(DataConfig.model_validate({"output": str(output), **values, **changes}), Run.off()))


def pictures(address: Path) -> list[Picture]:
    rows = [row for shard in list_shards(str(address)) for row in read_shard(shard)]
    assert all(isinstance(row, Picture) for row in rows)
    return [row for row in rows if isinstance(row, Picture)]


def tars(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def prompts(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def test_webdataset_reads_the_shards_as_our_own_reader_does(tmp_path: Path) -> None:
    folder = made(tmp_path / "data")
    ours = pictures(folder / "train")
    files = [str(path) for path in sorted((folder / "train").glob("*.tar"))]
    theirs = list(webdataset.WebDataset(files, shardshuffle=False))
    assert len(files) == 3
    assert [row.key for row in ours] == [row["__key__"] for row in theirs]
    assert [row.data for row in ours] == [row["png"] for row in theirs]
    assert [row.captions[0] for row in ours] == [row["txt"].decode() for row in theirs]
    assert [json.loads(row["json"])["caption"] for row in theirs] == [row.captions[0] for row in ours]
    assert Image.open(io.BytesIO(ours[0].data)).size == (32, 32)


def test_the_shards_have_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    one, three = made(tmp_path / "one", workers=1), made(tmp_path / "three", workers=3)
    assert tars(one) == tars(three)
    assert len(tars(one)) == 4


def test_no_held_out_scene_is_ever_trained(shards: str) -> None:
    trained = {row.captions[0] for row in pictures(Path(shards) / "train")}
    tested = [row.captions[0] for row in pictures(Path(shards) / "test")]
    assert not any(is_held_out(parse(caption)) for caption in trained)
    assert all(is_held_out(parse(caption)) for caption in tested)
    assert [row["prompt"] for row in prompts(Path(shards))] == tested
    assert len(tested) == 8


def write_folder(folder: Path, count: int) -> dict[bytes, str]:
    """Pictures in three formats, captions in .txt; every file's bytes with its caption."""
    said = {}
    for number in range(count):
        kind = ("png", "jpg", "webp")[number % 3]
        image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8))
        path = folder / f"{'deep/' if number % 2 else ''}{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, kind))
        path.with_suffix(".txt").write_text(f"picture number {number}")
        said[path.read_bytes()] = f"picture number {number}"
    return said


def test_a_folder_of_mixed_formats_is_split_without_loss(tmp_path: Path) -> None:
    said = write_folder(tmp_path / "mine", 30)
    folder = made(tmp_path / "data", source=str(tmp_path / "mine"), train=1000, test=1000)
    train, test = pictures(folder / "train"), pictures(folder / "test")
    assert (len(train), len(test)) == (27, 3)  # at most a tenth is held out
    assert {row.data: row.captions[0] for row in [*train, *test]} == said
    names = {name for row in webdataset.WebDataset(str(folder / "train/00000.tar"), shardshuffle=False) for name in row}
    assert {"png", "jpg", "webp"} <= names
    assert [row["prompt"] for row in prompts(folder)] == [row.captions[0] for row in test]


def test_a_parquet_file_is_split_without_loss(tmp_path: Path) -> None:
    said = write_folder(tmp_path / "mine", 30)
    table = pa.table({"image": list(said), "caption": list(said.values())})
    pq.write_table(table, tmp_path / "mine.parquet", row_group_size=4)
    folder = made(tmp_path / "data", source=str(tmp_path / "mine.parquet"), train=1000, test=1000)
    train, test = pictures(folder / "train"), pictures(folder / "test")
    assert (len(train), len(test)) == (27, 3)
    assert {row.data: row.captions[0] for row in [*train, *test]} == said
    assert [row["prompt"] for row in prompts(folder)] == [row.captions[0] for row in test]


def test_file_names_are_captions_where_there_are_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a_plan.svg").write_text("<svg/>")
    for name in ("a_red_boat", "a_grey_cat", "two_dogs"):
        (tmp_path / f"{name}.png").write_bytes(encode(Image.new("RGB", (16, 16))))
    folder = made(tmp_path / "data", source=str(tmp_path))
    captions = [row.captions[0] for part in ("train", "test") for row in pictures(folder / part)]
    assert sorted(captions) == ["a grey cat", "a red boat", "two dogs"]
    assert f"left out of {tmp_path} beside 3 usable pictures: 1 unsupported_format" in capsys.readouterr().out


def test_a_lost_record_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    folder = made(tmp_path / "data")
    before = tars(folder)
    (folder / "_SUCCESS").unlink()
    (folder / "_manifest/train-00001.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar") if path.name != "00001.tar"}
    (folder / "train/00001.tar").write_bytes(b"half of it")
    made(tmp_path / "data")
    assert tars(folder) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((folder / "_SUCCESS").read_text())["rows"] == 25


def test_another_config_on_the_same_output_is_refused_by_name(tmp_path: Path) -> None:
    made(tmp_path / "data")
    with pytest.raises(UserError, match=r"seed was 0 and is now 1.*another output folder"):
        made(tmp_path / "data", seed=1)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "no such file or folder"),
        ([], "is empty"),
        (["notes.md"], r"none is a \.tar or a picture"),
        (["one.png"], "training and testing need at least 2"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_before_anything_is_written(
    files: list[str] | None, said: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if files is not None:
        source.mkdir()
        for name in files:
            (source / name).write_bytes(encode(Image.new("RGB", (16, 16))) if name.endswith("png") else b"x")
    with pytest.raises(UserError, match=said):
        made(tmp_path / "data", source=str(source))
    assert not (tmp_path / "data").exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        made(tmp_path / "file" / "data")
