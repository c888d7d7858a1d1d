"""Draw the pictures of the documentation with the functions that they explain: python docs/pictures.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from qatkit import QuantSpec, fake_quantize

DOCS = Path(__file__).parent


def fake_quantization(path: Path) -> None:
    """The staircase of three bits and its straight-through gradient."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qatkit"  # the same file each time
    from matplotlib import pyplot as plt

    spec = QuantSpec(num_bits=3, strategy="tensor")
    scale, zero_point = torch.tensor(0.25), torch.tensor(0)
    x = torch.linspace(-1.5, 1.25, 1101, requires_grad=True)
    y = fake_quantize(x, scale, zero_point, spec)
    y.sum().backward()
    figure, (forward, backward) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    forward.plot(x.detach(), x.detach(), color="0.7", linestyle="--", label="x")
    forward.plot(x.detach(), y.detach(), color="tab:blue", label="fake_quantize(x)")
    forward.set(title="Forward: 3 bits, scale 0.25", xlabel="latent weight x", ylabel="weight used")
    forward.legend()
    backward.plot(x.detach(), x.grad, color="tab:orange")
    backward.set(
        title="Backward: straight-through gradient", xlabel="latent weight x", ylabel="gradient", ylim=(-0.1, 1.2)
    )
    for axes in (forward, backward):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    fake_quantization(DOCS / "fake_quantization.svg")
