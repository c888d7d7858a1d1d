"""The built wheel and sdist: installed into an empty environment and used outside the repository."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.matrix import representatives

ROOT = Path(__file__).parent.parent


def python(interpreter: Path, *arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": path}
    return subprocess.run([str(interpreter), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def environment(python_of: str, folder: Path) -> Path:
    """An empty environment without pip, whose installation would take longer than everything else."""
    subprocess.run([python_of, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def install(interpreter: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-compile", *arguments]
    done = subprocess.run(command, cwd=interpreter.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist, built from a copy without the repository's leftovers."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run([sys.executable, "-m", "build", "-q", "--outdir", str(folder), str(source)], check=True)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module", params=representatives(["wheel", "sdist"], {0}))
def installed(request: pytest.FixtureRequest, built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds this package only; its dependencies come from the environment of the tests."""
    interpreter = environment(sys.executable, tmp_path_factory.mktemp(request.param))
    install(interpreter, "--no-deps", str(built[request.param]))
    return interpreter


LENT = site.getsitepackages()[0]  # on sys.path, not a site folder, so its editable install stays inactive


def shipped() -> set[str]:
    """Every file of the package, by its path where it is installed."""
    places = {"qatkit": "qatkit", "callbacks": "qatkit/callbacks", "recipes": "qatkit/recipes"}
    return {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in places.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    names = zipfile.ZipFile(built["wheel"]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == shipped()
    assert {name.split("/")[0] for name in names} == {"qatkit", "qatkit-0.1.0.dist-info"}


def test_the_sdist_holds_every_file_of_the_package_and_what_builds_it(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    in_the_repository = {
        name.removeprefix("qatkit/") if name.startswith(("qatkit/callbacks/", "qatkit/recipes/")) else name
        for name in shipped()
    }
    assert in_the_repository <= names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names


def test_recipes_are_found_and_valid_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    where = python(installed, "-c", "import qatkit; print(qatkit.__file__)", cwd=tmp_path, path=LENT)
    assert str(installed.parent.parent) in where.stdout
    command = installed.parent / "qatkit"
    for arguments in (["list"], ["validate", "vision/digits_int4"]):
        done = python(installed, str(command), *arguments, cwd=tmp_path, path=LENT)
        assert done.returncode == 0, done.stderr
        assert "digits_int4" in done.stdout


def test_types_are_visible_to_a_users_mypy(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from qatkit import QuantSpec\n"
        "from qatkit.callbacks import QuantizationAwareTraining\n"
        'QuantizationAwareTraining(weight=QuantSpec(num_bits="four"))\n'
    )
    arguments = ["-m", "mypy", "--strict", "--follow-imports=silent", "--python-executable", str(installed), "user.py"]
    done = python(Path(sys.executable), *arguments, cwd=tmp_path)
    assert 'Argument "num_bits" to "QuantSpec" has incompatible type "str"; expected "int"' in done.stdout
    assert "import-untyped" not in done.stdout


def interpreter_of(version: str) -> str | None:
    """A Python of this version, from PATH or pyenv; pyenv's own commands work only where a version is selected."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    if shutil.which("pyenv") is None:
        return None
    latest = subprocess.run(["pyenv", "latest", version], capture_output=True, text=True).stdout.strip()
    prefix = subprocess.run(["pyenv", "prefix", latest], capture_output=True, text=True).stdout.strip()
    return str(Path(prefix) / "bin" / f"python{version}") if prefix else None


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_recipes_are_read_on_newer_pythons(built: dict[str, Path], version: str, tmp_path: Path) -> None:
    found = interpreter_of(version)
    if found is None:
        pytest.skip(f"no Python {version} on this machine")
    interpreter = environment(found, tmp_path / "env")
    install(interpreter, "-c", str(ROOT / "constraints.txt"), "omegaconf", "typer", "rich")
    install(interpreter, "--no-deps", str(built["wheel"]))
    done = python(interpreter, str(interpreter.parent / "qatkit"), "show", "vision/digits_int4", cwd=tmp_path)
    assert "name: digits_int4" in done.stdout
    code = "from qatkit.recipe.loading import load_recipe; print(load_recipe('vision/digits_int4').seed)"
    assert python(interpreter, "-c", code, cwd=tmp_path).stdout == "7\n"


@pytest.mark.parametrize(
    ("module", "code", "command"),
    [
        (
            "onnxruntime",
            "from qatkit.export.onnx.runtime import load_runtime; load_runtime(Path('x.onnx'))",
            "qatkit[onnx]",
        ),
        ("sklearn", "from qatkit.data import digits; digits()", "qatkit[demo]"),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    module: str, code: str, command: str, tmp_path: Path
) -> None:
    hide = f"import sys; sys.modules['{module}'] = None; from pathlib import Path; "
    done = python(Path(sys.executable), "-c", hide + code, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith("qatkit.errors.QatkitError: ")
    assert f"pip install '{command}'" in done.stderr.splitlines()[-1]
