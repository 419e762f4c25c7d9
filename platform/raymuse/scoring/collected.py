"""What the parts of a scoring say together: sums of features, some of the features themselves, counts of codes.

features/part-000000.safetensors    `base/clip`, `base/inception`, `base/logits`, `base/codes`, ...: KIND/FEATURE
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Self

import numpy as np
from safetensors.numpy import load, save

from raymuse.scoring.frechet import Moments, pack, unpack
from raymuse.scoring.measures import CODES, SETS, Features
from raymuse.storage.folder import Folder

KEPT = "inception"  # the feature that KID, precision and recall look at
LOGITS = "logits"


@dataclass(frozen=True)
class Collected:
    """Of some parts, by KIND/FEATURE; `+` is that of both, the left one's pictures first.

    Attributes:
        keep: at most so many rows are in `kept`.
        kept: the first rows of Inception's features, and all logits.
    """

    keep: int
    moments: dict[str, Moments] = field(default_factory=dict)
    kept: Features = field(default_factory=dict)
    codes: Features = field(default_factory=dict)

    @classmethod
    def of(cls, features: Features, keep: int) -> Self:
        """Of one part's features."""
        moments = {name: Moments.of(x) for name, x in features.items() if name.rpartition("/")[2] in SETS}
        kept = {name: x[:keep] for name, x in features.items() if name.endswith(f"/{KEPT}")}
        kept |= {name: x for name, x in features.items() if name.endswith(f"/{LOGITS}")}
        codes = {name: x for name, x in features.items() if name.endswith(f"/{CODES}")}
        return cls(keep, moments, kept, codes)

    def __add__(self, other: "Collected") -> "Collected":
        moments, kept, codes = dict(self.moments), dict(self.kept), dict(self.codes)
        for name, sums in other.moments.items():
            moments[name] = moments[name] + sums if name in moments else sums
        for name, rows in other.kept.items():
            both = np.concatenate([kept[name], rows]) if name in kept else rows
            kept[name] = both[: self.keep] if name.endswith(f"/{KEPT}") else both
        for name, counts in other.codes.items():
            codes[name] = codes[name] + counts if name in codes else counts
        return Collected(self.keep, moments, kept, codes)

    def named(self, kind: str) -> "Collected":
        """What belongs to one kind, by the feature alone."""

        def of(values: dict[str, Any]) -> dict[str, Any]:
            start = f"{kind}/"
            return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}

        return Collected(self.keep, of(self.moments), of(self.kept), of(self.codes))

    def packed(self) -> bytes:
        """As bytes, to travel; `unpacked` reads them."""
        file = io.BytesIO()
        arrays: dict[str, Any] = {f"kept/{name}": x for name, x in self.kept.items()}
        arrays |= {f"codes/{name}": x for name, x in self.codes.items()}
        arrays |= {"keep": np.array(self.keep), "moments": np.frombuffer(pack(self.moments), np.uint8)}
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def unpacked(cls, data: bytes) -> Self:
        """What `packed` wrote."""
        with np.load(io.BytesIO(data)) as arrays:
            found = {name: arrays[name] for name in arrays}
        of = {
            start: {name.removeprefix(start): x for name, x in found.items() if name.startswith(start)}
            for start in ("kept/", "codes/")
        }
        return cls(int(found["keep"]), unpack(found["moments"].tobytes()), of["kept/"], of["codes/"])


def features_file(part: str) -> str:
    """Name of a part's features in the folder of a scoring."""
    return f"features/{part}.safetensors"


def features_bytes(by_kind: dict[str, Features]) -> bytes:
    """The file of a part's features."""
    flat = {f"{kind}/{name}": np.ascontiguousarray(x) for kind, found in by_kind.items() for name, x in found.items()}
    return bytes(save(flat))


def collect(address: str, parts: Sequence[str], keep: int) -> Collected:
    """Of the parts of a scoring, in their order, a file in memory at a time."""
    folder = Folder(address)
    return total((Collected.of(load(folder.read(features_file(part))), keep) for part in parts), keep)


def total(pieces: Iterable[Collected], keep: int) -> Collected:
    """All of them together, in their order."""
    return reduce(Collected.__add__, pieces, Collected(keep))
