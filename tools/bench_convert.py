"""How fast is a conversion, against cp of the same bytes, and how much memory does it take?

A model of 1.135 B parameters in bf16 (2.27 GB), warm in the page cache, or layers of a 70B's widths (five times their
bytes of disk). In turn, --rounds times: cp, without fsync and with; an HF folder into a checkpoint of one rank; into
the four files of TP2 x PP2; both back. Each in a process of its own: as `megatron-xy convert` does it, and twice with
what the command itself never leaves out left out: checksums (of what is written, and of a checkpoint that is read),
then fsync too, since cp waits for no disk. Seconds on the clock and of the CPUs, spread, peak memory; shares of cp's
speed by the medians: of the whole command, and step by step without imports, which take as long for any size, without
checksums, without fsync.

    python tools/bench_convert.py [--rounds 5] [--model 1b|70b|tiny] [--layers N] [--folder DIR] [--output FILE.json]
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xy.config import ModelConfig

MODELS = {
    "tiny": ModelConfig(
        num_layers=4, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4, vocab_size=4001
    ),
    "1b": ModelConfig(
        num_layers=22, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32, num_query_groups=4,
        vocab_size=40720,
    ),
    "70b": ModelConfig(
        num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8,
        vocab_size=32000,
    ),
}  # fmt: skip
CASES = ("hf_to_tp1", "hf_to_tp2_pp2", "tp1_to_hf", "tp2_pp2_to_hf")
ORIGINS = {"tp1_to_hf": "hf_to_tp1", "tp2_pp2_to_hf": "hf_to_tp2_pp2"}  # what goes back: what it comes from
COPIES = ("cp", "cp_fsync")
UNHASHED, BARE = "_unhashed", "_bare"  # behind a case's name: without checksums; without them and without fsync


@dataclass(frozen=True)
class Took:
    """What some processes, one after the other, took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def main() -> int:
    """Prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk in question; default: a temporary one")
    parser.add_argument("--model", choices=MODELS, default="1b", help="tiny: to see that everything runs")
    parser.add_argument("--layers", type=int, help="of the model; its own unless given")
    parser.add_argument("--output", type=Path, help="JSON of all that was measured")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)  # what a process of its own does
    options = parser.parse_args()
    model = MODELS[options.model]
    if options.layers:
        model = model.model_copy(update={"num_layers": options.layers})
    if options.step:
        import_all()
        step, *paths = options.step
        if step != "import":
            STEPS[step](model, *map(Path, paths))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=options.folder))
    try:
        shape = ["--model", options.model, *(["--layers", str(options.layers)] if options.layers else [])]
        result = measure(folder, rounds=options.rounds, shape=shape)
    finally:
        shutil.rmtree(folder)
    report(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(folder: Path, *, rounds: int, shape: list[str]) -> dict[str, Any]:
    """{bytes, seconds, CPU seconds, peak_bytes, shares of cp's speed} of every case; shape: the model's options."""
    this = [sys.executable, __file__, *shape, "--step"]
    weights = folder / "hf" / "model.safetensors"
    run([*this, "make", str(folder / "hf")])
    commands = commands_in(folder, weights, this=this)
    took: dict[str, list[Took]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, processes in commands.items():
            os.sync()  # nobody pays for what another has left to be written
            each = run(*processes)
            if number:  # the first round warms up
                took[name].append(each)
            elif name in ORIGINS and not is_same(weights, folder / name / weights.name):
                raise SystemExit(f"{name}: {weights.name} differs from the original")
            if name not in ORIGINS.values():
                remove(folder / name)
        for name in ORIGINS.values():
            remove(folder / name)
        print(f"round {number} of {rounds} done", file=sys.stderr, flush=True)
    return {
        "bytes": weights.stat().st_size,
        "took": {name: [asdict(each) for each in every] for name, every in took.items()},
        "speed": speeds({name: statistics.median(each.seconds for each in every) for name, every in took.items()}),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
    }


def commands_in(folder: Path, weights: Path, *, this: list[str]) -> dict[str, list[list[str]]]:
    """{case: the processes that do it, one after the other}; each case leaves a folder or file of its name."""

    def at(name: str) -> str:
        return str(folder / name)

    def convert(source: str, target: str) -> list[list[str]]:
        return [[sys.executable, "-m", "megatron_xy", "convert", "--from", source, "--to", target]]

    less = {
        f"{case}{left_out}": [
            [*this, f"{case.partition('_to_')[2]}{left_out}", at(ORIGINS.get(case, "hf")), at(f"{case}{left_out}")]
        ]
        for case in CASES
        for left_out in (UNHASHED, BARE)
    }
    return {
        "import": [[*this, "import"]],
        "cp": [["cp", str(weights), at("cp")]],
        "cp_fsync": [["cp", str(weights), at("cp_fsync")], ["sync", at("cp_fsync")]],
        "hf_to_tp1": convert(f"hf:{at('hf')}", f"ckpt:{at('hf_to_tp1')}"),
        "hf_to_tp2_pp2": [[*this, "split", at("hf"), at("hf_to_tp2_pp2")]],
        "tp1_to_hf": convert(f"ckpt:{at('hf_to_tp1')}", f"hf:{at('tp1_to_hf')}"),
        "tp2_pp2_to_hf": convert(f"ckpt:{at('hf_to_tp2_pp2')}", f"hf:{at('tp2_pp2_to_hf')}"),
        **less,
    }


def speeds(median: dict[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """{case: {copy: {what of the case is counted: share of the copy's speed}}}."""
    imports = median["import"]
    return {
        case: {
            copy: {
                "in all": median[copy] / median[case],
                "without imports": median[copy] / (median[case] - imports),
                "without checksums too": median[copy] / (median[f"{case}{UNHASHED}"] - imports),
                "without fsync too": median[copy] / (median[f"{case}{BARE}"] - imports),
            }
            for copy in COPIES
        }
        for case in CASES
    }


def run(*commands: list[str]) -> Took:
    """Runs one after the other. A process's peak begins with ours, so nothing large is ever imported here."""
    seconds, cpu_seconds, peak_bytes = 0.0, 0.0, 0
    for command in commands:
        began = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert process.stderr is not None, "a pipe was asked for"
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said.decode()}")
        seconds += time.perf_counter() - began
        cpu_seconds += usage.ru_utime + usage.ru_stime
        peak_bytes = max(peak_bytes, usage.ru_maxrss * 1024)
    return Took(seconds, cpu_seconds, peak_bytes)


def is_same(original: Path, back: Path) -> bool:
    """Whether what came back is what it was, byte for byte."""
    return subprocess.run(["cmp", "-s", original, back], check=False).returncode == 0


def remove(path: Path) -> None:
    """A file or a folder, where there is one: no later step is to find it, nor its bytes in memory."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def report(result: dict[str, Any]) -> None:
    """Medians, spread, peak memory and shares of cp's speed."""
    load = " ".join(f"{each:.1f}" for each in result["load"])
    print(f"{result['bytes'] / 1e9:.2f} GB, {result['cpus']} CPUs, load {load}")
    for name, rounds in result["took"].items():
        seconds, cpu_seconds = ([each[key] for each in rounds] for key in ("seconds", "cpu_seconds"))
        print(
            f"  {name:<22} {statistics.median(seconds):6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})  "
            f"CPU {statistics.median(cpu_seconds):5.2f} s  ({min(cpu_seconds):.2f} to {max(cpu_seconds):.2f})  "
            f"peak {max(each['peak_bytes'] for each in rounds) / 1e9:.2f} GB"
        )
    print("share of the copy's speed:")
    for case, by_copy in result["speed"].items():
        for copy, shares in by_copy.items():
            print(f"  {case:<14} {copy:<9}" + ",".join(f" {share:.0%} {what}" for what, share in shares.items()))


def make_model(model: ModelConfig, folder: Path) -> None:
    """An HF folder in bf16 in which no two tensors begin alike."""
    import numpy as np

    from megatron_xy.hf.config import hf_config
    from megatron_xy.hf.names import global_names, hf_shards
    from megatron_xy.tensors.dtypes import Bits
    from megatron_xy.tensors.safetensors_file import write_safetensors

    folder.mkdir()
    shards = {part: shard for name in global_names(model) for part, shard in hf_shards(name, model).items()}
    pattern = np.random.default_rng(0).integers(-(2**15), 2**15, 1 << 21, dtype=np.int16)

    def parts_of(name: str) -> list[Bits]:
        start, numel = sum(map(ord, name)), shards[name].numel
        size = pattern.size - start
        return [pattern[start : start + min(size, numel - done)] for done in range(0, numel, size)]

    write_safetensors(
        folder / "model.safetensors",
        {name: ("bfloat16", shard.local_shape) for name, shard in shards.items()},
        parts_of=parts_of,
        metadata={"format": "pt"},
    )
    values = hf_config(model, dtype="bfloat16", token_ids={})
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def split_model(model: ModelConfig, source: Path, target: Path) -> None:
    """A checkpoint as the four ranks of TP2 x PP2 write one, each its own file."""
    from megatron_xy.checkpoint import files
    from megatron_xy.hf.names import global_names
    from megatron_xy.hf.source import open_source
    from megatron_xy.hf.target import Output, write_files
    from megatron_xy.tensors.shards import ParameterShard, split_shard, whole

    def halves(name: str, shape: tuple[int, ...]) -> list[ParameterShard]:
        """A tensor's part on each tensor parallel rank; one where both hold the whole."""
        if len(shape) == 1:
            return [whole(shape)]
        dimension = int(name.endswith(("linear_proj.weight", "linear_fc2.weight")))
        num_parts = 2 if name.endswith("linear_fc1.weight") else 1
        size = -(-shape[dimension] // (2 * num_parts))
        return [
            split_shard(shape, dimension, size=size, place=place, num_places=2, num_parts=num_parts) for place in (0, 1)
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
    facts = write_files(target, outputs, source=opened, metadata=files.METADATA, say=say_nothing)
    entries: dict[str, files.TensorEntry] = {}
    for file, held in outputs.items():
        for output in held:
            shape = output.shard.global_shape
            entry = entries.setdefault(output.name, files.TensorEntry(shape, output.dtype))
            entry.pieces.append(files.Piece(file, output.shard))
    section = opened.model.model_dump(mode="json", exclude_unset=True)
    state = {**asdict(files.TrainingState()), "world_size": 4, "model": section}
    files.write_manifest(target, files.Manifest(state, entries, facts))


def import_all() -> None:
    """What the command imports, so that every case begins with as much."""
    import megatron_xy.cli
    import megatron_xy.hf.verb  # noqa: F401


def to_tp1(model: ModelConfig, source: Path, target: Path) -> None:
    """An HF folder into a checkpoint of one rank."""
    from megatron_xy.hf.convert import to_checkpoint
    from megatron_xy.hf.source import open_source

    to_checkpoint(open_source("hf", source), target, dtype=None, say=say_nothing)


def to_hf_folder(model: ModelConfig, source: Path, target: Path) -> None:
    """A checkpoint into an HF folder."""
    from megatron_xy.hf.convert import to_hf
    from megatron_xy.hf.source import open_source

    to_hf(open_source("ckpt", source), target, dtype=None, tokenizer=None, verify=False, say=say_nothing)


def unhashed(step: Callable[..., None], *, waits: bool = True) -> Callable[..., None]:
    """The step in a process that reads and hashes no file of weights; waits: for the disk."""

    def less(model: ModelConfig, source: Path, target: Path) -> None:
        from megatron_xy.tensors.safetensors_file import FollowingDigest

        def reach(self: FollowingDigest, end: int) -> None:
            self.position = end

        FollowingDigest.reach = reach  # type: ignore[method-assign]
        for wait in () if waits else ("fsync", "fdatasync"):
            setattr(os, wait, lambda file: None)
        step(model, source, target)

    return less


def say_nothing(text: str) -> None:
    """Who looks on is told what was measured."""


CONVERSIONS = {"tp1": to_tp1, "tp2_pp2": split_model, "hf": to_hf_folder}
STEPS: dict[str, Callable[..., None]] = {
    "make": make_model,
    "split": split_model,
    **{f"{name}{UNHASHED}": unhashed(step) for name, step in CONVERSIONS.items()},
    **{f"{name}{BARE}": unhashed(step, waits=False) for name, step in CONVERSIONS.items()},
}

if __name__ == "__main__":
    sys.exit(main())
