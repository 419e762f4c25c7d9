"""Chunks: buckets, order, what rides with them, and a shard with every kind of bad picture in it."""

import io
import json
import math
import pickle
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import Chunk, decode_chunks, nearest_shape
from raymuse.encoding.pictures import crop, crop_rng, decode
from raymuse.storage.images import Shard, list_shards
from raymuse.storage.rejects import Reason, Reject
from raymuse.storage.webdataset_writer import write_tar

BUCKETS = ("16x16", "24x16", "16x24", "32x16")
Member = tuple[bytes, Mapping[str, Any]]


def picture(width: int, height: int, number: int = 0) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / max(1, width - 1), 255 * y / max(1, height - 1), np.full(x.shape, number * 37 % 256)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def header_only(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def shard_of(folder: Path, rows: Mapping[str, Member]) -> Shard:
    """A tar of pictures, each with the caption `caption of KEY` and its metadata."""
    write_tar(
        folder / "a.tar",
        (
            member
            for key, (data, metadata) in rows.items()
            for member in (
                (f"{key}.png", data),
                (f"{key}.json", json.dumps({"caption": f"caption of {key}", **metadata}).encode()),
            )
        ),
    )
    (shard,) = list_shards(str(folder / "a.tar"))
    return shard


def config(**changes: Any) -> PretokenizeConfig:
    values = {"resolution": 16, "chunk_size": 4, **changes}
    return PretokenizeConfig.model_validate(
        {"input": "in", "output": "out", "vqgan": "v", "text_encoder": "t", **values}
    )


def keys(chunk: Chunk) -> list[str]:
    return [facts.key for facts in chunk.facts]


def summed(chunks: list[Chunk]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for chunk in chunks:
        totals.update(chunk.counts)
    return dict(totals)


def reasons(chunks: list[Chunk]) -> dict[str, Reason]:
    return {reject.key: reject.reason for chunk in chunks for reject in chunk.rejects}


# --- size and order


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, [0]), (1, [1]), (3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])]
)
def test_chunks_are_full_but_for_the_last(tmp_path: Path, count: int, sizes: list[int]) -> None:
    rows = {f"k{i}": (save(picture(20, 16, i)), {}) for i in range(count)}
    chunks = list(decode_chunks(shard_of(tmp_path, {**rows, "bad": (b"", {})}), config()))
    assert [len(chunk.facts) for chunk in chunks] == [len(chunk.pixels) for chunk in chunks] == sizes
    assert [chunk.number for chunk in chunks] == list(range(len(sizes)))
    assert [chunk.last for chunk in chunks] == [False] * (len(sizes) - 1) + [True]
    assert [key for chunk in chunks for key in keys(chunk)] == list(rows)
    assert reasons(chunks) == {"bad": Reason.UNDECODABLE}
    assert summed(chunks).get("pictures", 0) == count


def test_a_full_chunk_comes_before_the_next_crop_is_gathered(tmp_path: Path) -> None:
    rows = {f"k{i}": (save(picture(16, 16)), {}) for i in range(100)}
    first = next(decode_chunks(shard_of(tmp_path, rows), config(chunk_size=1)))
    assert keys(first) == ["k0"]
    assert not first.last


def test_crops_and_twins_of_a_picture_stay_together(tmp_path: Path) -> None:
    asked = config(crops_per_picture=3, flip=True, crop="random", seed=5, chunk_size=13)
    image = picture(40, 20)
    chunks = list(decode_chunks(shard_of(tmp_path, {f"k{i}": (save(image), {}) for i in range(5)}), asked))
    assert [keys(chunk) for chunk in chunks] == [["k0"] * 6 + ["k1"] * 6, ["k2"] * 6 + ["k3"] * 6, ["k4"] * 6]
    assert [chunk.last for chunk in chunks] == [False, False, True]
    facts, pixels = chunks[1].facts[6:], chunks[1].pixels[6:]
    assert [(one.crop, one.flip) for one in facts] == [(i, flip) for i in range(3) for flip in (False, True)]
    for index in range(3):
        expected = crop(image, 16, mode="random", rng=crop_rng(5, "k3", index))
        assert np.array_equal(pixels[2 * index], expected.pixels)
        assert np.array_equal(pixels[2 * index + 1], expected.pixels[:, ::-1])
        assert (facts[2 * index].crop_top, facts[2 * index].crop_left) == (expected.top, expected.left)
    assert summed(chunks) == {"pictures": 5}
    with pytest.raises(ValueError, match="6 crops a picture do not fit one chunk: chunk_size=5"):
        config(crops_per_picture=3, flip=True, chunk_size=5)


