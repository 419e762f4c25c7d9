"""All commands, in the order of the flow. What a command needs is imported when it runs: `--help` must be quick."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raymuse.cli import batch, cluster, config, doctor, runs, submit, tokens
from raymuse.cli.words import (
    SCORES,
    TRAININGS,
    compare_config,
    config_for,
    data_config,
    generate_config,
    is_data,
    mlflow_uri,
    require_folder_of,
    split,
    sweep_config,
)


class InOrder(TyperGroup):
    """Typer names groups after all commands; these belong to the commands that make what they look at."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = list(super().list_commands(ctx))
        for name, stage in (("tokens", "pretokenize"), ("batch", "generate"), ("runs", "ui"), ("jobs", "submit")):
            names.remove(name)
            names.insert(names.index(stage) + 1, name)
        return names


app = typer.Typer(
    cls=InOrder,
    help="Captioned images to a trained MUSE/aMUSEd text-to-image model, and prompts to pictures, on Ray.",
    epilog="Every stage takes a RECIPE (a shipped one, one of its sections like demo:base, or your YAML file) and "
    "KEY=VALUE changes; running the same command again resumes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _words(metavar: str) -> Any:
    return typer.Argument(metavar=metavar, show_default=False, hidden=True)


Words = Annotated[list[str] | None, _words("RECIPE KEY=VALUE")]
Mlflow = Annotated[
    str | None, typer.Option(metavar="URI", help="MLflow server to report to [default: $MLFLOW_TRACKING_URI, or none].")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")]


@app.command()
def demo(
    changes: Annotated[list[str] | None, _words("KEY=VALUE")] = None,
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="demo, smoke, emoji, or your YAML file.")] = "demo",
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the closing table as data too.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run the whole flow on this machine: data to scores."""
    from raymuse.config.flow import FlowConfig
    from raymuse.config.load import load

    flow_config = load(recipe, changes or [], "flow")
    assert isinstance(flow_config, FlowConfig)
    require_folder_of("--json", json)
    if dry_run:
        from raymuse.cli.plans import flow_plan

        typer.echo(flow_plan(flow_config), nl=False)
        return
    from raymuse import flow
    from raymuse.cli.launch import resumable

    with resumable():
        flow.demo(flow_config, json)


@app.command()
def styledrop(
    words: Annotated[list[str] | None, _words("PICTURE KEY=VALUE")] = None,
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="styledrop, or your YAML file.")] = "styledrop",
    mlflow: Mlflow = None,
) -> None:
    """Learn the style of one picture, in two rounds.

    PICTURE's file name is its caption, such as "a house in watercolour style.jpg", unless caption=... says it.
    """
    from functools import partial

    from raymuse.config.load import load
    from raymuse.config.styledrop import StyledropConfig

    word, changes = split(words)
    loaded = load(recipe, [*([] if word is None else [f"picture={word}"]), *changes], "styledrop")
    assert isinstance(loaded, StyledropConfig)
    from raymuse import styledrop as flow
    from raymuse.cli.launch import run_stage

    run_stage(partial(flow.styledrop, uri=mlflow_uri(mlflow)), loaded, mlflow)


@app.command()
def data(
    words: Annotated[list[str] | None, _words("SOURCE|RECIPE KEY=VALUE")] = None,
    mlflow: Mlflow = None,
) -> None:
    """Draw or gather captioned pictures as shards.

    SOURCE is `shapes` (drawn here), `emoji` (of Debian's font), or captioned images: a folder, tars, Parquet or a
    Hugging Face data set; the rest is as in the recipe demo:data, or emoji:data for `emoji`.
    """
    loaded = data_config(words)
    from raymuse.cli.launch import run_stage
    from raymuse.stages.data import make_data

    run_stage(make_data, loaded, mlflow)


@app.command()
def train(
    words: Words = None,
    mlflow: Mlflow = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write torch's trace of three steps to OUTPUT/profile.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Train a VQGAN, a CLIP, a base or a super-res model."""
    from raymuse.config.training import TrainConfig

    loaded = config_for(TrainConfig, "train", [*(words or []), *(["profile=true"] if profile else [])], TRAININGS)
    if dry_run:
        from raymuse.cli.training_plan import train_plan

        typer.echo(train_plan(loaded), nl=False)
        return
    from raymuse.cli.launch import run_stage
    from raymuse.stages import train as stage

    run_stage(stage.train, loaded, mlflow, ray=loaded.workers > 0)


@app.command()
def pretokenize(words: Words = None, mlflow: Mlflow = None, dry_run: DryRun = False) -> None:
    """Encode image shards to token shards, once."""
    from raymuse.config.pretokenize import PretokenizeConfig

    loaded = config_for(PretokenizeConfig, "pretokenize", words, ("pretokenize",))
    if dry_run:
        from raymuse.encoding.plan import plan_text

        typer.echo(plan_text(loaded))
        return
    from raymuse.cli.launch import run_stage
    from raymuse.stages import pretokenize as stage

    run_stage(stage.pretokenize, loaded, mlflow)


@app.command()
def export(words: Words = None, mlflow: Mlflow = None) -> None:
    """Assemble trained parts to a model folder."""
    from raymuse.config.export import ExportConfig

    loaded = config_for(ExportConfig, "export", words, ("export",))
    from raymuse.cli.launch import run_stage
    from raymuse.stages import export as stage

    run_stage(stage.export, loaded, mlflow, ray=False)


@app.command()
def generate(
    words: Annotated[list[str] | None, _words("PROMPTS|RECIPE KEY=VALUE")] = None,
    out: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Where the pictures go: output=.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A folder, or models:/NAME@ALIAS of MLflow's registry: model=.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Every N-th part from the I-th alone, in an output of its own.")
    ] = None,
    mlflow: Mlflow = None,
    from_png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw this picture once more: with model=FOLDER output=FILE.")
    ] = None,
) -> None:
    """Draw every prompt of a file, exactly once.

    raymuse generate my.txt --model runs/demo/model --out my-images samples=4
    """
    options = {"output": out, "model": model, "shard": shard}
    words = [*(words or []), *(f"{name}={value}" for name, value in options.items() if value is not None)]
    if from_png is not None:
        from raymuse.config.edit import RepeatConfig
        from raymuse.config.load import from_values
        from raymuse.stages.edit import repeat

        again = from_values("repeat", {"picture": str(from_png)}, words)
        assert isinstance(again, RepeatConfig)
        from raymuse.tracking.registry import with_model

        typer.echo(repeat(with_model(again, mlflow)))
        return
    loaded = generate_config(words)
    from raymuse.cli.launch import run_stage
    from raymuse.stages import generate as stage

    run_stage(stage.generate, loaded, mlflow)


