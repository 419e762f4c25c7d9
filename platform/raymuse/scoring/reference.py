"""Statistics of real pictures: computed once, kept in a file that says what made them, and refused where that differs.

A file is safetensors: `inception/count`, `inception/total`, `inception/products` (the sums behind mean and covariance,
fp64), the same of `clip` and `vqgan`, and `inception/kept`, features for KID, precision and recall. Its metadata
`raymuse.statistics` is JSON: how pictures were prepared, which pictures they were, and with what they were looked at.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from raymuse.config.errors import UserError
from raymuse.scoring.collected import KEPT, Collected
from raymuse.scoring.frechet import Moments
from raymuse.storage import sources
from raymuse.storage.folder import Folder
from raymuse.storage.images import Shard
from raymuse.storage.manifest import differing

CROP = "centre square, bilinear with antialiasing"  # of encoding.pictures.crop
METADATA = "raymuse.statistics"
KIND = "reference"  # of the features of real pictures
_AGAIN = "Name another file to have them computed anew, or use what they were made with."


@dataclass(frozen=True)
class Reference:
    """Real pictures as a set.

    Attributes:
        made_of: `extractors` (by feature), `side`, `crop`, `pictures` (fingerprint), `count`.
        moments: by feature.
        kept: Inception's features of the first pictures; None: there are none.
    """

    made_of: dict[str, Any] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    kept: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, found: Collected, made_of: Mapping[str, Any]) -> Self:
        """From the features of one kind."""
        counts = [sums.count for sums in found.moments.values()]
        return cls({**made_of, "count": max(counts, default=0)}, found.moments, found.kept.get(KEPT))

    def to_bytes(self) -> bytes:
        """The file."""
        tensors: dict[str, NDArray[Any]] = {}
        for name, sums in self.moments.items():
            tensors |= {f"{name}/count": np.array(sums.count), f"{name}/total": sums.total}
            tensors |= {f"{name}/products": sums.products}
        if self.kept is not None:
            tensors[f"{KEPT}/kept"] = np.ascontiguousarray(self.kept)
        return bytes(save(tensors, metadata={METADATA: json.dumps(self.made_of, sort_keys=True)}))


def read_statistics(address: str, trust: bool) -> Reference:
    """A file of ours, or a .npz with mu and sigma, which is taken for Inception's where it is trusted.

    Raises:
        UserError: it is missing, damaged, another kind of file, or not trusted.
    """
    data = read_file(address)
    return _from_npz(address, data, trust) if address.endswith(".npz") else _from_safetensors(address, data)


def read_file(address: str) -> bytes:
    """The bytes of a file of statistics. Raises UserError where it is missing."""
    folder, name = Folder.holding(address)
    if not folder.exists(name):
        raise UserError(f"the statistics {address} do not exist. Give reference=PICTURES to have them computed.")
    return folder.read(name)


def _from_safetensors(address: str, data: bytes) -> Reference:
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # safetensors' own layout
        said = header.get("__metadata__", {}).get(METADATA)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{address} cannot be read as statistics: {error}. {_AGAIN}") from error
    if said is None:
        raise UserError(f"{address} is no file of statistics that raymuse wrote: it does not say what made it.")
    names = [name.rpartition("/")[0] for name in tensors if name.endswith("/count")]
    moments = {
        name: Moments(int(tensors[f"{name}/count"]), tensors[f"{name}/total"], tensors[f"{name}/products"])
        for name in names
    }
    return Reference(json.loads(said), moments, tensors.get(f"{KEPT}/kept"))


def _from_npz(address: str, data: bytes, trust: bool) -> Reference:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise UserError(f"{address} cannot be read as a .npz with mu and sigma: {error}.") from error
    if not trust:
        raise UserError(
            f"{address} does not say which network and preprocessing made it: compute statistics with "
            "reference=PICTURES, or say trust_statistics=true to take it for FID's Inception's."
        )
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{address}: mu is {mean.shape} and sigma {covariance.shape}: they must be (D,) and (D, D).")
    return Reference({"trusted": address}, {KEPT: Moments.from_gaussian(mean, covariance, 50_000)})


def check_reference(address: str, reference: Reference, wanted: Mapping[str, Any]) -> None:
    """Raise UserError where statistics were made with something else, naming what differs.

    Args:
        wanted: as `Reference.made_of`; of `pictures` None where nobody says which they should be. Statistics may have
            more extractors than are wanted.
    """
    if "trusted" in reference.made_of:
        return
    made = reference.made_of
    if missing := sorted(wanted["extractors"].keys() - made["extractors"].keys()):
        raise UserError(f"{address} has no features of {', '.join(missing)}. {_AGAIN}")
    names = [name for name in ("side", "crop", "pictures") if wanted.get(name) is not None]
    before = {name: made.get(name) for name in names}
    before["extractors"] = {name: made["extractors"][name] for name in wanted["extractors"]}
    after = {**{name: wanted[name] for name in names}, "extractors": wanted["extractors"]}
    if changed := differing(before, after):
        raise UserError(f"{address} was made with something else: {'; '.join(changed)}. {_AGAIN}")


def pictures_fingerprint(shards: Sequence[Shard]) -> str:
    """sha256 (hex) of what the pictures are, without reading them: names and sizes of their files, cuts of tables."""
    digest = hashlib.sha256()
    for shard in shards:
        facts = [shard.name, shard.kind, str(shard.blocks), str(shard.piece)]
        files = [shard.address] if shard.kind in ("tar", "parquet", "arrow") else []
        files += [sources.join(shard.address, member.picture) for member in shard.members]
        digest.update(json.dumps([facts, [_size(file) for file in files]]).encode())
        digest.update(json.dumps([member.picture for member in shard.members]).encode())
    return digest.hexdigest()


def _size(address: str) -> int | None:
    try:
        return sources.size_of(address)
    except OSError:
        return None  # what is missing shows when it is read
