"""Several gloo processes at once, on a machine that has no C++ compiler."""

import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = Callable[..., Any]
PYTHONPATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
ENVIRONMENT = {"PATH": "/nowhere", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_ranks(job: Job, world: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `job(*arguments)` returned on each rank, from fresh processes that share a gloo group.

    Their PATH is empty and they have one thread each. They are forked from a process that holds `rank_imports` and has
    done nothing else. An exception in one ends all and is raised here.
    """
    place = folder / f"world-{world}"
    place.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": PYTHONPATH}.items():
            patch.setenv(name, value)
        forkserver.set_forkserver_preload(["rank_imports"])
        forkserver.ensure_running()
    mp.start_processes(_child, (job, world, place, arguments), nprocs=world, start_method="forkserver")
    return [torch.load(place / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]


def _child(rank: int, job: Job, world: int, place: Path, arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    assert os.environ.items() >= ENVIRONMENT.items()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=world)
    torch.save(job(*arguments), place / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
