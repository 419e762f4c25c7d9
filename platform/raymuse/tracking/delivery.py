"""One spooled record to one MLflow call, such that sending a record again changes nothing."""

import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from raymuse.tracking.client import client_of
from raymuse.tracking.registry import ADDRESS_TAG, mlmodel
from raymuse.tracking.spool import Identity, Record, Segment

KEY_TAG = "raymuse.key"
NOTE = "mlflow.note.content"
LATEST = "latest"  # the folder of the newest pictures, under names that stay
RECORD_TAG = "raymuse.record"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # what MLflow lists the experiment as
BATCH = 100  # params or tags a call: MLflow's limit
METRICS = 1000  # metrics a call: MLflow's limit
THUMBNAIL = 256  # pixels, as MLflow's own log_image makes them
UPLOAD_BYTES = 500 << 20
SMALL_BYTES = 1 << 20
DESCRIPTION_LENGTH = 4500  # MLflow's column holds 5000; a picture's address is added
REFUSALS = (401, 403, 404)
PASSING = (408, 425, 429)


class RefusedError(Exception):
    """The server is there and will not have this run: not allowed, or not found."""


class MissingError(RefusedError):
    """The server is there and has no such run: it was deleted, or never was."""


class UnacceptableError(Exception):
    """The server finds fault with this very record; sending it again would not help."""


class UnreadyError(Exception):
    """The run, or its parent, has still to be created by the process that opened it."""


class AwayError(Exception):
    """Nothing to blame on the record: try again later."""


