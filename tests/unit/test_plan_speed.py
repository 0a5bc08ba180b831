"""The planner's speeds against published runs, the table of which stands in docs/plan.md."""

import pytest

from megatron_xy.plan.assumptions import efficiencies
from megatron_xy.plan.published import fitted_matmul, megatron_lm, xuanyuan2


def test_the_efficiency_is_the_one_fitted_on_megatron_lms_70b():
    assert efficiencies().matmul == pytest.approx(fitted_matmul(), abs=0.001)


@pytest.mark.parametrize("row", megatron_lm(), ids=lambda row: row.name)
def test_megatron_lms_rows_are_predicted_within_15_percent(row):
    assert abs(row.deviation) < (0.005 if row.name == "70B" else 0.15)


@pytest.mark.parametrize("row", xuanyuan2(), ids=lambda row: row.name)
def test_xuanyuan2s_buckets_are_predicted_within_5_points(row):
    assert row.predicted == pytest.approx(row.published, abs=0.05)
