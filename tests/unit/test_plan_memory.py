"""The planner's parameters and memory: against what dry runs counted, against sums over ranks, and by layout."""

from pathlib import Path

import pytest

from megatron_xy.config import ModelConfig, ParallelConfig, load_config
from megatron_xy.flops import checkpoint_bytes, num_parameters
from megatron_xy.plan.job import jobs
from megatron_xy.plan.memory import copied_bytes, stage_memory
from megatron_xy.plan.parameters import chunk_buffers, chunk_parameters
from megatron_xy.plan.speed import traffic
from tests.planned import rank_memory

EXAMPLES = Path(__file__).parents[2] / "examples"
PRETRAIN_70B = EXAMPLES / "xuanyuan2_70b" / "pretrain.yaml"
LAYOUT = ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=5"]
MODEL = ModelConfig(
    num_layers=7, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=4, vocab_size=1024
)


@pytest.mark.parametrize(
    ("rank", "parameters", "weights", "gradients", "optimizer", "activations"),
    [  # of `megatron-xy dryrun`, which builds the ranks' modules
        (0, 2_180_317_184, 4_360_634_368, 8_721_268_736, 1_635_237_952, 20_931_217_008),
        (500, 2_180_325_376, 4_360_650_752, 8_721_301_504, 1_635_244_052, 15_900_673_444),
    ],
)
def test_a_rank_of_the_70b_holds_what_a_dry_run_of_it_counted(
    rank, parameters, weights, gradients, optimizer, activations
):
    changes = [*LAYOUT, "model.recompute_granularity=selective", "training.micro_batch_tokens=16384"]
    config = load_config(PRETRAIN_70B, overrides=[*changes, "training.global_batch_tokens=4194304"], world_size=512)
    (memory,) = rank_memory(config, world_size=512, rank=rank)
    assert (memory.parameters, memory.weights, memory.gradients) == (parameters, weights, gradients)
    assert memory.optimizer == pytest.approx(optimizer, rel=1e-6)  # without the step counters, 4 bytes a parameter
    assert memory.activations == pytest.approx(activations, rel=0.02)


def test_the_first_stage_sends_what_a_dry_run_of_it_counted():
    changes = [*LAYOUT, "model.recompute_granularity=selective"]
    (job,) = jobs(load_config(PRETRAIN_70B, overrides=changes, world_size=512), world_size=512)
    sent = traffic(job)
    assert sent.tensor_parallel == 605_590_388_736 + 433_791_696_896  # all-gathers, reduce-scatters
    assert sent.pipeline == 4_831_838_208
    assert sent.data_parallel == 4_360_634_368 + 8_721_268_736  # weights, gradients


@pytest.mark.parametrize(
    ("name", "world_size", "rank", "overrides", "parameters", "static", "activations"),
    [  # of dry runs, with fewer layers
        ("xuanyuan_6b/pretrain", 32, 0, ["parallel.use_distributed_optimizer=false",
         "parallel.overlap_param_gather=false"], 567_316_480, 10_211_696_748, 2_951_635_408),
        ("xuanyuan_6b/pretrain", 32, 3, ["parallel.pipeline_model_parallel_size=2",
         "model.recompute_granularity=full"], 283_656_192, 2_127_421_460, 990_560_536),
        ("xuanyuan_6b/pretrain", 32, 31, ["parallel.pipeline_model_parallel_size=2",
         "model.untie_embeddings_and_output_weights=false"], 283_660_288, 2_127_452_176, 1_910_784_820),
        ("xuanyuan_13b/reward", 16, 5, ["model.num_layers=6"], 526_981_120, 4_742_835_268, 2_314_346_924),
        ("xuanyuan2_70b/ppo", 128, 0, ["model.num_layers=8"], 254_836_736, 3_058_040_862, 1_474_658_828),
    ],
)  # fmt: skip
def test_ranks_of_other_layouts_and_tasks_hold_what_dry_runs_counted(
    name, world_size, rank, overrides, parameters, static, activations
):
    changes = overrides if any("num_layers" in change for change in overrides) else [*overrides, "model.num_layers=4"]
    config = load_config(EXAMPLES / f"{name}.yaml", overrides=changes, world_size=world_size)
    (memory,) = rank_memory(config, world_size=world_size, rank=rank)
    assert memory.parameters == parameters
    assert memory.static == pytest.approx(static, rel=1e-6)
    assert memory.total == pytest.approx(static + activations, rel=0.025)
    assert memory.activations == pytest.approx(activations, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["language_model", "value"])
