"""`python tests/benchmarks/streaming.py`: token shards against encoding while the training runs, on one core.

The demo's data and the shapes of its models, of random weights, in this process: seconds of the processor for a
thousand samples, which a busy machine changes little. Stored: the crops are encoded once (decode, VQGAN, CLIP,
Parquet), then read in every epoch. Streamed: decoded and encoded in every epoch. A training step costs both the same.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raymuse.config.load import load
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import BaseConfig, ClipConfig, VqganConfig
from raymuse.datasets import shapes
from raymuse.encoding.chunks import decode_chunks
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.models.network_files import save_network
from raymuse.storage.images import list_shards
from raymuse.storage.manifest import Manifest
from raymuse.storage.tokens import EMPTY, parquet_bytes
from raymuse.storage.webdataset_writer import write_shard
from raymuse.training.build import build_engine, build_task
from raymuse.training.clip import ClipTask
from raymuse.training.order import share
from raymuse.training.surveying import prepare
from raymuse.training.vqgan import VqganTask

PICTURES, PER_SHARD, BATCH, STEPS = 2048, 512, 64, 32


def write_data(root: Path) -> str:
    (root / "data").mkdir()
    for number in range(PICTURES // PER_SHARD):
        drawn = shapes.samples(PER_SHARD, 0, 64, held_out=False, start=number * PER_SHARD)
        write_shard(root / "data" / f"{number:05d}.tar", ((one.key, one.image, one.caption, {}) for one in drawn))
    return str(root / "data")


def write_encoders(root: Path, data: str) -> str:
    """The demo's VQGAN and CLIP, not trained but for the start of the codebook."""
    made = str(root / "encoders")
    vqgan, clip = (load(f"demo:{name}", [f"input={data}", f"output={made}"]) for name in ("vqgan", "clip"))
    assert isinstance(vqgan, VqganConfig)
    assert isinstance(clip, ClipConfig)
    task = VqganTask(vqgan)
    task.module(task.batch(np.arange(128), np.ones(128, np.float32)))
    task.codebook.start(torch.cat(task.module.latents), 0)
    save_network(task.network, task.network.config.to_diffusers(), Path(made, "vqvae"), task.network.state_dict())
    towers = ClipTask(clip)
    towers.save({f"network.{name}": value for name, value in towers.network.state_dict().items()}, Path(made))
    return made


def write_tokens(config: PretokenizeConfig) -> None:
    encoder = ChunkEncoder(config)
    manifest = Manifest.open(config.output, {**config.identity(), "codebook_size": encoder.crops.vqgan.codes})
    empty = parquet_bytes(encoder.captions([""]), {})
    manifest.write_part(EMPTY, {f"captions/{EMPTY}.parquet": empty}, rows=0, rejects=0, source="")
    for number, shard in enumerate(list_shards(config.inputs)):
        made = [encoder(chunk) for chunk in decode_chunks(shard, config)]
        files = {}
        for table in ("tokens", "captions"):
            joined = pa.concat_tables([getattr(one, table) for one in made])
            files[f"{table}/part-{number:06d}.parquet"] = parquet_bytes(joined, {})
        rows = sum(len(one.tokens) for one in made)
        manifest.write_part(f"part-{number:06d}", files, rows=rows, rejects=0, source=shard.name)
    manifest.finish()


def thousand(work: Callable[[], Any], samples: int) -> float:
    """Seconds of the processor for 1,000 samples."""
    began = time.process_time()
    work()
    return (time.process_time() - began) * 1000 / samples


def batches(config: BaseConfig) -> Callable[[], None]:
    task = build_task(config)

    def work() -> None:
        for step in range(STEPS):
            task.batch(*share(step, BATCH, 0, 1))

    return work


def steps(config: BaseConfig) -> Callable[[], None]:
    task = build_task(config)
    engine = build_engine(config, task)
    held = [task.batch(*share(step, BATCH, 0, 1)) for step in range(8)]

    def work() -> None:
        for step in range(STEPS):
            batch = held[step % 8]
            loss, _ = engine.forward(batch)
            engine.backward(loss / task.count(batch))
            engine.step(1.0)

    return work


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = write_data(root)
        encoders = write_encoders(root, data)
        encoding = {"vqgan": encoders, "text_encoder": encoders, "resolution": 32}
        stored = PretokenizeConfig(input=data, output=str(root / "tokens"), **encoding)
        rows = {"encode once, to token shards": thousand(lambda: write_tokens(stored), PICTURES)}
        changes = [f"vqgan={encoders}", f"text_encoder={encoders}", "ids=image_ids", "workers=0", f"batch_size={BATCH}"]
        base = load("demo:base", [f"input={root}/tokens", f"output={root}/stored", f"steps={STEPS}", *changes])
        assert isinstance(base, BaseConfig)
        stream = {"input": data, **encoding}
        streamed = BaseConfig.model_validate({**base.model_dump(), "output": f"{root}/streamed", "stream": stream})
        rows["survey, once"] = thousand(lambda: prepare(streamed), PICTURES)
        rows["batches from token shards"] = thousand(batches(base), BATCH * STEPS)
        rows["batches encoded meanwhile"] = thousand(batches(streamed), BATCH * STEPS)
        rows["training step"] = thousand(steps(base), BATCH * STEPS)
        size = sum(path.stat().st_size for path in (root / "tokens").rglob("*.parquet"))
        for name, seconds in rows.items():
            print(f"{name:32} {seconds:8.3f} s of a core per 1,000   {1000 / seconds:10,.0f} samples/s of a core")
        print(f"token shards: {size / PICTURES:,.0f} bytes a crop; pictures: {_size(root / 'data') / PICTURES:,.0f}")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.tar"))


if __name__ == "__main__":
    main()
