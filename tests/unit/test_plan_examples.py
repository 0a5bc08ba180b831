"""The examples of real scale: each is checked and planned, fits, and says in its header what the plan says."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_xy.config import load_config
from megatron_xy.errors import ConfigError
from megatron_xy.plan.assumptions import device, efficiencies
from megatron_xy.plan.overview import Plan, make_plan
from megatron_xy.plan.search import nearest_fits, search
from megatron_xy.plan.verb import parsed_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
NODES = {
    "xuanyuan2_70b/pretrain.yaml": 64,
    "xuanyuan2_70b/sft.yaml": 64,
    "xuanyuan2_70b/ppo.yaml": 64,
    "xuanyuan_13b/reward.yaml": 2,
    "xuanyuan_6b/pretrain.yaml": 4,
}


def planned(name: str, *overrides: str, num_nodes: int | None = None) -> Plan:
    nodes = num_nodes or NODES[name]
    config = load_config(EXAMPLES / name, overrides=overrides, world_size=8 * nodes)
    return make_plan(config, num_nodes=nodes, gpus_per_node=8, gpu=device("h100"), rates=efficiencies())


@pytest.mark.parametrize("name", NODES)
def test_the_examples_fit_and_plan_as_their_headers_say(name):
    plan = planned(name)
    assert plan.fits
    json.dumps(plan.to_json())
    header = re.search(r"by `plan`: (\d+) GB .*?([\d,]+)\s+tokens/s a GPU", (EXAMPLES / name).read_text())
    if name != "xuanyuan2_70b/ppo.yaml":
        assert header is not None
        assert float(header[1]) == pytest.approx(plan.worst_bytes / 1e9, abs=1)
        assert float(header[2].replace(",", "")) == pytest.approx(plan.tokens_per_second, rel=0.02)


def test_launch_scripts_name_the_examples_beside_them():
    for script in EXAMPLES.glob("xuanyuan*/launch.sh"):
        named = re.findall(r"examples/\S+?\.yaml", script.read_text())
        assert named, script
        for name in named:
            tasks = ("pretrain", "sft", "ppo") if "$task" in name else ("",)
            assert all((EXAMPLES.parent / name.replace("$task", task)).is_file() for task in tasks)


def test_what_does_not_fit_is_said_with_the_nearest_changes_that_do():
    name = "xuanyuan2_70b/pretrain.yaml"
    plan = planned(
        name, "parallel.pipeline_model_parallel_size=1", "parallel.virtual_pipeline_model_parallel_size=null"
    )
    assert not plan.fits
    found = search(plan.config, num_nodes=64, gpus_per_node=8, gpu=plan.gpu, rates=efficiencies())
    speeds = [other.tokens_per_second for other in found]
    assert speeds == sorted(speeds, reverse=True) and all(other.fits for other in found)
    near = nearest_fits(plan, found)
    assert (near and near[0].config.parallel != plan.config.parallel) or near[0].config.model != plan.config.model


def test_shares_of_wall_time():
    kept = planned("xuanyuan2_70b/pretrain.yaml").reliability
    assert kept.between_stops_seconds == pytest.approx(50_677 * 3600 / 512)
    assert 0.9 < kept.ettr_as_configured <= kept.ettr < 1


def test_a_model_that_is_not_here_needs_its_shape():
    with pytest.raises(ConfigError, match="num_layers, hidden_size"):
        planned("xuanyuan2_70b/sft.yaml", "model.num_layers=null", "model.hidden_size=null")


@pytest.mark.parametrize(("text", "number"), [("366B", 366e9), ("1.5T", 1.5e12), ("1000", 1000.0)])
def test_numbers_of_tokens(text, number):
    assert parsed_tokens(text) == number


@pytest.mark.parametrize("text", ["", "B", "-1B", "nan", "inf", "many"])
def test_bad_numbers_of_tokens(text):
    with pytest.raises(ConfigError, match="366B"):
        parsed_tokens(text)


@pytest.mark.parametrize("verb", [["check", "--world-size", "512"], ["plan", "--nodes", "64", "--json"]])
def test_a_70b_is_checked_and_planned_within_two_seconds(verb):
    began = time.perf_counter()
    command = [sys.executable, "-m", "megatron_xy", verb[0], str(EXAMPLES / "xuanyuan2_70b/pretrain.yaml"), *verb[1:]]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert time.perf_counter() - began < 2
