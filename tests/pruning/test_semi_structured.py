"""2:4 sparse kernels give the results of dense ones; unsupported devices and layers are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatkit import QatkitError, QatkitWarning, nm_mask
from qatkit.pruning.semi_structured import is_two_of_four, use_sparse_kernels


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 128))
    for index in (0, 2):
        model[index].weight.data.mul_(nm_mask(model[index].weight, 2, 4))
    return model


def test_2_of_4_sparsity_is_recognized() -> None:
    weight = torch.randn(8, 16)
    assert not is_two_of_four(weight)
    assert is_two_of_four(weight * nm_mask(weight, 2, 4))
    assert is_two_of_four(weight * nm_mask(weight, 1, 4))
    assert not is_two_of_four(torch.zeros(4, 6))


def test_a_model_without_a_gpu_is_refused_and_unchanged() -> None:
    model = network()
    with pytest.raises(QatkitError, match=r"layer '0' is on cpu, but 2:4 kernels need an NVIDIA GPU; use model\.cu"):
        use_sparse_kernels(model)
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sparse_kernels_give_the_results_of_dense_ones() -> None:
    model = network().cuda().bfloat16()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model.double()(x.double())
        model.bfloat16()
        assert use_sparse_kernels(model) == ["0", "2"]
        assert type(model[0].weight.data) is not torch.Tensor
        torch.testing.assert_close(model(x).double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_unsupported_layers_are_named() -> None:
    model = nn.Sequential(network()[0], nn.ReLU(), nn.Linear(512, 3)).cuda().bfloat16()
    with pytest.raises(QatkitError, match=r"the weight of layer '2', of shape .*, is not 2:4 sparse"):
        use_sparse_kernels(model)
    model[2].weight.data.mul_(nm_mask(model[2].weight, 2, 4))
    with pytest.warns(QatkitWarning, match=r"layers \['2'\] stay dense"):
        assert use_sparse_kernels(model) == ["0"]
    with pytest.raises(QatkitError, match=r"the weight of layer '0' is torch\.float32; use model\.to"):
        use_sparse_kernels(network().cuda())
