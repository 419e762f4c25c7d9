"""Two models, or two ways to draw, on the same prompts and seeds, side by side: `score --compare`.

compare.json, compare.md                  who wins how often, by CLIP score and by the judge, with intervals
contact_sheet.png, contact_sheet.html     the pairs, the better one framed
parts/, features/                         a file a side and chunk of prompts; rows hold the pictures as PNG
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymuse.config.errors import UserError
from raymuse.config.sampling import Options
from raymuse.config.score import CompareConfig, SideConfig
from raymuse.drawing.model_folder import model_sha256
from raymuse.scoring.drawn import DrawnPart, PlannedPart, Way, asked_of, asked_sha256, plan_drawn, resolved, sampling_of
from raymuse.scoring.measures import Row, extractors
from raymuse.scoring.paired import Paired
from raymuse.scoring.paired import compare as compare_pairs
from raymuse.scoring.parts import collect_parts, run_parts
from raymuse.scoring.real_pictures import get_reference, reference_facts
from raymuse.scoring.rows import read_rows
from raymuse.scoring.summary import LOWER_IS_BETTER, figures_of, flat, set_figures, summarise
from raymuse.scoring.tables import markdown_table, rounded
from raymuse.storage.contact_sheet import Entry, sheet_html, sheet_png
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import Manifest, read_finished
from raymuse.tracking.run import Run

SIDES = ("a", "b")
SHEET_PAIRS = 36
PAGE_PAIRS = 360
MEASURES = {"clip_score": "CLIP score", "correct": "judge"}
"""What pairs are compared by: columns of the rows, and what they are called."""


def compare(config: CompareConfig, run: Run) -> str:
    """Draw or read both sides, and return the folder of the comparison. Needs Ray.

    Raises:
        UserError: for sides, prompts or a reference that cannot be, before anything is drawn, and sides of other
            prompts or seeds.
    """
    looks = config.a.model or config.b.model
    sides = {name: getattr(config, name) for name in SIDES}
    wanted = reference_facts(config, looks, _side_of(config))
    if config.clip is None and config.judge == "none":
        raise UserError("nothing looks at the pairs: give clip=FOLDER, or judge=auto for captions of shapes.")
    facts: dict[str, Any] = {
        "sides": {name: _identity(side) for name, side in sides.items()},
        "extractors": extractors(config, looks),
        "reference": wanted,
    }
    plan = _plan(config)
    facts["prompts"] = asked_sha256(one for part in plan.values() for one in part.asked)
    manifest = Manifest.open(config.output, {**config.identity(), **facts})
    if not manifest.finished:
        run.params(config.model_dump(mode="json"))
        ways = {name: _way(name, side) for name, side in sides.items()}
        run_parts(
            manifest,
            list(plan),
            DrawnPart,
            {"config": config, "ways": ways, "plan": plan, "looks": looks, "shown": None},
            workers=config.workers,
            gpus=config.gpus_per_worker,
            what="pairs",
            work="draw",
        )
        reference = None if wanted is None else get_reference(manifest, config, looks, wanted)
        found = collect_parts(config.output, list(plan), config.kept_features, config.workers)
        rows = {side: _rows(manifest.folder, plan, side) for side in SIDES}
        pairs = _pairs(rows["a"], rows["b"])
        figures = {side: set_figures(found.named(side), reference, config) for side in SIDES}
        summary = summarise([row for side in SIDES for row in rows[side].values()], figures)
        _report(manifest.folder, config, pairs, summary, run)
        manifest.finish()
    manifest.release()
    print(read_comparison(config.output)["said"], flush=True)
    return config.output


def read_comparison(address: str) -> dict[str, Any]:
    """compare.json of a finished comparison."""
    read_finished(address, "score --compare")
    return dict(json.loads(Folder(address).read("compare.json")))


def label_of(side: SideConfig, other: SideConfig) -> str:
    """What a side is called: its label, or its address and options as far as they differ from the other's."""
    if side.label is not None:
        return side.label
    own, others = (str(one.images or one.model) for one in (side, other))
    different = [f"{name}={value}" for name, value in side.options.items() if other.options.get(name) != value]
    if side.adapters != other.adapters:
        different += list(side.adapters) or ["no LoRA"]
    name = "" if own == others else own
    return " ".join([*([name] if name else []), *different]) or "the model's defaults"


