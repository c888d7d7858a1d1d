"""`qatkit cache-teacher`."""

from __future__ import annotations

from qatkit.cli.arguments import Allow, AllowWrite, Out, Overrides, Quiet, RecipeArgument
from qatkit.cli.inputs import load, new_run, writing
from qatkit.cli.output import echo


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    allow: Allow = None,
    allow_write: AllowWrite = None,
    quiet: Quiet = False,
) -> None:
    """Compute and store a recipe's teacher outputs.

    `qatkit run` does this automatically for stages with `distill.cache`. Use this command to do it ahead of time, for
    example on a larger machine. If it is interrupted, run it again to resume.

    Example: qatkit cache-teacher mine.yaml --out runs/mine
    """
    loaded = load(recipe, overrides)
    from qatkit.pipeline.validation import validate_recipe

    validate_recipe(loaded, allow or [])
    from qatkit.pipeline.teacher_cache import write_caches

    this = new_run(loaded, out, allow, allow_write)
    with writing(this, quiet):
        for line in write_caches(this):
            if not quiet:
                echo(line)
