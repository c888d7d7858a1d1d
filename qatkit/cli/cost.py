"""`qatkit cost`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qatkit.cli.arguments import AsJson
from qatkit.cli.output import echo, print_table
from qatkit.errors import QatkitError


@dataclass(frozen=True)
class _Served:
    """Where a latency comes from, and what serving at this latency costs."""

    source: str
    batch: int
    latency_ms: float
    per_thousand: float
    devices: int | None = None
    per_day: float | None = None
    break_even: float | None = None
    """Requests per day above which one device is cheaper than the API; None if it never is, or without an API."""


def command(
    price: Annotated[float, typer.Option(min=0.0, help="Price of the device per hour.")],
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run folder whose report contains measured latencies.")
    ] = None,
    latency: Annotated[float | None, typer.Option(min=0.0, metavar="MS", help="Milliseconds per batch.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests per batch, with --latency.", show_default="1")
    ] = None,
    requests: Annotated[float | None, typer.Option(min=0.0, help="Requests per day.")] = None,
    tokens: Annotated[
        float | None, typer.Option(min=0.0, help="Tokens per request, with --api.", show_default="500")
    ] = None,
    api: Annotated[
        float | None, typer.Option(min=0.0, metavar="PRICE", help="Price of an API per thousand tokens.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the cost of serving from measured latencies, or from one that you pass.

    Prices are in the currency of --price and --api. The price per thousand requests assumes that the device is always
    busy. --requests adds the number of devices needed, and their price for a full day.

    Example: qatkit cost runs/demo --price 2 --requests 500000
    """
    from qatkit.advise.price import api_per_day, break_even, per_day, per_thousand

    if (run is None) == (latency is None):
        raise QatkitError("pass either a run folder or --latency", key="RUN")
    if batch is not None and latency is None:
        raise QatkitError("this option has no effect without --latency", key="--batch", advice="remove it")
    if tokens is not None and api is None:
        raise QatkitError("this option has no effect without --api", key="--tokens", advice="remove it, or add --api")
    for name, value in (("--latency", latency), ("--api", api), ("--tokens", tokens)):
        if value is not None and value <= 0:
            raise QatkitError(f"{value:g} is out of range", key=name, advice="pass a positive number")
    batch, tokens = batch or 1, 500 if tokens is None else tokens
    sources = [("--latency", batch, latency)] if latency is not None else _measured(run or Path())
    served = []
    for source, size, milliseconds in sources:
        seconds = milliseconds / 1e3
        devices, daily = (None, None) if requests is None else per_day(price, seconds, size, requests)
        even = None if api is None else break_even(price, seconds, size, tokens, api)
        served.append(_Served(source, size, milliseconds, per_thousand(price, seconds, size), devices, daily, even))
    bill = None if api is None or requests is None else api_per_day(requests, tokens, api)
    if as_json:
        echo(json.dumps({"served": [asdict(each) for each in served], "api_per_day": bill}))
        return
    print_table(_table(served, requests is not None, api is not None))
    if bill is not None:
        echo(f"the API costs {bill:,.2f} per day for {requests:,.0f} requests of {tokens:,.0f} tokens")


def _measured(run: Path) -> list[tuple[str, int, float]]:
    """Files, batch sizes and latencies in milliseconds of a report."""
    from qatkit.report.content import read_report

    report = read_report(run)
    found = [
        (row["file"], each["batch_size"], each["median_ms"])
        for row in [*report["rows"], *report["others"]]
        for each in row["latency"]
    ]
    if not found:
        raise QatkitError(
            "the report contains no latencies, because they are not measured for its format",
            key=str(run / "report.json"),
            advice="pass --latency",
        )
    return found


def _table(served: list[_Served], daily: bool, compared: bool) -> Any:
    from rich.table import Table

    table = Table()
    headers = ["latency of", "batch", "latency", "per 1,000 requests at full load"]
    headers += [*(["devices", "per day"] if daily else []), *(["cheaper than the API above"] if compared else [])]
    for header in headers:
        table.add_column(header)
    for each in served:
        cells = [each.source, str(each.batch), f"{each.latency_ms:.3g} ms", f"{each.per_thousand:.3g}"]
        cells += [str(each.devices), f"{each.per_day:,.2f}"] if daily else []
        if compared:
            cells.append("never" if each.break_even is None else f"{each.break_even:,.0f} requests per day")
        table.add_row(*cells)
    return table