def _identity(side: SideConfig) -> dict[str, Any]:
    if side.images is not None:
        return {
            "images": [file.sha256 for part in read_finished(side.images, "generate").values() for file in part.files]
        }
    assert side.model is not None
    own, _ = sampling_of(side.model)
    sampling = resolved(side.model, own, _options(side))
    return {"model": model_sha256(side.model, side.adapters), "sampling": sampling.model_dump(mode="json")}


def _options(side: SideConfig) -> Options:
    return cast(Options, side.options)


def _way(name: str, side: SideConfig) -> Way:
    return Way(name, side.images, side.model, side.adapters, _options(side))


def _side_of(config: CompareConfig) -> int:
    """Pixels a side of the pictures, for the reference."""
    if config.size is not None:
        return min(config.size)
    for side in (config.a, config.b):
        if side.model is not None:
            return sampling_of(side.model)[1]
    import pyarrow.parquet as pq

    assert config.a.images is not None
    read_finished(config.a.images, "generate")
    table = pq.read_table(io.BytesIO(Folder(config.a.images).read("manifest.parquet")), columns=["width", "height"])
    if len(table) == 0:
        raise UserError(f"{config.a.images} holds no pictures: every prompt was rejected. See its rejects folder.")
    return int(min(table["width"][0].as_py(), table["height"][0].as_py()))


def _plan(config: CompareConfig) -> dict[str, PlannedPart]:
    """The parts of both sides, a's first: of one that draws chunks of prompts, of finished pictures their parts."""
    asked = [] if config.prompts is None else asked_of(config, config.prompts)
    plan: dict[str, PlannedPart] = {}
    for name in SIDES:
        side: SideConfig = getattr(config, name)
        if side.images is None:
            plan |= plan_drawn(name, asked, config.pictures_per_part)
        else:
            parts = read_finished(side.images, "generate")
            plan |= {f"{name}-{part}": PlannedPart(name, source=part) for part in parts}
    return plan


def _rows(folder: Folder, plan: Mapping[str, PlannedPart], side: str) -> dict[str, Row]:
    """A side's rows by the pictures' keys."""
    parts = [part for part, planned in plan.items() if planned.way == side]
    return {row["key"]: row for part in parts for row in read_rows(folder, part)}


def _pairs(a: Mapping[str, Row], b: Mapping[str, Row]) -> list[tuple[Row, Row]]:
    """Rows of both sides, a pair a key, in the order of the keys.

    Raises:
        UserError: a pair's prompts or seeds differ, or there are fewer than two pairs.
    """
    pairs = [(a[key], b[key]) for key in sorted(a.keys() & b.keys())]
    for one, other in pairs:
        for name in ("prompt", "seed"):
            if one[name] != other[name]:
                raise UserError(
                    f"picture {one['key']} is of the {name} {one[name]!r} in a and {other[name]!r} in b: compare "
                    "pictures of the same prompts and run seed."
                )
    if len(pairs) < 2:
        raise UserError(f"a and b have {len(pairs)} pictures in common ({len(a)} and {len(b)} in all): two are needed.")
    if alone := len(a) + len(b) - 2 * len(pairs):
        print(f"{alone} pictures have no partner and are left out", flush=True)
    return pairs


