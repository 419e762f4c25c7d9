"""The figures of a scoring: means over its rows, distances of its sets, as nested numbers, flat ones, and a table."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymuse.config.score import MeasuresConfig
from raymuse.scoring.collected import KEPT, LOGITS, Collected
from raymuse.scoring.distances import codebook_usage, inception_score, kernel_distance, precision_recall
from raymuse.scoring.frechet import frechet_distance
from raymuse.scoring.measures import CODES, Row
from raymuse.scoring.paired import half_width
from raymuse.scoring.reference import Reference
from raymuse.scoring.tables import markdown_table, rounded

KINDS = ("truth", "vqgan", "vqgan_low", "base", "cascade", "picture", "a", "b")
DISTANCES = {"fid": "inception", "clip_fid": "clip", "vqgan_fd": "vqgan"}
"""Fréchet distances, by the features that they are of."""
FIGURES = (
    *("clip_score", "fid", "kid", "kid_deviation", "precision", "recall", "clip_fid", "vqgan_fd"),
    *("inception_score", "inception_score_deviation", "codes_used", "code_perplexity"),
)
"""What stands in a summary by kind, beside the judge's accuracy."""
LOWER_IS_BETTER = ("fid", "kid", "clip_fid", "vqgan_fd")


def kinds_of(rows: Iterable[Row]) -> list[str]:
    """The kinds that rows are of, in the order of KINDS."""
    found = {row["kind"] for row in rows}
    return [kind for kind in KINDS if kind in found]


def summarise(rows: Iterable[Row], figures: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, Any]:
    """Means by kind: `accuracy.KIND.{whole, one_object, two_objects, attributes}` and `clip_score.KIND`.

    And with `figures` (see `set_figures`, by kind) each of those by kind: `fid.KIND`, ...
    """
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    kinds = kinds_of(row for found in by_kind.values() for row in found[:1])
    summary: dict[str, Any] = {"pictures": {kind: len(by_kind[kind]) for kind in kinds}}
    if any(row["clip_score"] is not None for row in by_kind[kinds[0]]):
        summary["clip_score"] = {kind: _mean([row["clip_score"] for row in by_kind[kind]]) for kind in kinds}
    if any(row["attributes"] is not None for row in by_kind[kinds[0]]):
        summary["accuracy"] = {kind: _accuracy(by_kind[kind]) for kind in kinds}
    for name in FIGURES:
        of = {kind: figures[kind][name] for kind in kinds if figures and name in figures.get(kind, {})}
        if of:
            summary[name] = of
    base, cascade = by_kind.get("base", []), by_kind.get("cascade", [])
    if len(pairs := _pairs(base, cascade)) > 1:
        summary["render_error"] = _compare(pairs)
        for name, count in (("one_object", 1), ("two_objects", 2)):
            if len(pairs := _pairs(base, [row for row in cascade if _objects(row) == count])) > 1:
                summary["render_error"][name] = _compare(pairs)
    return summary


def set_figures(found: Collected, reference: Reference | None, config: MeasuresConfig) -> dict[str, float]:
    """The figures of one kind's pictures as a set; those that need a reference only where there is one.

    Args:
        found: of that kind alone.
    """
    said: dict[str, float] = {}
    if reference is not None:
        for name, feature in DISTANCES.items():
            drawn, real = found.moments.get(feature), reference.moments.get(feature)
            if drawn is not None and real is not None and min(drawn.count, real.count) > 1:
                said[name] = frechet_distance(drawn, real)
        said |= _kept_figures(found, reference, config)
    if (logits := found.kept.get(LOGITS)) is not None:
        score = inception_score(logits)
        said |= {"inception_score": score.mean, "inception_score_deviation": score.deviation}
    if (counts := found.codes.get(CODES)) is not None:
        usage = codebook_usage(counts)
        said |= {"codes_used": usage.share, "code_perplexity": usage.perplexity}
    return said


def _kept_figures(found: Collected, reference: Reference, config: MeasuresConfig) -> dict[str, float]:
    drawn, real = found.kept.get(KEPT), reference.kept
    if drawn is None or real is None or min(len(drawn), len(real)) < 2:
        return {}
    real = real[: config.kept_features]
    kid = kernel_distance(drawn, real, config.kid_subsets, config.kid_subset_size)
    precision, recall = precision_recall(drawn, real, config.neighbours)
    return {"kid": kid.mean, "kid_deviation": kid.deviation, "precision": precision, "recall": recall}


def flat(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under dotted names."""
    numbers: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            numbers.update(flat(value, f"{prefix}{name}."))
        elif value is not None:
            numbers[prefix + name] = float(value)
    return numbers


def markdown(summary: Mapping[str, Any]) -> str:
    """The scores as a table, a kind a column."""
    kinds = list(summary["pictures"])
    table = {kind: flat(figures_of(summary, kind)) for kind in kinds}
    names = list(dict.fromkeys(name for kind in kinds for name in table[kind]))
    rows = [[name, *(rounded(table[kind][name]) if name in table[kind] else "" for kind in kinds)] for name in names]
    lines = [markdown_table([["", *kinds], *rows]).rstrip()]
    if (errors := summary.get("render_error")) is not None:
        lines += ["", "Error against the nearest clean render, in grey levels; below 0 the cascade is nearer:"]
        for name, compared in (("all", errors), *((name, errors.get(name)) for name in ("one_object", "two_objects"))):
            if compared is not None:
                interval = f"{compared['difference_low']:.1f} to {compared['difference_high']:.1f}"
                lines += [
                    f"{name}: base {compared['base']:.1f}, cascade {compared['cascade']:.1f}, difference {interval}"
                ]
    return "\n".join(lines) + "\n"


def figures_of(summary: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """All figures of one kind: those of FIGURES by name, and the judge's."""
    said = {name: summary[name][kind] for name in FIGURES if kind in summary.get(name, {})}
    return {**said, **summary.get("accuracy", {}).get(kind, {})}


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
    middle, half = float(differences.mean()), half_width(differences)
    return {
        "base": float(pairs[:, 0].mean()),
        "cascade": float(pairs[:, 1].mean()),
        "difference": middle,
        "difference_low": middle - half,
        "difference_high": middle + half,
    }


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
