"""This process's device and backend: a GPU, or the CPU with a stand-in for torch.cuda under megatron-core.

megatron-core calls `torch.cuda` and names the device literally in many places. `start`, called by a verb before
anything imports megatron.core, settles the device. On a GPU it patches nothing; on a CPU cuda_stand_in.py does.

A dry run has the same stand-in over torch's meta device, whose tensors have shapes and no data: `start_dry`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import resource
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from megatron_xy import cuda_stand_in
from megatron_xy.errors import ConfigError

_CPU = torch.device("cpu")
_META = torch.device("meta")
# What the backends say, in errors of no type of their own, when another rank is gone or stands still.
COLLECTIVE_ERROR_MARKS = (
    "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe",
)  # fmt: skip
# What CUDA says, in the same way, when this rank's own GPU has failed.
BROKEN_GPU_MARKS = (
    "uncorrectable ECC error", "uncorrectable NVLink error", "hardware stack error", "or a hardware error",
    "CUDA error: unknown error",
)  # fmt: skip
Moment = Any  # a float of time.perf_counter() on a CPU, an event in the queue on a GPU

_device: torch.device | None = None
_patched: list[str] = []


def start(*, local_rank: int = 0, num_threads: int = 1, deterministic: bool = False) -> torch.device:
    """Settles this process's device: GPU number `local_rank`, or the CPU with the stand-in.

    Call it before `mcore` is imported.

    num_threads: CPU threads of torch in this process; set always, since results depend on it bit for bit.
    """
    global _device
    torch.set_num_threads(num_threads)
    # Read when CUDA starts. One queue from host to GPU: a collective begins before the matrix product that hides it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if deterministic:  # cuBLAS would share its scratch memory among streams, NVLink's switches add up in any order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the setter imports torch._dynamo: 2 s
        torch.use_deterministic_algorithms(deterministic)
    if _device is not None:
        return _device
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {local_rank} of this host has no GPU: there are {torch.cuda.device_count()}; "
                f"start no more ranks a host than it has (--nproc-per-node)"
            )
        _device = torch.device("cuda", local_rank)
        torch.cuda.set_device(_device)
        # On Hopper scaled dot product attention would take cuDNN's, which builds a kernel for every length it meets, in
        # a tenth of a second: for every token that is generated. Who pads to few lengths asks for it: cudnn_attention.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        _device = _CPU
        _patched.extend(cuda_stand_in.install(_device))
    return _device


def start_dry() -> torch.device:
    """Settles this process on tensors that have shapes and no data, where a job's ranks have a GPU's: for a dry run.

    On any machine, in place of `start`.
    """
    global _device
    assert _device is None, "a process has one device"
    torch.set_num_threads(1)
    _device = _META
    _patched.extend(cuda_stand_in.install_dry(_device))
    return _device


def is_settled() -> bool:
    """Whether a verb has called `start`."""
    return _device is not None


def current() -> torch.device:
    """The device that `start` settled on."""
    assert _device is not None, "device.start() comes first in every verb"
    return _device


def is_cpu() -> bool:
    """Whether this process computes on the CPU, through the stand-in."""
    return current() == _CPU


def patched() -> list[str]:
    """The names that `start` or `start_dry` replaced in this process; none where the device is a GPU."""
    return list(_patched)


def backend() -> str:
    """torch.distributed's backend for this device; a dry run's carries nothing anywhere."""
    if current() == _META:
        return "cpu:fake,meta:fake"  # the plain name has none for this device
    return "gloo" if is_cpu() else "nccl"


def name() -> str:
    """The device as people know it, such as "NVIDIA H100 80GB HBM3"."""
    return "CPU" if is_cpu() else torch.cuda.get_device_name(current())


def count() -> int:
    """GPUs that this process sees; 1 on a CPU."""
    return torch.cuda.device_count()


def compute_capability() -> tuple[int, int]:
    """The GPU's architecture, such as (9, 0) for Hopper; (0, 0) where there is none."""
    return (0, 0) if _patched else torch.cuda.get_device_capability(current())


def synchronize() -> None:
    """Waits for the device's queued work; nothing on a CPU."""
    if not is_cpu():
        torch.cuda.synchronize()


def moment() -> Moment:
    """Now, in the order of the device's queued work."""
    if is_cpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(before: Moment, after: Moment) -> float:
    """Between two moments, both of which the device has reached."""
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    return float(before.elapsed_time(after)) / 1000.0


def matrix_product_rate() -> float:
    """FLOP/s of a matrix product on this process's CPU threads, measured now: what stands for a CPU's peak."""
    size = 768
    matrix = torch.ones(size, size, device=_CPU)
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory_bytes() -> int:
    """Largest memory this process has held on its device (on a CPU: its resident set)."""
    if is_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


@dataclass(frozen=True)
class Point:
    """A place in the device's queue of work."""

    event: Any


def mark_point() -> Point:
    """Where the device's queue stands now."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return Point(event)


@contextlib.contextmanager
def beside_training(*, after: Point | None) -> Iterator[None]:
    """Inside, work goes to a stream of its own that waits for `after`; it is done at the end. For other threads."""
    if is_cpu():
        yield
        return
    with torch.cuda.device(current()):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        if after is not None:
            stream.wait_event(after.event)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def moved_here(array: NDArray[Any]) -> torch.Tensor:
    """An array of the host as a tensor on the device, in place in its queue: nobody waits for the work before it."""
    tensor = torch.from_numpy(array)
    return (tensor if _patched else tensor.pin_memory()).to(current(), non_blocking=True)


def host_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the host for a copy of `tensor`, contiguous; pinned where the device is a GPU, while it is held.

    Raises ConfigError where the host has no room.
    """
    # In pages of its own, pinned in place: torch would round up to a power of two, and keep what is let go of.
    try:
        pages = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_room(tensor, error) from error
    buffer = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
    if not is_cpu():
        with contextlib.suppress(AttributeError, OSError):  # systems without
            pages.madvise(mmap.MADV_HUGEPAGE)  # large pages are pinned in half the time
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failure = runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1)  # 1: for all threads and devices
        if int(failure):
            raise _no_room(tensor, runtime.cudaGetErrorString(failure))
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer


def _no_room(tensor: torch.Tensor, reason: object) -> ConfigError:
    return ConfigError(
        f"{tensor.nbytes / 1e6:,.1f} MB of this host's memory cannot be had, or pinned, for the copy of a checkpoint "
        f"({reason}); `plan` says what a node needs for these copies: give it as much, or spread the state over more "
        f"ranks"
    )


def adapt_megatron_random(module: Any) -> None:
    """Points megatron.core.tensor_parallel.random's own generator access, which goes past torch.cuda, to the CPU."""
    if _patched:
        module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
