"""From the bytes of a picture to a crop of fixed size.

    crop(decode(data), 256, mode="random", rng=crop_rng(seed, key, 0)).pixels      # uint8 (256, 256, 3)

The resize and crop are aMUSEd's (torchvision's Resize with bilinear antialiasing, then a crop), to the pixel.
"""

import hashlib
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymuse.encoding.colour import to_rgb
from raymuse.storage.rejects import Reason, Unreadable

__all__ = [
    *("Crop", "Decoded", "Unreadable", "crop", "crop_rng", "decode", "downscale", "keep_memory", "read_header"),
    "read_pixels",
]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's others are never asked: fewer parsers to attack
MAX_ASPECT = 32  # long side / short side; a 1 x 50,000,000 picture would fill the memory when its short side grows
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_BLOCK_BYTES, _BLOCKS_KEPT = 1 << 20, 16  # of Pillow's memory
_FOREIGN = {b"<svg": "SVG", b"<?xml": "XML", b"%PDF": "PDF", b"8BPS": "Photoshop", b"\0\0\1\0": "ICO"}


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upright sRGB picture of mode RGB, and what was noticed on the way.

    Args:
        image: the picture.
        notes: of `animations` (the first frame, or page, was taken), `icc_converted`, `cmyk_without_profile`.
    """

    image: Image.Image
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Crop:
    """A crop and the micro-conditions that it is trained with.

    Args:
        pixels: uint8 (height, width, 3), sRGB, contiguous.
        original_width: of the picture before the resize, upright, in pixels; so is original_height.
        top: of the crop in the resized picture, in pixels; so is left.
    """

    pixels: NDArray[np.uint8]
    original_width: int
    original_height: int
    top: int
    left: int


def decode(
    data: bytes, *, max_pixels: int = 50_000_000, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """A file's bytes as an upright sRGB picture of mode RGB; of an animation its first frame.

    Args:
        data: JPEG, PNG, WebP, BMP, GIF or TIFF.
        max_pixels: see `read_header`.
        background: what transparent pixels show.

    Raises:
        Unreadable: with the reason; nothing else, whatever the bytes are (but for MemoryError).
    """
    return read_pixels(read_header(data, max_pixels=max_pixels), background).image


def read_header(data: bytes, *, max_pixels: int = 50_000_000) -> Image.Image:
    """The picture with its size known and no pixel decoded; `read_pixels` goes on from there.

    Args:
        data: JPEG, PNG, WebP, BMP, GIF or TIFF.
        max_pixels: refused above. Pillow refuses 179 million on its own.

    Raises:
        Unreadable: no picture that is read, TOO_LARGE, or BAD_ASPECT; nothing else but MemoryError.
    """
    image = _open(data)
    if image.width * image.height > max_pixels:
        raise Unreadable(Reason.TOO_LARGE, f"{image.width} x {image.height} is more than {max_pixels} pixels")
    _check_aspect(image)
    return image


def read_pixels(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Decoded:
    """What `read_header` opened, decoded: upright, sRGB, over the background.

    Raises:
        Unreadable: the pixels are broken; nothing else but MemoryError.
    """
    try:
        image.load()
        rgb, noticed = to_rgb(_upright(image), background)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers raise a dozen kinds; one bad picture must never end a run
        cut = isinstance(error, EOFError) or any(word in str(error) for word in ("truncated", "unexpected end"))
        raise Unreadable(Reason.TRUNCATED if cut else Reason.UNDECODABLE, _sentence(error)) from error
    return Decoded(rgb, (*noticed, "animations") if _is_animated(image) else noticed)


def crop(
    image: Image.Image,
    resolution: int | tuple[int, int],
    *,
    mode: Literal["center", "random"] = "center",
    rng: np.random.Generator | None = None,
) -> Crop:
    """Resize so that the picture just covers the target (bilinear, antialiased; nothing where it does), and crop.

    Args:
        image: what `decode` returned.
        resolution: side of a square, or (height, width), in pixels.
        mode: "random" draws the place from `rng`, which it needs.

    Raises:
        Unreadable: BAD_ASPECT for a picture more than MAX_ASPECT times as long as it is wide.
    """
    height, width = _pair(resolution)
    _check_aspect(image)
    resized = _cover(image, height, width)
    spare_height, spare_width = resized.height - height, resized.width - width
    if mode == "random":
        assert rng is not None, "a random crop needs its generator: crop_rng(seed, key, crop_index)"
        top, left = int(rng.integers(spare_height + 1)), int(rng.integers(spare_width + 1))
    else:
        top, left = round(spare_height / 2), round(spare_width / 2)
    whole = resized.size == (width, height)  # a square of a square, most often: nothing to cut
    window = resized if whole else resized.crop((left, top, left + width, top + height))
    return Crop(np.array(window, dtype=np.uint8), image.width, image.height, top, left)


def crop_rng(seed: int, key: str, crop_index: int) -> np.random.Generator:
    """The generator of one crop: the same for the same three anywhere, whatever ran before."""
    name = f"{seed}/{crop_index}/{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def keep_memory() -> None:
    """Have Pillow keep up to 16 MiB of freed pictures for those to come; of the whole process, and cheap to repeat.

    Given back to the system, as Pillow does on its own, they cost a page fault for every 4 KiB of the next picture.
    """
    allocator: Any = vars(Image)["core"]  # Pillow documents these two, and does not export them to type checkers
    allocator.set_block_size(_BLOCK_BYTES)
    allocator.set_blocks_max(_BLOCKS_KEPT)


def downscale(pixels: NDArray[np.uint8], resolution: int | tuple[int, int]) -> NDArray[np.uint8]:
    """The low-resolution twin of a crop, uint8 (height, width, 3).

    Bilinear with antialias, as `crop` resizes: so the twin looks like what a base model of that size is trained on.
    """
    height, width = _pair(resolution)
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _open(data: bytes) -> Image.Image:
    """The picture with its header read. Raises Unreadable."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(Reason.TOO_LARGE, _sentence(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # see decode
        if (kind := _foreign_kind(data)) is not None:
            raise Unreadable(Reason.UNSUPPORTED_FORMAT, f"{kind} is not read") from error
        raise Unreadable(Reason.UNDECODABLE, _what(data)) from error


def _check_aspect(image: Image.Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise Unreadable(Reason.BAD_ASPECT, f"{image.width} x {image.height} is longer than {MAX_ASPECT} to 1")


def _is_animated(image: Image.Image) -> bool:
    """Whether frames follow the first. A phone's JPEG with a second view (MPO) is no animation."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # as above; what follows the first frame is broken, and not asked for
        return False


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says. A broken EXIF block turns nothing: the pixels are sound."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # any parser error, as above
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else _transposed(image, turn)


def _transposed(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    turned = image.transpose(turn)
    turned.info = dict(image.info)  # colour profile and transparency
    return turned


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """The picture resized so that it just covers height x width; the long side is rounded down, as in torchvision."""
    if image.height * width < image.width * height:  # wider than the target
        size = (max(width, image.width * height // image.height), height)
    else:
        size = (width, max(height, image.height * width // image.width))
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _pair(resolution: int | tuple[int, int]) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def _foreign_kind(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"heic": "HEIC", b"mif1": "HEIF"}.get(data[8:12], "a video or HEIF file")
    start = data[:64].lstrip()
    return next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), None)


def _what(data: bytes) -> str:
    return f"{len(data)} bytes that begin with {data[:12]!r} are no picture" if data else "the file is empty"


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
