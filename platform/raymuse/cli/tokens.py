"""`raymuse tokens`: what pretokenize wrote."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Inspect and verify token shards.", no_args_is_help=True)

Address = Annotated[str, typer.Argument(metavar="PATH", help="Output of `raymuse pretokenize`, finished or not.")]


@app.command()
def inspect(
    path: Address,
    vqgan: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The VQGAN that wrote the ids; for --out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows decoded beside their captions: .html or .png.")
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="How many rows.")] = 24,
    seed: Annotated[int, typer.Option(metavar="N", help="Which rows.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers as data too.")] = None,
) -> None:
    """Say what token shards hold, and show some rows as pictures.

    Counts, fingerprints, how the codebook is used, and caption lengths, over all rows; with --vqgan and --out also a
    contact sheet of some.
    """
    from raymuse.config.errors import UserError

    if (vqgan is None) != (out is None):
        raise UserError("a contact sheet needs both: --vqgan FOLDER to decode with, and --out sheet.html (or .png).")
    from raymuse.stages.inspect_tokens import Sheet, inspect_tokens

    sheet = Sheet(vqgan, out, rows, seed) if vqgan is not None and out is not None else None
    typer.echo(inspect_tokens(path, sheet, json))


@app.command()
def verify(path: Address) -> None:
    """Check every file of token shards against the manifest.

    Sizes, sums, columns, counts, caption ids and codes. Exit code 1 where anything is wrong, with all that is.
    """
    from raymuse.storage.token_check import check_tokens

    verdict = check_tokens(path)
    for problem in verdict.problems:
        typer.echo(f"  - {problem}")
    for name in verdict.leftovers:
        typer.echo(f"  (left over, read by nobody: {name})")
    typer.echo(verdict.summary)
    if verdict.problems:
        raise typer.Exit(1)
