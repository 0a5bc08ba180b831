"""Who is named a straggler: by busy time per FLOP of its stage, and only if the plain seconds say so, too."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.flops import stage_share
from megatron_xy.training.stragglers import medians_of_others, outliers
from tests.distributed.models import MODEL


def test_the_slow_rank_alone_is_named():
    (one,) = outliers([1.0, 1.1, 2.4, 0.9], [0.25] * 4)
    assert one.rank == 2 and one.factor == pytest.approx(2.4) and one.busy_seconds == 2.4
    assert outliers([1.0, 1.1, 1.9, 0.9], [0.25] * 4) == []
    assert [one.rank for one in outliers([1.0, 2.5], [0.5, 0.5])] == [1]


def test_a_stage_with_more_work_may_take_longer_and_a_small_one_needs_seconds_too():
    assert outliers([1.0, 1.0, 3.0], [0.2, 0.2, 0.6]) == []
    assert outliers([0.5, 0.5, 0.5], [0.45, 0.45, 0.1]) == [], "it has little to do, and takes no longer"
    assert [one.rank for one in outliers([0.5, 0.5, 0.7], [0.45, 0.45, 0.1])] == [2]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(values=st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 1.0]), min_size=2, max_size=9))
def test_the_median_of_the_others_is_that_without_the_one(values):
    expected = [statistics.median(values[:rank] + values[rank + 1 :]) for rank in range(len(values))]
    assert medians_of_others(values) == expected


def test_shares_of_the_stages_come_to_the_whole():
    stages = [stage_share(MODEL, num_layers=2, has_head=False), stage_share(MODEL, num_layers=2, has_head=True)]
    assert sum(stages) == pytest.approx(1.0) and stages[1] > stages[0]
