"""A job followed to its end: what it prints is passed on, through lost connections, and its exit code found."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from raymuse.clusters.jobserver import JobServer, Unreachable

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # that a cluster may be silent before it is given up

Say = Callable[[str], None]


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
                return verdict(details, say)
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


def verdict(details: JobDetails, say: Say) -> int:
    """The job's exit code: its driver's, where it had one."""
    code = details.driver_exit_code
    if JobStatus(details.status) == JobStatus.SUCCEEDED:
        return 0
    reason = (details.message or "").strip()
    if code is not None:  # the end of the log, which Ray repeats, was shown already
        reason = reason.partition("\n")[0].partition(", last available logs")[0]
    say(f"job {details.submission_id}: {details.status}. {reason}")
    if JobStatus(details.status) == JobStatus.STOPPED:
        return 143
    if code is None:
        return 1
    return 128 - code if code < 0 else code or 1
