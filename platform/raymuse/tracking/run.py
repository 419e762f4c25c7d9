"""Logging to an MLflow run: calls that return at once, and a run that a server's outage does not harm."""

import json
import os
import posixpath
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raymuse.config.errors import TooManyRejects, UserError
from raymuse.tracking.sender import MISSING, Sender, sender
from raymuse.tracking.spool import Identity, Record

if TYPE_CHECKING:
    from PIL.Image import Image

Status = Literal["FINISHED", "FAILED", "KILLED"]

NAME_LENGTH = 250  # MLflow's limits
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
DIGEST_LENGTH = 36
PENDING = "pending-"
TRAINING = "workflowType=machine_learning"  # pages with runs and models; MLflow starts with traces of agents
FROM = "raymuse.from."  # tags of a run and of a model's version: by which run an input was made

Listener = Callable[[Mapping[str, float], int], None]
_LISTENERS: list[Listener] = []


@dataclass(frozen=True)
class Run:
    """The address of a run, made by `open_run`: picklable, so that a driver opens it and any process logs to it.

    Every method but `flush` and `finish` only adds to the spool of this process and returns. A process that logged to a
    run calls `flush` before it ends (a Ray worker is ended without warning).

    Attributes:
        identity: which run; `None` when tracking is off, and then every method does nothing.
        spool: the folder for what was not sent yet.
    """

    identity: Identity | None
    spool: Path

    @staticmethod
    def off() -> "Run":
        """A run that swallows everything: tracking is off."""
        return Run(None, Path())

    @property
    def id(self) -> str | None:
        """MLflow's run id; until the server has given one, a name that `open_run(resume=...)` takes as well."""
        if self.identity is None:
            return None
        return self._known().run_id or self.identity.key

    @property
    def link(self) -> str | None:
        """The run's page, or `None` while the server has not created the run."""
        if self.identity is None:
            return None
        known = self._known()
        if known.run_id is None:
            return None
        return f"{known.uri}/#/experiments/{known.experiment_id}/runs/{known.run_id}?{TRAINING}"

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs parameters; nested mappings become dotted names. One that a resumed run changes goes to a tag."""
        flat = {clean(name): _text(value)[:PARAM_LENGTH] for name, value in _flatten(values).items()}
        self._log({"do": "params", "values": flat})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers (anything that `float` takes) at a step."""
        rows = {clean(name): float(value) for name, value in values.items()}
        for listener in _LISTENERS:
            listener(rows, int(step))
        self._log({"do": "metrics", "values": rows, "step": int(step), "time": _now()})

    def begin(self, step: int) -> None:
        """Says to who listens, with no values, after which step the work goes on; the run itself is told nothing."""
        for listener in _LISTENERS:
            listener({}, int(step))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags; a later value replaces an earlier one."""
        self._log({"do": "tags", "values": {clean(name): _text(value)[:TAG_LENGTH] for name, value in values.items()}})

    def note(self, markdown: str) -> None:
        """Sets the description at the head of the run's page; the run's newest pictures are shown below it.

        Ids of runs, also those that `Run.id` gives while the server is away, may be linked to: see `link_to`.
        """
        self._log({"do": "note", "text": markdown})

    def parents(self, runs: Mapping[str, str]) -> None:
        """Notes by which runs the inputs were made: a tag `raymuse.from.NAME` each, with what was their `Run.id`."""
        self._log({"do": "parents", "values": {clean(f"{FROM}{name}"): run for name, run in runs.items()}})

    def picture(self, name: str, picture: "Image | Path | str", step: int) -> None:
        """Logs a picture at a step; MLflow's pages show those of one name as a row over the steps.

        The newest of a name also stands in the run's description, and as the artifact `latest/NAME.png`.
        """
        key = re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII).replace("/", "~")
        file = f"{key}+step+{int(step)}+timestamp+{_now()}+{uuid.uuid4()}.png"  # named now: sent twice, it is one file
        self._log({"do": "picture"}, file, lambda place: _save_png(picture, place))

    def file(self, path: Path | str, folder: str = "") -> None:
        """Uploads a copy of a file or folder, taken now, under its own name in the run's artifact folder `folder`."""
        source = Path(path).resolve()
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        self._log({"do": "file", "folder": folder.strip("/")}, source.name, lambda place: copy(source, place))

    def text(self, text: str, path: str) -> None:
        """Uploads a text as the artifact `path`."""
        folder, name = posixpath.split(path.strip("/"))
        self._log({"do": "file", "folder": folder}, name, lambda place: place.write_text(text))

    def table(self, rows: Sequence[Mapping[str, Any]], path: str) -> None:
        """Uploads rows as the artifact `path` (ending in .json), in the form that MLflow's pages show as a table."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        body = {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
        folder, name = posixpath.split(path.strip("/"))
        record = {"do": "table", "folder": folder, "path": path.strip("/")}
        self._log(record, name, lambda place: place.write_text(json.dumps(body, default=str)))

    def dataset(self, name: str, digest: str, source: str, context: str, rows: int | None = None) -> None:
        """Notes an input: its name, fingerprint (cut to 36 characters), address, and what for ("training", "eval")."""
        record = {"do": "dataset", "name": name, "digest": digest[:DIGEST_LENGTH], "source": str(source)}
        self._log(record | {"context": context, "rows": rows})

    def flush(self, timeout: float = 30.0) -> bool:
        """Waits until everything has arrived, also what dead processes left of this run; `False` if it did not."""
        return self.identity is None or self._sender().flush(self.identity.key, timeout)

    def finish(self, status: Status = "FINISHED", timeout: float = 30.0) -> bool:
        """Sets the final status and flushes. What did not arrive stays in the spool, for the next process to send."""
        if self.identity is None:
            return True
        self._log({"do": "finish", "status": status, "time": _now()})
        arrived = self.flush(timeout)
        self._sender().close(self.identity.key)
        return arrived

    def _known(self) -> Identity:
        assert self.identity is not None
        return self._sender().known(self.identity)

    def _sender(self) -> Sender:
        assert self.identity is not None
        return sender(self.spool, self.identity.uri)

    def _log(self, record: Record, name: str = "", write: Callable[[Path], object] | None = None) -> None:
        if self.identity is not None:
            self._sender().append(self.identity, record, name, write)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, numbers that this process logs to a run, also to one that is off, go to `listener(values, step)` too."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


@contextmanager
def finishing(run: Run) -> Iterator[None]:
    """Close a run with the status that the work inside ends with."""
    status: Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except TooManyRejects:
        status = "FINISHED"
        raise
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        run.finish(status)


def open_run(
    uri: str | None,
    experiment: str,
    name: str,
    *,
    parent: Run | None = None,
    resume: str | None = None,
    tags: Mapping[str, Any] | None = None,
    spool: Path | None = None,
    patience: float = 15.0,
) -> Run:
    """Opens a run, new or resumed; a server that is away delays nothing: the run is then created when it is back.

    Args:
        uri: the tracking server; `None` turns tracking off.
        parent: the run that this one is part of.
        resume: `Run.id` of a run to go on with.
        spool: where to keep what was not sent yet; by default one folder for all runs of this user on this machine. It
            belongs on a disk that outlives the process.
        patience: seconds to wait for the run to be created; a server that is known to be away is not waited for.

    Raises:
        UserError: there is no such run to resume, or the spool cannot be written.
    """
    if uri is None:
        return Run.off()
    spool = (default_spool() if spool is None else spool).expanduser().resolve()
    identity = _identify(uri, experiment, name, parent, resume, tags or {})
    try:
        mail = sender(spool, identity.uri)
        mail.segment(identity)
    except OSError as error:
        raise UserError(f"Cannot keep unsent records in {spool}: {error}. Give tracking another folder") from error
    trouble = mail.settle(identity.key, patience)
    if trouble == MISSING and resume is not None:
        mail.discard(identity.key)
        raise UserError(f"There is no run {resume} to resume at {uri}; leave it out to begin a new run")
    return Run(replace(mail.known(identity), opens=False, resumes=False), spool)


def open_again(uri: str, experiment: str, name: str, earlier: str) -> Run:
    """The run that an earlier attempt at the same work logged to; a new one where somebody has deleted that."""
    try:
        return open_run(uri, experiment, name, resume=earlier)
    except UserError as error:
        print(f"warning: {error}: begun", file=sys.stderr, flush=True)
        return open_run(uri, experiment, name)


def register(
    run: Run,
    name: str,
    source: Path | str,
    description: str = "",
    *,
    alias: str | None = None,
    picture: "Image | Path | str | None" = None,
    parents: Mapping[str, str] | None = None,
    key: str | None = None,
    timeout: float = 60.0,
) -> str | None:
    """Makes a model folder a version of a registered model.

    A local folder of up to 500 MB is uploaded into the run; of a larger one only its small files, and of an object
    store's address nothing: the version's tag `raymuse.address` says where the whole is.

    Args:
        name: of the registered model, which is created when it is new.
        source: the model folder or its address.
        description: Markdown, for the version's page.
        alias: a name such as `champion` that from now on means this version.
        picture: shown below the description.
        parents: by which runs its parts were made, by part: tags of the version, as `Run.parents` sets them of a run.
        key: what tells these weights from others: registered again under the same name, they keep their version.

    Returns:
        The version's number, or `None` when tracking is off or the server away: it is then registered later.
    """
    if alias is not None and (not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"latest|[vV]\d+", alias)):
        raise UserError(f"A model's alias is made of letters, digits, - and _, and is not latest or v1: not {alias!r}")
    if run.identity is None:
        return None
    address = str(source) if "://" in str(source) else str(Path(source).resolve())
    record: Record = {"do": "register", "id": key or uuid.uuid4().hex, "model": re.sub(r"[/:]", "-", name)}
    record |= {"source": address, "description": description, "alias": alias}
    record["parents"] = {f"{FROM}{part}": made for part, made in (parents or {}).items()}
    mail = sender(run.spool, run.identity.uri)
    if picture is None:
        mail.append(run.identity, record)
    else:
        shown = picture
        mail.append(run.identity, record, "samples.png", lambda place: _save_png(shown, place))
    mail.flush(run.identity.key, timeout)
    return mail.results.get(str(record["id"]))


def link_to(run: str, text: str) -> str:
    """Markdown that leads from one page of MLflow to a run's, by its `Run.id`."""
    return f"[{text}](#/runs/{run}?{TRAINING})"


