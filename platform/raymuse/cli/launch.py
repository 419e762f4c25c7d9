"""One stage from the command line: its Ray, its MLflow run, and its address on the last line of stdout."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from raymuse.cli.words import mlflow_uri, records_of
from raymuse.clusters.local import session, submitted
from raymuse.clusters.watching import watching_driver
from raymuse.config.base import StageConfig
from raymuse.config.recipe import stage_of
from raymuse.recording import recorded, run_of
from raymuse.tracking.registry import with_model
from raymuse.tracking.run import Run, finishing, open_run
from raymuse.tracking.server import Server, pages

_FEWEST_CPUS = 4  # logical: a pipeline of actors needs a few even where the machine has only two cores


def run_stage(stage: Callable[[Any, Run], str], config: StageConfig, mlflow: str | None, ray: bool = True) -> None:
    """Run a stage and print its address.

    Args:
        stage: typed config and MLflow run in, address out.
        config: what to run it with.
        mlflow: address of an MLflow server; None: MLFLOW_TRACKING_URI, and without that nothing is tracked.
        ray: whether the stage needs Ray; one that does not tells the cluster that it was submitted to how it gets on.
    """
    config = with_model(config, mlflow)
    here = local_ray() if ray or submitted() else contextlib.nullcontext()
    with (
        resumable(),
        _tracked(config, mlflow) as run,
        recorded(config, run) as attempt,
        here,
        watching_driver(config, attempt.spend),
    ):
        address = stage(config, run)
    print(address, flush=True)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Tell whoever stops the work that it is not lost."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("\nwhat is finished is kept: the same command goes on from there", file=sys.stderr)
        raise


def local_ray() -> contextlib.AbstractContextManager[object]:
    """The Ray of one command: the one it was submitted to, or a private one with all the machine's cores."""
    return session(num_cpus=max(_FEWEST_CPUS, os.cpu_count() or 1), dashboard=False)


@contextlib.contextmanager
def _tracked(config: StageConfig, mlflow: str | None) -> Iterator[Run]:
    uri = mlflow_uri(mlflow)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "raymuse")
    resumed = os.environ.get("MLFLOW_RUN_ID")  # a submitted job's run, the same in every attempt
    if uri is not None and resumed is not None:
        run = open_run(uri, experiment, stage_of(type(config)), resume=resumed)
    else:
        run = run_of(config, uri, experiment)
    with finishing(run):
        yield run


def show_tracking(workdir: str) -> None:
    """Serve what a flow recorded, until Ctrl-C.

    Raises:
        UserError: nothing was recorded there.
    """
    with Server.start(records_of(workdir)) as server:
        print(f"MLflow of {workdir}: {server.uri}   (Ctrl-C ends it)", flush=True)
        for name, page in pages(server.port).items():
            print(f"  {name}: {page}", flush=True)
        server.serve_forever()
