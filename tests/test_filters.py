"""Filters: each one, what counts as unknown, and which reasons are the user's wish."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from raymuse.config.pretokenize import FilterConfig
from raymuse.encoding.filters import AESTHETIC, check_metadata, check_size, fitting_captions, number, original_size
from raymuse.storage.rejects import Reason, Unreadable

UNKNOWN: list[dict[str, Any]] = [
    {}, {"aesthetic": None}, {"aesthetic": math.nan}, {"aesthetic": "nan"}, {"aesthetic": math.inf},
    {"aesthetic": ""}, {"aesthetic": "good"}, {"aesthetic": [6.0]}, {"aesthetic": 10**400}, {"aesthetic": "1e400"},
]  # fmt: skip


def refusal(check: Callable[[], None]) -> Reason | None:
    """The reason of a check that refuses, None of one that does not."""
    try:
        check()
    except Unreadable as error:
        return error.reason if error.detail and error.reason.is_filter else None
    return None


def said_of(metadata: dict[str, Any], **filters: Any) -> Reason | None:
    return refusal(lambda: check_metadata(metadata, FilterConfig(**filters)))


def said_of_size(width: int, height: int, **filters: Any) -> Reason | None:
    return refusal(lambda: check_size((width, height), FilterConfig(**filters)))


@pytest.mark.parametrize(
    ("asked", "name", "kept", "refused", "reason"),
    [
        ({"min_aesthetic": 5.0}, "aesthetic", 5.0, 4.99, Reason.LOW_AESTHETIC),
        ({"min_aesthetic": 5.0}, "aesthetic_score", 7, 4, Reason.LOW_AESTHETIC),
        ({"min_aesthetic": 5.0}, "AESTHETIC_SCORE", "5.5", " 4.5 ", Reason.LOW_AESTHETIC),
        ({"min_aesthetic": 0.0}, "aesthetic", 0, -0.1, Reason.LOW_AESTHETIC),
        ({"max_watermark": 0.5}, "pwatermark", 0.5, 0.51, Reason.WATERMARK),
        ({"max_watermark": 0.0}, "watermark", False, True, Reason.WATERMARK),
        ({"max_unsafe": 0.1}, "punsafe", 0.0, "0.2", Reason.UNSAFE),
        ({"max_unsafe": 0.1}, "unsafe", 0.1, 1, Reason.UNSAFE),
        ({"languages": ("en", "de")}, "language", "en", "fr", Reason.LANGUAGE),
        ({"languages": ("en", "de")}, "LANGUAGE", "DE", "nolang", Reason.LANGUAGE),
        ({"languages": ("en",)}, "lang", "en_GB", "eng", Reason.LANGUAGE),
        ({"languages": ("en-US",)}, "language", "en-us", "en", Reason.LANGUAGE),
    ],
)
def test_each_filter(asked: dict[str, Any], name: str, kept: Any, refused: Any, reason: Reason) -> None:
    assert said_of({name: kept}, **asked) is None
    assert said_of({name: refused}, **asked) is reason
    assert said_of({name: refused}) is None  # nobody asked
    assert said_of({}, **asked) is None
    assert said_of({}, **asked, unknown="drop") is Reason.FILTERED_UNKNOWN
    assert said_of({name: kept}, **asked, unknown="drop") is None
    assert said_of({}, unknown="drop") is None


@pytest.mark.parametrize("metadata", UNKNOWN)
def test_what_counts_as_unknown(metadata: dict[str, Any]) -> None:
    assert number(metadata, AESTHETIC) is None
    assert said_of(metadata, min_aesthetic=5.0) is None
    assert said_of(metadata, min_aesthetic=5.0, unknown="drop") is Reason.FILTERED_UNKNOWN
    assert number({**metadata, "AESTHETIC_SCORE": 5.5}, AESTHETIC) == 5.5  # the next field that says it


@pytest.mark.parametrize("language", [None, "", "  ", math.nan, 3])
def test_an_unknown_language(language: Any) -> None:
    assert said_of({"language": language}, languages=("en",)) is None
    assert said_of({"language": language}, languages=("en",), unknown="drop") is Reason.FILTERED_UNKNOWN
    assert said_of({"language": language, "lang": "fr"}, languages=("en",)) is Reason.LANGUAGE


def test_the_size() -> None:
    assert said_of_size(1, 1) is None
    assert said_of_size(64, 63, min_side=64) is Reason.TOO_SMALL
    assert said_of_size(64, 64, min_side=64) is None
    assert said_of_size(300, 100, max_aspect=3) is None
    assert said_of_size(301, 100, max_aspect=3) is Reason.FILTERED_ASPECT
    assert said_of_size(100, 301, max_aspect=3) is Reason.FILTERED_ASPECT
    assert said_of_size(1, 4000) is None  # nobody asked: whether it can be used is the picture's own matter


def test_the_size_before_any_resize() -> None:
    assert original_size({"original_width": 640, "original_height": "480"}) == (640, 480)
    assert original_size({"original_width": 640.0, "original_height": 480.0}) == (640, 480)
    broken = (None, 0, -5, 0.5, math.nan, math.inf, 2**31, "", "wide", 10**400)
    for value in broken:
        assert original_size({"original_width": value, "original_height": 480}) is None, value
        assert original_size({"original_width": 640, "original_height": value}) is None, value
    assert original_size({"original_width": 640}) is None


def test_captions_are_left_out_one_by_one() -> None:
    captions = ("cat", "a cat on a chair", "c" * 100)
    assert fitting_captions(captions, FilterConfig()) == captions
    assert fitting_captions(captions, FilterConfig(min_caption=4)) == captions[1:]
    assert fitting_captions(captions, FilterConfig(max_caption=16)) == captions[:2]
    assert fitting_captions(captions, FilterConfig(min_caption=4, max_caption=99)) == captions[1:2]
    assert fitting_captions(("猫が好き",), FilterConfig(min_caption=4, max_caption=4)) == ("猫が好き",)  # not bytes
    for refused in (captions, captions[:1]):
        with pytest.raises(Unreadable) as raised:
            fitting_captions(refused, FilterConfig(min_caption=101))
        assert raised.value.reason is Reason.CAPTION_LENGTH


def test_the_prefix_does_not_make_a_caption_longer() -> None:
    captions = ("a photo of cat", "a photo of a cat on a chair")
    assert fitting_captions(captions, FilterConfig(min_caption=4), "a photo of ") == captions[1:]


def test_faults_and_wishes() -> None:
    wishes = {reason for reason in Reason if reason.is_filter}
    assert wishes == {
        Reason.TOO_SMALL, Reason.FILTERED_ASPECT, Reason.LOW_AESTHETIC, Reason.WATERMARK, Reason.UNSAFE,
        Reason.LANGUAGE, Reason.CAPTION_LENGTH, Reason.FILTERED_UNKNOWN, Reason.DUPLICATE_PICTURE,
        Reason.NEAR_DUPLICATE,
    }  # fmt: skip
    assert not Reason.BAD_ASPECT.is_filter
