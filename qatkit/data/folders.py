"""Folders with one subfolder of files per class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatkit.common.digests import sizes_digest, visible_files
from qatkit.data.classes import check_classes, class_of
from qatkit.data.files import READERS
from qatkit.data.source import BadRecord, FilePath, Part, Source
from qatkit.errors import QatkitError, QatkitWarning

_HELD_OUT = {"val", "valid", "validation", "dev", "test"}
_ADVICE = "put the files of each class in a separate subfolder"


@dataclass(frozen=True)
class ClassFolders:
    """How files in a folder with one subfolder per class are converted to records."""

    column: str
    """The column for the path."""
    label: str
    """The column for the class."""
    classes: Sequence[str]
    """Class names; the name of each subfolder is a class name or its index."""


def classes_of(source: Source, classes: Sequence[str] | None) -> list[str]:
    """Return the configured class names, or else the sorted names of the subfolders of the source.

    Raises:
        QatkitError: there are fewer than two classes, a name occurs twice, or there are no class names.
    """
    if classes is None:
        folder = Path(source.path).expanduser()
        if not folder.is_dir():
            if any(sign in source.path for sign in "*?[") or Path(source.path).suffix in READERS:
                raise QatkitError(
                    f"is not set, and '{source.path}' is a table, not a folder with one subfolder per class",
                    key="classes",
                    advice="list the class names in the order of the model's outputs",
                )
            raise QatkitError(
                f"there is no folder '{source.path}'",
                key="source.path",
                advice="use an existing folder with one subfolder per class, or set classes for a dataset on the hub",
            )
        classes = class_folders(folder)
        _refuse_splits(folder, classes, "source.path")
        if len(classes) < 2:
            found = f"only one subfolder, '{classes[0]}'" if classes else "no subfolder"
            raise QatkitError(f"'{folder}' contains {found}", key="source.path", advice=_ADVICE)
    check_classes(classes)
    return list(classes)


def folder_part(folder: Path, kind: ClassFolders, split: str, key: str, skip_bad: bool) -> Part:
    """Return the records of a folder: one per file, with its path and the name of its subfolder.

    Args:
        folder: The folder.
        kind: How files are converted to records.
        split: Name of the split; for training, each class needs files.
        key: Dotted key of the folder, for errors.
        skip_bad: Whether files in subfolders with unknown names are skipped.

    Raises:
        QatkitError: the folder has no files, a subfolder has no class, or a class has no files.
    """
    files = files_of(folder)
    if not files:
        raise QatkitError(f"'{folder}' contains no subfolder with files", key=key, advice=_ADVICE)
    names = class_folders(folder)
    known = {name: class_of({kind.label: name}, kind.label, kind.classes) for name in names}
    for name, number in known.items():
        if isinstance(number, BadRecord) and not skip_bad:
            _refuse_splits(folder, names, key)
            raise QatkitError(
                f"'{folder}' contains the subfolder '{name}', which is not one of the classes {list(kind.classes)}",
                key=key,
                advice="rename the subfolder or add the class, or set source.skip_bad: true to skip its files",
            )
    filled = {known[path.relative_to(folder).parts[0]] for path in files}
    empty = [name for index, name in enumerate(kind.classes) if index not in filled]
    if empty and split == "train":
        raise QatkitError(
            f"'{folder}' contains no files of the class '{empty[0]}'",
            key=key,
            advice=f"add files to the subfolder '{empty[0]}', or remove it from the classes",
        )
    stray = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if stray:
        warnings.warn(
            f"{key}: '{folder}' contains files outside its class folders, such as '{stray[0]}'; these files "
            f"({len(stray)}) are not used",
            QatkitWarning,
            stacklevel=2,
        )

    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        for path in files:
            inside = path.relative_to(folder)
            yield str(path), {kind.column: FilePath(str(inside), folder), kind.label: inside.parts[0]}

    listing = sizes_digest(((path.relative_to(folder).as_posix(), path) for path in files), times=True)
    return Part({"folder": str(folder), "listing": listing}, read)


def _refuse_splits(folder: Path, names: Sequence[str], key: str) -> None:
    lower = {name.lower() for name in names}
    if lower and (("train" in lower and lower & _HELD_OUT) or lower <= {"train", *_HELD_OUT}):
        raise QatkitError(
            f"'{folder}' contains the subfolders {list(names)}, which are splits, not classes",
            key=key,
            advice=f"set source.path: {folder / 'train'}, and source.val and source.test to the other folders; if they "
            "are classes, list them under classes",
        )


def files_of(folder: Path) -> list[Path]:
    """Return the sorted files in the class folders, without hidden files."""
    return [path for path in visible_files(folder) if path.parent != folder]


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the subfolders of a folder, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
