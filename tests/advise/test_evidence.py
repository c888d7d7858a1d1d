"""The evidence of `qatkit advise` contains every result of the benchmarks, or the script refuses to write it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qatkit.advise.devices import DEVICES, VNNI, X86
from qatkit.advise.options import options_of

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path("benchmarks", "results")


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a copy of the results that may be changed."""
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / RESULTS).mkdir(parents=True)
    for name in ("qat_recovery", "distill_recipes", "digits", "serve_avx2"):
        shutil.copy(ROOT / RESULTS / f"{name}.json", tmp_path / RESULTS)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def rows_of(evidence: ModuleType, **wanted: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(evidence.text())
    return [row for row in rows if wanted.items() <= row.items()]


def test_the_largest_loss_of_convolutional_networks_is_that_of_the_residual_network(evidence: ModuleType) -> None:
    rows = rows_of(evidence, family="convolutional", format="W8A8", method="QAT + KD")
    worst = max(rows, key=lambda row: row["loss"])
    assert (worst["loss"], worst["shown"].partition(":")[0]) == (0.28, "digits_resnet")
    assert any("MobileNetV3" in row["shown"] for row in rows)


def test_results_of_another_tool_are_not_those_of_ptq(evidence: ModuleType) -> None:
    served = [row for row in rows_of(evidence, benchmark="benchmarks/serve.py") if row["method"] != "QAT + KD"]
    assert {row["method"] for row in served} <= {
        "quantize_static of ONNX Runtime",
        "quantize_dynamic of ONNX Runtime",
    }
    assert served


@pytest.mark.parametrize(
    ("name", "key"),
    [("qat_recovery", "method"), ("distill_recipes", "recipe"), ("digits", "method"), ("serve_avx2", "model")],
)
def test_a_row_about_which_nobody_has_decided_is_an_error(name: str, key: str, evidence: ModuleType) -> None:
    path = evidence.ROOT / RESULTS / f"{name}.json"
    content = json.loads(path.read_text())
    content["rows"][-1][key] = "something new"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"add 'something new' of results/{name}.json to its table"):
        evidence.text()


def test_linear_layers_keep_floating_point_products_in_openvino_without_vnni() -> None:
    """benchmarks/results/serve_avx2.json: its integer products are slower there, except in convolutions."""
    old, new = (replace(DEVICES["epyc-9654"], processor=processor) for processor in (X86, VNNI))
    for family in ("mlp", "encoder"):
        (option,) = options_of("openvino", family, old)
        assert option.quantize == {"weight": {"num_bits": 8}}
        assert [each.quantize for each in options_of("openvino", family, new)] == [{"target": "openvino-vnni"}]
    assert [each.quantize for each in options_of("openvino", "convolutional", old)] == [{"target": "openvino"}]
