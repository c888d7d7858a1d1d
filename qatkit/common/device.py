"""The device that Lightning's ``accelerator`` setting stands for."""

from __future__ import annotations

import torch


def device_type(accelerator: str) -> str:
    """The type of device that a Trainer with this accelerator trains on, such as "cuda".

    Args:
        accelerator: As Lightning takes it: "auto", "gpu", or the name of one.
    """
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]  # there is one
    return "cpu"