@app.command()
def edit(
    words: Annotated[list[str] | None, _words("MODEL KEY=VALUE")] = None,
) -> None:
    """Inpaint, outpaint, vary, edit or enlarge a picture.

    raymuse edit MODEL task=inpaint picture=a.png mask=m.png prompt="a small blue star" output=b.png
    """
    from raymuse.config.edit import EditConfig
    from raymuse.config.load import from_values

    word, changes = split(words)
    loaded = from_values("edit", {} if word is None else {"model": word}, changes)
    assert isinstance(loaded, EditConfig)
    from raymuse.stages import edit as stage
    from raymuse.tracking.registry import with_model

    for place in stage.edit(with_model(loaded, None)):
        typer.echo(place)


@app.command()
def serve(
    words: Annotated[list[str] | None, _words("MODEL|RECIPE KEY=VALUE")] = None,
    mlflow: Mlflow = None,
) -> None:
    """Serve a model folder over HTTP until Ctrl-C.

    MODEL may be models:/NAME@ALIAS of MLflow's registry.
    """
    from raymuse.config.errors import UserError
    from raymuse.config.generate import ServeConfig
    from raymuse.config.load import from_values, load

    word, changes = split(words)
    if word is None and not any(change.startswith("model=") for change in changes):
        raise UserError("raymuse serve needs a model folder: raymuse serve runs/demo/model port=8000")
    if word is None or is_data(word):
        loaded = from_values("serve", {} if word is None else {"model": word}, changes)
    else:
        loaded = load(word, changes, "serve")
    assert isinstance(loaded, ServeConfig)
    from raymuse.cli.launch import local_ray
    from raymuse.serving import deploy
    from raymuse.tracking.registry import with_model

    loaded = with_model(loaded, mlflow)
    with local_ray():
        deploy.serve(loaded)


@app.command(name="verify-weights")
def verify_weights(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id of amused-256 or -512.")],
) -> None:
    """Check published aMUSEd weights by known pixels."""
    from raymuse.drawing.golden import TOLERANCE, verify
    from raymuse.pipeline import Pipeline

    pipeline = Pipeline.load(model)
    verdict = verify(pipeline.text, pipeline.base, pipeline.vqgan)
    for name, values in (("drawn", verdict.drawn), ("published", verdict.published)):
        typer.echo(f"{name:10}" + "".join(f"{value:8.4f}" for value in values))
    word = "pass" if verdict.passed else "FAIL"
    typer.echo(f"{word}: largest difference {verdict.error:.4f}, allowed {TOLERANCE}")
    if not verdict.passed:
        raise typer.Exit(1)


@app.command()
def score(
    words: Annotated[list[str] | None, _words("RECIPE|MODEL KEY=VALUE")] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Draw with every combination of sampling options, and measure each.")
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two models, or two folders of pictures, side by side."),
    ] = None,
    mlflow: Mlflow = None,
) -> None:
    """Judge generated pictures beside the truth.

    raymuse score --sweep MODEL prompts=my.txt clip=CLIP guidance=[1,2,4] steps=[6,12] output=sweep

    raymuse score --compare MODEL MODEL prompts=my.txt clip=CLIP b.guidance=2 output=compared
    """
    from raymuse.config.base import StageConfig
    from raymuse.config.errors import UserError

    loaded: Any
    if sweep and compare is not None:
        raise UserError("--sweep and --compare are two commands: leave one of them out.")
    if sweep:
        loaded = sweep_config(words)
    elif compare is not None:
        loaded = compare_config(compare, words)
    else:
        loaded = config_for(StageConfig, "score", words, SCORES)
    from raymuse.cli.launch import run_stage
    from raymuse.stages import compare as comparing
    from raymuse.stages import score as scoring
    from raymuse.stages import sweep as sweeping

    stages: dict[str, Any] = {"score": scoring.score, "sweep": sweeping.sweep, "compare": comparing.compare}
    run_stage(stages[loaded.stage], loaded, mlflow, ray=loaded.workers > 0)


@app.command()
def ui(
    workdir: Annotated[str, typer.Option(metavar="FOLDER", help="The workdir of a flow.")] = "runs/demo",
) -> None:
    """Open MLflow on what a flow has recorded."""
    from raymuse.cli.launch import show_tracking

    show_tracking(workdir)


app.command()(submit.submit)
app.command(hidden=True)(submit.pipeline)
app.add_typer(submit.app, name="jobs")
app.command()(doctor.doctor)
app.add_typer(tokens.app, name="tokens")
app.add_typer(batch.app, name="batch")
app.add_typer(runs.app, name="runs")
app.add_typer(config.app, name="config")
app.add_typer(cluster.app, name="cluster")
