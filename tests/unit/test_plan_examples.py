"""The examples of real scale: each is checked and planned, fits, and says in its header what the plan says."""

import dataclasses
import itertools
import json
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.config import InvalidConfig, ModelConfig, ParallelConfig, check_world, load_config
from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.plan import verb
from megatron_xy.plan.assumptions import Cluster, device, efficiencies
from megatron_xy.plan.calibrate import calibrate
from megatron_xy.plan.overview import Plan, make_plan
from megatron_xy.plan.parameters import stage_layers, telling_stages
from megatron_xy.plan.picture import save_picture
from megatron_xy.plan.placements import sizes
from megatron_xy.plan.search import changes, nearest_fits, search
from megatron_xy.plan.speed import step_time
from megatron_xy.plan.verb import parsed_tokens

ROLES = ("actor", "critic", "reference", "reward")
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
    return make_plan(config, Cluster(device("h100"), num_nodes=nodes))


@pytest.mark.parametrize("name", NODES)
def test_the_examples_fit_and_plan_as_their_headers_say(name):
    plan = planned(name)
    assert plan.fits
    copies = json.loads(json.dumps(plan.to_json()))["host_copy_bytes"]
    assert 0 < copies["rank"] <= copies["node"] <= 8 * copies["rank"]
    header = re.search(r"by `plan`: (\d+) GB .*?([\d,]+)\s+tokens/s a GPU", (EXAMPLES / name).read_text())
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
    found = search(plan.config, plan.cluster)
    speeds = [other.tokens_per_second for other in found]
    assert speeds == sorted(speeds, reverse=True) and all(other.fits for other in found)
    near = nearest_fits(plan, found)
    assert (near and near[0].config.parallel != plan.config.parallel) or near[0].config.model != plan.config.model


def test_shares_of_wall_time():
    kept = planned("xuanyuan2_70b/pretrain.yaml").reliability
    assert kept.between_stops_seconds == pytest.approx(50_677 * 3600 / 512)
    assert 0.9 < kept.ettr_as_configured <= kept.ettr < 1


def test_a_model_that_is_not_here_needs_its_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no demo has run
    with pytest.raises(ConfigError, match="num_layers, hidden_size"):
        planned("xuanyuan2_70b/sft.yaml", "model.num_layers=null", "model.hidden_size=null")
    options = {"overrides": [], "num_nodes": 1, "gpus_per_node": 4, "gpu": "h100", "tokens": None, "calibrate_by": None}
    with pytest.raises(ConfigError, match=r"num_layers, .* missing"):
        verb.plan(EXAMPLES / "tiny/sft.yaml", **options, do_search=True, as_json=False)


@pytest.mark.parametrize(("text", "number"), [("366B", 366e9), ("1.5T", 1.5e12), ("1000", 1000.0)])
def test_numbers_of_tokens(text, number):
    assert parsed_tokens(text) == number


@pytest.mark.parametrize("text", ["", "B", "-1B", "nan", "inf", "many"])
def test_bad_numbers_of_tokens(text):
    with pytest.raises(UsageError, match="366B"):
        parsed_tokens(text)
    options = {"overrides": [], "num_nodes": 1, "gpus_per_node": 4, "gpu": "h100", "calibrate_by": None}
    with pytest.raises(UsageError, match="366B"):  # before the config is read
        verb.plan(Path("none.yaml"), **options, tokens=text, do_search=True, as_json=False)


def test_a_gpu_that_the_planner_does_not_know():
    with pytest.raises(UsageError, match=r"--gpu \(b999\) is not known; the planner knows h100, h200"):
        device("b999")


@pytest.mark.parametrize("verb", [["check", "--world-size", "512"], ["plan", "--nodes", "64", "--json"]])
def test_a_70b_is_checked_and_planned_within_two_seconds(verb):
    began = cpu_seconds_of_children()  # other work on the machine does not count
    command = [sys.executable, "-m", "megatron_xy", verb[0], str(EXAMPLES / "xuanyuan2_70b/pretrain.yaml"), *verb[1:]]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert cpu_seconds_of_children() - began < 2


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_ppo_steps_time_line_and_split():
    plan = planned("xuanyuan2_70b/ppo.yaml")
    line, split = plan.time_line, plan.best_split
    assert line is not None and split is not None
    assert line.seconds == pytest.approx(sum(line.phases.values()))
    assert line.phases["generate"] == line.work["actor"]["generate"] > 0
    assert line.phases["score"] == max(work["score"] for work in line.work.values())
    assert all(0 <= share < 1 for share in line.idle_shares.values())
    assert sum(split.nodes.values()) == 64 and split.seconds <= line.seconds


def test_roles_that_share_ranks_take_turns():
    ranks = [f"roles.{role}.ranks=0-127" for role in ("actor", "critic", "reference", "reward")]
    line = planned("xuanyuan2_70b/ppo.yaml", *ranks, num_nodes=16).time_line
    assert line is not None
    assert line.phases["score"] == pytest.approx(sum(work["score"] for work in line.work.values()))


