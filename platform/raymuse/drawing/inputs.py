"""Pictures and masks as people hand them over: Pillow's, arrays, or paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from raymuse.config.errors import UserError
from raymuse.encoding.pictures import crop, decode
from raymuse.storage.rejects import Unreadable

PictureLike = Image.Image | NDArray[Any] | str | Path
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def read_picture(given: PictureLike) -> Pixels:
    """A picture as uint8 (H, W, 3): upright, sRGB, transparency over white.

    Args:
        given: Pillow's picture, an array uint8 (H, W, 3) or (H, W), or the path of a file.

    Raises:
        UserError: for a file that is missing or no picture, and an array of another kind.
    """
    if isinstance(given, str | Path):
        return np.asarray(_read_file(Path(given)))
    if isinstance(given, Image.Image):
        upright = ImageOps.exif_transpose(given)
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return np.asarray(upright.convert("RGB"))
    array = np.asarray(given)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise UserError(f"a picture of {array.dtype} {array.shape}: arrays must be uint8 (H, W, 3), RGB, or (H, W)")
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array


def read_mask(given: PictureLike) -> Mask:
    """A mask as bool (H, W): True (white) is to be drawn anew.

    Args:
        given: Pillow's picture or a file, of which light pixels (128 and above of 255) are white; a bool or uint8
            array (H, W).

    Raises:
        UserError: as `read_picture`, and for a mask that marks nothing.
    """
    if isinstance(given, np.ndarray) and given.dtype == np.bool_:
        mask = given
    else:
        mask = np.asarray(Image.fromarray(read_picture(given)).convert("L")) >= 128
    if mask.ndim != 2:
        raise UserError(f"a mask of shape {mask.shape}: it must be (H, W)")
    if not mask.any():
        raise UserError("the mask marks nothing: what is to be drawn anew must be white (True)")
    return mask


def fit(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resized (bilinear) so that it covers (width, height), and cut to it in the middle."""
    if pixels.shape[1::-1] == size:
        return pixels
    try:
        return crop(Image.fromarray(pixels), (size[1], size[0])).pixels
    except Unreadable as error:
        raise UserError(f"a picture of {pixels.shape[1]} x {pixels.shape[0]} pixels: {error.detail}") from error


def fit_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """The mask, resized and cut as `fit` does with its picture."""
    return fit(np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8) * 255, size)[:, :, 0] >= 128


def grown(pixels: Pixels, sides: Sequence[int]) -> tuple[Pixels, Mask]:
    """A canvas (left, top, right, bottom) pixels larger, its border repeated outwards; and the mask of what is new."""
    left, top, right, bottom = sides
    around = ((top, bottom), (left, right))
    mask = np.pad(np.zeros(pixels.shape[:2], dtype=bool), around, constant_values=True)
    return np.pad(pixels, (*around, (0, 0)), mode="edge"), mask


def _read_file(path: Path) -> Image.Image:
    if not path.is_file():
        raise UserError(f"the picture {path} does not exist.")
    try:
        return decode(path.read_bytes())
    except Unreadable as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error
