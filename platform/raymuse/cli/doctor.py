"""`raymuse doctor`: what is wrong with this machine, or a cluster."""

import json
from typing import Annotated

import typer

from raymuse.cli.words import mlflow_uri


def doctor(
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Look at the cluster with this dashboard as well.")
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow server [default: $MLFLOW_TRACKING_URI, or none].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as data.")] = False,
) -> None:
    """Say what is wrong with this machine or a cluster.

    Exit code 1 where something is an error.
    """
    from raymuse import doctor as examining

    findings = examining.examine(address, mlflow_uri(mlflow))
    if as_json:
        typer.echo(json.dumps(examining.as_data(findings), indent=1))
    else:
        for finding in findings:
            typer.echo(str(finding))
    if examining.failed(findings):
        raise typer.Exit(1)
