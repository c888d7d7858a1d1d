"""The option for candidate formats, shared by multiple commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.schemes import Scheme

Candidates = Annotated[
    str,
    typer.Option(
        metavar="NAMES|FILE",
        help="Scheme names, such as W8A16,W4A16, or a YAML file with one NAME: {weight: {...}} block per format.",
    ),
]


def read_candidates(candidates: str) -> dict[str, Scheme]:
    """Return the candidate formats by name.

    Raises:
        QatkitError: a name is unknown, or the file does not exist or is invalid.
    """
    from qatkit.recipe import LayerConfig
    from qatkit.recipe.schema import read
    from qatkit.recipe.strict_yaml import parse_yaml
    from qatkit.schemes import scheme

    if not candidates.endswith((".yaml", ".yml", ".json")):
        return {name: scheme(name) for name in (part.strip() for part in candidates.split(","))}
    if not Path(candidates).is_file():
        raise QatkitError(
            f"the file '{candidates}' does not exist",
            key="--candidates",
            advice="pass an existing file, or names such as W8A16,W4A16",
        )
    content = parse_yaml(Path(candidates).read_text("utf-8-sig"), candidates)
    configs: dict[str, LayerConfig] = read(dict[str, LayerConfig], content, "candidates")
    return {name: config.specs for name, config in configs.items()}
