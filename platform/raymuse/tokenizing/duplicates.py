"""The search for pictures that show the same, over the whole plan, on Ray Data: hash (CPU), then compare in the driver.

_hashes/part-000000.arrow   hashes of one shard, gone at the end
duplicates.parquet          what was found; a resume does not search again
"""

import io
import pickle
from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import TaskPoolStrategy

from raymuse.clusters.placement import place
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.hashes import find_duplicates
from raymuse.encoding.tasks import DECODE_CPUS, hash_row
from raymuse.storage.folder import Folder
from raymuse.storage.images import Shard
from raymuse.storage.rejects import Reason, Reject, to_table
from raymuse.storage.token_parts import HASHES, hashes_file, read_table
from raymuse.storage.tokens import parquet_bytes
from raymuse.tracking.run import Run

DUPLICATES = "duplicates.parquet"

Drops = dict[str, dict[str, Reject]]  # part -> key -> why


def search(folder: Folder, config: PretokenizeConfig, plan: Mapping[str, Shard], run: Run) -> Drops:
    """Which pictures to leave out because an earlier one shows the same: found once, over the whole plan."""
    if config.duplicates == "keep":
        return {}
    if not folder.exists(DUPLICATES):
        _hash_all(folder, config, plan)
        found = find_duplicates(
            ((name, shard.name, read_table(folder, hashes_file(name))) for name, shard in plan.items()),
            config.near_duplicates,
        )
        rows = [(part, reject) for part, keys in found.items() for reject in keys.values()]
        table = to_table(reject for _, reject in rows).add_column(
            0, "part", pa.array([p for p, _ in rows], pa.string())
        )
        folder.write(DUPLICATES, parquet_bytes(table, {}))
    table = pq.read_table(io.BytesIO(folder.read(DUPLICATES)))
    reasons = Counter(table["reason"].to_pylist())
    run.metrics({f"found/{reason}": float(count) for reason, count in reasons.items()}, 0)
    found_text = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    print(f"duplicates: {found_text} ({'dropped' if config.duplicates == 'drop' else 'counted only'})", flush=True)
    drops: Drops = {}
    if config.duplicates == "drop":
        for row in table.to_pylist():
            reject = Reject(row["source"], row["key"], Reason(row["reason"]), row["detail"])
            drops.setdefault(row["part"], {})[row["key"]] = reject
    return drops


def _hash_all(folder: Folder, config: PretokenizeConfig, plan: Mapping[str, Shard]) -> None:
    there = set(folder.names(HASHES))
    rows = [
        {"part": name, "shard": pickle.dumps(shard)}
        for name, shard in plan.items()
        if hashes_file(name).rpartition("/")[2] not in there
    ]
    if not rows:
        return
    hashed = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        hash_row,
        batch_size=1,
        compute=TaskPoolStrategy(size=min(config.decoders, len(rows))),
        num_cpus=DECODE_CPUS,
        label_selector=place("decode", gpus=0),
        fn_kwargs={"config": config, "output": folder.address},
    )
    for number, _ in enumerate(hashed.iter_rows(), 1):
        print(f"looked for duplicates in {number} of {len(rows)} shards", flush=True)
