"""Networks whose data flow is unusual: what cannot be placed stays in floating point, and nothing else is quantized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.quantization import calibrate, prepare_for_target
from qatkit.quantization.placement.points import placement_of


class Conditioned(nn.Module):
    """A residual addition of the network's input, and a second input of another range."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scaled: Tensor = self.out(x + self.body(x)) * time
        return scaled


class Padded(nn.Module):
    """Padding with a constant between two convolutions."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.one, self.two, self.value = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(F.pad(F.relu(self.one(x)), (1, 1, 1, 1), value=self.value))
        return out


class Named(nn.Module):
    """A pooling whose argument is passed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.mean(input=F.relu(self.conv(x)), dim=(2, 3)))
        return logits


class PooledTwice(nn.Module):
    """A pooling layer and a mean in one forward, which share a count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        logits: Tensor = self.head(torch.cat([self.pool(x).flatten(1), x.mean((2, 3))], 1))
        return logits


class Resized(nn.Module):
    """A bilinear resize, whose results lie between codes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(F.interpolate(F.relu(self.one(x)), scale_factor=2.0, mode="bilinear"))
        return out


def points(model: nn.Module, *inputs: Tensor) -> dict[str, tuple[str, ...]]:
    """The readers of each point, after checking that quantization changes the outputs by a few percent at most."""
    torch.manual_seed(0)
    expected = model.eval()(*inputs)
    prepare_for_target(model, "onnxruntime", inputs)
    calibrate(model, [inputs], lambda batch: model(*batch))
    error = (model.eval()(*inputs) - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.05
    return {f"{point.module}.{point.part}": point.readers for point in placement_of(model).points}


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_another_input_of_a_module_is_not_quantized_with_the_image() -> None:
    assert points(Conditioned(), images(), torch.tensor([1000.0])) == {"body.output": (), "out.output": ()}


def test_a_sequence_is_not_given_a_quantizer_that_it_would_run() -> None:
    model = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3))
    assert points(model, images()) == {"1.output": ()}
    assert len(model) == 2


@pytest.mark.parametrize(("value", "readers"), [(0.0, ("two",)), (0.3, ())])
def test_padding_with_zeros_keeps_the_grid_and_other_constants_do_not(value: float, readers: tuple[str, ...]) -> None:
    model = Padded(value)
    assert points(model, images())[".relu_0"] == readers
    assert model.two.input_on_grid == bool(readers)


def test_arguments_may_be_passed_by_name() -> None:
    assert points(Named(), images()) == {".relu_0": (), ".pool_0": ("head",)}


def test_a_pooling_layer_and_a_mean_are_both_counted() -> None:
    model, x = PooledTwice().eval(), torch.rand(2, 3, 4, 4)
    prepare_for_target(model, "onnxruntime", x)
    calibrate(model, [x])
    parts = [(point.module, point.part) for point in placement_of(model).points]
    assert parts == [("", "relu_0"), ("", "pool_1"), ("", "cat_0"), ("pool", "output")]


def test_what_a_resize_interpolates_is_rounded_to_the_same_grid_again() -> None:
    model = Resized()
    assert points(model, images()) == {".relu_0": ("two",), ".resize_0": (), "two.output": ()}
    assert model.two.input_fake_quant is model.resize_0_fake_quant is model.relu_0_fake_quant
    seen: list[Tensor] = []
    model.two.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images())
    assert len(seen[0].unique()) <= 256


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(RuntimeError, match="channels"):
        prepare_for_target(model, "onnxruntime", torch.zeros(1, 5, 8, 8))
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
