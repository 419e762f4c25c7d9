"""Runs as an MLflow server has them: found by id or name, listed, and their newest pictures fetched."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from raymuse.config.errors import UserError
from raymuse.tracking.client import client_of

ID_LETTERS = 6  # of a run's id are enough where only one begins so
SHOWN = 8  # candidates, where a name means several runs
PAGE = 1000  # experiments and runs that are looked through
_PICTURE = re.compile(r"images/(?P<key>.+)\+step\+(?P<step>-?\d+)\+timestamp\+(?P<time>\d+)\+[^+/]*\.png")


@dataclass(frozen=True)
class Seen:
    """One run.

    Attributes:
        began: milliseconds since 1970; `ended` is None while it runs.
        data: what it read and wrote: (context, name, digest).
    """

    id: str
    name: str
    experiment: str
    status: str
    began: int
    ended: int | None
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    data: tuple[tuple[str, str, str], ...] = ()

    @property
    def stage(self) -> str:
        return self.tags.get("raymuse.stage", "")

    @property
    def started(self) -> str:
        """In this machine's time."""
        return datetime.fromtimestamp(self.began / 1000).strftime("%Y-%m-%d %H:%M")

    @property
    def minutes(self) -> float | None:
        return None if self.ended is None else (self.ended - self.began) / 60_000

    def __str__(self) -> str:
        return f"{self.id[:12]} ({self.experiment}/{self.name}, {self.started}, {self.status})"


class Reader:
    """The runs of one server.

    Raises (all methods): UserError, where the server does not answer or refuses.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._client = client_of(self.uri)

    def runs(self, experiment: str | None = None, stage: str | None = None, limit: int = PAGE) -> list[Seen]:
        """The newest runs, newest first.

        Raises:
            UserError: there is no such experiment.
        """
        with _said(self.uri):
            names = self._experiments(experiment)
            condition = f"tags.`raymuse.stage` = '{stage}'" if stage is not None else ""
            order = ["attributes.start_time DESC"]
            found = self._client.search_runs(list(names), condition, max_results=limit, order_by=order)
            return [_seen(run, names[str(run.info.experiment_id)]) for run in found]

    def find(self, word: str) -> Seen:
        """The run of an id, of the first letters of one, of a NAME, or of an EXPERIMENT/NAME.

        Raises:
            UserError: there is none, or there are several.
        """
        found = self._matching(word)
        if not found:
            raise UserError(f"MLflow at {self.uri} has no run {word}: `raymuse runs list` shows those that there are.")
        if len(found) > 1:
            shown = "".join(f"\n  {run}" for run in found[:SHOWN])
            more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise UserError(f"{word} means {len(found)} runs; give the id of one, or EXPERIMENT/NAME:{shown}{more}")
        return found[0]

    def _matching(self, word: str) -> list[Seen]:
        by_id = re.fullmatch(rf"[0-9a-f]{{{ID_LETTERS},32}}", word) is not None
        everything = self.runs()
        if by_id and (found := [run for run in everything if run.id.startswith(word)]):
            return found
        named = [run for run in everything if run.name == word]
        return named or [run for run in everything if f"{run.experiment}/{run.name}" == word]

    def pictures(self, run: Seen, folder: Path) -> dict[str, Path]:
        """The newest picture of every name that a run logged, fetched into a folder."""
        newest: dict[str, tuple[int, int, str]] = {}
        with _said(self.uri):
            for file in self._client.list_artifacts(run.id, "images"):
                if (parsed := _PICTURE.fullmatch(file.path)) is not None:
                    place = (int(parsed["step"]), int(parsed["time"]), file.path)
                    newest[parsed["key"]] = max(place, newest.get(parsed["key"], place))
            folder.mkdir(parents=True, exist_ok=True)
            return {
                key.replace("~", "/"): Path(self._client.download_artifacts(run.id, path, str(folder)))
                for key, (_, _, path) in sorted(newest.items())
            }

    def _experiments(self, name: str | None) -> dict[str, str]:
        """Ids and names."""
        found = {str(one.experiment_id): one.name for one in self._client.search_experiments(max_results=PAGE)}
        if name is None:
            return found
        if name not in found.values():
            there = ", ".join(sorted(found.values()))
            raise UserError(f"MLflow at {self.uri} has no experiment {name}; there are: {there}.")
        return {key: one for key, one in found.items() if one == name}


@contextmanager
def _said(uri: str) -> Iterator[None]:
    """Inside, what MLflow and the network raise becomes a sentence."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(
            f"MLflow at {uri} does not answer as it should: {what}. See `raymuse doctor --mlflow {uri}`."
        ) from error


def _seen(run: Any, experiment: str) -> Seen:
    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    data = []
    for one in inputs:
        context = next((tag.value for tag in one.tags if tag.key == "mlflow.data.context"), "")
        data.append((context, one.dataset.name, one.dataset.digest))
    return Seen(
        id=run.info.run_id,
        name=run.info.run_name,
        experiment=experiment,
        status=run.info.status,
        began=run.info.start_time,
        ended=run.info.end_time,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        data=tuple(sorted(data)),
    )
