"""From what a tar or a folder holds of a picture to its entry: sizes checked, metadata merged, captions chosen."""

from collections.abc import Mapping
from typing import Any

from raymuse.storage.captions import choose_captions, parse_metadata
from raymuse.storage.rejects import Reason, Unreadable
from raymuse.storage.rows import Entry, Reading
from raymuse.storage.tar_scan import Span

MAX_PICTURE_BYTES = 256 << 20
MAX_TEXT_BYTES = 16 << 20


def make_entry(
    key: str,
    text: bytes | None,
    fields: bytes | None,
    more: Mapping[str, Any],
    spare: tuple[str, ...],
    address: str,
    span: Span,
    reading: Reading,
) -> Entry:
    """The entry of a picture.

    Args:
        text: its .txt, where there is one.
        fields: its .json, where there is one.
        more: metadata of a table, under that of the .json.
        spare: captions of a table, or of the file name.
        address, span: where its bytes lie.

    Raises:
        Unreadable: the picture is too large, or has no usable caption or metadata.
    """
    check_picture_size(span.size)
    metadata = {**more, **(parse_metadata(fields, reading) if fields is not None else {})}
    captions = choose_captions(text, metadata, spare, reading)
    taken = ("caption", "captions", reading.caption_column)
    kept = {name: value for name, value in metadata.items() if name not in taken}
    return Entry(key, captions.texts, kept, address, span, captions.notes)


def check_picture_size(size: int) -> None:
    """Raise Unreadable for a file of more bytes than are read into memory."""
    if size > MAX_PICTURE_BYTES:
        raise Unreadable(Reason.TOO_LARGE, f"the file has {size} bytes; at most {MAX_PICTURE_BYTES} are read")
