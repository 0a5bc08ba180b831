"""The device that a verb settles, and the stand-in for what megatron-core reaches in torch.cuda, in one process."""

import mmap
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_xy import cuda_stand_in, device, parallel
from megatron_xy.errors import ConfigError, PeerLost

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="on a GPU nothing stands in")


def test_what_is_settled_stays() -> None:
    assert device.is_settled() and device.is_cpu()
    assert device.current() == torch.device("cpu") == device.start(local_rank=5)
    assert (device.backend(), device.name()) == ("gloo", "CPU")
    device.synchronize()


def test_start_sets_threads_and_determinism_every_time() -> None:
    device.start(num_threads=2, deterministic=True)
    assert torch.get_num_threads() == 2 and torch.are_deterministic_algorithms_enabled()
    device.start(num_threads=1)
    assert torch.get_num_threads() == 1 and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", cuda_stand_in.FACTORIES)
def test_every_factory_reads_cuda_as_the_cpu(name: str) -> None:
    arguments = {
        "as_tensor": ([1.0, 2.0],),
        "tensor": ([1.0, 2.0],),
        "full": ((2,), 3.0),
        "randint": (9, (2,)),
        "empty_like": (torch.zeros(2),),
        "full_like": (torch.zeros(2), 3.0),
        "ones_like": (torch.zeros(2),),
        "zeros_like": (torch.zeros(2),),
    }.get(name, (2,))
    factory = getattr(torch, name)
    cuda = torch.device("cuda", 0)
    for place in ("cuda", "cuda:1", cuda, 0):
        made = factory(*arguments, device=place)
        assert made.device.type == "cpu" and made.shape == (2,)
    assert factory(*arguments).device.type == "cpu"
    assert factory.__name__ == name, "wrapped, and still known by its name"


def test_other_devices_and_arguments_pass_through() -> None:
    assert torch.empty(2, device="meta").is_meta
    assert torch.zeros(2, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    assert torch.ones(2, requires_grad=True, device=torch.device("cuda")).requires_grad
    assert not torch.empty(2, pin_memory=True).is_pinned()


def test_tensor_methods() -> None:
    tensor = torch.zeros(2, dtype=torch.bfloat16)
    assert tensor.cuda() is tensor
    assert tensor.type() == "torch.cuda.BFloat16Tensor", "what megatron-core's optimizer compares"
    assert tensor.type(torch.float32).dtype == torch.float32


def test_streams_and_events_are_in_order() -> None:
    with torch.cuda.Stream() as stream, torch.cuda.stream(stream):
        event = stream.record_event()
        torch.cuda.current_stream().wait_event(event)
        event.synchronize()
        assert event.query() and stream.query()
    given = torch.cuda.Event(enable_timing=False)
    assert torch.cuda.default_stream().record_event(given) is given


def test_peak_memory_is_in_bytes() -> None:
    megabyte = 1024**2
    assert 20 * megabyte < device.peak_memory_bytes() < 1024 * 1024 * megabyte


def test_a_host_buffer_is_pinned_in_place_to_the_byte_while_it_is_referred_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, int] = {}
    codes = [0, 2]
    runtime = SimpleNamespace(
        cudaHostRegister=lambda pointer, size, flags: pinned.update({pointer: size}) or codes.pop(0),
        cudaHostUnregister=pinned.pop,
        cudaGetErrorString=lambda code: "out of memory",
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(device, "_device", torch.device("cuda", 0))
    tensor = torch.arange(15, dtype=torch.bfloat16).view(3, 5).T
    buffer = device.host_buffer(tensor)
    assert pinned == {buffer.data_ptr(): 30} and buffer.data_ptr() % mmap.PAGESIZE == 0
    assert buffer.is_contiguous() and torch.equal(buffer.copy_(tensor), tensor)
    del buffer
    assert not pinned
    with pytest.raises(ConfigError, match=r"memory cannot be had, or pinned.*\(out of memory\); `plan` says"):
        device.host_buffer(tensor)


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29500",
        "Connection reset by peer",
        "NCCL error: unhandled system error",
        "Timed out waiting 30000ms for recv operation to complete",
        "writev: Broken pipe",
    ],
)
def test_what_backends_say_of_a_lost_peer(text: str) -> None:
    guess = " This is typically caused by a remote worker crashing. Check the logs of the remote worker."
    lost = parallel.as_peer_lost(RuntimeError(f"{text}{guess}\nmore lines"))
    assert lost is not None and lost.exit_code == 76
    told = text.removeprefix("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] ")
    assert str(lost).endswith(told) and "pair.cc" not in str(lost) and "more lines" not in str(lost)
    assert parallel.as_peer_lost(ValueError(text)) is None
    assert parallel.as_peer_lost(RuntimeError("shape '[3]' is invalid for input of size 2")) is None


def test_a_broken_gpu_is_a_lost_rank_which_another_start_may_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    text = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"
    lost = parallel.as_peer_lost(RuntimeError(text))
    assert lost is not None and lost.exit_code == 76
    assert "GPU of rank 3" in str(lost) and "ECC error encountered; look at dmesg" in str(lost)
    assert parallel.as_peer_lost(RuntimeError("CUDA error: an illegal memory access was encountered")) is None


def test_errors_of_torch_are_told_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    told = r"^rank 3 ran out of device memory \(no room\); buy some$"
    with pytest.raises(ConfigError, match=told), parallel.errors_told(when_memory_runs_out="buy some"):
        raise torch.OutOfMemoryError("no room\nfor 3 GB")
    nccl = "NCCL error in: NCCLUtils.cpp:93, unhandled cuda error\nncclUnhandledCudaError: Call failed.\nLast error:\n"
    told = r"^rank 3 ran out of device memory \(NCCL error.* cuda error: Cuda failure 2 'out of memory'\); buy some$"
    with pytest.raises(ConfigError, match=told), parallel.errors_told(when_memory_runs_out="buy some"):
        raise dist.DistBackendError(f"{nccl}Cuda failure 2 'out of memory'")
    told = "unhandled cuda error: Cuda failure 700 'an illegal memory access was encountered'$"
    with pytest.raises(PeerLost, match=told), parallel.errors_told(when_memory_runs_out=""):
        raise dist.DistBackendError(f"{nccl}Cuda failure 700 'an illegal memory access was encountered'")
    with pytest.raises(PeerLost, match="Broken pipe"), parallel.errors_told(when_memory_runs_out=""):
        raise RuntimeError("writev: Broken pipe")
    with pytest.raises(RuntimeError, match=r"^shape$"), parallel.errors_told(when_memory_runs_out=""):
        raise RuntimeError("shape")
