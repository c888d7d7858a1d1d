"""Recordings with one class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatkit.data.classification import check_classes, class_of
from qatkit.data.media import Loading, Sample, content_of, media_in, media_module
from qatkit.data.parts import class_folders
from qatkit.data.source import BadRecord, Source
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.data.record_datamodule import RecordDataModule

QUIET = 1e-7
"""Added to the variance of a recording before it is normalized; silence becomes zeros, as in transformers' feature
extractor of wav2vec 2.0."""


def audio_classification(
    source: Source,
    seconds: float,
    classes: Sequence[str] | None = None,
    column: str = "audio",
    label: str = "label",
    sampling_rate: int = 16000,
    workers: int = 0,
    batch_size: int = 16,
    seed: int = 0,
) -> RecordDataModule:
    """Recordings with one class each: pairs of waveforms ``[N, samples]`` and classes ``[N]``, for wav2vec 2.0.

    Channels are averaged. Waveforms are resampled, cropped or padded with zeros to the same length, and normalized to
    mean 0 and variance 1. Training crops are taken at random, others from the center.

    Args:
        source: A folder with one folder per class; or records with an audio column, which holds a path relative to the
            file that names it, or a recording as `datasets` stores it. Formats are those of libsndfile: WAV, FLAC,
            Ogg, MP3 and others.
        seconds: Length of a sample.
        classes: Class names in the order of the model's outputs. A record gives a name or an index. By default the
            names of the folders, sorted.
        column: The column with the recording.
        label: The column with the class.
        sampling_rate: Samples per second that the model expects.
        workers: Processes that read recordings; 0 reads them in the training process.
        batch_size: Recordings per device and step.
        seed: Determines the training order and the random crops.

    Raises:
        QatkitError: there are fewer than two classes; a recording is missing, empty, cannot be decoded or contains
            NaN; a record has no known class; a number is out of range; or a split would be empty.
    """
    folder = Path(source.path).expanduser()
    if classes is None and folder.is_dir():
        classes = class_folders(folder)
    known = list(classes or [])
    check_classes(known)
    length = round(seconds * sampling_rate)
    if length < 1 or sampling_rate < 1:
        raise QatkitError(
            f"{seconds} seconds at a sampling rate of {sampling_rate} are {length} samples",
            key="seconds",
            advice="use numbers above 0",
        )

    def sample_of(record: Mapping[str, Any]) -> Sample | BadRecord:
        number, media = class_of(record, label, known), media_in(record, column)
        for bad in (number, media):
            if isinstance(bad, BadRecord):
                return bad
        waveform(content_of(media), column, sampling_rate)  # type: ignore[arg-type]  # no BadRecord is left
        return {"audio": media, "label": number}

    def decode(sample: Sample, generator: torch.Generator, random: bool) -> tuple[Tensor, int]:
        wave = torch.from_numpy(waveform(content_of(sample["audio"]), column, sampling_rate)).float()
        spare = len(wave) - length
        if spare > 0:
            start = int(torch.randint(spare + 1, (), generator=generator)) if random else spare // 2
            wave = wave[start : start + length]
        wave = (wave - wave.mean()) / (wave.var(correction=0) + QUIET).sqrt()
        return torch.nn.functional.pad(wave, (0, length - len(wave))), sample["label"]

    options = {"kind": "audio_classification", "columns": [column, label], "classes": known}
    loading = Loading(workers, batch_size, seed)
    return media_module(source, options, [column], sample_of, decode, "classification", known, loading, label)


def waveform(content: bytes, column: str, sampling_rate: int) -> NDArray[np.float64]:
    """Decode a recording ``[samples]``, averaged over its channels, at a sampling rate.

    Raises:
        BadRecord: it cannot be decoded, has no samples, or contains NaN or infinite values.
        QatkitError: soundfile or SciPy is not installed.
    """
    try:
        import soundfile
        from scipy.signal import resample_poly
    except ImportError as error:
        raise QatkitError(
            f"{error.name}, which decodes recordings, is not installed",
            key="data.factory",
            advice="run: pip install 'qatkit[audio]'",
        ) from error
    try:
        samples, rate = soundfile.read(BytesIO(content), always_2d=True)
    except Exception as error:  # libsndfile's errors, and those of its binding on damaged headers
        raise BadRecord(
            f"column '{column}' cannot be decoded as audio ({' '.join(str(error).split())[:100]})"
        ) from error
    mono: NDArray[np.float64] = samples.mean(axis=1)
    if not len(mono):
        raise BadRecord(f"column '{column}' has no samples")
    if not np.isfinite(mono).all():
        raise BadRecord(f"column '{column}' contains NaN or infinite samples")
    if rate == sampling_rate:
        return mono
    shared = gcd(rate, sampling_rate)
    resampled: NDArray[np.float64] = resample_poly(mono, sampling_rate // shared, rate // shared)
    return resampled


audio_classification.task = "classification"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
