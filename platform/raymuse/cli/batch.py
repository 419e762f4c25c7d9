"""`raymuse batch`: what generate wrote."""

from typing import Annotated

import typer

app = typer.Typer(help="Watch and verify batches of pictures.", no_args_is_help=True)

Address = Annotated[str, typer.Argument(metavar="PATH", help="Output of `raymuse generate`, finished or not.")]


@app.command()
def status(path: Address) -> None:
    """Say how far a batch is."""
    from raymuse.storage.batch_check import batch_state

    typer.echo(batch_state(path).summary)


@app.command()
def verify(path: Address) -> None:
    """Check every file of a batch against the manifest.

    Sums, counts, rows and pictures. Exit code 1 where anything is wrong, with all that is.
    """
    from raymuse.storage.batch_check import check_batch

    state = check_batch(path)
    for problem in state.problems:
        typer.echo(f"  - {problem}")
    for name in state.leftovers:
        typer.echo(f"  (left over, read by nobody: {name})")
    typer.echo(state.summary)
    if state.problems:
        raise typer.Exit(1)
