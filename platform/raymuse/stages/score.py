"""How good the pictures are: the judge and CLIP, for base and cascade beside the truth and the VQGAN's round trip.

rows.parquet   one row a picture and kind: the judge's word on every attribute, the CLIP score, the render error
scores.json    means over the rows: whole captions, one and two objects, each attribute; base against cascade
"""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray
from PIL import Image
from ray.data import ActorPoolStrategy

from raymuse.clusters.quiet import quiet_data
from raymuse.config.errors import UserError
from raymuse.config.score import ScoreConfig
from raymuse.datasets.judge import judge, nearest_render
from raymuse.datasets.scenes import parse
from raymuse.encoding.pictures import crop, decode, downscale
from raymuse.frechet import Moments, frechet_distance, pack, unpack
from raymuse.models.clip import Clip
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import weights_sha256
from raymuse.storage.folder import Folder
from raymuse.storage.generated import Generated, read_part
from raymuse.storage.images import list_shards
from raymuse.storage.manifest import Manifest, read_finished
from raymuse.storage.picture_index import PictureIndex
from raymuse.storage.tokens import parquet_bytes
from raymuse.tracking.run import Run

KINDS = ("truth", "vqgan", "vqgan_low", "base", "cascade")
Row = dict[str, Any]


def score(config: ScoreConfig, run: Run) -> str:
    """Score every picture and return the folder of the scores. Needs Ray.

    Raises:
        UserError: for pictures that are not generated to the end, or models that cannot be read.
    """
    parts = read_finished(config.images, "generate")
    _check_pictures(config)
    sums = {"vqgan": weights_sha256(config.model, "vqvae"), "clip": weights_sha256(config.clip, "clip")}
    inputs = [file.sha256 for part in parts.values() for file in part.files]
    manifest = Manifest.open(config.output, {**config.identity(), **sums, "images": inputs})
    if not manifest.finished:
        run.params(config.model_dump(mode="json"))
        rows, moments = _scored(config, list(parts))
        summary = summarise(rows, moments)
        manifest.folder.write("rows.parquet", parquet_bytes(_table(rows), {}))
        manifest.folder.write("scores.json", json.dumps(summary, indent=1, sort_keys=True).encode())
        run.metrics(flat(summary), 0)
        run.text(markdown(summary), "scores.md")
        manifest.finish()
    manifest.release()
    return config.output


def read_scores(address: str) -> dict[str, Any]:
    """scores.json of a finished score stage: `accuracy` and `clip_score` by kind."""
    read_finished(address, "score")
    return dict(json.loads(Folder(address).read("scores.json")))


def summarise(rows: Iterable[Row], moments: Mapping[str, Moments] | None = None) -> dict[str, Any]:
    """Means by kind: `accuracy.KIND.{whole, one_object, two_objects, attributes}` and `clip_score.KIND`.

    And with `moments`, of CLIP's image features by kind, `frechet_distance.KIND` from those of the truth.
    """
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    kinds = [kind for kind in KINDS if kind in by_kind]
    summary: dict[str, Any] = {
        "pictures": {kind: len(by_kind[kind]) for kind in kinds},
        "clip_score": {kind: _mean([row["clip_score"] for row in by_kind[kind]]) for kind in kinds},
    }
    if any(row["attributes"] is not None for row in by_kind[kinds[0]]):
        summary["accuracy"] = {kind: _accuracy(by_kind[kind]) for kind in kinds}
    if moments and "truth" in moments and moments["truth"].count > 1:
        apart = {kind: frechet_distance(moments[kind], moments["truth"]) for kind in kinds if kind != "truth"}
        summary["frechet_distance"] = apart
    base, cascade = by_kind.get("base", []), by_kind.get("cascade", [])
    if len(pairs := _pairs(base, cascade)) > 1:
        summary["render_error"] = _compare(pairs)
        for name, count in (("one_object", 1), ("two_objects", 2)):
            if len(pairs := _pairs(base, [row for row in cascade if _objects(row) == count])) > 1:
                summary["render_error"][name] = _compare(pairs)
    return summary


