"""The example shows that Lightning's callback loses its zeros on resume, and ours keeps them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume_pruning.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("resume_pruning", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_zeros_of_model_pruning_are_gone_after_a_resume_and_ours_are_not(tmp_path: Path) -> None:
    script = example()
    before, after = script.stop_and_resume(script.lightning_pruning, tmp_path)
    assert abs(before - 0.5) < 1e-3
    assert after < 0.1  # pixels that are always 0 move no weight
    before, after = script.stop_and_resume(script.qatkit_pruning, tmp_path)
    assert before == after == 0.5
