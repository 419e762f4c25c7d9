"""What the MLflow run of every stage says, around the stage's work: what went in, what came out, what it descends from.

The stage itself logs what only it knows: curves, counts as they grow, pictures. The rest is the same for all of them:

before   config, code and versions, inputs with their fingerprints, and the runs that made them
during   how busy the machine is
after    the output's address, counts and rejects; hours and cost; a description in Markdown
"""

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from raymuse.config.base import Config, StageConfig, is_address
from raymuse.config.describe import describe
from raymuse.config.errors import TooManyRejects, UserError
from raymuse.config.load import command
from raymuse.config.recipe import stage_of
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import PartRecord, read_records
from raymuse.storage.places import find_place
from raymuse.tracking.machine import monitored
from raymuse.tracking.provenance import code_tags, installed
from raymuse.tracking.run import Run, link_to, open_again, open_run

MADE_BY = "_manifest/run.json"
CONFIG, SUCCESS, SHEET = "_manifest/config.json", "_SUCCESS", "contact_sheet.png"
CONTEXTS = {"generate": "prompts", "data": "source", "pretokenize": "source"}  # else "training"
CONTEXTS |= dict.fromkeys(("score", "sweep", "compare"), "eval")
DATA = ("source", "input", "prompts", "images", "truth", "reference")  # keys that name data; the others name models
NESTED = ("stream", "evaluation", "a", "b")  # sections with addresses of their own: of trainings, and of comparisons
MADE_HERE = ("shapes", "emoji")  # sources of the data stage that are no addresses
HASHED_BYTES = 256 << 20  # a single file is known by its content up to here, by name and size beyond
REJECTS_SHOWN = 200
REPORT_LENGTH = 5000  # of the 8000 characters that MLflow takes of a description
UNREADABLE = (OSError, ValueError, KeyError, TypeError, UserError)


@dataclass(frozen=True)
class Made:
    """Which run made a folder; kept in it, so that whoever reads the folder can say what it descends from.

    Attributes:
        run: `Run.id`.
        server: of MLflow.
        spent: hours, and what else the work took, over all attempts.
    """

    run: str
    server: str
    stage: str
    attempts: int = 1
    spent: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def read(address: str) -> "Made | None":
        """Of a folder, or of the one that it lies in; None where no tracked stage made it, or nobody can say."""
        with contextlib.suppress(*UNREADABLE):
            if (home := _home(address)) is not None and home.exists(MADE_BY):
                return Made(**json.loads(home.read(MADE_BY)))
        return None


@dataclass(frozen=True)
class Input:
    """One of the things that a stage reads.

    Attributes:
        role: the config's key.
        digest: fingerprint of data; "" for models, whose sums the stage itself logs, and where it cannot be read.
        rows: of data that a stage of ours made.
    """

    role: str
    address: str
    digest: str
    rows: int | None
    made: Made | None


@dataclass
class Attempt:
    """One attempt at a stage's work, and what it and those before it took (`hours`, `cpu_hours`, `dollars`, ...)."""

    number: int = 1
    spent: dict[str, float] = field(default_factory=dict)

    def spend(self, values: Mapping[str, float]) -> None:
        """Add what this one took."""
        for name, value in values.items():
            self.spent[name] = self.spent.get(name, 0.0) + value


def run_of(
    config: StageConfig, uri: str | None, experiment: str, name: str | None = None, parent: Run | None = None
) -> Run:
    """The run of a stage's work: that which its output was begun in, where this server has it; else a new one.

    Args:
        uri: of the MLflow server; None: nothing is tracked.
        name: of a new run; None: the stage's.
        parent: the run that a new one is part of.
    """
    stage = stage_of(type(config))
    earlier = Made.read(config.output) if uri is not None else None
    if uri is not None and earlier is not None and (earlier.server, earlier.stage) == (uri.rstrip("/"), stage):
        return open_again(uri, experiment, name or stage, earlier.run)
    return open_run(uri, experiment, name or stage, parent=parent)


