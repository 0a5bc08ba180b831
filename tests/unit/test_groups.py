"""Process groups of a role: which there are, counted in a world whose collectives carry nothing."""

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_xy import parallel
from megatron_xy.config import ParallelConfig


def test_a_rank_has_one_group_of_its_own_whatever_it_stands_for() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=64)
    try:
        before = distributed_c10d._world.group_count
        groups = parallel.build_groups("model", ranks=range(64), parallel=layout, timeout_seconds=60)
        number = distributed_c10d._world.group_count - before
    finally:
        dist.destroy_process_group()
    assert groups is not None
    collection = groups.collection
    assert collection.cp is collection.ep is collection.pos_embd and collection.cp.size() == 1
    tensor, pipeline, data, model, ends, everyone = 32, 16, 8, 8, 16, 1
    assert number == 64 + tensor + pipeline + data + model + ends + everyone
    assert collection.embd is not collection.pp, "generation has one group for each direction"
