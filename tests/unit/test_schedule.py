"""The learning rate against closed forms: every style, by iterations and by tokens, from any place without a memory."""

import itertools
import math

import pytest

from megatron_xy.config import OptimizerConfig
from megatron_xy.training.schedule import learning_rate

BATCH = 4096


def rate(iteration, *, train_iters, consumed_tokens=0, lr=4e-3, min_lr=1e-3, **keys):
    config = OptimizerConfig(lr=lr, min_lr=min_lr, **keys)
    return learning_rate(config, iteration=iteration, consumed_tokens=consumed_tokens, train_iters=train_iters)


def by_iterations(train_iters, *, steps=None, **keys):
    return [rate(iteration, train_iters=train_iters, **keys) for iteration in range(1, (steps or train_iters) + 1)]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "train_iters"), [(0, 1), (0, 10), (4, 20), (10, 10), (9, 10)])
def test_the_rate_follows_its_formula(style, warmup, train_iters):
    rates = by_iterations(train_iters, lr_decay_style=style, lr_warmup_iters=warmup)
    for iteration, found in enumerate(rates, start=1):
        if iteration <= warmup:
            want = 4e-3 * iteration / warmup
        elif style == "constant":
            want = 4e-3
        else:
            done = (iteration - warmup) / (train_iters - warmup)
            share = (1 + math.cos(math.pi * done)) / 2 if style == "cosine" else 1 - done
            want = 1e-3 + 3e-3 * share
        assert found == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("style", "last"), [("cosine", 1e-3), ("linear", 1e-3), ("constant", 4e-3)])
def test_the_rate_ends_where_it_should_and_stays_there(style, last):
    whole = by_iterations(50, steps=79, lr_decay_style=style, lr_warmup_iters=5)
    assert whole[0] == pytest.approx(8e-4)
    assert max(whole) == whole[4] == 4e-3
    assert whole[49] == pytest.approx(last, rel=1e-12)
    assert whole[50:] == [whole[49]] * 29
    assert all(a >= b for a, b in itertools.pairwise(whole[4:]))


WSD_FORMS = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "exponential": lambda done: 2 * 0.5**done - 1,
    "minus_sqrt": lambda done: 1 - done**0.5,
}


@pytest.mark.parametrize("style", WSD_FORMS)
def test_wsd_is_warm_up_stable_and_decay(style):
    keys = {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_warmup_iters": 4, "lr_wsd_decay_iters": 10}
    whole = by_iterations(40, steps=45, **keys)
    assert whole[:4] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3], rel=1e-12)
    assert whole[4:30] == [4e-3] * 26
    want = [1e-3 + 3e-3 * WSD_FORMS[style](done / 10) for done in range(1, 11)]
    assert whole[30:40] == pytest.approx(want, rel=1e-12)
    assert whole[40:] == [whole[39]] * 5 and whole[39] == pytest.approx(1e-3, rel=1e-12)


def test_a_wsd_decay_longer_than_what_follows_the_warm_up_begins_with_its_end():
    whole = by_iterations(
        12, lr_decay_style="WSD", lr_wsd_decay_style="linear", lr_warmup_iters=4, lr_wsd_decay_iters=99
    )
    assert whole[3] == 4e-3
    assert whole[4:] == pytest.approx([1e-3 + 3e-3 * (1 - done / 8) for done in range(1, 9)], rel=1e-12)


def test_the_decay_may_end_before_the_run():
    whole = by_iterations(30, lr_decay_style="linear", lr_warmup_iters=0, lr_decay_iters=10)
    assert whole[:10] == by_iterations(10, lr_decay_style="linear", lr_warmup_iters=0)
    assert whole[10:] == [whole[9]] * 20 and whole[9] == pytest.approx(1e-3, rel=1e-12)


def test_a_decay_that_ends_within_the_warm_up_leaves_min_lr_after_it():
    for keys in ({}, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 1}):
        rates = by_iterations(10, lr_warmup_iters=4, lr_decay_iters=2, **keys)
        assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, *[1e-3] * 6], rel=1e-12)


def test_a_warm_up_longer_than_the_run_only_rises():
    assert by_iterations(10, lr_warmup_iters=100) == pytest.approx([4e-3 * i / 100 for i in range(1, 11)], rel=1e-12)


def test_a_warm_up_again_starts_above_what_it_is_told():
    whole = by_iterations(20, lr_warmup_iters=5, lr_warmup_init=1e-3)
    assert whole[:5] == pytest.approx([1.6e-3, 2.2e-3, 2.8e-3, 3.4e-3, 4e-3], rel=1e-12)
    assert whole[5:] == by_iterations(20, lr_warmup_iters=5)[5:]


@pytest.mark.parametrize(
    "keys",
    [
        {"lr_decay_style": "cosine"},
        {"lr_decay_style": "linear"},
        {"lr_decay_style": "constant"},
        {"lr_decay_style": "WSD", "lr_wsd_decay_tokens": 9 * BATCH},
    ],
    ids=lambda keys: keys["lr_decay_style"],
)
def test_by_tokens_equals_by_iterations_at_one_batch_size_and_follows_another(keys):
    by_tokens = {**keys, "lr_warmup_tokens": 4 * BATCH, "lr_decay_tokens": 30 * BATCH}
    same = {"lr_warmup_iters": 4, "lr_decay_iters": 30, "lr_decay_style": keys["lr_decay_style"]}
    if "lr_wsd_decay_tokens" in keys:
        same["lr_wsd_decay_iters"] = 9
    steady = [rate(i, train_iters=99, consumed_tokens=i * BATCH, **by_tokens) for i in range(1, 41)]
    assert steady == pytest.approx(by_iterations(99, steps=40, **same), rel=1e-12)
    doubled = [rate(i, train_iters=99, consumed_tokens=2 * i * BATCH, **by_tokens) for i in range(1, 21)]
    assert doubled == steady[1::2], "twice the tokens a step: the same rates in half the steps, bit for bit"
