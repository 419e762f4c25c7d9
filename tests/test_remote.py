"""Object stores: every kind of input is read from, and parts are written to, a real S3 server process."""

import hashlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from PIL import Image

import tiny
from ranks import run_ranks
from raymuse.config.errors import UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import BaseConfig
from raymuse.encoding.chunks import decode_chunks
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.stages.pretokenize import pretokenize
from raymuse.storage.folder import Folder
from raymuse.storage.images import Picture, list_shards, read_shard
from raymuse.storage.manifest import Manifest, read_finished
from raymuse.storage.picture_index import PictureIndex
from raymuse.storage.rejects import Reject
from raymuse.storage.token_check import check_tokens
from raymuse.storage.tokens import TokenStore
from raymuse.storage.webdataset_writer import encode, write_shard, write_tar
from raymuse.tracking.run import Run
from shared import S3_ENVIRONMENT, S3_PORT
from trainings import Trained, fit_all

BUCKET = "pictures"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))


PNGS = [encode(picture(seed)) for seed in range(12)]


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server writes a line a request."""
    return tmp_path_factory.mktemp("server") / "requests.log"


@pytest.fixture(scope="module")
def server(requests: Path) -> Iterator[str]:
    """moto's server in a process of its own; the environment says where it is, as a person would say it."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(S3_PORT)]
    with requests.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(S3_PORT, process)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in S3_ENVIRONMENT.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            client().create_bucket(Bucket=BUCKET)
            yield f"s3://{BUCKET}"
            s3fs.S3FileSystem.clear_instance_cache()
    finally:
        process.terminate()
        process.wait(10)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the S3 server ended"
        assert time.monotonic() < deadline, "no S3 server within 60 s"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def client() -> "boto3.client":
    """Another program that writes to the store, past fsspec and what it remembers."""
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def put(name: str, data: bytes) -> None:
    client().put_object(Bucket=BUCKET, Key=name, Body=data)


def rows_of(address: str, **options: int) -> list[Picture | Reject]:
    return [row for shard in list_shards(address, **options) for row in read_shard(shard)]


def said(rows: list[Picture | Reject]) -> list[tuple[bytes, str]]:
    assert all(isinstance(row, Picture) for row in rows), rows
    return [(row.data, row.captions[0]) for row in rows if isinstance(row, Picture)]


def names(address: str) -> list[str]:
    return [shard.name for shard in list_shards(address)]


