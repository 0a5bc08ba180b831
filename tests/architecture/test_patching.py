"""An import patches nothing; `device.start` nothing where CUDA is, and on a CPU what it says: in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Every name of torch that a stand-in could replace, with the object behind it; `changed` says which are others now.
SNAPSHOT = """
import inspect
import torch
import torch._dynamo  # replaces torch.manual_seed by itself; torch imports it for torch.use_deterministic_algorithms

def snapshot():
    places = {"torch": torch, "cuda": torch.cuda, "random": torch.cuda.random, "nvtx": torch.cuda.nvtx,
              "streams": torch.cuda.streams, "memory": torch.cuda.memory,
              "functional": torch.nn.functional, "distributed": torch.distributed}
    objects = {f"{place}.{name}": value for place, where in places.items() for name, value in vars(where).items()}
    return objects | {f"Tensor.{name}": inspect.getattr_static(torch.Tensor, name) for name in dir(torch.Tensor)}

def changed(before):
    now = snapshot()
    return sorted(name for name, value in before.items() if now.get(name) is not value)
"""

CHECK_IMPORTS = f"""
import sys
import megatron_xy, megatron_xy.cli, megatron_xy.config, megatron_xy.preflight, megatron_xy.runtime.worker
assert "torch" not in sys.modules, "the package's import brings torch in"
{SNAPSHOT}
before = snapshot()
from megatron_xy import device, log
from megatron_xy.checkpoint import files as checkpoint_files
assert changed(before) == [], changed(before)
assert not device.is_settled()
assert "megatron" not in sys.modules
"""

CHECK_CUDA = f"""
{SNAPSHOT}
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 4
torch.cuda.set_device = lambda device: None
from megatron_xy import device
before = snapshot()
assert device.start(local_rank=3) == torch.device("cuda", 3)
assert changed(before) == [], changed(before)
assert device.backend() == "nccl" and not device.is_cpu()
class Module: pass
device.adapt_megatron_random(Module)
assert not hasattr(Module, "_get_cuda_rng_state"), "megatron-core's generators stay its own"
assert changed(before) == [], changed(before)
"""

CHECK_CPU = f"""
{SNAPSHOT}
torch.cuda.is_available = lambda: False
from megatron_xy import cuda_stand_in, device
before = snapshot()
assert device.start(num_threads=1) == torch.device("cpu")
names = changed(before)
factories = {{"torch." + name for name in cuda_stand_in.FACTORIES}}
assert {{name for name in names if name.startswith("torch.")}} == factories | {{"torch.compile"}}, names
assert {{name for name in names if name.startswith("Tensor.")}} == {{"Tensor.cuda", "Tensor.type"}}, names
assert {{name.partition(".")[0] for name in names}} == {{"torch", "Tensor", "cuda", "random", "nvtx"}}, names

now = snapshot()
assert len({{id(now[name]) for name in names}}) == len(names), "torch._dynamo refuses one object under two names"
assert device.start(num_threads=1) == torch.device("cpu")
assert all(snapshot()[name] is now[name] for name in names), "a second start wraps nothing again"
assert torch._C._len_torch_function_stack() == 0, "no TorchFunctionMode watches torch's calls"

for place in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1), 0):
    assert torch.zeros(1, device=place).device.type == "cpu", place
cuda = "cuda"
assert torch.arange(3, device=cuda).tolist() == [0, 1, 2]
assert torch.tensor([1.5], device=cuda).tolist() == [1.5]
assert torch.empty(2, device=cuda, pin_memory=True).shape == (2,)
assert torch.ones_like(torch.zeros(2), device=cuda).tolist() == [1.0, 1.0]
assert torch.full((1,), 7, device="cpu").item() == 7
assert torch.zeros(2, device="meta").is_meta, "other devices stay what they are"
for factory in ("zeros", "empty", "arange", "rand", "tensor"):
    with torch.device("meta"):
        assert getattr(torch, factory)(2).is_meta, factory
    assert getattr(torch, factory)(2).device.type == "cpu"

assert torch.compile(len) is len and torch.compile(fullgraph=True)(len) is len

tensor = torch.zeros(2)
assert tensor.cuda() is tensor
assert tensor.cuda(torch.cuda.current_device(), non_blocking=True) is tensor
assert tensor.type() == "torch.cuda.FloatTensor"
assert tensor.type(torch.float64).dtype == torch.float64

torch.cuda.set_device(0)
torch.cuda.synchronize()
assert torch.cuda.device_count() == 1
assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    stream.wait_stream(torch.cuda.current_stream())
    event = torch.cuda.Event()
    event.record(stream)
assert event.query() and stream.query()
torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
assert torch.equal(state, torch.get_rng_state())
first = torch.randn(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.randn(3, device=cuda), first)
assert torch.initial_seed() == 5
torch.manual_seed(6)
assert torch.initial_seed() == 6
assert device.backend() == "gloo" and device.is_cpu() and device.peak_memory_bytes() > 1e6
"""

CHECK_MCORE = """
import sys
try:
    import megatron_xy.mcore
except AssertionError as error:
    assert "device.start() comes before" in str(error)
else:
    raise SystemExit("mcore was imported before the device was settled")
assert "megatron" not in sys.modules
"""


CHECK_DRY = f"""
{SNAPSHOT}
from megatron_xy import device
before = snapshot()
assert device.start_dry() == torch.device("meta") and device.backend() not in ("gloo", "nccl")
names = changed(before)
attention = "functional.scaled_dot_product_attention"
assert {{name for name in names if name.startswith("functional.")}} == {{attention}}, names
assert {{name.partition(".")[0] for name in names}} == {{"torch", "Tensor", "cuda", "random", "nvtx", "functional"}}
assert "torch.nn." + attention in device.patched(), device.patched()
assert torch.zeros(2, device="cuda").is_meta and torch.zeros(2, device="cpu").device.type == "cpu"
weight = torch.ones(2, device="cuda", requires_grad=True)
weight.grad = torch.ones_like(weight)
torch.optim.AdamW([weight], fused=True).step()
query = torch.zeros(1, 2, 8, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
kept = []
keep = lambda tensor: kept.append(tensor.numel()) or tensor
with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
    torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
assert max(kept) == query.numel(), "no scores are kept, as a flash kernel keeps none"
"""


def run_python(program: str) -> None:
    """Runs the program in a fresh interpreter without a GPU in sight; its traceback where it fails."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_patch_nothing() -> None:
    run_python(CHECK_IMPORTS)


def test_where_cuda_is_start_patches_nothing() -> None:
    run_python(CHECK_CUDA)


def test_on_a_cpu_the_stand_in_works_and_patches_what_it_says() -> None:
    run_python(CHECK_CPU)


def test_mcore_waits_for_the_device_and_a_dry_run_patches_what_it_says() -> None:
    run_python(CHECK_MCORE + CHECK_DRY)
