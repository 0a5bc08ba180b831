"""What several files of unit tests begin with."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_xy import parallel
from megatron_xy.config import ParallelConfig


@pytest.fixture(scope="module")
def alone() -> Iterator[parallel.Groups]:
    """A role's groups in a world of this process alone."""
    started = not dist.is_initialized()
    if started:
        parallel.start_alone()
    groups = parallel.build_groups("model", ranks=[0], parallel=ParallelConfig(), timeout_seconds=60)
    assert groups is not None
    yield groups
    if started:
        dist.destroy_process_group()