def parquet(rows: range, per_group: int = 1000) -> bytes:
    table = pa.table({"image": [PNGS[row] for row in rows], "text": [f"c{row}" for row in rows]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=per_group)
    return sink.getvalue()


EXPECTED = [(PNGS[number], f"c{number}") for number in range(12)]


def test_tars(server: str, tmp_path: Path) -> None:
    for number in range(3):
        samples = ((f"k{one}", picture(one), f"c{one}", {}) for one in range(4 * number, 4 * number + 4))
        write_shard(f"{server}/tars/{number:05d}.tar", samples)
    tars = [f"{number:05d}.tar" for number in range(3)]
    for address in (f"{server}/tars", f"{server}/tars/*.tar", f"{server}/tars/{{00000..00002}}.tar"):
        assert names(address) == tars
        assert said(rows_of(address)) == EXPECTED
    assert names(f"{server}/tars/00001.tar") == ["00001.tar"]
    with pytest.raises(UserError, match=r"nothing at s3://pictures/tars/00003\.tar \(and 1 more\)"):
        list_shards(f"{server}/tars/{{00000..00004}}.tar")
    index = PictureIndex(list_shards(f"{server}/tars"))
    assert [index[number].data for number in range(12)] == PNGS
    client().put_object(Bucket=BUCKET, Key="cut/00000.tar", Body=b"<html>")
    (lost,) = rows_of(f"{server}/cut")
    assert isinstance(lost, Reject)
    assert lost.reason.value == "shard_unreadable"


def test_folders_of_pictures(server: str) -> None:
    for number in range(4):
        put(f"loose/deep/{number}.png", PNGS[number])
        put(f"loose/deep/{number}.txt", f"c{number}".encode())
    assert said(rows_of(f"{server}/loose", images_per_shard=3)) == EXPECTED[:4]
    shards = list_shards(f"{server}/loose")
    client().delete_object(Bucket=BUCKET, Key="loose/deep/2.png")
    rows = [row for shard in shards for row in read_shard(shard)]
    assert [row.reason.value for row in rows if isinstance(row, Reject)] == ["unreadable"]


def test_parquet(server: str) -> None:
    put("tables/00000.parquet", parquet(range(8), 2))
    put("tables/00001.parquet", parquet(range(8, 12)))
    for address in (f"{server}/tables", f"{server}/tables/*.parquet", f"{server}/tables/{{00000..00001}}.parquet"):
        assert said(rows_of(address)) == EXPECTED
        assert said(rows_of(address, images_per_shard=4)) == EXPECTED
    put("tables/00002.parquet", b"damaged")
    assert [row.reason.value for row in rows_of(f"{server}/tables") if isinstance(row, Reject)] == ["shard_unreadable"]
    paths = ["loose-pictures/0.png", f"{server}/elsewhere/1.png", "loose-pictures/gone.png"]
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": paths, "text": ["c0", "c1", "c2"]}), sink)
    put("named/a.parquet", sink.getvalue())
    put("named/loose-pictures/0.png", PNGS[0])
    put("elsewhere/1.png", PNGS[1])
    rows = rows_of(f"{server}/named/a.parquet")
    assert said(rows[:2]) == EXPECTED[:2]
    assert isinstance(rows[2], Reject)
    assert rows[2].reason.value == "unreadable"


def test_of_a_large_parquet_file_only_what_is_asked_for_is_fetched(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard of forty costs its own row group and the footer."""
    draw = np.random.default_rng(0)
    sink = io.BytesIO()
    table = pa.table({"image": [draw.bytes(1 << 20) for _ in range(40)], "text": ["x"] * 40})
    pq.write_table(table, sink, row_group_size=1)
    put("large/a.parquet", sink.getvalue())
    fetched = []
    inner = s3fs.core._fetch_range

    def counted(*args: object, **options: object) -> bytes:
        data: bytes = inner(*args, **options)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(s3fs.core, "_fetch_range", counted)
    monkeypatch.setattr("raymuse.storage.sources.BLOCK_BYTES", 1 << 20)
    shards = list_shards(f"{server}/large", images_per_shard=1)
    assert len(shards) == 40
    assert sum(fetched) < 2 << 20
    fetched.clear()
    (row,) = read_shard(shards[20])
    assert isinstance(row, Picture)
    assert 1 << 20 <= sum(fetched) < 6 << 20


def test_a_saved_data_set(server: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": data, "path": None} for data in PNGS], "text": [f"c{n}" for n in range(12)]}
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=kinds).save_to_disk(tmp_path / "saved", num_shards=2)
    for path in (tmp_path / "saved").iterdir():
        put(f"saved/{path.name}", path.read_bytes())
    assert said(rows_of(f"{server}/saved")) == EXPECTED


def test_a_resume_sees_what_is_there_now(server: str) -> None:
    """fsspec keeps listings for ever; another program's changes must show in the same process."""
    put("growing/00000.parquet", parquet(range(2)))
    assert names(f"{server}/growing") == ["00000.parquet"]
    put("growing/00001.parquet", parquet(range(2, 4)))
    assert names(f"{server}/growing") == ["00000.parquet", "00001.parquet"]
    put("growing/00002.parquet", parquet(range(4, 6)))
    assert names(f"{server}/growing/*.parquet") == [f"{number:05d}.parquet" for number in range(3)]
    put("growing/00003.parquet", parquet(range(6, 8)))
    assert len(names(f"{server}/growing/{{00000..00003}}.parquet")) == 4
    client().delete_object(Bucket=BUCKET, Key="growing/00000.parquet")
    assert names(f"{server}/growing")[0] == "00001.parquet"
    with pytest.raises(UserError, match="nothing at"):
        list_shards(f"{server}/growing/{{00000..00003}}.parquet")


def test_what_is_not_there_says_what_to_do(server: str) -> None:
    for address in (f"{server}/nothing", f"{server}/nothing/a.tar", "s3://no-such-bucket/tars"):
        with pytest.raises(UserError, match=r"no such file or folder\. Check the spelling and, for a store, the cred"):
            list_shards(address)


def test_a_folder_writes_whole_files_and_sees_fresh_ones(server: str) -> None:
    folder = Folder(f"{server}/out/run")
    folder.create()
    assert folder.names() == []
    assert not folder.exists("tokens/a.parquet")
    folder.write("tokens/a.parquet", b"1234")
    assert folder.read("tokens/a.parquet") == b"1234"
    assert folder.names("tokens") == ["a.parquet"]
    put("out/run/tokens/b.parquet", b"5")
    assert folder.names("tokens") == ["a.parquet", "b.parquet"]
    assert folder.exists("tokens/b.parquet")
    client().delete_object(Bucket=BUCKET, Key="out/run/tokens/b.parquet")
    assert folder.names("tokens") == ["a.parquet"]
    assert not folder.exists("tokens/b.parquet")
    put("out/run/_SUCCESS", b"{}")
    assert folder.exists("_SUCCESS")
    folder.write_with("big.tar", lambda path: path.write_bytes(b"x" * (6 << 20)))
    assert len(folder.read("big.tar")) == 6 << 20
    folder.remove("tokens")
    assert not folder.exists("tokens/a.parquet")
    folder.remove("tokens")
    assert folder.names("tokens") == []


def test_a_manifest_lives_in_a_store(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymuse.storage.manifest.COMPACT_EVERY", 2)
    address = f"{server}/out/manifest"
    manifest = Manifest.open(address, {"resolution": 64})
    manifest.write_part("part-000000", {"tokens/part-000000.parquet": b"abc"}, rows=3, rejects=0, source="a")
    again = Manifest.open(address, {"resolution": 64})
    assert again.pending(["part-000000", "part-000001"]) == ["part-000001"]
    again.write_part("part-000001", {"tokens/part-000001.parquet": b"de"}, rows=2, rejects=1, source="b")
    assert Folder(address).names("_manifest") == ["config.json", "index-000000.json", "lock.json"]
    again.finish()
    assert Folder(address).names("_manifest") == ["config.json", "index-000000.json"]
    assert Manifest.open(address, {"resolution": 64}).finished
    assert {name: part.rows for name, part in read_finished(address, "pretokenize").items()} == {
        "part-000000": 3, "part-000001": 2,
    }  # fmt: skip
    with pytest.raises(UserError, match="resolution was 64 and is now 32"):
        Manifest.open(address, {"resolution": 32})


def test_a_store_that_fails_is_raised_and_no_reject(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put("failing/a.parquet", parquet(range(8), 2))
    write_tar(f"{server}/failing-tars/a.tar", [("k.png", PNGS[0]), ("k.txt", b"x")])
    shards = [*list_shards(f"{server}/failing"), *list_shards(f"{server}/failing-tars")]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        for shard in shards:
            with pytest.raises(Exception, match=r"connect|Connect"):
                list(read_shard(shard))
        with pytest.raises(UserError, match=r"s3://pictures/failing cannot be reached: .*Check the address"):
            list_shards(f"{server}/failing")
    s3fs.S3FileSystem.clear_instance_cache()


def test_memory_addresses_of_tables() -> None:
    fsspec.filesystem("memory").pipe({"/tables-in-memory/a.parquet": parquet(range(4), 2)})
    assert said(rows_of("memory://tables-in-memory/*.parquet", images_per_shard=2)) == EXPECTED[:4]


def test_a_folder_sees_what_others_wrote_after_it_was_listed(server: str) -> None:
    folder = Folder(f"{server}/stale/run")
    folder.write("a.json", b"1")
    assert folder.names() == ["a.json"]
    put("stale/run/_SUCCESS", b"{}")
    assert folder.exists("_SUCCESS")
    put("stale/run/parts/x.json", b"1")
    assert folder.names("parts") == ["x.json"]
    client().delete_object(Bucket=BUCKET, Key="stale/run/a.json")
    assert not folder.exists("a.json")


# --- the stage


@pytest.mark.usefixtures("ray_cluster")
def test_shards_in_the_store_become_token_shards_in_the_store(server: str, tmp_path: Path) -> None:
    local = tiny.write_shards(tmp_path / "shards", count=16, per_shard=8)
    encoders = tiny.write_encoders(tmp_path / "encoders", local)
    for tar in Path(local).glob("*.tar"):
        put(f"stage/in/{tar.name}", tar.read_bytes())
    config = PretokenizeConfig(
        input=f"{server}/stage/in",
        output=f"{server}/stage/out",
        vqgan=encoders,
        text_encoder=encoders,
        resolution=tiny.SIDE,
        low_resolution=tiny.LOW_SIDE,
        chunk_size=8,
    )
    pretokenize(config, Run.off())
    assert check_tokens(config.output).problems == []
    store = TokenStore(config.output)
    encoder = ChunkEncoder(config)
    for name, shard in zip(store.names, list_shards(local), strict=True):
        (chunk,) = decode_chunks(shard, config)
        ids = encoder(chunk).tokens["image_ids"].combine_chunks().flatten().to_numpy()
        np.testing.assert_array_equal(store.part(name).image_ids.reshape(-1), ids)
    assert "_chunks" not in Folder(config.output).names()


def fit_from_the_store(environment: dict[str, str], configs: list[BaseConfig]) -> list[Trained]:
    os.environ.update(environment)
    return fit_all(configs)


def test_two_workers_of_a_machine_copy_a_shard_once_between_them(server: str, requests: Path, tmp_path: Path) -> None:
    """And train as from a folder; what each worker reads without copies is read once a worker."""
    shards = tiny.write_shards(tmp_path / "shards")
    tokens = tiny.write_tokens(tmp_path / "tokens", shards, tiny.write_encoders(tmp_path / "encoders", shards))
    for path in Path(tokens).rglob("*"):
        if path.is_file():
            put(f"shared/{path.relative_to(tokens)}", path.read_bytes())
    copies = tmp_path / "copies"
    cached = {"shard_cache": {"folder": str(copies), "gib": 1}}
    ways: dict[str, tuple[str, dict[str, Any]]] = {"local": (tokens, {}), "cached": (f"{server}/shared", cached)}
    configs = [
        tiny.base_config(tmp_path / name, address, workers=2, steps=3, log_every=1, **more)
        for name, (address, more) in ways.items()
    ]
    local, cached_too = run_ranks(fit_from_the_store, 2, tmp_path, S3_ENVIRONMENT, configs)[0]
    assert local[0] == cached_too[0]
    assert all(torch.equal(value, cached_too[1][name]) for name, value in local[1].items())
    names = [f"{kind}/part-{number:06d}.parquet" for kind in ("tokens", "captions") for number in range(3)]
    names.append("captions/empty.parquet")
    for name in names:
        assert requests.read_text().count(f'"GET /{BUCKET}/shared/{name} ') == 1, name
    held = {hashlib.sha256((Path(tokens) / name).read_bytes()).hexdigest() for name in names}
    assert {path.name for path in copies.iterdir() if path.is_file()} == held
