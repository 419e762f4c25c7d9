"""The rows of a scoring on disk: Parquet, a file a part."""

import io
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from raymuse.scoring.measures import Row
from raymuse.storage.folder import Folder
from raymuse.storage.tokens import parquet_bytes


def rows_file(part: str) -> str:
    """Name of a part's rows in the folder of a scoring."""
    return f"parts/{part}.parquet"


def rows_bytes(rows: Sequence[Row]) -> bytes:
    """The file of some rows; the judge's attributes as JSON."""
    return parquet_bytes(
        pa.Table.from_pylist([{**row, "attributes": json.dumps(row["attributes"])} for row in rows]), {}
    )


def read_rows(folder: Folder, part: str) -> list[Row]:
    """The rows of a part."""
    rows: list[Row] = pq.read_table(io.BytesIO(folder.read(rows_file(part)))).to_pylist()
    return [{**row, "attributes": json.loads(row["attributes"])} for row in rows]
