"""`raymuse tokens inspect`: what a token folder holds, in numbers, and some of its rows as pictures again."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.encoding.token_sheet import token_entries
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import weights_sha256
from raymuse.storage.contact_sheet import sheet_html, sheet_png
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import PartRecord, read_records
from raymuse.storage.token_survey import CodeUsage, Survey, TokenRow, spread_rows, survey_tokens

SHEETS = (".html", ".png")
_MOST_USED = 10
_BAR = 40  # characters
_BATCH = 8  # rows decoded at once
_OWN_LINE = ("sha256", "codebook_size", "text_length", "shards")  # of the config: what it was made with


@dataclass(frozen=True)
class Sheet:
    """A contact sheet that is asked for.

    Args:
        vqgan: folder (or Hugging Face id) of the VQGAN that wrote the ids.
        file: .html or .png, to be written.
        rows: how many crops.
        seed: which.
    """

    vqgan: str
    file: Path
    rows: int
    seed: int


def inspect_tokens(address: str, sheet: Sheet | None = None, data: Path | None = None) -> str:
    """Read a token folder, finished or not, and say in text what it holds.

    Args:
        address: of the folder.
        sheet: rows to decode and show.
        data: a file to be written with the same numbers, and the count of every code, as JSON.

    Raises:
        UserError: there is no token folder, a file of it is damaged, or the VQGAN is another than wrote it.
    """
    folder = Folder(address)
    if not folder.exists("_manifest/config.json"):
        raise UserError(
            f"{address} is no token folder: it has no _manifest/config.json. `raymuse pretokenize` writes one."
        )
    config = dict(json.loads(folder.read("_manifest/config.json")))
    if not {"codebook_size", "text_length"} <= config.keys():
        raise UserError(f"{address} is no token folder: its _manifest/config.json is of another stage.")
    _check_files(sheet, data)
    vqgan = None if sheet is None else _vqgan(sheet.vqgan, config)
    records = _records(folder)
    total = sum(record.rows for record in records)
    codes = (int(config["codebook_size"]), _low_codes(config))
    wanted = spread_rows(total, sheet.rows, sheet.seed) if sheet is not None else []
    survey = survey_tokens(folder, records, codes, int(config["text_length"]), wanted)
    success = dict(json.loads(folder.read("_SUCCESS"))) if folder.exists("_SUCCESS") else None
    report = _report(address, config, survey, success)
    if data is not None:
        data.write_text(json.dumps(report, indent=1) + "\n")
    lines = _lines(report)
    if sheet is not None and vqgan is not None:
        _write_sheet(sheet, survey.rows, vqgan, config, address)
        lines.append(f"{len(survey.rows)} rows as pictures: {sheet.file}")
    return "\n".join(lines)


def _records(folder: Folder) -> list[PartRecord]:
    try:
        return list(read_records(folder).values())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.address}/_manifest cannot be read: {error}. See `raymuse tokens verify`.") from error


def _check_files(sheet: Sheet | None, data: Path | None) -> None:
    """What could only fail after a long reading is asked first."""
    for option, file in (("--out", None if sheet is None else sheet.file), ("--json", data)):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"{option} {file}: there is no folder {file.absolute().parent}; make it first.")
    if sheet is not None and sheet.file.suffix not in SHEETS:
        raise UserError(f"--out {sheet.file}: a contact sheet is {' or '.join(SHEETS)}.")


def _vqgan(folder: str, config: Mapping[str, Any]) -> Vqgan:
    """The VQGAN, where it is the one that wrote the ids."""
    found, wanted = weights_sha256(folder, "vqvae"), config["vqgan_sha256"]
    if found != wanted:
        raise UserError(
            f"{folder} is not the VQGAN that wrote these ids, and would decode them to noise: its weights' sha256 is "
            f"{found}, theirs {wanted}."
        )
    return Vqgan.load(folder)


def _low_codes(config: Mapping[str, Any]) -> int | None:
    return None if config.get("low_resolution") is None else int(config["low_codebook_size"])


# --- the numbers


def _report(
    address: str, config: Mapping[str, Any], survey: Survey, success: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything that is known, as plain values."""
    report: dict[str, Any] = {
        "address": address,
        "finished": success is not None,
        "parts": survey.parts,
        "pictures": survey.pictures,
        "crops": survey.crops,
        "captions": survey.captions,
        "rejects": sum(survey.rejects.values()),
        "rejects_by_reason": dict(sorted(survey.rejects.items())),
        "counts": {name: survey.counts[name] for name in sorted(survey.counts)},
        "bytes": survey.size,
        "grids": {_size(grid): crops for grid, crops in sorted(survey.grids.items())},
        "low_grids": {_size(grid): crops for grid, crops in sorted(survey.low_grids.items())},
        "code_agreement": (success or {}).get("code_agreement"),
        "config": dict(config),
        "image_ids": _usage(survey.image_ids),
        "low_ids": None if survey.low_ids is None else _usage(survey.low_ids),
        "caption_tokens": _lengths(survey.caption_tokens),
    }
    return report


