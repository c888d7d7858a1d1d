"""`qatkit plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import Allow, Overrides, RecipeArgument
from qatkit.cli.inputs import load
from qatkit.cli.memory import print_training
from qatkit.cli.output import echo, print_table
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.recipe import Recipe

_DEVICES = (24.0, 40.0, 80.0, 141.0)


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    context: Annotated[
        int, typer.Option(help="Tokens per sequence, including prompt and completion; at most the model's positions.")
    ] = 4096,
    batch: Annotated[int, typer.Option(help="Concurrent sequences.")] = 1,
    kv_bits: Annotated[int, typer.Option(help="Bits per element of the KV cache: 16 or 8.")] = 16,
    device: Annotated[
        list[float] | None,
        typer.Option(metavar="GB", help="Device memory in GB. Repeatable.", show_default="24, 40, 80 and 141"),
    ] = None,
    allow: Allow = None,
) -> None:
    """Predict memory use for training and serving, without loading weights.

    The training prediction covers every stage, and the serving prediction covers multiple quantization schemes.

    Example: qatkit plan llm/int4_qat --context 8192 --batch 16 --device 24
    """
    loaded = load(recipe, overrides)
    for name, value in (("--context", context), ("--batch", batch)):
        if value < 1:
            raise QatkitError(f"{value} is out of range", key=name, advice="use a positive integer")
    if kv_bits not in (8, 16):
        raise QatkitError(f"{kv_bits} is not supported", key="--kv-bits", advice="use 16 or 8")
    print_training(loaded, allow or [], force=True)
    _print_serving(loaded, allow or [], context, batch, kv_bits, device or _DEVICES)


def _print_serving(
    recipe: Recipe, allow: Sequence[str], context: int, batch: int, kv_bits: int, devices: Sequence[float]
) -> None:
    from rich.table import Table

    from qatkit.advise.phases import served_context
    from qatkit.advise.serving import serving_memory
    from qatkit.common.units import format_bytes
    from qatkit.run.architecture import meta_model

    model = meta_model(recipe.model, allow)
    context, shortened = served_context(model, context)
    schemes = serving_memory(model, context, batch, kv_bits)
    sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
    table = Table(title=f"Serving {sequences} of {context:,} tokens, {kv_bits}-bit KV cache")
    for header in ("scheme", "weights", "KV cache", "total", *(f"{size:g} GB" for size in devices)):
        table.add_column(header)
    for row in schemes:
        fits = ["fits" if row.total <= size * 1e9 else "no" for size in devices]
        table.add_row(row.scheme, *map(format_bytes, (row.weights, row.cache, row.total)), *fits)
    print_table(table)
    if shortened:
        echo(f"note: {shortened}")
    for size in devices:
        fitting = [row.scheme for row in schemes if row.total <= size * 1e9]
        echo(f"{size:g} GB: {f'the first scheme that fits is {fitting[0]}' if fitting else 'no scheme fits'}")
