"""Render one or more runs as a self-contained HTML page without scripts or network access."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitError
from qatkit.report.content import read_report

NEEDS = ("matplotlib", "jinja2")


def missing_packages() -> str | None:
    """Return a message about missing packages that the page needs, or None if all are installed."""
    absent = [name for name in NEEDS if find_spec(name) is None]
    verb = "are" if len(absent) > 1 else "is"
    return f"{' and '.join(absent)} {verb} not installed; run: pip install 'qatkit[report]'" if absent else None


def render(
    reports: Sequence[dict[str, Any]], folders: Sequence[Path], joint: Sequence[dict[str, Any]] | None = None
) -> str:
    """Render the page of one run, or of multiple runs with a comparison at the top.

    Args:
        reports: The content of each ``report.json``.
        folders: The run folder of each report; they distinguish runs with the same name.
        joint: The same reports with latencies that were measured in one process, for the comparison; None if they were
            not.

    Raises:
        QatkitError: matplotlib or jinja2 is not installed.
    """
    page = template("report.html.j2")
    # they import matplotlib
    from qatkit.report.comparison import compared
    from qatkit.report.sections import section

    names = run_names([report["name"] for report in reports], folders)
    text: str = page.render(
        title=names[0] if len(names) == 1 else f"{len(names)} runs compared",
        comparison=compared(joint or reports, names, joint is not None) if len(reports) > 1 else None,
        runs=[
            section(f"run{index}", report, name, len(reports))
            for index, (report, name) in enumerate(zip(reports, names, strict=True))
        ],
    )
    return text


def template(name: str) -> Any:
    """Return a template of a page.

    Raises:
        QatkitError: matplotlib or jinja2 is not installed.
    """
    if (missing := missing_packages()) is not None:
        raise QatkitError(f"{missing}", key="report.html")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qatkit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def run_names(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return the names of the runs; to distinguish equal names, the end of the folder's path is appended.

    Example:
        >>> run_names(["a", "b", "b"], [Path("r/1"), Path("r/2"), Path("r/3")])
        ['a', 'b (2)', 'b (3)']
    """
    counts = Counter(names)
    parts = [folder.resolve().parts for folder in folders]
    unique = []
    for name, own in zip(names, parts, strict=True):
        same = [other for other_name, other in zip(names, parts, strict=True) if other_name == name]
        length = next((n for n in range(1, len(own)) if len({other[-n:] for other in same}) == len(same)), len(own))
        unique.append(name if counts[name] == 1 else f"{name} ({'/'.join(own[-length:])})")
    return unique


def read_reports(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the ``report.json`` of each folder.

    Raises:
        QatkitError: a folder has no readable report, or was passed twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise QatkitError("the same run folder was passed twice", advice="pass each run folder only once")
    return [read_report(folder) for folder in folders]


def write_page(folders: Sequence[Path], page: Path, joint: Sequence[dict[str, Any]] | None = None) -> None:
    """Render the ``report.json`` of one or more runs as one HTML file.

    Args:
        folders: The run folders.
        page: The HTML file.
        joint: The reports for the comparison, see `render`.

    Raises:
        QatkitError: a folder has no readable report, or matplotlib or jinja2 is not installed.
    """
    text = render(read_reports(folders), folders, joint)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, text)
