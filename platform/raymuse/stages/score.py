"""How good the pictures are: the judge, CLIP, Inception and the VQGAN, for base and cascade beside the truth.

parts/, features/   a file a part: rows, and what the networks saw (safetensors)
rows.parquet        one row a picture and kind: the judge's word on every attribute, the CLIP score, the render error
scores.json         means over the rows (whole captions, one and two objects, each attribute), distances of the sets
"""

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.config.score import ScoreConfig
from raymuse.encoding.pictures import crop, decode, downscale
from raymuse.scoring.collected import features_bytes, features_file
from raymuse.scoring.measures import Features, Measures, Row, Subject, extractors, joined
from raymuse.scoring.parts import collect_parts, run_parts, written
from raymuse.scoring.real_pictures import get_reference, reference_facts
from raymuse.scoring.reference import Reference
from raymuse.scoring.rows import read_rows, rows_bytes, rows_file
from raymuse.scoring.summary import KINDS, flat, kinds_of, markdown, set_figures, summarise
from raymuse.storage.folder import Folder
from raymuse.storage.generated import Generated, read_part
from raymuse.storage.images import list_shards
from raymuse.storage.manifest import Manifest, read_finished
from raymuse.storage.picture_index import PictureIndex
from raymuse.tracking.run import Run


def score(config: ScoreConfig, run: Run) -> str:
    """Score every picture and return the folder of the scores. Needs Ray.

    Raises:
        UserError: for pictures that are not generated to the end, networks or statistics that cannot be read, and
            statistics of something else.
    """
    parts = read_finished(config.images, "generate")
    side = _check_pictures(config)
    if (config.clip, config.inception, config.model) == (None, None, None) and config.judge == "none":
        raise UserError("nothing looks at the pictures: give clip, inception or model, or judge=auto.")
    wanted = reference_facts(config, config.model, side)
    facts: dict[str, Any] = {"extractors": extractors(config, config.model), "reference": wanted}
    facts["images"] = [file.sha256 for part in parts.values() for file in part.files]
    manifest = Manifest.open(config.output, {**config.identity(), **facts})
    if not manifest.finished:
        run.params(config.model_dump(mode="json"))
        names = list(parts)
        run_parts(
            manifest,
            names,
            _Scorer,
            {"config": config},
            workers=config.workers,
            gpus=config.gpus_per_worker,
            what="scores",
        )
        reference = None if wanted is None else get_reference(manifest, config, config.model, wanted)
        summary = _finish(manifest, config, names, reference)
        run.metrics(flat(summary), 0)
        run.text(markdown(summary), "scores.md")
        manifest.finish()
    manifest.release()
    return config.output


def read_scores(address: str) -> dict[str, Any]:
    """scores.json of a finished score stage: `accuracy`, `clip_score` and other figures by kind."""
    read_finished(address, "score")
    return dict(json.loads(Folder(address).read("scores.json")))


def _check_pictures(config: ScoreConfig) -> int:
    """The side of the pictures in pixels, the shorter one of the first.

    Raises:
        UserError: nothing was drawn, not as many as the protocol asks for, or a picture's truth is not there.
    """
    columns = ["source_key", "width", "height"]
    table = pq.read_table(io.BytesIO(Folder(config.images).read("manifest.parquet")), columns=columns)
    if len(table) == 0:
        raise UserError(f"{config.images} holds no pictures: every prompt was rejected. See its rejects folder.")
    if config.pictures is not None and len(table) != config.pictures:
        raise UserError(
            f"{config.images} holds {len(table)} pictures and the protocol asks for {config.pictures}: draw so many, "
            "or say pictures=null; figures of another number are not comparable."
        )
    if config.truth is not None:
        _Truth(config.truth).require(table["source_key"].to_pylist())
    return int(min(table["width"][0].as_py(), table["height"][0].as_py()))


def _finish(
    manifest: Manifest, config: ScoreConfig, names: Sequence[str], reference: Reference | None
) -> dict[str, Any]:
    """Put rows.parquet and scores.json in place, from the parts."""
    tables = [read_rows(manifest.folder, name) for name in names]
    rows = sorted((row for table in tables for row in table), key=lambda row: (row["key"], KINDS.index(row["kind"])))
    found = collect_parts(manifest.folder.address, names, config.kept_features, config.workers)
    kinds = kinds_of(rows)
    against = dict.fromkeys(kinds, reference)
    if reference is None and "truth" in kinds:
        against = {**dict.fromkeys(kinds, Reference.of(found.named("truth"), {})), "truth": None}
    figures = {kind: set_figures(found.named(kind), against[kind], config) for kind in kinds}
    summary = summarise(rows, figures)
    manifest.folder.write("rows.parquet", rows_bytes(rows))
    manifest.folder.write("scores.json", json.dumps(summary, indent=1, sort_keys=True).encode())
    return summary


class _Scorer:
    """Scores one part of pictures."""

    def __init__(self, config: ScoreConfig) -> None:
        self.config = config
        self.folder = Folder(config.images)
        self.measures = Measures(config, config.model)
        self.truth = _Truth(config.truth) if config.truth is not None else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        part = str(batch["part"][0])
        generated = list(read_part(self.folder, part))
        rows: list[Row] = []
        seen: dict[str, list[Features]] = {}
        for start in range(0, len(generated), self.config.batch_size):
            some = generated[start : start + self.config.batch_size]
            for kind, pictures in self._kinds(some).items():
                keys, prompts = [one.row.key for one in some], [one.row.prompt for one in some]
                said, found = self.measures.look(pictures, Subject(kind, keys, prompts, some[0].pixels.shape[0]))
                rows += said
                seen.setdefault(kind, []).append(found)
        features = {kind: joined(found) for kind, found in seen.items()}
        files = {rows_file(part): rows_bytes(rows), features_file(part): features_bytes(features)}
        return written(self.config.output, part, files, len(rows))

    def _kinds(self, generated: list[Generated]) -> dict[str, NDArray[np.uint8]]:
        """The pictures to be scored, by kind, each uint8 (B, H, W, 3)."""
        pixels = np.stack([one.pixels for one in generated])
        bases = [one.base_pixels for one in generated if one.base_pixels is not None]
        kinds = {"cascade": pixels, "base": np.stack(bases)} if bases else {"base": pixels}
        if self.truth is None:
            return kinds
        truth = np.stack([self.truth.picture(one.row.source_key, pixels.shape[1]) for one in generated])
        if self.measures.vqgan is None:
            return {"truth": truth, **kinds}
        low = np.stack([downscale(picture, kinds["base"].shape[1]) for picture in truth])
        round_trips = {"vqgan": self._round_trip(truth), "vqgan_low": self._round_trip(low)}
        return {"truth": truth, **round_trips, **kinds}

    def _round_trip(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        assert self.measures.vqgan is not None
        return self.measures.vqgan.decode(self.measures.vqgan.encode(pixels))


class _Truth:
    """The true pictures of the prompts, by key."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.index = PictureIndex(list_shards(address))
        self.numbers = {self.index.key(number): number for number in range(len(self.index))}

    def require(self, keys: Iterable[str]) -> None:
        """Raises UserError where a key has no picture."""
        missing = [key for key in keys if key not in self.numbers]
        if missing:
            raise UserError(
                f"{self.address} has no picture with the key {missing[0]!r} ({len(missing)} of the prompts have none): "
                "leave `truth` out for other prompts."
            )

    def picture(self, key: str, side: int) -> NDArray[np.uint8]:
        return crop(decode(self.index[self.numbers[key]].data), side).pixels
