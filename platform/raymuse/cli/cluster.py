"""`raymuse cluster`: machines described in YAML."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check cluster files, and plan on them.", no_args_is_help=True)


@app.command()
def check(files: Annotated[list[Path], typer.Argument(metavar="FILE...")]) -> None:
    """Check `ray up` files, Kubernetes files and kustomize folders.

    Against what will read them, and against rules for pins, GPUs, authentication and open doors; without a network.
    """
    from raymuse.clusters import check as checking
    from raymuse.clusters.kubernetes import is_checked
    from raymuse.config.errors import ConfigError

    problems = []
    for file in files:
        found = checking.check(file)
        problems += [f"{file}: {problem}" for problem in found] if len(files) > 1 else found
        documents = checking.load(file)
        if checking.is_kubernetes(documents):
            for kind in sorted({str(document.get("kind")) for document in documents if not is_checked(document)}):
                typer.echo(f"{file}: {kind} is not checked: nothing is known of it here", err=True)
        if not found:
            typer.echo(f"OK: {file}")
    if problems:
        raise ConfigError(str(files[0]) if len(files) == 1 else f"{len(files)} files", problems)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Of pretokenize, train, generate, or a whole flow.")],
    on: Annotated[Path, typer.Option(metavar="FILE", help="`ray up` file, KubeRay file or kustomize folder.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", show_default=False)] = None,
    images: Annotated[int | None, typer.Option(metavar="N", min=1, help="Pictures to pre-tokenize.")] = None,
    prompts: Annotated[int | None, typer.Option(metavar="N", min=1, help="Prompts to draw.")] = None,
    resolution: Annotated[
        int | None, typer.Option(metavar="PIXELS", min=8, help="Where no published model says it.")
    ] = None,
    prices: Annotated[Path | None, typer.Option(metavar="FILE", help="Price table of your own.")] = None,
) -> None:
    """Say which stage runs on which machines, for how long, at what cost.

    From the networks' own multiply-adds, the recipe's workers and a price table; the arithmetic is shown.
    """
    from raymuse.clusters.plan import Amounts, plan_text
    from raymuse.clusters.prices import read_prices, shipped
    from raymuse.config.load import load

    text = plan_text(recipe, load(recipe, changes or []), on, read_prices(prices), Amounts(images, prompts, resolution))
    typer.echo(text)
    if prices is None:
        typer.echo(f"prices: {shipped()}; copy it, change it, and give the copy as --prices")
