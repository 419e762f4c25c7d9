"""`raymuse submit`, `raymuse jobs` and, inside a cluster, `raymuse pipeline`."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymuse.cli.words import SCORES, TRAININGS, config_for, data_config, mlflow_uri, split

if TYPE_CHECKING:
    from raymuse.clusters.jobserver import JobServer
    from raymuse.config.base import Config
    from raymuse.submit.order import Order

app = typer.Typer(help="List, follow, stop and resume jobs on a cluster.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="The cluster's dashboard [default: $RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265]."
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="Name of a job, or id of one attempt.")]
Stages = Annotated[
    str | None, typer.Option(metavar="A,B", help="Sections of the flow that a pipeline runs [default: all].")
]


def submit(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="STAGE RECIPE KEY=VALUE", show_default=False, hidden=True)
    ] = None,
    pipeline: Annotated[bool, typer.Option("--pipeline", help="Run a flow's stages as jobs in a row.")] = False,
    address: Address = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the job is called [default: made of recipe and output].")
    ] = None,
    stages: Stages = None,
    mlflow: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow server, as here and on the cluster [default: $MLFLOW_TRACKING_URI]."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Files that stay here, besides .gitignore's.")
    ] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Have the machines install the dependencies, pinned as they are here.")
    ] = False,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Run in this image, with its raymuse; nothing is uploaded.")
    ] = None,
    entry_cpus: Annotated[float | None, typer.Option(metavar="N", help="CPUs for the driver.")] = None,
    entry_gpus: Annotated[float | None, typer.Option(metavar="N", help="GPUs for the driver.")] = None,
    entry_memory: Annotated[float | None, typer.Option(metavar="GIB", help="Memory for the driver.")] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Submit, and leave.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would go, and stop.")] = False,
) -> None:
    """Run a stage, or a flow's stages in a row, on a cluster.

    raymuse submit train demo:base input=/shared/tokens output=/shared/base

    The folder you stand in goes along. The exit code is the job's. The same command again goes on with what is
    finished, on this cluster or on another.
    """
    from raymuse.config.errors import UserError
    from raymuse.submit.order import Order

    words = list(words or [])
    command = "pipeline" if pipeline else words.pop(0) if words else ""
    if stages and not pipeline:
        raise UserError("--stages belongs to --pipeline.")
    if image and install:
        raise UserError("--install is for machines, and --image brings its own: leave one of the two out.")
    config = job_config(command, words)
    recipe, changes = split(words)
    order = Order(
        command,
        None if recipe is None else _inside(recipe),
        tuple(changes),
        name=name,
        mlflow=mlflow_uri(mlflow),
        excludes=tuple(exclude or ()),
        image=image,
        install=install,
        cpus=entry_cpus,
        gpus=entry_gpus,
        memory_gib=entry_memory,
        stages=tuple(stages.split(",")) if stages else (),
    )
    if pipeline:
        _check_pipeline(order)
    if dry_run:
        from raymuse.submit.jobs import plan

        typer.echo(plan(order, config, Path.cwd()))
        return
    from raymuse.clusters.jobserver import connect

    _run(connect(address), order, config, follows=not no_follow)


def _check_pipeline(order: "Order") -> None:
    """Raise UserError for stages that a flow does not have, and changes that no section can take."""
    from raymuse.submit.pipeline import check_stages, section_changes

    for section in check_stages(order.stages):
        section_changes(order.changes, section, "")


def job_config(command: str, words: list[str]) -> "Config":
    """The checked config of a job.

    Raises:
        UserError: there is no such stage, or its recipe is wrong.
    """
    from raymuse.config.base import StageConfig
    from raymuse.config.errors import UserError
    from raymuse.config.export import ExportConfig
    from raymuse.config.flow import FlowConfig
    from raymuse.config.generate import GenerateConfig
    from raymuse.config.pretokenize import PretokenizeConfig
    from raymuse.config.training import TrainConfig

    kinds: dict[str, Callable[[], Any]] = {
        "data": lambda: data_config(words),
        "pretokenize": lambda: config_for(PretokenizeConfig, "pretokenize", words, ("pretokenize",)),
        "train": lambda: config_for(TrainConfig, "train", words, TRAININGS),
        "export": lambda: config_for(ExportConfig, "export", words, ("export",)),
        "generate": lambda: config_for(GenerateConfig, "generate", words, ("generate",)),
        "score": lambda: config_for(StageConfig, "score", words, SCORES),
        "pipeline": lambda: config_for(FlowConfig, "submit --pipeline", words, ("flow",)),
    }
    if command not in kinds:
        known = ", ".join(name for name in kinds if name != "pipeline")
        said = f"there is no stage {command!r}" if command else "raymuse submit needs a stage and a recipe"
        raise UserError(f"{said}: {known}, or --pipeline and a flow's recipe.")
    config: Config = kinds[command]()
    return config


def _inside(recipe: str) -> str:
    """A recipe of this folder by its relative path: the job's folder is another."""
    path = Path(recipe)
    return path.relative_to(Path.cwd()).as_posix() if path.is_absolute() and path.is_relative_to(Path.cwd()) else recipe


