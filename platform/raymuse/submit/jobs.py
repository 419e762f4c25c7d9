"""Jobs on a cluster: sent, listed, stopped.

A job has a name, which is made of what it writes to; each attempt has an id of Ray's: NAME, NAME-2, NAME-3. An attempt
goes on from what the ones before it committed, in the same MLflow run, on this cluster or on the next.
"""

import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from raymuse.clusters.jobserver import JobServer
from raymuse.config.base import Config
from raymuse.config.errors import UserError
from raymuse.config.flow import FlowConfig
from raymuse.config.recipe import stage_of
from raymuse.submit.following import Say
from raymuse.submit.order import Order, check, entry_resources, keep, require_reachable, runtime_env, storage
from raymuse.submit.package import Package, digest, gather, mib
from raymuse.tracking.provenance import COMMIT, JOB_VARIABLE, commit
from raymuse.tracking.run import PENDING, Run, open_run

NAME = "raymuse.name"  # keys of a job's metadata, and tags of its run
SUBMISSION = "raymuse.submission"
PIPELINE = "raymuse.pipeline"  # the job whose stage this one is
RUN_VARIABLE = "MLFLOW_RUN_ID"
OPEN_SECONDS = 20.0  # that a job waits for its run's id; a server that is away gives it later, by the run's key
STOP_SECONDS = 30.0
READY_SECONDS = 60.0
_NOT_READY = "No available agent"  # as Ray says it


@dataclass(frozen=True)
class Attempt:
    """One run of a job on one cluster: its name, and Ray's id of it."""

    name: str
    submission: str


def submit(server: JobServer, order: Order, config: Config, root: Path, say: Say) -> Attempt:
    """Send a job, or find it running.

    Args:
        config: what the order's recipe says, checked.
        root: the folder it is submitted from.

    Raises:
        UserError: for what no cluster could run, or a job of that name that runs already.
    """
    require_reachable(order, server.address)
    package = gather(root, order.excludes)
    check(order, config, package)
    name = order.label(config)
    submission = _next(server, name)
    _say_size(order, package, say)
    with _opened(order, config, name) as run:
        description = describe(order, name, submission, run, commit(root))
        variables = job_variables(order, config, submission, run)
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "package.zip"
            if order.image is None:
                package.write(archive, server.token.text if server.token else None)
                say(f"uploading {mib(archive.stat().st_size)} (what the cluster has already is not sent again)")
            send(server, order, config, runtime_env(order, str(archive), variables), description)
        run.tags(description)
    keep(replace(order, name=name), name, root, server.address)
    say(f"job {submission} on {server.address}{f', MLflow {run.link}' if run.link else ''}")
    return Attempt(name, submission)


def plan(order: Order, config: Config, root: Path) -> str:
    """What `submit` would send, for `--dry-run`."""
    package = gather(root, order.excludes)
    check(order, config, package)
    env = runtime_env(order, "(this package)", job_variables(order, config, order.label(config), Run.off()))
    lines = [f"job {order.label(config)}: {shlex.join(order.entry())}"]
    lines += [] if order.image is not None else [package.summary]
    lines += [f"driver: {entry_resources(order, config) or 'on the head, no resources of its own'}"]
    return "\n".join([*lines, f"environment: {env}"])


def send(
    server: JobServer, order: Order, config: Config, environment: dict[str, Any], description: dict[str, str]
) -> None:
    """Hand one attempt to Ray: `description` is from `describe`, `environment` Ray's runtime environment.

    A head that has just started answers before it takes jobs: it is asked again for a while.
    """
    limit = time.monotonic() + READY_SECONDS
    with server.answering():
        while True:
            try:
                server.client.submit_job(
                    entrypoint=shlex.join(order.entry()),
                    submission_id=description[SUBMISSION],
                    runtime_env=environment,
                    metadata=description,
                    **entry_resources(order, config),
                )
            except RuntimeError as error:
                if _NOT_READY not in str(error) or time.monotonic() > limit:
                    raise
                time.sleep(1)
            else:
                return


def describe(order: Order, name: str, submission: str, run: Run, code: str | None) -> dict[str, str]:
    """What the cluster's pages, and the run's tags, say of an attempt."""
    values = {
        NAME: name,
        SUBMISSION: submission,
        "raymuse.stage": order.command,
        "raymuse.recipe": order.recipe or "",
        "raymuse.changes": " ".join(order.changes),
        COMMIT: code or "",
        "raymuse.mlflow_run": run.id or "",
    }
    return {key: value for key, value in values.items() if value}


def job_variables(order: Order, config: Config, submission: str, run: Run) -> dict[str, str]:
    """The environment of driver and workers. No secret is in it: everybody who sees the job sees it."""
    # A server that only the cluster knows finds the attempts' run by the key.
    made = {JOB_VARIABLE: submission, RUN_VARIABLE: run.id or run_key(order.label(config), config)}
    if order.mlflow is not None:
        made |= {"MLFLOW_TRACKING_URI": order.mlflow, "MLFLOW_EXPERIMENT_NAME": experiment(config)}
    return made


