"""Every tensor that lives on a device and every collective, noted as torch's operators make them: bytes, not data.

Memory is counted by storages, from the operator that makes one until nothing refers to it any more: what an allocator
would have to hold, without its rounding. It works the same on tensors with data and without.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_entered: list[Ledger] = []  # the last one notes


@dataclass
class Traffic:
    """Calls of one kind of collective in one group, and the bytes of their whole tensors (of an all-gather, what comes
    out; of a reduce-scatter, what goes in)."""

    calls: int = 0
    bytes: int = 0


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes while it is entered; `now` and `peak` are bytes on `device`, `traffic` is by (kind, name of the group).

    Where the device holds no data, a number that is read is 1 if it is a truth or a count and else 0, and so the
    gradients of a dry run are finite and their norm is within every limit.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.now = self.peak = 0
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self._storages: set[int] = set()
        self._in_kernel = False

    def __enter__(self) -> Ledger:
        _entered.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _entered.pop()

    def begin_peak(self) -> None:
        """From here on `peak` is anew."""
        self.peak = self.now

    @contextlib.contextmanager
    def one_kernel(self) -> Iterator[None]:
        """Inside, what is made and gone again by the end counts as never held, as in a fused kernel."""
        outer, self._in_kernel = self._in_kernel, True
        try:
            yield
        finally:
            self._in_kernel = outer
            self._look_at_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = self._answer(func, args, kwargs or {})
        for value in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type == self.device.type:
                self._note(value.untyped_storage())
        return result

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace == "c10d":
            self._note_collective(func, args)
        if self.device.type != "meta":
            return func(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.device == self.device:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0.0 if first.is_floating_point() else 1
            if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if func.namespace == "c10d" and "coalesced" in func.__name__:  # these have no kernel for this device
            return FakeWork().boxed()
        return func(*args, **kwargs)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        num_bytes = storage.nbytes()
        self._storages.add(key)
        self.now += num_bytes
        weakref.finalize(storage, self._let_go, key, num_bytes).atexit = False
        self._look_at_peak()

    def _let_go(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.now -= num_bytes

    def _look_at_peak(self) -> None:
        if not self._in_kernel:
            self.peak = max(self.peak, self.now)

    def _note_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        if not any(isinstance(part, torch.Tensor) and part.device.type == self.device.type for part in tree_iter(args)):
            return
        kind = func.__name__.partition(".")[0].strip("_")
        group = next((group for value in args if (group := _as_group(value)) is not None), None)
        sizes = [_num_bytes(value) for value in args]
        traffic = self.traffic.setdefault((kind, "" if group is None else group.group_name), Traffic())
        traffic.calls += 1
        traffic.bytes += max(sizes, default=0)


def as_kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """What stands for torch.compile where nothing is computed: the function is one kernel of the ledger entered."""
    if function is None:
        return functools.partial(as_kernel, **options)

    @functools.wraps(function)
    def kernel(*arguments: Any, **keywords: Any) -> Any:
        with _entered[-1].one_kernel():
            return function(*arguments, **keywords)

    return kernel


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    return sum({s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def _as_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        return dist.ProcessGroup.unbox(value)
    return None


def _num_bytes(value: Any) -> int:
    return sum(part.numel() * part.element_size() for part in tree_iter(value) if isinstance(part, torch.Tensor))
