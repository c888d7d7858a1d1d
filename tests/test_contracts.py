"""The shape of the house: who imports whom, what importing a part loads, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for part in ("qatkit", "callbacks", "recipes") for path in sorted((ROOT / part).rglob("*.py"))
]  # fmt: skip

PLAIN = {"errors", "spec", "schemes", "common"}
TECHNIQUES = {"quantization", "pruning", "distillation", "lora"}
BELOW_RUN = PLAIN | TECHNIQUES | {"kernels", "hub", "recipe", "tasks", "models", "data", "callbacks", "stages"}
# What each part may import of qatkit, besides itself and the tables; read from below upwards.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "common": {"errors"},
    "spec": {"errors", "common"},
    "schemes": {"errors", "common", "spec"},
    "hub": PLAIN,
    "kernels": PLAIN,
    "quantization": PLAIN | {"kernels"},
    "pruning": PLAIN | {"kernels"},
    "distillation": PLAIN | {"kernels"},
    "lora": PLAIN | {"kernels", "quantization"},  # an update is part of the weight that is rounded
    "recipe": PLAIN,
    "tasks": PLAIN,
    "models": PLAIN | {"hub"},
    "data": PLAIN | {"hub"},
    "callbacks": PLAIN | TECHNIQUES | {"kernels", "tasks"},
    "recipes": set(),
    "stages": PLAIN | TECHNIQUES | {"recipe", "tasks", "callbacks"},
    "export": PLAIN | TECHNIQUES | {"tasks"},
    "run": BELOW_RUN,
    "advise": BELOW_RUN | {"run"},
    "report": BELOW_RUN | {"run", "export", "advise"},
    "pipeline": BELOW_RUN | {"run", "export", "advise", "report"},
    "trials": BELOW_RUN | {"run", "export", "advise", "report", "pipeline"},
    "cli": BELOW_RUN | {"run", "export", "advise", "report", "pipeline", "trials"},
}
# One table per kind of thing: plain rows that any part may read, because they load nothing.
TABLES = {
    "qatkit.export.format_row",
    "qatkit.export.formats",
    "qatkit.pruning.methods",
    "qatkit.distillation.divergences",
    "qatkit.quantization.elements",
    "qatkit.quantization.observers",
    "qatkit.quantization.ptq.methods",
    "qatkit.quantization.scale_dtypes",
    "qatkit.quantization.targets",
    "qatkit.tasks.table",
    "qatkit.cli.commands",
}
HEAVY = {"lightning", "transformers", "peft", "bitsandbytes", "datasets", "wandb", "onnx", "onnxruntime", "omegaconf"}
HEAVY |= {"openvino", "matplotlib", "jinja2", "torch", "safetensors"}
# What a part may import when it is imported; every other heavy import stands in the function that needs it.
MAY_LOAD: dict[str, set[str]] = {
    "errors": set(),
    "common": {"torch"},
    "spec": set(),
    "schemes": set(),
    "recipe": {"omegaconf", "torch"},
    "tasks": {"torch"},
    "kernels": {"torch"},
    "quantization": {"torch", "safetensors"},
    "pruning": {"torch", "safetensors"},
    "distillation": {"torch"},
    "callbacks": {"torch", "lightning"},
    "cli": set(),
}


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "qatkit" else ["qatkit", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path, top: bool = False) -> set[str]:
    """Modules that a file imports; with `top` only those that importing the file loads."""
    tree = ast.parse(path.read_text())
    nodes = list(tree.body) if top else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            base = node.module or ""
            submodules = {f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES}
            names |= submodules or {base}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    part = part_of(module)
    if part == "__init__":
        return
    path = MODULES[module]
    inside = {name for name in imports(path) if name.startswith("qatkit.") and name not in TABLES}
    allowed = PLAIN if module in TABLES else ALLOWED[part] | {part}
    extra = {name for name in inside if part_of(name) not in allowed}
    assert not extra, f"{module} may not import {sorted(extra)}"
    if part in MAY_LOAD:
        outside = {name.split(".")[0] for name in imports(path, top=True)} & HEAVY
        assert outside <= (set() if module in TABLES else MAY_LOAD[part])


def test_every_part_of_the_house_has_a_rule() -> None:
    assert {part_of(module) for module in MODULES} - {"__init__"} <= set(ALLOWED)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    # a package's __init__ that gives its modules' names is no circle: what the modules import is each other
    graph = {module: {name for name in names if not module.startswith(f"{name}.")} for module, names in graph.items()}
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, [*way, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_the_top_of_the_package_holds_at_most_eight_modules() -> None:
    assert len(list((ROOT / "qatkit").glob("*.py"))) <= 8


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_import_qatkit_loads_nothing_heavy_and_using_it_loads_torch_alone() -> None:
    assert not loaded_by("import qatkit") & HEAVY
    loaded = loaded_by("from qatkit import *")
    assert "torch" in loaded
    assert not loaded & (HEAVY - {"torch", "safetensors"})


def test_the_tables_load_nothing_heavy() -> None:
    there = sorted(TABLES & set(MODULES))
    assert not loaded_by(f"import {', '.join(there)}" if there else "pass") & HEAVY


def test_a_recipe_is_read_without_torch() -> None:
    assert not loaded_by("import qatkit.cli, qatkit.recipe.loading") & (HEAVY - {"omegaconf"})
