"""Captioned pictures from any source to image shards, with held-out prompts.

train/00000.tar ...   img2dataset's WebDataset layout
test/00000.tar ...    pictures whose captions (attribute combinations) are never trained
prompts.jsonl         the test captions, in the order of the test pictures
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from PIL import Image

from raymuse.config.data import DataConfig
from raymuse.config.errors import UserError
from raymuse.datasets import emoji, shapes
from raymuse.datasets.sample import Sample
from raymuse.encoding.pictures import crop, decode
from raymuse.storage.contact_sheet import Entry, sheet_png
from raymuse.storage.folder import Folder
from raymuse.storage.images import Picture, list_shards
from raymuse.storage.manifest import FileRecord, Manifest, PartRecord
from raymuse.storage.picture_index import PictureIndex
from raymuse.storage.picture_scan import PictureScan
from raymuse.storage.rejects import Unreadable
from raymuse.storage.webdataset_writer import encode, write_tar
from raymuse.tracking.run import Run

BYTES_A_PICTURE = 12_000
LARGEST_TEST_SHARE = 0.1
SHOWN, SHOWN_SIDE = 36, 96  # pictures that the run shows, and their pixels


@dataclass(frozen=True)
class Part:
    """One shard of the plan: which pictures of which split."""

    split: str
    number: int
    start: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    @property
    def file(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"


# Draws the pictures of a part as tar members' content: key, encoded picture and its ending, caption.
Source = Callable[[Part], Iterator[tuple[str, bytes, str, str]]]


def make_data(config: DataConfig, run: Run) -> str:
    """Write image shards and prompts, and return their folder. Needs Ray.

    Raises:
        UserError: for a source that is missing or empty, and an output that cannot be written or is another's.
    """
    Folder(config.output).require_local("the trainings read single pictures out of its tars")
    source, sizes = _source(config)
    manifest = Manifest.open(config.output, {**config.identity(), "sizes": sizes})
    plan = plan_parts(sizes, config.pictures_per_shard)
    if not manifest.finished:
        manifest.folder.require_free(sum(sizes.values()) * BYTES_A_PICTURE)
        _write(manifest, plan, source, config.workers)
        _write_prompts(manifest, plan)
        manifest.finish(**sizes)
    manifest.release()
    run.metrics({f"pictures_{split}": float(count) for split, count in sizes.items()}, 0)
    if run.id is not None:
        run.picture("pictures", _sheet(manifest, plan[0]), 0)
    return config.output


def check_source(config: DataConfig) -> None:
    """Raise UserError where the source is missing or empty, before anything is started or written."""
    if config.source == "emoji":
        emoji.find_font()
    elif config.source != "shapes":
        list_shards(config.source)


def plan_parts(sizes: dict[str, int], per_shard: int) -> list[Part]:
    """The shards of every split, in order."""
    return [
        Part(split, number, start, min(per_shard, size - start))
        for split, size in sizes.items()
        for number, start in enumerate(range(0, size, per_shard))
    ]


def _source(config: DataConfig) -> tuple[Source, dict[str, int]]:
    """How to make a part's pictures, and how many there are of each split."""
    wanted = {"train": config.train, "test": config.test}
    if config.source == "shapes":
        return partial(_shapes, config=config), wanted
    if config.source == "emoji":
        return partial(_emoji, config=config, font=emoji.find_font()), wanted
    return _folder_source(config)


def _shapes(part: Part, config: DataConfig) -> Iterator[tuple[str, bytes, str, str]]:
    held_out = part.split == "test"
    drawn = shapes.samples(
        part.count, config.seed, config.resolution, held_out, two_objects=config.two_objects, start=part.start
    )
    yield from map(_encoded, drawn)


def _emoji(part: Part, config: DataConfig, font: Path) -> Iterator[tuple[str, bytes, str, str]]:
    held_out = part.split == "test"
    drawn = emoji.samples(part.count, config.seed, config.resolution, held_out, start=part.start, font=font)
    yield from map(_encoded, drawn)


def _encoded(sample: Sample) -> tuple[str, bytes, str, str]:
    return sample.key, encode(sample.image), "png", sample.caption


