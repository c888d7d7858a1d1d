"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `qatkit list`, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values to change, such as stages.qat.lr=1e-4.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="PKG", help="A package besides qatkit that the recipe may name code from."),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Leave out records of data.args.source that cannot be used, and count them."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on standard output.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
