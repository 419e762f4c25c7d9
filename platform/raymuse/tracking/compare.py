"""Two runs side by side: what differed in config, code and data, the metrics, and the newest pictures."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raymuse.tracking.reading import Seen

if TYPE_CHECKING:
    from PIL.Image import Image

QUIET = ("system/", "cost_")  # metrics of the machine, which say nothing of the model
TOLD = ("raymuse.commit", "raymuse.stage", "version.")  # tags that say which code it was
SIDE = 640  # pixels at which a picture is shown, at most

Difference = tuple[str, str, str]


@dataclass(frozen=True)
class Comparison:
    """What is to be told of two runs.

    Attributes:
        config, code, data: (name, of the one, of the other) where they differ; "" stands for nothing.
        metrics: (name, last value of the one, of the other) of all that either has.
        pictures: by name, where either has one.
    """

    one: Seen
    other: Seen
    config: list[Difference]
    code: list[Difference]
    data: list[Difference]
    metrics: list[tuple[str, float | None, float | None]]
    pictures: dict[str, tuple[Path | None, Path | None]]

    @classmethod
    def of(cls, one: Seen, other: Seen, pictures: tuple[Mapping[str, Path], Mapping[str, Path]]) -> "Comparison":
        """Two runs, and what pictures each has."""
        code = [{k: v for k, v in run.tags.items() if k.startswith(TOLD)} for run in (one, other)]
        data = [{f"{context}: {name}": digest for context, name, digest in run.data} for run in (one, other)]
        names = dict.fromkeys([*one.metrics, *other.metrics])
        metrics = [(name, one.metrics.get(name), other.metrics.get(name)) for name in names if not _quiet(name)]
        first, second = pictures
        return cls(
            one,
            other,
            _differing(one.params, other.params),
            _differing(*code),
            _differing(*data),
            sorted(metrics, key=lambda row: row[0]),
            {name: (first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])},
        )

    def text(self) -> str:
        """For a terminal."""
        heads = (_label(self.one), _label(self.other))
        lines = []
        for title, rows in self._tables():
            lines += [title, *_aligned([("", *heads), *rows] if rows else []), ""]
        for name, (first, second) in self.pictures.items():
            lines.append(f"picture {name}: {_which(first, second)}")
        return "\n".join(lines).rstrip()

    def page(self) -> str:
        """One self-contained page, the pictures in it."""
        heads = "".join(f"<th>{html.escape(_label(run))}</th>" for run in (self.one, self.other))
        sections = []
        for title, rows in self._tables():
            body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            table = f"<table><tr><th></th>{heads}{'<th></th>' if rows and len(rows[0]) > 3 else ''}</tr>{body}</table>"
            sections.append(f"<h2>{html.escape(title)}</h2>{table if rows else ''}")
        for name, pair in self.pictures.items():
            cells = "".join(f"<td>{_embedded(path)}</td>" for path in pair)
            sections.append(f"<h2>{html.escape(name)}</h2><table><tr>{heads}</tr><tr>{cells}</tr></table>")
        title = f"{self.one.name} and {self.other.name}"
        return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }}
table {{ border-collapse: collapse; background: #fff }} h2 {{ font-size: 1.05rem; margin: 1.5rem 0 .4rem }}
td, th {{ border: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere }}
th {{ background: #f0f0f0 }} img {{ max-width: min({SIDE}px, 44vw); image-rendering: pixelated }}
</style>
<h1>{html.escape(title)}</h1>
{"".join(sections)}
</html>
"""

    def picture(self, path: Path) -> None:
        """The pictures alone, side by side under their names, as one PNG."""
        from PIL import Image, ImageDraw, ImageFont

        rows = [(name, _opened(first), _opened(second)) for name, (first, second) in self.pictures.items()]
        width = max([360, *(image.width for _, first, second in rows for image in (first, second))])
        height = 56 + sum(40 + max(first.height, second.height) for _, first, second in rows)
        canvas = Image.new("RGB", (2 * width + 48, height), "white")
        draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
        for left, run in ((16, self.one), (32 + width, self.other)):
            draw.text((left, 16), _label(run), fill="black", font=font)
        top = 48
        for name, first, second in rows:
            draw.text((16, top + 8), name, fill="#555", font=font)
            canvas.paste(first, (16, top + 32))
            canvas.paste(second, (32 + width, top + 32))
            top += 40 + max(first.height, second.height)
        canvas.save(path)

    def _tables(self) -> list[tuple[str, Sequence[tuple[str, ...]]]]:
        metrics = [(name, _number(a), _number(b), _change(a, b)) for name, a, b in self.metrics]
        return [
            (_count("difference", "in config", self.config), self.config),
            (_count("difference", "in code", self.code), self.code),
            (_count("difference", "in data", self.data), self.data),
            (f"{len(metrics)} metrics, the last values", metrics),
        ]


def listing(runs: Iterable[Seen]) -> str:
    """Runs as a table for a terminal."""
    rows = [("id", "experiment", "name", "stage", "status", "started", "minutes", "")]
    for run in runs:
        minutes = "" if run.minutes is None else f"{run.minutes:.1f}"
        told = next((f"{k} {_number(run.metrics[k])}" for k in ("loss", "accuracy.base.whole") if k in run.metrics), "")
        rows.append((run.id[:12], run.experiment, run.name, run.stage, run.status, run.started, minutes, told))
    return "\n".join(_aligned(rows))


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[Difference]:
    names = sorted({*one, *other})
    return [(n, one.get(n, ""), other.get(n, "")) for n in names if one.get(n) != other.get(n)]


def _quiet(name: str) -> bool:
    return name.startswith(QUIET)


def _label(run: Seen) -> str:
    return f"{run.experiment}/{run.name} {run.id[:8]}"


def _count(what: str, where: str, rows: Sequence[object]) -> str:
    return f"no {what} {where}" if not rows else f"{len(rows)} {what}{'s' if len(rows) > 1 else ''} {where}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _change(one: float | None, other: float | None) -> str:
    """How far the other is from the one."""
    if one is None or other is None:
        return ""
    share = f" ({(other - one) / abs(one):+.1%})" if one else ""
    return f"{other - one:+.4g}{share}"


def _which(first: Path | None, second: Path | None) -> str:
    return "of both" if first and second else "of the first alone" if first else "of the second alone"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; cells of values that are very long are cut."""
    short = [[cell if len(cell) <= 48 else f"{cell[:45]}..." for cell in row] for row in rows]
    widths = [
        max(len(row[column]) for row in short if column < len(row)) for column in range(max(map(len, short), default=0))
    ]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in short
    ]


def _embedded(path: Path | None) -> str:
    if path is None:
        return "none"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(path.name)}">'


def _opened(path: Path | None) -> "Image":
    """A picture to be shown, large ones made smaller; grey where there is none."""
    from PIL import Image as Pillow

    if path is None:
        return Pillow.new("RGB", (360, 120), "#eee")
    with Pillow.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((SIDE, SIDE * 2))
    return picture