@pytest.mark.parametrize("num_nodes", [64, 1])
def test_placements_of_ppos_roles_are_found_and_their_overrides_give_them(num_nodes):
    name, small = "xuanyuan2_70b/ppo.yaml", []
    if num_nodes == 1:  # parts of a node, and models that fit on them
        stages = "parallel.pipeline_model_parallel_size=1"
        small = [f"{where}model.num_layers=12" for where in ("", "roles.critic.", "roles.reward.")]
        small += [f"roles.{role}.{change}" for role in ROLES for change in ("share=null", "ranks=0-7", stages)]
    plan = planned(name, *small, num_nodes=num_nodes)
    found = search(plan.config, plan.cluster)
    steps = [other.step_seconds for other in found]
    assert steps == sorted(steps) and all(other.fits for other in found)
    assert steps[0] < plan.step_seconds
    ways = {tuple(role.job.ranks == other.roles[0].job.ranks for role in other.roles) for other in found}
    assert len(ways) > 1, "roles are tried apart and together"
    for other in found:
        for role in other.roles:
            tp, ranks = role.job.parallel.tensor_model_parallel_size, role.job.ranks
            assert all(ranks[first] // 8 == ranks[first + tp - 1] // 8 for first in range(0, len(ranks), tp))
    again = planned(name, *small, *changes(plan.config, found[0].config), num_nodes=num_nodes)
    assert again.step_seconds == pytest.approx(steps[0])
    assert again.worst_bytes == found[0].worst_bytes


def test_a_search_needs_no_layout_that_goes_with_the_ranks(capsys):
    path, options = EXAMPLES / "xuanyuan2_70b/ppo.yaml", {"gpu": "h100", "tokens": None, "calibrate_by": None}
    options |= {"overrides": [], "num_nodes": 6, "gpus_per_node": 8}
    with pytest.raises(InvalidConfig, match="must be a multiple of its tensor x pipeline"):
        verb.plan(path, **options, do_search=False, as_json=False)
    made = verb.plan(path, **options, do_search=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert made.cluster.world_size == 48 and made.fits
    assert told["overrides"] == told["layouts"][0]["overrides"]
    load_config(path, overrides=told["overrides"], world_size=48)


@pytest.mark.parametrize(
    ("name", "num_nodes", "layout"),
    [("xuanyuan_6b/pretrain.yaml", 3, (1, 3)), ("xuanyuan2_70b/pretrain.yaml", 40, (8, 10))],
)
def test_a_search_looks_at_all_pipelines_that_divide_the_ranks(name, num_nodes, layout):
    config = load_config(EXAMPLES / name)
    found = search(config, Cluster(device("h100"), num_nodes=num_nodes))
    fitting = {
        (plan.config.parallel.tensor_model_parallel_size, plan.config.parallel.pipeline_model_parallel_size)
        for plan in found
    }
    assert layout in fitting
    load_config(EXAMPLES / name, overrides=changes(config, found[0].config), world_size=8 * num_nodes)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("xuanyuan_6b/pretrain.yaml", ["pipeline_model_parallel_size=4", "virtual_pipeline_model_parallel_size=3"]),
        ("xuanyuan_6b/pretrain.yaml", ["sequence_parallel=false"]),
        ("xuanyuan_6b/pretrain.yaml", ["tensor_model_parallel_size=16"]),
    ],
)
def test_a_search_looks_at_the_config_s_own_layout(name, overrides):
    plan = planned(name, *(f"parallel.{override}" for override in overrides))
    assert plan.fits
    found = search(plan.config, plan.cluster)
    assert [other.step_seconds for other in found if not changes(plan.config, other.config)] == [plan.step_seconds]


def test_a_search_looks_at_roles_that_share_a_part_of_their_ranks():
    small = [f"{where}model.num_layers=4" for where in ("", "roles.critic.", "roles.reward.")]
    small += [
        f"roles.{role}.parallel.{size}_model_parallel_size=1" for role in ROLES for size in ("tensor", "pipeline")
    ]
    ranks = {"actor": "0-2", "critic": "2-4", "reference": "0-6", "reward": "3-6"}
    small += [f"roles.{role}.ranks={where}" for role, where in ranks.items()]
    config = load_config(EXAMPLES / "xuanyuan2_70b/ppo.yaml", overrides=small, world_size=7)
    found = search(config, Cluster(device("h200"), gpus_per_node=7))
    assert any(not changes(config, other.config) for other in found)


def test_tensor_parallel_ranks_of_a_search_stay_within_a_node():
    found = set(sizes(num_ranks=24, num_layers=5, gpus_per_node=6))
    assert found == {
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 1),
        (2, 2),
        (2, 3),
        (2, 4),
        (3, 1),
        (3, 2),
        (3, 4),
        (6, 1),
        (6, 2),
        (6, 4),
    }


