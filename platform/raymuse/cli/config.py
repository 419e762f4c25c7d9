"""`raymuse config`: recipes listed, shown, copied and checked."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)

Changes = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", show_default=False)]


@app.command("list")
def list_recipes() -> None:
    """List the shipped recipes and their sections."""
    from raymuse.config.load import command, recipes_for
    from raymuse.config.recipe import SECTIONS, recipes, stage_of

    flows = recipes_for({"flow"})
    typer.echo("Recipes of the whole flow (raymuse demo --recipe NAME):")
    for name, comment in recipes():
        if name in flows:
            typer.echo(f"  {name:<12} {comment}")
    typer.echo("Recipes of one stage:")
    for name, comment in recipes():
        if name not in flows:
            typer.echo(f"  {name:<12} {comment}")
    typer.echo("Sections of a flow (NAME:SECTION), and the command that runs them:")
    for name, model in SECTIONS.items():
        typer.echo(f"  {name:<12} {command(stage_of(model))} NAME:{name}")


@app.command()
def show(recipe: Annotated[str, typer.Argument(metavar="RECIPE | STAGE")], changes: Changes = None) -> None:
    """Show every key of a recipe, or of a stage.

    The value is the recipe's, or the stage's default; type and meaning stand beside it.
    """
    from raymuse.config.describe import describe
    from raymuse.config.load import load
    from raymuse.config.stages import STAGES

    typer.echo(describe(STAGES[recipe] if recipe in STAGES else load(recipe, changes or [])), nl=False)


@app.command()
def copy(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE")],
    file: Annotated[Path, typer.Argument(metavar="FILE")],
) -> None:
    """Copy a recipe, or a section of it, to a file."""
    from raymuse.config.describe import plain_yaml
    from raymuse.config.errors import UserError
    from raymuse.config.recipe import read, recipe_text, split_section

    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: name it something.yaml, so that commands know it for a recipe.")
    if split_section(recipe)[1]:
        lines = [f"{key}: {plain_yaml(value)}\n" for key, value in read(recipe).values.items()]
        text = f"# From the recipe {recipe}; all keys: raymuse config show {recipe}\n" + "".join(lines)
    else:
        text = recipe_text(recipe)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"{file} exists already: remove it first, or choose another name.") from None
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}") from None
    typer.echo(file)


@app.command()
def check(recipe: Annotated[str, typer.Argument(metavar="FILE")], changes: Changes = None) -> None:
    """Say everything that is wrong with a YAML file."""
    from raymuse.config.load import command, load
    from raymuse.config.recipe import stage_of

    stage = stage_of(type(load(recipe, changes or [])))
    typer.echo(f"OK: {recipe} is a config of {stage}; run it with `{command(stage)} {recipe}`")