def experiment(config: Config) -> str:
    """MLflow's experiment of a job."""
    return config.name if isinstance(config, FlowConfig) else "raymuse"


def run_key(name: str, config: Config) -> str:
    """Under which a job's run is found again: by whoever submits the same name for the same storage, to any cluster."""
    return f"{PENDING}{name}-{digest(storage(config))}"


@contextlib.contextmanager
def _opened(order: Order, config: Config, name: str) -> Any:
    """The job's MLflow run, new or gone on with; failed, where the job cannot be sent."""
    title = stage_of(type(config))
    run = open_run(order.mlflow, experiment(config), title, resume=run_key(name, config) if order.mlflow else None)
    run.flush(OPEN_SECONDS)
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.flush()


def attempts(server: JobServer, name: str) -> list[JobDetails]:
    """A job's attempts on this cluster, by its name or by one's id, the oldest first."""
    jobs = server.jobs()
    named = [job for job in jobs if (job.metadata or {}).get(NAME) == name]
    return named or [job for job in jobs if job.submission_id == name]


def last(server: JobServer, name: str) -> JobDetails:
    """The newest attempt.

    Raises:
        UserError: the cluster knows none.
    """
    found = attempts(server, name)
    if not found:
        raise UserError(
            f"{server.address} knows no job {name}; `raymuse jobs list` shows them. A cluster forgets its jobs when it "
            f"ends: `raymuse jobs resume {name}` submits one again that was submitted from this machine."
        )
    return found[-1]


def running(known: Sequence[JobDetails]) -> JobDetails | None:
    """The newest of a job's attempts that has not ended."""
    return next((job for job in reversed(known) if not JobStatus(job.status).is_terminal()), None)


def next_id(name: str, known: Sequence[JobDetails]) -> str:
    """Ray's id of the attempt after those that are known: NAME, NAME-2, NAME-3."""
    return name if not known else f"{name}-{len(known) + 1}"


def _next(server: JobServer, name: str) -> str:
    """The id of the next attempt.

    Raises:
        UserError: one runs.
    """
    known = attempts(server, name)
    if (job := running(known)) is not None:
        raise UserError(
            f"job {name} is {job.status} on {server.address}: follow it with `raymuse jobs logs {name} -f`, "
            f"or end it with `raymuse jobs stop {name}`. For another beside it: --name, and another output."
        )
    return next_id(name, known)


def _say_size(order: Order, package: Package, say: Say) -> None:
    say(f"in the image {order.image}" if order.image is not None else package.summary)


def stop(server: JobServer, name: str) -> str:
    """End a job's newest attempt and wait for its end; what came of it, for people."""
    details = last(server, name)
    submission = str(details.submission_id)
    if JobStatus(details.status).is_terminal():
        return f"{submission} had ended already: {details.status}"
    with server.answering():
        server.client.stop_job(submission)
    deadline = time.monotonic() + STOP_SECONDS
    while not JobStatus(server.details(submission).status).is_terminal():
        if time.monotonic() > deadline:
            return f"{submission} was told to stop, and has not after {STOP_SECONDS:.0f} s"
        time.sleep(0.5)
    about = details.metadata or {}
    goes_on = about.get(PIPELINE) or about.get(NAME)  # of a stage the pipeline alone does, and of another's job nobody
    said = f"{submission} is {server.details(submission).status}; what it finished is kept"
    return f"{said}: raymuse jobs resume {goes_on}" if goes_on else said


def resumable(server: JobServer, job: str) -> str:
    """The name under which a job was kept, by its name or by the id of one attempt that this cluster knows.

    Raises:
        UserError: it is a stage of a pipeline.
    """
    known = attempts(server, job)
    about = (known[-1].metadata or {}) if known else {}
    if PIPELINE in about:
        raise UserError(
            f"{job} is a stage of the pipeline {about[PIPELINE]}: `raymuse jobs resume {about[PIPELINE]}` goes on with "
            "it, and passes over what is finished."
        )
    return str(about.get(NAME, job))


def table(jobs: list[JobDetails]) -> str:
    """Jobs, a line each, the newest first."""
    rows = [("JOB", "STATUS", "EXIT", "STARTED (UTC)", "MINUTES", "STAGE", "RECIPE")]
    for job in reversed(jobs):
        about = job.metadata or {}
        began = (job.start_time or 0) / 1000
        minutes = ((job.end_time or time.time() * 1000) / 1000 - began) / 60
        code = "" if job.driver_exit_code is None else str(job.driver_exit_code)
        started = time.strftime("%Y-%m-%d %H:%M", time.gmtime(began))
        recipe = about.get("raymuse.recipe", (job.entrypoint or "").strip().partition("\n")[0][:40])
        shown = (str(job.submission_id), str(job.status), code, started, f"{minutes:.1f}")
        rows.append((*shown, about.get("raymuse.stage", ""), recipe))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def say_aside(text: str) -> None:
    """To stderr: stdout is the job's own."""
    print(text, file=sys.stderr, flush=True)