def test_no_stage_has_more_layers_than_those_that_the_search_looks_at():
    for num_layers, stages, chunks in itertools.product(range(1, 33), range(1, 9), range(1, 5)):
        if stages * chunks <= num_layers:
            model = ModelConfig(
                num_layers=num_layers, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=8
            )
            parallel = ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks)
            layers = [sum(stage_layers(model, parallel, stage=stage)) for stage in range(stages)]
            assert max(layers) == max(layers[stage] for stage in telling_stages(model, parallel))


def test_a_search_says_why_no_layout_goes_with_the_ranks():
    options = {"overrides": [], "gpus_per_node": 8, "gpu": "h100", "tokens": None, "calibrate_by": None}
    with pytest.raises(
        ConfigError, match=r"nearest: 640, 672\nno layout .* is allowed; with .*: 1 problem(?s:.*) 83 = "
    ):
        verb.plan(EXAMPLES / "xuanyuan2_70b/pretrain.yaml", **options, num_nodes=83, do_search=True, as_json=False)
    with pytest.raises(ConfigError, match="no layout of these ranks fits; take more nodes"):
        verb.plan(EXAMPLES / "xuanyuan2_70b/pretrain.yaml", **options, num_nodes=1, do_search=True, as_json=False)


def test_no_placement_drawn_at_random_is_faster_than_the_best_one_found():
    draw = random.Random(7)
    plan = planned("xuanyuan2_70b/ppo.yaml", num_nodes=16)
    best = search(plan.config, plan.cluster)[0].step_seconds
    num_fitting = 0
    for _ in range(120):
        borders = sorted(draw.sample(range(1, 16), 2))
        parts = [range(8 * first, 8 * last) for first, last in zip([0, *borders], [*borders, 16], strict=True)]
        placed = {}
        for place, role in enumerate(ROLES):  # every part has a role, and some have two
            ranks = parts[place] if place < 3 else draw.choice(parts)
            parallel = {"tensor_model_parallel_size": draw.choice([2, 4, 8])}
            parallel |= {"pipeline_model_parallel_size": draw.choice([1, 2, 4]), "use_distributed_optimizer": True}
            was = plan.config.roles[role]
            model = was.model.model_copy(update={"recompute_granularity": draw.choice(["none", "selective", "full"])})
            placed[role] = was.model_copy(
                update={
                    "share": None,
                    "ranks": f"{ranks[0]}-{ranks[-1]}",
                    "model": model,
                    "parallel": ParallelConfig(**parallel),
                }
            )
        config = plan.config.model_copy(update={"roles": placed})
        try:
            check_world(config, world_size=128)
        except InvalidConfig:
            continue
        drawn = make_plan(config, plan.cluster, with_split=False)
        num_fitting += drawn.fits
        assert not drawn.fits or drawn.step_seconds > 0.98 * best
    assert num_fitting > 5


def test_a_plan_is_drawn(tmp_path):
    save_picture(planned("xuanyuan2_70b/ppo.yaml"), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("picture", "error", "told"),
    [
        ("plan.xyz", UsageError, "must end in .png, .pdf or .svg"),
        ("nowhere/plan.png", ConfigError, "there is no folder {}/nowhere; make it, or name another"),
    ],
)
def test_where_no_picture_can_be_nothing_is_planned(tmp_path, picture, error, told):
    path = tmp_path / picture
    with pytest.raises(error, match=re.escape(f"--picture {path}: {told.format(tmp_path)}")):
        CliRunner().invoke(app, ["plan", "no such file", "--picture", str(path)], catch_exceptions=False)


def test_a_calibration_finds_how_much_slower_a_run_was(tmp_path):
    name = "xuanyuan_6b/pretrain.yaml"
    plan = planned(name)
    config = plan.config.model_dump_json(exclude={"model": {"head"}})
    (tmp_path / "run.yaml").write_text(config)
    (tmp_path / "env.json").write_text('{"world_size": 32}')
    slower = dataclasses.replace(
        efficiencies(),
        **{name: 0.8 * getattr(efficiencies(), name) for name in ("matmul", "attention", "memory", "node_network")},
        network=0.8 * efficiencies().network,
    )
    step = step_time(plan.roles[0].job, dataclasses.replace(plan.cluster, rates=slower), bucket=2048)
    rows = [
        {"iteration": number, "bucket": 2048, "tokens_per_second": 32 * step.tokens_per_second} for number in (3, 4)
    ]
    rows.insert(0, {"iteration": 1, "bucket": 2048, "tokens_per_second": 1.0})  # the first steps do not count
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = calibrate(tmp_path, plan.cluster)
    assert found.factor == pytest.approx(0.8, abs=0.01)
    assert found.speeds[0].predicted == pytest.approx(found.speeds[0].measured, rel=0.01)
    assert found.speeds[0].before > found.speeds[0].measured


@pytest.mark.parametrize("name", NODES)
def test_the_total_of_every_mode_of_recomputation_is_told(name):
    for role in planned(name).roles:
        for memory in role.stages:
            totals = role.totals_of(memory.stage)
            assert bool(totals) is role.job.is_trained
            if totals:
                assert totals[role.job.model.recompute_granularity] == memory.total
                assert totals["none"] > totals["selective"] >= totals["full"]  # generation's cache may be more