def _report(
    folder: Folder, config: CompareConfig, pairs: Sequence[tuple[Row, Row]], summary: Mapping[str, Any], run: Run
) -> None:
    """The win table and the sheets, into the folder and to MLflow."""
    labels = {"a": label_of(config.a, config.b), "b": label_of(config.b, config.a)}
    results = {name: result for name in MEASURES if (result := _compared(config, pairs, name)) is not None}
    if not results:
        raise UserError("no pair can be compared: the captions are not of shapes, and no clip is given.")
    said = " ".join(_said(result, labels, MEASURES[name]) for name, result in results.items())
    table = _win_table(results, labels, config.confidence)
    figures = {side: flat({k: v for k, v in figures_of(summary, side).items() if k != "attributes"}) for side in SIDES}
    record = {
        "labels": labels,
        "said": said,
        "confidence": config.confidence,
        "method": f"percentile bootstrap over prompts, {config.resamples} resamples; exact two-sided sign test",
        "by": {name: asdict(result) for name, result in results.items()},
        "figures": figures,
    }
    text = f"{said}\n\n{markdown_table(table)}\n{markdown_table(_figures_table(figures, labels))}"
    entries = [_entry(one, other) for one, other in pairs[:PAGE_PAIRS]]
    names, title = (labels["a"], labels["b"]), f"{len(pairs)} pairs"
    sheet, buffer = sheet_png(entries[:SHEET_PAIRS], names, title), io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    folder.write("compare.json", json.dumps(record, indent=1).encode())
    folder.write("compare.md", text.encode())
    folder.write("contact_sheet.png", buffer.getvalue())
    folder.write("contact_sheet.html", sheet_html(entries, names, f"{title}: {said}", table).encode())
    numbers = {
        f"{name}.{key}": value for name, result in results.items() for key, value in flat(asdict(result)).items()
    }
    run.metrics({**numbers, **flat({side: figures[side] for side in SIDES})}, 0)
    run.table([{"side": labels[side], **figures[side]} for side in SIDES], "compare.json")
    run.picture("contact_sheet", sheet, 0)
    run.text(text, "compare.md")


def _compared(config: CompareConfig, pairs: Sequence[tuple[Row, Row]], name: str) -> Paired | None:
    """By one column, over the pairs that have it; None: fewer than two have."""
    known = [(one, other) for one, other in pairs if one[name] is not None and other[name] is not None]
    if len(known) < 2:
        return None
    values: NDArray[np.float64] = np.array([[one[name], other[name]] for one, other in known], dtype=np.float64)
    return compare_pairs(
        values[:, 0], values[:, 1], [one["index"] for one, _ in known], config.confidence, config.resamples
    )


def _said(result: Paired, labels: Mapping[str, str], measure: str) -> str:
    """One sentence of the verdict."""
    if result.better is None:
        return f"By {measure} neither is shown to be better (p = {result.p_value:.2g})."
    worse = "b" if result.better == "a" else "a"
    return f"By {measure} {labels[result.better]} is better than {labels[worse]} (p = {result.p_value:.2g})."


def _win_table(results: Mapping[str, Paired], labels: Mapping[str, str], confidence: float) -> list[list[str]]:
    """Rows of cells, heads first."""
    a, b = labels["a"], labels["b"]
    level = f"{confidence:.0%}"
    heads = ["by", f"{a} wins", f"{b} wins", "ties", f"share won by {a} ({level})", a, b, f"difference ({level})", "p"]
    rows = [heads]
    for name, x in results.items():
        share = f"{x.share_a.value:.1%} ({x.share_a.low:.1%} to {x.share_a.high:.1%})"
        apart = f"{x.difference.value:+.4f} ({x.difference.low:+.4f} to {x.difference.high:+.4f})"
        wins = [str(x.wins_a), str(x.wins_b), str(x.ties), share]
        rows.append([MEASURES[name], *wins, f"{x.mean_a:.4f}", f"{x.mean_b:.4f}", apart, f"{x.p_value:.2g}"])
    return rows


def _figures_table(figures: Mapping[str, Mapping[str, float]], labels: Mapping[str, str]) -> list[list[str]]:
    """Every figure of both sides; of distances the lower one is the better."""
    rows = [["", labels["a"], labels["b"]]]
    for name in dict.fromkeys(name for side in SIDES for name in figures[side]):
        cells = [rounded(figures[side][name]) if name in figures[side] else "" for side in SIDES]
        rows.append([f"{name} (lower is better)" if name in LOWER_IS_BETTER else name, *cells])
    return rows


def _entry(one: Row, other: Row) -> Entry:
    """A pair on the sheet: the one that is right framed, or else the one with the better CLIP score."""
    best: int | None = None
    for name in ("correct", "clip_score"):
        if best is None and one[name] is not None and other[name] is not None and one[name] != other[name]:
            best = 0 if one[name] > other[name] else 1
    notes = tuple(_note(row) for row in (one, other))
    pictures = tuple(np.asarray(Image.open(io.BytesIO(row["png"])).convert("RGB")) for row in (one, other))
    return Entry(one["prompt"], pictures, notes, best)


def _note(row: Row) -> str:
    words = [] if row["correct"] is None else ["right" if row["correct"] else "wrong"]
    return " ".join([*words, *([] if row["clip_score"] is None else [f"{row['clip_score']:.3f}"])])
