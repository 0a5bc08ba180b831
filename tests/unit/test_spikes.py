"""What stands out from the last steps, on made-up curves: planted spikes all found, noise and trends never."""

import json
import math

import numpy as np
import pytest

from megatron_xy.training.spikes import FEWEST_OF_BUCKET, FEWEST_STEPS, WINDOW, StepHistory

SIGMAS = 6.0


def curve(steps, *, seed=0):
    """(bucket, loss, norm) of steps as in training: falling losses, another level and width a bucket, skewed norms."""
    random = np.random.default_rng(seed)
    for step in range(steps):
        bucket = int(random.choice([2048, 4096, 8192, 16384], p=[0.1, 0.2, 0.3, 0.4]))
        level = {2048: 3.5, 4096: 2.9, 8192: 2.5, 16384: 2.2}[bucket]
        loss = level + 4 * math.exp(-step / 60) + 0.05 * random.standard_normal()
        yield bucket, loss, {2048: 2.0}.get(bucket, 1.0) * math.exp(0.25 * random.standard_normal())


def reasons_of(steps):
    history, found = StepHistory(), {}
    for number, (bucket, loss, norm) in enumerate(steps):
        if reasons := history.reasons(bucket=bucket, loss=loss, grad_norm=norm, sigmas=SIGMAS):
            found[number] = reasons
        history.add(bucket=bucket, loss=loss, grad_norm=norm, updated=True)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_noise_trends_and_buckets_of_other_levels_are_no_spikes(seed):
    assert reasons_of(curve(700, seed=seed)) == {}


def test_planted_spikes_are_found_each_by_what_it_is():
    steps = list(curve(600))
    for number, (loss, norm) in {300: (0.8, 1), 301: (0, 9), 302: (2, 50), 500: (0.7, 1)}.items():
        bucket, usual_loss, usual_norm = steps[number]
        steps[number] = bucket, usual_loss + loss, usual_norm * norm
    found = reasons_of(steps)
    assert list(found) == [300, 301, 302, 500]
    assert [len(reasons) for reasons in found.values()] == [1, 1, 2, 1]
    assert found[300][0].startswith("loss ") and found[301][0].startswith("grad norm ")


def test_a_few_steps_are_not_enough_to_judge():
    calm = [(512, 3.0 + 0.01 * (step % 3), 1.0) for step in range(FEWEST_STEPS)]
    assert reasons_of([*calm[:-1], (512, 99.0, 99.0)]) == {}
    assert list(reasons_of([*calm, (512, 99.0, 99.0)])) == [FEWEST_STEPS]


def test_a_bucket_that_was_hardly_ever_seen_has_more_room():
    calm = [(512, 3.0 + 0.01 * (step % 3), 1.0) for step in range(60)]
    assert reasons_of([*calm, (512, 4.5, 4.0)]).keys() == {60}
    assert reasons_of([*calm, (64, 4.5, 4.0)]) == {}, "another level, as short buckets have it"
    assert len(reasons_of([*calm, (64, 9.0, 40.0)])[60]) == 2


def test_four_steps_are_enough_for_a_level_of_the_buckets_own():
    calm = [(512, 3.0 + 0.01 * (step % 3), 1.0) for step in range(60)]
    seen = [(64, 4.5 + 0.01 * (step % 3), 1.0) for step in range(FEWEST_OF_BUCKET)]
    assert reasons_of([*seen, *calm, (64, 4.7, 1.0)]).keys() == {64}
    assert reasons_of([*seen[:-1], *calm, (64, 4.7, 1.0)]) == {}


def test_a_new_level_stops_standing_out_once_the_window_has_seen_it():
    steps = [(512, 2.0 + 0.01 * (step % 5), 1.0) for step in range(200)]
    steps += [(512, 3.0 + 0.01 * (step % 5), 1.0) for step in range(200)]
    found = reasons_of(steps)
    assert list(found) == list(range(200, 200 + len(found))) and len(found) <= WINDOW // 2 + 1


def test_steps_without_a_finite_norm_are_not_remembered_but_counted():
    history = StepHistory()
    for loss, norm in ((math.nan, math.nan), (2.0, math.inf), (math.inf, 1.0)):
        history.add(bucket=8, loss=loss, grad_norm=norm, updated=False)
        assert history.reasons(bucket=8, loss=loss, grad_norm=norm, sigmas=SIGMAS) == []
    assert history.to_json() == {"skipped_in_a_row": 3, "steps": []}
    history.add(bucket=8, loss=2.0, grad_norm=0.5, updated=True)
    assert history.skipped_in_a_row == 0


def test_what_a_checkpoint_keeps_judges_as_before_bit_for_bit():
    steps = list(curve(400))
    history = StepHistory()
    for bucket, loss, norm in steps[:250]:
        history.add(bucket=bucket, loss=loss, grad_norm=norm, updated=True)
    again = StepHistory.from_json(json.loads(json.dumps(history.to_json())))
    assert len(history.to_json()["steps"]) == WINDOW
    for bucket, loss, norm in steps[250:]:
        for sigmas in (0.5, 1.0, 2.0):
            judged = [one.reasons(bucket=bucket, loss=loss, grad_norm=norm, sigmas=sigmas) for one in (history, again)]
            assert judged[0] == judged[1]
        for one in (history, again):
            one.add(bucket=bucket, loss=loss, grad_norm=norm, updated=True)
    assert again.to_json() == history.to_json()
