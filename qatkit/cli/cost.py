"""`qatkit cost`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatkit.cli.arguments import Allow, AsJson
from qatkit.cli.output import echo, print_table
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.advise.devices import Device


@dataclass(frozen=True)
class _Latency:
    """A latency per batch, and where it comes from."""

    source: str
    kind: str
    """"measured", "given" or "predicted"."""
    batch: int
    latency_ms: float
    per_token: bool = False
    """Whether it is the latency of one decoded token instead of a request."""


@dataclass(frozen=True)
class _Served(_Latency):
    """What serving at a latency costs."""

    per_thousand: float = 0.0
    """Price of a thousand requests."""
    per_million_tokens: float | None = None
    devices: int | None = None
    per_day: float | None = None
    break_even: float | None = None
    """Requests per day above which one device is cheaper than the API; None if it never is, or without an API."""
    watt_hours: float | None = None
    """Energy of a thousand requests."""
    grams: float | None = None
    """Emissions of a thousand requests, in grams of CO2 equivalents."""


def command(
    price: Annotated[float, typer.Option(min=0.0, help="Price of the device per hour.")],
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|MODEL]",
            help="A run folder whose report contains measured latencies; with --device, a recipe or a folder with the "
            "config.json of a transformers model.",
        ),
    ] = None,
    latency: Annotated[float | None, typer.Option(min=0.0, metavar="MS", help="Milliseconds per batch.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Predict latencies on this device by the roofline, as in `qatkit profile`.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests per batch, with --latency or --device.", show_default="1")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per sequence of a language model, with --device.", show_default="2048"),
    ] = None,
    requests: Annotated[float | None, typer.Option(min=0.0, help="Requests per day.")] = None,
    tokens: Annotated[
        float | None,
        typer.Option(min=0.0, help="Tokens per request, with --api or --device.", show_default="500"),
    ] = None,
    api: Annotated[
        float | None, typer.Option(min=0.0, metavar="PRICE", help="Price of an API per thousand tokens.")
    ] = None,
    country: Annotated[
        str | None,
        typer.Option(
            metavar="CODE",
            help="Also measure the energy of the run's files with codecarbon, and the emissions of this country's "
            "electricity, such as DEU.",
        ),
    ] = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Compute the cost of serving from measured latencies, from one that you pass, or from predicted ones.

    Prices are in the currency of --price and --api. The price per thousand requests assumes that the device is always
    busy. --requests adds the number of devices needed, and their price for a full day. With --device, the least cost of
    a recipe's training is printed too.

    Example: qatkit cost runs/demo --price 2 --requests 500000
    """
    if (run is None) == (latency is None):
        raise QatkitError("pass either a run folder or --latency", key="RUN")
    if latency is not None and device is not None:
        raise QatkitError("this option has no effect with --latency", key="--device", advice="remove one of them")
    if batch is not None and latency is None and device is None:
        raise QatkitError("this option has no effect without --latency", key="--batch", advice="remove it")
    if context is not None and device is None:
        raise QatkitError("this option has no effect without --device", key="--context", advice="remove it")
    if country is not None and (run is None or device is not None):
        raise QatkitError("energy is measured for the files of a run", key="--country", advice="pass a run folder")
    if tokens is not None and api is None and device is None:
        raise QatkitError("this option has no effect without --api", key="--tokens", advice="remove it, or add --api")
    for name, value in (("--latency", latency), ("--api", api), ("--tokens", tokens)):
        if value is not None and value <= 0:
            raise QatkitError(f"{value:g} is out of range", key=name, advice="pass a positive number")
    batch, tokens, hours = batch or 1, 500 if tokens is None else tokens, None
    if latency is not None:
        found = [_Latency("--latency", "given", batch, latency)]
    elif device is not None:
        chosen = _device(device)
        found = _predicted(run or "", chosen, batch, context, allow or [])
        hours = None if Path(run or "").is_dir() else _training_hours(run or "", chosen, allow or [])
    else:
        found = _measured(Path(run or ""))
    served = [_served(each, price, requests, tokens, api) for each in found]
    if country is not None:
        served = _with_energy(served, Path(run or ""), country, allow)
    from qatkit.advise.price import api_per_day

    bill = None if api is None or requests is None else api_per_day(requests, tokens, api)
    training = None if hours is None else {name: each * price for name, each in hours.items()}
    if as_json:
        content = {"served": [asdict(each) for each in served], "api_per_day": bill, "training": training}
        echo(json.dumps(content))
        return
    print_table(_table(served, requests is not None, api is not None))
    if any(each.per_token for each in served):
        echo(f"requests generate {tokens:,.0f} tokens; the time to read the prompts is not included")
    if bill is not None:
        echo(f"the API costs {bill:,.2f} per day for {requests:,.0f} requests of {tokens:,.0f} tokens")
    if training is not None and hours is not None:
        parts = ", ".join(f"{name} {cost:,.3g}" for name, cost in training.items())
        echo(
            f"training costs at least {sum(training.values()):,.3g} for {sum(hours.values()):,.3g} device hours by the "
            f"roofline ({parts})"
        )


