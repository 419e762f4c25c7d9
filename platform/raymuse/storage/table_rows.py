"""Rows of a table (Parquet, Arrow, a Hugging Face data set): which columns hold what, and each row to a picture."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raymuse.config.errors import UserError
from raymuse.storage import sources
from raymuse.storage.captions import clean_captions
from raymuse.storage.entries import check_picture_size
from raymuse.storage.rejects import Reason, Reject, Unreadable, printable
from raymuse.storage.rows import Picture, Reading, Shard

IMAGE_COLUMNS = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes", "img_bytes", "bytes"),
    *("image_path", "img_path", "path", "file_name", "filename", "file"),
)
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "prompt", "description")
KEY_COLUMNS = ("key", "__key__", "id")
ROWS_AT_ONCE = 64  # whose captions and metadata are Python objects at a time; pictures are one at a time

_PICTURES = "bytes, {bytes, path} or addresses of picture files"
_TEXTS = "text, or lists of text"


@dataclass(frozen=True)
class Columns:
    """Names of the columns: of the picture, its captions, its key where there is one, and what becomes metadata."""

    image: str
    caption: str
    key: str | None
    metadata: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [self.image, self.caption, *([self.key] if self.key else []), *self.metadata]


def choose_columns(schema: pa.Schema, reading: Reading, where: str) -> Columns:
    """The columns that `reading` names, or else those under the usual names, of a fitting type.

    A struct of bytes is taken for the picture whatever its name, where it is the only one. Metadata are the other
    columns of numbers, booleans and text.

    Args:
        where: the file or data set, for messages.

    Raises:
        UserError: there is no such column; the message names those that there are.
    """
    structs = [column.name for column in schema if _is_picture_struct(column.type)]
    usual = (*IMAGE_COLUMNS, *(structs if len(structs) == 1 else ()))
    image = _find(schema, reading.image_column, usual, _holds_picture, ("image_column", _PICTURES), where)
    caption = _find(schema, reading.caption_column, CAPTION_COLUMNS, _holds_caption, ("caption_column", _TEXTS), where)
    key = next((name for name in KEY_COLUMNS if name in schema.names and _holds_key(schema.field(name).type)), None)
    taken = {image, caption, key}
    metadata = (column.name for column in schema if column.name not in taken and _holds_fact(column.type))
    return Columns(image, caption, key, tuple(metadata))


@dataclass
class TableReader:
    """Turns the batches of one shard into rows; a key that came before in it is refused.

    Args:
        columns: of every batch.
        source: name of the shard.
        folder: what paths of pictures are relative to.
        stem: begins the keys of rows that have none of their own: STEM-ROWNUMBER.
    """

    columns: Columns
    reading: Reading
    source: str
    folder: str
    stem: str
    _keys: set[str] = field(default_factory=set)

    @classmethod
    def of_file(cls, shard: Shard, columns: Columns, reading: Reading) -> "TableReader":
        """Paths are relative to the file's folder, and keys begin with its name."""
        folder, _, base = shard.address.rpartition("/")
        return cls(columns, reading, shard.name, folder, base.rpartition(".")[0])

    def rows(self, batch: pa.RecordBatch, first_row: int) -> Iterator[Picture | Reject]:
        """The rows of a batch; `first_row` is the number of its first in the file. Raises OSError for a network."""
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            piece = batch.slice(start, ROWS_AT_ONCE)
            keys = self._keys_of(piece, first_row + start)
            captions = _plain_texts(piece.column(self.columns.caption))
            facts = {name: _plain_facts(piece.column(name)) for name in self.columns.metadata}
            for row, key in enumerate(keys):
                metadata = {name: values[row] for name, values in facts.items() if _is_known(values[row])}
                try:
                    yield self._picture(key, piece.column(self.columns.image)[row], captions[row], metadata)
                except Unreadable as error:
                    yield Reject(self.source, key, error.reason, error.detail)

    def _picture(self, key: str, image: pa.Scalar, captions: list[bytes], metadata: dict[str, Any]) -> Picture:
        """Raises Unreadable."""
        if key in self._keys:
            raise Unreadable(Reason.DUPLICATE_KEY, "its key came before in this shard; the first is kept")
        self._keys.add(key)
        data = _bytes_or_path(image)
        if not data:
            raise Unreadable(Reason.NO_PICTURE, f"the column {self.columns.image!r} is empty here")
        said = clean_captions(captions, self.reading, f"the column {self.columns.caption!r} is empty here")
        if isinstance(data, str):
            data = self._read(data)
        check_picture_size(len(data))
        return Picture(key, data, said.texts, metadata, said.notes)

    def _read(self, path: str) -> bytes:
        """A picture that the table names. Raises Unreadable, OSError."""
        address = path if path.startswith("/") or "://" in path else sources.join(self.folder, path)
        if "\0" in path:
            raise Unreadable(Reason.UNREADABLE, f"no file can be called {path!r}")
        try:
            check_picture_size(sources.size_of(address))
            return sources.read_bytes(address)
        except OSError as error:
            if not sources.is_final(error, address):
                raise
            raise Unreadable(Reason.UNREADABLE, str(error)) from error

    def _keys_of(self, piece: pa.RecordBatch, first_row: int) -> list[str]:
        own = _plain_facts(piece.column(self.columns.key)) if self.columns.key else [None] * piece.num_rows
        return [
            printable(f"{self.stem}-{first_row + row:06d}" if key in (None, "") else str(key))
            for row, key in enumerate(own)
        ]


