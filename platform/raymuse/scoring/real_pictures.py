"""The reference of a scoring: read from its file, or computed from real pictures on Ray Data and kept in that file."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from raymuse.config.errors import UserError
from raymuse.config.score import MeasuresConfig
from raymuse.encoding.pictures import crop, decode
from raymuse.scoring.collected import features_bytes, features_file
from raymuse.scoring.measures import Features, Measures, Pixels, extractors, joined
from raymuse.scoring.parts import collect_parts, run_parts, written
from raymuse.scoring.reference import (
    CROP,
    KIND,
    Reference,
    check_reference,
    pictures_fingerprint,
    read_file,
    read_statistics,
)
from raymuse.storage.folder import Folder
from raymuse.storage.images import Picture, Shard, list_shards, read_shard
from raymuse.storage.manifest import Manifest
from raymuse.storage.rejects import Unreadable

OWN_FILE = "reference.safetensors"  # in the output, where the config names none


def reference_facts(config: MeasuresConfig, model: str | None, side: int) -> dict[str, Any] | None:
    """What the statistics must have been made of, as `Reference.made_of`; None: the config asks for no reference.

    Raises:
        UserError: for pictures that are not there, a file that belongs to others, and nothing that could look at them.
    """
    if config.reference is None and config.statistics is None:
        return None
    looks = extractors(config, model)
    if not looks:
        raise UserError("a reference needs something that looks at pictures: give inception, clip or model.")
    shards = None if config.reference is None else list_shards(config.reference)
    wanted = {
        "extractors": looks,
        "side": config.reference_side or side,
        "crop": CROP,
        "pictures": None if shards is None else pictures_fingerprint(shards),
    }
    if config.statistics is not None and (shards is None or _exists(config.statistics)):
        check_reference(config.statistics, read_statistics(config.statistics, config.trust_statistics), wanted)
    if shards is None and config.statistics is not None:
        wanted["statistics"] = hashlib.sha256(read_file(config.statistics)).hexdigest()
    return wanted


def get_reference(manifest: Manifest, config: MeasuresConfig, model: str | None, wanted: dict[str, Any]) -> Reference:
    """The reference that `reference_facts` described: from its file, which is written first where it is missing."""
    address = config.statistics or f"{manifest.folder.address}/{OWN_FILE}"
    if not _exists(address):
        _compute(manifest, config, model, wanted, address)
    return read_statistics(address, config.trust_statistics)


def _compute(
    manifest: Manifest, config: MeasuresConfig, model: str | None, wanted: dict[str, Any], address: str
) -> None:
    assert config.reference is not None, "a file that is missing was refused without pictures to make it of"
    shards = {f"{KIND}-{number:06d}": shard for number, shard in enumerate(list_shards(config.reference))}
    arguments = {
        "config": config,
        "model": model,
        "side": wanted["side"],
        "shards": shards,
        "output": manifest.folder.address,
    }
    names = list(shards)
    run_parts(
        manifest,
        names,
        _ReferencePart,
        arguments,
        workers=config.workers,
        gpus=config.gpus_per_worker,
        what="real pictures",
    )
    rows, refused = (sum(getattr(manifest.done[name], kind) for name in names) for kind in ("rows", "rejects"))
    if rows < 2:
        raise UserError(f"{config.reference} has {rows} pictures that can be read ({refused} cannot): two are needed.")
    print(f"reference: {rows} pictures" + (f", {refused} could not be read" if refused else ""), flush=True)
    found = collect_parts(manifest.folder.address, names, config.kept_features, config.workers).named(KIND)
    folder, name = Folder.holding(address)
    folder.create()
    folder.write(name, Reference.of(found, {**wanted, "refused": refused}).to_bytes())


class _ReferencePart:
    """Looks at the pictures of one shard."""

    def __init__(
        self, config: MeasuresConfig, model: str | None, side: int, shards: dict[str, Shard], output: str
    ) -> None:
        self.measures, self.side, self.shards, self.output = Measures(config, model), side, shards, output
        self.batch_size = config.batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        part = str(batch["part"][0])
        found: list[Features] = []
        refused = rows = 0
        for pictures in self._batches(self.shards[part]):
            good = [picture for picture in pictures if picture is not None]
            refused, rows = refused + len(pictures) - len(good), rows + len(good)
            if good:
                found.append(self.measures.features(np.stack(good)))
        files = {features_file(part): features_bytes({KIND: joined(found)} if found else {})}
        return written(self.output, part, files, rows, refused, self.shards[part].name)

    def _batches(self, shard: Shard) -> Iterator[list[Pixels | None]]:
        """Crops, a batch at a time; None for one that cannot be read."""
        batch: list[Pixels | None] = []
        for row in read_shard(shard):
            try:
                batch.append(crop(decode(row.data), self.side).pixels if isinstance(row, Picture) else None)
            except Unreadable:
                batch.append(None)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _exists(address: str) -> bool:
    folder, name = Folder.holding(address)
    return folder.exists(name)
