"""Read the records of a dataset on the hub with the `datasets` library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qatkit.data.source import Part, Record, Source
from qatkit.errors import QatkitError, did_you_mean
from qatkit.hub import cannot_load, locate

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_NAMES = {"val": ("validation", "val", "valid", "dev"), "test": ("test",)}
"""The usual names of splits on the hub."""


def hub_parts(source: Source) -> dict[str, Part]:
    """Return the splits of a dataset on the hub.

    Raises:
        QatkitError: the dataset is not on the hub, access is denied, the hub does not respond, or the subset or split
            does not exist.
    """
    builder = _builder(source)
    try:
        names = [str(name) for name in builder.info.splits or _split_names(source)]
    except Exception as error:  # the library passes on errors of its dependencies
        raise _cannot_read(error, source) from error
    if "train" not in names:
        raise QatkitError(
            f"'{source.path}' has the splits {names}, but no 'train'", key="source.path", advice="use another dataset"
        )
    chosen = {"train": "train"}
    for split, wanted in (("val", source.val), ("test", source.test)):
        if wanted is not None and wanted not in names:
            raise QatkitError(
                f"'{source.path}' has no split '{wanted}'", key=f"source.{split}", advice=did_you_mean(wanted, names)
            )
        matching = [wanted] if wanted is not None else [name for name in _NAMES[split] if name in names]
        if matching:
            chosen[split] = matching[0]
    key = {"dataset": source.path, "subset": source.subset, "commit": builder.hash}
    return {split: Part({**key, "split": name}, _reader(source, name)) for split, name in chosen.items()}


def open_split(source: Source, split: str) -> IterableDataset:
    """Stream a split over the network without caching it.

    Raises:
        QatkitError: the hub does not provide the split.
    """
    from datasets import load_dataset

    try:
        return load_dataset(source.path, source.subset, split=split, streaming=True, revision=source.revision)
    except Exception as error:  # the library passes on errors of its dependencies
        raise _cannot_read(error, source) from error


def _cannot_read(error: Exception, source: Source) -> QatkitError:
    return cannot_load(error, "source.path", source.path, "use another dataset or subset")


def _builder(source: Source) -> Any:
    from datasets import load_dataset_builder

    name, offline = locate(source.path, "source.path", "files", None, "dataset")
    if offline:
        from datasets import config

        config.HF_HUB_OFFLINE = True  # the library would retry repeatedly
    try:
        return load_dataset_builder(name, source.subset, revision=source.revision)
    except Exception as error:  # the library passes on errors of its dependencies
        raise _cannot_read(error, source) from error


def _split_names(source: Source) -> list[str]:
    from datasets import get_dataset_split_names

    return list(get_dataset_split_names(source.path, source.subset, revision=source.revision))


def _reader(source: Source, split: str) -> Callable[[], Iterator[Record]]:
    def read() -> Iterator[Record]:
        for number, record in enumerate(open_split(source, split) if source.streaming else _loaded(source, split), 1):
            yield f"{source.path}, {split}, row {number}", record

    return read


def _loaded(source: Source, split: str) -> Dataset:
    from datasets import load_dataset

    try:
        data = load_dataset(source.path, source.subset, split=split, revision=source.revision)
    except Exception as error:  # the library passes on errors of its dependencies
        raise _cannot_read(error, source) from error
    for name, feature in data.features.items():
        if getattr(feature, "decode", False):  # images and recordings: the factory that uses them decodes them
            data = data.cast_column(name, replace(feature, decode=False))
    return data
