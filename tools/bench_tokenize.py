"""What does tokenising a corpus cost? Our stage against a stand-in of Megatron's preprocess_data, in CPU seconds.

Both read the same jsonl with the same SentencePiece model and must write the same tokens. They run in turn, each in a
process tree of its own, on one copy of the corpus and on many: the difference is the steady state, the rest start-up.

    python tools/bench_tokenize.py --input CORPUS.jsonl --tokenizer tokenizer.model [--copies 10] [--runs 5] [--build]
        [--datatrove PYTHON]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.data.encoding.sentencepiece_json import parse_model, tokenizer_json

MEGABYTE = 1024 * 1024


def main() -> int:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a .jsonl or .jsonl.gz with a field `text`")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--build", action="store_true", help="time the whole `megatron-xy data build`, too")
    parser.add_argument("--datatrove", type=Path, metavar="PYTHON", help="an interpreter that has it: time it, too")
    parser.add_argument("--no-stand-in", action="store_true", help="leave the stand-in out")
    parser.add_argument("--only", choices=["ours", "stand_in"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run = ours if options.only == "ours" else stand_in
        print(json.dumps(run(options.input, options.tokenizer, workers=options.workers)))
        return 0
    if options.copies < 2:
        parser.error("--copies must be at least 2: the steady state is what a further copy costs")
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as folder:
        print(json.dumps(compare(Path(folder), options)))
    return 0


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians, minima and maxima over the runs; each run takes every kind in turn."""
    copies = {1: folder / "one", options.copies: folder / "many"}
    for number, target in copies.items():
        target.mkdir()
        for index in range(number):
            copy_plain(options.input, target / f"{index:03d}.jsonl")
    kinds = ["ours", *([] if options.no_stand_in else ["stand_in"]), *(["build"] if options.build else [])]
    if options.datatrove is not None:
        kinds.append("datatrove")
        model = parse_model(options.tokenizer.read_bytes())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(model)), encoding="utf-8")
    measured: dict[tuple[str, int], list[dict[str, Any]]] = {(kind, n): [] for kind in kinds for n in copies}
    for _ in range(options.runs):
        for (kind, number), results in measured.items():
            results.append(timed(kind, copies[number], folder / "output", options))
    written = {kind: [run for number in copies for run in measured[kind, number]] for kind in kinds}
    digests = {run["sha256"] for runs in written.values() for run in runs if "sha256" in run}
    assert len(digests) == 2, "ours and the stand-in must write the same tokens, in every run"
    tokens = {number: measured["ours", number][0]["tokens"] for number in copies}
    for run in written.get("datatrove", []):
        assert run["tokens"] in tokens.values(), "datatrove must write as many tokens, in an order of its own"
    report: dict[str, Any] = {}
    for kind in kinds:
        one, many = ([run["cpu_seconds"] for run in measured[kind, number]] for number in copies)
        further = (statistics.median(many) - statistics.median(one)) / (options.copies - 1)
        report[kind] = {
            "cpu_seconds": spread(many),
            "cpu_seconds_of_one_copy": spread(one),
            "start_up_cpu_seconds_a_worker": (statistics.median(one) - further) / options.workers,
            "steady_tokens_per_cpu_second": tokens[1] / further,
            "peak_bytes_of_a_process": max(run["peak_bytes"] for run in measured[kind, options.copies]),
            "peak_bytes_of_a_process_one_copy": max(run["peak_bytes"] for run in measured[kind, 1]),
        }
    costs = {kind: report[kind]["cpu_seconds"]["median"] for kind in kinds}
    ratios = {
        f"{rival}_by_{kind}": costs[rival] / costs[kind]
        for rival in ("stand_in", "datatrove")
        for kind in ("ours", "build")
        if rival in costs and kind in costs
    }
    return {
        **report,
        **ratios,
        "engine": measured["ours", 1][0]["engine"],
        **({"datatrove_version": written["datatrove"][0]["version"]} if "datatrove" in kinds else {}),
        "copies": options.copies,
        "workers": options.workers,
        "runs": options.runs,
        "input_bytes": sum(file.stat().st_size for file in copies[options.copies].iterdir()),
        "tokens": tokens[options.copies],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def timed(kind: str, inputs: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process tree of its own: its CPU seconds, the peak memory of its largest process, its result."""
    workers = ["--workers", str(options.workers), "--tokenizer", str(options.tokenizer), "--input", str(inputs)]
    build = ["-m", "megatron_xy", "data", "build", "--output", str(output), *workers]
    command = [sys.executable, *(build if kind == "build" else [__file__, "--only", kind, *workers])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if kind == "datatrove":
        script, model = Path(__file__).with_name("datatrove_tokenize.py"), inputs.parent / "tokenizer.json"
        command = [str(part) for part in (options.datatrove, script, inputs, model, output, options.workers)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    errors = subprocess.DEVNULL if kind == "datatrove" else None  # its log; what fails shows by its code
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert child.stdout is not None, "its output is piped"
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{kind} ended with {child.returncode}")
    shutil.rmtree(output, ignore_errors=True)
    result = {} if kind == "build" else json.loads(printed.splitlines()[-1])
    return {**result, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def ours(inputs: Path, tokenizer: Path, *, workers: int) -> dict[str, Any]:
    """Scan, choice of the engine and token shards, as in `data build` with --append-eod."""
    from megatron_xy.data.building.engine_choice import choose_engine, with_checked
    from megatron_xy.data.building.token_shards import make_token_shard
    from megatron_xy.data.building.tokenize import TokenizeTask
    from megatron_xy.data.building.workers import Workers
    from megatron_xy.data.corpus.inputs import find_inputs, group_parts, part_bytes_for
    from megatron_xy.data.encoding.loaded import load_anew, load_engines

    files, loaded = find_inputs([inputs]), load_anew(tokenizer)
    total = sum(file.stat().st_size for file in files)
    part_bytes = part_bytes_for(total)
    prepare = partial(load_engines, loaded.path)
    with tempfile.TemporaryDirectory() as folder, Workers(workers, progress=None, prepare=prepare) as pool:
        scan = partial(scan_one, part_bytes=part_bytes)
        scanned = list(pool.run("scan", scan, files, total=total, unit="bytes"))
        tasks = [
            TokenizeTask(Path(folder) / f"{index:06d}", parts, loaded.path, RowFields(), True, "fail")
            for index, parts in enumerate(group_parts(scanned, part_bytes=part_bytes))
        ]
        choice = choose_engine(loaded, tasks)
        fast = [replace(task, fast=choice.is_fast) for task in tasks]
        shards = list(pool.run("tokenize", make_token_shard, fast, total=total, unit="bytes"))
        written = digest([shard.folder / "default.bin" for shard in shards])
        return {**written, "engine": with_checked(choice, shards).model_dump()}


def scan_one(path: Path, advance: Any, *, part_bytes: int) -> Any:
    """Checksum and parts of one input file."""
    from megatron_xy.data.corpus.inputs import scan_file

    return scan_file(path, part_bytes=part_bytes, advance=advance)


def stand_in(inputs: Path, tokenizer: Path, *, workers: int) -> dict[str, Any]:
    """What Megatron's preprocess_data does: a pool encodes lines into lists of ids, one process builds the dataset."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(workers, start_encoder, (str(tokenizer),)) as pool,
    ):
        prefix = Path(folder) / "stand_in"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
        for ids in pool.imap(encode_line, lines_of(inputs), 32):
            if ids:
                builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")
        return digest([Path(f"{prefix}.bin")])


_encoder: Any = None  # of a process of the stand-in's pool


def start_encoder(tokenizer: str) -> None:
    """Each process of the pool loads the model."""
    global _encoder
    _encoder = sentencepiece.SentencePieceProcessor(model_file=tokenizer)


def encode_line(line: str) -> list[int]:
    """The ids of one line of JSON, with the end token."""
    ids: list[int] = _encoder.encode(json.loads(line)["text"])
    return [*ids, _encoder.eos_id()] if ids else []


def lines_of(inputs: Path) -> Iterator[str]:
    """All lines of all files."""
    for path in sorted(inputs.iterdir()):
        with path.open(encoding="utf-8") as stream:
            yield from stream


def digest(files: list[Path]) -> dict[str, Any]:
    """Checksum of the files one after another, and how many ids of two bytes they hold."""
    checksum, size = hashlib.sha256(), 0
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(MEGABYTE):
                checksum.update(block)
                size += len(block)
    return {"sha256": checksum.hexdigest(), "tokens": size // 2}


def copy_plain(source: Path, target: Path) -> None:
    """A copy, unpacked."""
    with gzip.open(source) if source.suffix == ".gz" else source.open("rb") as stream, target.open("wb") as copy:
        shutil.copyfileobj(stream, copy)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    sys.exit(main())
