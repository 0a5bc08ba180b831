"""How fast is a conversion, against cp of the same bytes, and how much memory does it take?

A model of 1.135 B parameters in bf16 (2.27 GB), warm in the page cache. In turn, --rounds times: cp, without fsync and
with; an HF folder into a checkpoint of one file; into the four files of TP2 x PP2; both back by `megatron-xy convert`.
Each in a process of its own, fsync and checksums included. Speeds are shares of cp's, for the whole command and without
the import of torch, which takes as long for any size. Medians, spread, peak memory.

    python tools/bench_convert.py [--rounds 5] [--folder DIR] [--quick] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_xy.config import ModelConfig

FULL = ModelConfig(
    num_layers=22, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32, num_query_groups=4, vocab_size=40720
)
QUICK = ModelConfig(
    num_layers=4, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4, vocab_size=4001
)
IMPORTS = "megatron_xy.hf.verb"
CASES = ("hf_to_tp1", "hf_to_tp2_pp2", "tp1_to_hf", "tp2_pp2_to_hf")


def main() -> int:
    """Prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk in question; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="a model of 30 MB, to see that everything runs")
    parser.add_argument("--output", type=Path, help="JSON of all that was measured")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)  # what a process of its own does
    options = parser.parse_args()
    model = QUICK if options.quick else FULL
    if options.step:
        step, *paths = options.step
        make_model(model, Path(*paths)) if step == "make" else convert_split(model, *map(Path, paths))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=options.folder))
    try:
        result = measure(folder, rounds=options.rounds, quick=options.quick)
    finally:
        shutil.rmtree(folder)
    report(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(folder: Path, *, rounds: int, quick: bool) -> dict[str, Any]:
    """{bytes, seconds, peak_bytes, shares of cp's speed} of every case."""
    this = [sys.executable, __file__, *(["--quick"] if quick else []), "--step"]
    convert = [sys.executable, "-m", "megatron_xy", "convert"]
    source, weights = folder / "hf", folder / "hf" / "model.safetensors"
    run([*this, "make", str(source)])
    commands = {
        "import": [sys.executable, "-c", f"import {IMPORTS}"],
        "cp": ["cp", str(weights), str(folder / "cp")],
        "cp_fsync": ["dd", f"if={weights}", f"of={folder / 'cp_fsync'}", "bs=1M", "conv=fsync", "status=none"],
        "hf_to_tp1": [*convert, "--from", f"hf:{source}", "--to", f"ckpt:{folder / 'hf_to_tp1'}"],
        "hf_to_tp2_pp2": [*this, "split", str(source), str(folder / "hf_to_tp2_pp2")],
        "tp1_to_hf": [*convert, "--from", f"ckpt:{folder / 'hf_to_tp1'}", "--to", f"hf:{folder / 'tp1_to_hf'}"],
        "tp2_pp2_to_hf": [
            *convert, "--from", f"ckpt:{folder / 'hf_to_tp2_pp2'}", "--to", f"hf:{folder / 'tp2_pp2_to_hf'}"
        ],
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks = dict.fromkeys(commands, 0)
    for number in range(rounds + 1):
        for name, command in commands.items():
            os.sync()  # nobody pays for what another has left to be written
            took, peak = run(command)
            peaks[name] = max(peaks[name], peak)
            if number:  # the first round warms up
                seconds[name].append(took)
        if number == 0:
            check(folder, weights)
        for name in commands:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        print(f"round {number} of {rounds} done", file=sys.stderr, flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    speeds = {
        name: {
            f"of_{copy}{suffix}": median[copy] / (median[name] - left_out)
            for copy in ("cp", "cp_fsync")
            for suffix, left_out in (("", 0.0), ("_without_import", median["import"]))
        }
        for name in CASES
    }
    return {
        "bytes": weights.stat().st_size,
        "seconds": {name: {"median": median[name], "all": values} for name, values in seconds.items()},
        "peak_bytes": peaks,
        "speed": speeds,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
    }


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak memory in bytes of a process. The peak begins with ours, so torch is never imported here."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None, "a pipe was asked for"
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said.decode()}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def check(folder: Path, weights: Path) -> None:
    """What came back is what it was, byte for byte but for the header's order."""
    for name in ("tp1_to_hf", "tp2_pp2_to_hf"):
        if subprocess.run(["cmp", "-s", weights, folder / name / weights.name], check=False).returncode:
            raise SystemExit(f"{name}: {weights.name} differs from the original")


def report(result: dict[str, Any]) -> None:
    """Medians, spread, peak memory and shares of cp's speed."""
    print(f"{result['bytes'] / 1e9:.2f} GB, {result['cpus']} CPUs, torch {result['torch']}")
    for name, told in result["seconds"].items():
        spread = f"{min(told['all']):.2f} to {max(told['all']):.2f}"
        print(f"  {name:<14} {told['median']:7.2f} s  ({spread})  peak {result['peak_bytes'][name] / 1e9:.2f} GB")
    for name, shares in result["speed"].items():
        print(f"  {name:<14} " + ", ".join(f"{share:.0%} {which}" for which, share in shares.items()))


def make_model(model: ModelConfig, folder: Path) -> None:
    """An HF folder in bf16 in which no two tensors begin alike."""
    import numpy as np

    from megatron_xy.dtypes import Bits
    from megatron_xy.hf.config import hf_config
    from megatron_xy.hf.names import global_names, hf_shards
    from megatron_xy.safetensors_file import write_safetensors

    folder.mkdir()
    shards = {part: shard for name in global_names(model) for part, shard in hf_shards(name, model).items()}
    pattern = np.random.default_rng(0).integers(-(2**15), 2**15, 1 << 21, dtype=np.int16)

    def blocks_of(name: str) -> list[Bits]:
        start, numel = sum(map(ord, name)), shards[name].numel
        size = pattern.size - start
        return [pattern[start : start + min(size, numel - done)] for done in range(0, numel, size)]

    write_safetensors(
        folder / "model.safetensors",
        {name: ("bfloat16", shard.local_shape) for name, shard in shards.items()},
        blocks_of=blocks_of,
        metadata={"format": "pt"},
    )
    values = hf_config(model, dtype="bfloat16", token_ids={})
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def convert_split(model: ModelConfig, source: Path, target: Path) -> None:
    """A checkpoint as the four ranks of TP2 x PP2 write one, each its own file."""
    from dataclasses import asdict

    from megatron_xy import checkpoint_files as files
    from megatron_xy.hf.names import global_names
    from megatron_xy.hf.source import open_source
    from megatron_xy.hf.target import Output, write_files
    from megatron_xy.shards import Box, ParameterShard, whole

    def halves(name: str, shape: tuple[int, ...]) -> list[ParameterShard]:
        """A tensor's part on each tensor parallel rank; one where both hold the whole."""
        if len(shape) == 1:
            return [whole(shape)]
        rows, columns = shape
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            middle = columns // 2
            return [ParameterShard(shape, (Box((0, start), (rows, start + middle)),)) for start in (0, middle)]
        middle = -(-rows // 2)
        if not name.endswith("linear_fc1.weight"):
            return [ParameterShard(shape, (Box((a, 0), (b, columns)),)) for a, b in ((0, middle), (middle, rows))]
        size = rows // 4
        return [
            ParameterShard(shape, tuple(Box((start, 0), (start + size, columns)) for start in (a, a + 2 * size)))
            for a in (0, size)
        ]

    opened = open_source("hf", source)
    manifest, layers = opened.manifest, model.num_layers or 0
    outputs: dict[str, list[Output]] = {f"rank-{rank:05d}-of-00004.safetensors": [] for rank in range(4)}
    for name in global_names(opened.model):
        layer = re.match(r"decoder\.layers\.(\d+)", name)
        stage = int(int(layer[1]) >= layers // 2 if layer else not name.startswith("embedding"))
        for tp_rank, shard in enumerate(halves(name, manifest.tensors[name].shape)):
            file = f"rank-{2 * stage + tp_rank:05d}-of-00004.safetensors"
            outputs[file].append(Output(name, name, shard, manifest.tensors[name].dtype))
    target.mkdir()
    facts = write_files(target, outputs, source=source, manifest=manifest, metadata=files.METADATA, say=print)
    entries: dict[str, files.TensorEntry] = {}
    for file, held in outputs.items():
        for output in held:
            shape = output.shard.global_shape
            entry = entries.setdefault(output.name, files.TensorEntry(shape, output.dtype))
            entry.pieces.append(files.Piece(file, output.shard))
    section = opened.model.model_dump(mode="json", exclude_unset=True)
    state = {**asdict(files.TrainingState()), "world_size": 4, "model": section}
    files.write_manifest(target, files.Manifest(state, entries, {}, facts))


if __name__ == "__main__":
    sys.exit(main())
