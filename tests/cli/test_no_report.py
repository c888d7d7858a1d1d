"""`qatkit run --no-report` ends with the verification of every file."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.in_process import qatkit

RUN = ("run", "recipe.yaml", "--out", "run", "--allow", "tests", "--no-report")


def test_every_file_is_named_with_its_verification(copied: Path) -> None:
    done = qatkit(*RUN, cwd=copied)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split(": ")[:2] for line in lines[-2:]] == [["dense", "passed"], ["qat", "passed"]]
    assert "weights of 2 quantized layers match the trained ones" in lines[-1]
    assert qatkit(*RUN, "--quiet", cwd=copied).out == ""


def test_json_is_the_verification_of_every_file_alone(copied: Path) -> None:
    done = qatkit(*RUN, "--json", cwd=copied)
    assert done.code == 0, done.err
    checked = json.loads(done.out)
    assert {name: check["passed"] for name, check in checked.items()} == {"dense": True, "qat": True}
