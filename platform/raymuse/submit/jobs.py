"""Jobs on a cluster: sent, followed to the end, listed, stopped.

A job has a name, which is made of what it writes to; each attempt has an id of Ray's: NAME, NAME-2, NAME-3. An attempt
goes on from what the ones before it committed, in the same MLflow run, on this cluster or on the next.
"""

import asyncio
import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from raymuse.clusters.jobserver import JobServer, Unreachable
from raymuse.config.base import Config
from raymuse.config.errors import UserError
from raymuse.config.flow import FlowConfig
from raymuse.submit.order import Order, check, entry_resources, keep, runtime_env, storage
from raymuse.submit.package import Package, commit, digest, gather, mib
from raymuse.tracking.run import PENDING, Run, open_run

NAME = "raymuse.name"  # keys of a job's metadata, and tags of its run
SUBMISSION = "raymuse.submission"
COMMIT = "raymuse.commit"
JOB_VARIABLE = "RAYMUSE_JOB"  # the attempt's id, in the environment of its processes
RUN_VARIABLE = "MLFLOW_RUN_ID"
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # that a cluster may be silent before it is given up
STOP_SECONDS = 30.0

Say = Callable[[str], None]


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
                say(f"uploading {mib(archive.stat().st_size).strip()} (what the cluster has already is not sent again)")
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
    """Hand one attempt to Ray: `description` is from `describe`, `environment` Ray's runtime environment."""
    with server.answering():
        server.client.submit_job(
            entrypoint=shlex.join(order.entry()),
            submission_id=description[SUBMISSION],
            runtime_env=environment,
            metadata=description,
            **entry_resources(order, config),
        )


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
    made = {JOB_VARIABLE: submission}
    if order.mlflow is not None:
        made |= {"MLFLOW_TRACKING_URI": order.mlflow, "MLFLOW_EXPERIMENT_NAME": experiment(config)}
        made |= {RUN_VARIABLE: run.id} if run.id else {}
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
    title = "flow" if isinstance(config, FlowConfig) else str(type(config).model_fields["stage"].default)
    run = open_run(order.mlflow, experiment(config), title, resume=run_key(name, config) if order.mlflow else None)
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


def _next(server: JobServer, name: str) -> str:
    """The id of the next attempt.

    Raises:
        UserError: one runs.
    """
    known = attempts(server, name)
    running = [job for job in known if not JobStatus(job.status).is_terminal()]
    if running:
        raise UserError(
            f"job {name} is {running[-1].status} on {server.address}: follow it with `raymuse jobs logs {name} -f`, "
            f"or end it with `raymuse jobs stop {name}`. For another beside it: --name, and another output."
        )
    return name if not known else f"{name}-{len(known) + 1}"


def _say_size(order: Order, package: Package, say: Say) -> None:
    say(f"in the image {order.image}" if order.image is not None else package.summary)


def follow(server: JobServer, submission: str, say: Say, out: Callable[[str], None]) -> int:
    """Pass on what a job prints until it ends, and return its exit code.

    A connection that breaks is made again; what was passed on is not repeated.

    Args:
        say: for what is said of the job.
        out: for what the job itself says.

    Raises:
        Unreachable: the cluster is silent for a minute.
    """
    seen, silent, told = 0, None, ""
    while True:
        try:
            details = server.details(submission)
            status = JobStatus(details.status)
            if status == JobStatus.PENDING:
                told = _told(f"{status}: {details.message}", told, say)
                time.sleep(POLL_SECONDS)
                continue
            seen = _tail(server, submission, seen, out)
            details, silent = server.details(submission), None
            if JobStatus(details.status).is_terminal():
                _rest(server, submission, seen, out)
                return _verdict(details, say)
        except (Unreachable, aiohttp.ClientError, ConnectionError) as error:
            silent = silent or time.monotonic()
            if time.monotonic() - silent > PATIENCE_SECONDS:
                raise Unreachable(
                    f"{server.address} is silent. Where the cluster has ended, `raymuse jobs resume` goes on with the "
                    "job on another; what is finished is kept."
                ) from error
            told = _told(f"{server.address} is silent; trying for {PATIENCE_SECONDS:.0f} s", told, say)
        time.sleep(POLL_SECONDS)


def _told(text: str, before: str, say: Say) -> str:
    if text != before:
        say(text)
    return text


def _tail(server: JobServer, submission: str, seen: int, out: Callable[[str], None]) -> int:
    """Pass on a job's output from a character on, until it ends or the connection does; how far that got."""
    place = 0

    async def passing() -> None:
        nonlocal place
        async for text in server.client.tail_job_logs(submission):
            if place + len(text) > seen:
                out(text[max(0, seen - place) :])
            place += len(text)

    with contextlib.suppress(RuntimeError):  # the connection broke: the caller asks for the job's state
        asyncio.run(passing())
    return max(place, seen)


def _rest(server: JobServer, submission: str, seen: int, out: Callable[[str], None]) -> None:
    """Pass on what an ended job printed after a character; nothing, where it never began to."""
    with server.answering(), contextlib.suppress(RuntimeError):
        out(server.client.get_job_logs(submission)[seen:])


def _verdict(details: JobDetails, say: Say) -> int:
    """The job's exit code: its driver's, where it had one."""
    code = details.driver_exit_code
    if JobStatus(details.status) == JobStatus.SUCCEEDED:
        return 0
    message = (details.message or "").strip()
    reason = message if code is None else _first_line(message).partition(", last available logs")[0]  # shown already
    say(f"job {details.submission_id}: {details.status}. {reason}")
    if JobStatus(details.status) == JobStatus.STOPPED:
        return 143
    if code is None:
        return 1
    return 128 - code if code < 0 else code or 1


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


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
    return f"{submission} is {server.details(submission).status}; what it finished is kept: raymuse jobs resume {name}"


def table(jobs: list[JobDetails]) -> str:
    """Jobs, a line each, the newest first."""
    rows = [("JOB", "STATUS", "EXIT", "STARTED (UTC)", "MINUTES", "STAGE", "RECIPE")]
    for job in reversed(jobs):
        about = job.metadata or {}
        began = (job.start_time or 0) / 1000
        minutes = ((job.end_time or time.time() * 1000) / 1000 - began) / 60
        code = "" if job.driver_exit_code is None else str(job.driver_exit_code)
        started = time.strftime("%Y-%m-%d %H:%M", time.gmtime(began))
        recipe = about.get("raymuse.recipe", _first_line(job.entrypoint)[:40])
        shown = (str(job.submission_id), str(job.status), code, started, f"{minutes:.1f}")
        rows.append((*shown, about.get("raymuse.stage", ""), recipe))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def say_aside(text: str) -> None:
    """To stderr: stdout is the job's own."""
    print(text, file=sys.stderr, flush=True)