def _run(server: "JobServer", order: "Order", config: "Config", follows: bool) -> None:
    from raymuse.submit import jobs

    attempt = jobs.submit(server, order, config, Path.cwd(), jobs.say_aside)
    if follows:
        _follow(server, attempt.name, attempt.submission)
    else:
        typer.echo(attempt.submission)


def _follow(server: "JobServer", name: str, submission: str) -> None:
    from raymuse.clusters.jobserver import Unreachable
    from raymuse.submit import jobs
    from raymuse.submit.following import follow

    def out(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code = follow(server, submission, jobs.say_aside, out)
    except Unreachable as error:
        jobs.say_aside(f"Error: {error}")
        code = 1
    except KeyboardInterrupt:
        jobs.say_aside(
            f"\nthe job goes on; to follow it: raymuse jobs logs {name} --follow; to end it: raymuse jobs stop {name}"
        )
        raise
    if code:
        raise typer.Exit(code)


@app.command("list")
def list_jobs(address: Address = None) -> None:
    """List the cluster's jobs, the newest first."""
    from raymuse.clusters.jobserver import connect
    from raymuse.submit import jobs

    typer.echo(jobs.table(connect(address).jobs()))


@app.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job ends; its exit code.")] = False,
) -> None:
    """Print what a job has printed."""
    from raymuse.clusters.jobserver import connect
    from raymuse.submit import jobs

    server = connect(address)
    submission = str(jobs.last(server, job).submission_id)
    if follow:
        _follow(server, job, submission)
        return
    with server.answering():
        typer.echo(server.client.get_job_logs(submission), nl=False)


@app.command()
def stop(job: Job, address: Address = None) -> None:
    """End a job; what it finished is kept."""
    from raymuse.clusters.jobserver import connect
    from raymuse.submit import jobs

    typer.echo(jobs.stop(connect(address), job))


@app.command()
def resume(
    job: Job,
    address: Address = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Submit, and leave.")] = False,
) -> None:
    """Go on with a job that ended or whose cluster did.

    As it was submitted from this machine, from the same folder, with the code that lies there now.
    """
    from raymuse.clusters.jobserver import connect
    from raymuse.config.errors import UserError
    from raymuse.submit.jobs import resumable
    from raymuse.submit.order import kept

    server = connect(address)
    order, folder = kept(resumable(server, job))
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(f"job {job} was submitted from {folder}: {error.strerror}.") from None
    words = [*([order.recipe] if order.recipe is not None else []), *order.changes]
    _run(server, order, job_config(order.command, words), follows=not no_follow)


def pipeline(
    words: Annotated[list[str] | None, typer.Argument(metavar="RECIPE KEY=VALUE", show_default=False)] = None,
    stages: Stages = None,
) -> None:
    """Run a flow's stages as jobs in a row: what `submit --pipeline` runs on the cluster."""
    from raymuse.config.flow import FlowConfig
    from raymuse.submit.pipeline import run_pipeline

    config = config_for(FlowConfig, "pipeline", words, ("flow",))
    recipe, changes = split(words)
    code = run_pipeline(config, recipe or "", changes, stages.split(",") if stages else [])
    if code:
        raise typer.Exit(code)