def render_error(pixels: NDArray[np.uint8], caption: str, side: int) -> float:
    """Root mean square of a picture, enlarged to `side` (bicubic), against the clean render that fits it best.

    In grey levels of 255. The render is fitted to the enlarged picture: see `judge.nearest_render`.
    """
    enlarged = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    difference = enlarged.astype(np.float64) - nearest_render(enlarged, caption)
    return float(np.sqrt((difference**2).mean()))


def flat(summary: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under dotted names."""
    numbers: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, dict):
            numbers.update(flat(value, f"{prefix}{name}."))
        elif value is not None:
            numbers[prefix + name] = float(value)
    return numbers


def markdown(summary: dict[str, Any]) -> str:
    """The scores as a table, a kind a column."""
    kinds = list(summary["pictures"])
    table = {kind: flat({**_measured(summary, kind), **_of(summary, kind)}) for kind in kinds}
    names = list(dict.fromkeys(name for kind in kinds for name in table[kind]))
    lines = [f"| | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for name in names:
        cells = (f"{table[kind][name]:.3f}" if name in table[kind] else "" for kind in kinds)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if (errors := summary.get("render_error")) is not None:
        lines += ["", "Error against the nearest clean render, in grey levels; below 0 the cascade is nearer:"]
        for name, compared in (("all", errors), *((name, errors.get(name)) for name in ("one_object", "two_objects"))):
            if compared is not None:
                interval = f"{compared['difference_low']:.1f} to {compared['difference_high']:.1f}"
                lines += [
                    f"{name}: base {compared['base']:.1f}, cascade {compared['cascade']:.1f}, difference {interval}"
                ]
    return "\n".join(lines) + "\n"


def _check_pictures(config: ScoreConfig) -> None:
    """Raises UserError where nothing was drawn, or a picture's truth is not there."""
    table = pq.read_table(io.BytesIO(Folder(config.images).read("manifest.parquet")), columns=["source_key"])
    if len(table) == 0:
        raise UserError(f"{config.images} holds no pictures: every prompt was rejected. See its rejects folder.")
    if config.truth is not None:
        _Truth(config.truth).require(table["source_key"].to_pylist())


def _scored(config: ScoreConfig, parts: list[str]) -> tuple[list[Row], dict[str, Moments]]:
    """Every picture's row, and the moments of CLIP's image features by kind."""
    quiet_data()
    scored = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        _Scorer, batch_size=1, compute=ActorPoolStrategy(size=config.workers), fn_constructor_kwargs={"config": config}
    )
    rows: list[Row] = []
    moments: dict[str, Moments] = {}
    for part in scored.iter_rows():
        rows += json.loads(part["rows"])
        for kind, found in unpack(part["moments"]).items():
            moments[kind] = moments[kind] + found if kind in moments else found
    return sorted(rows, key=lambda row: (row["key"], KINDS.index(row["kind"]))), moments


