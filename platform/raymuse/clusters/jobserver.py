"""A cluster's job server, Ray's own client for it, and a sentence for each way in which it does not answer."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from raymuse.clusters.token import Token, find_token
from raymuse.config.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_SECONDS = 20
_ADDRESS = "RAY_API_SERVER_ADDRESS"


class Unreachable(Exception):  # noqa: N818 - a state of the network, which may pass
    """The job server answered before, and does not now."""


@dataclass(frozen=True)
class JobServer:
    """A job server that answered.

    Attributes:
        address: without a slash at its end.
        ray_version: of the cluster.
        token: what it was given; None where it asks for none.
    """

    address: str
    ray_version: str
    token: Token | None
    client: JobSubmissionClient

    def jobs(self) -> list[JobDetails]:
        """All submitted jobs that this cluster knows, the oldest first; it forgets them when it ends."""
        with self.answering():
            found = [job for job in self.client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def details(self, submission: str) -> JobDetails:
        """What the cluster knows of one job.

        Raises:
            UserError: it knows none of that id.
        """
        with self.answering():
            try:
                return self.client.get_job_info(submission)
            except RuntimeError as error:
                if "404" not in str(error):
                    raise
        raise UserError(f"{self.address} knows no job {submission}; `raymuse jobs list` shows them.")

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Turns failures of the network into `Unreachable`, and refusals into sentences."""
        try:
            yield
        except requests.RequestException as error:
            raise Unreachable(f"{self.address} no longer answers ({type(error).__name__})") from None
        except AuthenticationError:
            raise UserError(f"{self.address} no longer takes the token: was the cluster started anew?") from None


def connect(address: str | None) -> JobServer:
    """The job server at an address.

    Args:
        address: `http://HOST:PORT` of the dashboard; None: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS where it is such an
            address, or the dashboard on this machine.

    Raises:
        UserError: no token, a wrong one, nothing that listens, something else that listens, or another Ray.
    """
    address = _checked(address or _from_environment() or DEFAULT_ADDRESS)
    token = find_token()
    version = _ask_version(address, token)
    if _minor(version) != _minor(ray.__version__):
        raise UserError(
            f"{address} runs Ray {version} and this machine {ray.__version__}: the two must agree up to the second "
            f"number. Start the cluster with Ray {ray.__version__} (constraints.txt, and the image in cluster/)."
        )
    for name in ("dashboard_sdk", "job.sdk"):  # they tell of each upload and each connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    with _alone(address):
        client = JobSubmissionClient(address, headers=token.headers if token else None)
    return JobServer(address, version, token, client)


def _from_environment() -> str | None:
    named = os.environ.get(_ADDRESS)
    other = os.environ.get("RAY_ADDRESS", "")
    return named or (other if other.startswith(("http://", "https://")) else None)


def _checked(address: str) -> str:
    address = address.rstrip("/")
    if "://" not in address:
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise UserError(f"{address} is no address of a job server: write http://HOST:8265, the dashboard's address.")
    return address


def _ask_version(address: str, token: Token | None) -> str:
    """The cluster's version of Ray; Ray's own client says neither which port nor what to do."""
    try:
        answer = requests.get(
            f"{address}/api/version",
            headers=token.headers if token else {},
            timeout=TIMEOUT_SECONDS,
            allow_redirects=False,  # the token is meant for this address
        )
    except requests.exceptions.SSLError as error:
        raise UserError(f"{address} does not speak TLS as asked: {error}") from None
    except requests.Timeout:
        raise UserError(f"{address} does not answer within {TIMEOUT_SECONDS} s: is that the dashboard?") from None
    except requests.ConnectionError as error:
        if "NameResolution" in str(error):
            raise UserError(f"{address}: there is no host {urlsplit(address).hostname}.") from None
        raise UserError(
            f"nothing listens at {address}: is the cluster up, and its dashboard forwarded to here "
            "(`ray dashboard cluster.yaml`, or `kubectl port-forward`)?"
        ) from None
    if answer.status_code == 401:
        raise UserError(f"{address} asks for a token, and RAY_AUTH_MODE=disabled sends none: set RAY_AUTH_MODE=token.")
    if answer.status_code == 403:
        place = f" from {token.place}" if token else ""
        raise UserError(f"{address} refuses the token{place}: it is not the one that the cluster was started with.")
    try:
        return str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{address} answers (status {answer.status_code}), but is no Ray job server: give the dashboard's address, "
            "which has port 8265 unless the cluster says otherwise."
        ) from None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


@contextlib.contextmanager
def _alone(address: str) -> Iterator[None]:
    """Inside, Ray's client takes this address: it would prefer what the environment names."""
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before
