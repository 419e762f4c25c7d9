"""Pictures that came before: by their pixels, and by a perceptual hash.

    tables = [(part, shard.name, hash_shard(shard, config)) for part, shard in plan.items()]
    find_duplicates(tables, bits=4)     # part -> key -> Reject

R rows of all tables together, U different perceptual hashes.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import admit, reading_of
from raymuse.encoding.pictures import read_pixels
from raymuse.storage.images import Shard, read_shard
from raymuse.storage.rejects import Reason, Reject, Unreadable

HASHES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("exact", pa.binary(16), nullable=False),
        pa.field("near", pa.uint64()),  # null: nearly flat, or not asked for
    ]
)
FLAT = 2.0  # grey levels of 255; standard deviation below which a picture has nothing to be compared by
_BITS = 64
_BLOCK = 4096  # hashes that are looked up together
_CANDIDATES = 1 << 18  # compared at once: bounds the memory

Longs = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def pixel_hash(image: Image.Image) -> bytes:
    """16 bytes of an upright RGB picture's size and pixels: equal only where the pictures are."""
    assert image.mode == "RGB"
    digest = hashlib.blake2b(b"%d x %d" % image.size, digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


def perceptual_hash(image: Image.Image) -> int | None:
    """64 bits that change little with size, compression, brightness and contrast, after pHash (Zauner 2010).

    Grey, 32 x 32, two-dimensional DCT-II; of its 8 x 8 lowest frequencies which are above their median, the constant
    one left out of the median. The highest bit is that constant; the others follow row by row.

    Returns:
        None for a picture that is nearly flat: its bits would be noise, or the same for all such pictures.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    if grey.std() < FLAT:
        return None
    low = dctn(grey, norm="ortho")[:8, :8].ravel().round(3)  # so that a zero is one on every machine
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


def hash_shard(shard: Shard, config: PretokenizeConfig) -> pa.Table:
    """The hashes of a shard's pictures, in their order, with the columns of HASHES_SCHEMA.

    Rows that `decode_chunks` would refuse are left out, so that a refused picture never stands for a kept one.
    """
    near = config.near_duplicates is not None
    rows = []
    for row in read_shard(shard, reading_of(config)):
        if isinstance(row, Reject):
            continue
        try:
            image = read_pixels(admit(row, config)[0], config.background_rgb).image
        except Unreadable:
            continue
        rows.append({"key": row.key, "exact": pixel_hash(image), "near": perceptual_hash(image) if near else None})
    return pa.Table.from_pylist(rows, schema=HASHES_SCHEMA)


def find_duplicates(tables: Iterable[tuple[str, str, pa.Table]], bits: int | None) -> dict[str, dict[str, Reject]]:
    """Which pictures show what one before them shows. How the rows are cut into tables makes no difference.

    A picture is a duplicate where one before it has the same pixels; and a near one where a picture before it, that is
    none itself, has a perceptual hash within `bits`. Nearly flat pictures are never near duplicates.

    Near ones cost time that grows with the square of the pictures, by a small factor for few bits: pairs are compared
    that agree in one of `bits` + 1 bands of the hash (of four for fewer bits), as all pairs within `bits` must. A
    million pictures take seconds at 4 bits, most of a minute at 6. Above 10, strangers begin to match.

    Args:
        tables: (name of the part, name of its source, table of `hash_shard`), in the order of the plan.
        bits: of 64, in which the hashes of near duplicates may differ; None looks only for the same pixels.

    Returns:
        Part -> key -> the reject that names the earlier picture. Parts without duplicates are not in it.
    """
    parts = list(tables)
    starts = np.cumsum([0, *(len(table) for _, _, table in parts)])
    if starts[-1] == 0:
        return {}
    rows = pa.concat_tables([table for _, _, table in parts])
    same = _first_of_same(rows["exact"])
    near = rows["near"].fill_null(0).to_numpy()
    like = np.arange(len(rows))
    if bits is not None:
        asked = np.nonzero(rows["near"].is_valid().to_numpy() & (same == like))[0]
        like[asked] = asked[_first_near(near[asked], bits)]
    later = np.nonzero(np.minimum(same, like) < np.arange(len(rows)))[0]
    exact = same[later] < later
    first = np.where(exact, same[later], like[later])
    apart = np.bitwise_count(near[later] ^ near[first])
    part, its_part = (np.searchsorted(starts, which, side="right") - 1 for which in (later, first))
    key, its_key = (rows["key"].take(pa.array(which)).to_pylist() for which in (later, first))
    found: dict[str, dict[str, Reject]] = {}
    for row in range(len(later)):
        name, source, _ = parts[part[row]]
        earlier = f"{its_key[row]} of {parts[its_part[row]][1]}"
        if exact[row]:
            reject = Reject(source, key[row], Reason.DUPLICATE_PICTURE, f"the same pixels as {earlier}")
        else:
            detail = f"its perceptual hash differs in {apart[row]} of 64 bits from {earlier}"
            reject = Reject(source, key[row], Reason.NEAR_DUPLICATE, detail)
        found.setdefault(name, {})[key[row]] = reject
    return found


def _first_of_same(column: pa.ChunkedArray) -> Longs:
    """For every row (R,) the number of the first row of the same value."""
    codes: Longs = column.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.unique(codes, return_index=True)[1][codes]


def _first_near(hashes: Hashes, bits: int) -> Longs:
    """For every hash (N,) the number of the first kept one within `bits`: its own where it is kept."""
    different, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # the different hashes as they first come
    leaders = np.empty(len(different), dtype=np.int64)
    leaders[order] = first[order[_leaders(different[order], bits)]]
    return leaders[which]


def _leaders(hashes: Hashes, bits: int) -> Longs:
    """As `_first_near`, for hashes (U,) that all differ. A block at a time: first against all kept, then in itself."""
    leaders = np.arange(len(hashes))
    kept = _Bands(hashes, bits)
    for start in range(0, len(hashes), _BLOCK):
        block = leaders[start : start + _BLOCK]
        first = np.full(len(block), len(hashes))
        for query, earlier in kept.within(hashes[block]):
            np.minimum.at(first, query, earlier)
        known = first < len(hashes)
        block[known] = first[known]
        new = block[~known]
        inside = new[_leaders_of_block(hashes[new], bits)]
        block[~known] = inside
        kept.add(new[inside == new], hashes[new[inside == new]])
    return leaders


def _leaders_of_block(hashes: Hashes, bits: int) -> Longs:
    leaders = np.arange(len(hashes))
    near = np.zeros((len(hashes), len(hashes)), dtype=bool)
    bands = _Bands(hashes, bits)
    bands.add(leaders, hashes)
    for query, other in bands.within(hashes):
        near[query[other < query], other[other < query]] = True
    kept = np.ones(len(hashes), dtype=bool)
    for row in np.nonzero(near.any(axis=1))[0].tolist():
        earlier = near[row] & kept
        if earlier.any():
            leaders[row] = earlier.argmax()
            kept[row] = False
    return leaders


class _Bands:
    """Hashes by the values of their bands: two within `bits` agree in one of more than `bits` bands.

    Args:
        capacity: every hash that will ever be added, for the places that each value of a band needs.
        bits: in which hashes that count as near may differ.
    """

    def __init__(self, capacity: Hashes, bits: int) -> None:
        self.bits = bits
        edges = np.linspace(0, _BITS, max(4, bits + 1) + 1).astype(int).tolist()  # at most 16 bits a band
        self.bands = list(pairwise(edges))
        self.starts = [self._starts(capacity, low, high) for low, high in self.bands]
        self.filled = [np.zeros(len(starts), dtype=np.int64) for starts in self.starts]
        self.hashes = [np.empty(len(capacity), dtype=np.uint64) for _ in self.bands]
        self.numbers = [np.empty(len(capacity), dtype=np.int64) for _ in self.bands]

    def add(self, numbers: Longs, hashes: Hashes) -> None:
        for band, (low, high) in enumerate(self.bands):
            values = _values(hashes, low, high)
            order = np.argsort(values, kind="stable")
            values = values[order]
            place_in_run = np.arange(len(values)) - np.searchsorted(values, values)
            places = self.starts[band][values] + self.filled[band][values] + place_in_run
            self.hashes[band][places] = hashes[order]
            self.numbers[band][places] = numbers[order]
            self.filled[band] += np.bincount(values, minlength=len(self.filled[band]))

    def within(self, queries: Hashes) -> Iterator[tuple[Longs, Longs]]:
        """Pairs (number of the query, number of an added hash) that are near, some of them several times."""
        for band, (low, high) in enumerate(self.bands):
            values = _values(queries, low, high)
            for query, places in _pairs(self.starts[band][values], self.filled[band][values]):
                near = np.bitwise_count(self.hashes[band][places] ^ queries[query]) <= self.bits
                yield query[near], self.numbers[band][places[near]]

    @staticmethod
    def _starts(hashes: Hashes, low: int, high: int) -> Longs:
        counts = np.bincount(_values(hashes, low, high), minlength=1 << (high - low))
        return np.cumsum(counts) - counts


def _values(hashes: Hashes, low: int, high: int) -> Longs:
    """Bits `low` to `high` of hashes (N,)."""
    return ((hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)).astype(np.int64)


def _pairs(begins: Longs, counts: Longs) -> Iterator[tuple[Longs, Longs]]:
    """(query, place) for the `counts` places from `begins` on of every query, about _CANDIDATES at a time."""
    ends = np.cumsum(counts)
    low = 0
    while low < len(counts):
        done = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + _CANDIDATES, side="right")))
        query = np.repeat(np.arange(low, high), counts[low:high])
        offset = np.repeat(begins[low:high] - (ends[low:high] - counts[low:high]) + done, counts[low:high])
        yield query, offset + np.arange(len(query))
        low = high
