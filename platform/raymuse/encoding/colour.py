"""Any of Pillow's picture modes to 8-bit sRGB.

Pillow 12's own `convert("RGB")` clips 16-bit grey to white and float TIFF to black, ignores colour profiles, and
shows what lies under transparent pixels.
"""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from raymuse.storage.rejects import Reason, Unreadable

_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_FULL_SCALES = {"I": (65535.0, 2147483647.0), "F": (1.0, 255.0, 65535.0)}
_TIFF_PHOTOMETRIC = 262


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, tuple[str, ...]]:
    """A loaded picture of any mode as mode RGB in sRGB, its transparent pixels over `background`; and what was noticed.

    Noticed are `icc_converted` (its colours went through its own profile) and `cmyk_without_profile` (ink without a
    usable profile: the colours are only about right).

    Raises:
        Unreadable: values without a known full scale.
    """
    profile = image.info.get("icc_profile")
    if image.mode in _DEEP:
        image = _eight_bit(image)
    if image.has_transparency_data:
        whole = image if image.mode == "RGBA" else image.convert("RGBA")
        opaque, noticed = _srgb(whole.convert("RGB"), profile)
        flat = Image.new("RGB", image.size, background)
        flat.paste(opaque, mask=whole.getchannel("A"))
        return flat, noticed
    return _srgb(image, profile)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as 8-bit grey, with its transparent value, where it has one, as alpha.

    16 bits have the full scale 65535. 32 bits and floats carry no full scale: the least usual one that holds the
    largest value is taken (65535 or 2^31 - 1; 1, 255 or 65535). Values that are not finite count as 0.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    scales = _FULL_SCALES.get(image.mode, (65535.0,))
    peak = float(values.max(initial=0.0))
    scale = next((scale for scale in scales if peak <= scale), None)
    if scale is None:
        raise Unreadable(Reason.UNSUPPORTED_FORMAT, f"grey values up to {peak:g} have no known full scale")
    grey: NDArray[np.uint8] = np.clip(values * (255.0 / scale) + 0.5, 0, 255).astype(np.uint8)
    if _white_is_zero(image):
        grey = 255 - grey
    result = Image.fromarray(grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a deep TIFF counts from white to black; Pillow turns only its 8-bit ones."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(_TIFF_PHOTOMETRIC) == 0


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture without transparency as sRGB, through its colour profile where that is sound and fits the mode."""
    if image.mode in ("P", "PA", "1", "LA", "RGBX"):
        image = image.convert("RGB")
    if profile is not None or image.mode == "LAB":
        transform = _transform(None if image.mode == "LAB" else profile, image.mode)
        if transform is not None:
            return transform.apply(image), () if image.mode == "LAB" else ("icc_converted",)
    if image.mode == "RGB":
        return image, ()
    return image.convert("RGB"), ("cmyk_without_profile",) if image.mode == "CMYK" else ()


@lru_cache(maxsize=64)  # building one takes milliseconds, and a data set has a handful
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile (None: LAB) to sRGB; None where nothing is to be done, or the profile is broken or misfits."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        if profile and mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
