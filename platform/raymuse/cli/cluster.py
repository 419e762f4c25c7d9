"""`raymuse cluster`: machines described in YAML."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check cluster files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Check cluster files."""


@app.command()
def check(file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Check a `ray up` or KubeRay file against what will read it."""
    from raymuse.clusters import check as checking
    from raymuse.config.errors import ConfigError

    problems = checking.check(file)
    if problems:
        raise ConfigError(str(file), problems)
    typer.echo(f"OK: {file}")
