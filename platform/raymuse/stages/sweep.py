"""The same prompts and seeds drawn with every combination of sampling options, and each measured: `score --sweep`.

sweep.json, sweep.md, sweep.png   the table, with the best row named; quality against pictures/s
samples.png                       the first prompts, a row a combination
parts/, features/                 a file a combination and chunk of prompts, so that a resume draws what is missing
"""

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image

from raymuse.config.errors import UserError
from raymuse.config.sampling import Options
from raymuse.config.score import SweepConfig
from raymuse.drawing.model_folder import model_sha256
from raymuse.scoring.drawn import (
    DrawnPart,
    PlannedPart,
    PlannedPicture,
    Way,
    asked_of,
    asked_sha256,
    plan_drawn,
    resolved,
    sampling_of,
)
from raymuse.scoring.measures import Row, extractors, is_judged
from raymuse.scoring.paired import half_width
from raymuse.scoring.parts import collect_parts, run_parts
from raymuse.scoring.real_pictures import get_reference, reference_facts
from raymuse.scoring.reference import Reference
from raymuse.scoring.rows import read_rows
from raymuse.scoring.summary import LOWER_IS_BETTER, figures_of, set_figures, summarise
from raymuse.scoring.sweep_plot import sweep_plot
from raymuse.scoring.tables import markdown_table, rounded
from raymuse.storage.contact_sheet import grid_png
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import Manifest, read_finished
from raymuse.tracking.run import Run

KIND = "picture"
SHOWN = 8  # prompts on the sheet of samples
Point = dict[str, Any]
"""`way`, `options` (of all that vary), `pictures`, `rate` (pictures/s of one worker), `figures`, `quality`,
`half_width` of its 95 % interval (None: not known)."""


def sweep(config: SweepConfig, run: Run) -> str:
    """Draw and measure every combination, and return the folder of the table. Needs Ray.

    Raises:
        UserError: for a model, prompts, options or a reference that cannot be, before anything is drawn.
    """
    own, side = sampling_of(config.model)
    ways = {f"p{number:03d}": way for number, way in enumerate(_ways(config))}
    for way in ways.values():
        resolved(config.model, own, way.options)
    asked = asked_of(config, config.prompts)
    wanted = reference_facts(config, config.model, min(config.size or (side, side)))
    _check_by(config)
    if config.by == "accuracy" and not any(is_judged(config.judge, one.prompt) for one in asked):
        raise UserError(f"by=accuracy: no prompt of {config.prompts} is of drawn shapes, and others have no judge.")
    facts = {
        "model_sha256": model_sha256(config.model, config.adapters),
        "prompts": asked_sha256(asked),
        "extractors": extractors(config, config.model),
        "reference": wanted,
    }
    manifest = Manifest.open(config.output, {**config.identity(), **facts})
    if not manifest.finished:
        run.params(config.model_dump(mode="json"))
        print(f"{len(ways)} combinations of {len(asked)} pictures", flush=True)
        plans = {name: plan_drawn(name, asked, config.pictures_per_part) for name in ways}
        _draw_all(manifest, config, ways, plans, asked)
        reference = None if wanted is None else get_reference(manifest, config, config.model, wanted)
        points = [_point(manifest, config, name, way, plans[name], reference) for name, way in ways.items()]
        _report(manifest, config, points, plans, run)
        manifest.finish()
    manifest.release()
    print(json.loads(manifest.folder.read("sweep.json"))["said"], flush=True)
    return config.output


def read_sweep(address: str) -> dict[str, Any]:
    """sweep.json of a finished sweep: `by`, `best` (a point), `points`."""
    read_finished(address, "score --sweep")
    return dict(json.loads(Folder(address).read("sweep.json")))


