"""The server's own process: `python -P guard.py PARENT FOLDER -- MLFLOW-ARGUMENTS`, started by server.py.

It runs `mlflow server` and ends its whole process group once PARENT is gone, however that ended. Asking for the
parent's id twice a second is deliberate: PR_SET_PDEATHSIG fires when the *thread* that started the process ends, and a
pipe that closes with the parent is kept open by every child that the parent forked.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0


def end_with(parent: int) -> None:
    """Waits for the parent process to go, then ends this process group: first by asking, then by force."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def serve_here(command: Sequence[str], extra_env: Mapping[str, str], **how: Any) -> NoReturn:
    """Run MLflow's `python -m uvicorn ...` in this process, until it is told to end."""
    from uvicorn.main import main as uvicorn

    os.environ.update(extra_env)
    uvicorn(args=[*command[command.index("uvicorn") + 1 :]])
    raise SystemExit


def main() -> None:
    """Watches the parent from a thread and runs MLflow's command line in this one.

    The command line would start a process that imports MLflow anew: three of the seven seconds that a server takes to
    start, and 230 MB. It serves by itself instead.
    """
    parent, cut = int(sys.argv[1]), sys.argv.index("--")
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    import uvicorn  # noqa: F401 - before MLflow, which by that knows that it serves, and checks who asks
    from mlflow import server
    from mlflow.cli import cli

    if not hasattr(server, "_exec_cmd"):
        raise SystemExit("This MLflow starts its server in a way that is not known here: install mlflow>=3.16,<3.18.")
    server._exec_cmd = serve_here
    cli.main(args=sys.argv[cut + 1 :], prog_name="mlflow")


if __name__ == "__main__":
    main()
