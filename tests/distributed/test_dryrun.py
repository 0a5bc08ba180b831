"""What a dry run says of a rank, against the same rank of a real world of four: sizes and collectives to the byte."""

import weakref
from dataclasses import asdict
from typing import Any

import pytest
import torch

from megatron_xy import compiling, device, losses
from megatron_xy.checkpoint.host_copy import HostCopy
from megatron_xy.checkpoint.state import state_parts
from megatron_xy.config import RunConfig
from megatron_xy.dryrun.ledger import Ledger, as_kernel
from megatron_xy.dryrun.training import micro_batches, note_training_step
from megatron_xy.flops import DTYPE_BYTES
from megatron_xy.model import kernels
from megatron_xy.plan.job import jobs
from megatron_xy.plan.memory import copied_bytes
from megatron_xy.runtime import environment
from megatron_xy.training import pretrain
from tests.distributed.dry_runs import dry_runs
from tests.distributed.spawn import run_ranks
from tests.planned import rank_memory

WORLD_SIZE = 4
MODEL = {
    "num_layers": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 500,
    "max_position_embeddings": 256,
    "params_dtype": "bf16",
    "layer_spec": "torch",
}
TRAINING = {"micro_batch_tokens": 256, "global_batch_tokens": 256 * 8}


def config(task: str = "pretrain", *, model: dict[str, Any] | None = None, **layout: Any) -> RunConfig:
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vp": "virtual_pipeline_model_parallel_size",
        "sp": "sequence_parallel",
        "distributed": "use_distributed_optimizer",
        "overlap": "overlap_grad_reduce",
        "gather": "overlap_param_gather",
    }
    head = "value" if task == "reward" else "language_model"
    return RunConfig.model_validate(
        {
            "task": task,
            "model": {**MODEL, "head": head, **(model or {})},
            "parallel": {names[key]: value for key, value in layout.items()},
            "training": TRAINING,
        }
    )


CONFIGS = {
    "tp2 pp2, sequence parallel": config(tp=2, pp=2, sp=True, distributed=True),
    "pp2 dp2, distributed optimizer": config(pp=2, distributed=True),
    "tp2 dp2, overlapped": config(tp=2, sp=True, distributed=True, overlap=True, gather=True),
    "pp4 in fp32, recomputed": config(
        pp=4, model={"params_dtype": "fp32", "num_query_groups": 4, "recompute_granularity": "full"}
    ),
    "pp2 interleaved, dp2": config(pp=2, vp=2, distributed=True),
    "reward, tp2 pp2": config("reward", tp=2, pp=2, sp=True),
}


# What is held on a CPU and not on a GPU, as a part of the activations.
ON_A_CPU = {
    "pp2 interleaved, dp2": 0.02,  # outputs that were sent stay allocated
    "reward, tp2 pp2": 0.05,  # attention goes answer by answer, and joins what comes out
}


# The most that is held in all, as a multiple of what autograd keeps: with full recomputation that is little.
MOST = {"pp4 in fp32, recomputed": 1.6}


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that autograd keeps for backward passes, those of weights left out, and their peak."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.held: dict[int, int] = {}
        self.peak = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held and key not in self.weights:
            self.held[key] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, key).atexit = False
            self.peak = max(self.peak, sum(self.held.values()))
        return tensor


def on_real_ranks() -> list[dict[str, Any]]:
    """Every config's step on this rank of a world that is there, with the kernels of a GPU as the ledger takes them."""
    torch.compile = as_kernel  # type: ignore[assignment]
    for module in (compiling, kernels, losses):
        module.compiler = lambda: compiling.Compiler(True, "as on a GPU")  # type: ignore[attr-defined]
    # Of a weight that went through hooks, autograd gives back another object, without what megatron-core has written on
    # it: that its gradient has been added up. So a gradient of zeros is added once more.
    torch.Tensor.grad_added_to_main_grad, torch.Tensor.zero_out_wgrad = False, True  # type: ignore[attr-defined]
    findings = []
    for chosen in CONFIGS.values():
        ledger = Ledger(device.current())
        with ledger:
            role = pretrain.build(chosen)
            role.draw_weights(seed=1)
            batches = micro_batches(chosen, dp_size=role.groups.dp_size, bucket=chosen.training.micro_batch_tokens)
            saved = SavedTensors([named.parameter for named in role.named_parameters()])
            with saved:
                found = note_training_step(chosen, role, batches, ledger=ledger, rank=environment.rank())
        copies = HostCopy().run({part.name: part.shard.trim(part.tensor) for part in state_parts(role)})
        copied = sum(copy.nbytes for copy in copies.values())
        findings.append({**asdict(found), "saved": saved.peak, "copied": copied})
    return findings


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """By config: (dry, real) of every rank."""
    dry = dry_runs([(chosen, WORLD_SIZE, list(range(WORLD_SIZE))) for chosen in CONFIGS.values()])
    real = run_ranks(on_real_ranks, world_size=WORLD_SIZE, timeout_seconds=300)
    return {
        name: list(zip(ranks, (rank[number] for rank in real), strict=True))
        for number, (name, ranks) in enumerate(zip(CONFIGS, dry, strict=True))
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_the_real_rank(found: Any, name: str) -> None:
    for dry, real in found[name]:
        for key in ("rank", "pp_rank", "num_layers", "num_micro_batches", "parameters"):
            assert dry[key] == real[key], key
        for key in ("weights", "gradients", "optimizer"):
            assert dry[key] == real[key] > 0, key


@pytest.mark.parametrize("name", CONFIGS)
def test_collectives_are_those_of_the_real_rank(found: Any, name: str) -> None:
    for dry, real in found[name]:
        assert dry["collectives"] == real["collectives"] != []


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_those_of_the_real_rank(found: Any, name: str) -> None:
    """A CPU keeps a few states of its generators besides, of 5 kB each, and what ON_A_CPU says, and at most two
    hidden states that the next stage is late to take."""
    model, parallel = CONFIGS[name].model, CONFIGS[name].parallel
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    hidden_state = TRAINING["micro_batch_tokens"] * MODEL["hidden_size"] * DTYPE_BYTES[model.params_dtype] // split
    late = 2 * hidden_state if parallel.pipeline_model_parallel_size > 1 else 0
    for dry, real in found[name]:
        besides = real["activations"] - dry["activations"]
        assert -0.001 * dry["activations"] < besides < (0.02 + ON_A_CPU.get(name, 0.0)) * dry["activations"] + late


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_what_autograd_keeps_and_the_work_at_hand(found: Any, name: str) -> None:
    """Counted by another way: what is saved for backward passes is most of what is held at the peak."""
    for dry, real in found[name]:
        assert real["saved"] < dry["activations"] * (1 + ON_A_CPU.get(name, 0.0)) < MOST.get(name, 1.5) * real["saved"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_planner_says_what_the_real_rank_holds(found: Any, name: str) -> None:
    """Parameters, weights and gradients to the byte; activations as near as rules of thumb come at this size."""
    for _, real in found[name]:
        (planned,) = rank_memory(CONFIGS[name], world_size=WORLD_SIZE, rank=real["rank"])
        assert planned.parameters == real["parameters"]
        assert (planned.weights, planned.gradients) == (real["weights"], real["gradients"])
        (job,) = jobs(CONFIGS[name], world_size=WORLD_SIZE)
        copied = copied_bytes(job, stage=real["pp_rank"])[real["dp_rank"]]
        assert (0.9 if real["tp_rank"] else 0.99) * copied < real["copied"] <= copied
        assert planned.activations == pytest.approx(real["activations"], rel=0.07 + ON_A_CPU.get(name, 0.0))
