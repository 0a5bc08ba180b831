"""What stands in for torch.cuda where there is no GPU, so that megatron-core runs on the CPU.

Replaced is what megatron-core reaches: streams and events (CPU operations are synchronous, so these do nothing), device
queries, generator states, the device argument of the factory functions, and torch.compile (it would want a C++
compiler, and megatron-core's decorators alone cost a second of imports). The factories are wrapped rather than watched
by a TorchFunctionMode, which would cost about 12 us in every torch call; a wrapped one costs a dictionary look-up.
"""

from __future__ import annotations

import contextlib
import functools
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randint", "randn",
    "tensor", "zeros", "zeros_like",
)  # fmt: skip
_MEMORY_COUNTERS = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


def install(device: torch.device) -> list[str]:
    """Replaces, once, what megatron-core reaches in torch.cuda, in the factories and in two methods of Tensor; returns
    the names of what is replaced. What asks for a GPU's memory gets `device`'s.
    """
    # torch lists the factories that obey `with torch.device(...)` at its first use; it must list those that are called.
    torch.utils._device._device_constructors()
    # One function object per name: torch._dynamo refuses one object that stands under two.
    return _replace(
        {
            "torch.cuda.current_device": lambda: device,
            "torch.cuda.set_device": lambda number: None,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.synchronize": lambda number=None: None,
            "torch.cuda.empty_cache": lambda: None,
            "torch.cuda.current_stream": lambda number=None: _Stream(),
            "torch.cuda.default_stream": lambda number=None: _Stream(),
            "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
            "torch.cuda.reset_peak_memory_stats": lambda number=None: None,
            "torch.cuda.get_rng_state": lambda number=None: torch.get_rng_state(),
            "torch.cuda.set_rng_state": lambda state, number=None: torch.set_rng_state(state),
            # manual_seed_all stays as it is: torch.manual_seed calls it.
            "torch.cuda.manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
            "torch.cuda.Stream": _Stream,
            "torch.cuda.Event": _Event,
            **{f"torch.cuda.{counter}": lambda number=None: 0 for counter in _MEMORY_COUNTERS},
            "torch.cuda.random.get_rng_state": lambda device="": torch.get_rng_state(),
            "torch.cuda.random.set_rng_state": lambda new_state, device="": torch.set_rng_state(new_state),
            "torch.cuda.nvtx.range_push": lambda message: None,
            "torch.cuda.nvtx.range_pop": lambda: None,
            **{f"torch.{factory}": _on(device, getattr(torch, factory)) for factory in FACTORIES},
            "torch.compile": _left_as_it_is,
            "torch.Tensor.cuda": lambda self, *args, **kwargs: self,
            "torch.Tensor.type": _named_as_on_a_gpu(torch.Tensor.type),
        }
    )


def install_dry(device: torch.device) -> list[str]:
    """`install` for tensors without data, and what else has no kernel for them."""
    return install(device) + _replace(
        {
            # torch's one-kernel AdamW gives shapes on this device, which its list of devices leaves out.
            "torch.optim.optimizer._get_fused_kernels_supported_devices": lambda: [device.type],
            "torch.nn.functional.scaled_dot_product_attention": _flash_attention,
        }
    )


def _replace(replacements: dict[str, Any]) -> list[str]:
    """Puts each in the place of what bears its name; returns the names."""
    for name, replacement in replacements.items():
        owner, _, attribute = name.rpartition(".")
        setattr(pkgutil.resolve_name(owner), attribute, replacement)
    return list(replacements)


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's attention by the kind of kernel that a real device has; on meta torch itself would keep all scores."""
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )[0]
    return output


class _Event:
    """Stands in for torch.cuda.Event: on a CPU everything queued has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """Stands in for torch.cuda.Stream: on a CPU there is one order of execution."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


def _left_as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """torch.compile, which is also called with its options alone, as a decorator that does nothing."""
    return _left_as_it_is if function is None else function


def _on(device: torch.device, factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with a CUDA device read as `device` and without pinned memory."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = device
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _names_cuda(device: Any) -> bool:
    if device is None:
        return False
    if isinstance(device, int):
        return True
    return (device if isinstance(device, str) else device.type).startswith("cuda")


def _named_as_on_a_gpu(plain_type: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, which says CUDA where it says a kind, since megatron-core's optimizer compares its strings."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        if not isinstance(result, str):
            return result
        return result.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)

    return type_
