"""What a run refuses to go on with, and which differences to its checkpoint it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_xy.checkpoint import continuation
from megatron_xy.config import InvalidConfig, RunConfig
from megatron_xy.data.loader import PreparedStep
from megatron_xy.training.run_checkpoints import RunState
from megatron_xy.training.train_step import StepResult
from tests.distributed import models

FINGERPRINTS = {"data.path": ["a" * 64]}


def facts(**changes):
    config = RunConfig.model_validate({"data": {"path": "data"}, **changes})
    model = models.MODEL.model_copy(update=changes.get("model", {}))
    return continuation.facts(config, model=model, data_fingerprints=FINGERPRINTS)


def differences(stored, current, *, allow_changes=False, data_step=0):
    said: list[str] = []
    continuation.check_continuation(
        {**stored, "data_step": data_step},
        current,
        allow_changes=allow_changes,
        origin=Path("run/iter_0000008"),
        say=said.append,
    )
    return said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 1),
        ("untie_embeddings_and_output_weights", False),
        ("num_attention_heads", 2),
        ("num_query_groups", 1),
        ("rotary_base", 500000.0),
        ("norm_epsilon", 0.01),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_another_model_is_refused_by_name_with_both_values(name, value):
    with pytest.raises(InvalidConfig, match=rf"model\.{name} \(.*\) is .* in run/iter_0000008") as caught:
        differences(facts(), facts(model={name: value}), allow_changes=True)
    assert len(caught.value.problems) == 1


def test_a_checkpoint_written_before_a_key_has_its_default():
    old = facts()
    del old["model"]["add_qkv_bias"]
    assert differences(old, facts()) == []
    with pytest.raises(InvalidConfig, match=r"model\.add_qkv_bias \(True\) is False in run/iter_0000008"):
        differences(old, facts(model={"add_qkv_bias": True}))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 99}, "seed"),
        ({"data": {"path": "data", "weights": {"code": 1, "prose": 9}}}, "data.weights"),
        ({"training": {"global_batch_tokens": 32768}}, "training.global_batch_tokens"),
    ],
)
def test_another_order_of_the_data_is_refused_unless_allowed(changes, name):
    with pytest.raises(InvalidConfig, match=rf"{name} .*checkpoint\.allow_changes=true"):
        differences(facts(), facts(**changes))
    (line,) = differences(facts(), facts(**changes), allow_changes=True)
    assert name in line


def test_phases_that_have_begun_stay_and_those_to_come_are_free():
    def with_phases(*phases):
        return facts(
            training={"phases": [dict(zip(("from_iter", "global_batch_tokens"), one, strict=True)) for one in phases]}
        )

    then = with_phases((4, 32768), (20, 65536))
    for now in (with_phases((4, 32768), (30, 65536)), with_phases((4, 32768)), with_phases((4, 32768), (12, 16384))):
        (line,) = differences(then, now, data_step=12)
        assert line.startswith(
            "  changed since the checkpoint: training.phases {from_iter: 4, global_batch_tokens: 32768}"
        )
    for now in (with_phases((5, 32768), (20, 65536)), with_phases((4, 32768), (11, 1024)), with_phases()):
        with pytest.raises(InvalidConfig, match=r"training\.phases .*checkpoint\.allow_changes=true"):
            differences(then, now, data_step=12)
        assert len(differences(then, now, data_step=12, allow_changes=True)) == 1


def test_other_settings_are_said_and_equal_ones_are_not():
    assert differences(facts(), facts()) == []
    (line,) = differences(facts(), facts(training={"train_iters": 7}))
    assert line.endswith("training.train_iters 100 -> 7")
    pairs = {"task": "reward", "reward": {"loss": "token"}}
    (line,) = differences(facts(**pairs), facts(**{**pairs, "reward": {"loss": "sentence"}}))
    assert line.endswith("reward.loss token -> sentence")


def test_groups_left_out_are_as_many_as_heads():
    assert differences(facts(model={"num_query_groups": None}), facts(model={"num_query_groups": 4})) == []


def test_a_part_that_stays_as_it_is_misses_the_updates_that_were_made():
    step, result = PreparedStep(64, [], 2, 128, {}), StepResult(2.0, 8, {}, {}, 1.0, True, 0.0, {})
    state = RunState()
    for updated in (True, False, True):
        state.add(step, replace(result, updated=updated), trained=["embedding"])
    assert state.frozen_updates == {"rest": 2, "output_layer": 2}
