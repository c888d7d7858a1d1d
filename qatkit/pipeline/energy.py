"""The energy and the emissions of serving exported files, measured by codecarbon."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qatkit.common.packages import check_packages
from qatkit.errors import QatkitError, did_you_mean
from qatkit.pipeline.baselines import example_of
from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.report.bench import resized_call
from qatkit.run.exports import exports_of
from qatkit.run.folder import Run

SECONDS = 5.0
"""Time per file and batch size."""


@dataclass(frozen=True)
class Energy:
    """What a thousand requests take."""

    watt_hours: float
    grams: float
    """Grams of CO2 equivalents."""


def serving_energy(run: Run, country: str, served: Sequence[tuple[str, int]]) -> list[Energy]:
    """Call exported files in a loop, and measure the energy of the whole machine.

    codecarbon reads the counters of the processor and the GPU. Where the system hides them, it estimates the power from
    the processor's model and load. Emissions are those of the country's mean electricity.

    Args:
        run: The run.
        country: The country's code of three letters (ISO 3166), such as DEU.
        served: Names of exported files, with batch sizes.

    Raises:
        QatkitError: codecarbon is not installed, it does not know the country, or a file is unknown or damaged.
    """
    check_packages("--country", ["codecarbon"], "energy")
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.input import DataSource

    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    source: Any = DataSource  # without types
    known = source().get_global_energy_mix_data()
    if country not in known:
        raise QatkitError(
            f"codecarbon has no data for '{country}'", key="--country",
            advice=did_you_mean(country, known) or "use a code of three letters, such as DEU or USA",
        )  # fmt: skip
    exports = {exported.name: exported for exported in exports_of(run)}
    if missing := sorted({name for name, _ in served} - exports.keys()):
        raise QatkitError(
            f"the report has '{missing[0]}', which the run does not export any more", key=str(run.out / "report.json"),
            advice=f"run `qatkit report {run.out}`",
        )  # fmt: skip
    example = example_of(first_batch(held_out_data(run)))
    found = []
    for name, batch in served:
        file = exports[name]
        call: Any = resized_call(file.format.call("benchmark", file.path, 1), example, batch)
        call()
        tracker = OfflineEmissionsTracker(
            country_iso_code=country, output_methods=[], log_level="error", measure_power_secs=1,
            allow_multiple_runs=True,
        )  # fmt: skip
        tracker.start()
        count, end = 0, time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            call()
            count += 1
        kilograms = float(tracker.stop() or 0.0)
        kilowatt_hours = float(tracker.final_emissions_data.energy_consumed)
        thousands = count * batch / 1e3
        found.append(Energy(1e3 * kilowatt_hours / thousands, 1e3 * kilograms / thousands))
    return found
