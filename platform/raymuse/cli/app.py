"""The way in: `raymuse ...`, `python -m raymuse.cli ...` and the scripts in jobs/. Exit codes are decided here.

0 done; 1 failed; 2 bad usage, input or config; 3 done, but with more rejects than allowed; 130 stopped by Ctrl-C;
143 stopped by SIGTERM. What was finished is committed in every case.
"""

from __future__ import annotations  # so that a Python that is too old still gets as far as the sentence that says so

import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SUPPORTED = ((3, 11), (3, 12))
_STOPPED = {130: "stopped by Ctrl-C", 143: "stopped by SIGTERM"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after `raymuse`; None: those of this process.
    """
    problem = version_problem(sys.version_info[:2])
    if problem:
        print(problem, file=sys.stderr)
        return 2
    try:
        with _sigterm_unwinds():
            return _dispatch(argv)
    except KeyboardInterrupt:
        return _stopped(130)


def version_problem(version: tuple[int, int]) -> str | None:
    """What is wrong with a version of Python; None where it is one that raymuse runs on."""
    if version in SUPPORTED:
        return None
    return (
        f"Error: raymuse runs on Python 3.11 and 3.12, and this is {version[0]}.{version[1]} ({sys.executable}): "
        "make a virtual environment with one of those."
    )


def _dispatch(argv: Sequence[str] | None) -> int:
    from raymuse.cli.commands import app

    try:
        app(args=None if argv is None else list(argv), prog_name="raymuse")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        return _stopped(code)
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    from raymuse.config.errors import TooManyRejects, UserError

    for cause in _causes(error):
        if isinstance(cause, UserError):
            print(f"Error: {cause}", file=sys.stderr)
            return 2
        if isinstance(cause, TooManyRejects):
            print(f"Done, but: {cause}", file=sys.stderr)
            return 3
    traceback.print_exception(error)
    return 1


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, innermost first: Ray wraps a task's own error, and Ray Train wraps that again."""
    inner = [getattr(error, "cause", None), error.__cause__, *getattr(error, "worker_failures", {}).values()]
    for cause in inner:
        if isinstance(cause, BaseException):
            yield from _causes(cause)
    yield error


def _stopped(code: int) -> int:
    if code in _STOPPED:
        print(f"\n{_STOPPED[code]}", file=sys.stderr)
    return code


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM run every `finally` on its way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_number: int, _frame: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