class _Scorer:
    """Scores one part of pictures."""

    def __init__(self, config: ScoreConfig) -> None:
        self.config = config
        self.folder = Folder(config.images)
        self.clip = Clip.load(config.clip)
        self.vqgan = Vqgan.load(config.model)
        self.truth = _Truth(config.truth) if config.truth is not None else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        generated = list(read_part(self.folder, batch["part"][0]))
        rows: list[Row] = []
        moments: dict[str, Moments] = {}
        for start in range(0, len(generated), self.config.batch_size):
            rows += self._score(generated[start : start + self.config.batch_size], moments)
        return {"rows": [json.dumps(rows)], "moments": [pack(moments)]}

    def _score(self, generated: list[Generated], moments: dict[str, Moments]) -> list[Row]:
        """Rows of some pictures; what CLIP sees in them is added to `moments`."""
        captions = [one.row.prompt for one in generated]
        said = self.clip.texts(captions)
        rows: list[Row] = []
        for kind, pictures in self._kinds(generated).items():
            seen = self.clip.images(pictures)
            sums = Moments.of(seen.numpy())
            moments[kind] = moments[kind] + sums if kind in moments else sums
            scores = (seen * said).sum(dim=-1).tolist()
            for one, pixels, fit in zip(generated, pictures, scores, strict=True):
                judged = self._judged(one.row.prompt)
                verdict = judge(pixels, one.row.prompt) if judged else None
                rows.append(
                    {
                        "key": one.row.key,
                        "prompt": one.row.prompt,
                        "kind": kind,
                        "clip_score": fit,
                        "attributes": None if verdict is None else dict(verdict.attributes),
                        "correct": None if verdict is None else verdict.correct,
                        "render_error": render_error(pixels, one.row.prompt, one.pixels.shape[0]) if judged else None,
                    }
                )
        return rows

    def _judged(self, caption: str) -> bool:
        if self.config.judge != "auto":
            return self.config.judge == "shapes"
        try:
            parse(caption)
        except UserError:
            return False
        return True

    def _kinds(self, generated: list[Generated]) -> dict[str, NDArray[np.uint8]]:
        """The pictures to be scored, by kind, each uint8 (B, H, W, 3)."""
        pixels = np.stack([one.pixels for one in generated])
        bases = [one.base_pixels for one in generated if one.base_pixels is not None]
        kinds = {"cascade": pixels, "base": np.stack(bases)} if bases else {"base": pixels}
        if self.truth is None:
            return kinds
        truth = np.stack([self.truth.picture(one.row.source_key, pixels.shape[1]) for one in generated])
        low = np.stack([downscale(picture, kinds["base"].shape[1]) for picture in truth])
        round_trips = {"vqgan": self._round_trip(truth), "vqgan_low": self._round_trip(low)}
        return {"truth": truth, **round_trips, **kinds}

    def _round_trip(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.vqgan.decode(self.vqgan.encode(pixels))


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


def _accuracy(rows: list[Row]) -> dict[str, Any]:
    judged = [row for row in rows if row["attributes"] is not None]
    attributes = list(dict.fromkeys(name for row in judged for name in row["attributes"]))
    return {
        "whole": _mean([row["correct"] for row in judged]),
        "one_object": _mean([row["correct"] for row in judged if _objects(row) == 1]),
        "two_objects": _mean([row["correct"] for row in judged if _objects(row) == 2]),
        "attributes": {
            name: _mean([row["attributes"][name] for row in judged if name in row["attributes"]]) for name in attributes
        },
    }


def _objects(row: Row) -> int:
    """How many things the caption of a judged row names; 0: not judged."""
    if row["attributes"] is None:
        return 0
    return 2 if "relation" in row["attributes"] else 1


def _pairs(base: list[Row], cascade: list[Row]) -> NDArray[np.float64]:
    """Render errors (N, 2) of the pictures that have them as base and as cascade."""
    errors = {row["key"]: row["render_error"] for row in base}
    both = [(errors.get(row["key"]), row["render_error"]) for row in cascade]
    return np.array([pair for pair in both if None not in pair], dtype=np.float64)


def _compare(pairs: NDArray[np.float64]) -> dict[str, Any]:
    """Mean errors, and cascade - base with its 95 % interval (normal, paired): below 0 the cascade is nearer."""
    differences = pairs[:, 1] - pairs[:, 0]
    middle, half = float(differences.mean()), 1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5
    return {
        "base": float(pairs[:, 0].mean()),
        "cascade": float(pairs[:, 1].mean()),
        "difference": middle,
        "difference_low": middle - half,
        "difference_high": middle + half,
    }


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _measured(summary: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name: summary[name][kind] for name in ("clip_score", "frechet_distance") if kind in summary.get(name, {})}


def _of(summary: dict[str, Any], kind: str) -> dict[str, Any]:
    return dict(summary.get("accuracy", {}).get(kind, {}))


def _table(rows: list[Row]) -> pa.Table:
    plain = [{**row, "attributes": json.dumps(row["attributes"])} for row in rows]
    return pa.Table.from_pylist(plain)
