"""The dry run's ledger on real tensors, and what its verb refuses and shows; ranks are run in tests/distributed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xy import device
from megatron_xy.config import load_config
from megatron_xy.dryrun import training, verb
from megatron_xy.dryrun.ledger import Ledger, as_kernel, storage_bytes
from megatron_xy.errors import ConfigError, UsageError

MIB = 2**20
RUN = """\
task: pretrain
run_dir: RUN
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 160, num_attention_heads: 4, vocab_size: 500}
parallel: {pipeline_model_parallel_size: 2}
data: {path: DATA}
training: {micro_batch_tokens: 1024, global_batch_tokens: 4096}
"""
PPO = """\
task: ppo
run_dir: RUN
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 160, num_attention_heads: 4, vocab_size: 500}
data: {tokenizer: TOKENIZER}
training: {micro_batch_tokens: 1024}
roles:
  actor: {ranks: "0-3", parallel: {pipeline_model_parallel_size: 2}}
  critic: {ranks: "4-5"}
  reference: {ranks: "4-5"}
  reward: {ranks: "6"}
ppo: {prompts: PROMPTS, mini_batch_size: 8, rollout_batch_size: 8, max_response_length: 256}
"""


def run_of(text: str, folder: Path, *, world_size: int) -> Any:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides=[], world_size=world_size)


def test_memory_is_that_of_storages_while_something_refers_to_them() -> None:
    ledger = Ledger(device.current())
    with ledger:
        kept = torch.zeros(MIB // 4)  # fp32: 1 MiB
        view = kept[10:].reshape(2, -1)
        assert (ledger.now, ledger.peak) == (MIB, MIB)
        passing = kept + 1
        del passing
        assert (ledger.now, ledger.peak) == (MIB, 2 * MIB)
        ledger.begin_peak()
        assert ledger.peak == MIB
        del kept
        assert ledger.now == MIB, "its view holds it"
        del view
        assert ledger.now == 0
    assert storage_bytes([torch.zeros(4), torch.zeros(8)[2:]]) == 16 + 32


def test_what_a_kernel_makes_on_its_way_is_never_held() -> None:
    def chain(values: torch.Tensor) -> torch.Tensor:
        return ((values + 1) * 2 - 3).exp()

    ledger = Ledger(device.current())
    with ledger:
        values = torch.zeros(MIB // 4)
        result = as_kernel(chain)(values)
        assert (ledger.now, ledger.peak) == (2 * MIB, 2 * MIB)
        del result
        chain(values)
        assert ledger.peak == 3 * MIB, "one after the other it takes more"


def test_what_autograd_keeps_is_held_until_the_backward_pass() -> None:
    ledger = Ledger(device.current())
    weight = torch.ones(MIB // 4, requires_grad=True)
    with ledger:
        loss = (weight.exp() * 2).sum()
        held = ledger.now
        assert MIB <= held < MIB + 1000, "exp() keeps its result, and the product nothing"
        loss.backward()
        del loss
        assert MIB <= ledger.now < MIB + 1000, "now it is the gradient"
    assert weight.grad is not None and not ledger.traffic


def test_ranks_are_those_named_and_the_first_of_each_stage(tmp_path: Path) -> None:
    config = run_of(RUN, tmp_path, world_size=8)
    assert verb.chosen_ranks(config, ranks=[], all_stages=False, world_size=8) == [0]
    assert verb.chosen_ranks(config, ranks=[5], all_stages=True, world_size=8) == [0, 4, 5]
    with pytest.raises(UsageError, match="--rank 8: a world of 8 has ranks 0 to 7"):
        verb.chosen_ranks(config, ranks=[8], all_stages=False, world_size=8)
    roles = run_of(PPO, tmp_path, world_size=7)
    assert verb.chosen_ranks(roles, ranks=[], all_stages=True, world_size=7) == [0, 2, 4, 6]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = run_of(RUN, tmp_path, world_size=8)
    with pytest.raises(ConfigError, match=r"--bucket 1000: training.micro_batch_tokens \(1024\) must be a multiple"):
        verb.run(config, ranks=[0], world_size=8, bucket=1000, say=print)
    pairs = config.model_copy(update={"task": "reward"})
    with pytest.raises(ConfigError, match=r"--bucket 1: a pair has two answers, so at least 2 tokens"):
        verb.run(pairs, ranks=[0], world_size=8, bucket=1, say=print)
    (batch,) = training.micro_batches(pairs, dp_size=8, bucket=1024)
    assert batch.pairs is not None and len(batch.pairs.margins) == 1, (
        "a step of less than its micro-batches is one, too"
    )
    roles = run_of(PPO, tmp_path, world_size=7)
    with pytest.raises(ConfigError, match=r"--bucket 200: .* more than ppo.max_response_length \(256\)"):
        verb.run(roles, ranks=[0], world_size=7, bucket=200, say=print)
    loaded = config.model_copy(
        update={"model": config.model.model_copy(update={"load": f"hf:{tmp_path / 'no'}", "num_layers": None})}
    )
    with pytest.raises(ConfigError, match="no"):
        verb.run(loaded, ranks=[0], world_size=8, bucket=None, say=print)
