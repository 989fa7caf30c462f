"""``vdcompress recipes``: list, show and check recipes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vdcompress import report
from vdcompress.cli import options as o
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session
from vdcompress.report import Table

Name = Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name or its YAML file.")]

recipes_app = typer.Typer(help="List, show and check recipes.", invoke_without_command=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(context: typer.Context, json: o.Json = False, debug: o.Debug = False) -> None:
    """List the recipes that come with vdcompress; use one with: --recipe NAME."""
    if context.invoked_subcommand:
        return
    with session(Flags(json, debug=debug)) as out:
        from vdcompress.recipe import load_recipe, shipped

        found = [load_recipe(name) for name in shipped()]
        rows = tuple(
            (
                recipe.name,
                recipe.model or ("from scratch" if recipe.scratch else ""),
                str(recipe.plan.v_dim or ""),
                recipe.description,
            )
            for recipe in found
        )
        listed = [
            {
                "name": recipe.name,
                "model": recipe.model,
                "v_dim": recipe.plan.v_dim,
                "description": recipe.description,
            }
            for recipe in found
        ]
        table = Table("", ("recipe", "model", "v_dim", "what it does"), rows, words=4)
        out.result({"schema": 1, "command": "recipes", "recipes": listed}, table)


@recipes_app.command()
def show(name: Name, json: o.Json = False, debug: o.Debug = False) -> None:
    """Print a recipe with every default filled in; save it, change it, use it."""
    with session(Flags(json, debug=debug)) as out:
        from vdcompress.recipe import load_recipe

        recipe = load_recipe(name)
        document = {
            "schema": 1,
            "command": "recipes show",
            "recipe": recipe.model_dump(mode="json"),
        }
        out.result(document, recipe.dumps().rstrip())


@recipes_app.command()
def check(name: Name, json: o.Json = False, debug: o.Debug = False) -> None:
    """Read a recipe strictly, and say what it would build.

    Parameters, widths and bytes per token, from the model's config alone.
    """
    with session(Flags(json, debug=debug)) as out:
        from vdcompress.pipeline.checking import check_recipe
        from vdcompress.recipe import load_recipe

        recipe = load_recipe(name)
        if recipe.model is None and recipe.scratch is None:
            document = {"schema": 1, "command": "recipes check", "name": str(name), "sound": True}
            out.result(document, f"{name}: sound; it names no model, and builds none by itself")
            return
        found = check_recipe(recipe)
        document = found | {"name": str(name), "sound": True}
        out.result(document, f"{name}: sound", *_built(found))


def _built(found: dict[str, Any]) -> list[Table | str]:
    """Return what a recipe builds, for people."""
    path = found["parameters"]["v_path"]
    if found["plan"] is None:
        return [report.summary(found), "how wide each part becomes is settled by calibration"]
    return [report.summary(found), report.layers(found["plan"]), f"parameters of V: {path:,}"]