# --- buckets


def many_shapes(count: int = 60) -> dict[str, Member]:
    rng = np.random.default_rng(3)
    sides = rng.integers(8, 60, (count, 2)).tolist()
    return {f"k{i:02d}": (save(picture(width, height, i)), {}) for i, (width, height) in enumerate(sides)}


def test_every_picture_is_in_the_bucket_nearest_to_it(tmp_path: Path) -> None:
    rows = many_shapes()
    asked = config(buckets=BUCKETS)
    chunks = list(decode_chunks(shard_of(tmp_path, rows), asked))
    seen = [key for chunk in chunks for key in keys(chunk)]
    assert sorted(seen) == sorted(rows)
    assert summed(chunks) == {"pictures": len(rows)}
    for chunk in chunks:
        assert chunk.shape in asked.shapes
        for facts, pixels in zip(chunk.facts, chunk.pixels, strict=True):
            image = decode(rows[facts.key][0])
            aspect = math.log(image.width / image.height)
            away = {shape: abs(aspect - math.log(shape[1] / shape[0])) for shape in asked.shapes}
            assert away[chunk.shape] <= min(away.values()) + 1e-12
            assert np.array_equal(pixels, crop(image, chunk.shape).pixels)
            assert pixels.shape == (*chunk.shape, 3)
    assert len({chunk.shape for chunk in chunks}) == 4


def test_the_order_of_chunks_over_the_buckets(tmp_path: Path) -> None:
    rows = many_shapes()
    asked = config(buckets=BUCKETS)
    chunks = list(decode_chunks(shard_of(tmp_path, rows), asked))
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    full = [chunk for chunk in chunks if len(chunk.facts) == asked.chunk_size]
    rest = chunks[len(full) :]
    assert chunks[: len(full)] == full
    order = list(rows)
    ends = [order.index(keys(chunk)[-1]) for chunk in full]
    assert ends == sorted(ends)  # each came with the crop that filled it
    assert [chunk.shape for chunk in rest] == [shape for shape in asked.shapes if shape in {c.shape for c in rest}]
    assert len({chunk.shape for chunk in rest}) == len(rest) > 1
    for shape in asked.shapes:
        inside = [key for chunk in chunks if chunk.shape == shape for key in keys(chunk)]
        assert inside == sorted(inside)
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_chunks_repeat_to_the_byte(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, many_shapes())
    asked = config(buckets=BUCKETS, crop="random", flip=True, crops_per_picture=2)
    first, second = ([pickle.dumps(chunk) for chunk in decode_chunks(shard, asked)] for _ in range(2))
    assert first == second


def test_of_equally_near_buckets_the_first_is_taken() -> None:
    square, tall, wide = (16, 16), (320, 192), (192, 320)
    for side in (1, 7, 64, 1023):
        assert nearest_shape((side, side), (tall, wide)) == tall
        assert nearest_shape((side, side), (wide, tall)) == wide
    assert nearest_shape((30, 20), ((16, 16), (16, 36))) == (16, 16)  # log 1.5 is half of log 2.25
    assert nearest_shape((30, 20), ((16, 36), (16, 16))) == (16, 36)
    assert nearest_shape((5, 4000), (wide, square, tall)) == tall
    assert nearest_shape((5, 4000), (square,)) == square


