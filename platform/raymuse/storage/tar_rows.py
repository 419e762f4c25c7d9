"""WebDataset tars, in img2dataset's layout, as shards and rows."""

from collections.abc import Callable, Iterator, Sequence
from typing import IO, TypeVar

from raymuse.storage import sources
from raymuse.storage.entries import MAX_TEXT_BYTES, make_entry
from raymuse.storage.image_folder import FOREIGN_ENDINGS, PICTURE_ENDINGS
from raymuse.storage.places import Place, ending_of
from raymuse.storage.rejects import Reason, Reject, Unreadable
from raymuse.storage.rows import Entry, Picture, Reading, Shard
from raymuse.storage.tar_scan import Span, TarSample, scan_tar

Row = TypeVar("Row")


def list_shards(place: Place, images_per_shard: int, reading: Reading) -> list[Shard]:
    """Every tar is a shard; other files beside the tars (img2dataset's tables) are left alone."""
    return [Shard(name, place.within(name), "tar") for name in place.files if ending_of(name) == "tar"]


def read_shard(shard: Shard, reading: Reading) -> Iterator[Picture | Reject]:
    return _rows(shard, reading, lambda entry, stream: entry.picture(_bytes(stream, entry.span)))


def read_entries(shard: Shard, reading: Reading) -> Iterator[Entry | Reject]:
    return _rows(shard, reading, lambda entry, stream: entry)


def count_rows(shards: Sequence[Shard], reading: Reading) -> int:
    """An estimate: the samples of the first tar that has any, scaled by bytes."""
    for shard in shards:
        count = sum(1 for row in read_entries(shard, reading) if row.key)
        if count:
            sizes = [sources.size_of(other.address) for other in shards]
            return round(count * sum(sizes) / sources.size_of(shard.address))
    return 0


def _rows(shard: Shard, reading: Reading, row_of: Callable[[Entry, IO[bytes]], Row]) -> Iterator[Row | Reject]:
    """Every row of the tar, made of its entry and the open tar, which holds its bytes."""
    try:
        stream = sources.open_seekable(shard.address)
    except OSError as error:
        if not sources.is_final(error, shard.address):
            raise
        yield Reject(shard.name, "", Reason.SHARD_UNREADABLE, str(error))
        return
    with stream:
        scan = scan_tar(stream)
        for sample in scan.samples:
            try:
                row = row_of(_entry(shard, sample, stream, reading), stream)
            except Unreadable as error:
                yield Reject(shard.name, sample.key, error.reason, error.detail)
            else:
                yield row
        for damage in scan.damages:
            yield Reject(shard.name, "", damage.reason, damage.detail)


def _entry(shard: Shard, sample: TarSample, stream: IO[bytes], reading: Reading) -> Entry:
    """Raises Unreadable where the sample has no usable picture or caption."""
    if sample.repeated:
        raise Unreadable(Reason.DUPLICATE_KEY, "its key came before in this shard; the first is kept")
    if sample.cut:
        raise Unreadable(Reason.TRUNCATED, "the tar ends inside this sample; what came after it is lost")
    ending = next((ending for ending in PICTURE_ENDINGS if ending in sample.members), None)
    if ending is None:
        raise _no_picture(sample)
    text, fields = (_text(stream, sample.members.get(name)) for name in ("txt", "json"))
    return make_entry(sample.key, text, fields, {}, (), shard.address, sample.members[ending], reading)


def _no_picture(sample: TarSample) -> Unreadable:
    endings = [*sample.members, *sample.links]
    foreign = [ending for ending in endings if ending in FOREIGN_ENDINGS]
    if foreign:
        return Unreadable(Reason.UNSUPPORTED_FORMAT, f".{foreign[0]} is not read")
    there = ", ".join(f".{ending}" if ending else "a file without an ending" for ending in endings)
    hint = "; a link holds no bytes" if sample.links else "; a key ends at the first dot of the file name"
    return Unreadable(Reason.NO_PICTURE, f"the key has only {there}{hint}")


def _text(stream: IO[bytes], span: Span | None) -> bytes | None:
    if span is None:
        return None
    if span.size > MAX_TEXT_BYTES:
        raise Unreadable(
            Reason.TOO_LARGE, f"a caption or .json has {span.size} bytes; at most {MAX_TEXT_BYTES} are read"
        )
    return _bytes(stream, span)


def _bytes(stream: IO[bytes], span: Span) -> bytes:
    stream.seek(span.offset)
    return stream.read(span.size)
