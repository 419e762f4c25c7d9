"""Image shards to token shards on a real cluster: every row accounted for, every byte repeated, whatever was killed."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from processes import PRETOKENIZE, alive, wait_until
from raymuse.clusters.guard import marked
from raymuse.config.errors import TooManyRejects, UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.pictures import crop, decode, downscale
from raymuse.encoding.plan import plan_text
from raymuse.models.text import TextEncoder
from raymuse.models.vqgan import Vqgan
from raymuse.stages.pretokenize import pretokenize
from raymuse.storage.images import Picture, list_shards, read_shard
from raymuse.storage.manifest import read_finished
from raymuse.storage.tokens import EMPTY, TokenStore
from raymuse.storage.webdataset_writer import encode, write_shard, write_tar
from raymuse.tracking.run import Run

pytestmark = pytest.mark.usefixtures("ray_cluster")


def sums(folder: str | Path) -> dict[str, str]:
    """sha256 of every file of every part."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("tokens", "captions", "rejects")
        for path in sorted(Path(folder, name).glob("*"))
    }


def changed(config: PretokenizeConfig, **changes: object) -> PretokenizeConfig:
    return PretokenizeConfig.model_validate({**config.model_dump(), **changes})


# --- what the parts hold


def test_ids_are_what_a_plain_loop_over_the_crops_gives(tokens: str, token_config: PretokenizeConfig) -> None:
    vqgan, size = Vqgan.load(token_config.vqgan), token_config.chunk_size
    store = TokenStore(tokens)
    seen = set()
    for number, shard in enumerate(list_shards(token_config.input)):
        rows = [row for row in read_shard(shard) if isinstance(row, Picture)]
        crops = np.stack([crop(decode(row.data), 64).pixels for row in rows])
        twins = np.stack([downscale(pixels, 32) for pixels in crops])
        ids, low = (
            np.concatenate([vqgan.encode(pixels[start : start + size]) for start in range(0, len(rows), size)])
            for pixels in (crops, twins)
        )
        part = store.part(f"part-{number:06d}")
        np.testing.assert_array_equal(part.image_ids, ids)
        np.testing.assert_array_equal(part.low_ids, low)
        assert pq.read_table(f"{tokens}/tokens/part-{number:06d}.parquet")["key"].to_pylist() == [r.key for r in rows]
        seen |= set(ids.flatten().tolist())
    assert (store.grid("image_ids"), store.grid("low_ids")) == ((16, 16), (8, 8))
    assert len(seen) > 5, "a VQGAN that says the same of everything would prove nothing"


def test_states_are_what_the_text_encoder_says(tokens: str, token_config: PretokenizeConfig) -> None:
    text = TextEncoder.load(token_config.text_encoder)
    for name in (EMPTY, "part-000003"):
        table = pq.read_table(f"{tokens}/captions/{name}.parquet")
        states, pooled = text(table["caption"].to_pylist())
        stored = np.stack(table["text_states"].to_numpy()).reshape(states.shape)
        assert torch.allclose(torch.from_numpy(stored).float(), states, atol=2e-3)
        assert torch.allclose(torch.from_numpy(np.stack(table["pooled"].to_numpy())).float(), pooled, atol=2e-3)
        assert torch.equal(
            torch.from_numpy(np.stack(table["text_ids"].to_numpy())),
            text.tokenize(table["caption"].to_pylist())[0].int(),
        )


# --- rows that cannot be used


