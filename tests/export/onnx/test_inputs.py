"""ONNX files with several named inputs and outputs, and with dimensions that may vary."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from qatkit import QatkitError, QatkitWarning, QuantSpec, calibrate, prepare_qat
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import load_runtime
from tests.export.conftest import UINT8


class Two(nn.Module):
    """Two inputs, an optional one, and two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, image: Tensor, depth: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        total = self.left(image) + self.right(depth)
        return {"sum": total if shift is None else total + shift, "left": self.left(image)}


class Tagger(nn.Module):
    """Classes of the tokens of a text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        hidden = hidden if attention_mask is None else hidden * attention_mask.unsqueeze(-1)
        return {"logits": self.head(hidden + hidden.mean(1, keepdim=True))}


def shapes(path: Path) -> dict[str, list[Any]]:
    """Dimensions of every input and output, by name."""
    graph = onnx.load(path).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def quantized(model: nn.Module, batch: Any) -> nn.Module:
    prepare_qat(model, QuantSpec(4), UINT8, include=["left", "right", "head"][-1:] if hasattr(model, "head") else ["*"])
    calibrate(model, [batch], forward=lambda batch: model(**batch))
    return model.eval()


BOTH = {"image": torch.rand(5, 8), "depth": torch.rand(5, 6)}


@pytest.mark.parametrize("example", [tuple(BOTH.values()), BOTH, dict(reversed(BOTH.items()))])
def test_inputs_are_named_after_the_parameters_and_outputs_as_the_model_names_them(
    example: Any, tmp_path: Path
) -> None:
    model = quantized(Two(), BOTH)
    export_onnx(model, example, tmp_path / "model.onnx")
    assert shapes(tmp_path / "model.onnx") == {
        "image": ["batch", 8], "depth": ["batch", 6], "sum": ["batch", 4], "left": ["batch", 4]
    }  # fmt: skip
    assert list(shapes(tmp_path / "model.onnx")) == ["image", "depth", "sum", "left"]
    runtime = load_runtime(tmp_path / "model.onnx", 1)
    with torch.no_grad():
        expected = model(**BOTH)
    for found in (runtime(*BOTH.values()), runtime(**BOTH), runtime(BOTH["image"], depth=BOTH["depth"])):
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_an_optional_input_is_in_the_file_only_if_the_example_has_it(tmp_path: Path) -> None:
    model = Two()
    export_onnx(model, BOTH | {"shift": None}, tmp_path / "without.onnx")
    export_onnx(model, BOTH | {"shift": torch.ones(5, 4)}, tmp_path / "with.onnx")
    assert [name for name in shapes(tmp_path / "with.onnx") if name not in shapes(tmp_path / "without.onnx")] == [
        "shift"
    ]
    both = [load_runtime(tmp_path / f"{name}.onnx", 1) for name in ("without", "with")]
    without, shifted = both[0](**BOTH, shift=None)["sum"], both[1](**BOTH, shift=torch.ones(5, 4))["sum"]
    assert torch.allclose(without + 1, shifted, atol=1e-6)
    with pytest.raises(
        QatkitError, match="the exported model expects image, depth, shift, but image, depth was passed"
    ):
        both[1](**BOTH)
    with pytest.raises(
        QatkitError, match="the exported model expects image, depth, but image, depth, shift was passed"
    ):
        both[0](**BOTH, shift=torch.ones(5, 4))
    with pytest.raises(QatkitError, match="image, depth was passed in 3 positional arguments"):
        both[0](*BOTH.values(), torch.ones(5, 4))


def test_a_text_has_a_dynamic_sequence(tmp_path: Path) -> None:
    batch = {"input_ids": torch.randint(20, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    model = quantized(Tagger(), batch)
    export_onnx(model, batch, tmp_path / "model.onnx")
    assert shapes(tmp_path / "model.onnx") == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "logits": ["batch", "sequence", 4],
    }
    runtime = load_runtime(tmp_path / "model.onnx", 1)
    for size in ((1, 1), (2, 5), (9, 30)):
        ids, mask = torch.randint(20, size), (torch.rand(size) > 0.3).long()
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask)["logits"]
        assert torch.allclose(runtime(input_ids=ids, attention_mask=mask)["logits"], expected, atol=1e-5)


def test_the_task_makes_the_size_of_images_dynamic(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    export_onnx(model, torch.rand(2, 3, 8, 6), tmp_path / "classes.onnx")
    export_onnx(model, torch.rand(2, 3, 8, 6), tmp_path / "pixels.onnx", "segmentation")
    assert shapes(tmp_path / "classes.onnx")["input"] == ["batch", 3, 8, 6]
    assert shapes(tmp_path / "pixels.onnx") == {
        "input": ["batch", 3, "height", "width"], "output": ["batch", 2, "height", "width"]
    }  # fmt: skip
    x = torch.rand(1, 3, 11, 9)
    with torch.no_grad():
        assert torch.allclose(load_runtime(tmp_path / "pixels.onnx", 1)(x), model(x), atol=1e-6)


def test_a_size_that_the_model_fixes_is_fixed_and_named_in_a_warning(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = self.body(input_ids.float())
            return out

    ids = torch.randint(9, (2, 6))
    with pytest.warns(QatkitWarning, match="^the exported file fixes sequence to") as seen:
        export_onnx(Flat(), {"input_ids": ids}, tmp_path / "model.onnx")
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert shapes(tmp_path / "model.onnx") == {"input_ids": ["batch", 6], "output": ["batch", 2]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(Flat(), ids, tmp_path / "model.onnx")


class Star(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1]


class Echo(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x + 1}


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Two(), [torch.rand(2, 8)], r"this example is list with '0' \[2, 8\]; pass a tensor, a tuple"),
        (Two(), torch.rand(2, 8), r"does not fit the parameters of Two.forward: missing a required argument: 'depth'"),
        (Two(), BOTH | {"other": BOTH["image"]}, "unexpected keyword argument 'other'"),
        (Two(), BOTH | {"shift": 2.0}, "input 'shift' is float, but every input of an ONNX file must be a"),
        (Two(), {"image": None, "depth": None}, "the example contains no tensor"),
        (Star(), (torch.rand(2, 3), torch.rand(2, 3)), r"Star.forward takes '\*inputs', .*; replace it with"),
        (Echo(), torch.rand(2, 3), "'x' is the name of both an input and an output; rename the output"),
    ],
    ids=["list", "too few", "too many", "number", "none", "star", "one name twice"],
)  # fmt: skip
def test_an_example_that_the_file_cannot_take_is_refused(
    model: nn.Module, example: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(QatkitError, match=message):
        export_onnx(model, example, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