def _usage(usage: CodeUsage) -> dict[str, Any]:
    codes = len(usage.counts)
    return {
        "codes": codes,
        "ids": usage.total,
        "used": usage.used,
        "unused_share": 1 - usage.used / codes,
        "bits": usage.bits,
        "perplexity": usage.perplexity,
        "most_used": usage.most_used(_MOST_USED),
        "counts": usage.counts.tolist(),
    }


def _lengths(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Of captions (T + 1,) by their number of tokens."""
    total = int(counts.sum())
    if not total:
        return {"length": len(counts) - 1, "captions": 0, "counts": counts.tolist()}
    there = np.nonzero(counts)[0]
    middle = int(np.searchsorted(counts.cumsum(), (total + 1) // 2))
    return {
        "length": len(counts) - 1,
        "captions": total,
        "least": int(there[0]),
        "median": middle,
        "mean": float((counts * np.arange(len(counts))).sum() / total),
        "most": int(there[-1]),
        "full": int(counts[-1]),
        "counts": counts.tolist(),
    }


# --- the same as text


def _lines(report: Mapping[str, Any]) -> list[str]:
    made = report["config"]
    lines = [
        f"{report['address']}: {'finished' if report['finished'] else 'not finished'}",
        f"  {report['parts']:,} parts, {report['bytes']:,} bytes",
        f"  {report['pictures']:,} pictures, {report['crops']:,} crops, {report['captions']:,} captions "
        "(one that several parts use counts in each)",
        f"  {report['rejects']:,} rejects" + _listed(report["rejects_by_reason"]),
    ]
    others = {
        name: count
        for name, count in report["counts"].items()
        if name not in ("pictures", "captions") and not name.startswith("rejects/")
    }
    lines += [f"  counted{_listed(others)}"] if others else []
    lines += [
        f"  grids of {_grids(report['grids'])}"
        + (f"; low {_grids(report['low_grids'])}" if report["low_grids"] else "")
    ]
    if report["code_agreement"] is not None:
        lines.append(
            f"  {made.get('precision')} and fp32 agreed on {report['code_agreement']:.2%} of the first chunk's ids"
        )
    lines += ["made with", *(f"  {name}: {made[name]}" for name in made if name.endswith(_OWN_LINE))]
    rest = [f"{name}={_said(made[name])}" for name in made if not name.endswith(_OWN_LINE)]
    lines += textwrap.wrap(" ".join(rest), 112, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    for name in ("image_ids", "low_ids"):
        if report[name] is not None:
            lines += _usage_lines(name, report[name])
    return [*lines, *_length_lines(report["caption_tokens"])]


def _usage_lines(name: str, usage: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{name}: {usage['ids']:,} ids; of {usage['codes']:,} codes {usage['used']:,} are used, "
        f"{usage['unused_share']:.1%} never; perplexity {usage['perplexity']:,.1f}, {usage['bits']:.2f} bits an id"
    )
    for code, count in usage["most_used"]:
        yield f"  code {code:>5}  {count / usage['ids']:7.2%}  {_bar(count, usage['most_used'][0][1])}"


def _length_lines(lengths: Mapping[str, Any]) -> Iterator[str]:
    """Captions by their tokens, in ten stretches of equal width over those that there are."""
    if not lengths["captions"]:
        yield "captions: none"
        return
    yield (
        f"captions: {lengths['least']} to {lengths['most']} tokens, mean {lengths['mean']:.1f}, median "
        f"{lengths['median']}; {lengths['full']:,} fill all {lengths['length']}"
    )
    least, most = lengths["least"], lengths["most"]
    width = -(-(most - least + 1) // 10)
    starts = range(least, most + 1, width)
    sums = [sum(lengths["counts"][start : start + width]) for start in starts]
    for start, count in zip(starts, sums, strict=True):
        last = min(start + width - 1, most)
        stretch = f"{start} to {last}" if last > start else str(start)
        yield f"  {stretch:>10}  {count:>10,}  {_bar(count, max(sums))}".rstrip()


def _bar(value: int, most: int) -> str:
    return "█" * max(round(_BAR * value / most), value > 0)


def _listed(counts: Mapping[str, float]) -> str:
    return ": " + ", ".join(f"{name} {count:,.0f}" for name, count in counts.items()) if counts else ""


def _grids(grids: Mapping[str, int]) -> str:
    return ", ".join(f"{grid} ({crops:,} crops)" for grid, crops in grids.items()) or "nothing"


def _said(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | str) else str(value)


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


# --- the pictures


def _write_sheet(sheet: Sheet, rows: Sequence[TokenRow], vqgan: Vqgan, config: Mapping[str, Any], address: str) -> None:
    if not rows:
        raise UserError(f"{address} holds no crops to show.")
    same = config.get("low_vqgan_sha256") in (None, config["vqgan_sha256"])
    entries, kinds = token_entries(vqgan, rows, same)
    title = f"{len(rows)} crops of {address}"
    if sheet.file.suffix == ".png":
        sheet_png(entries, kinds, title).save(sheet.file)
    else:
        sheet.file.write_text(sheet_html(entries, kinds, title), encoding="utf-8")
