"""The shape of the house: who imports whom, what `import qatkit` loads, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("qatkit/**/*.py"), *ROOT.glob("callbacks/**/*.py"), *ROOT.glob("recipes/**/*.py")]

# what each part may import of qatkit; every part may also import itself
TECHNIQUES = {"quantization", "pruning", "distillation"}
PLAIN = {"spec", "schemes", "errors"}
ALLOWED: dict[str, set[str]] = {
    "spec": set(),
    "errors": set(),
    "depth": set(),
    "schemes": {"spec", "errors"},
    "recipe": PLAIN,
    "strict_yaml": PLAIN,
    "schema": PLAIN | {"recipe"},
    "loading": PLAIN | {"recipe", "schema", "strict_yaml"},
    "fingerprint": PLAIN | {"recipe", "loading"},
    "factories": PLAIN | {"recipe", "schema", "loading"},
    "quantization": PLAIN,
    "pruning": PLAIN | {"depth"},
    "distillation": PLAIN | {"depth"},
    "lora": PLAIN | {"quantization"},  # an update is part of the weight that is rounded
    "hub": PLAIN,
    "matching": PLAIN | {"recipe", "factories", "hub", "models"},
    "models": PLAIN | {"hub"},
    "data": PLAIN | {"hub"},
    "callbacks": PLAIN | TECHNIQUES | {"lora"},
    "tasks": PLAIN,
    "optimizers": PLAIN | {"quantization"},
    "engine": PLAIN | TECHNIQUES | {"recipe", "tasks", "optimizers"},
    "architecture": PLAIN | {"recipe", "factories"},
    "checkpoint": PLAIN | TECHNIQUES | {"architecture"},
    "export": PLAIN | TECHNIQUES | {"tasks"},
    "analysis": PLAIN | TECHNIQUES | {"export", "tasks", "optimizers"},
    "stopping": PLAIN | {"recipe"},
    "tracking": PLAIN | {"recipe"},
    "progress": PLAIN,
    "blocks": PLAIN | TECHNIQUES | {"recipe", "callbacks", "lora", "tasks"},
    "validation": PLAIN
    | {"recipe", "schema", "factories", "matching", "tracking", "blocks", "architecture", "export", "quantization"}
    | {"optimizers", "analysis"},
}
EVERYTHING = {"training", "teachers", "pipeline", "delivery", "cli", "cli_arguments", "cli_sensitivity"}
EVERYTHING |= {"planner", "planner_fit", "cli_plan", "evaluation"}
HEAVY = {"lightning", "transformers", "peft", "bitsandbytes", "datasets", "wandb", "onnx", "onnxruntime", "omegaconf"}
HEAVY |= {"matplotlib", "jinja2"}
MAY_LOAD = {
    "spec": set(),
    "schemes": set(),
    "errors": set(),
    "depth": set(),
    "recipe": set(),
    "quantization": {"torch", "safetensors"},
    "pruning": {"torch", "safetensors"},
    "distillation": {"torch"},
    "callbacks": {"torch", "lightning"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if relative.parts[0] != "qatkit" else relative.with_suffix("").parts[1]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    if part in EVERYTHING | {"__init__"}:
        return
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("qatkit.")}
    extra = inside - ALLOWED.get(part, set()) - {part}
    assert not extra, f"{part} may not import qatkit.{extra}"
    if part in MAY_LOAD:
        outside = {name.split(".")[0] for name in imported(path)} & (HEAVY | {"torch", "safetensors"})
        assert outside <= MAY_LOAD[part]


def test_every_part_of_the_house_has_a_rule() -> None:
    assert {part_of(path) for path in SOURCES} - EVERYTHING - {"__init__", "recipes"} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_import_qatkit_loads_nothing_heavy_and_using_it_loads_torch_alone() -> None:
    assert not loaded_by("import qatkit") & (HEAVY | {"torch"})
    loaded = loaded_by("from qatkit import *")
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_the_command_line_starts_without_torch() -> None:
    assert not loaded_by("import qatkit.cli.main, qatkit.recipe.loading") & (HEAVY - {"omegaconf"} | {"torch"})
