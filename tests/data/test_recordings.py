"""Recordings: their length and rate, and bad ones that are named before training."""

from __future__ import annotations

import re
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch

from qatkit import QatkitError
from qatkit.data import Source, audio_classification
from qatkit.data.recordings import waveform
from tests.data.files import write_tones


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def source(path: Path, **options: Any) -> Source:
    return Source(str(path), val_fraction=0.2, test_fraction=0.2, **options)


def test_recordings_are_resampled_cropped_padded_and_normalized(tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    data = audio_classification(source(folder), seconds=0.1, batch_size=8, sampling_rate=16000)
    assert data.classes == ["high", "low"]
    waves, labels = next(iter(data.test_dataloader()))
    assert waves.shape[1] == 1600
    for wave, label in zip(waves, labels, strict=True):
        heard = wave[: int(wave.nonzero().max()) + 1]  # without the padding
        assert abs(float(heard.mean())) < 1e-2
        assert float(heard.std()) == pytest.approx(1.0, abs=2e-2)
        loudest = torch.fft.rfft(heard, 16000).abs().argmax()
        assert int(loudest) == pytest.approx({0: 1500, 1: 300}[int(label)], abs=12)


def test_a_bad_recording_is_named(tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    bad = folder / "low" / "bad.wav"
    for samples, problem in (
        (np.array([0.0, np.nan] * 99), "contains non-finite"),
        (np.zeros(0), "has no samples"),
    ):
        soundfile.write(bad, samples, 8000, subtype="FLOAT")
        with pytest.raises(QatkitError, match=rf"^.*low/bad\.wav: column 'audio' {problem}"):
            audio_classification(source(folder), seconds=0.1).prepare_data()
    bad.write_text("hello")
    with pytest.raises(QatkitError, match=r"^.*low/bad\.wav: column 'audio' cannot be decoded as audio"):
        audio_classification(source(folder), seconds=0.1).prepare_data()


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "aiff"])
def test_a_truncated_recording_is_named(kind: str, tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    bad = folder / "low" / f"bad.{kind}"
    soundfile.write(bad, np.random.default_rng(0).normal(0, 0.1, 16000), 8000)
    audio_classification(source(folder), seconds=0.1).prepare_data()
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    with pytest.raises(QatkitError, match=rf"low/bad\.{kind}: column 'audio' (is truncated|cannot be decoded)"):
        audio_classification(source(folder), seconds=0.1).prepare_data()


def test_a_recording_written_to_a_pipe_does_not_know_its_length_and_is_whole(tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    piped = folder / "low" / "piped.wav"
    soundfile.write(piped, np.full(999, 0.5), 8000)
    content = piped.read_bytes()
    piped.write_bytes(content[:40] + b"\xff" * 4 + content[44:])
    audio_classification(source(folder), seconds=0.1).prepare_data()
    assert len(waveform(piped.read_bytes(), "audio", 8000)) == 999


def test_impossible_sampling_rates_and_lengths_are_refused(tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    for seconds in (0.0, -1.0, nan, inf, 1e300):
        with pytest.raises(QatkitError, match=rf"^seconds: {re.escape(str(seconds))} is out of range; use a number"):
            audio_classification(source(folder), seconds)
    for rate in (0, 10**9):
        with pytest.raises(QatkitError, match=rf"^sampling_rate: {rate} is out of range; use an integer from 1000 to"):
            audio_classification(source(folder), 0.1, sampling_rate=rate)
    soundfile.write(folder / "low" / "bad.wav", np.zeros(9), 2**31 - 1)
    with pytest.raises(QatkitError, match=r"low/bad\.wav: column 'audio' has a sampling rate of 2147483647 Hz"):
        audio_classification(source(folder), 0.1).prepare_data()


def test_recordings_in_a_parquet_file_are_read_as_datasets_stores_them(tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    files = sorted(folder.rglob("*.wav"))
    rows = {
        "audio": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [int(file.parent.name == "low") for file in files],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "tones.parquet")
    data = audio_classification(source(tmp_path / "tones.parquet"), seconds=0.05, classes=["high", "low"])
    assert next(iter(data.test_dataloader()))[0].shape[1] == 800
