"""The whole flow on one machine, stage after stage: what `raymuse demo` runs.

Every stage knows what it has finished, so running the flow again goes on where it stopped.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from raymuse.clusters.local import session
from raymuse.clusters.watching import watching_driver
from raymuse.config.base import StageConfig
from raymuse.config.describe import describe
from raymuse.config.flow import FlowConfig
from raymuse.recording import recorded
from raymuse.scoring.summary import markdown
from raymuse.stages.data import check_source, make_data
from raymuse.stages.export import export
from raymuse.stages.generate import generate
from raymuse.stages.pretokenize import pretokenize
from raymuse.stages.score import read_scores, score
from raymuse.stages.train import train
from raymuse.storage.folder import Folder
from raymuse.tracking.provenance import code_tags
from raymuse.tracking.run import Run, finishing, link_to, open_run, register
from raymuse.tracking.server import Server

STAGES: dict[str, Callable[[Any, Run], str]] = {
    "data": make_data,
    "vqgan": train,
    "clip": train,
    "pretokenize": pretokenize,
    "base": train,
    "superres": train,
    "export": export,
    "generate": generate,
    "score": score,
}
ALIAS = "champion"
NEEDED_BYTES = 2 * 2**30
BUDGETED = ("base", "superres")
BESIDE = 0.5
"""Of the time that stages before the base take: starts and samples of the budgeted trainings, and what follows them."""
LEAST = 0.1  # minutes; the fewest steps take longer


@dataclass
class Record:
    """What the flow remembers between attempts: seconds and MLflow run of every stage, peak memory."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    peak_gib: float = 0.0

    @classmethod
    def load(cls, path: Path) -> "Record":
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def save(self) -> None:
        kept = {"seconds": self.seconds, "runs": self.runs, "peak_gib": self.peak_gib}
        Folder(str(self.path.parent)).write(self.path.name, json.dumps(kept, indent=1).encode())


def demo(config: FlowConfig, json_path: Path | None) -> None:
    """Run every stage that is not finished, and print what came out and where it lies.

    Args:
        config: sections are the stages' own configs; their relative addresses lie in `workdir`.
        json_path: also write the closing table as data.

    Raises:
        UserError: for whatever a stage finds wrong, before that stage writes anything.
    """
    check_source(config.data)
    root = Path(config.workdir).resolve()
    Folder(str(root)).require_free(NEEDED_BYTES)
    Folder(str(root)).create()
    record = Record.load(root / "flow.json")
    with Server.start(root / "mlflow", wait=False) as server, _memory(record), _ray(config):
        server.wait()
        with _tracked(server.uri, config, record) as parent:
            _run_stages(config, root, record, server.uri, parent)
            summary = _summary(config, root, record)
            _publish(config, root, parent, summary, record)
    print(_closing(summary, record), flush=True)
    if json_path is not None:
        Folder(str(json_path.resolve().parent)).write(json_path.name, json.dumps(summary, indent=1).encode())


def _run_stages(config: FlowConfig, root: Path, record: Record, uri: str, parent: Run) -> None:
    for name, stage in STAGES.items():
        section: StageConfig = in_time(config, name, record).within(str(root))
        print(f"[{name}] -> {section.output}", flush=True)
        run = open_run(
            uri, config.name, name, parent=parent, resume=record.runs.get(name), spool=root / "mlflow" / "spool"
        )
        record.runs[name] = run.id or ""
        record.save()  # before the work: what is interrupted goes on in the same run
        began = time.perf_counter()
        try:
            with finishing(run), recorded(section, run) as attempt, watching_driver(section, attempt.spend):
                stage(section, run)
        finally:  # an interrupted stage took its time as well
            if (seconds := time.perf_counter() - began) > 1 or name not in record.seconds:
                record.seconds[name] = record.seconds.get(name, 0.0) + seconds
            record.save()


def in_time(config: FlowConfig, name: str, record: Record) -> StageConfig:
    """The stage's section; a budget of minutes in it is at most what the flow's leave.

    What is left when the stages before have taken their time, and those after are expected to, is shared by the
    trainings in the ratio of their budgets.
    """
    section: StageConfig = getattr(config, name)
    wanted = {stage: one.minutes for stage in BUDGETED if (one := getattr(config, stage).stretch) is not None}
    if config.minutes is None or name not in wanted:
        return section
    order = list(STAGES)
    place = order.index(name)

    def spent(stages: list[str]) -> float:
        return sum(record.seconds.get(stage, 0.0) for stage in stages) / 60

    left = config.minutes - spent(order[:place]) - BESIDE * spent(order[: order.index(BUDGETED[0])])
    to_come = sum(minutes for stage, minutes in wanted.items() if order.index(stage) >= place)
    given = min(wanted[name], max(left * wanted[name] / to_come, LEAST))
    if given < wanted[name]:
        print(f"[{name}] {given:.1f} of its {wanted[name]:g} minutes: the flow has {config.minutes:g}", flush=True)
    budget = getattr(config, name).budget.model_copy(update={"minutes": given})
    return section.model_copy(update={"budget": budget})


