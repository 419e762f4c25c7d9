"""Decoding: every kind of picture file that the web holds, each compared with what it shows; and the crop."""

import io
import itertools
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

from raymuse.encoding.pictures import MAX_ASPECT, Crop, crop, crop_rng, decode, downscale, read_header, read_pixels
from raymuse.storage.rejects import Reason, Unreadable


def smooth(width: int = 48, height: int = 32) -> Image.Image:
    """A colourful picture without fine detail, so that JPEG keeps it within a few steps."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / (width - 1), 255 * y / (height - 1), 255 - 255 * (x + y) / (width + height - 2)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, **options: Any) -> NDArray[np.uint8]:
    image = decode(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def noticed(data: bytes) -> tuple[str, ...]:
    return read_pixels(read_header(data)).notes


def refusal(data: bytes, **options: Any) -> Reason:
    with pytest.raises(Unreadable) as raised:
        decode(data, **options)
    assert raised.value.detail
    return raised.value.reason


def distance(a: NDArray[np.uint8], b: Any) -> int:
    other = np.asarray(b)
    assert a.shape == other.shape
    return int(np.abs(a.astype(int) - other.astype(int)).max())


def grey_ramp() -> NDArray[np.float64]:
    return np.tile(np.linspace(0, 1, 16), (4, 1))


def as_rgb(ramp: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.repeat(np.round(ramp * 255).astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0), ("WEBP", {"quality": 95}, 16),
        ("JPEG", {"quality": 95}, 12), ("JPEG", {"quality": 95, "progressive": True}, 12),
    ],
)  # fmt: skip
def test_plain_formats(kind: str, options: dict[str, Any], tolerance: int) -> None:
    assert distance(pixels(save(smooth(), kind, **options)), smooth()) <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(kind: str, orientation: int) -> None:
    undo = {  # how a camera held so stores an upright picture: the inverse of EXIF's eight turns
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](np.asarray(smooth()))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    assert distance(pixels(save(stored, kind, exif=exif, **options)), smooth()) <= (12 if kind == "JPEG" else 0)


def test_a_broken_exif_block_does_not_lose_the_picture() -> None:
    data = save(smooth(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert distance(pixels(data), smooth()) <= 12


def test_cmyk_jpeg() -> None:
    assert distance(pixels(save(smooth().convert("CMYK"), "JPEG", quality=95)), smooth()) <= 16


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_scale(kind: str) -> None:
    image = Image.fromarray(np.round(grey_ramp() * 65535).astype(np.uint16))
    assert distance(pixels(save(image, kind)), as_rgb(grey_ramp())) <= 1


def test_sixteen_bit_colour_png() -> None:
    deep = np.asarray(smooth()).astype(np.uint16) * 257
    body = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    data = png(48, 32, depth=16, colour=2, body=body)
    assert distance(pixels(data), smooth()) <= 1


def test_sixteen_bit_grey_png_with_a_transparent_value() -> None:
    body = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.array([[0, 1000], [65535, 1000]]))
    data = png(2, 2, depth=16, colour=0, body=body, trns=struct.pack(">H", 1000))
    assert pixels(data, background=(0, 255, 0)).tolist() == [[[0] * 3, [0, 255, 0]], [[255] * 3, [0, 255, 0]]]


@pytest.mark.parametrize("scale", [1.0, 255.0, 65535.0])
def test_float_tiff_keeps_its_scale(scale: float) -> None:
    values = (grey_ramp() * scale).astype(np.float32)
    assert distance(pixels(save(Image.fromarray(values), "TIFF")), as_rgb(grey_ramp())) <= 1


def test_float_tiff_with_holes_and_without_a_scale() -> None:
    values = grey_ramp().astype(np.float32)
    values[0, :3] = [np.nan, np.inf, -1.0]
    assert pixels(save(Image.fromarray(values), "TIFF"))[0, :3].max() == 0
    assert refusal(save(Image.fromarray(values * 1e9), "TIFF")) is Reason.UNSUPPORTED_FORMAT


def test_deep_tiff_that_counts_from_white() -> None:
    image = Image.fromarray(np.round((1 - grey_ramp()) * 65535).astype(np.uint16))
    data = save(image, "TIFF", tiffinfo=tags_with_photometric(0))
    with Image.open(io.BytesIO(data)) as read:
        assert read.tag_v2[262] == 0  # the file really says so
    assert distance(pixels(data), as_rgb(grey_ramp())) <= 1


def test_grey_and_black_and_white() -> None:
    grey = smooth().convert("L")
    assert distance(pixels(save(grey, "PNG")), grey.convert("RGB")) == 0
    assert distance(pixels(save(grey.convert("1"), "TIFF")), grey.convert("1").convert("RGB")) == 0


def test_alpha_shows_the_background() -> None:
    image = smooth().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) // 24 * 255, (32, 1))))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        shown = pixels(save(image, kind, **options), background=(10, 20, 30))
        assert (shown[:, :24] == [10, 20, 30]).all()
        assert distance(shown[:, 24:], np.asarray(smooth())[:, 24:]) == 0
    half = Image.new("LA", (2, 2), (0, 128))
    assert pixels(save(half, "PNG")).tolist()[0][0] == [127, 127, 127]


def test_palettes_with_and_without_alpha() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 0])
    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    assert pixels(save(image, "PNG")).tolist() == [[red, green, blue, red]]
    assert pixels(save(image, "PNG", transparency=0)).tolist() == [[white, green, blue, white]]
    assert pixels(save(image, "PNG", transparency=b"\x00\xff\x00")).tolist() == [[white, green, white, white]]
    assert pixels(save(image, "GIF", transparency=2)).tolist() == [[red, green, white, red]]


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = save(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == [255, 0, 0]).all(), kind


def test_colour_profiles_become_srgb() -> None:
    plain = save(smooth(), "PNG")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(save(smooth(), "PNG", icc_profile=srgb)), pixels(plain))
    swapped = swapped_profile(srgb)
    turned = pixels(save(smooth(), "PNG", icc_profile=swapped))
    assert distance(turned, np.asarray(smooth())[..., [1, 0, 2]]) <= 3  # the profile says that red is green
    with_alpha = smooth().convert("RGBA")
    with_alpha.putpixel((0, 0), (0, 0, 0, 0))
    shown = pixels(save(with_alpha, "PNG", icc_profile=swapped))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert distance(shown[1:], turned[1:]) == 0


@pytest.mark.parametrize("profile", [b"garbage", b""])
def test_a_broken_or_misfit_profile_is_ignored(profile: bytes) -> None:
    assert distance(pixels(save(smooth(), "PNG", icc_profile=profile)), smooth()) == 0
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = smooth().convert("L")
    assert distance(pixels(save(grey, "PNG", icc_profile=srgb)), grey.convert("RGB")) == 0


def test_lab_tiff() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    shown = pixels(save(to_lab.apply(smooth()), "TIFF"))
    assert np.abs(shown.astype(int) - np.asarray(smooth()).astype(int)).mean() < 4  # 8-bit LAB is coarse at the rim


def test_bombs_are_refused_by_their_header() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in (7100, 12_000, 60_000):  # above our limit; above Pillow's warning; above Pillow's error
            assert refusal(png(side, side, depth=8, colour=2, body=b"")) is Reason.TOO_LARGE
    assert refusal(save(smooth(), "JPEG"), max_pixels=48 * 32 - 1) is Reason.TOO_LARGE
    assert decode(save(smooth(), "JPEG"), max_pixels=48 * 32).size == (48, 32)


def test_what_was_noticed() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = smooth()
    frames = {"save_all": True, "append_images": [smooth().rotate(180)]}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        assert noticed(save(plain, kind)) == (), kind
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        assert noticed(save(plain, kind, **frames)) == ("animations",), kind
    assert noticed(save(plain, "MPO", **frames)) == ()  # a phone's second view of the same
    assert noticed(save(plain, "JPEG", icc_profile=srgb)) == ()
    assert noticed(save(plain, "JPEG", icc_profile=b"garbage")) == ()
    assert noticed(save(plain, "JPEG", icc_profile=swapped_profile(srgb))) == ("icc_converted",)
    assert noticed(save(plain.convert("RGBA"), "PNG", icc_profile=swapped_profile(srgb))) == ("icc_converted",)
    assert noticed(save(plain.convert("CMYK"), "JPEG")) == ("cmyk_without_profile",)
    assert noticed(save(plain.convert("CMYK"), "TIFF", icc_profile=srgb)) == ("cmyk_without_profile",)  # it misfits
    assert noticed(save(plain.convert("CMYK"), "TIFF", icc_profile=ink_profile())) == ("icc_converted",)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_goes_through_its_profile(kind: str) -> None:
    inks = Image.new("CMYK", (16, 8), (0, 0, 0, 0))
    inks.paste((255, 0, 0, 0), (8, 0, 16, 8))  # cyan, says everyone; red, says the profile
    options: dict[str, Any] = {"JPEG": {"quality": 95}}.get(kind, {})
    shown = pixels(save(inks, kind, icc_profile=ink_profile(), **options))
    assert distance(shown[:, :8], np.full((8, 8, 3), 255)) <= 3
    assert distance(shown[:, 8:], np.full((8, 8, 3), (255, 0, 0))) <= 12
    naive = pixels(save(inks, kind, **options))
    assert distance(naive[:, 8:], np.full((8, 8, 3), (0, 255, 255))) <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_a_broken_second_frame_loses_nothing(kind: str) -> None:
    first, second = Image.new("RGB", (64, 64), "red"), smooth(64, 64)
    alone = save(first, kind)
    whole = save(first, kind, save_all=True, append_images=[second])
    for cut in range(len(alone) + 100, len(whole), 7):
        assert distance(pixels(whole[:cut]), first) == 0


def test_a_png_whose_text_fills_the_memory_is_refused() -> None:
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    plain = save(smooth(), "PNG")
    end_of_header = 8 + 25
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    assert refusal(plain[:end_of_header] + chunk + plain[end_of_header:]) is Reason.UNDECODABLE


def test_a_thin_picture_is_refused_by_its_header() -> None:
    assert refusal(png(MAX_ASPECT + 1, 1, depth=8, colour=2, body=b"")) is Reason.BAD_ASPECT
    assert refusal(png(1, MAX_ASPECT, depth=8, colour=2, body=b"")) is Reason.TRUNCATED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_cut_file_is_refused_at_every_length(kind: str) -> None:
    data = save(smooth(200, 150), kind)
    seen = {refusal(data[: len(data) * part // 20]) for part in range(20)}
    assert seen <= {Reason.TRUNCATED, Reason.UNDECODABLE}
    if kind in ("JPEG", "PNG"):
        assert Reason.TRUNCATED in seen


def test_noise_never_raises_anything_else() -> None:
    rng = np.random.default_rng(0)
    sources = [save(smooth(), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")]
    outcomes = {"picture": 0, "refused": 0}
    for data in sources * 60:
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 8):
            broken[place] = rng.integers(256)
        try:
            decode(bytes(broken))
            outcomes["picture"] += 1
        except Unreadable:
            outcomes["refused"] += 1
    assert outcomes["picture"] + outcomes["refused"] == 360
    assert outcomes["refused"] > 100


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.UNDECODABLE),
        (b"<html>404</html>", Reason.UNDECODABLE),
        (b"\n <svg xmlns='x'>", Reason.UNSUPPORTED_FORMAT),
        (b"\0\0\0\x1cftypheic\0\0\0\0", Reason.UNSUPPORTED_FORMAT),
        (b"%PDF-1.4", Reason.UNSUPPORTED_FORMAT),
        (save(Image.new("RGB", (32, 32)), "ICO"), Reason.UNSUPPORTED_FORMAT),
        (b"P6 1 1 255 abc", Reason.UNDECODABLE),  # Pillow would read it; we never ask that parser
    ],
)
def test_other_files(data: bytes, reason: Reason) -> None:
    assert refusal(data) is reason


# --- the crop


def test_the_center_crop_is_torchvisions() -> None:
    result = crop(smooth(60, 41), 20)
    resized = smooth(60, 41).resize((29, 20), Image.Resampling.BILINEAR)  # int(20 * 60 / 41) = 29
    assert (result.top, result.left) == (0, 4)  # round((29 - 20) / 2) = round(4.5) = 4, to even
    assert (result.original_width, result.original_height) == (60, 41)
    assert np.array_equal(result.pixels, np.asarray(resized)[:, 4:24])
    assert result.pixels.dtype == np.uint8
    assert result.pixels.flags.c_contiguous
    assert result.pixels.flags.writeable


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    assert np.array_equal(crop(smooth(32, 32), 32).pixels, np.asarray(smooth(32, 32)))
    assert np.array_equal(crop(smooth(48, 32), 32).pixels, np.asarray(smooth(48, 32))[:, 8:40])


def test_every_target_is_covered() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(side) for side in rng.integers(5, 90, 2))
        target = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
        result = crop(smooth(width, height), target, mode="random", rng=rng)
        assert result.pixels.shape == (*target, 3)
        assert result.top >= 0
        assert result.left >= 0
    assert crop(Image.new("RGB", (1, 1)), 16).pixels.shape == (16, 16, 3)


def test_a_thin_picture_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(Unreadable) as raised:
        crop(Image.new("RGB", (50_000, 1)), 512)
    assert raised.value.reason is Reason.BAD_ASPECT
    assert crop(Image.new("RGB", (MAX_ASPECT, 1)), 8).pixels.shape == (8, 8, 3)


def test_random_crops_are_keyed_and_uniform() -> None:
    def one(seed: int, key: str, index: int) -> Crop:
        return crop(smooth(52, 32), 32, mode="random", rng=crop_rng(seed, key, index))

    again = one(1, "k", 0)
    assert np.array_equal(one(1, "k", 0).pixels, again.pixels)
    assert int(crop_rng(1, "k", 0).integers(1 << 62)) == 2622703598834800325  # for good: stored crops depend on it
    draws = {int(crop_rng(*name).integers(1 << 62)) for name in [(1, "k", 0), (2, "k", 0), (1, "k", 1), (1, "l", 0)]}
    assert len(draws) == 4
    lefts = np.bincount([one(0, f"{i}", 0).left for i in range(2100)], minlength=21)
    expected = 100
    assert float(((lefts - expected) ** 2 / expected).sum()) < 45.3  # chi-squared, 20 degrees, p = 0.001


def test_the_low_resolution_twin_shows_the_same() -> None:
    full = crop(smooth(256, 256), 256).pixels
    low = downscale(full, 64)
    assert low.shape == (64, 64, 3)
    means = full.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert distance(low, means.round().astype(np.uint8)) <= 3
    board = np.indices((64, 64)).sum(0)[..., None].repeat(3, -1) % 2 * 255
    assert np.abs(downscale(board.astype(np.uint8), 16)[2:-2, 2:-2].astype(int) - 127).max() <= 3  # antialiased
    assert downscale(full, (32, 64)).shape == (32, 64, 3)


# --- files that Pillow does not write


def png(width: int, height: int, *, depth: int, colour: int, body: bytes, trns: bytes | None = None) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    middle = chunk(b"tRNS", trns) if trns is not None else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def tags_with_photometric(value: int) -> TiffImagePlugin.ImageFileDirectory_v2:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = value
    return tags


def swapped_profile(srgb: bytes) -> bytes:
    """An sRGB profile whose red and green primaries are exchanged, under another name."""
    data = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap"))
    count = struct.unpack(">I", data[128:132])[0]
    places = {bytes(data[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i for i in range(count)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


def ink_profile() -> bytes:
    """A CMYK profile by which cyan ink is red, paper white and black black; every other mixture is grey."""
    red, grey, white, black = (136, 208, 195), (128, 128, 128), (255, 128, 128), (0, 128, 128)  # 8-bit L, a, b
    colours = [
        black if inks[3] else {(0, 0, 0): white, (1, 0, 0): red}.get(inks[:3], grey)
        for inks in itertools.product((0, 1), repeat=4)
    ]
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(sum(colours, ())) + ramp * 3
    start = 128 + 4 + 12
    illuminant = struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    header = struct.pack(">I4sI4s4s4s", start + len(table), bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + illuminant
    return header.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", start, len(table)) + table
