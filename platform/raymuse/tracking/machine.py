"""How busy a machine is while a run's work goes on, under the names that MLflow's page of system metrics shows.

MLflow has a monitor of its own, which sends to the server itself; this one goes through the spool like all else.
"""

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from raymuse.tracking.run import Run, clean

SECONDS = 10.0  # between two looks, as MLflow's
_MB = 1e6
_QUERY = "utilization.gpu,memory.used,memory.total,power.draw"


@contextlib.contextmanager
def monitored(run: Run, node: str | None = None, since: float = 0.0, seconds: float | None = None) -> Iterator[None]:
    """Inside, the run is told every few seconds how busy this machine is.

    Args:
        node: name of this machine, where it is another than the run's first.
        since: seconds of work before this attempt; steps are seconds of work.
        seconds: between two looks; None: SECONDS.
    """
    if run.identity is None:
        yield
        return
    ended = threading.Event()
    prefix = "system" if node is None else f"system/{clean(node)}"

    def watch() -> None:
        network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first says nothing: it is a mean since the call before
        began = time.monotonic()
        while not ended.wait(SECONDS if seconds is None else seconds):
            values = {**_machine(network), **_gpus()}
            step = round(since + time.monotonic() - began)
            run.metrics({f"{prefix}/{name}": value for name, value in values.items()}, step)

    thread = threading.Thread(target=watch, name="raymuse-machine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)


def _machine(before: Any) -> dict[str, float]:
    """What psutil says; `before` are its counters of the network when the work began."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("."), psutil.net_io_counters()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MB,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / _MB,
        "disk_available_megabytes": disk.free / _MB,
        "network_receive_megabytes": (network.bytes_recv - before.bytes_recv) / _MB,
        "network_transmit_megabytes": (network.bytes_sent - before.bytes_sent) / _MB,
    }


def _gpus() -> dict[str, float]:
    """What NVIDIA's own tool says of each GPU; nothing where there is none."""
    try:
        words = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
        told = subprocess.run(words, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_gpus(told.stdout) if told.returncode == 0 else {}


def parse_gpus(table: str) -> dict[str, float]:
    """A line a GPU: utilization (%), memory used and whole (MiB), power (W); what it cannot tell is left out."""
    values: dict[str, float] = {}
    for number, line in enumerate(table.strip().splitlines()):
        busy, used, whole, power = (_number(cell) for cell in line.split(","))
        share = 100 * used / whole if used is not None and whole else None
        told = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": None if used is None else used * 2**20 / _MB,
            "memory_usage_percentage": share,
            "power_usage_watts": power,
        }
        values |= {f"gpu_{number}_{name}": value for name, value in told.items() if value is not None}
    return values


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