def _served(found: _Latency, price: float, requests: float | None, tokens: float, api: float | None) -> _Served:
    from qatkit.advise.price import break_even, per_day, per_thousand

    seconds = found.latency_ms / 1e3 * (tokens if found.per_token else 1)
    devices, daily = (None, None) if requests is None else per_day(price, seconds, found.batch, requests)
    million = 1e3 * per_thousand(price, found.latency_ms / 1e3, found.batch) if found.per_token else None
    even = None if api is None else break_even(price, seconds, found.batch, tokens, api)
    return _Served(
        **asdict(found),
        per_thousand=per_thousand(price, seconds, found.batch),
        per_million_tokens=million,
        devices=devices,
        per_day=daily,
        break_even=even,
    )


def _with_energy(served: list[_Served], folder: Path, country: str, allow: list[str] | None) -> list[_Served]:
    from qatkit.cli.inputs import open_run
    from qatkit.pipeline.energy import serving_energy

    energies = serving_energy(open_run(folder, allow), country, [(each.source, each.batch) for each in served])
    pairs = zip(served, energies, strict=True)
    return [replace(each, watt_hours=energy.watt_hours, grams=energy.grams) for each, energy in pairs]


def _device(name: str) -> Device:
    from qatkit.advise.devices import DEVICES
    from qatkit.advise.local import local_device

    return local_device() if name == "local" else DEVICES.row(name, "--device")


def _predicted(what: str, device: Device, batch: int, context: int | None, allow: Sequence[str]) -> list[_Latency]:
    """The least latencies of the model on a device, without compression and with each technique."""
    from qatkit.advise.phases import served_layers
    from qatkit.advise.roofline import TECHNIQUES, Technique, call_seconds, supports
    from qatkit.cli.phases import load_phases

    phases = load_phases(what, [], batch, context, allow)
    layers, dtype = served_layers(phases), device.fastest
    return [
        _Latency(each.name, "predicted", batch, 1e3 * call_seconds(layers, device, dtype, each), "decode" in phases)
        for each in (Technique("without compression"), *TECHNIQUES)
        if supports(device, dtype, each)
    ]


def _training_hours(recipe: str, device: Device, allow: Sequence[str]) -> dict[str, float]:
    """The least device hours of every stage."""
    from qatkit.cli.inputs import load
    from qatkit.pipeline.training_time import training_times

    loaded = load(recipe, [])
    count = loaded.trainer.devices if isinstance(loaded.trainer.devices, int) else 1
    times = training_times(loaded, device, allow)
    return {name: steps * seconds * count / 3600 for name, (steps, seconds) in times.items()}


def _measured(run: Path) -> list[_Latency]:
    """Files, batch sizes and latencies in milliseconds of a report."""
    from qatkit.report.content import read_report

    report = read_report(run)
    found = [
        _Latency(row["file"], "measured", each["batch_size"], each["median_ms"])
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
    text = served[0].per_token
    headers = ["latency of", "", "batch", f"latency per {'token' if text else 'batch'}"]
    headers += ["per 1,000,000 tokens"] * text + ["per 1,000 requests at full load"]
    headers += [*(["devices", "per day"] if daily else []), *(["cheaper than the API above"] if compared else [])]
    headers += ["Wh per 1,000 requests", "g CO2 per 1,000 requests"] if served[0].watt_hours is not None else []
    for header in headers:
        table.add_column(header, overflow="fold")
    for each in served:
        least = "at least " * (each.kind == "predicted")
        cells = [each.source, each.kind, str(each.batch), f"{least}{each.latency_ms:.3g} ms"]
        cells += [f"{each.per_million_tokens:.3g}"] if each.per_million_tokens is not None else []
        cells += [f"{each.per_thousand:.3g}"]
        cells += [str(each.devices), f"{each.per_day:,.2f}"] if daily else []
        if compared:
            cells.append("never" if each.break_even is None else f"{each.break_even:,.0f} requests per day")
        if each.watt_hours is not None:
            cells += [f"{each.watt_hours:.3g}", f"{each.grams:.3g}"]
        table.add_row(*cells)
    return table
