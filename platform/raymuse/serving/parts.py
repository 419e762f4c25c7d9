"""A part of a batch job put in place, by a task of Ray. Imports no torch: its worker starts in a second."""

import json
from dataclasses import asdict

import ray

from raymuse.serving.asked import Drawing
from raymuse.storage.folder import Folder
from raymuse.storage.generated import PictureRow, rows_table
from raymuse.storage.manifest import FileRecord, PartRecord
from raymuse.storage.pictures import png_bytes
from raymuse.storage.rejects import Reject, to_table
from raymuse.storage.tokens import parquet_bytes
from raymuse.storage.webdataset_writer import write_tar


@ray.remote(num_cpus=0.5)
def write_part(
    address: str, part: str, rows: list[PictureRow], drawings: list[Drawing], rejects: list[Reject], keep_base: bool
) -> PartRecord:
    """Encode and put in place one part's tar, rows and rejects."""
    folder = Folder(address)
    members: list[tuple[str, bytes]] = []
    for row, drawing in zip(rows, drawings, strict=True):
        facts = asdict(row)
        members.append((f"{row.key}.png", png_bytes(drawing.pixels, facts)))
        if keep_base and drawing.base_pixels.shape != drawing.pixels.shape:
            height, width = drawing.base_pixels.shape[:2]
            own = {**facts, "width": width, "height": height, "base": True}
            members.append((f"{row.key}.base.png", png_bytes(drawing.base_pixels, own)))
        members.append((f"{row.key}.json", json.dumps(facts, sort_keys=True).encode()))
    (folder / "parts").create()
    write_tar((folder / "parts" / f"{part}.tar").address, members)
    tables = {f"rows/{part}.parquet": rows_table(rows)}
    if rejects:
        tables[f"rejects/{part}.parquet"] = to_table(rejects)
    for name, table in tables.items():
        folder.write(name, parquet_bytes(table, {}))
    files = [FileRecord.of(name, folder.read(name)) for name in (f"parts/{part}.tar", *tables)]
    return PartRecord(part, len(rows), len(rejects), "", files)
