"""Refused input rows: every row of the input is either in a part or here, with the reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa


class Reason(StrEnum):
    """Why an input row was refused. Closed: a new reason is a new member, and stands in docs/formats.md.

    First the faults of a row, then what the user's own filters leave out (`is_filter`).
    """

    UNDECODABLE = "undecodable"  # the bytes are no picture, or a broken one
    TRUNCATED = "truncated"  # the picture, or the tar that held it, ends too early
    TOO_LARGE = "too_large"  # more pixels or bytes than allowed: a decompression bomb
    BAD_ASPECT = "bad_aspect"  # so long and thin that resizing its short side would fill the memory
    UNSUPPORTED_FORMAT = "unsupported_format"  # a picture, of a kind that we do not read
    NO_PICTURE = "no_picture"  # a caption without its picture
    NO_CAPTION = "no_caption"
    BAD_CAPTION_ENCODING = "bad_caption_encoding"  # a caption that is not UTF-8
    BAD_METADATA = "bad_metadata"  # a .json that is no JSON object
    DUPLICATE_KEY = "duplicate_key"  # the key came before, in the same shard
    UNREADABLE = "unreadable"  # one file that cannot be opened
    SHARD_DAMAGED = "shard_damaged"  # a stretch of a tar that holds no readable member
    SHARD_UNREADABLE = "shard_unreadable"  # nothing of the tar can be read
    EMPTY_PROMPT = "empty_prompt"
    BAD_PARAMETER = "bad_parameter"  # a prompt's row asks for what cannot be, such as 0 steps
    DENIED = "denied"  # the prompt has a phrase of the job's deny list
    REFUSED_PICTURE = "refused_picture"  # the job's checker refuses what was drawn
    GENERATION_FAILED = "generation_failed"  # the model failed on it; a full queue or a lost replica is tried again
    NOT_FINITE = "not_finite"  # an encoder says infinity or not-a-number of it, or more than float16 can hold

    TOO_SMALL = "too_small"  # its short side is below filters.min_side
    FILTERED_ASPECT = "filtered_aspect"  # it is longer than filters.max_aspect
    LOW_AESTHETIC = "low_aesthetic"  # its aesthetic score is below filters.min_aesthetic
    WATERMARK = "watermark"  # its pwatermark is above filters.max_watermark
    UNSAFE = "unsafe"  # its punsafe is above filters.max_unsafe
    LANGUAGE = "language"  # its language is none of filters.languages
    CAPTION_LENGTH = "caption_length"  # no caption of it is within filters.min_caption and max_caption
    FILTERED_UNKNOWN = "filtered_unknown"  # its metadata lacks what a filter asks, and filters.unknown is drop
    DUPLICATE_PICTURE = "duplicate_picture"  # a picture before it has the same pixels, and duplicates is drop
    NEAR_DUPLICATE = "near_duplicate"  # one before it has nearly the same perceptual hash, and duplicates is drop

    @property
    def is_filter(self) -> bool:
        """Whether the user's own wish left the row out: no fault, so max_reject_fraction does not count it."""
        return self in _FILTERS


_FILTERS = frozenset(
    {
        Reason.TOO_SMALL,
        Reason.FILTERED_ASPECT,
        Reason.LOW_AESTHETIC,
        Reason.WATERMARK,
        Reason.UNSAFE,
        Reason.LANGUAGE,
        Reason.CAPTION_LENGTH,
        Reason.FILTERED_UNKNOWN,
        Reason.DUPLICATE_PICTURE,
        Reason.NEAR_DUPLICATE,
    }
)


class Unreadable(Exception):  # noqa: N818 - a verdict on the data, not a failure of the program
    """One input row cannot be used; whoever walks the rows turns it into a Reject.

    Args:
        reason: the closed reason.
        detail: one sentence for people.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["Unreadable"], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Reject:
    """A refused input row.

    Args:
        source: name of the shard it came from.
        key: key of the picture; empty where a whole stretch of the shard was lost.
        reason: the closed reason.
        detail: one sentence for people.
    """

    source: str
    key: str
    reason: Reason
    detail: str


REJECTS_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("source", "key", "reason", "detail")]
)


def to_table(rejects: Iterable[Reject]) -> pa.Table:
    """Rejects as the rows of `rejects/*.parquet`, in their order."""
    rows = [
        {name: printable(getattr(reject, name)) for name in ("source", "key", "reason", "detail")} for reject in rejects
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA)


def printable(text: str) -> str:
    r"""Valid UTF-8 of a name that may not be: its odd bytes become `\udcXX`, so that names stay distinct."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")
