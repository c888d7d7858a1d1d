"""The logs of several attempts of a stage become one curve per metric."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatkit import QatkitError
from qatkit.report.curves import POINTS, read_curves


def attempt(logs: Path, number: int, text: str) -> None:
    (logs / f"attempt_{number}").mkdir(parents=True)
    (logs / f"attempt_{number}" / "metrics.csv").write_text(text)


def test_a_later_attempt_counts_where_two_logged_the_same_steps(tmp_path: Path) -> None:
    attempt(tmp_path, 0, "epoch,step,train/loss,val/loss\n0,9,3.0,\n0,18,,2.5\n1,19,2.0,\n1,29,7.0,\n1,37,,7.5\n")
    attempt(tmp_path, 1, "epoch,step,train/loss,val/loss\n1,29,1.5,\n1,37,,1.25\n")
    curves = read_curves(tmp_path)
    assert curves["resumed_at"] == [29]
    assert curves["metrics"] == {
        "train/loss": {"steps": [9, 19, 29], "values": [3.0, 2.0, 1.5]},
        "val/loss": {"steps": [18, 37], "values": [2.5, 1.25]},
    }


def test_attempts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(11):
        attempt(tmp_path, number, f"epoch,step,loss\n0,{number},{number}.0\n")
    curves = read_curves(tmp_path)
    assert curves["metrics"]["loss"]["steps"] == list(range(11))
    assert curves["resumed_at"] == list(range(1, 11))


def test_a_last_line_that_was_never_finished_and_an_empty_folder_are_no_error(tmp_path: Path) -> None:
    attempt(tmp_path, 0, "epoch,step,loss\n0,1,2.0\n0,2\n0\n")
    (tmp_path / "attempt_1").mkdir()
    assert read_curves(tmp_path)["metrics"] == {"loss": {"steps": [1], "values": [2.0]}}
    assert read_curves(tmp_path / "nowhere") == {"resumed_at": [], "metrics": {}}


def test_a_long_curve_is_thinned_and_keeps_both_ends(tmp_path: Path) -> None:
    attempt(tmp_path, 0, "epoch,step,loss\n" + "".join(f"0,{step},{step / 7}\n" for step in range(5000)))
    curve = read_curves(tmp_path)["metrics"]["loss"]
    assert len(curve["steps"]) == len(curve["values"]) == POINTS
    assert (curve["steps"][0], curve["steps"][-1]) == (0, 4999)
    assert curve["values"][-1] == float(f"{4999 / 7:.6g}")


def test_a_number_that_was_cut_off_is_left_out_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    attempt(tmp_path, 0, "epoch,step,loss\n0,1,2.0\n0,2,1.")
    assert read_curves(tmp_path)["metrics"] == {"loss": {"steps": [1], "values": [2.0]}}
    for text in ("epoch,step,loss\n0,1,2.x\n", "epoch,step,loss\n0,1,2.0,3,4\n", "epoch,step,loss\n0,one,2.0\n"):
        (tmp_path / "attempt_0" / "metrics.csv").write_text(text)
        with pytest.raises(
            QatkitError, match=r"attempt_0/metrics\.csv is corrupt \(.*\); restore the file, or delete it"
        ):
            read_curves(tmp_path)
