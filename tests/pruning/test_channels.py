"""Networks with fewer channels equal the original ones with those channels switched off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.models import cnn

pytest.importorskip("torch_pruning")
from qatkit.pruning.channels import prune_channels

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def removed(whole: Tensor, part: Tensor) -> list[int]:
    """Output channels of `whole` that are not in `part`."""
    return [i for i, row in enumerate(whole) if not any(torch.equal(row, kept) for kept in part)]


def test_the_smaller_network_equals_the_original_with_the_channels_off() -> None:
    model = cnn(channels=[8, 16]).eval()
    before = copy.deepcopy(model.state_dict())
    small = prune_channels(model, IMAGES, 0.5, exclude=["classifier"])
    assert (small.conv1.weight.shape, small.conv2.weight.shape) == ((4, 1, 3, 3), (8, 4, 3, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    off = removed(model.conv1.weight, small.conv1.weight)
    kept = [i for i in range(8) if i not in off]
    later = removed(model.conv2.weight[:, kept], small.conv2.weight)
    assert (len(off), len(later)) == (4, 8)
    with torch.no_grad():
        model.conv2.weight[:, off] = 0
        model.classifier.weight.view(10, 16, -1)[:, later] = 0
        torch.testing.assert_close(small(IMAGES), model(IMAGES), atol=1e-5, rtol=0)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.outer(self.inner(x).relu())).mean(dim=(2, 3)))


def test_channels_of_a_residual_sum_are_removed_together_and_counts_are_rounded() -> None:
    small = prune_channels(Residual(), IMAGES, 0.4, exclude=["head"], multiple=4)
    assert small.stem.out_channels == small.outer.out_channels == small.head.in_features == 4
    assert small.inner.out_channels % 4 == 0
    assert small(IMAGES).shape == (4, 3)


def test_a_layer_added_to_the_output_of_an_excluded_one_keeps_its_channels() -> None:
    small = prune_channels(Residual(), IMAGES, 0.5, exclude=["head", "stem"])
    assert (small.stem.out_channels, small.outer.out_channels, small.inner.out_channels) == (8, 8, 6)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(14), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([self.left(x), self.right(x)], dim=1)).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize("scored", [False, True])
def test_after_a_concatenation_the_norm_and_the_head_lose_the_channels_of_each_branch(scored: bool) -> None:
    model = Branches()
    model(5 * IMAGES)  # for statistics that tell channels apart
    scores = {"left": torch.arange(8.0), "right": torch.arange(6.0)} if scored else None
    small = prune_channels(model.eval(), IMAGES, 0.5, exclude=["head"], scores=scores)
    off = [removed(model.left.weight, small.left.weight), removed(model.right.weight, small.right.weight)]
    assert [len(channels) for channels in off] == [4, 3]
    assert not scored or off == [[0, 1, 2, 3], [0, 1, 2]]
    with torch.no_grad():
        model.head.weight[:, off[0] + [8 + channel for channel in off[1]]] = 0
        torch.testing.assert_close(small(IMAGES), model(IMAGES), atol=1e-6, rtol=0)


def test_mistakes_are_named() -> None:
    with pytest.raises(QatkitError, match=r"shape would change from \[4, 10\] to \[4, 5\]; exclude the output layer"):
        prune_channels(cnn(channels=[8, 16]), IMAGES, 0.5)
    with pytest.raises(QatkitError, match="'head' matches no linear or convolutional layer"):
        prune_channels(cnn(channels=[8, 16]), IMAGES, 0.5, exclude=["head"])
    with pytest.raises(QatkitError, match=r"ratio: 1.0 is out of range"):
        prune_channels(cnn(channels=[8, 16]), IMAGES, 1.0)
    model = cnn(channels=[8, 16])
    prepare_qat(model, QuantSpec(num_bits=4))
    with pytest.raises(QatkitError, match=r"is a QATConv2d, .*; prune before prepare_qat"):
        prune_channels(model, IMAGES, 0.5, exclude=["classifier"])


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.second, self.norm, self.head = nn.Conv2d(8, 6, 3), nn.GroupNorm(2, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.norm(self.second(x * self.gate(x).sigmoid())).mean(dim=(2, 3)))


def test_a_layer_that_would_keep_no_channel_is_named_with_the_largest_valid_ratio() -> None:
    for ratio in (0.9, 0.95):  # with 0.9 only the first would keep none
        with pytest.raises(
            QatkitError, match=r"a ratio of 0.9\d* removes all channels of layer 'conv1' \(8\); use a ratio of 0.875 or"
        ):
            prune_channels(cnn(channels=[8, 16]), IMAGES, ratio, exclude=["classifier"])
    small = prune_channels(cnn(channels=[8, 16]), IMAGES, 0.875, exclude=["classifier"])
    assert (small.conv1.out_channels, small.conv2.out_channels) == (1, 2)
    with pytest.raises(
        QatkitError, match=r"a ratio of 0.5 removes all channels of layer 'gate' \(1\); exclude the layer"
    ):
        prune_channels(Gated(), IMAGES, 0.5, exclude=["head"])
    with pytest.raises(
        QatkitError, match=r"layer 'second' \(6, kept in multiples of 2\); use a ratio of 0.666 or less"
    ):
        prune_channels(Gated(), IMAGES, 0.7, exclude=["head", "gate"])
    assert prune_channels(Gated(), IMAGES, 0.666, exclude=["head", "gate"]).second.out_channels == 2
    with pytest.raises(QatkitError, match=r"exclude: \['\*'\] excludes every layer whose channels can be removed"):
        prune_channels(cnn(channels=[8, 16]), IMAGES, 0.5, exclude=["*"])


def test_a_tenth_of_ten_channels_is_one() -> None:
    small = prune_channels(cnn(channels=[10, 20]), IMAGES, 1 - 0.1, exclude=["classifier"])
    assert (small.conv1.out_channels, small.conv2.out_channels) == (1, 2)


class Twice(nn.Module):
    def __init__(self, share: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third = self.second if share == "module" else nn.Conv2d(8, 8, 3, padding=1)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x)).relu()).mean(dim=(2, 3)))


def test_a_shared_weight_is_refused_and_a_layer_used_twice_is_shrunk_once() -> None:
    with pytest.raises(
        QatkitError, match=r"layer 'third' shares its weight with 'second.weight', .*; use one module in both"
    ):
        prune_channels(Twice("weight"), IMAGES, 0.5, exclude=["head"])
    small = prune_channels(Twice("module"), IMAGES, 0.5, exclude=["head"])
    assert small.third is small.second
    assert small.second.weight.shape == (4, 4, 3, 3)