def is_damage(error: Exception) -> bool:
    """Whether Arrow says that the bytes of a file are wrong, rather than that they could not be fetched."""
    if isinstance(error, MemoryError):  # pa.ArrowMemoryError
        return False
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _find(
    schema: pa.Schema,
    named: str | None,
    usual: tuple[str, ...],
    fits: Callable[[pa.DataType], bool],
    option: tuple[str, str],
    where: str,
) -> str:
    """The column named, or else the first usual one that fits; `option` says how to name it, and what it holds."""
    there = f"it has {', '.join(schema.names) or 'none'}"
    if named is None:
        spelled: dict[str, str] = {name.lower(): name for name in reversed(schema.names)}
        for name in (spelled.get(name.lower()) for name in usual):
            if name is not None and fits(schema.field(name).type):
                return name
        raise UserError(f"{where} has no column of {option[1]} under a usual name; {there}. Name one: {option[0]}=...")
    if named not in schema.names:
        raise UserError(f"{where} has no column {named!r} ({option[0]}); {there}.")
    if not fits(schema.field(named).type):
        kind = schema.field(named).type
        raise UserError(f"{where}: the column {named!r} ({option[0]}) holds {kind}, and not {option[1]}; {there}.")
    return named


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    kind = _value_type(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_picture_struct(kind: pa.DataType) -> bool:
    """Hugging Face's {bytes, path}; one of them may be missing, or null in every row."""
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    return any(name in fields and fits(fields[name]) for name, fits in (("bytes", _is_bytes), ("path", _is_text)))


def _holds_picture(kind: pa.DataType) -> bool:
    return _is_bytes(kind) or _is_text(kind) or _is_picture_struct(kind)


def _holds_caption(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_list(kind) else kind
    return _is_text(kind) or _is_bytes(kind)


def _holds_key(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


def _holds_fact(kind: pa.DataType) -> bool:
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return bool(number) or _is_text(kind)


def _bytes_or_path(image: pa.Scalar) -> bytes | str | None:
    """What the cell holds: the picture's bytes, or else its path. Raises Unreadable."""
    if not image.is_valid:
        return None
    if pa.types.is_struct(image.type):
        cells = [image[name] for name in ("bytes", "path") if image.type.get_field_index(name) >= 0]
        return next((_bytes_or_path(cell) for cell in cells if cell.is_valid), None)
    try:
        value: bytes | str = image.as_py()
    except UnicodeDecodeError as error:
        raise Unreadable(Reason.UNREADABLE, "the path of the picture is not UTF-8") from error
    return value


def _undecoded(column: pa.Array) -> pa.Array:
    """Text as bytes: Arrow does not check it, and one value that is not UTF-8 should cost only its row."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())


def _plain_texts(column: pa.Array) -> list[list[bytes]]:
    """The captions of every row."""
    if not _is_list(column.type):
        return [[] if value is None else [value] for value in _undecoded(column).to_pylist()]
    values = _undecoded(column.flatten()).to_pylist()  # flatten leaves out the items of null lists
    counts = column.value_lengths().to_pylist()
    texts, start = [], 0
    for count in (count or 0 for count in counts):
        texts.append([value for value in values[start : start + count] if value is not None])
        start += count
    return texts


def _plain_facts(column: pa.Array) -> list[Any]:
    if not _is_text(column.type):
        return list(column.to_pylist())
    values = _undecoded(column).to_pylist()
    return [None if value is None else printable(value.decode("utf-8", "surrogateescape")) for value in values]


def _is_known(value: object) -> bool:
    """Neither null nor NaN, which is how pandas writes a number that is not there."""
    return value is not None and value == value