@pytest.mark.parametrize(("tp", "pp", "vp"), [(1, 1, None), (2, 1, None), (4, 3, None), (2, 3, 2), (1, 7, None)])
def test_stages_hold_the_model_once(tied, head, tp, pp, vp):
    model = MODEL.model_copy(update={"untie_embeddings_and_output_weights": not tied, "head": head})
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vp
    )
    held = 0
    for stage in range(pp):
        for chunk in range(vp or 1):
            for parameter in chunk_parameters(model, parallel, stage=stage, chunk=chunk):
                is_whole = "layernorm" in parameter.name or parameter.name == "value_head"
                held += parameter.num_elements * (1 if is_whole else tp)
    copies = model.vocab_size * model.hidden_size if model.has_tied_output_layer and pp > 1 else 0
    assert held == num_parameters(model) + copies


@pytest.mark.parametrize("dp_size", [1, 3, 8])
@pytest.mark.parametrize("overlap", [False, True])
def test_replicas_own_every_parameter_once(dp_size, overlap):
    parallel = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=overlap)
    parameters = chunk_parameters(MODEL, parallel, stage=0, chunk=0)
    (buffer,) = chunk_buffers(parameters, parallel=parallel, stage=0, chunk=0, dp_size=dp_size)
    assert sum(buffer.owned_by_replica) == sum(parameter.num_elements for parameter in parameters)
    assert buffer.num_elements % dp_size == 0


@pytest.mark.parametrize("is_distributed", ["false", "true"])
def test_the_copies_of_all_ranks_are_a_checkpoint(is_distributed):
    layout = {"tensor_model": 1, "pipeline_model": 2}
    changes = [f"parallel.{name}_parallel_size={size}" for name, size in layout.items()]
    changes += [f"parallel.{name}=false" for name in ("sequence_parallel", "overlap_param_gather")]
    changes.append(f"parallel.use_distributed_optimizer={is_distributed}")
    (job,) = jobs(load_config(EXAMPLES / "xuanyuan_6b/pretrain.yaml", overrides=changes, world_size=16), world_size=16)
    copied = [copied_bytes(job, stage=stage) for stage in range(2)]
    assert sum(map(sum, copied)) == pytest.approx(checkpoint_bytes(job.model), rel=1e-3) and all(map(all, copied))


def test_first_stages_hold_more_micro_batches_and_fewer_with_recomputation():
    config = load_config(PRETRAIN_70B, overrides=[*LAYOUT, "parallel.virtual_pipeline_model_parallel_size=null"])
    (job,) = jobs(config, world_size=512)
    stages = [stage_memory(job, stage=stage) for stage in range(4)]
    assert [memory.in_flight for memory in stages] == [4, 3, 2, 1]
    by_mode = {}
    for mode in ("none", "selective", "full"):
        model = config.model.model_copy(update={"recompute_granularity": mode})
        (job,) = jobs(config.model_copy(update={"model": model}), world_size=512)
        by_mode[mode] = stage_memory(job, stage=0).activations
    assert by_mode["none"] > 1.5 * by_mode["selective"] > 3 * by_mode["full"]


def test_every_rank_of_a_stage_holds_the_same_but_for_the_optimizer():
    config = load_config(PRETRAIN_70B, overrides=LAYOUT, world_size=512)
    ranks = [rank_memory(config, world_size=512, rank=rank)[0] for rank in (128, 129, 255)]
    assert len({(memory.stage, memory.parameters, memory.activations) for memory in ranks}) == 1
    assert ranks[0].optimizer == ranks[1].optimizer != 0
