"""A command is one line of a table and one file, and every failure of it is one message and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qatkit as package
from qatkit.cli.commands import COMMANDS, Command
from qatkit.cli.exits import USER_MISTAKE, explain
from qatkit.common.tables import implementation
from qatkit.recipe.loading import list_recipes
from tests.cli.in_process import qatkit


@pytest.fixture
def greet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    row = Command("greet", "Greet somebody.", "tests.cli.greet:command")
    monkeypatch.setitem(COMMANDS._rows, row.name, row)
    monkeypatch.delitem(sys.modules, "tests.cli.greet", raising=False)
    yield
    sys.modules.pop("tests.cli.greet", None)


def test_a_line_of_the_table_adds_a_command_to_the_help_page_and_imports_it_when_it_runs(
    greet: None, tmp_path: Path
) -> None:
    assert "greet          Greet somebody." in qatkit("--help", cwd=tmp_path).out
    assert "tests.cli.greet" not in sys.modules
    assert qatkit("greet", "Ada", cwd=tmp_path) == (0, "Hello Ada\n", "")
    assert "Whom to greet." in qatkit("greet", "--help", cwd=tmp_path).out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_describes_each_command_as_its_own_help_page_does(name: str, tmp_path: Path) -> None:
    text = implementation(COMMANDS[name].implementation).__doc__
    assert text.splitlines()[0] == COMMANDS[name].description
    shown = " ".join(qatkit(name, "--help", cwd=tmp_path).out.split())
    assert COMMANDS[name].description in shown
    assert f"Example: qatkit {name}" in shown


def test_an_unknown_command_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    assert qatkit("valdate", cwd=tmp_path) == (2, "", "error: unknown command 'valdate'; did you mean 'validate'?\n")


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    assert qatkit("--version", cwd=tmp_path).out == f"qatkit {package.__version__}\n"


def test_the_list_shows_every_recipe_with_a_complete_sentence(tmp_path: Path) -> None:
    lines = qatkit("list", cwd=tmp_path).out.splitlines()
    assert [line.split()[0] for line in lines] == list_recipes()
    assert all(line.endswith(".") for line in lines)


# --- how a command ends


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("mistake", 2, "error: size: 48 is odd; use 48.5\n"),
        ("file", 2, "error: /etc/shadow: Permission denied; check the path, its permissions and the free disk space\n"),
        ("system", 2, "error: Network is down; set QATKIT_DEBUG=1 to see where it happened\n"),
        ("nameless", 2, "error: No such file or directory; set QATKIT_DEBUG=1 to see where it happened\n"),
        ("memory", 2, "error: out of memory; use a smaller batch_size or a smaller model (4 GB)\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_a_failure_is_one_message_and_an_exit_code(
    greet: None, tmp_path: Path, failure: str, code: int, message: str
) -> None:
    assert qatkit("greet", "Ada", "--fail", failure, cwd=tmp_path) == (code, "", message)


def test_a_bug_in_qatkit_asks_for_a_report_and_hides_its_traceback(
    greet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = qatkit("greet", "Ada Lovelace", "--fail", "qatkit", cwd=tmp_path)
    assert done.code == 3
    first, second = done.err.splitlines()
    assert first.startswith("error: this is a bug in qatkit: AttributeError: module 'qatkit.errors' has no attribute")
    assert second.endswith("the output of: QATKIT_DEBUG=1 qatkit greet 'Ada Lovelace' --fail qatkit")
    monkeypatch.setenv("QATKIT_DEBUG", "1")
    assert "Traceback" in qatkit("greet", "Ada", "--fail", "qatkit", cwd=tmp_path).err


def test_an_exception_in_code_of_the_user_names_its_file_and_is_no_bug_in_qatkit(greet: None, tmp_path: Path) -> None:
    done = qatkit("greet", "Ada", "--fail", "bug", cwd=tmp_path)
    assert done.code == 2
    assert "greet.py:" in done.err
    assert "raised AttributeError: 'QuantSpec' object has no attribute" in done.err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")]
)
def test_no_memory_is_no_bug(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(error) == 2
    assert "out of memory; use a smaller batch_size or a smaller model" in capsys.readouterr().err


def process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qatkit.cli", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", [("list",), ("--help",)])
def test_a_full_disk_under_standard_output_is_named_as_that(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = process(*arguments, stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to standard output: No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_ends_the_command_in_silence() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = process("list", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:27011",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]: Connection reset by peer",
    ],
)
def test_a_lost_process_of_a_distributed_run_is_no_bug(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(RuntimeError(text)) == USER_MISTAKE
    assert capsys.readouterr().err.startswith("error: another process of this run has ended")
