"""The device that Lightning chooses is known before there is a Trainer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer

from qatkit import QatkitError
from qatkit.common.device import check_accelerator, device_count, device_type


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_it_is_that_of_a_trainer(accelerator: str) -> None:
    trainer = Trainer(accelerator=accelerator, logger=False, enable_checkpointing=False)
    assert device_type(accelerator) == trainer.strategy.root_device.type
    assert device_count(accelerator, "auto") == trainer.num_devices


@pytest.mark.parametrize(
    ("mps", "cuda", "auto", "gpu"),
    [(True, True, "mps", "mps"), (False, True, "cuda", "cuda"), (False, False, "cpu", "cuda")],
)
def test_mps_goes_before_cuda_as_in_lightning(
    mps: bool, cuda: bool, auto: str, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert (device_type("auto"), device_type("gpu")) == (auto, gpu)


def test_a_gpu_that_is_not_there_is_refused_by_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_accelerator("auto")
    for accelerator in ("gpu", "cuda"):
        with pytest.raises(QatkitError, match=r"trainer\.accelerator: '\w+' is not available on this machine; use"):
            check_accelerator(accelerator)


def test_devices_are_counted_for_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [device_count(*arguments) for arguments in (("auto", "auto"), ("cpu", "auto"), ("gpu", 2))] == [4, 1, 2]