class Delivery:
    """What a sender needs of MLflow. They raise one of the four above, and nothing else."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client: Any = None

    @property
    def client(self) -> Any:
        """Made late. It tries nothing again: the sender does, and must notice in time that a server is back."""
        if self._client is None:
            self._client = client_of(self.uri)
        return self._client

    def open(self, segment: Segment) -> None:
        """Makes sure that the run exists and that the segment knows its id."""
        identity = segment.identity
        if identity.run_id is not None and not identity.resumes:
            return
        try:
            segment.identify(**self._open(identity))
        except Exception as error:
            raise _judge(error, refusals=(*REFUSALS, 400)) from error

    def send(self, segment: Segment, records: list[Record]) -> dict[str, str]:
        """Sends records of one kind; returns answers by the records' `id`."""
        try:
            if records[0]["do"] == "metrics":
                self._metrics(segment, records)
                return {}
            kind = getattr(self, f"_{records[0]['do']}", None)
            if kind is None:
                raise UnacceptableError(f"no such kind of record: {records[0]['do']}")
            answer = kind(segment, records[0])
            return {records[0]["id"]: answer} if answer is not None else {}
        except Exception as error:
            raise _judge(error, refusals=REFUSALS) from error

    def _open(self, identity: Identity) -> dict[str, Any]:
        run = self._find(identity)
        if run is None:
            run = self._create(identity)
        elif run.info.lifecycle_stage != "active":
            raise MissingError(f"run {identity.run_id} was deleted; restore it in MLflow's pages")
        elif identity.resumes:
            self.client.update_run(run.info.run_id, status="RUNNING")
        return {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "resumes": False}

    def _find(self, identity: Identity) -> Any:
        """The run of that id, or the one made under this key: by another process, or by us before we were killed."""
        if identity.run_id is not None:
            return self.client.get_run(identity.run_id)
        experiment = self._experiment(identity.experiment)
        found = self.client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{identity.key}'", max_results=1)
        return found[0] if found else None

    def _create(self, identity: Identity) -> Any:
        if not identity.opens:
            raise UnreadyError(f"run {identity.name} was not created yet by the process that opened it")
        tags = identity.tags | {KEY_TAG: identity.key}
        if identity.parent is not None:
            parent = self._find(identity.parent)
            if parent is None:
                raise UnreadyError(f"the parent {identity.parent.name} of run {identity.name} was not created yet")
            tags["mlflow.parentRunId"] = parent.info.run_id
        experiment = self._experiment(identity.experiment)
        return self.client.create_run(experiment, start_time=identity.born, tags=tags, run_name=identity.name)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(MlflowException):  # another process may just have made it
                return str(self.client.create_experiment(name, tags=KIND))
            found = self.client.get_experiment_by_name(name)
        if found is None:
            raise AwayError(f"experiment {name} could not be created")
        if found.lifecycle_stage != "active":
            raise RefusedError(f"experiment {name} was deleted; restore it in MLflow's pages, or choose another name")
        return str(found.experiment_id)

    def _metrics(self, segment: Segment, records: list[Record]) -> None:
        """With the time of logging: MLflow keeps equal (name, step, time, value) once."""
        from mlflow.entities import Metric

        rows = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            for name, value in record["values"].items()
        ]
        for start in range(0, len(rows), METRICS):
            self.client.log_batch(segment.identity.run_id, metrics=rows[start : start + METRICS], synchronous=True)

    def _params(self, segment: Segment, record: Record) -> None:
        """MLflow takes a parameter once; what a resumed run says differently goes to a tag `changed.<name>`."""
        from mlflow.entities import Param

        before = self.client.get_run(segment.identity.run_id).data.params
        fresh = [Param(name, value) for name, value in record["values"].items() if name not in before]
        changed = {name: value for name, value in record["values"].items() if before.get(name, value) != value}
        for start in range(0, len(fresh), BATCH):
            self.client.log_batch(segment.identity.run_id, params=fresh[start : start + BATCH], synchronous=True)
        if changed:
            self._tags(segment, {"values": {f"changed.{name}"[:250]: value for name, value in changed.items()}})

    def _tags(self, segment: Segment, record: Record) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(name, value) for name, value in record["values"].items()]
        for start in range(0, len(rows), BATCH):
            self.client.log_batch(segment.identity.run_id, tags=rows[start : start + BATCH], synchronous=True)

    def _file(self, segment: Segment, record: Record) -> None:
        path = segment.folder / record["copy"]
        if not path.exists():
            raise UnacceptableError(f"{path} is gone")
        if path.is_dir():
            folder = "/".join(part for part in (record["folder"], path.name) if part)
            self.client.log_artifacts(segment.identity.run_id, str(path), folder)
        else:
            self.client.log_artifact(segment.identity.run_id, str(path), record["folder"] or None)

    def _note(self, segment: Segment, record: Record) -> None:
        """The description, and below it the newest pictures that are there by now; `_picture` adds others."""
        run_id = str(segment.identity.run_id)
        there = [Path(file.path).stem for file in self.client.list_artifacts(run_id, LATEST)]
        text = "".join([self._named(segment.identity, record["text"]), *(_shown(run_id, name) for name in there)])
        self._tags(segment, {"values": {NOTE: text}})

    def _parents(self, segment: Segment, record: Record) -> None:
        self._tags(
            segment, {"values": {name: self._named(segment.identity, run) for name, run in record["values"].items()}}
        )

    def _named(self, identity: Identity, text: str) -> str:
        """A text with the ids of runs in place of the names that they had while the server was away."""
        for key in set(re.findall(r"pending-[\w-]+", text)):
            experiments = [self._experiment(identity.experiment)]
            experiments += [str(one.experiment_id) for one in self.client.search_experiments(max_results=100)]
            found = self.client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
            text = text.replace(key, found[0].info.run_id) if found else text
        return text

    def _picture(self, segment: Segment, record: Record) -> None:
        """The full picture, the thumbnail beside it, and the tag that makes MLflow's pages show both over the steps.

        And once more under a name that stays, which the description shows.
        """
        from PIL import Image

        path = segment.folder / record["copy"]
        self._file(segment, record | {"folder": "images"})
        with Image.open(path) as picture, tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / f"{path.stem}+compressed.webp"
            scale = THUMBNAIL / max(picture.size)
            picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))).save(small)
            self.client.log_artifact(segment.identity.run_id, str(small), "images")
            newest = Path(folder) / f"{path.name.partition('+step+')[0]}.png"
            shutil.copyfile(path, newest)
            self.client.log_artifact(segment.identity.run_id, str(newest), LATEST)
        self._tags(segment, {"values": {"mlflow.loggedImages": "True"}})
        note = self.client.get_run(segment.identity.run_id).data.tags.get(NOTE)
        shown = _shown(str(segment.identity.run_id), newest.stem)
        if note is not None and shown not in note:
            self._tags(segment, {"values": {NOTE: note + shown}})

    def _table(self, segment: Segment, record: Record) -> None:
        self._file(segment, record)
        run = self.client.get_run(segment.identity.run_id)
        tables = json.loads(run.data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": record["path"], "type": "table"}
        if entry not in tables:
            self._tags(segment, {"values": {"mlflow.loggedArtifacts": json.dumps([*tables, entry])}})

    def _dataset(self, segment: Segment, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": record["source"]})
        kind = record["source"].split("://")[0] if "://" in record["source"] else "local"
        profile = None if record.get("rows") is None else json.dumps({"num_rows": record["rows"]})
        dataset = Dataset(record["name"], record["digest"], kind, source, profile=profile)
        context = [InputTag("mlflow.data.context", record["context"])]
        self.client.log_inputs(segment.identity.run_id, [DatasetInput(dataset, context)])

    def _finish(self, segment: Segment, record: Record) -> None:
        self.client.set_terminated(segment.identity.run_id, record["status"], record["time"])

    def _register(self, segment: Segment, record: Record) -> str:
        """A model version that points at the folder; its number."""
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it exists: the usual case
            self.client.create_registered_model(record["model"])
        versions = self.client.search_model_versions(f"name = '{record['model']}'")
        known = [version.version for version in versions if version.tags.get(RECORD_TAG) == record["id"]]
        number = str(known[0]) if known else self._create_version(segment, record)
        if record["alias"] is not None:
            self.client.set_registered_model_alias(record["model"], record["alias"], number)
        return number

    def _create_version(self, segment: Segment, record: Record) -> str:
        run_id = segment.identity.run_id
        description = record["description"][:DESCRIPTION_LENGTH]
        if "copy" in record:
            self._file(segment, record | {"folder": f"model/{record['id'][:8]}-card"})
            path = f"model%2F{record['id'][:8]}-card%2F{Path(record['copy']).name}"
            description += f"\n\n![samples](/get-artifact?path={path}&run_uuid={run_id})"
        made_by = {name: self._named(segment.identity, made) for name, made in record.get("parents", {}).items()}
        version = self.client.create_model_version(
            record["model"],
            self._upload(run_id, record),
            run_id=run_id,
            tags={RECORD_TAG: record["id"], ADDRESS_TAG: record["source"], **made_by},
            description=self._named(segment.identity, description.strip()),
            await_creation_for=0,  # it is there at once
        )
        return str(version.version)

    def _upload(self, run_id: str | None, record: Record) -> str:
        """What the registry may name as the source: an object store's address, or files of this very run."""
        if "://" in record["source"]:
            return str(record["source"])
        folder = Path(record["source"])
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if not files:
            raise UnacceptableError(f"there is no model in {folder}")
        place = f"model/{record['id'][:8]}"
        whole = sum(path.stat().st_size for path in files) <= UPLOAD_BYTES
        for path in files:
            if whole or path.stat().st_size <= SMALL_BYTES:  # of a large model, the configs and the card
                inner = path.relative_to(folder).parent.as_posix()
                self.client.log_artifact(run_id, str(path), f"{place}/{inner}".removesuffix("/."))
        if whole:
            self.client.log_text(run_id, mlmodel(str(run_id), place), f"{place}/MLmodel")
        return f"{self.client.get_run(run_id).info.artifact_uri}/{place}"  # of `runs:/` the pages show no schema


def _shown(run_id: str, name: str) -> str:
    """Markdown of a run's newest picture of a name."""
    return f"\n\n![{name}](/get-artifact?path={quote(f'{LATEST}/{name}.png', safe='')}&run_uuid={run_id})"


def _judge(error: Exception, refusals: tuple[int, ...]) -> Exception:
    """Which of our four an error is."""
    if isinstance(error, RefusedError | UnacceptableError | UnreadyError | AwayError):
        return error
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    status = None
    if isinstance(error, RequestException):
        status = getattr(error.response, "status_code", None)
    elif isinstance(error, MlflowException):
        status = error.get_http_status_code()
    else:
        return UnacceptableError(
            f"{type(error).__name__}: {error}"
        )  # a file that is gone, a fault of ours: again would not help
    if status in refusals:
        return RefusedError(str(error)) if status in (401, 403) else MissingError(str(error))
    if status is not None and 400 <= status < 500 and status not in PASSING:
        return UnacceptableError(str(error))
    return AwayError(str(error))
