"""Cache images and recordings as encoded bytes or paths, together with the other values of their records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from qatkit.data.folders import ClassFolders
from qatkit.data.source import BadRecord, FilePath, Source, missing
from qatkit.data.tokens import Encoded, Rows, prepare, refuse_stream
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.data.datamodule import Collate
    from qatkit.data.record_datamodule import RecordDataModule

Sample = dict[str, Any]
"""The values of a record; values of media columns are bytes or file paths."""
HEAD = 4
"""Number of bytes that encode the length of the JSON header."""


def pack(sample: Sample) -> NDArray[np.uint8]:
    """Return a sample as bytes: a JSON header, then the bytes of its media.

    Example:
        >>> unpack(pack({"image": b"GIF89a", "label": 3}))
        {'image': b'GIF89a', 'label': 3}
    """
    sizes = {name: len(value) for name, value in sample.items() if isinstance(value, bytes)}
    head = json.dumps([{**sample, **sizes}, list(sizes)]).encode()
    return np.frombuffer(b"".join([len(head).to_bytes(HEAD, "little"), head, *(sample[name] for name in sizes)]), "u1")


def unpack(packed: NDArray[np.uint8]) -> Sample:
    """Return the sample from the bytes that `pack` returned."""
    start = HEAD + int.from_bytes(packed[:HEAD].tobytes(), "little")
    sample, names = json.loads(packed[HEAD:start].tobytes())
    for name in names:
        size = sample[name]
        sample[name] = packed[start : start + size].tobytes()
        start += size
    return dict(sample)


def media_in(record: Mapping[str, Any], column: str) -> bytes | str:
    """Return the content or file path of an image or audio column.

    Args:
        record: A record whose column contains a path, bytes, or ``{"bytes": ..., "path": ...}``, the format of
            `datasets`.
        column: The name of the column.

    Raises:
        BadRecord: the column is missing or empty, does not contain a file, or contains the path of a file that does not
            exist.
    """
    if column not in record:
        raise missing(record, column)
    value = record[column]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value in ("", b""):
        raise BadRecord(f"column '{column}' is empty")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise BadRecord(f"column '{column}' contains {type(value).__name__}, not a file")
    path = value.resolved() if isinstance(value, FilePath) else Path(value)
    if not path.is_file():
        raise BadRecord(f"column '{column}' refers to {path}, which does not exist")
    return str(path)


def content_of(media: bytes | str) -> bytes:
    """Return the bytes of a media column.

    Raises:
        OSError: the file cannot be read.
    """
    return media if isinstance(media, bytes) else Path(media).read_bytes()


def encode_samples(
    records: Sequence[Mapping[str, Any]], sample_of: Callable[[Mapping[str, Any]], Sample | BadRecord]
) -> list[Encoded]:
    """Encode records in multiple threads, because decoding their media takes most of the time."""

    def encode(record: Mapping[str, Any]) -> Encoded:
        try:
            sample = sample_of(record)
        except BadRecord as reason:
            return reason
        except OSError as error:  # it may not be read, or its name is too long for a path
            return BadRecord(f"a file cannot be read ({error})")
        return sample if isinstance(sample, BadRecord) else [{"packed": pack(sample)}]

    with ThreadPoolExecutor() as threads:
        return list(threads.map(encode, records))


class MediaRecords(Dataset[Any]):
    """Samples that are decoded when they are read.

    Args:
        open_rows: Opens the split.
        decode: Creates a sample from its stored values and a generator for random augmentation.
        seed: Determines the random augmentation, together with the pass and the index of the sample.
        moving: Augment samples differently in each pass.
    """

    def __init__(
        self,
        open_rows: Callable[[], Rows],
        decode: Callable[[Sample, torch.Generator], Any],
        seed: int,
        moving: bool,
    ) -> None:
        self.open_rows = open_rows
        self.decode = decode
        self.seed = seed
        self.moving = moving
        self._pass = 0

    @cached_property
    def rows(self) -> Rows:
        """The split."""
        return self.open_rows()

    def set_pass(self, number: int) -> None:
        """Start a pass over the data."""
        self._pass = number if self.moving else 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        sample = unpack(self.rows.row(index)["packed"])
        generator = torch.Generator().manual_seed(hash((self.seed, self._pass, index)) % 2**63)
        try:
            return self.decode(sample, generator)
        except (OSError, BadRecord) as error:  # the file has changed since the data were prepared
            files = [value for value in sample.values() if isinstance(value, str)]
            raise QatkitError(
                f"sample {index} can no longer be read ({error})",
                key=", ".join(files) or "data",
                advice="restore the file, or remove it from the data and run again",
            ) from error


@dataclass(frozen=True)
class Loading:
    """How samples are loaded: batch size, order and worker processes."""

    workers: int
    batch_size: int
    seed: int


def media_module(
    source: Source,
    options: dict[str, Any],
    media: Sequence[str],
    sample_of: Callable[[Mapping[str, Any]], Sample | BadRecord],
    decode: Callable[[Sample, torch.Generator, bool], Any],
    task: str,
    classes: Sequence[str],
    loading: Loading,
    folder_label: str | None = None,
    collate: Collate | None = None,
) -> RecordDataModule:
    """Create the data module for a factory whose samples are decoded from media columns.

    Args:
        source: The records.
        options: All other inputs that determine the stored samples, as plain data.
        media: Names of the media columns.
        sample_of: Returns the values of a record to store, or the reason why it cannot be used.
        decode: Creates a sample from stored values, a generator for random augmentation, and whether to augment.
        task: Name of a task in `qatkit.tasks.TASKS`.
        classes: Class names in the order of the model's outputs.
        loading: How samples are loaded.
        folder_label: The class column for files in class folders. If None, a folder raises an error.
        collate: Combines samples into a batch; the default is torch's collation.
    """
    from qatkit.data.record_datamodule import RecordDataModule

    refuse_stream(source)

    def folder() -> Path:
        folders = None if folder_label is None else ClassFolders(media[0], folder_label, classes)
        return prepare(source, None, options, partial(encode_samples, sample_of=sample_of), media, folders)

    def dataset(rows: Callable[[], Rows], split: str) -> MediaRecords:
        training = split == "train"
        return MediaRecords(rows, lambda sample, draw: decode(sample, draw, training), loading.seed, moving=training)

    return RecordDataModule(
        folder, dataset, loading.batch_size, loading.seed, task, classes, collate, workers=loading.workers
    )
