"""`make bench-pretokenize`: the stage beside a webdataset + DataLoader + VQModel loop, and decoding beside Pillow.

Both are timed in their steady state: from their third part to their last, by the times of the files. The ids of the
two are compared before anything is reported.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from diffusers import VQModel
from PIL import Image
from report import Row, compare, write

from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import ClipConfig
from raymuse.datasets import shapes
from raymuse.encoding.chunks import decode_chunks
from raymuse.storage.images import list_shards
from raymuse.storage.webdataset_writer import write_shard
from raymuse.training.clip import ClipTask

SHARDS, PICTURES, SIDE = 12, 500, 64
PAIRS = 9  # of the decoding
PACKAGES = ("ray", "torch", "webdataset", "diffusers", "pillow")
STAGE = """
import sys
from raymuse.clusters.local import session
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.stages.pretokenize import pretokenize
from raymuse.tracking.run import Run

with session(num_cpus=4, object_store_gib=0.3, dashboard=False):
    pretokenize(PretokenizeConfig.model_validate_json(sys.argv[1]), Run.off())
"""


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        shards = write_pictures(root / "shards", SHARDS, PICTURES, (340, 256))
        encoders = str(root / "encoders")
        write_models(Path(encoders), shards)
        write("pretokenize", [stage_row(root, shards, encoders), decode_row(root, encoders)])
        growth(root, shards, encoders)
    finally:
        shutil.rmtree(root)


def stage_row(root: Path, shards: str, encoders: str) -> Row:
    settings = [(workers, threads) for workers in (1, 2) for threads in (1, 2)]
    rates = {setting: peer_rate(root, shards, encoders, *setting) for setting in settings}
    best = max(settings, key=lambda setting: rates[setting])
    print(f"the peer's best of {rates}: {best[0]} workers, {best[1]} threads")
    ours_rate(root, shards, encoders)
    same_ids(root)
    return compare(
        "pretokenize",
        "webdataset-dataloader",
        lambda: ours_rate(root, shards, encoders),
        lambda: peer_rate(root, shards, encoders, *best),
        goal=1.0,
        unit="pictures/s",
        packages=PACKAGES,
    )


def ours_rate(root: Path, shards: str, encoders: str) -> float:
    out = root / "ours"
    shutil.rmtree(out, ignore_errors=True)
    config = config_of(shards, encoders, str(out))
    subprocess.run([sys.executable, "-c", STAGE, config.model_dump_json()], check=True, stdout=subprocess.DEVNULL)
    return steady_rate(out)


def peer_rate(root: Path, shards: str, encoders: str, workers: int, threads: int) -> float:
    out = root / "peer"
    shutil.rmtree(out, ignore_errors=True)
    script = Path(__file__).with_name("plain_pretokenize.py")
    numbers = [str(workers), str(threads)]
    subprocess.run([sys.executable, str(script), shards, encoders, str(out), *numbers], check=True)
    return steady_rate(out)


def config_of(shards: str, encoders: str, out: str, resolution: int = SIDE) -> PretokenizeConfig:
    return PretokenizeConfig(input=shards, output=out, vqgan=encoders, text_encoder=encoders, resolution=resolution)


def steady_rate(out: Path) -> float:
    """Rows a second from the third part that was written to the last."""
    parts = sorted((path.stat().st_mtime, path) for path in (out / "tokens").glob("*.parquet"))
    rows = sum(pq.read_metadata(path).num_rows for _, path in parts[3:])
    return float(rows / (parts[-1][0] - parts[2][0]))


def same_ids(root: Path) -> None:
    ours, peer = (ids_by_key(root / name) for name in ("ours", "peer"))
    assert ours.keys() == peer.keys(), "the two did not do the same pictures"
    same = np.mean([np.mean(ours[key] == peer[key]) for key in ours])
    print(f"{len(ours):,} pictures each; {same:.4%} of the ids are the same")
    assert same > 0.999


def ids_by_key(out: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(out / "tokens", columns=["key", "image_ids"])
    ids = table["image_ids"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return dict(zip(table["key"].to_pylist(), ids, strict=True))


def growth(root: Path, shards: str, encoders: str) -> None:
    """Whole seconds of the stage, start-up included, for 1, 2 and 4 times the pictures, and of running it again."""
    seconds = {}
    for count in (SHARDS // 4, SHARDS // 2, SHARDS):
        some = f"{shards}/{{00000..{count - 1:05d}}}.tar"
        seconds[count * PICTURES] = whole_seconds(root, config_of(some, encoders, str(root / "ours")), fresh=True)
    again = whole_seconds(root, config_of(some, encoders, str(root / "ours")), fresh=False)
    (one, first), (two, second), (four, third) = seconds.items()
    print(f"growth: {one:,} pictures {first:.1f} s, {two:,} {second:.1f} s, {four:,} {third:.1f} s")
    print(
        f"  a thousand more cost {(second - first) / (two - one) * 1000:.2f} s, then "
        f"{(third - second) / (four - two) * 1000:.2f} s; the finished job again {again:.1f} s"
    )


def whole_seconds(root: Path, config: PretokenizeConfig, fresh: bool) -> float:
    if fresh:
        shutil.rmtree(root / "ours", ignore_errors=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", STAGE, config.model_dump_json()], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def decode_row(root: Path, encoders: str) -> Row:
    """Reading a tar of 512 x 512 JPEGs, decoding and cropping to 256 in one process, beside Pillow doing no more."""
    shards = write_pictures(root / "large", count=PAIRS, pictures=60, size=(512, 512))
    config, plan = config_of(shards, encoders, "unused", resolution=256), list_shards(shards)
    ours, theirs = iter(plan), iter(plan)  # a pair times the same tar, at most seconds apart

    def decode() -> float:
        began = time.process_time()
        count = sum(len(chunk.facts) for chunk in decode_chunks(next(ours), config))
        return count / (time.process_time() - began)

    def pillow() -> float:
        began = time.process_time()
        count = sum(1 for _ in plain_crops(next(theirs).address, 256))
        return count / (time.process_time() - began)

    goal, unit = 0.95, "pictures/s of a core"
    return compare("decode", "pillow", decode, pillow, goal=goal, unit=unit, packages=PACKAGES, pairs=PAIRS)


def plain_crops(path: str, side: int) -> Iterator[np.ndarray]:
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.name.endswith(".jpg"):
                continue
            image = Image.open(tar.extractfile(member)).convert("RGB")
            scale = side / min(image.size)
            size = max(side, int(image.width * scale)), max(side, int(image.height * scale))
            resized = image.resize(size, Image.Resampling.BILINEAR)
            left, top = round((resized.width - side) / 2), round((resized.height - side) / 2)
            yield np.asarray(resized.crop((left, top, left + side, top + side)))


def write_pictures(folder: Path, count: int, pictures: int, size: tuple[int, int]) -> str:
    """`count` tars of JPEGs of (width, height), as drawn at 256 pixels and enlarged."""
    folder.mkdir()
    for number in range(count):
        drawn = shapes.samples(pictures, 0, 256, held_out=False, start=number * pictures)
        rows = ((one.key, one.image.resize(size), one.caption, {}) for one in drawn)
        write_shard(folder / f"{number:05d}.tar", rows, image_format="jpg")
    return str(folder)


def write_models(folder: Path, shards: str) -> None:
    """Encoders of random weights in the proportions of the real ones: the VQGAN costs most."""
    config = {
        "block_out_channels": [16, 16, 32],
        "layers_per_block": 1,
        "latent_channels": 8,
        "num_vq_embeddings": 512,
        "norm_num_groups": 8,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "act_fn": "silu",
        "mid_block_add_attention": False,
        "lookup_from_codebook": True,
    }
    VQModel(**config).save_pretrained(folder / "vqvae", safe_serialization=True)
    tower = {"width": 64, "layers": 2, "heads": 2, "projection": 32, "patch_size": 8}
    task = ClipTask(
        ClipConfig(
            input=shards, output=str(folder), steps=1, batch_size=8, workers=0, resolution=SIDE, vocabulary=640,
            text_length=32, model=tower,
        )
    )  # fmt: skip
    task.save({f"network.{name}": value for name, value in task.network.state_dict().items()}, folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
