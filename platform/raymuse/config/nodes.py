"""What a training asks of the machines that it runs on: how they talk, and what each keeps of the data."""

from pathlib import Path

from pydantic import Field, field_validator

from raymuse.config.base import Config


class NetworkConfig(Config):
    """How workers on several machines reach each other, said to NCCL, gloo and libfabric by their variables."""

    interface: str | None = Field(
        None, min_length=1, description="network interface of every machine, such as ens5; None: the libraries choose"
    )
    efa: bool = Field(False, description="AWS' Elastic Fabric Adapter, through libfabric and its NCCL plug-in")
    variables: dict[str, str] = Field({}, description="more of the workers' environment, such as {NCCL_DEBUG: INFO}")

    def environment(self) -> dict[str, str]:
        """Variables that must stand before a process group starts; what is named under `variables` goes before ours."""
        found: dict[str, str] = {}
        if self.interface is not None:
            found |= {"NCCL_SOCKET_IFNAME": f"={self.interface}", "GLOO_SOCKET_IFNAME": self.interface}
        if self.efa:
            found |= {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"}
        return {**found, **self.variables}

    @field_validator("interface")
    @classmethod
    def _one_name(cls, name: str | None) -> str | None:
        if name is not None and any(mark in name for mark in ",^=*: "):
            raise ValueError(
                f"{name!r} is not the name of one interface, such as eth0 (`ip link` shows them); lists and patterns "
                "differ between NCCL and gloo: set them as variables: {NCCL_SOCKET_IFNAME: ...}"
            )
        return name


class ShardCacheConfig(Config):
    """Copies of token shards on each machine's own disk, one a file however many workers read it there."""

    folder: str = Field(description="absolute path on every machine's own disk; may serve several trainings")
    gib: float = Field(100.0, gt=0, description="that the copies may take; those not read for longest go first")

    @field_validator("folder")
    @classmethod
    def _on_a_disk(cls, folder: str) -> str:
        if "://" in folder or not Path(folder).is_absolute():
            raise ValueError(f"{folder!r} must be an absolute path on a disk of each machine, such as /mnt/nvme/shards")
        return folder
