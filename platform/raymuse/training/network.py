"""The network between workers, looked at before a process group starts there."""

import psutil

from raymuse.config.nodes import NetworkConfig


def missing_interface(config: NetworkConfig) -> str | None:
    """What is wrong with the interface that the config names, on this machine; None: nothing."""
    there = sorted(psutil.net_if_addrs())
    if config.interface is None or config.interface in there:
        return None
    return (
        f"network.interface: {config.interface} is none of this machine's ({', '.join(there)}). Name one that every "
        "machine has, or leave it out."
    )
