"""Placed quantizers train, copy, compile, resume and load as the layers do."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from qatkit.callbacks import QuantizationAwareTraining, load_quantized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from qatkit import QatkitError
from qatkit.quantization import calibrate, load_quantizers, prepare_for_target, save_quantizers, strip_qat
from qatkit.quantization.coverage import coverage
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.placement.points import placement_of
from qatkit.spec import QuantSpec
from tests.quantization.placement.networks import Block, Denoiser, ResNet, trained_like


def prepared(model: nn.Module, **how: QuantSpec) -> tuple[nn.Module, Tensor]:
    x = torch.randn(8, 3, 16, 16)
    prepare_for_target(trained_like(model), "onnxruntime", x[:2], **how)  # type: ignore[arg-type]
    calibrate(model, [x])
    return model, x


def test_a_residual_sum_is_quantized_once_behind_its_relu() -> None:
    model, _ = prepared(ResNet())
    points = {f"{point.module}.{point.part}": point.readers for point in placement_of(model).points}
    assert points == {
        "stem.2.output": ("blocks.0.conv1",),
        "blocks.0.relu_0": ("blocks.0.conv2",),
        "blocks.0.conv2.output": (),
        "blocks.0.relu_1": ("blocks.1.conv1", "blocks.1.down.0"),
        "blocks.1.relu_0": ("blocks.1.conv2",),
        "blocks.1.conv2.output": (),
        "blocks.1.down.0.output": (),
        "blocks.1.relu_1": (),
        "pool.output": ("head",),
    }
    assert model.blocks[1].conv1.input_fake_quant is model.blocks[1].down[0].input_fake_quant


def test_the_outputs_have_at_most_256_values_and_zero_stays_zero() -> None:
    model, x = prepared(ResNet())
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
    model(x)
    codes = seen[0].unique()
    assert len(codes) <= 256
    assert codes[0] == 0, "ReLU's zero is code 0, otherwise ONNX Runtime does not absorb it"


def test_gradients_reach_every_parameter_and_learned_scales_move() -> None:
    learned = QuantSpec(7, observer="lsq"), QuantSpec(8, symmetric=False, strategy="tensor", observer="lsq")
    model, x = prepared(ResNet(), weight=learned[0], activation=learned[1])
    model.train()
    model(x).square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert idle == []
    points = [name for name, _ in model.named_parameters() if "relu_1_fake_quant.scale" in name]
    assert points == ["blocks.0.relu_1_fake_quant.scale", "blocks.1.relu_1_fake_quant.scale"]


def test_copies_and_pickles_compute_the_same() -> None:
    model, x = prepared(ResNet())
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_compiled_without_graph_break() -> None:
    model, x = prepared(Block(3, 8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_stripping_restores_the_classes_and_removes_every_hook() -> None:
    model, x = prepared(ResNet())
    plain = trained_like(ResNet())
    fold_batchnorm(plain)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "fake_quant" not in key})
    strip_qat(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(x), plain(x))


def test_a_forward_that_runs_other_operations_is_named() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.again, self.calm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), True

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x))
            return self.again(x if self.calm else F.relu(x))

    model, x = prepared(Moody())
    model.calm = False  # type: ignore[assignment]
    with pytest.raises(QatkitError, match=r"Moody\.forward ran the operations \{'relu': 2\}, but it ran \{'relu': 1\}"):
        model(x)


def test_saved_quantizers_load_into_a_new_model(tmp_path: Path) -> None:
    model, x = prepared(Denoiser())
    save_quantizers(model, tmp_path / "q.safetensors")
    fresh = Denoiser().eval()
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "fake_quant" not in key})
    load_quantizers(fresh, tmp_path / "q.safetensors")
    assert placement_of(fresh) == placement_of(model)
    assert torch.equal(fresh(x), model(x))


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet()

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, epochs: int, **more: object) -> Trainer:
    return Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def fit(folder: Path, epochs: int, resume: Path | None = None) -> Classifier:
    seed_everything(0)
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
    data = DataLoader(TensorDataset(images, labels), batch_size=8)
    module = Classifier()
    keep = ModelCheckpoint(folder, save_last=True)
    learned = QuantSpec(8, symmetric=False, strategy="tensor", observer="lsq")
    quantize = QuantizationAwareTraining(target="onnxruntime", activation=learned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, epochs, callbacks=[quantize, keep]).fit(module, data, ckpt_path=resume)
    return module.eval()


def test_anybodys_lightning_module_trains_resumes_and_loads(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 2)
    fit(tmp_path / "part", 1)
    resumed = fit(tmp_path / "part", 2, tmp_path / "part" / "last.ckpt")
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in resumed.state_dict().items())
    loaded = load_quantized(Classifier(), tmp_path / "whole" / "last.ckpt").eval()
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(loaded(x), whole(x))
    assert placement_of(loaded) == placement_of(whole) != placement_of(Classifier())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "onnxrutime"}, "did you mean 'onnxruntime'"),
        ({"target": "onnxruntime", "activation": QuantSpec(8, strategy="token")}, "activation.strategy: 'token'"),
        (
            {"target": "onnxruntime", "activation": QuantSpec(8, type="float", strategy="tensor")},
            "activation.type: 'float' is not supported with target 'onnxruntime'",
        ),
    ],
)
def test_mistakes_are_named_at_once(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(QatkitError, match=words):
        QuantizationAwareTraining(**arguments)  # type: ignore[arg-type]


def test_a_module_without_training_data_is_told_what_to_do(tmp_path: Path) -> None:
    module = Classifier()
    with pytest.raises(QatkitError, match="example_input_array"):
        trainer(tmp_path, 1, callbacks=[QuantizationAwareTraining(target="onnxruntime")]).predict(
            module, DataLoader(torch.randn(8, 3, 16, 16))
        )


def test_the_line_about_coverage_counts_the_results() -> None:
    model, _ = prepared(ResNet())
    assert str(coverage(model)) == "quantized: 7 of 7 layers, 100.0 % of the weights, 9 results"
