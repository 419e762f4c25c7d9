"""What the config's filters leave out, by what is known of a picture before one of its pixels is decoded.

A check raises Unreadable with a reason that is a filter's (`Reason.is_filter`), and returns nothing where all is well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from raymuse.config.pretokenize import FilterConfig
from raymuse.encoding.pictures import MAX_ASPECT
from raymuse.storage.rejects import Reason, Unreadable

AESTHETIC = ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE")
WATERMARK = ("pwatermark", "watermark")
UNSAFE = ("punsafe", "unsafe")
LANGUAGE = ("language", "LANGUAGE", "lang")
_LARGEST = 3.4e38  # of float32, which the token shards hold
_LONGEST = 2**31 - 1  # pixels of a side, for the same reason


def check_metadata(metadata: Mapping[str, Any], filters: FilterConfig) -> None:
    """Scores and language, where a filter asks for them.

    Raises:
        Unreadable: LOW_AESTHETIC, WATERMARK, UNSAFE, LANGUAGE; FILTERED_UNKNOWN where the metadata does not say and
            `filters.unknown` is "drop".
    """
    if (least := filters.min_aesthetic) is not None:
        score = number(metadata, AESTHETIC)
        _check_known(score, "aesthetic score", filters)
        if score is not None and score < least:
            raise Unreadable(Reason.LOW_AESTHETIC, f"the aesthetic score is {score}; min_aesthetic is {least}")
    if (most := filters.max_watermark) is not None:
        score = number(metadata, WATERMARK)
        _check_known(score, "pwatermark", filters)
        if score is not None and score > most:
            raise Unreadable(Reason.WATERMARK, f"pwatermark is {score}; max_watermark is {most}")
    if (most := filters.max_unsafe) is not None:
        score = number(metadata, UNSAFE)
        _check_known(score, "punsafe", filters)
        if score is not None and score > most:
            raise Unreadable(Reason.UNSAFE, f"punsafe is {score}; max_unsafe is {most}")
    if filters.languages:
        language = _language(metadata)
        _check_known(language, "language", filters)
        if language is not None and not any(_speaks(language, code) for code in filters.languages):
            raise Unreadable(Reason.LANGUAGE, f"the language is {language}, not {' or '.join(filters.languages)}")


def check_size(size: tuple[int, int], filters: FilterConfig) -> None:
    """(width, height) in pixels, before any resize. Raises Unreadable: TOO_SMALL, FILTERED_ASPECT."""
    width, height = size
    if min(size) < filters.min_side:
        raise Unreadable(Reason.TOO_SMALL, f"{width} x {height} has a side below min_side, {filters.min_side} pixels")
    asked = filters.max_aspect < MAX_ASPECT  # above, the picture itself is no longer than that, or refused for it
    if asked and max(size) > filters.max_aspect * min(size):
        detail = f"{width} x {height} is longer than max_aspect, {filters.max_aspect:g} to 1"
        raise Unreadable(Reason.FILTERED_ASPECT, detail)


def fitting_captions(captions: tuple[str, ...], filters: FilterConfig, prefix: str = "") -> tuple[str, ...]:
    """The captions within the bounds of length, counted in characters without the prefix that all of them have.

    Raises:
        Unreadable: CAPTION_LENGTH where none is left.
    """
    most = filters.max_caption
    lengths = [len(caption.removeprefix(prefix)) for caption in captions]
    fitting = tuple(
        caption
        for caption, length in zip(captions, lengths, strict=True)
        if length >= filters.min_caption and (most is None or length <= most)
    )
    if not fitting:
        bounds = f"at least {filters.min_caption}" + (f" and at most {most}" if most is not None else "")
        what = f"the caption has {lengths[0]} characters" if len(lengths) == 1 else "no caption has a fitting length"
        raise Unreadable(Reason.CAPTION_LENGTH, f"{what}; {bounds} are asked for")
    return fitting


def number(metadata: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """The first of the fields that is a finite number, or the text of one. None: unknown, as NaN and null are."""
    for name in names:
        try:
            value = float(metadata[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if abs(value) <= _LARGEST:
            return value
    return None


def original_size(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) in pixels before any earlier resize; None where the metadata does not say both."""
    width, height = (number(metadata, (name,)) for name in ("original_width", "original_height"))
    if width is None or height is None or min(width, height) < 1 or max(width, height) > _LONGEST:
        return None
    return int(width), int(height)


def _check_known(value: object, name: str, filters: FilterConfig) -> None:
    if value is None and filters.unknown == "drop":
        raise Unreadable(Reason.FILTERED_UNKNOWN, f"the metadata says no {name}, and `unknown` is drop")


def _language(metadata: Mapping[str, Any]) -> str | None:
    for name in LANGUAGE:
        value = metadata.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def _speaks(language: str, code: str) -> bool:
    """Whether a language tag is of a code, in any case: en, EN, en-US and en_GB are all `en`."""
    tag, wanted = (text.lower().replace("_", "-") for text in (language, code.strip()))
    return tag == wanted or tag.startswith(f"{wanted}-")