@contextlib.contextmanager
def recorded(config: StageConfig, run: Run) -> Iterator[Attempt]:
    """Inside, a stage's work is done; its run says of it what all stages have to say. Nothing raised here ends it."""
    if run.id is None:
        yield Attempt()
        return
    earlier = Made.read(config.output)
    mine = earlier is not None and earlier.run == run.id
    attempt = Attempt(earlier.attempts + 1, dict(earlier.spent)) if mine and earlier is not None else Attempt()
    before = _exists(config.output, SUCCESS)
    inputs = inputs_of(config)
    _open(config, run, inputs)
    began, outcome = time.monotonic(), "failed"
    try:
        with monitored(run, since=3600 * attempt.spent.get("hours", 0.0)):
            yield attempt
        outcome = "finished"
    except TooManyRejects as error:
        outcome = f"finished, but: {error}"
        raise
    except (KeyboardInterrupt, SystemExit):
        outcome = "stopped; the same command goes on"
        raise
    except Exception as error:
        outcome = f"failed: {_sentence(error)}"
        raise
    finally:
        attempt.spend({"hours": (time.monotonic() - began) / 3600})
        _close(config, run, inputs, attempt, outcome, is_maker=not before)


def inputs_of(config: StageConfig) -> list[Input]:
    """What a config's addresses name, with fingerprints of data."""
    named = _addresses(config)
    for section in NESTED:
        if isinstance(nested := getattr(config, section, None), Config):
            named |= {f"{section}.{name}": several for name, several in _addresses(nested).items()}
    if "stream.input" in named:
        named.pop("input")  # pictures are read in place of token shards, also where those are named
    found = []
    for name, several in named.items():
        for number, address in enumerate(several):
            role = name if len(several) == 1 else f"{name}.{number}"
            found.append(_input(role, name.rpartition(".")[2] in DATA, address))
    return found


def _addresses(config: Config) -> dict[str, list[str]]:
    """A config's own addresses, by their keys."""
    named: dict[str, list[str]] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if name == "output" or isinstance(value, Config) or not (is_address(info) or name == "source"):
            continue
        named[name] = [value] if isinstance(value, str) else list(value or ())
    return named


def _input(role: str, is_data: bool, address: str) -> Input:
    digest, rows = "", None
    if is_data and address not in MADE_HERE:
        with contextlib.suppress(*UNREADABLE):  # the stage says what is wrong with it
            digest, rows = fingerprint(address)
    return Input(role, address, digest, rows, None if address in MADE_HERE else Made.read(address))


def fingerprint(address: str) -> tuple[str, int | None]:
    """What tells data from other data (hex), and its rows where a manifest counts them.

    Of a folder that a stage wrote, or a part of one: by its files' sums. Of a file: by its content. Of all else: by the
    names of its files and, on a disk, their sizes.

    Raises:
        UserError: there is nothing.
    """
    home = _home(address)
    if home is not None:
        inside = address.rstrip("/").removeprefix(home.address.rstrip("/")).strip("/")
        parts = [part for part in read_records(home).values() if _lies_in(part, inside)]
        sums = [file.sha256 for part in parts for file in part.files]
        if parts:
            return _digest(sums), sum(part.rows for part in parts)
    if address.startswith("hf://datasets/"):
        return _digest([address]), None
    place = find_place(address)
    files = [Path(place.within(name)) for name in place.files]
    if place.kind == "file" and files[0].is_file() and files[0].stat().st_size <= HASHED_BYTES:
        return hashlib.sha256(files[0].read_bytes()).hexdigest(), None
    sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
    return _digest([f"{name} {size}" for name, size in zip(place.files, sizes, strict=True)]), None


def _lies_in(part: PartRecord, inside: str) -> bool:
    return not inside or any(file.name == inside or file.name.startswith(f"{inside}/") for file in part.files)


def _home(address: str) -> Folder | None:
    """The folder of ours that an address is, or lies in: a training's `model`, a data set's `train`."""
    for folder in (address, address.rstrip("/").rpartition("/")[0]):
        if folder and not folder.startswith("hf://") and Folder(folder).exists(CONFIG):
            return Folder(folder)
    return None


def _exists(address: str, name: str) -> bool:
    with contextlib.suppress(*UNREADABLE):
        return Folder(address).exists(name)
    return False


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- before


def _open(config: StageConfig, run: Run, inputs: list[Input]) -> None:
    stage = stage_of(type(config))
    run.params(config.model_dump(mode="json"))
    run.tags({"raymuse.stage": stage, "raymuse.output": config.output, **code_tags(command(stage))})
    run.text(describe(config), "config.yaml")
    run.text("".join(f"{name}=={version}\n" for name, version in installed().items()), "versions.txt")
    for one in inputs:
        if one.digest:
            context = "eval" if one.role.startswith("evaluation.") else CONTEXTS.get(stage, "training")
            run.dataset(_title(one.address), one.digest, one.address, context, one.rows)
    run.parents({one.role: one.made.run for one in inputs if one.made is not None})
    run.note(_note(config, inputs, "running", []))