def clean(name: str) -> str:
    """A name that MLflow takes for a metric, parameter or tag: odd characters become `_`, no `..` or `//`."""
    plain = re.sub(r"[^/\w.\- :]", "_", name)
    parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:NAME_LENGTH].rstrip("/") or "_"


def default_spool() -> Path:
    """A folder of this user that outlives reboots, after the XDG convention."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "raymuse" / "tracking"


def _identify(
    uri: str, experiment: str, name: str, parent: Run | None, resume: str | None, tags: Mapping[str, Any]
) -> Identity:
    known = resume is not None and not resume.startswith(PENDING)
    return Identity(
        uri=uri.rstrip("/"),
        experiment=experiment,
        name=name,
        key=resume or PENDING + uuid.uuid4().hex,
        run_id=resume if known else None,
        parent=parent.identity if parent is not None else None,
        tags={clean(tag): _text(value)[:TAG_LENGTH] for tag, value in tags.items()},
        opens=True,
        resumes=resume is not None,
        born=_now(),
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _text(value: Any) -> str:
    """As a person would write it: lists as JSON, everything else as Python prints it."""
    return json.dumps(value, default=str) if isinstance(value, list | tuple | dict) else str(value)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _save_png(picture: "Image | Path | str", place: Path) -> None:
    """Quickly rather than tightly: the caller may be a training loop."""
    from PIL import Image

    if isinstance(picture, Path | str):
        if Path(picture).suffix.lower() == ".png":
            shutil.copyfile(picture, place)
            return
        with Image.open(picture) as opened:
            opened.convert("RGB").save(place, compress_level=1)
    else:
        picture.save(place, compress_level=1)
