"""Token shards: the documented columns, the same bytes again, and rows read back in the order asked for."""

import io
import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.storage.manifest import Manifest
from raymuse.storage.tokens import (
    EMPTY,
    TokenStore,
    caption_id,
    captions_schema,
    fixed,
    parquet_bytes,
    tokens_schema,
)

SIZES = [3, 1, 4]
LENGTH, WIDTH, POOLED = 5, 6, 2


def image_ids(row: int) -> list[int]:
    return [(row * 1000 + place) % 65536 for place in range(6)]


def captions_of(row: int) -> list[str]:
    return [f"row {row}", "shared by all", f"row {row} again"] if row % 2 else [f"row {row}"]


def states_of(caption: str) -> NDArray[np.float16]:
    seed = int(caption_id(caption), 16) % 2**32
    return np.random.default_rng(seed).normal(size=(LENGTH * WIDTH + POOLED)).astype(np.float16)


def token_table(rows: range, low: bool = True) -> pa.Table:
    schema = tokens_schema((2, 3), (1, 2) if low else None)
    columns = {
        "key": [f"key-{row}" for row in rows],
        "image_ids": [image_ids(row) for row in rows],
        "height": [2 for _ in rows],
        "width": [3 for _ in rows],
        "low_ids": [[row, 65535] for row in rows],
        "low_height": [1 for _ in rows],
        "low_width": [2 for _ in rows],
        "caption_ids": [[caption_id(caption) for caption in captions_of(row)] for row in rows],
        "original_width": [640 + row for row in rows],
        "original_height": [480 for _ in rows],
        "crop_top": list(rows),
        "crop_left": [2 for _ in rows],
        "aesthetic": [5.5 for _ in rows],
        "flip": [bool(row % 2) for row in rows],
        "crop": [0 for _ in rows],
        "source": ["00000.tar" for _ in rows],
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)


def caption_table(captions: list[str], states: bool = True) -> pa.Table:
    schema = captions_schema(LENGTH, WIDTH if states else None, POOLED if states else None)
    said = np.stack([states_of(caption) for caption in captions])
    columns = [
        pa.array([caption_id(caption) for caption in captions]),
        pa.array(captions),
        fixed(np.array([[len(caption)] * LENGTH for caption in captions], np.int32), pa.int32()),
        fixed(np.ones((len(captions), LENGTH), bool), pa.bool_()),
    ]
    if states:
        columns += [fixed(said[:, : LENGTH * WIDTH], pa.float16()), fixed(said[:, LENGTH * WIDTH :], pa.float16())]
    return pa.Table.from_arrays(columns, schema=schema)


def write_store(address: str, *, states: bool = True, low: bool = True) -> str:
    manifest = Manifest.open(address, {"codebook_size": 65536})
    empty = parquet_bytes(caption_table([""], states), {})
    manifest.write_part(EMPTY, {f"captions/{EMPTY}.parquet": empty}, rows=0, rejects=0, source="")
    start = 0
    for number, size in enumerate(SIZES):
        rows = range(start, start + size)
        captions = list(dict.fromkeys(caption for row in rows for caption in captions_of(row)))
        files = {
            f"tokens/part-{number:06d}.parquet": parquet_bytes(token_table(rows, low), {"raymuse.vqgan": "abc"}),
            f"captions/part-{number:06d}.parquet": parquet_bytes(caption_table(captions, states), {}),
        }
        manifest.write_part(f"part-{number:06d}", files, rows=size, rejects=0, source=f"{number}.tar")
        start += size
    manifest.write_part("part-000009", {}, rows=0, rejects=4, source="all refused.tar")
    manifest.finish()
    return address


