"""A sweep as a picture: how good each way of drawing is, against how fast."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from raymuse.scoring.summary import LOWER_IS_BETTER

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")  # Okabe and Ito's
MARKERS = "osD^vPX*"
MOST_SERIES = len(COLOURS) * 2


def sweep_plot(points: Sequence[Mapping[str, Any]], by: str, best: int, varied: Sequence[str]) -> bytes:
    """The plot as PNG bytes.

    Args:
        points: of each way `options`, `rate` (pictures/s), `quality` and `half_width` (None: not known).
        by: the figure that quality is.
        best: place of the best point.
        varied: the options that have several values. Points that differ in steps alone are joined by a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(8, 4.9), layout="constrained", dpi=112)  # as wide as MLflow's page of a run
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    series = _series(points, varied)
    for number, (label, members) in enumerate(series.items()):
        members = sorted(members, key=lambda place: points[place]["rate"])
        x, y = [[points[place][name] for place in members] for name in ("rate", "quality")]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
        shown = label if len(series) <= MOST_SERIES else None
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.2, alpha=0.9, label=shown or None)
        halves = [points[place]["half_width"] for place in members]
        if None not in halves:
            axes.errorbar(x, y, yerr=halves, fmt="none", ecolor=colour, alpha=0.35, linewidth=1, capsize=2)
        if "steps" in varied:
            for place in members:
                at = (points[place]["rate"], points[place]["quality"])
                text = str(points[place]["options"]["steps"])
                axes.annotate(text, at, textcoords="offset points", xytext=(5, 5), fontsize=8, color=colour)
    star = points[best]
    axes.plot(star["rate"], star["quality"], "*", color="#222", markersize=17, markerfacecolor="none", label="best")
    axes.set_xscale("log")
    axes.set_xlabel("pictures a second, of one worker" + (" (numbers: steps)" if "steps" in varied else ""))
    axes.set_ylabel(by + (", lower is better" if by in LOWER_IS_BETTER else ""))
    if by in LOWER_IS_BETTER:
        axes.invert_yaxis()
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 5 else MaxNLocator(6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _series(points: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> dict[str, list[int]]:
    """Places of the points that differ in steps alone, by what they have in common."""
    found: dict[str, list[int]] = {}
    for place, point in enumerate(points):
        common = [f"{name} {point['options'][name]}" for name in varied if name != "steps"]
        found.setdefault(", ".join(common) or "all", []).append(place)
    return found
