"""A trained digits network, and quantized copies of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QuantSpec, calibrate, prepare_qat
from qatkit.data import digits
from qatkit.export.openvino import runtime as openvino_runtime
from qatkit.export.verification import Verification, verify
from qatkit.models import cnn
from qatkit.quantization.folding import fold_batchnorm

INT8 = QuantSpec(num_bits=8)
UINT8 = QuantSpec(num_bits=8, symmetric=False, strategy="tensor")
Quantized = Callable[..., nn.Module]
Images = tuple[Tensor, Tensor]


def batches(images: Images) -> list[Images]:
    return list(zip(images[0].split(64), images[1].split(64), strict=True))


def checked(model: nn.Module, path: Path, images: Images) -> Verification:
    return verify(model, path, batches(images), threads=1)


@pytest.fixture(scope="session", autouse=True)
def one_openvino_thread() -> Iterator[None]:
    """Processes of the suite share the cores; OpenVINO's plugin once crashed in one of its threads under this load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(openvino_runtime.PRECISE, "INFERENCE_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def images() -> tuple[Tensor, Tensor]:
    """Test images and labels of the digits."""
    return digits().test.tensors


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """The digits network after 150 steps, BatchNorm folded."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, (x, y) = cnn(), digits().train.tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.eval()
    fold_batchnorm(model)
    return model


@pytest.fixture(scope="session")
def quantized(trained: nn.Module, images: tuple[Tensor, Tensor]) -> Quantized:
    """Make a calibrated copy of the trained network."""

    def make(weight: QuantSpec | None = INT8, activation: QuantSpec | None = UINT8) -> nn.Module:
        model = copy.deepcopy(trained)
        prepare_qat(model, weight=weight, activation=activation)
        calibrate(model, [images[0]])
        return model

    return make
