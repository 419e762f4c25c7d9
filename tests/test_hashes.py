"""Duplicates: what the hashes tell apart, and the search against the plain definition."""

import io
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from raymuse.config.pretokenize import FilterConfig, PretokenizeConfig
from raymuse.encoding.chunks import decode_chunks
from raymuse.encoding.hashes import HASHES_SCHEMA, find_duplicates, hash_shard, perceptual_hash, pixel_hash
from raymuse.storage.images import list_shards
from raymuse.storage.rejects import Reason, Reject
from raymuse.storage.webdataset_writer import write_tar

Found = dict[str, dict[str, Reject]]


def scene(number: int, side: int = 192) -> Image.Image:
    """A picture with structure at several scales: no two numbers look alike."""
    rng = np.random.default_rng(number)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            ),
            dtype=np.float64,
        )
        for cells in (3, 6, 12, 48)
    ]
    return Image.fromarray(np.average(layers, axis=0, weights=(4, 3, 2, 1)).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def reopened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def apart(one: Image.Image, other: Image.Image) -> int:
    first, second = perceptual_hash(one), perceptual_hash(other)
    assert first is not None
    assert second is not None
    return (first ^ second).bit_count()


def table(exact: Sequence[int], near: Sequence[int | None], start: int = 0) -> pa.Table:
    keys = [f"k{start + row}" for row in range(len(exact))]
    return pa.Table.from_arrays(
        [
            pa.array(keys),
            pa.array([value.to_bytes(16, "big") for value in exact], pa.binary(16)),
            pa.array(near, pa.uint64()),
        ],
        schema=HASHES_SCHEMA,
    )


def by_key(found: Found) -> dict[str, tuple[Reason, str]]:
    return {key: (reject.reason, reject.detail) for keys in found.values() for key, reject in keys.items()}


# --- the hashes


def test_the_pixel_hash_is_of_size_and_pixels() -> None:
    image = scene(0)
    assert pixel_hash(image) == pixel_hash(reopened(png(image)))
    assert len(pixel_hash(image)) == 16
    changed = image.copy()
    changed.putpixel((7, 9), tuple(value ^ 1 for value in image.getpixel((7, 9))))  # type: ignore[union-attr]
    shapes = [Image.frombytes("RGB", size, bytes(12)) for size in ((4, 1), (2, 2), (1, 4))]
    assert len({pixel_hash(one) for one in (image, changed, *shapes)}) == 5


def test_the_perceptual_hash_is_its_definition() -> None:
    for number in range(5):
        image = scene(number)
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
        n = np.arange(32)
        waves = np.array([np.cos(np.pi * (2 * n + 1) * k / 64) for k in range(8)])
        low = (waves @ grey @ waves.T) * np.outer(*[np.where(np.arange(8) == 0, math.sqrt(0.5), 1.0)] * 2) / 16
        expected = int("".join("01"[int(value > np.median(low.ravel()[1:]))] for value in low.ravel()), 2)
        assert perceptual_hash(image) == expected


@pytest.mark.parametrize("number", range(8))
def test_a_changed_copy_is_near_and_not_the_same(number: int) -> None:
    image = scene(number)
    copies = {
        "JPEG 90": reopened(jpeg(image, 90)),
        "JPEG 40": reopened(jpeg(image, 40)),
        "half size": image.resize((96, 96), Image.Resampling.BILINEAR),
        "brighter": ImageEnhance.Brightness(image).enhance(1.1),
        "less contrast": ImageEnhance.Contrast(image).enhance(0.8),
        "grey": image.convert("L").convert("RGB"),
    }
    for name, copy in copies.items():
        assert apart(image, copy) <= 4, name
        assert pixel_hash(copy) != pixel_hash(image), name


def test_different_pictures_are_far_apart() -> None:
    pictures = [scene(number) for number in range(40)]
    least = min(apart(a, b) for row, a in enumerate(pictures) for b in pictures[:row])
    assert least > 10
    assert apart(pictures[0], pictures[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 10


def test_nearly_flat_pictures_have_no_perceptual_hash() -> None:
    rng = np.random.default_rng(0)
    flats = [Image.new("RGB", (64, 48), (value, value, value)) for value in (0, 7, 128, 255)]
    noisy = [Image.fromarray(rng.integers(120, 136, (64, 64, 3), dtype=np.uint8)) for _ in range(5)]
    for image in (*flats, *noisy, Image.new("RGB", (1, 1), "red")):
        assert perceptual_hash(image) is None
    ramp = np.tile(np.linspace(100, 140, 64).astype(np.uint8)[None, :, None], (64, 1, 3))
    assert perceptual_hash(Image.fromarray(ramp)) is not None


# --- the search


def plain(hashes: NDArray[np.uint64], bits: int) -> dict[int, int]:
    """Row -> the first kept row within `bits`, one row after the other."""
    kept = np.zeros(len(hashes), dtype=np.int64)
    values = np.zeros(len(hashes), dtype=np.uint64)
    count = 0
    found: dict[int, int] = {}
    for row, value in enumerate(hashes):
        near = np.bitwise_count(values[:count] ^ value) <= bits
        if near.any():
            found[row] = int(kept[near.argmax()])
        else:
            kept[count], values[count] = row, value
            count += 1
    return found


def clustered(count: int, seed: int = 0) -> NDArray[np.uint64]:
    """Clusters, chains of small steps, repeated values and strangers, mixed."""
    rng = np.random.default_rng(seed)

    def flipped(value: int, flips: int) -> int:
        for place in rng.choice(64, flips, replace=False).tolist():
            value ^= 1 << place
        return value

    centres = [int(value) for value in rng.integers(0, 1 << 63, count // 20)]
    values = [flipped(centre, int(rng.integers(0, 10))) for centre in centres for _ in range(10)]
    for _ in range(count // 200):
        link = int(rng.integers(0, 1 << 63))
        for _ in range(40):
            values.append(link := flipped(link, int(rng.integers(1, 5))))
    ball = int(rng.integers(0, 1 << 63))
    values += [flipped(ball, int(rng.integers(0, 4))) for _ in range(count // 10)]
    values += [int(value) for value in rng.integers(0, 1 << 63, count - len(values))]
    shuffled = np.array(values, dtype=np.uint64)
    rng.shuffle(shuffled)
    return shuffled


@pytest.mark.parametrize("bits", [0, 1, 3, 4, 7, 16])
def test_near_duplicates_are_those_of_the_definition(bits: int) -> None:
    hashes = clustered(10_000)
    expected = plain(hashes, bits)
    found = by_key(find_duplicates([("p", "s", table(range(len(hashes)), hashes.tolist()))], bits))
    assert len(expected) > 100
    assert set(found) == {f"k{row}" for row in expected}
    for row, first in expected.items():
        apart = (int(hashes[row]) ^ int(hashes[first])).bit_count()
        detail = f"its perceptual hash differs in {apart} of 64 bits from k{first} of s"
        assert found[f"k{row}"] == (Reason.NEAR_DUPLICATE, detail)


def test_the_same_pixels_and_what_is_kept() -> None:
    one = table([1, 2, 1, 3], [10, 20, 10, None])
    two = table([2, 4, 3, 5], [20, 11, None, None], start=4)
    found = find_duplicates([("part-0", "a.tar", one), ("part-1", "b.tar", two)], bits=None)
    assert found == {
        "part-0": {"k2": Reject("a.tar", "k2", Reason.DUPLICATE_PICTURE, "the same pixels as k0 of a.tar")},
        "part-1": {
            "k4": Reject("b.tar", "k4", Reason.DUPLICATE_PICTURE, "the same pixels as k1 of a.tar"),
            "k6": Reject("b.tar", "k6", Reason.DUPLICATE_PICTURE, "the same pixels as k3 of a.tar"),
        },
    }
    found = find_duplicates([("part-0", "a.tar", one), ("part-1", "b.tar", two)], bits=1)
    detail = "its perceptual hash differs in 1 of 64 bits from k0 of a.tar"
    assert found["part-1"]["k5"] == Reject("b.tar", "k5", Reason.NEAR_DUPLICATE, detail)
    assert "k7" not in found["part-1"]  # k3, k6 and k7 are flat
    assert find_duplicates([], 4) == find_duplicates([("p", "s", table([], []))], 4) == {}


def test_how_rows_are_cut_into_tables_makes_no_difference() -> None:
    hashes = clustered(6000, seed=1)
    rng = np.random.default_rng(2)
    exact = rng.integers(0, 5500, len(hashes)).tolist()
    near = [None if row % 7 == 0 else int(value) for row, value in enumerate(hashes)]
    whole = by_key(find_duplicates([("p", "s", table(exact, near))], 4))
    assert {reason for reason, _ in whole.values()} == {Reason.DUPLICATE_PICTURE, Reason.NEAR_DUPLICATE}
    for pieces in (2, 7, 300):
        edges = [0, *sorted(rng.integers(0, len(hashes), pieces - 1).tolist()), len(hashes)]
        cut = [
            (f"p{piece}", "s", table(exact[low:high], near[low:high], start=low))
            for piece, (low, high) in enumerate(pairwise(edges))
        ]
        assert by_key(find_duplicates(cut, 4)) == whole


def test_thousands_of_like_pictures_cost_no_square() -> None:
    count = 50_000
    rng = np.random.default_rng(0)
    same = [1 << 63] * count  # a square of these would be 2.5e9 pairs
    flat: list[int | None] = [None] * count
    began = time.process_time()
    assert len(by_key(find_duplicates([("p", "s", table(range(count), same))], 4))) == count - 1
    assert find_duplicates([("p", "s", table(range(count), flat))], 4) == {}
    ball = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 24, (20_000, 2)).astype(np.uint64), axis=1)
    assert len(by_key(find_duplicates([("p", "s", table(range(20_000), ball.tolist()))], 4))) == 19_999
    assert time.process_time() - began < 20


# --- a shard's hashes


def members(pictures: dict[str, tuple[bytes, str]]) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.{ending}", data)
        for key, (picture, fields) in pictures.items()
        for ending, data in (("png", picture), ("txt", key.encode()), ("json", fields.encode()))
    ]


def config(**changes: object) -> PretokenizeConfig:
    values: dict[str, object] = {"resolution": 16, "chunk_size": 4, "duplicates": "drop", "near_duplicates": 4}
    return PretokenizeConfig.model_validate(
        {"input": "in", "output": "out", "vqgan": "v", "text_encoder": "t", **values, **changes}
    )


def test_a_shard_is_hashed_and_its_duplicates_dropped(tmp_path: Path) -> None:
    image = scene(1)
    first = {
        "refused": (png(image), '{"aesthetic": 1}'),  # filtered: must not stand for the others
        "broken": (png(image)[:-1000], "{}"),
        "kept": (png(image), "{}"),
        "again": (png(image), "{}"),
    }
    second = {"other": (png(scene(2)), "{}"), "near": (jpeg(image, 60), "{}"), "third": (png(image), "{}")}
    for name, pictures in (("a.tar", first), ("b.tar", second)):
        write_tar(tmp_path / name, members(pictures))
    asked = config(filters=FilterConfig(min_aesthetic=5.0))
    shards = list_shards(str(tmp_path))
    tables = [(shard.name, shard.name, hash_shard(shard, asked)) for shard in shards]
    assert [one["key"].to_pylist() for _, _, one in tables] == [["kept", "again"], ["other", "near", "third"]]
    assert all(one.schema == HASHES_SCHEMA for _, _, one in tables)
    drop = find_duplicates(tables, asked.near_duplicates)
    refused = {}
    kept = []
    for shard in shards:
        for chunk in decode_chunks(shard, asked, drop[shard.name]):
            kept += [facts.key for facts in chunk.facts]
            refused |= {reject.key: (reject.source, reject.reason) for reject in chunk.rejects}
    assert kept == ["kept", "other"]
    assert refused == {
        "refused": ("a.tar", Reason.LOW_AESTHETIC),
        "broken": ("a.tar", Reason.TRUNCATED),
        "again": ("a.tar", Reason.DUPLICATE_PICTURE),
        "near": ("b.tar", Reason.NEAR_DUPLICATE),
        "third": ("b.tar", Reason.DUPLICATE_PICTURE),
    }
    exact_only = hash_shard(shards[0], config(near_duplicates=None))
    assert exact_only["near"].null_count == len(exact_only) == 3