def test_turned_pictures_go_by_their_upright_shape(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = save(picture(48, 24), "JPEG", exif=exif)
    (chunk,) = decode_chunks(shard_of(tmp_path, {"k": (data, {})}), config(buckets=("16x32", "32x16")))
    assert chunk.shape == (32, 16)
    assert (chunk.facts[0].original_width, chunk.facts[0].original_height) == (24, 48)


# --- what is refused, and when


def test_rejects_ride_with_the_next_chunk(tmp_path: Path) -> None:
    good = (save(picture(16, 16)), {})
    rows = {f"k{i}": (b"", {}) if i in (0, 3, 6, 7, 10) else good for i in range(11)}
    chunks = list(decode_chunks(shard_of(tmp_path, rows), config(chunk_size=2)))
    assert [keys(chunk) for chunk in chunks] == [["k1", "k2"], ["k4", "k5"], ["k8", "k9"]]
    assert [[reject.key for reject in chunk.rejects] for chunk in chunks] == [["k0"], ["k3"], ["k6", "k7", "k10"]]


def test_dropped_pictures_are_not_decoded(tmp_path: Path) -> None:
    rows: dict[str, Member] = {"bad": (b"", {}), "good": (save(picture(16, 16)), {}), "kept": (save(picture(9, 9)), {})}
    drop = {key: Reject("a.tar", key, Reason.DUPLICATE_PICTURE, "why") for key in ("bad", "good", "elsewhere")}
    (chunk,) = decode_chunks(shard_of(tmp_path, rows), config(), drop)
    assert chunk.rejects == [drop["bad"], drop["good"]]
    assert keys(chunk) == ["kept"]
    assert chunk.counts == {"pictures": 1}


def test_metadata_is_asked_before_the_file_is_looked_at(tmp_path: Path) -> None:
    rows: dict[str, Member] = {
        "ugly": (b"no picture", {"aesthetic": 2.0}),
        "short": (b"no picture", {"caption": "c"}),
        "small": (b"no picture", {"original_width": 30, "original_height": 500}),
        "long": (b"no picture", {"original_width": 500, "original_height": 100}),
        "broken": (b"no picture", {"aesthetic": 6.0}),
    }
    filters = {"min_aesthetic": 5, "min_caption": 2, "min_side": 32, "max_aspect": 4}
    chunks = list(decode_chunks(shard_of(tmp_path, rows), config(filters=filters)))
    assert reasons(chunks) == {
        "ugly": Reason.LOW_AESTHETIC,
        "short": Reason.CAPTION_LENGTH,
        "small": Reason.TOO_SMALL,
        "long": Reason.FILTERED_ASPECT,
        "broken": Reason.UNDECODABLE,
    }


def test_the_header_is_asked_before_a_pixel_is_decoded(tmp_path: Path) -> None:
    rows: dict[str, Member] = {
        "small": (header_only(30, 60), {}),
        "long": (header_only(500, 100), {}),
        "thin": (header_only(1_000_000, 40), {}),
        "bomb": (header_only(20_000, 20_000), {}),
        "empty": (header_only(60, 60), {}),
        "shrunk": (save(picture(20, 20)), {"original_width": 200, "original_height": 200}),
    }
    chunks = list(decode_chunks(shard_of(tmp_path, rows), config(filters={"min_side": 32, "max_aspect": 4})))
    assert reasons(chunks) == {
        "small": Reason.TOO_SMALL,
        "long": Reason.FILTERED_ASPECT,
        "thin": Reason.BAD_ASPECT,  # a fault, whatever was asked
        "bomb": Reason.TOO_LARGE,
        "empty": Reason.TRUNCATED,
    }
    assert keys(chunks[-1]) == ["shrunk"]  # the size before the resize counts
    (chunk,) = decode_chunks(shard_of(tmp_path, {"dot": (save(picture(1, 1)), {})}), config())
    assert keys(chunk) == ["dot"]


def test_some_captions_are_left_out(tmp_path: Path) -> None:
    captions = ["cat", "a cat on a chair", "a cat"]
    shard = shard_of(tmp_path, {"k": (save(picture(16, 16)), {"captions": captions})})
    (chunk,) = decode_chunks(shard, config(filters={"min_caption": 4, "max_caption": 10}))
    assert chunk.facts[0].captions == ("a cat",)
    assert chunk.counts == {"pictures": 1, "captions_left_out": 2}


def test_the_prefix_and_repaired_captions(tmp_path: Path) -> None:
    data = save(picture(16, 16))
    write_tar(tmp_path / "a.tar", [("k.png", data), ("k.txt", b"caf\xe9"), ("l.png", data), ("l.txt", b"x")])
    (shard,) = list_shards(str(tmp_path / "a.tar"))
    (chunk,) = decode_chunks(shard, config(filters={"min_caption": 2}, caption_prefix="photo: ", bad_captions="repair"))
    assert [one.captions for one in chunk.facts] == [("photo: café",)]
    assert reasons([chunk]) == {"l": Reason.CAPTION_LENGTH}
    assert chunk.counts == {"pictures": 1, "captions_repaired": 1}
    (chunk,) = decode_chunks(shard, config())
    assert reasons([chunk]) == {"k": Reason.BAD_CAPTION_ENCODING}


# --- what a row says


def test_the_facts_of_a_crop(tmp_path: Path) -> None:
    data = save(picture(40, 20))
    rows: dict[str, Member] = {
        "plain": (data, {}),
        "said": (data, {"original_width": 800, "original_height": "400", "aesthetic": "5.5"}),
        "laion": (data, {"original_width": 800, "AESTHETIC_SCORE": 7}),
        "broken": (data, {"original_width": 1e300, "original_height": 3, "aesthetic": math.nan}),
    }
    (chunk,) = decode_chunks(shard_of(tmp_path, rows), config(aesthetic=4.5))
    told = {one.key: (one.original_width, one.original_height, one.aesthetic) for one in chunk.facts}
    assert told == {
        "plain": (40, 20, 4.5),
        "said": (800, 400, 5.5),
        "laion": (40, 20, 7.0),
        "broken": (40, 20, 4.5),
    }
    assert {(one.crop_top, one.crop_left) for one in chunk.facts} == {(0, 8)}
    assert {one.source for one in chunk.facts} == {"a.tar"}


def test_the_background_is_the_configs(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, {"k": (save(Image.new("RGBA", (16, 16), (255, 0, 0, 0))), {})})
    (chunk,) = decode_chunks(shard, config(background="#0A14ff"))
    assert (chunk.pixels[0] == [10, 20, 255]).all()


# --- the table of bad pictures


def test_every_kind_of_bad_picture_at_once(tmp_path: Path) -> None:
    whole = picture(48, 32)
    jpeg = save(picture(300, 200), "JPEG")
    frames = {"save_all": True, "append_images": [picture(48, 32, 3)]}
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    refused: dict[str, tuple[bytes, Reason]] = {
        "truncated": (jpeg[: len(jpeg) * 2 // 3], Reason.TRUNCATED),
        "empty": (b"", Reason.UNDECODABLE),
        "html": (b"<html><body>404</body></html>", Reason.UNDECODABLE),
        "garbage": (np.random.default_rng(0).bytes(500), Reason.UNDECODABLE),
        "bomb144": (header_only(12_000, 12_000), Reason.TOO_LARGE),
        "bomb900": (header_only(30_000, 30_000), Reason.TOO_LARGE),
        "thin": (save(Image.new("RGB", (1, 4000))), Reason.BAD_ASPECT),
        "pdf": (b"%PDF-1.4 ", Reason.UNSUPPORTED_FORMAT),
        "scaleless": (save(Image.fromarray(np.full((8, 8), 1e9, np.float32)), "TIFF"), Reason.UNSUPPORTED_FORMAT),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    read = {
        "cmyk": save(whole.convert("CMYK"), "JPEG"),
        "deep": save(Image.fromarray(np.full((32, 48), 30_000, np.uint16))),
        "float": save(Image.fromarray(np.full((32, 48), 0.5, np.float32)), "TIFF"),
        "rgba": save(whole.convert("RGBA")),
        "la": save(whole.convert("LA")),
        "palette": save(whole.convert("P"), transparency=0),
        "one_bit": save(whole.convert("1")),
        "grey": save(whole.convert("L"), "JPEG"),
        "gif": save(whole, "GIF", **frames),
        "webp": save(whole, "WEBP", **frames),
        "turned": save(whole, "JPEG", exif=exif),
        "srgb": save(whole, "JPEG", icc_profile=srgb),
        "misfit": save(whole, "JPEG", icc_profile=b"no profile"),
        "dot": save(Image.new("RGB", (1, 1))),
    }
    rows: dict[str, Member] = {f"good{i}": (save(picture(48, 32, i)), {}) for i in range(6)}
    rows |= {key: (data, {}) for key, (data, _) in refused.items()} | {key: (data, {}) for key, data in read.items()}
    rows |= {f"more{i}": (save(picture(32, 48, i), "JPEG"), {}) for i in range(6)}
    chunks = list(decode_chunks(shard_of(tmp_path, rows), config()))
    assert reasons(chunks) == {key: reason for key, (_, reason) in refused.items()}
    assert [key for chunk in chunks for key in keys(chunk)] == [key for key in rows if key not in refused]
    assert all(reject.detail for chunk in chunks for reject in chunk.rejects)
    assert summed(chunks) == {"pictures": 12 + len(read), "animations": 2, "cmyk_without_profile": 1}
    levels = {
        one.key: int(pixels.mean()) for chunk in chunks for one, pixels in zip(chunk.facts, chunk.pixels, strict=True)
    }
    assert abs(levels["deep"] - 30_000 / 257) <= 1  # not clipped to white
    assert abs(levels["float"] - 128) <= 1  # not black
