"""Names that stand for a folder here or for something on the hub: found at once, or refused at once with the reason."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from qatkit.errors import QatkitError

TIMEOUT = 10.0
"""Seconds that the hub has to say whether it knows a name; the libraries on top of it would try for minutes."""


def locate(
    name: str, argument: str, holds: str, marker: str | None, kind: Literal["model", "dataset"] = "model"
) -> tuple[str, bool]:
    """The folder that a name stands for, or the name itself where it is one of the hub.

    Args:
        name: A folder, or the name of a repository on the hub; what is a folder here is taken as that.
        argument: What the name was given as, for errors.
        holds: What the folder should hold, for errors.
        marker: A file that a model in the hub's cache must have; None for a data set.
        kind: Of the repository.

    Returns:
        The folder or name, and whether the hub cannot be asked, so that only its cache here may be used.

    Raises:
        QatkitError: there is no such folder, and the hub does not know the name, does not give it, or does not answer.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return str(local), False
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise QatkitError(f"{argument}: '{name}' is no folder; write one that holds {holds}")
    return name, _is_only_cached(name, argument, marker, kind)


def explain(error: BaseException, argument: str, name: str, described: str = "") -> str:
    """Why something of the hub cannot be loaded, in one line; the advice where a licence must be accepted first."""
    from huggingface_hub.errors import GatedRepoError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, GatedRepoError):
            return (
                f"{argument}: '{name}' is gated, and the hub does not give it to you; accept its conditions on its "
                "page, then log in with `hf auth login`"
            )
        seen = seen.__cause__ or seen.__context__
    said = " ".join(str(error).split())
    wanted = f" as a {described}" if described else ""
    return f"{argument}: '{name}' cannot be loaded{wanted} ({said[:200]})"


def holds_tokenizer(name: str) -> bool:
    """Whether a folder holds a tokenizer, without which transformers makes one that knows nothing.

    Of a name on the hub it is taken for granted.
    """
    folder = Path(name).expanduser()
    return not folder.is_dir() or any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


@lru_cache(maxsize=64)  # a run builds its model and data for every stage; what was refused is asked again
def _is_only_cached(name: str, argument: str, marker: str | None, kind: Literal["model", "dataset"]) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT)
    except Exception as error:  # those of the hub's HTTP library share no class with the hub's own
        if _is_cached(name, marker):
            return True
        raise QatkitError(
            f"{_asked(error, argument, name)}; write a folder that holds the {kind}, or the name of one on the hub "
            "while there is a network"
        ) from error
    return False


def _is_cached(name: str, marker: str | None) -> bool:
    if marker is not None:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(name, marker), str)
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _asked(error: Exception, argument: str, name: str) -> str:
    said = explain(error, argument, name)
    if " is gated" in said:
        return said
    return f"{argument}: '{name}' is no folder, and asking the hub for it failed ({' '.join(str(error).split())[:200]})"
