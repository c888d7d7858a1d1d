"""The exported files of a run: ``export/STAGE/FORMAT`` for every stage in the comparison and every format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS
from qatkit.recipe import Recipe
from qatkit.run.folder import Run


@dataclass(frozen=True)
class Exported:
    """The place of a stage's export in one format."""

    stage: str
    format: ExportFormat
    name: str
    """The name in tables: the stage in the run's main format, otherwise ``STAGE/FORMAT``."""
    folder: Path
    """The folder of all files."""

    @property
    def path(self) -> Path:
        """The exported file, or the folder if the format writes one."""
        return self.format.path(self.folder)

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return self.format.size(self.path)


def exports_of(run: Run, only: str | None = None) -> list[Exported]:
    """Return all exports of a run, those in its main format first; the files need not exist.

    Args:
        run: The run.
        only: The name of the only format to include. By default, all formats of `formats_of` are included.

    Raises:
        QatkitError: the run has no export format.
    """
    rows = formats_of(run)
    return [each for row in rows if only in (None, row.name) for each in _exports(run, row, row is rows[0])]


def added_exports(run: Run, row: ExportFormat) -> list[Exported]:
    """Return the exports of a run in a format that need not belong to it yet; `add_to_run` makes it belong."""
    rows = _formats(run) or [row]
    return _exports(run, row, row is rows[0])


def add_to_run(run: Run, row: ExportFormat) -> None:
    """Make a format that has been written belong to a run, although the run may share its stages with others."""
    for stage in run.rows:
        _mark(run, stage, row).mkdir(parents=True, exist_ok=True)


def formats_of(run: Run) -> list[ExportFormat]:
    """Return the formats of a run: those of the recipe, and those of which its folder has files. The first is the main.

    Raises:
        QatkitError: there are none.
    """
    if not (rows := _formats(run)):
        raise QatkitError(
            "the recipe has no such block",
            key="export",
            advice="add export: {format: onnx}, or run `qatkit export --format`",
            origin=str(run.out / "recipe.yaml"),
        )
    return rows


def _exports(run: Run, row: ExportFormat, main: bool) -> list[Exported]:
    return [
        Exported(stage, row, stage if main else f"{stage}/{row.name}", run.export_folder(stage) / row.name)
        for stage in run.rows
    ]


def _formats(run: Run) -> list[ExportFormat]:
    rows = list(formats_by_key(run.recipe).values())
    known = {row.name for row in rows}
    return rows + [row for row in FORMATS.values() if row.name not in known and _was_added(run, row)]


def _was_added(run: Run, row: ExportFormat) -> bool:
    """Whether a stage has files in a format; a folder that an export left empty does not count."""
    folders = [run.export_folder(stage) / row.name for stage in run.rows if _mark(run, stage, row).is_dir()]
    return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)


def _mark(run: Run, stage: str, row: ExportFormat) -> Path:
    """The folder of the files, or an empty folder if they are in the folder of a shared stage."""
    return run.out / "export" / stage / row.name


def interpreter_of(recipe: Recipe, row: ExportFormat) -> Path | None:
    """Return the interpreter in which the recipe lets files of a format be verified, or None."""
    return next(
        (Path(each.python) for each in recipe.exports.values() if each.format == row.name and each.python), None
    )


def formats_by_key(recipe: Recipe) -> dict[str, ExportFormat]:
    """Return the recipe's export formats by the key that names each, such as ``export.format``."""
    return {f"{key}.format": FORMATS.row(config.format, f"{key}.format") for key, config in recipe.exports.items()}
