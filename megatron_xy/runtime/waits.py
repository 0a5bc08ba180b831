"""Every wait of this process for a collective, counted as a sign of life, named while it lasts, and timed on demand.

torch's process groups hand out Work objects: `Work.wait` is where a CPU's ranks stand while others are late, and where
a GPU's queue is told to. Newer versions let a GPU's synchronous collectives run in the compute queue and hand out
nothing; so the calls that start collectives are timed too, which costs next to nothing where they only start them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_xy import device
from megatron_xy.runtime.liveness import SIGNS

_STARTERS = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_into_tensor_coalesced", "alltoall",
    "alltoall_base", "barrier", "broadcast", "gather", "reduce", "reduce_scatter", "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced", "scatter",
)  # fmt: skip

_spans: list[tuple[device.Moment, device.Moment]] | None = None  # None: nobody asked to time them


def install() -> None:
    """Has every wait of this process noted from now on; a second call changes nothing. By a verb, never by an import.

    Two assignments and an increment a wait, well below a microsecond.
    """
    if hasattr(dist.Work.wait, "__wrapped__"):
        return
    dist.Work.wait = _noted(dist.Work.wait)  # type: ignore[method-assign]
    for name in _STARTERS:
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, _noted(getattr(dist.ProcessGroup, name)))


def wrapped() -> list[str]:
    """The names in torch.distributed that `install` wraps."""
    starters = [f"ProcessGroup.{name}" for name in _STARTERS if hasattr(dist.ProcessGroup, name)]
    return ["Work.wait", *starters]


def begin_timing() -> None:
    """From now on the waits are timed."""
    global _spans
    _spans = []


def end_timing() -> float:
    """Seconds of waiting since `begin_timing`; on a GPU the device must have caught up (device.synchronize)."""
    global _spans
    assert _spans is not None, "begin_timing comes first"
    spans, _spans = _spans, None
    return sum(device.seconds_between(before, after) for before, after in spans)


def _noted(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def noted(*args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        SIGNS.waits[thread] = "a collective"
        before = device.moment() if _spans is not None else None
        try:
            return call(*args, **kwargs)
        finally:
            SIGNS.waits.pop(thread, None)
            SIGNS.marks += 1
            if before is not None and _spans is not None:
                _spans.append((before, device.moment()))

    return noted
