"""`qatkit allocate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import AsJson
from qatkit.cli.output import echo
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.quantization.mixed.records import Sensitivity

MeasuredArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER_OR_JSON", help="The sensitivity.json file written by `qatkit sensitivity`, or its folder."
    ),
]


def command(
    measured: MeasuredArgument,
    average_bits: Annotated[
        float | None, typer.Option(help="Budget: average bits per weight, including scales.")
    ] = None,
    size: Annotated[
        int | None, typer.Option("--bytes", help="Budget in bytes, including scales and zero points.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a format for each layer within a size budget.

    The selected formats minimize the predicted loss. The result is printed as a `quantize` block for a recipe.

    Example: qatkit allocate runs/mine --average-bits 4.5
    """
    if (average_bits is None) == (size is None):
        raise QatkitError(
            "exactly one of the two is required",
            key="--average-bits or --bytes",
            advice="pass one of them, such as --average-bits 4.5",
        )
    sensitivity = _read(measured)
    from qatkit.quantization.mixed.allocation import allocate, totals
    from qatkit.quantization.mixed.overrides import allocated_layers, plain_layers

    chosen = allocate(sensitivity, budget_bytes=size, average_bits=average_bits)
    taken, increase = totals(sensitivity, chosen)
    bits = 8 * taken / sensitivity.weights
    layers = plain_layers(allocated_layers(sensitivity, chosen))
    if as_json:
        loss = sensitivity.loss
        echo(json.dumps({"bytes": taken, "average_bits": bits, "loss": loss, "increase": increase, "layers": layers}))
        return
    echo(f"# {taken:,} bytes, {bits:.3f} bits per weight including scales")
    echo(f"# predicted loss: {sensitivity.loss:.6g} + {increase:.4g}, assuming additive increases")
    echo("quantize:\n  layers:")
    for glob, how in layers.items():
        echo(f"    {json.dumps(glob)}: {_flow(how)}")


def _flow(value: object) -> str:
    """Format specs as one line of YAML; all strings in them are plain words."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _read(path: Path) -> Sensitivity:
    file = path / "sensitivity.json" if path.is_dir() else path
    if not file.is_file():
        raise QatkitError(
            "the file does not exist", key=str(file), advice="pass the --out folder of `qatkit sensitivity`"
        )
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise QatkitError("the file is not valid JSON", key=str(file), advice="rerun `qatkit sensitivity`") from None
    from qatkit.quantization.mixed.records import Sensitivity

    return Sensitivity.from_plain(content)
