"""Each command imports only the libraries that it needs, and keeps what they print about themselves to itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "lightning", "transformers", "peft", "datasets", "wandb", "bitsandbytes", "onnx", "onnxruntime",
    "openvino", "torchao", "matplotlib",
}  # fmt: skip
SCRIPT = """
import sys
from qatkit.cli.main import main
sys.argv = ["qatkit", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    loaded = sorted({name.split(".")[0] for name in sys.modules} & set(HEAVY))
    sys.stdout.write("\\n" + " ".join([str(ended.code or 0), *loaded]))
""".replace("HEAVY", repr(HEAVY))


def loaded_by(*arguments: str, cwd: Path) -> tuple[int, set[str], str]:
    """Exit code, heavy libraries in sys.modules and standard error of a command in a fresh process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=cwd, capture_output=True, text=True)
    code, *names = done.stdout.splitlines()[-1].split()
    return int(code), set(names), done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["show", "llm/qlora"], ["run", "--help"]])
def test_help_and_lists_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    assert loaded_by(*arguments, cwd=tmp_path) == (0, set(), "")


@pytest.mark.parametrize("command", ["run", "validate", "plan", "cache-teacher", "sensitivity"])
def test_a_mistake_in_a_recipe_is_reported_before_anything_heavy_is_imported(command: str, tmp_path: Path) -> None:
    code, loaded, errors = loaded_by(command, "llm/int4_qat", "stages.qat.lrr=1", cwd=tmp_path)
    assert (code, loaded) == (2, set())
    assert errors.startswith("error: stages.qat.lrr: unknown key; did you mean 'lr'?")


@pytest.mark.parametrize(
    "arguments", [["verify", "x"], ["export", "x"], ["report", "x"], ["allocate", "x", "--bytes", "9"]]
)
def test_a_folder_that_is_no_run_is_reported_before_anything_heavy_is_imported(
    arguments: list[str], tmp_path: Path
) -> None:
    code, loaded, errors = loaded_by(*arguments, cwd=tmp_path)
    assert (code, loaded) == (2, set())
    assert errors.startswith("error: x")


@pytest.mark.parametrize(
    ("recipe", "allowed"),
    [
        ("vision/digits_int4", {"torch"}),
        ("llm/int4_qat", {"torch", "transformers", "torchao"}),  # transformers imports torchao if it is installed
    ],
)
def test_validation_imports_what_the_model_needs_and_prints_no_import_noise(
    recipe: str, allowed: set[str], tmp_path: Path
) -> None:
    code, loaded, errors = loaded_by("validate", recipe, cwd=tmp_path)
    assert (code, errors) == (0, "")
    assert loaded <= allowed
