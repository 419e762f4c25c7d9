"""A flow as a row of jobs, each waiting for the one before: run by a small job of its own, on the cluster.

That the row does not hang on the machine it was submitted from is all that this job is for. Every stage skips what is
finished, so that the pipeline submitted again goes on at the stage that failed. All stages are children of one MLflow
run.
"""

import os
from collections.abc import Sequence
from typing import Any

from ray.dashboard.utils import ray_address_to_api_server_url

from raymuse.clusters.jobserver import JobServer, connect
from raymuse.config.base import StageConfig
from raymuse.config.describe import describe
from raymuse.config.errors import UserError
from raymuse.config.flow import FlowConfig
from raymuse.config.load import command
from raymuse.config.recipe import SECTIONS, stage_of
from raymuse.scoring.summary import flat, markdown
from raymuse.stages.score import read_scores
from raymuse.submit import jobs
from raymuse.submit.following import follow
from raymuse.submit.order import Order
from raymuse.tracking.provenance import COMMIT, JOB_VARIABLE
from raymuse.tracking.run import Run, finishing, open_run


def check_stages(stages: Sequence[str]) -> list[str]:
    """The stages of a pipeline in the order of the flow; none named: all.

    Raises:
        UserError: there is no such stage.
    """
    unknown = [name for name in stages if name not in SECTIONS]
    if unknown:
        raise UserError(f"--stages: there is no {', '.join(unknown)}; the stages of a flow are {', '.join(SECTIONS)}.")
    return [name for name in SECTIONS if not stages or name in stages]


def section_changes(changes: Sequence[str], section: str, workdir: str) -> tuple[str, ...]:
    """The overrides of a flow that concern one of its sections, as overrides of that section.

    Raises:
        UserError: one sets a whole section.
    """
    found = []
    for change in changes:
        key, _, value = change.partition("=")
        if key in SECTIONS:
            raise UserError(f"{change}: in a pipeline, name each key: {key}.KEY=VALUE.")
        if key.startswith(f"{section}."):
            found.append(f"{key.removeprefix(f'{section}.')}={value}")
    return (f"workdir={workdir}", *found)


def run_pipeline(config: FlowConfig, recipe: str, changes: Sequence[str], stages: Sequence[str]) -> int:
    """Run the stages as jobs, one after the other, and return the exit code of the first that fails.

    Raises:
        UserError: this is no job, or the cluster's job server does not answer.
    """
    parent = os.environ.get(JOB_VARIABLE)
    if parent is None or not os.environ.get("RAY_ADDRESS"):
        raise UserError("`raymuse pipeline` runs inside a job: submit it with `raymuse submit --pipeline RECIPE`.")
    server = connect(ray_address_to_api_server_url(os.environ["RAY_ADDRESS"]))
    own = server.details(parent)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    run = open_run(uri, config.name, "flow", resume=os.environ.get(jobs.RUN_VARIABLE) if uri else None)
    row = _Row(server, own, config, run, uri)
    try:
        with finishing(run):
            run.params(config.model_dump(mode="json"))
            run.text(describe(config), "config.yaml")
            for section in check_stages(stages):
                row.run(section, recipe, section_changes(changes, section, config.workdir))
            if "score" in check_stages(stages):
                _report(config, run)
    except _StageFailed as failure:
        print(f"[{failure.section}] ended with {failure.code}: the pipeline submitted again goes on here", flush=True)
        return failure.code
    return 0


class _StageFailed(Exception):  # noqa: N818 - never leaves this module
    """A stage's job ended with an exit code that is not 0."""

    def __init__(self, section: str, code: int) -> None:
        super().__init__(section, code)
        self.section, self.code = section, code


class _Row:
    """The jobs of one pipeline."""

    def __init__(self, server: JobServer, own: Any, config: FlowConfig, run: Run, uri: str | None) -> None:
        self.server, self.config, self.run_of_all, self.uri = server, config, run, uri
        self.name = str((own.metadata or {})[jobs.NAME])
        self.commit = (own.metadata or {}).get(COMMIT)
        self.environment: dict[str, Any] = dict(own.runtime_env or {})

    def run(self, section: str, recipe: str, changes: tuple[str, ...]) -> None:
        """One stage to its end: sent, or found running where an earlier pipeline left it.

        Raises:
            _StageFailed: it ended with another code than 0.
        """
        config: StageConfig = getattr(self.config, section).within(self.config.workdir)
        name = f"{self.name}.{section}"
        known = jobs.attempts(self.server, name)
        going = jobs.running(known)
        run = self._opened(section, name, config)
        if going is not None:
            submission = str(going.submission_id)
        else:
            submission = jobs.next_id(name, known)
            order = Order(command(stage_of(type(config))).removeprefix("raymuse "), f"{recipe}:{section}", changes)
            self._send(order, config, name, submission, run)
        print(f"[{section}] job {submission} -> {config.output}", flush=True)
        try:
            code = follow(self.server, submission, _say, lambda text: print(text, end="", flush=True))
        except (KeyboardInterrupt, SystemExit):
            print(jobs.stop(self.server, submission), flush=True)
            raise
        if code:
            run.finish("FAILED")  # the job itself may not have come so far
            raise _StageFailed(section, code)

    def _opened(self, section: str, name: str, config: StageConfig) -> Run:
        key = jobs.run_key(name, config) if self.uri else None
        return open_run(self.uri, self.config.name, section, parent=self.run_of_all, resume=key)

    def _send(self, order: Order, config: StageConfig, name: str, submission: str, run: Run) -> None:
        about = {**jobs.describe(order, name, submission, run, self.commit), jobs.PIPELINE: self.name}
        own = {JOB_VARIABLE: submission, jobs.RUN_VARIABLE: run.id or jobs.run_key(name, config)}
        variables = {**self.environment.get("env_vars", {}), **own}
        run.tags(about)
        run.flush()
        jobs.send(self.server, order, config, {**self.environment, "env_vars": variables}, about)


def _say(text: str) -> None:
    print(text, flush=True)


def _report(config: FlowConfig, run: Run) -> None:
    """The scores, where a person looks first: on the run of the whole flow."""
    scores = read_scores(config.score.within(config.workdir).output)
    run.metrics(flat(scores), 0)
    run.note(f"# {config.name}\n\n{markdown(scores)}")
