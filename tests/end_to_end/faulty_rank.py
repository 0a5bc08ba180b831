"""`python -m megatron_xy` with a fault planted in one rank: at which phase of which step it stands still, and how.

FAULT=RANK:PHASE:ITERATION:KIND in the environment; run as a module in the place of megatron_xy.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

from megatron_xy.cli import main
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.runtime.watchdog import Watchdog


def sleep_for_ever() -> None:
    while True:
        time.sleep(0.05)


def spin_for_ever() -> None:
    while True:
        pass


def wait_in_c() -> None:
    """As in a driver's call: the interpreter is free, the main thread never comes back to it."""
    ctypes.CDLL(None).read(*an_endless_read())


def wait_in_c_with_the_interpreter() -> None:
    """No other thread of this process runs any more, its watchdog included, which has just told where the rank is."""
    time.sleep(0.5)
    ctypes.PyDLL(None).read(*an_endless_read())


def an_endless_read() -> tuple[object, ...]:
    """The arguments of read(2) for a pipe that nobody writes to; unlike sleep(3), it goes on after a signal."""
    return os.pipe()[0], ctypes.create_string_buffer(1), 1


def block_the_data() -> None:
    """From now on every sample that is read stands still, in the thread that reads ahead."""
    PackedDataset.sample = lambda *_: sleep_for_ever()


def block_the_save() -> None:
    """The shard is written to a pipe that nobody reads."""
    from megatron_xy.checkpoint import writer as checkpoint

    write_tensors = checkpoint.write_tensors

    def blocked(path: Path, *arguments: object, **options: object) -> object:
        os.mkfifo(path.with_name("pipe"))
        path.with_name("pipe").open("wb")
        return write_tensors(path, *arguments, **options)

    checkpoint.write_tensors = blocked


def slow_save() -> None:
    """The shard takes FAULT_SECONDS to write, a little at a time."""
    from megatron_xy.checkpoint import writer as checkpoint

    write_tensors = checkpoint.write_tensors

    def slow(path: Path, *arguments: object, **options: object) -> object:
        until = time.monotonic() + float(os.environ["FAULT_SECONDS"])
        while time.monotonic() < until:
            path.with_name("slow").write_bytes(bytes(2**20))
            time.sleep(0.1)
        path.with_name("slow").unlink()
        return write_tensors(path, *arguments, **options)

    checkpoint.write_tensors = slow


def slow_profile() -> None:
    """The trace takes FAULT_SECONDS to write, in which no other thread of this process runs."""
    from megatron_xy.training.profiling import ProfileWindow

    close = ProfileWindow.close

    def slow(window: ProfileWindow) -> None:
        ctypes.PyDLL(None).usleep(int(1e6 * float(os.environ["FAULT_SECONDS"])))
        close(window)

    ProfileWindow.close = slow


def slow_down() -> None:
    """Every layer's forward takes longer from now on, by FAULT_SECONDS."""
    import torch

    def slow(module: torch.nn.Module, _: object) -> None:
        if type(module).__name__ == "TransformerLayer":
            time.sleep(float(os.environ["FAULT_SECONDS"]))

    torch.nn.modules.module.register_module_forward_pre_hook(slow)


KINDS = {
    function.__name__: function
    for function in (
        sleep_for_ever, spin_for_ever, wait_in_c, wait_in_c_with_the_interpreter, block_the_data, block_the_save,
        slow_save, slow_profile, slow_down,
    )
}  # fmt: skip


def plant(*, phase: str, iteration: int, kind: str) -> None:
    beat = Watchdog.beat

    def faulty_beat(self: Watchdog, **place: object) -> None:
        beat(self, **place)
        if place == {"phase": phase, "iteration": iteration}:
            KINDS[kind]()

    Watchdog.beat = faulty_beat


if __name__ == "__main__":
    rank, phase, iteration, kind = os.environ["FAULT"].split(":")
    if os.environ.get("RANK") == rank:
        plant(phase=phase, iteration=int(iteration), kind=kind)
    sys.argv[0] = "megatron-xy"
    main()
