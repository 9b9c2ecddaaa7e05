from __future__ import annotations

from email.utils import formatdate

import pytest

from launch.doctor.asking import Offset


@pytest.mark.parametrize(
    ("ahead_s", "surely_s"), [(0.0, 0.0), (0.9, 0.9), (5.0, 5.0), (-1.0, 0.0), (-5.0, -4.0)]
)
@pytest.mark.parametrize("late_s", [[], [4, 5, 6]])
def test_how_far_a_clock_is_off_at_least(ahead_s: float, surely_s: float, late_s: list[int]) -> None:
    """A server that is busy for a while gives old Dates meanwhile."""
    offset = Offset()
    for index in range(13):
        sent = 1000.0 + index / 10
        made = sent + ahead_s - (2.5 if index in late_s else 0.0)
        offset.note(formatdate(made // 1, usegmt=True), sent, sent + 0.05)
    assert offset.surely_s == pytest.approx(surely_s, abs=0.2)