@pytest.fixture(params=["local", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return write_store(str(tmp_path / "tokens") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_plain_pyarrow_reads_the_documented_columns_and_types(tmp_path: Path) -> None:
    write_store(str(tmp_path))
    table = pq.read_table(tmp_path / "tokens" / "part-000000.parquet")
    assert table.schema.field("image_ids").type == pa.list_(pa.uint16(), 6)
    assert table.schema.field("low_ids").type == pa.list_(pa.uint16(), 2)
    assert table.schema.field("caption_ids").type == pa.list_(pa.string())
    assert table.schema.field("aesthetic").type == pa.float32()
    assert table.schema.equals(tokens_schema((2, 3), (1, 2)))
    assert table.schema.metadata[b"raymuse.vqgan"] == b"abc"
    assert table["image_ids"].to_pylist() == [image_ids(row) for row in range(3)]
    assert table.to_pylist() == token_table(range(3)).to_pylist()
    captions = pq.read_table(tmp_path / "captions" / "part-000000.parquet")
    assert captions.schema.equals(captions_schema(LENGTH, WIDTH, POOLED))
    assert captions.schema.field("text_states").type == pa.list_(pa.float16(), LENGTH * WIDTH)
    assert "text_states" not in captions_schema(LENGTH, None, None).names
    assert "low_ids" not in tokens_schema((2, 3), None).names


def test_the_same_table_gives_the_same_bytes() -> None:
    first, again = (parquet_bytes(token_table(range(50)), {"b": "2", "a": "1"}) for _ in range(2))
    assert first == again
    joined = pa.concat_tables([token_table(range(20)), token_table(range(20, 50))])
    assert parquet_bytes(joined, {"b": "2", "a": "1"}) == first  # in how many chunks it came does not show
    assert pq.read_table(io.BytesIO(first)).num_rows == 50


def test_rows_come_in_the_order_asked_for_over_all_parts(address: str) -> None:
    store = TokenStore(address, cached_parts=1)
    assert (len(store), store.sizes) == (8, SIZES)
    wanted = np.array([7, 0, 3, 4, 0, 6, 2, 5, 1])
    rows = store.rows(wanted, np.zeros(9))
    assert rows.image_ids.tolist() == [np.reshape(image_ids(row), (2, 3)).tolist() for row in wanted]
    assert rows.low_ids is not None
    assert rows.low_ids.tolist() == [[[row, 65535]] for row in wanted]
    assert rows.micro.tolist() == [[640 + row, 480, row, 2, 5.5] for row in wanted]
    assert rows.text_ids[:, 0].tolist() == [len(captions_of(row)[0]) for row in wanted]
    assert rows.image_ids.dtype == np.int64
    assert (store.grid("image_ids"), store.grid("low_ids")) == ((2, 3), (1, 2))


@pytest.mark.parametrize(("draw", "chosen"), [(0.0, 0), (0.33, 0), (0.34, 1), (0.66, 1), (0.67, 2), (1 - 1e-12, 2)])
def test_the_draw_chooses_among_a_pictures_captions(draw: float, chosen: int, tmp_path: Path) -> None:
    store = TokenStore(write_store(str(tmp_path)))
    rows = store.rows([1, 0, 5], np.array([draw, draw, draw]))
    wanted = [captions_of(1)[chosen], captions_of(0)[0], captions_of(5)[chosen]]
    said = np.stack([states_of(caption) for caption in wanted]).astype(np.float32)
    assert rows.text_states is not None
    assert rows.pooled is not None
    assert np.array_equal(rows.text_states.reshape(3, -1), said[:, : LENGTH * WIDTH])
    assert np.array_equal(rows.pooled, said[:, LENGTH * WIDTH :])


def test_the_empty_caption_is_there_with_its_states(address: str) -> None:
    empty = TokenStore(address).empty
    assert empty.keys.to_pylist() == [caption_id("")]
    assert empty.text_ids.tolist() == [[0] * LENGTH]
    assert empty.text_states is not None
    assert empty.text_states.shape == (1, LENGTH, WIDTH)
    assert np.array_equal(empty.text_states.flatten(), states_of("")[: LENGTH * WIDTH])


def test_a_store_of_text_ids_has_no_states(tmp_path: Path) -> None:
    store = TokenStore(write_store(str(tmp_path), states=False))
    assert not store.has_states
    rows = store.rows([2, 4], np.zeros(2))
    assert rows.text_states is None
    assert rows.pooled is None
    assert rows.text_ids.shape == (2, LENGTH)


def test_a_store_without_low_ids_says_how_to_get_them(tmp_path: Path) -> None:
    store = TokenStore(write_store(str(tmp_path), low=False))
    assert store.rows([0], np.zeros(1)).low_ids is None
    with pytest.raises(UserError, match="holds no low_ids: pretokenize with low_resolution="):
        store.grid("low_ids")


def test_unfinished_and_empty_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        TokenStore(str(tmp_path / "none"))
    manifest = Manifest.open(str(tmp_path / "half"), {})
    with pytest.raises(UserError, match="is not finished"):
        TokenStore(str(tmp_path / "half"))
    manifest.finish()
    with pytest.raises(UserError, match="holds no rows"):
        TokenStore(str(tmp_path / "half"))


def test_the_fingerprint_follows_the_contents_and_not_the_place(tmp_path: Path) -> None:
    first, moved = (TokenStore(write_store(str(tmp_path / name))) for name in ("a", "b"))
    other = TokenStore(write_store(str(tmp_path / "c"), low=False))
    assert first.fingerprint == moved.fingerprint != other.fingerprint
    config = tmp_path / "b" / "_manifest" / "config.json"
    config.write_text(json.dumps({"codebook_size": 8192}))
    assert TokenStore(str(tmp_path / "b")).fingerprint != first.fingerprint


def test_a_caption_id_is_the_start_of_its_sha256() -> None:
    assert caption_id("") == "e3b0c44298fc1c14"
    assert caption_id("naïve 猫") != caption_id("naive 猫")


def test_a_fixed_column_keeps_every_value_in_its_row() -> None:
    values = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    column = fixed(values[:, ::-1], pa.uint16())
    assert column.type == pa.list_(pa.uint16(), 12)
    assert column.to_pylist()[0] == values[0, ::-1].flatten().tolist()
