"""`raymuse tokens`: verify finds every kind of damage, inspect says what numpy says, and its sheet shows pictures."""

import hashlib
import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny
from raymuse.cli.app import main
from raymuse.config.errors import UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.datasets import shapes
from raymuse.encoding.chunks import Chunk, CropFacts
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import weights_sha256
from raymuse.stages.inspect_tokens import Sheet, inspect_tokens
from raymuse.storage import sources
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord, Manifest, PartRecord, read_records
from raymuse.storage.rejects import Reason, Reject
from raymuse.storage.token_check import check_tokens
from raymuse.storage.token_survey import CodeUsage, spread_rows
from raymuse.storage.tokens import EMPTY, caption_id, parquet_bytes

PARTS = 3
FIRST = "tokens/part-000000.parquet"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("encoders")
    return tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))


@pytest.fixture(scope="module")
def whole(encoders: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token shards of three parts, 16 crops each, with low ids and states."""
    root = tmp_path_factory.mktemp("whole")
    return tiny.write_tokens(root / "tokens", tiny.write_shards(root / "shards"), encoders)


@pytest.fixture
def tokens(whole: str, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "tokens")


@pytest.fixture(scope="module")
def bucketed(encoders: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bucketed(str(tmp_path_factory.mktemp("bucketed") / "tokens"), encoders)


def write_bucketed(address: str, encoders: str, finish: bool = True) -> str:
    """Two parts of two shapes each, with rejects and counts, as the stage lays them out."""
    config = PretokenizeConfig(
        input="in",
        output=address,
        vqgan=encoders,
        text_encoder=encoders,
        resolution=32,
        low_resolution=16,
        buckets=("32x32", "48x24"),
        chunk_size=8,
    )
    encoder = ChunkEncoder(config)
    facts = {
        "vqgan_sha256": weights_sha256(encoders, "vqvae"),
        "low_vqgan_sha256": None,
        "text_encoder_sha256": weights_sha256(encoders, "text_encoder"),
        "codebook_size": encoder.crops.vqgan.codes,
        "low_codebook_size": encoder.crops.low_vqgan.codes,
        "text_length": encoder.captions.text.length,
    }
    metadata = {f"raymuse.{name}": str(value) for name, value in facts.items()}
    manifest = Manifest.open(address, {**config.identity(), **facts})
    empty = parquet_bytes(encoder.captions([""]), metadata)
    manifest.write_part(EMPTY, {f"captions/{EMPTY}.parquet": empty}, rows=0, rejects=0, source="")
    for part in range(2):
        name, tables, files = f"part-{part:06d}", {}, []
        for number, shape in enumerate(config.shapes):
            pixels = [
                np.array(one.image)[: shape[0], : shape[1]]
                for one in shapes.samples(3 + number, part, max(shape), held_out=False)
            ]
            said = [
                CropFacts(f"k{number}-{row}", (f"a caption {row}",), 64, 64, 0, 0, 6.0, False, 0, f"{part}.tar")
                for row in range(len(pixels))
            ]
            reject = Reject(f"{part}.tar", f"bad{number}", Reason.TRUNCATED, "it ends too early")
            encoded = encoder(Chunk(number, shape, pixels, said, rejects=[reject]))
            tables[f"tokens/{name}-{shape[0]}x{shape[1]}.parquet"] = encoded.tokens
            tables.setdefault(f"captions/{name}.parquet", encoded.captions)
            tables[f"captions/{name}.parquet"] = max(tables[f"captions/{name}.parquet"], encoded.captions, key=len)
            tables.setdefault(f"rejects/{name}.parquet", []).append(encoded.rejects)
        tables[f"rejects/{name}.parquet"] = pa.concat_tables(tables[f"rejects/{name}.parquet"])
        for file, table in tables.items():
            data = parquet_bytes(table, metadata)
            manifest.folder.write(file, data)
            files.append(FileRecord(file, len(data), hashlib.sha256(data).hexdigest(), len(table)))
        rows = sum(len(table) for file, table in tables.items() if file.startswith("tokens/"))
        manifest.record(PartRecord(name, rows, 2, f"{part}.tar", files, {"pictures": 7.0, "animations": 1.0 + part}))
    if finish:
        manifest.finish(code_agreement=0.9951, counts={"pictures": 14.0, "animations": 3.0})
    return address


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["tokens", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code == 2 else captured.out


def problems(tokens: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The sentences of `raymuse tokens verify`, which must fail; the summary counts them."""
    lines = said(capsys, "verify", str(tokens), code=1).splitlines()
    found = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    assert lines[-1].startswith(f"{tokens}: {len(found)} problem")
    return found


def rewrite(tokens: Path, file: str, change: Callable[[pa.Table], pa.Table], rows: int | None = None) -> None:
    """Change a table and record the new file's sum, as a writer with a fault would have."""
    table = pq.read_table(tokens / file)
    data = parquet_bytes(change(table), {})
    (tokens / file).write_bytes(data)
    name = Path(file).stem
    record = read_records(Folder(str(tokens)))[name]
    kept = [one for one in record.files if one.name != file]
    new = FileRecord(file, len(data), hashlib.sha256(data).hexdigest(), rows or 0)
    changed = {**record.__dict__, "files": [one.__dict__ for one in [*kept, new]]}
    (tokens / "_manifest" / f"{name}.json").write_text(json.dumps(changed))


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


# --- verify


def test_a_whole_folder_is_one_line(whole: str, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, "verify", whole).splitlines()
    size = sum(path.stat().st_size for path in Path(whole).rglob("*.parquet"))
    captions = sum(len(pq.read_table(path)) for path in Path(whole, "captions").glob("part-*"))
    assert line == f"{whole}: whole: 3 parts, 48 crops, {captions} captions, 0 rejects, 7 files, {size:,} bytes"


def test_shapes_rejects_and_counts_are_checked_too(bucketed: str, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, "verify", bucketed).splitlines()
    assert line.startswith(f"{bucketed}: whole: 2 parts, 14 crops, 8 captions, 4 rejects, 9 files, ")


def test_an_object_store_is_read_like_a_disk(encoders: str) -> None:
    address = write_bucketed(f"memory://{uuid.uuid4().hex}", encoders)
    assert check_tokens(address).problems == []
    with fsspec.open(f"{address}/tokens/part-000001-32x32.parquet", "ab") as stream:
        stream.write(b"!")
    (problem,) = check_tokens(address).problems
    assert re.fullmatch(r"tokens/part-000001-32x32.parquet: it has \d+ bytes, and the manifest says \d+", problem)


def test_an_unfinished_folder_is_checked_as_far_as_it_is(
    encoders: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = Path(write_bucketed(str(tmp_path / "tokens"), encoders, finish=False))
    (tokens / "tokens" / "part-000002-32x32.parquet").write_bytes(b"under way")
    (tokens / "_chunks").mkdir()
    lines = said(capsys, "verify", str(tokens)).splitlines()
    assert lines[-1].startswith(f"{tokens}: not finished; whole so far: 2 parts, 14 crops")
    assert [line for line in lines if "part-000002" in line] == [
        "  (left over, read by nobody: tokens/part-000002-32x32.parquet)"
    ]
    (tokens / "captions" / "part-000000.parquet").unlink()
    assert problems(tokens, capsys) == ["captions/part-000000.parquet: it is missing"]


def test_every_damaged_file_is_named_not_only_the_first(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flipped = bytearray((tokens / FIRST).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tokens / FIRST).write_bytes(flipped)
    (tokens / "captions" / "part-000001.parquet").unlink()
    cut = tokens / "tokens" / "part-000002.parquet"
    cut.write_bytes(cut.read_bytes()[:-5])
    size = cut.stat().st_size
    (tokens / "tokens" / "part-000007.parquet").write_bytes(b"")
    (tokens / "tokens" / ".part-000007.parquet.1.partial").write_bytes(b"of a killed writer")
    assert problems(tokens, capsys) == [
        "tokens/part-000000.parquet: it has changed: its sha256 is not the manifest's",
        "captions/part-000001.parquet: it is missing",
        f"tokens/part-000002.parquet: it has {size} bytes, and the manifest says {size + 5}",
        "tokens/part-000007.parquet: the manifest does not know it",
    ]


def test_counts_that_do_not_add_up_are_told(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tokens / "_manifest" / "part-000001.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "rows": 15, "rejects": 2}))
    assert problems(tokens, capsys) == [
        "part-000001: the manifest says 15 rows, and tokens/ holds 16",
        "part-000001: the manifest says 2 rejects, and rejects/ holds 0",
        "_SUCCESS: it says rows 48, and the manifest adds up to 47",
        "_SUCCESS: it says rejects 0, and the manifest adds up to 2",
    ]


def test_a_part_without_its_record_and_a_record_that_is_none_are_told(
    tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tokens / "_manifest" / "part-000001.json").write_text('{"name": "part-')
    (tokens / "_manifest" / "empty.json").unlink()
    found = problems(tokens, capsys)
    assert found[0].startswith("_manifest/part-000001.json: it cannot be read: ")
    assert found[1:] == [
        "captions/empty.parquet: the manifest does not know it",
        "_SUCCESS: it says parts 4, and the manifest adds up to 2",
        "_SUCCESS: it says rows 48, and the manifest adds up to 32",
        "tokens/part-000001.parquet: the manifest does not know it",
        "captions/empty.parquet: the manifest does not know it",
        "captions/part-000001.parquet: the manifest does not know it",
    ]


def test_rows_that_say_what_cannot_be_are_told(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.array(pq.read_table(tokens / FIRST)["image_ids"].to_pylist())
    ids[3, 5] = ids[4, 0] = tiny.CODES
    foreign = pq.read_table(tokens / FIRST)["caption_ids"].to_pylist()
    keys = pq.read_table(tokens / FIRST)["key"].to_pylist()
    foreign[2], foreign[7] = ["f" * 16], []

    def spoil(table: pa.Table) -> pa.Table:
        return with_column(with_column(table, "image_ids", ids.tolist()), "caption_ids", foreign)

    rewrite(tokens, FIRST, spoil, rows=17)
    rewrite(tokens, "tokens/part-000001.parquet", lambda table: with_column(table, "key", ["one"] * 16))
    rewrite(tokens, "tokens/part-000002.parquet", lambda table: with_column(table, "height", [*[8] * 15, 4]))
    second = pq.read_table(tokens / "tokens/part-000002.parquet")["key"].to_pylist()
    assert problems(tokens, capsys) == [
        f"{FIRST}: 2 rows: image_ids beyond the codebook of {tiny.CODES}, such as {keys[3]}",
        f"{FIRST}: 1 row: no caption, such as {keys[7]}",
        f"{FIRST}: 1 row: a caption that captions/ does not hold, such as {keys[2]}",
        f"{FIRST}: the manifest says 17 rows, and it holds 16",
        "part-000001: 1 crops stand there twice, such as one of one",
        f"tokens/part-000002.parquet: 1 row: another height than the first row's, such as {second[15]}",
    ]


def test_columns_that_are_not_the_documented_ones_are_told(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(tokens, FIRST, lambda table: table.drop_columns(["flip"]).append_column("colour", table["key"]))
    rewrite(tokens, "tokens/part-000001.parquet", lambda table: with_column(table, "width", [4] * 16))
    rewrite(tokens, "tokens/part-000002.parquet", lambda table: table.select(table.column_names[::-1]))
    rewrite(tokens, "captions/part-000002.parquet", lambda table: table.drop_columns(["pooled"]))
    assert problems(tokens, capsys) == [
        f"{FIRST}: it lacks the column flip",
        f"{FIRST}: it has a column colour that has no place there",
        "tokens/part-000001.parquet: its column image_ids is fixed_size_list<uint16>[64], and must be "
        "fixed_size_list<uint16>[32]",
        "captions/part-000002.parquet: it lacks the column pooled",
        "tokens/part-000002.parquet: its columns stand in another order",
    ]


def test_captions_are_held_against_their_ids(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = "captions/part-000000.parquet"
    rows = pq.read_table(tokens / file)
    captions = ["another text", *rows["caption"].to_pylist()[1:]]
    rewrite(tokens, file, lambda table: with_column(table, "caption", captions))
    rewrite(tokens, "captions/part-000001.parquet", lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    twice = pq.read_table(tokens / "captions/part-000001.parquet")["caption_id"][0].as_py()
    rewrite(tokens, "captions/empty.parquet", lambda table: table.slice(0, 0))
    assert problems(tokens, capsys) == [
        "captions/empty.parquet: it must hold the empty caption, and nothing else",
        f"{file}: 1 row: its caption_id is not its caption's sha256, such as {rows['caption_id'][0].as_py()}",
        f"part-000001: 1 captions stand there twice, such as {twice}",
    ]


def test_files_of_other_encoders_and_no_parquet_at_all(bucketed: str, tmp_path: Path) -> None:
    tokens = shutil.copytree(bucketed, tmp_path / "tokens")
    config = json.loads((tokens / "_manifest/config.json").read_text())
    (tokens / "_manifest/config.json").write_text(json.dumps({**config, "vqgan_sha256": "b" * 64}))
    found = check_tokens(str(tokens)).problems
    assert len(found) == 9
    assert found[0].endswith(f"it was made with vqgan_sha256 {config['vqgan_sha256']}, and the folder with {'b' * 64}")

    (tokens / "_manifest/config.json").write_text(json.dumps(config))
    (tokens / "rejects/part-000000.parquet").write_bytes(b"no table")
    record = json.loads((tokens / "_manifest/part-000000.json").read_text())
    (file,) = [file for file in record["files"] if file["name"].startswith("rejects/")]
    file |= {"size": 8, "sha256": hashlib.sha256(b"no table").hexdigest()}
    (tokens / "_manifest/part-000000.json").write_text(json.dumps(record))
    (problem,) = check_tokens(str(tokens)).problems
    assert problem.startswith("rejects/part-000000.parquet: it is no Parquet file: ")


def test_what_is_no_token_folder_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no token folder: it has no _manifest/config.json" in said(capsys, "verify", str(tmp_path), code=2)
    assert "is no token folder" in said(capsys, "inspect", str(tmp_path), code=2)
    Manifest.open(str(tmp_path), {"stage": "data"}).finish()
    assert "is the output of `raymuse data`" in said(capsys, "verify", str(tmp_path), code=2)
    assert "of another stage" in said(capsys, "inspect", str(tmp_path), code=2)


def fetched(function: str, read: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a function of `sources` opens while `read` runs, sorted."""
    opened: list[str] = []
    inner = getattr(sources, function)

    def counted(address: str) -> Any:
        opened.append(address)
        return inner(address)

    with monkeypatch.context() as patch:
        patch.setattr(sources, function, counted)
        read()
    return sorted(opened)


def test_every_file_is_fetched_once(
    bucketed: str, encoders: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(str(path) for path in Path(bucketed).rglob("*.parquet"))
    assert len(files) == 9
    assert fetched("open_seekable", lambda: check_tokens(bucketed), monkeypatch) == files
    sheet = Sheet(encoders, tmp_path / "sheet.png", 14, 0)
    files.remove(f"{bucketed}/captions/empty.parquet")  # which no crop uses
    assert fetched("open_in_parts", lambda: inspect_tokens(bucketed, sheet), monkeypatch) == files


# --- inspect


def all_ids(folder: str, column: str) -> np.ndarray[Any, Any]:
    tables = [pq.read_table(path)[column] for path in sorted(Path(folder, "tokens").glob("*.parquet"))]
    return np.concatenate([np.concatenate(table.to_numpy()) for table in tables])


def test_the_numbers_are_those_of_numpy(bucketed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "numbers.json"
    text = said(capsys, "inspect", bucketed, "--json", str(data))
    report = json.loads(data.read_text())
    for column in ("image_ids", "low_ids"):
        counts = np.bincount(all_ids(bucketed, column), minlength=tiny.CODES)
        shares = counts[counts > 0] / counts.sum()
        usage = report[column]
        assert usage["counts"] == counts.tolist()
        assert (usage["codes"], usage["ids"], usage["used"]) == (tiny.CODES, counts.sum(), (counts > 0).sum())
        assert usage["unused_share"] == pytest.approx((counts == 0).mean())
        assert usage["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert usage["most_used"][0] == [int(counts.argmax()), int(counts.max())]
        assert f"perplexity {usage['perplexity']:,.1f}" in text
        assert re.search(rf"code +{counts.argmax()} +{counts.max() / counts.sum():.2%} +█{{40}}\n", text)
    masks = [
        row
        for path in Path(bucketed, "captions").glob("part-*")
        for row in pq.read_table(path)["text_mask"].to_pylist()
    ]
    tokens = np.array(masks).sum(axis=1)
    lengths = report["caption_tokens"]
    assert lengths["counts"] == np.bincount(tokens, minlength=tiny.TEXT_LENGTH + 1).tolist()
    assert (lengths["least"], lengths["most"], lengths["mean"]) == (tokens.min(), tokens.max(), tokens.mean())
    assert lengths["median"] == np.sort(tokens)[(len(tokens) - 1) // 2]
    expected = {
        "finished": True,
        "parts": 2,
        "pictures": 14,
        "crops": 14,
        "captions": 8,
        "rejects": 4,
        "rejects_by_reason": {"truncated": 4},
        "counts": {"animations": 3.0, "pictures": 14.0},
        "bytes": sum(path.stat().st_size for path in Path(bucketed).rglob("*.parquet")),
        "grids": {"8x8": 6, "12x6": 8},
        "low_grids": {"4x4": 6, "6x3": 8},
        "code_agreement": 0.9951,
    }
    assert {name: report[name] for name in expected} == expected
    assert report["config"]["vqgan_sha256"] in text
    for words in (
        "agreed on 99.51%",
        "4 rejects: truncated 4",
        "counted: animations 3",
        "8x8 (6 crops)",
        'buckets=["32x32", "48x24"]',
    ):
        assert words in text


def test_usage_of_ids_by_hand() -> None:
    usage = CodeUsage.of(8)
    assert (usage.used, usage.total, usage.bits, usage.perplexity, usage.most_used(3)) == (0, 0, 0, 1, [])
    usage.add(np.array([[1, 1, 2], [5, 2, 1]], dtype=np.uint16))
    usage.add(np.array([5, 5], dtype=np.uint16))
    assert usage.counts.tolist() == [0, 3, 2, 0, 0, 3, 0, 0]
    assert usage.most_used(2) == [(1, 3), (5, 3)]
    assert usage.bits == pytest.approx(2 * 3 / 8 * np.log2(8 / 3) + 2 / 8 * 2)
    with pytest.raises(UserError, match="an id of 8 is beyond the codebook of 8"):
        usage.add(np.array([8], dtype=np.uint16))


def test_rows_are_spread_over_all_and_fixed_by_the_seed() -> None:
    rows = spread_rows(1000, 10, 0)
    assert [row // 100 for row in rows] == list(range(10))
    assert rows == spread_rows(1000, 10, 0) != spread_rows(1000, 10, 1)
    assert spread_rows(4, 10, 0) == [0, 1, 2, 3]
    assert spread_rows(0, 10, 0) == []
    assert len(set(spread_rows(7, 5, 3))) == 5


def test_the_sheet_shows_the_crops_beside_their_captions(
    whole: str, encoders: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", whole, "--vqgan", encoders, "--rows", "6"]
    page = tmp_path / "sheet.html"
    assert f"6 rows as pictures: {page}" in said(capsys, *words, "--out", str(page))
    text = page.read_text()
    assert text.count("<figure>") == 6
    assert text.count("<img ") == 12  # each with its low-resolution twin
    captions = Counter(
        caption
        for path in Path(whole, "captions").glob("part-*")
        for caption in pq.read_table(path)["caption"].to_pylist()
    )
    shown = re.findall(r"<figcaption>(.*?) \[\d+\]</figcaption>", text)
    assert len(shown) == 6
    assert set(shown) <= set(captions)
    said(capsys, *words, "--out", str(tmp_path / "sheet.png"))
    sheet = np.array(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert (sheet != 255).any(axis=2).mean() > 0.3, "the sheet is blank"


def test_a_row_of_the_sheet_is_its_ids_decoded(bucketed: str, encoders: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "raymuse.stages.inspect_tokens.sheet_html",
        lambda entries, labels, title: seen.update(entries=entries, labels=labels) or "page",
    )
    inspect_tokens(bucketed, Sheet(encoders, Path(bucketed).parent / "page.html", 14, 0))
    vqgan = Vqgan.load(encoders)
    assert seen["labels"] == ["image_ids", "low_ids"]
    rows = [
        row for path in sorted(Path(bucketed, "tokens").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    for entry, row in zip(seen["entries"], rows, strict=True):
        for pixels, low in zip(entry.pictures, ("", "low_"), strict=True):
            grid = (row[f"{low}height"], row[f"{low}width"])
            ids = np.array(row["low_ids" if low else "image_ids"]).reshape(1, *grid)
            side = 4 * max(grid)
            left = (side - 4 * grid[1]) // 2
            assert pixels.shape == (side, side, 3)
            expected = vqgan.decode(ids)[0].astype(int)
            np.testing.assert_allclose(pixels[:, left : left + 4 * grid[1]].astype(int), expected, atol=1)
            assert (pixels[:, :left] == 255).all()
        assert entry.prompt == f"a caption {row['key'][-1]} [{row['key']}]"
        assert row["caption_ids"] == [caption_id(entry.prompt.partition(" [")[0])]


def test_another_vqgan_is_refused_with_both_sums(whole: str, encoders: str, tmp_path: Path) -> None:
    other = tiny.write_encoders(tmp_path / "other", tiny.write_shards(tmp_path / "shards", side=40))
    sums = [weights_sha256(folder, "vqvae") for folder in (other, encoders)]
    with pytest.raises(UserError, match=rf"is not the VQGAN that wrote these ids.*{sums[0]}, theirs {sums[1]}"):
        inspect_tokens(whole, Sheet(other, tmp_path / "sheet.png", 4, 0))


def test_low_ids_of_another_vqgan_are_not_decoded(bucketed: str, encoders: str, tmp_path: Path) -> None:
    tokens = shutil.copytree(bucketed, tmp_path / "tokens")
    config = json.loads((tokens / "_manifest/config.json").read_text())
    (tokens / "_manifest/config.json").write_text(json.dumps({**config, "low_vqgan_sha256": "b" * 64}))
    inspect_tokens(str(tokens), Sheet(encoders, tmp_path / "sheet.html", 3, 0))
    assert (tmp_path / "sheet.html").read_text().count("<img ") == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "sheet.html"], "a contact sheet needs both: --vqgan FOLDER"),
        (["--vqgan", "ENCODERS"], "a contact sheet needs both: --vqgan FOLDER"),
        (["--vqgan", "ENCODERS", "--out", "sheet.jpg"], "a contact sheet is .html or .png"),
        (["--vqgan", "ENCODERS", "--out", "nowhere/sheet.png"], "there is no folder"),
        (["--vqgan", "./nowhere", "--out", "sheet.png"], "./nowhere does not exist"),
        (["--json", "nowhere/it.json"], "--json nowhere/it.json: there is no folder"),
        (["--rows", "0"], "Invalid value for '--rows'"),
    ],
)
def test_bad_usage_of_inspect_is_a_sentence(
    words: list[str], sentence: str, whole: str, encoders: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [encoders if word == "ENCODERS" else word for word in words]
    assert sentence in said(capsys, "inspect", whole, *given, code=2)


def test_inspect_of_damage_sends_to_verify_and_an_unfinished_folder_is_said_to_be(
    tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tokens / "_SUCCESS").unlink()
    assert f"{tokens}: not finished\n" in said(capsys, "inspect", str(tokens))
    path = tokens / FIRST
    path.write_bytes(path.read_bytes()[:-20])
    message = said(capsys, "inspect", str(tokens), code=2)
    assert f"{FIRST} cannot be read: " in message
    assert "raymuse tokens verify" in message
