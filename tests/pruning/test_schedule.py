"""The ramp against the equation of the paper."""

from __future__ import annotations

import pytest

from qatkit import QatkitError
from qatkit.pruning.schedule import Ramp


def test_the_ramp_is_equation_1_of_zhu_and_gupta() -> None:
    # s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt)) ** 3, with t_0 = 20 and n * dt = 60 of 100 steps
    ramp = Ramp(0.9, start=0.2, end=0.8, initial=0.1)
    for step in range(20, 81):
        assert ramp.at(step / 100) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - (step - 20) / 60) ** 3, abs=1e-12)


def test_sparsity_is_constant_before_the_start_and_after_the_end() -> None:
    ramp = Ramp(0.9, start=0.2, end=0.8, initial=0.1)
    assert (ramp.at(0.0), ramp.at(0.2)) == (0.1, 0.1)
    assert (ramp.at(0.8), ramp.at(1.0)) == (0.9, 0.9)


def test_sparsity_never_falls_and_a_power_of_1_is_linear() -> None:
    values = [Ramp(0.75, end=0.6).at(step / 1000) for step in range(1001)]
    assert values == sorted(values)
    assert Ramp(0.8, power=1).at(0.25) == pytest.approx(0.2)


def test_a_ramp_without_length_jumps() -> None:
    ramp = Ramp(0.5, start=0.3, end=0.3)
    assert (ramp.at(0.29), ramp.at(0.3)) == (0.0, 0.5)
    assert Ramp(0.5, end=0.0).at(0.0) == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final": 1.0}, "ramp.final: 1.0 is out of range"),
        ({"final": 0.5, "initial": 0.6}, "ramp.initial: 0.6 is above final=0.5"),
        ({"final": 0.5, "start": 0.6, "end": 0.5}, r"ramp: start=0.6 and end=0.5 are out of range"),
        ({"final": 0.5, "end": 100}, r"ramp: start=0.0 and end=100 are out of range"),
        ({"final": 0.5, "power": 0}, "ramp.power: 0 is out of range"),
    ],
)
def test_an_invalid_ramp_is_an_error(values: dict[str, float], message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        Ramp(**values)