def bomb() -> bytes:
    """A PNG whose header promises 30,000 x 30,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + encode(picture(0))[33:]
    )


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def write_mixed(folder: Path) -> dict[str, str]:
    """A tar of good and bad rows, and one of its first two again; the reason to refuse each bad one, by its key."""
    members: list[tuple[str, bytes]] = []
    for number in range(10):
        members += [(f"g{number}.png", encode(picture(number))), (f"g{number}.txt", b"a good picture %d" % number)]
        if number == 1:
            jpeg = encode(picture(50), "jpg")
            members += [("cut.jpg", jpeg[: len(jpeg) // 2]), ("cut.txt", b"half a picture")]
        if number == 3:
            members += [("silent.png", encode(picture(51)))]
        if number == 4:
            members += [("bomb.png", bomb()), ("bomb.txt", b"a bomb")]
        if number == 7:
            members += [("latin.png", encode(picture(52))), ("latin.txt", "caf\xe9".encode("latin-1"))]
    folder.mkdir()
    write_tar(folder / "00000.tar", members)
    write_tar(folder / "00001.tar", members[:4])
    return {"cut": "truncated", "silent": "no_caption", "bomb": "too_large", "latin": "bad_caption_encoding"}


def test_every_row_is_in_a_part_or_in_rejects(token_config: PretokenizeConfig, tmp_path: Path) -> None:
    reasons = write_mixed(tmp_path / "in")
    places = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    config = changed(token_config, **places, text="ids", duplicates="drop")
    with pytest.raises(TooManyRejects, match=r"4 of 16 inputs were rejected \(25.0%\).*All the others are done"):
        pretokenize(config, Run.off())
    rejects = pq.read_table(tmp_path / "out/rejects/part-000000.parquet").to_pylist()
    assert {row["key"]: row["reason"] for row in rejects} == reasons
    assert {row["source"] for row in rejects} == {"00000.tar"}
    kept = pq.read_table(tmp_path / "out/tokens/part-000000.parquet")
    assert kept["key"].to_pylist() == [f"g{number}" for number in range(10)]
    records = read_finished(config.output, "pretokenize")
    assert [(record.rows, record.rejects) for record in records.values() if record.source] == [(10, 4), (0, 2)]
    again = pq.read_table(tmp_path / "out/rejects/part-000001.parquet").to_pylist()  # dropped, and no fault
    assert {row["key"]: row["reason"] for row in again} == {"g0": "duplicate_picture", "g1": "duplicate_picture"}
    assert not (tmp_path / "out/_chunks").exists()
    assert not (tmp_path / "out/_hashes").exists()

    allowed = changed(config, max_reject_fraction=0.3)  # says where to stop, and not what comes out
    assert pretokenize(allowed, Run.off()) == config.output
    assert_text_ids_without_states(config)


def assert_text_ids_without_states(config: PretokenizeConfig) -> None:
    store = TokenStore(config.output)
    table = pq.read_table(f"{config.output}/captions/part-000000.parquet")
    ids = TextEncoder.load(config.text_encoder).tokenize(table["caption"].to_pylist())[0]
    assert not store.has_states
    assert table.column_names == ["caption_id", "caption", "text_ids", "text_mask"]
    np.testing.assert_array_equal(np.stack(table["text_ids"].to_numpy()), ids.numpy())


# --- what the config asks for


def write_pictures(folder: Path, pictures: dict[str, tuple[Image.Image, str, dict[str, object]]]) -> str:
    """One tar of named pictures with captions and metadata."""
    folder.mkdir(parents=True)
    write_shard(folder / "00000.tar", ((key, *sample) for key, sample in pictures.items()))
    return str(folder)


def test_every_picture_goes_into_the_bucket_of_its_shape(token_config: PretokenizeConfig, tmp_path: Path) -> None:
    sizes = {"a": (64, 64), "b": (120, 60), "c": (60, 110), "d": (70, 64), "e": (200, 90), "f": (64, 60)}
    drawn = {
        key: (Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)), key, {})
        for key, (width, height) in sizes.items()
    }
    config = changed(
        token_config,
        input=write_pictures(tmp_path / "in", drawn),
        output=str(tmp_path / "out"),
        buckets=["64x64", "48x96", "96x48"],
        chunk_size=2,
        flip=True,
    )
    pretokenize(config, Run.off())
    files = {path.stem: pq.read_table(path) for path in sorted((tmp_path / "out/tokens").glob("*"))}
    assert {name: table["key"].to_pylist() for name, table in files.items()} == {
        "part-000000-48x96": ["b", "b", "e", "e"],
        "part-000000-64x64": ["a", "a", "d", "d", "f", "f"],
        "part-000000-96x48": ["c", "c"],
    }
    grids = {name: (table["height"][0].as_py(), table["width"][0].as_py()) for name, table in files.items()}
    assert grids == {"part-000000-48x96": (12, 24), "part-000000-64x64": (16, 16), "part-000000-96x48": (24, 12)}
    assert files["part-000000-48x96"]["low_height"][0].as_py() == 6
    (record,) = [record for record in read_finished(config.output, "pretokenize").values() if record.source]
    assert (record.rows, record.counts["pictures"], record.counts["captions"]) == (12, 6, 6)
    with pytest.raises(UserError, match=r"crops of several shapes \(buckets\)"):
        TokenStore(config.output)


def test_of_several_sources_a_shard_that_cannot_be_read_is_a_fault_and_what_filters_leave_out_is_none(
    token_config: PretokenizeConfig, tmp_path: Path
) -> None:
    scores = {"fine": 6.5, "dull": 3.0, "silent": None}
    drawn = {
        key: (picture(number), key, {} if score is None else {"aesthetic": score})
        for number, (key, score) in enumerate(scores.items())
    }
    tars, loose = write_pictures(tmp_path / "tars", drawn), tmp_path / "loose"
    Path(tars, "00001.tar").write_bytes(b"this is no tar")
    loose.mkdir()
    for name, number in (("again", 0), ("better", 9)):
        picture(number).save(loose / f"{name}.png")
        (loose / f"{name}.json").write_text(f'{{"caption": "{name}", "aesthetic": 7}}')
    config = changed(
        token_config,
        input=[tars, str(loose)],
        output=str(tmp_path / "out"),
        filters={"min_aesthetic": 5.0, "unknown": "drop"},
        duplicates="count",
        precision="bf16",
        max_reject_fraction=0.0,
    )
    with pytest.raises(TooManyRejects, match="1 of 3 inputs were rejected"):  # of the shards: it may have held many
        pretokenize(config, Run.off())
    kept = pq.read_table(tmp_path / "out/tokens")
    assert list(zip(kept["source"].to_pylist(), kept["key"].to_pylist(), strict=True)) == [
        ("0/00000.tar", "fine"),
        ("1/pictures-000000", "again"),
        ("1/pictures-000000", "better"),
    ]
    rejects = pq.read_table(tmp_path / "out/rejects").to_pylist()
    reasons = {"": "shard_unreadable", "dull": "low_aesthetic", "silent": "filtered_unknown"}
    assert {row["key"]: row["reason"] for row in rejects} == reasons
    (found,) = pq.read_table(tmp_path / "out/duplicates.parquet").to_pylist()
    assert (found["part"], found["key"], found["reason"]) == ("part-000002", "again", "duplicate_picture")
    assert "fine" in found["detail"]
    assert "00000.tar" in found["detail"]
    summary = json.loads((tmp_path / "out/_SUCCESS").read_text())
    assert 0.5 < summary["code_agreement"] <= 1
    counts = summary["counts"]
    assert counts["rejects/low_aesthetic"] == counts["rejects/filtered_unknown"] == 1
    assert counts["pictures"] == 3

    picture(10).save(loose / "added.png")
    (loose / "added.txt").write_text("added")
    with pytest.raises(UserError, match=r"made with another config: shards was '\w{16}' and is now '\w{16}'"):
        pretokenize(config, Run.off())


def test_what_workers_would_not_see_is_refused(token_config: PretokenizeConfig) -> None:
    with pytest.raises(UserError, match="memory://tokens is in the memory of one process"):
        pretokenize(changed(token_config, output="memory://tokens"), Run.off())
    with pytest.raises(UserError, match="tokens is a relative path, and the cluster has several machines"):
        pretokenize(changed(token_config, output="tokens"), Run.off())


def test_the_plan_says_rows_bytes_time_and_cost(token_config: PretokenizeConfig, tmp_path: Path) -> None:
    config = changed(token_config, output=str(tmp_path / "out"), crops_per_picture=2, price_per_hour=3.5)
    text = plan_text(config)
    assert "12 parts, one a shard: 00000.tar ... 00011.tar" in text
    assert "about 99 pictures, 198 crops" in text  # 96: the first tar of 12 is counted, and is a little small
    assert "time about" in text
    assert "cost about" in text
    assert not (tmp_path / "out").exists()


def test_crops_that_do_not_fit_the_vqgan_are_refused_before_anything_is_written(
    token_config: PretokenizeConfig, tmp_path: Path
) -> None:
    config = changed(token_config, output=str(tmp_path / "out"), resolution=66, low_resolution=None)
    with pytest.raises(UserError, match=r"crop of 66 x 66 pixels is no multiple of the VQGAN's factor 4"):
        pretokenize(config, Run.off())
    assert not (tmp_path / "out").exists()


# --- the same bytes, again and again


def test_a_second_run_does_nothing_and_is_quick(tokens: str, token_config: PretokenizeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(tokens).rglob("*.parquet")}
    began = time.perf_counter()
    pretokenize(token_config, Run.off())
    assert time.perf_counter() - began < 3
    assert {path: path.stat().st_mtime_ns for path in Path(tokens).rglob("*.parquet")} == before


def test_other_vqgan_weights_on_the_same_output_are_refused(
    tokens: str, token_config: PretokenizeConfig, tmp_path: Path
) -> None:
    before = sums(tokens)
    other = shutil.copytree(token_config.vqgan, tmp_path / "vqgan")
    (file,) = other.rglob("*.safetensors")
    weights = load_file(file)
    weights["quantize.embedding.weight"] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"made with another config: vqgan_sha256 was '\w{64}' and is now '\w{64}'"):
        pretokenize(changed(token_config, vqgan=str(other)), Run.off())
    assert sums(tokens) == before


@pytest.fixture
def own_ray() -> Iterator[tuple[dict[str, str], Path]]:
    """The environment of a process that starts a Ray of its own, and the folder that will hold it."""
    folder = Path(tempfile.mkdtemp(prefix="rk-", dir="/tmp"))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield outside | {"TMPDIR": str(folder)}, folder
    for ray in folder.glob("raymuse-*"):
        for process in marked(ray):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_run_killed_with_two_encoders_and_resumed_with_four_writes_the_bytes_of_an_undisturbed_one_with_one(
    tokens: str, token_config: PretokenizeConfig, own_ray: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    config = changed(token_config, output=str(tmp_path), encoders=2)
    environment, folder = own_ray
    driver = subprocess.Popen(
        [sys.executable, "-c", PRETOKENIZE, config.model_dump_json()], env=environment, stdout=subprocess.DEVNULL
    )

    def committed() -> int:
        return len(list((tmp_path / "_manifest").glob("part-*.json")))

    wait_until(lambda: committed() or driver.poll() is not None, 300)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    done = committed()
    assert 0 < done < 12
    (ray,) = folder.glob("raymuse-*")
    wait_until(lambda: not alive(marked(ray)), 30)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "_manifest").glob("part-*.json")}
    pretokenize(changed(config, encoders=4, min_encoders=1, decoders=3), Run.off())  # they come as work waits
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was committed was done again"
    assert sums(tmp_path) == sums(tokens)
    assert len(sums(tokens)) == 12 + 12 + 1  # a table of tokens and one of captions a shard, and the empty caption
