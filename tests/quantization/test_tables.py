"""One more row in a table is all that a new element type, observer or PTQ method needs."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qatkit import QatkitError, QuantSpec, dequantize, fake_quantize, quantize
from qatkit.cli.main import main
from qatkit.common.tables import implementation
from qatkit.quantization import METHODS, OBSERVERS, computed_qparams, qat_layers
from qatkit.quantization.elements import ELEMENTS, Element
from qatkit.quantization.grids import Codebook, Grid, grid_of
from qatkit.quantization.observers import Observer
from qatkit.quantization.ptq.methods import Method
from qatkit.quantization.ranges import Statistics
from qatkit.quantization.scales import choose_qparams
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run

POWERS = [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
SHORT = ["stages.dense.max_steps=2", "stages.qat.max_steps=2", "model.args.channels=[4,4]", "export.format=dense"]


def powers_grid(spec: QuantSpec) -> Grid:
    return Codebook(POWERS)


def halved(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    scale, zero_point = computed_qparams(weight, spec)
    return scale / 2, zero_point


def doubled(statistics: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    return choose_qparams(2 * statistics.low, 2 * statistics.high, spec)


def add_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Element(
        "powers", "powers of two and zero", bits=(3,), grid=f"{__name__}:powers_grid",
        code_range=lambda bits, symmetric: (-1.0, 1.0), observers=("minmax", "mse"), weight_only=True,
    )  # fmt: skip
    monkeypatch.setitem(ELEMENTS._rows, "powers", row)


def run(out: Path, *overrides: str) -> Run:
    """Validate and run a recipe from the command line, in this process."""
    recipe = ["vision/digits_int4", *SHORT, *overrides]
    for command in (["validate", *recipe], ["run", *recipe, "--out", str(out)]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["qatkit", *command])
            patch.setattr(warnings, "showwarning", warnings.showwarning)  # which `main` replaces
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == 0
    return Run(load_recipe("vision/digits_int4", [*SHORT, *overrides]), out)


@pytest.mark.slow  # tests/test_contributing.py adds a row of every kind
def test_an_element_type_is_one_function_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_powers(monkeypatch)
    spec = QuantSpec(num_bits=3, type="powers")
    x = torch.randn(4, 16)
    qparams = computed_qparams(x, spec)
    codes = quantize(x, *qparams, spec)
    assert torch.equal(dequantize(codes, *qparams, spec), fake_quantize(x, *qparams, spec))
    with pytest.raises(QatkitError, match="num_bits: 4 is out of range for type 'powers'; use 3"):
        QuantSpec(num_bits=4, type="powers")

    done = run(tmp_path, "stages.qat.quantize.weight={num_bits: 3, type: powers, observer: mse}")
    for _, layer in qat_layers(done.load_model("qat")):
        assert layer.weight_fake_quant is not None
        scale = layer.weight_fake_quant.qparams(layer.matrix)[0].flatten(1)
        ratios = layer.fake_quantized_weight().flatten(1) / scale
        assert torch.isin(ratios.mul(4).round(), torch.tensor(POWERS).mul(4)).all()
    assert "| 3 |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow  # tests/test_contributing.py adds a row of every kind
def test_a_ptq_method_is_one_function_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method("halved", "half of the range", from_weight=f"{__name__}:halved", stored_scales=True)
    monkeypatch.setitem(METHODS._rows, "halved", row)
    done = run(tmp_path, "stages.ptq.quantize.init=halved")
    for _, layer in qat_layers(done.load_model("ptq")):
        fake_quant = layer.weight_fake_quant
        assert fake_quant is not None
        assert torch.equal(fake_quant.qparams(layer.matrix)[0], halved(layer.matrix.detach(), fake_quant.spec)[0])
    with pytest.raises(QatkitError, match=r"quantize\.init: 'halved' sets weight scales, but weight uses .* 'minmax'"):
        load_recipe("vision/digits_int4", ["stages.qat.quantize={init: halved, weight: {num_bits: 4}}"])


@pytest.mark.slow  # tests/test_contributing.py adds a row of every kind
def test_an_observer_is_one_function_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Observer("doubled", "twice the range", from_statistics=f"{__name__}:doubled", weights=False)
    monkeypatch.setitem(OBSERVERS._rows, "doubled", row)
    activation = "{num_bits: 8, symmetric: false, strategy: tensor, observer: %s}"
    scales = []
    for name in ("minmax", "doubled"):
        done = run(tmp_path / name, f"stages.ptq.quantize.activation={activation % name}")
        layers = qat_layers(done.load_model("ptq"))
        scales.append([layer.input_fake_quant.scale for _, layer in layers if layer.input_fake_quant])
    torch.testing.assert_close(scales[1], [2 * scale for scale in scales[0] if scale is not None])
    with pytest.raises(QatkitError, match=r"weight\.observer: 'doubled' is supported only for activations"):
        load_recipe("vision/digits_int4", ["stages.qat.quantize.weight={num_bits: 4, observer: doubled}"])


@pytest.mark.parametrize("table", [ELEMENTS, OBSERVERS, METHODS], ids=["elements", "observers", "methods"])
def test_an_unknown_name_is_an_error_and_never_a_default(table: Any) -> None:
    with pytest.raises(QatkitError, match=r"here: unknown .* 'mze'; did you mean|here: unknown .* 'mze'; use one of"):
        table.row("mze", "here")


def test_every_name_in_a_row_exists() -> None:
    for element in ELEMENTS.values():
        assert callable(implementation(element.grid))
        assert set(element.observers) <= set(OBSERVERS)
        assert OBSERVERS[element.computed_by].computed
        for bits in element.bits:
            strategy = "channel" if element.scaled else "tensor"
            spec = QuantSpec(num_bits=bits, type=element.name, observer=element.computed_by, strategy=strategy)
            assert (grid_of(spec).round(torch.zeros(1)).tolist() == [0.0]) is element.has_zero
    for observer in OBSERVERS.values():
        for name in filter(None, (observer.from_tensor, observer.from_statistics)):
            assert callable(implementation(name))
    for method in METHODS.values():
        hooks = [name for name in (method.from_weight, method.from_inputs, method.move_scales) if name]
        assert hooks
        assert all(callable(implementation(name)) for name in hooks)


def test_every_public_name_loads_also_after_its_module_was_imported() -> None:
    import qatkit.quantization

    for name in qatkit.quantization.__all__:
        home = next(module for module, names in qatkit.quantization._HOMES.items() if name in names)
        value = getattr(importlib.import_module(home), name)
        assert getattr(qatkit.quantization, name) is value
