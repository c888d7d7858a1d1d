"""The mechanics of benchmarks that take hours: every row is there.

Those that train dozens of models even in their quick mode are left out of CI: run `make long` after a change of them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from importlib import util
from pathlib import Path

import pytest

from qatkit.export.formats import FORMATS
from tests.support import warm

ROOT = Path(__file__).parent.parent


def test_every_test_that_needs_a_runtime_of_its_own_is_run_by_one_command() -> None:
    spec = util.spec_from_file_location("runtimes", ROOT / "benchmarks" / "runtimes.py")
    assert spec is not None
    assert spec.loader is not None
    runtimes = util.module_from_spec(spec)
    spec.loader.exec_module(runtimes)
    needed = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r'"(QATKIT_[A-Z_]+)"(?:\)| not in os\.environ)', path.read_text())
    } - {"QATKIT_REQUIRE_BROWSER", "QATKIT_DEBUG"}
    found = runtimes.variables(Path("all"))
    assert needed <= set(found)
    assert {"QATKIT_MLX", "QATKIT_GPTQ", "QATKIT_LITERT", "QATKIT_LLAMA_CPP", "QATKIT_VLLM"} <= needed
    assert found["QATKIT_AWQ"] == found["QATKIT_GPTQ"] == Path("all/gptq/bin/python")


@pytest.mark.slow
def test_what_is_shrunk_loads_without_qatkit_in_the_quick_mode() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "shrink.py"), "--quick"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [line.split(" | ") for line in out.splitlines() if line.count(" | ") == 7]
    assert {(name, how) for name, how, *_ in rows} == {
        (name, how) for name in ("Llama", "CNN") for how in ("activation", "magnitude", "taylor")
    }
    assert all(row[-1] == "yes" for row in rows)
    assert all(float(row[4]) > 1.5 for row in rows)


@pytest.mark.long
def test_the_recovery_benchmark_runs_every_method_in_its_quick_mode() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "qat_recovery.py"), "--quick", "--jobs", "2"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [line.split(" | ") for line in out.splitlines() if line.count(" | ") == 6]
    methods = {(form, method) for form, method, *_ in rows}
    for form in ("W3 g32", "W2 g32"):
        assert {(form, m) for m in ("RTN", "GPTQ", "torchao QAT", "QAT", "QAT + KD")} <= methods
    assert {("W3 g32", "AWQ"), ("W3 g32", "SmoothQuant"), ("W2 g32", "QAT + KD from gptq")} <= methods
    assert {("dense", "dense trained further"), ("dense", "dense trained further + KD")} <= methods
    assert ("mixed, bytes of W3 g32", "QAT + KD") in methods


@pytest.mark.long
def test_the_distillation_benchmark_trains_both_students_of_both_recipes_in_its_quick_mode() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "distill_recipes.py"), "--quick", "--jobs", "2"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    for name, stages in (("vision/digits_distill", "teacher"), ("llm/distill_layers", "dense")):
        line = next(line for line in out.splitlines() if line.startswith(f"recipe {name} | seed 0"))
        cells = dict(cell.split(" ") for cell in line.split(" | "))
        assert {stages, "alone", "distilled"} <= set(cells)
        assert cells["alone"] != cells["distilled"]


@pytest.mark.long
def test_the_pruning_benchmark_runs_every_method_in_its_quick_mode() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "prune_accuracy.py"), "--quick", "--jobs", "2"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [line.split(" | ") for line in out.splitlines() if line.count(" | ") == 5]
    methods = {(task, method, zeros) for task, method, zeros, *_ in rows}
    for method in ("one-shot", "gradual", "gradual + KD"):
        assert {("digits", method, "50.0%"), ("digits", method, "90.0%"), ("text", method, "50.0%")} <= methods
    for start in ("magnitude", "wanda", "sparsegpt"):
        assert ("text", f"2:4 {start}", "50.0%") in methods
    assert {("text", f"2:4 {m}, trained + KD", "50.0%") for m in ("magnitude", "sparsegpt")} <= methods
    assert {method for _, method, _ in methods} >= {"lottery ticket", "ticket mask, new initialization"}


@pytest.mark.long
def test_the_pipeline_benchmark_measures_every_stage_and_its_baseline_in_its_quick_mode() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "pipeline.py"), "--quick", "--jobs", "1"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [ast.literal_eval(line) for line in out.splitlines() if line.startswith("{")]
    loss = {row["model"]: float(row["held-out loss"]) for row in rows}
    recovered = {row["model"]: float(row["recovered, %"]) for row in rows}
    assert loss["dense, trained further"] < loss["dense"]
    assert recovered["dense, trained further"] == 100
    assert recovered["2:4 by magnitude and round-to-nearest int4, one-shot"] == 0
    assert {"2:4, trained + KD", "2:4 and int4, trained + KD"} <= set(loss)
    assert "recovered by 2:4, KD and int4" in out


@pytest.mark.slow
def test_the_gpu_benchmark_measures_every_method_in_its_quick_mode() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "gpu.py"), "--quick"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [line.split(" | ") for line in out.splitlines() if line.count(" | ") == 3]
    methods = [method for _, method, *_ in rows]
    assert {"qatkit.linear_kd_loss", "plain torch", "global_unstructured", "six patterns", "LoRA"} <= set(methods)
    assert methods.count("qatkit") == 2
    assert all(float(milliseconds) > 0 for _, _, milliseconds, _ in rows)


@pytest.mark.slow
def test_the_serving_benchmark_measures_four_files_of_a_family_in_its_quick_mode() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "serve.py"), "--quick", "--only", "MLP"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    table = [cells for line in out.splitlines() if len(cells := line.split(" | ")) == 10]
    assert {cells[1] for cells in table} == {"ONNX Runtime", "OpenVINO"}
    rows = {cells[2]: cells for cells in table if cells[1] == "ONNX Runtime"}
    assert set(rows) == {"fp32", "static", "dynamic", "qatkit"}
    assert rows["fp32"][5] == "0 of 3"
    assert rows["qatkit"][5] == rows["static"][5] == "3 of 3"
    assert float(rows["qatkit"][4]) < 0.3 * float(rows["fp32"][4]), "7-bit codes take a byte each"


@pytest.mark.long
def test_the_search_benchmark_compares_two_models_in_its_quick_mode() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "search.py"), "--quick"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    rows = {line.split(" | ")[0]: line.split(" | ") for line in out.splitlines() if line.count(" | ") == 15}
    assert set(rows) == {"MLP", "BERT"}
    for row in rows.values():
        assert row[5] == row[6], "a miss is announced"
        assert int(row[10]) < int(row[11]) / 3
        assert float(row[15]) <= 2


@pytest.mark.long
def test_every_format_holds_what_was_trained_or_says_why_not() -> None:
    command = [warm.python(), str(ROOT / "benchmarks" / "deploy.py"), "--quick"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [cells for line in out.splitlines() if len(cells := line.split(" | ")) == 11]
    refused = [cells for cells in rows if cells[3].startswith("refused: ")]
    exported = [cells for cells in rows if cells not in refused]
    assert {cells[5] for cells in exported} == {"none"}
    assert {cells[1] for cells in exported} == set(FORMATS)
    assert all(int(cells[4]) > 0 for cells in exported)
    speed = {(cells[0], cells[1], cells[2]): cells[10] for cells in exported}
    assert all(float(words.split()[0]) > 0 for words in speed.values() if not words.startswith("not measured: "))
    assert speed["Llama", "gguf", "Q8_0"].startswith("not measured: llama.cpp")
    assert float(speed["MLP", "onnx", "W4 g32"]) > 0
    assert speed["Llama", "onnx_genai", "W4 g32"].endswith(" (decode)")


@pytest.mark.skipif("QATKIT_LLAMA_CPP" not in os.environ, reason="QATKIT_LLAMA_CPP names no folder with node-llama-cpp")
@pytest.mark.slow
def test_the_k_quants_are_compared_with_llama_cpp_in_its_quick_mode() -> None:
    folder = os.environ["QATKIT_LLAMA_CPP"]
    command = [warm.python(), str(ROOT / "benchmarks" / "kquants.py"), "--quick", "--llama-cpp", folder]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [line.split(" | ") for line in out.splitlines() if line.count(" | ") == 9]
    assert [row[0] for row in rows] == ["Q4_K", "Q3_K", "Q2_K", "TQ2_0"]
    for *_, loss, in_runtime in rows:
        assert abs(float(loss) / float(in_runtime) - 1) < 0.01
