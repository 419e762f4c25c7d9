"""`raymuse runs`: what MLflow holds of earlier work."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from raymuse.cli.words import mlflow_uri, records_of, require_folder_of

app = typer.Typer(help="List and compare runs in MLflow.", no_args_is_help=True)

Mlflow = Annotated[str | None, typer.Option(metavar="URI", help="MLflow server [default: $MLFLOW_TRACKING_URI].")]
Workdir = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="The workdir of a flow, instead of a server: its records are served."),
]
SHEETS = (".html", ".png")


@app.command("list")
def show(
    experiment: Annotated[str | None, typer.Option(metavar="NAME", help="Of this experiment alone.")] = None,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="Such as train-base, generate.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="The newest so many.")] = 30,
    mlflow: Mlflow = None,
    workdir: Workdir = None,
) -> None:
    """List runs, the newest first."""
    from raymuse.tracking.compare import listing
    from raymuse.tracking.reading import Reader

    with _server(mlflow, workdir) as uri:
        typer.echo(listing(Reader(uri).runs(experiment, stage, limit)))


@app.command()
def compare(
    one: Annotated[
        str, typer.Argument(metavar="A", help="A run: its id or the first letters of it, NAME, or EXPERIMENT/NAME.")
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it down with the newest pictures of both: .html, or .png."),
    ] = None,
    mlflow: Mlflow = None,
    workdir: Workdir = None,
) -> None:
    """Say how two runs differ.

    Config, code and data where they differ, the last values of the metrics, and with --out the newest pictures of both
    side by side: .html holds all of it, .png the pictures.
    """
    from raymuse.config.errors import UserError
    from raymuse.tracking.compare import Comparison
    from raymuse.tracking.reading import Reader

    if out is not None and out.suffix not in SHEETS:
        raise UserError(f"--out {out}: a comparison is {' or '.join(SHEETS)}.")
    require_folder_of("--out", out)
    with _server(mlflow, workdir) as uri, tempfile.TemporaryDirectory() as scratch:
        reader = Reader(uri)
        first, second = reader.find(one), reader.find(other)
        pictures = [reader.pictures(run, Path(scratch, run.id)) if out else {} for run in (first, second)]
        made = Comparison.of(first, second, (pictures[0], pictures[1]))
        typer.echo(made.text())
        if out is None:
            return
        if out.suffix == ".html":
            out.write_text(made.page(), encoding="utf-8")
        elif not made.pictures:
            raise UserError(f"{one} and {other} have no pictures: there is nothing to put into {out}.")
        else:
            made.picture(out)
        typer.echo(f"side by side: {out}")


@contextlib.contextmanager
def _server(mlflow: str | None, workdir: str | None) -> Iterator[str]:
    """The address of the server that is asked; that of a workdir runs as long as it is needed.

    Raises:
        UserError: none is named, or there are no records.
    """
    from raymuse.config.errors import UserError
    from raymuse.tracking.server import Server

    uri = mlflow_uri(mlflow) if workdir is None else mlflow
    if uri is not None:
        yield uri
        return
    if workdir is None:
        raise UserError("no MLflow server is named: --mlflow URI, MLFLOW_TRACKING_URI, or --workdir of a flow.")
    with Server.start(records_of(workdir)) as server:
        yield server.uri
