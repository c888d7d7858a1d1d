"""Resolve names of local folders or Hugging Face Hub repositories, with errors that explain failures."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from qatkit.errors import QatkitError

TIMEOUT = 10.0
"""Timeout of a request to the hub in seconds; without it, the hub libraries would retry for minutes."""


def locate(
    name: str, argument: str, holds: str, marker: str | None, kind: Literal["model", "dataset"] = "model"
) -> tuple[str, bool]:
    """Resolve a name to a local folder, or return it unchanged if it is a repository on the hub.

    Args:
        name: A folder, or the name of a repository on the hub; an existing folder takes precedence.
        argument: Name of the argument, for errors.
        holds: The expected content of the folder, for errors.
        marker: A file that a cached model must have; None for a dataset.
        kind: The type of the repository.

    Returns:
        The folder or name, and whether only the local cache may be used because the hub cannot be reached.

    Raises:
        QatkitError: the folder does not exist, the repository is not on the hub, access is denied, or the hub does not
            respond.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return str(local), False
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise QatkitError(f"'{name}' is not a folder", key=argument, advice=f"use a folder that contains {holds}")
    return name, _is_only_cached(name, argument, marker, kind)


def cannot_load(error: BaseException, argument: str, name: str, advice: str, described: str = "") -> QatkitError:
    """Return a one-line error for a folder or hub repository that cannot be loaded.

    Args:
        error: The exception that the library raised.
        argument: Name of the argument, for the error.
        name: The folder or repository.
        advice: The fix; a gated repository has its own advice.
        described: The kind of object to load, such as "causal language model".
    """
    if _is_gated(error):
        return QatkitError(
            f"'{name}' is gated, and the hub denied access",
            key=argument,
            advice="accept the conditions on its hub page, then log in with `hf auth login`",
        )
    wanted = f" as a {described}" if described else ""
    return QatkitError(f"'{name}' cannot be loaded{wanted} ({_one_line(error)})", key=argument, advice=advice)


def holds_tokenizer(name: str) -> bool:
    """Whether a folder contains a tokenizer; without one, transformers would create an untrained tokenizer.

    A repository on the hub is assumed to have one.
    """
    folder = Path(name).expanduser()
    return not folder.is_dir() or any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


@lru_cache(maxsize=64)  # a run builds its model and data for every stage; errors are not cached
def _is_only_cached(name: str, argument: str, marker: str | None, kind: Literal["model", "dataset"]) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
    except Exception as error:  # errors of the HTTP library and of the hub share no base class
        if _is_cached(name, marker):
            return True
        if _is_gated(error):
            raise cannot_load(error, argument, name, "") from error
        raise QatkitError(
            f"'{name}' is not a folder, and the request to the hub failed ({_one_line(error)})",
            key=argument,
            advice=f"use a folder that contains the {kind}, or use a hub name when the network is available",
        ) from error
    return False


def _is_cached(name: str, marker: str | None) -> bool:
    if marker is not None:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(name, marker), str)
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _is_gated(error: BaseException) -> bool:
    from huggingface_hub.errors import GatedRepoError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, GatedRepoError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
