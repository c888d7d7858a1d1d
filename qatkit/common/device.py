"""Predict the devices that Lightning chooses for a recipe's ``trainer`` block, without a Trainer."""

from __future__ import annotations

import torch

from qatkit.errors import QatkitError


def device_type(accelerator: str) -> str:
    """Return the type of device that a Trainer with this accelerator trains on, such as "cuda".

    Lightning prefers MPS to CUDA and does not support XPU: a machine with only an XPU trains on the CPU.

    Args:
        accelerator: Lightning's argument: "auto", "gpu", or the name of one accelerator.

    Example:
        >>> device_type("cpu"), device_type("tpu")
        ('cpu', 'xla')
    """
    if accelerator in ("auto", "gpu"):
        if torch.backends.mps.is_available():
            return "mps"
        # "gpu" on a machine without one is a Lightning error, not a fallback to the CPU
        return "cuda" if accelerator == "gpu" or torch.cuda.is_available() else "cpu"
    return "xla" if accelerator == "tpu" else accelerator


def device_count(accelerator: str, devices: int | str) -> int:
    """Return the number of devices that a Trainer uses on one machine, which is its number of processes.

    Args:
        accelerator: As in `device_type`.
        devices: Lightning's argument: a number, or "auto" for all GPUs or one CPU.

    Example:
        >>> device_count("cpu", "auto"), device_count("cpu", 2)
        (1, 2)
    """
    if devices != "auto":
        return int(devices)
    return max(torch.cuda.device_count(), 1) if device_type(accelerator) == "cuda" else 1


def check_accelerator(accelerator: str) -> None:
    """Raise an error if the accelerator is a GPU that this machine does not have.

    Raises:
        QatkitError: there is no device of the accelerator's type.
    """
    kind = device_type(accelerator)
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise QatkitError(
            f"'{accelerator}' is not available on this machine", key="trainer.accelerator", advice="use auto or cpu"
        )
