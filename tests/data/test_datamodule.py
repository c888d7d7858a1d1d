"""The order of training: epochs as slices of a pass, for every process its own part; and worker processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DistributedSampler

from qatkit import QatkitError
from qatkit.data import Source, digits, image_classification
from qatkit.data.datamodule import SlicedSampler, SplitDataModule, unsliced
from qatkit.data.pictures import ImageFormat
from tests.data.files import write_images

DATA: Any = list(range(103))


def order(sampler: DistributedSampler[Any], epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("size", [None, 200])
def test_without_slices_it_is_the_sampler_of_torch(size: int | None) -> None:
    ours = SlicedSampler(DATA, 2, 1, seed=3, size=size)
    torchs: DistributedSampler[Any] = DistributedSampler(DATA, 2, 1, seed=3, drop_last=True)
    for epoch in range(3):
        assert order(ours, epoch) == order(torchs, epoch)


def test_the_slices_of_one_pass_share_no_sample_and_every_pass_has_another_order() -> None:
    samplers = [SlicedSampler(DATA, 2, rank, seed=3, size=20) for rank in range(2)]
    first = [order(sampler, epoch) for epoch in range(2) for sampler in samplers]
    assert [len(part) for part in first] == [20] * 4
    assert len({sample for part in first for sample in part}) == 80
    assert order(samplers[0], 2) != order(samplers[0], 0)
    assert order(samplers[0], 0) == first[0]


def test_what_is_read_unsliced_does_not_depend_on_whether_the_processes_have_met() -> None:
    def first() -> list[int]:
        loader = SplitDataModule(DATA, DATA, DATA, batch_size=4, seed=3).train_dataloader()
        return next(iter(loader)).tolist()

    alone = first()
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        assert first() != alone  # its slice
        with unsliced():
            assert first() == alone
        assert first() != alone
    finally:
        distributed.destroy_process_group()


def test_digits_have_any_size_from_one() -> None:
    assert digits(size=16).train[0][0].shape == (1, 16, 16)
    for size in (0, -8):
        with pytest.raises(QatkitError, match=f"^size: {size} is out of range; use a positive integer"):
            digits(size=size)
    assert digits(0.1, 0.2, 0, 32, 5).batch_size == 32  # `size` was added later, so it comes last


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_worker_processes_read_the_same_batches_and_raise_the_same_error(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_images(tmp_path / "photos", ["cat", "dog"])
    source = Source(str(path), val_fraction=0.2, test_fraction=0.2)
    alone, parallel = (
        image_classification(source, images=ImageFormat(size=8), batch_size=4, workers=workers) for workers in (0, 2)
    )
    loaders = [getattr(data, f"{split}_dataloader")() for data in (alone, parallel)]
    expected, found = (list(loader) for loader in loaders)
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch, other, strict=True))
    for file in path.rglob("*.png"):
        file.unlink()
    errors = []
    for loader in loaders:
        with pytest.raises(QatkitError) as raised:
            list(loader)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert re.fullmatch(r"\S+\.png: sample \d+ can no longer be read \(.*\); restore the file, or remove .*", errors[1])


def test_an_error_of_batching_in_a_worker_process_is_raised_as_it_is() -> None:
    def collate(samples: object) -> None:
        raise QatkitError("the samples do not fit together", key="data", advice="use others")

    loader = SplitDataModule([1, 2], [1, 2], [1, 2], collate=collate, workers=1).val_dataloader()  # type: ignore[arg-type]
    with pytest.raises(QatkitError, match=r"^data: the samples do not fit together; use others$"):
        list(loader)
    with pytest.raises(QatkitError, match=r"^workers: -1 is out of range; use a non-negative integer$"):
        SplitDataModule([1], [1], [1], workers=-1)  # type: ignore[arg-type]
