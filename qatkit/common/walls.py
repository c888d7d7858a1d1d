"""Restrict a command to its folder: paths outside it, and links that lead out of it, raise an error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qatkit.errors import QatkitError


def check_links(folder: Path, allowed: Sequence[Path] = ()) -> None:
    """Raise an error if a folder has a link through which a file outside it could be overwritten or deleted.

    Args:
        folder: The folder. It may itself be a link, and need not exist.
        allowed: Files and folders that links may point to.

    Raises:
        QatkitError: a link leads out of the folder; the error includes the link and its target.
    """
    roots = _real([folder, *allowed])
    for link, target in _links(str(folder)):
        if not _is_inside(target, roots) and not _is_log_of_wandb(Path(link)):
            raise QatkitError(
                f"this link leads to {target}, outside {folder}",
                key=link,
                advice=f"remove the link, or pass --allow-write {target} if qatkit may write and delete files there",
            )


def check_path(path: Path, folder: Path, allowed: Sequence[Path], key: str) -> None:
    """Raise an error if a recipe would write to a path that is neither in a folder nor allowed.

    Args:
        path: The path in the recipe.
        folder: The folder that may be written to.
        allowed: Additional files and folders that may be written to.
        key: The dotted key of the path, for errors.

    Raises:
        QatkitError: the path is outside `folder`, or contains a link that leads outside it.
    """
    if not _is_inside(os.path.realpath(path), _real([folder, *allowed])):
        raise QatkitError(
            f"'{path}' would be written outside the run folder {folder}",
            key=key,
            advice=f"remove the key, or pass --allow-write {path}",
        )
    check_links(path, [folder, *allowed])


def _links(folder: str) -> Iterator[tuple[str, str]]:
    """Every link below a folder, and below the folders that its links lead to, with its final target."""
    seen, waiting = {os.path.realpath(folder)}, [folder]
    while waiting:
        for place, folders, files in os.walk(waiting.pop()):
            for name in (*folders, *files):
                path = os.path.join(place, name)
                if not os.path.islink(path):
                    continue
                target = os.path.realpath(path)
                yield path, target
                if target not in seen and os.path.isdir(target):
                    seen.add(target)
                    waiting.append(target)


def _real(paths: Sequence[Path]) -> list[str]:
    return [os.path.realpath(path) for path in paths]


def _is_inside(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def _is_log_of_wandb(link: Path) -> bool:
    """W&B links its log of the machine in the folder of each run, and never writes through the link."""
    return link.name == "debug-core.log" and link.parent.name == "logs" and not link.is_dir()