def _title(address: str) -> str:
    """The last two names of an address: `demo/tokens`."""
    return "/".join(address.rstrip("/").rsplit("/", 2)[-2:])


# --- after


def _close(
    config: StageConfig, run: Run, inputs: list[Input], attempt: Attempt, outcome: str, *, is_maker: bool
) -> None:
    run.metrics({f"cost_{name}": value for name, value in attempt.spent.items()}, attempt.number)
    lines = [f"- {name.replace('_', ' ')}: {value:.3g}" for name, value in attempt.spent.items()]
    try:
        folder = Folder(config.output)
        lines = [
            "- came out: " + ", ".join(_outcome(folder) or ["nothing"]),
            *lines,
            *_report(folder, stage_of(type(config))),
        ]
        if folder.exists(SUCCESS) and read_records(folder):
            digest, rows = fingerprint(config.output)
            run.dataset(_title(config.output), digest, config.output, "output", rows)
        for one in inputs:
            if one.role == "images" and _exists(one.address, SHEET):
                with Image.open(io.BytesIO(Folder(one.address).read(SHEET))) as sheet:
                    run.picture("contact_sheet", sheet, 0)
        if rejects := _rejects(folder):
            run.table(rejects, "rejects.json")
        if is_maker and run.identity is not None and run.id is not None and folder.exists(CONFIG):
            made = Made(run.id, run.identity.uri, stage_of(type(config)), attempt.number, attempt.spent)
            folder.write(MADE_BY, json.dumps(asdict(made), indent=1).encode())
    except UNREADABLE as error:  # of a disk that is full or away: the work's own error is what counts
        lines.append(f"- its folder: {_sentence(error)}")
    run.tags({"raymuse.outcome": outcome})
    run.note(_note(config, inputs, outcome, lines))


def _outcome(folder: Folder) -> list[str]:
    """What the closing totals of a finished folder say in numbers, or how far it is; and a training's checkpoint."""
    if folder.exists(SUCCESS):
        said = dict(json.loads(folder.read(SUCCESS)))
        numbers = {**said, **said.get("counts", {})}
    else:
        parts = read_records(folder).values() if folder.exists(CONFIG) else []
        rows, rejects = (sum(getattr(part, name) for part in parts) for name in ("rows", "rejects"))
        numbers = {"parts so far": len(parts), "rows so far": rows, "rejects so far": rejects}
    plain = {name: value for name, value in numbers.items() if isinstance(value, int | float) and value}
    checkpoints = [name for name in folder.names() if name.startswith("step-")]
    model = [f"`{numbers['model']}`"] if isinstance(numbers.get("model"), str) else []
    return [*model, *(f"{name} {_figure(value)}" for name, value in plain.items()), *checkpoints[-1:]]


def _report(folder: Folder, stage: str) -> list[str]:
    """What a finished stage has written for people to read, if it has: as much as MLflow takes of a description."""
    name = f"{stage}.md"
    if not folder.exists(SUCCESS) or not folder.exists(name):
        return []
    text = folder.read(name).decode()
    if len(text) <= REPORT_LENGTH:
        return ["", text]
    return ["", text[:REPORT_LENGTH].rpartition("\n")[0], "", f"The rest is in `{name}`."]


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"


def _rejects(folder: Folder) -> list[dict[str, Any]]:
    """The first refused inputs, with reasons."""
    rows: list[dict[str, Any]] = []
    for name in folder.names("rejects") if folder.exists("rejects") else []:
        rows += pq.read_table(io.BytesIO(folder.read(f"rejects/{name}"))).slice(0, REJECTS_SHOWN).to_pylist()
        if len(rows) >= REJECTS_SHOWN:
            break
    return rows[:REJECTS_SHOWN]


def _note(config: StageConfig, inputs: list[Input], outcome: str, lines: list[str]) -> str:
    """The description of a stage's run."""
    text = [f"**{stage_of(type(config))}** to `{config.output}`: {outcome}", ""]
    for one in inputs:
        made = f", made by {link_to(one.made.run, one.made.stage)}" if one.made is not None else ""
        digest = f" ({one.digest[:12]})" if one.digest else ""
        text.append(f"- {one.role}: `{one.address}`{digest}{made}")
    return "\n".join([*text, *lines])


def _sentence(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:500]