def _folder_source(config: DataConfig) -> tuple[Source, dict[str, int]]:
    """The input's own files, unchanged; the pictures whose keys hash lowest are held out."""
    shards = list_shards(config.source)
    spans = all(shard.kind in ("tar", "folder") for shard in shards)
    index = PictureIndex(shards) if spans else PictureScan(shards)
    if len(index) < 2:
        raise UserError(
            f"{config.source} holds {len(index)} usable picture(s) (refused: {index.refused() or 'none'}); "
            "training and testing need at least 2."
        )
    numbers = sorted(range(len(index)), key=lambda number: _hash(index.key(number)))
    test = max(1, min(config.test, int(len(index) * LARGEST_TEST_SHARE)))
    splits = {"train": sorted(numbers[test:])[: config.train], "test": sorted(numbers[:test])}
    if refused := index.refused():
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
        print(f"left out of {config.source} beside {len(index)} usable pictures: {reasons}", flush=True)
    sizes = {split: len(chosen) for split, chosen in splits.items()}
    return partial(_from_index, index=index, splits=splits), sizes


def _from_index(
    part: Part, index: PictureIndex | PictureScan, splits: dict[str, list[int]]
) -> Iterator[tuple[str, bytes, str, str]]:
    pictures = index.take(splits[part.split][part.start : part.start + part.count])
    for place, picture in enumerate(pictures, part.start):
        yield f"{place:09d}", picture.data, _ending(picture), picture.captions[0]


def _ending(picture: Picture) -> str:
    """The ending that the picture's first bytes call for."""
    magic = {b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}
    if picture.data[8:12] == b"WEBP":
        return "webp"
    return next((ending for start, ending in magic.items() if picture.data.startswith(start)), "jpg")


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _write(manifest: Manifest, plan: list[Part], source: Source, workers: int) -> None:
    """Write the missing shards, `workers` at a time, recording each as it comes in."""
    pending = set(manifest.pending(part.name for part in plan))
    todo = [part for part in plan if part.name in pending]
    held = ray.put(source)
    running: list[ray.ObjectRef] = []
    while todo or running:
        while todo and len(running) < workers:
            running.append(_write_part.remote(manifest.folder.address, todo.pop(0), held))
        ready, running = ray.wait(running)
        for record in ray.get(ready):
            manifest.record(record)


@ray.remote(num_cpus=1)
def _write_part(address: str, part: Part, source: Source) -> PartRecord:
    members: list[tuple[str, bytes]] = []
    for key, data, ending, caption in source(part):
        facts = {"key": key, "caption": caption, "status": "success"}
        members.append((f"{key}.{ending}", data))
        members.append((f"{key}.txt", caption.encode()))
        members.append((f"{key}.json", json.dumps(facts, sort_keys=True).encode()))
    path = f"{address}/{part.file}"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, members)
    data = Folder(address).read(part.file)
    return PartRecord(part.name, part.count, 0, part.split, [FileRecord.of(part.file, data)])


def _write_prompts(manifest: Manifest, plan: list[Part]) -> None:
    """One line a test picture: its key and caption."""
    shards = [shard for part in plan if part.split == "test" for shard in list_shards(_inside(manifest, part.file))]
    index = PictureIndex(shards)
    rows: list[dict[str, Any]] = [
        {"key": index.key(number), "prompt": index.captions(number)[0]} for number in range(len(index))
    ]
    manifest.folder.write("prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def _sheet(manifest: Manifest, part: Part) -> Image.Image:
    """Some pictures of a shard with their captions."""
    index = PictureIndex(list_shards(_inside(manifest, part.file)))
    entries = []
    for one in index.take(range(min(SHOWN, len(index)))):
        with contextlib.suppress(Unreadable):  # pretokenize will say so
            entries.append(Entry(one.captions[0], (crop(decode(one.data), SHOWN_SIDE).pixels,)))
    return sheet_png(entries, ("picture",), f"{len(entries)} of {part.count} pictures of {part.file}")


def _inside(manifest: Manifest, file: str) -> str:
    return (manifest.folder / file).address
