"""Arguments and options shared by multiple commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `qatkit list`, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe values to override, such as stages.qat.lr=1e-4."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, written by `qatkit run`.")]
Out = Annotated[Path | None, typer.Option(help="The run folder to write to.", show_default="runs/NAME")]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="PKG", help="An additional package whose code the recipe may use. Repeatable."),
]
AllowWrite = Annotated[
    list[Path] | None,
    typer.Option(
        "--allow-write",
        metavar="PATH",
        help="A file or folder outside the run folder that may be written to, directly or through a link. Repeatable.",
    ),
]
Python = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The interpreter of an environment made by `qatkit environment FORMAT`, to run files of that format in.",
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Skip and count invalid records in data.args.source instead of failing."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and warnings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else to standard output.")]
