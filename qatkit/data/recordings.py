"""Data module for audio classification: labeled recordings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatkit.data.classes import class_of
from qatkit.data.folders import classes_of
from qatkit.data.media import Loading, Sample, content_of, media_in, media_module
from qatkit.data.source import BadRecord, Source
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.data.record_datamodule import RecordDataModule

RATES = 1000, 768000
"""Valid sampling rates of recordings. Other rates come from corrupt files, and resampling from them would exhaust the
memory.
"""
LONGEST = 86400.0
"""Maximum length of a sample in seconds, which is one day."""
PADDING = 4096
"""Number of samples that MP3 encoders may add and decoders may remove."""
UNKNOWN = 0x7FFF0000
"""Sizes from this number on mark an unknown length in the header of a recording."""
QUIET = 1e-7
"""Added to the variance of a recording before normalization, so that silence becomes zeros, as in the wav2vec 2.0
feature extractor of transformers.
"""


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
    """Load labeled recordings for wav2vec 2.0: pairs of waveforms ``[N, samples]`` and classes ``[N]``.

    Channels are averaged. Waveforms are resampled, cropped or zero-padded to the same length, and normalized to mean 0
    and variance 1. Training uses random crops; evaluation uses center crops.

    Args:
        source: A folder with one subfolder per class, or records with an audio column. The column contains a path
            relative to the record's file, or a recording in the format of `datasets`. All libsndfile formats can be
            read, such as WAV, FLAC, Ogg and MP3.
        seconds: Length of a sample in seconds.
        classes: Class names in the order of the model's outputs. A record contains a name or an index. The default is
            the sorted names of the folders.
        column: The column with the recording.
        label: The column with the class.
        sampling_rate: Sampling rate that the model expects, in Hz.
        workers: Number of worker processes that read recordings; 0 reads them in the training process.
        batch_size: Recordings per device per step.
        seed: Determines the training order and the random crops.

    Raises:
        QatkitError: there are fewer than two classes; a recording is missing or empty, cannot be decoded or contains
            non-finite values; a record has an unknown class; an argument is out of range; or a split would be empty.
    """
    known = classes_of(source, classes)
    lowest, highest = RATES
    if not lowest <= sampling_rate <= highest:
        raise QatkitError(
            f"{sampling_rate} is out of range",
            key="sampling_rate",
            advice=f"use an integer from {lowest} to {highest}",
        )
    if not 1 / sampling_rate <= seconds <= LONGEST:  # false for NaN
        raise QatkitError(
            f"{seconds} is out of range", key="seconds", advice=f"use a number from 1 / sampling_rate to {LONGEST:.0f}"
        )
    length = round(seconds * sampling_rate)

    def sample_of(record: Mapping[str, Any]) -> Sample | BadRecord:
        number, media = class_of(record, label, known), media_in(record, column)
        waveform(content_of(media), column, sampling_rate)
        return number if isinstance(number, BadRecord) else {"audio": media, "label": number}

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
    """Decode a recording to a waveform ``[samples]`` at a given sampling rate, averaged over channels.

    Raises:
        BadRecord: the recording cannot be decoded, is truncated or empty, has an invalid sampling rate, or contains
            non-finite values.
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
        with soundfile.SoundFile(BytesIO(content)) as opened:
            rate, announced = opened.samplerate, opened.frames
            lost = _lost_bytes(opened.extra_info)
            samples = opened.read(always_2d=True)
            exact = opened.format != "MP3" or b"Xing" in content or b"Info" in content
    except Exception as error:  # libsndfile's errors, and those of its binding on damaged headers
        raise BadRecord(
            f"column '{column}' cannot be decoded as audio ({' '.join(str(error).split())[:100]})"
        ) from error
    mono: NDArray[np.float64] = samples.mean(axis=1)
    if not len(mono):
        raise BadRecord(f"column '{column}' has no samples")
    if lost or (exact and announced - len(mono) > PADDING):
        raise BadRecord(f"column '{column}' is truncated: it has {len(mono)} samples, but its header announces more")
    if not RATES[0] <= rate <= RATES[1]:
        raise BadRecord(f"column '{column}' has a sampling rate of {rate} Hz, outside {RATES[0]} to {RATES[1]} Hz")
    if not np.isfinite(mono).all():
        raise BadRecord(f"column '{column}' contains non-finite samples")
    if rate == sampling_rate:
        return mono
    shared = gcd(rate, sampling_rate)
    resampled: NDArray[np.float64] = resample_poly(mono, sampling_rate // shared, rate // shared)
    return resampled


def _lost_bytes(log: str) -> bool:
    """Whether the header of a WAV or AIFF file announces more data than the file has; libsndfile only logs it.

    Programs that write to a pipe announce the largest number that fits, because they cannot know the length.
    """
    sizes = re.findall(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", log)
    return any(int(found) < int(announced) < UNKNOWN for announced, found in sizes)


audio_classification.task = "classification"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`
audio_classification.media = ("column",)  # type: ignore[attr-defined]  # read by `qatkit.run.fingerprint`
