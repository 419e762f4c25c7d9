"""`make bench-load`: samples a second that the loader gives on one core, from token shards that hold ids.

A batch has ids with some hidden, targets, mask, micro-conditions and text ids; 256 of 65,536 crops of 16 x 16 ids with
77 text ids, in the training's shuffled order. The peer reads the same files with Hugging Face datasets and a DataLoader
in its own shuffled order, and hides as train_amused.py does. 50,000 samples a second are wanted.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from report import compare, write

from raymuse.config.training import BaseConfig, ClipConfig, LoraConfig
from raymuse.datasets import shapes
from raymuse.storage.manifest import Manifest
from raymuse.storage.tokens import EMPTY, captions_schema, fixed, parquet_bytes
from raymuse.storage.webdataset_writer import write_shard
from raymuse.training.clip import ClipTask
from raymuse.training.tokens import TokenStream

PARTS, ROWS, SIDE, TEXT, CODES, BATCH, BATCHES = 16, 4096, 16, 77, 8192, 256, 256
WANTED = 50_000


def write_tokens(folder: Path, parts: int = PARTS) -> None:
    """Token shards of random ids, as the pretokenize stage lays them out with text=ids."""
    draw = np.random.default_rng(0)
    facts = {"codebook_size": CODES, "text_length": TEXT}
    manifest = Manifest.open(str(folder), facts)
    metadata = {name: str(value) for name, value in facts.items()}
    for part, rows in [(EMPTY, 1), *((f"part-{number:06d}", ROWS) for number in range(parts))]:
        keys = [f"{part}-{row}" for row in range(rows)]
        captions = [
            *(pa.array(keys), pa.array(keys), fixed(draw.integers(0, 500, (rows, TEXT)), pa.int32())),
            fixed(np.ones((rows, TEXT), bool), pa.bool_()),
        ]
        files = {
            f"captions/{part}.parquet": parquet_bytes(_table(captions_schema(TEXT, None, None), captions), metadata)
        }
        if part != EMPTY:
            files[f"tokens/{part}.parquet"] = parquet_bytes(_crops(keys, draw), metadata)
        manifest.write_part(part, files, rows=rows if part != EMPTY else 0, rejects=0, source="")
    manifest.finish()


def write_text_encoder(root: Path) -> None:
    """A small one of random weights: it encodes the empty caption once."""
    drawn = shapes.samples(16, 0, 32, held_out=False, start=0)
    Path(root, "shards").mkdir()
    write_shard(root / "shards" / "00000.tar", ((one.key, one.image, one.caption, {}) for one in drawn))
    shape = {"width": 16, "layers": 1, "heads": 2, "projection": 8, "patch_size": 8}
    config = ClipConfig(input=f"{root}/shards", output=f"{root}/none", steps=1, text_length=TEXT, model=shape)
    clip = ClipTask(config)
    clip.save({f"network.{name}": value for name, value in clip.network.state_dict().items()}, root / "clip")


def _crops(keys: list[str], draw: np.random.Generator) -> pa.Table:
    numbers = ("original_width", "original_height", "crop_top", "crop_left", "aesthetic")
    return pa.table(
        {
            "key": keys,
            "image_ids": fixed(draw.integers(0, CODES, (len(keys), SIDE * SIDE)), pa.uint16()),
            "height": pa.array([SIDE] * len(keys), pa.int16()),
            "width": pa.array([SIDE] * len(keys), pa.int16()),
            "caption_ids": [[key] for key in keys],
            **{name: pa.array([6.0] * len(keys), pa.float32()) for name in numbers},
        }
    )


def _table(schema: pa.Schema, columns: list[pa.Array]) -> pa.Table:
    return pa.Table.from_arrays(columns, schema=schema)


def ours(config: BaseConfig) -> float:
    """Samples a second of processor time over one epoch, the reading of the files among it."""
    stream = TokenStream(config, "cpu", text_trained=True)
    began = time.process_time()
    for step in range(BATCHES):
        batch = stream.batch(np.arange(step * BATCH, (step + 1) * BATCH), np.ones(BATCH, np.float32), CODES)
        assert batch["ids"].shape == (BATCH, SIDE, SIDE)
        assert batch["text_ids"].shape == (BATCH, TEXT)
    return BATCH * BATCHES / (time.process_time() - began)


def peer(folder: Path) -> float:
    """The same with datasets and a DataLoader, in this process."""
    tables = {
        name: datasets.Dataset.from_parquet(
            sorted(str(path) for path in (folder / name).glob("part-*.parquet")), cache_dir=str(folder / "cache")
        )
        for name in ("tokens", "captions")
    }
    rows = tables["tokens"].select_columns(["image_ids", "aesthetic"])
    rows = rows.add_column("text_ids", tables["captions"]["text_ids"]).with_format("torch")
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(rows, BATCH, shuffle=True, generator=generator)
    began = time.process_time()
    for batch in islice(_hidden(loader, generator), BATCHES):
        assert batch["ids"].shape == (BATCH, SIDE * SIDE)
    return BATCH * BATCHES / (time.process_time() - began)


def _hidden(loader: "torch.utils.data.DataLoader[dict[str, torch.Tensor]]", draw: torch.Generator) -> Iterator[dict]:
    for batch in loader:
        ids = batch["image_ids"].long()
        share = torch.cos(torch.rand(len(ids), generator=draw) * math.pi / 2)
        count = (share * ids.shape[1]).round().clamp(min=1)
        mask = torch.rand(ids.shape, generator=draw).argsort(dim=1) < count[:, None]
        yield {**batch, "ids": torch.where(mask, CODES, ids), "mask": mask}


def main() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as root:
        write_text_encoder(Path(root))
        write_tokens(Path(root, "tokens"))
        config = BaseConfig(
            input=f"{root}/tokens",
            output=f"{root}/out",
            steps=1,
            text_encoder=f"{root}/clip",
            start_from="nothing",
            lora=LoraConfig(text_targets=("q_proj",)),
        )
        row = compare(
            *("loader, token shards with ids", "hf-datasets"),
            *(lambda: ours(config), lambda: peer(Path(root, "tokens"))),
            goal=1.0,
            unit="samples/s of one core",
            packages=["numpy", "pyarrow", "torch", "datasets"],
        )
    write("load", [row])
    print(f"{row.ours:,.0f} samples/s on one core; wanted: {WANTED:,}")


if __name__ == "__main__":
    main()