@contextlib.contextmanager
def _tracked(uri: str, config: FlowConfig, record: Record) -> Iterator[Run]:
    """The parent run: the same one however often the flow is started again."""
    spool = Path(record.path).parent / "mlflow" / "spool"
    run = open_run(uri, config.name, "flow", resume=record.runs.get("flow"), spool=spool)
    run.params(config.model_dump(mode="json"))
    run.tags({"raymuse.stage": "flow", "raymuse.output": config.workdir, **code_tags("raymuse demo")})
    run.text(describe(config), "config.yaml")
    record.runs["flow"] = run.id or ""
    record.save()
    with finishing(run):
        yield run


def _ray(config: FlowConfig) -> contextlib.AbstractContextManager[object]:
    ray = config.ray
    return session(num_cpus=ray.num_cpus, object_store_gib=ray.object_store_gib, dashboard=ray.dashboard)


@contextlib.contextmanager
def _memory(record: Record, interval: float = 4.0) -> Iterator[None]:
    """Inside, keep the highest sum of the process tree's proportional set sizes (GiB)."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(interval):
            record.peak_gib = max(record.peak_gib, tree_gib(psutil.Process()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def tree_gib(root: psutil.Process) -> float:
    """Proportional set size of a process and all that descend from it, GiB; shared pages count once."""
    total = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**30


def _summary(config: FlowConfig, root: Path, record: Record) -> dict[str, Any]:
    """The closing table as data."""
    scores = read_scores(config.score.within(str(root)).output)
    images = config.generate.within(str(root)).output
    return {
        "name": config.name,
        "minutes": sum(record.seconds.values()) / 60,
        "stage_minutes": {name: seconds / 60 for name, seconds in record.seconds.items()},
        "peak_rss_gib": record.peak_gib,
        "accuracy": scores.get("accuracy", {}),
        "clip_score": scores.get("clip_score", {}),
        "clip_fid": scores.get("clip_fid", {}),
        "render_error": scores.get("render_error", {}),
        "addresses": {
            "contact_sheet": f"{images}/contact_sheet.html",
            "mlflow": f"raymuse ui --workdir {config.workdir}",
            "serve": f"raymuse serve {config.workdir}/{config.export.output}",
        },
    }


def _publish(config: FlowConfig, root: Path, parent: Run, summary: dict[str, Any], record: Record) -> None:
    """Scores to the parent run, and the model to the registry under its alias, once a model."""
    scores = read_scores(config.score.within(str(root)).output)
    numbers = {f"accuracy.{kind}": values["whole"] for kind, values in summary["accuracy"].items()}
    clip = {f"clip_score.{kind}": value for kind, value in summary["clip_score"].items()}
    parent.metrics({**numbers, **clip, "minutes": summary["minutes"], "peak_rss_gib": summary["peak_rss_gib"]}, 0)
    note = f"# {config.name}\n\n{markdown(scores)}"
    parent.note(f"{note}\n{_stages(record)}")
    images = Path(config.generate.within(str(root)).output)
    parent.picture("contact_sheet", images / "contact_sheet.png", 0)
    marker = root / "registered.json"
    model = config.export.within(str(root)).output
    if not marker.exists():
        version = register(
            parent,
            config.export.name,
            model,
            f"{note}\n{_stages(record)}",
            alias=ALIAS,
            picture=images / "contact_sheet.png",
            parents={name: run for name, run in record.runs.items() if name in STAGES and run},
        )
        marker.write_text(json.dumps({"version": version}))


def _stages(record: Record) -> str:
    """A table in Markdown: every stage's run, and its minutes."""
    rows = [
        f"| {link_to(run, name) if run else name} | {record.seconds.get(name, 0.0) / 60:.1f} |"
        for name, run in record.runs.items()
        if name in STAGES
    ]
    return "\n".join(["| stage | minutes |", "|---|---|", *rows, ""])


def _closing(summary: dict[str, Any], record: Record) -> str:
    """The table that a person sees at the end."""
    headlines = _headlines(summary)
    lines = ["", f"{'stage':<12} {'minutes':>8}   result"]
    for name, seconds in record.seconds.items():
        lines.append(f"{name:<12} {seconds / 60:>8.1f}   {headlines.get(name, '')}")
    lines.append(f"{'total':<12} {summary['minutes']:>8.1f}   peak memory {summary['peak_rss_gib']:.1f} GiB")
    lines += ["", *(f"{name.replace('_', ' '):<14} {address}" for name, address in summary["addresses"].items())]
    return "\n".join(lines)


def _headlines(summary: dict[str, Any]) -> dict[str, str]:
    """One number a stage that a person would ask for."""
    accuracy, clip = summary["accuracy"], summary["clip_score"]
    told = [kind for kind in ("truth", "base", "cascade") if kind in clip]

    def whole(kind: str) -> str:
        if kind in accuracy:
            one, two = (accuracy[kind][name] for name in ("one_object", "two_objects"))
            parts = [
                f"{label} {value:.0%}" for label, value in (("one object", one), ("two", two)) if value is not None
            ]
            return f"captions right: {', '.join(parts)}"
        return f"CLIP score {clip[kind]:.3f}" if kind in clip else ""

    return {
        "vqgan": f"round trip {whole('vqgan')} (the ceiling)",
        "base": whole("base"),
        "superres": whole("cascade"),
        "score": "CLIP score " + ", ".join(f"{kind} {clip[kind]:.3f}" for kind in told) if told else "",
    }
