"""`qatkit list`."""

from __future__ import annotations

from qatkit.cli.output import echo


def command() -> None:
    """List the built-in recipes.

    Example: qatkit list
    """
    from qatkit.recipe.loading import list_recipes, recipe_description

    names = list_recipes()
    width = max(map(len, names))
    for name in names:
        echo(f"{name:{width}}  {recipe_description(name)}")