def _ways(config: SweepConfig) -> list[Way]:
    """Every combination, the last option varying fastest."""
    choices = config.choices
    combined = (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    return [Way(KIND, None, config.model, config.adapters, cast(Options, options)) for options in combined]


def _check_by(config: SweepConfig) -> None:
    """Raise UserError where nothing of the config measures what the best row is to be best by."""
    has_reference = config.reference is not None or config.statistics is not None
    needs: dict[str, tuple[bool, str]] = {
        "accuracy": (config.judge != "none", "judge=auto or shapes, and captions of shapes"),
        "clip_score": (config.clip is not None, "clip"),
        "fid": (config.inception is not None and has_reference, "inception, and reference or statistics"),
        "kid": (config.inception is not None and has_reference, "inception, and reference or statistics"),
        "clip_fid": (config.clip is not None and has_reference, "clip, and reference or statistics"),
        "vqgan_fd": (has_reference, "reference or statistics"),
        "inception_score": (config.inception is not None, "inception"),
    }
    if config.by != "auto" and not needs[config.by][0]:
        raise UserError(f"by={config.by} needs {needs[config.by][1]}: give it, or choose another figure.")
    if (
        config.by == "auto"
        and config.judge == "none"
        and not any(needs[name][0] for name in needs if name != "accuracy")
    ):
        raise UserError("nothing looks at the pictures: give clip, inception with a reference, or judge=shapes.")


def _draw_all(
    manifest: Manifest,
    config: SweepConfig,
    ways: Mapping[str, Way],
    plans: Mapping[str, Mapping[str, PlannedPart]],
    asked: Sequence[PlannedPicture],
) -> None:
    plan = {part: planned for parts in plans.values() for part, planned in parts.items()}
    shown = frozenset(one.key for one in asked[:SHOWN])
    run_parts(
        manifest,
        list(plan),
        DrawnPart,
        {"config": config, "ways": dict(ways), "plan": plan, "looks": config.model, "shown": shown},
        workers=config.workers,
        gpus=config.gpus_per_worker,
        what="sweep",
        work="draw",
    )


def _point(
    manifest: Manifest,
    config: SweepConfig,
    name: str,
    way: Way,
    plan: Mapping[str, PlannedPart],
    reference: Reference | None,
) -> Point:
    """One combination's row of the table; `quality` is added when all are known."""
    parts = list(plan)
    rows = [row for part in parts for row in read_rows(manifest.folder, part)]
    found = collect_parts(manifest.folder.address, parts, config.kept_features, config.workers).named(KIND)
    figures = figures_of(summarise(rows, {KIND: set_figures(found, reference, config)}), KIND)
    seconds = sum(manifest.done[part].counts["seconds"] for part in parts)
    figures.pop("attributes", None)
    said = {"accuracy": figures.pop("whole")} if "whole" in figures else {}
    return {
        "way": name,
        "options": dict(way.options),
        "pictures": len(rows),
        "rate": len(rows) / seconds,
        "figures": {**said, **{key: value for key, value in figures.items() if value is not None}},
        "half_widths": {"accuracy": _half_width(rows, "correct"), "clip_score": _half_width(rows, "clip_score")},
    }


def _half_width(rows: Sequence[Row], column: str) -> float | None:
    """Half of the 95 % interval (normal) of a mean over the rows; None: there are too few."""
    values = [float(row[column]) for row in rows if row[column] is not None]
    return None if len(values) < 2 else half_width(np.array(values))


def _report(
    manifest: Manifest,
    config: SweepConfig,
    points: list[Point],
    plans: Mapping[str, Mapping[str, PlannedPart]],
    run: Run,
) -> None:
    """The table, the plot and the samples, into the folder and to MLflow."""
    by = config.by if config.by != "auto" else _auto(points[0]["figures"])
    if by not in points[0]["figures"]:
        raise UserError(f"by={by}: the pictures have no such figure; they have {', '.join(points[0]['figures'])}.")
    for point in points:
        point["quality"] = point["figures"][by]
        point["half_width"] = point.pop("half_widths").get(by)
    sign = -1 if by in LOWER_IS_BETTER else 1
    best = max(range(len(points)), key=lambda place: sign * points[place]["quality"])
    varied = [name for name, values in config.choices.items() if len(values) > 1]
    said = _said(points, best, by)
    table = _markdown(points, best, by, list(config.choices), said)
    plot = sweep_plot(points, by, best, varied)
    record = {"by": by, "best": points[best], "said": said, "points": points}
    manifest.folder.write("sweep.json", json.dumps(record, indent=1).encode())
    manifest.folder.write("sweep.md", table.encode())
    manifest.folder.write("sweep.png", plot)
    samples = _samples(manifest, points, plans, varied)
    manifest.folder.write("samples.png", samples)
    for place, point in enumerate(points):
        run.metrics({**point["figures"], "pictures_per_second": point["rate"]}, place)
    run.metrics({f"best.{name}": value for name, value in points[best]["figures"].items()}, 0)
    run.params({f"best.{name}": value for name, value in points[best]["options"].items()})
    run.table([_flat_point(point) for point in points], "sweep.json")
    run.picture("sweep", Image.open(io.BytesIO(plot)), 0)
    run.picture("samples", Image.open(io.BytesIO(samples)), 0)
    run.text(table, "sweep.md")


def _auto(figures: Mapping[str, float]) -> str:
    return next(name for name in ("accuracy", "fid", "clip_score", *figures) if name in figures)


def _said(points: Sequence[Point], best: int, by: str) -> str:
    """One sentence: the best row, and which others it cannot be told from."""
    point = points[best]
    options = " ".join(f"{name}={_value(value)}" for name, value in point["options"].items()) or "the model's defaults"
    half = point["half_width"]
    width = "" if half is None else f" +- {rounded(half)}"
    sentence = f"best by {by}: {options} ({rounded(point['quality'])}{width}, {point['rate']:.2f} pictures/s)"
    if half is None:
        return sentence
    near = [x for x in points if x is not point and abs(x["quality"] - point["quality"]) <= half]
    if not near:
        return sentence
    fastest = max([point, *near], key=lambda x: float(x["rate"]))
    if fastest is point:
        return f"{sentence}; {len(near)} more are within its interval, none of them faster"
    other = " ".join(f"{name}={_value(value)}" for name, value in fastest["options"].items())
    return f"{sentence}; {len(near)} more are within its interval, the fastest is {other} ({fastest['rate']:.2f})"


def _markdown(points: Sequence[Point], best: int, by: str, options: Sequence[str], said: str) -> str:
    """The table: a row a combination, the best one first, then by quality."""
    figures = list(dict.fromkeys(name for point in points for name in point["figures"]))
    heads = [*options, "pictures/s", by, *(name for name in figures if name != by)]
    rows = [heads]
    sign = 1 if by in LOWER_IS_BETTER else -1
    for point in sorted(points, key=lambda x: (x is not points[best], sign * float(x["quality"]))):
        half = "" if point["half_width"] is None else f" +- {rounded(point['half_width'])}"
        cells = [*(_value(point["options"][name]) for name in options), f"{point['rate']:.2f}"]
        cells += [f"{rounded(point['quality'])}{half}"]
        cells += [rounded(point["figures"][name]) if name in point["figures"] else "" for name in figures if name != by]
        bold = "**" if point is points[best] else ""
        rows.append([f"{bold}{cell}{bold}" if cell else "" for cell in cells])
    return f"{said}\n\n{markdown_table(rows)}"


def _value(value: Any) -> str:
    """As the command line takes it."""
    return json.dumps(value).replace(" ", "") if isinstance(value, (list, tuple)) else f"{value}"


def _flat_point(point: Point) -> dict[str, Any]:
    return {**point["options"], "pictures_per_second": point["rate"], **point["figures"]}


def _samples(
    manifest: Manifest, points: Sequence[Point], plans: Mapping[str, Mapping[str, PlannedPart]], varied: Sequence[str]
) -> bytes:
    """The first prompts' pictures, a row a combination, as PNG bytes."""
    labels, lines = [], []
    prompts: list[str] = []
    for point in points:
        first = next(iter(plans[point["way"]]))
        rows = [row for row in read_rows(manifest.folder, first) if row["png"] is not None]
        prompts = [row["prompt"] for row in rows]
        lines.append([np.asarray(Image.open(io.BytesIO(row["png"])).convert("RGB")) for row in rows])
        labels.append(
            "\n".join(f"{name} {_value(point['options'][name])}" for name in varied) or "the model's defaults"
        )
    buffer = io.BytesIO()
    grid_png(lines, labels, prompts).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
