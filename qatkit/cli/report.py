"""`qatkit report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qatkit.cli.arguments import Allow, AllowWrite, AsJson, Quiet
from qatkit.cli.inputs import open_run, writing
from qatkit.cli.output import echo, print_table
from qatkit.errors import QatkitError


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or more run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Path of the HTML page.",
            show_default="RUN/report.html, or ./report.html for multiple runs",
        ),
    ] = None,
    allow: Allow = None,
    allow_write: AllowWrite = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure exported files and write a report, or compare multiple runs.

    For a single run, the command writes report.json, report.md and report.html. For multiple runs, it measures their
    files in one process and writes only the HTML page.

    Example: qatkit report runs/digits_int8 runs/digits_int4 --out report.html
    """
    if len(runs) > 1:
        if as_json:
            raise QatkitError(
                "this option supports only a single run", key="--json", advice="remove it, or pass one run"
            )
        _compare(runs, out or Path("report.html"), allow, quiet)
        return
    this = open_run(runs[0], allow, allow_write)
    from qatkit.pipeline.report import report_run, track_run
    from qatkit.pipeline.tracking import Tracking

    with writing(this, quiet or as_json):
        content = report_run(this)
        present(content, this.out, out, quiet, as_json)
        track_run(this, content, Tracking(this))


def _compare(folders: list[Path], page: Path, allow: list[str] | None, quiet: bool) -> None:
    """Measure the files of multiple runs in one process, and write a page that compares them."""
    from qatkit.report.page import read_reports, write_page

    read_reports(folders)  # a missing report is named before anything is measured
    from qatkit.pipeline.joint import joint_reports

    joint, reason = None, ""
    if alone := [folder for folder in folders if not (folder / "recipe.yaml").exists()]:
        reason = f"{alone[0]} contains a report but no run"
    else:
        runs = [open_run(folder, allow, None) for folder in folders]
        try:
            joint = joint_reports(runs)
        except QatkitError as error:
            reason = str(error)
    if reason and not quiet:
        echo(f"note: the latencies come from each run's own report and are not comparable between runs: {reason}")
    write_page(folders, page, joint)
    if not quiet:
        echo(f"page: {page}")


def present(content: dict[str, object], folder: Path, page: Path | None, quiet: bool, as_json: bool) -> None:
    """Write the HTML page and print the comparison.

    Args:
        content: The report.
        folder: The run folder.
        page: Path of the page (default: report.html in the run folder).
        quiet: Print nothing.
        as_json: Print the report as JSON.
    """
    from qatkit.report.page import missing_packages, write_page
    from qatkit.report.speed import kernel_notes, missing_baselines, slowdowns
    from qatkit.report.tables import terminal_table

    if page is None and (missing := missing_packages()) is not None:
        where = f"no report.html: {missing}, then run: qatkit report {folder}"
    else:
        page = page or folder / "report.html"
        write_page([folder], page)
        where = f"page: {page}"
    if as_json:
        echo(json.dumps(content))
    elif not quiet:
        print_table(terminal_table(content))
        for line in slowdowns(content):
            echo(f"SLOWER: {line}")
        for note in [*kernel_notes(content), *missing_baselines(content)]:
            echo(f"note: {note}")
        echo(f"report: {folder / 'report.md'}\n{where}")
