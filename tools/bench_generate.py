"""How fast is generation? Ours against transformers' generate on the same weights: tokens per CPU second, greedy.

One process and one thread each, fp32, timed in turn and compared pair by pair. transformers runs in a process of its
own, without this package and its stand-in for CUDA. Two cases: prompts and answers of equal lengths, all at once; and
prompts of 8 to 128 tokens whose answers end early or late, at most 32 sequences at a time, where transformers takes the
prompts in batches sorted by length.

    python tools/bench_generate.py [--pairs 5] [--case equal|ragged] [--layers 8 --hidden 256] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_xy import device

device.start(num_threads=1)

from megatron_xy import parallel  # noqa: E402
from megatron_xy.config import ModelConfig  # noqa: E402
from megatron_xy.model.generate import Answer, Request, generate_share  # noqa: E402
from megatron_xy.model.sampling import SamplingOptions  # noqa: E402
from megatron_xy.model.source import resolve_model  # noqa: E402
from megatron_xy.model.weights import load_initial_weights  # noqa: E402
from megatron_xy.role import Role, build_role_alone  # noqa: E402

VOCAB_SIZE = 4096
AT_A_TIME = 32

# argv: folder, shape. Makes the model, then answers one job a line with its tokens and CPU seconds.
_TRANSFORMERS = """
import json, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2]), initializer_range=0.1)).eval()
model.save_pretrained(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    order = sorted(range(len(job["prompts"])), key=lambda place: len(job["prompts"][place]))
    answers = [None] * len(order)
    began = time.process_time()
    for first in range(0, len(order), job["at_a_time"]):
        places = order[first : first + job["at_a_time"]]
        width = max(len(job["prompts"][place]) for place in places)
        gaps = [width - len(job["prompts"][place]) for place in places]
        ids = torch.tensor([[0] * gap + job["prompts"][place] for gap, place in zip(gaps, places)])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
        output = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=job["length"], bos_token_id=None,
            eos_token_id=job["stops"] or None, pad_token_id=0,
        )
        for place, row in zip(places, output[:, width:].tolist()):
            answers[place] = row
    print(json.dumps({"answers": answers, "seconds": time.process_time() - began}), flush=True)
"""


def main() -> int:
    """Prints tokens per CPU second of both and their ratio, pair by pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--case", choices=("equal", "ragged"), help="this one only")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": f"{options.layers} layers of {options.hidden}, vocabulary {VOCAB_SIZE}, fp32",
    }
    with tempfile.TemporaryDirectory() as scratch:
        theirs = Transformers(Path(scratch, "hf"), layers=options.layers, hidden=options.hidden)
        parallel.start_alone()
        role = our_role(theirs.folder)
        for case in ("equal", "ragged"):
            if options.case in (None, case):
                results[case] = measure(job_of(case), role, theirs, pairs=options.pairs)
                if not options.json:
                    print(told(case, results[case]), flush=True)
        theirs.process.kill()
        parallel.stop_distributed()
    if options.json:
        print(json.dumps(results))
    return 0


def job_of(case: str) -> dict[str, Any]:
    """Prompts, stop tokens and the longest answer of a case."""
    draw = random.Random(0)
    if case == "equal":
        prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(32)] for _ in range(AT_A_TIME)]
        return {"prompts": prompts, "stops": [], "length": 64, "at_a_time": AT_A_TIME}
    lengths = [draw.randrange(8, 129) for _ in range(3 * AT_A_TIME)]
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    stops = draw.sample(range(VOCAB_SIZE), VOCAB_SIZE // 40)  # any of them ends an answer: after 40 tokens or so
    return {"prompts": prompts, "stops": stops, "length": 128, "at_a_time": AT_A_TIME}


def measure(job: dict[str, Any], role: Role, theirs: Transformers, *, pairs: int) -> dict[str, Any]:
    """Tokens per CPU second of both, `pairs` times in turn after one round that does not count."""
    rates: dict[str, list[float]] = {"ours": [], "transformers": []}
    for number in range(pairs + 1):
        ours, our_seconds = run_ours(role, job)
        others, their_seconds = theirs.run(job)
        others = [cut(answer, job["stops"]) for answer in others]
        if number:
            rates["ours"].append(sum(map(len, ours)) / our_seconds)
            rates["transformers"].append(sum(map(len, others)) / their_seconds)
    ratios = [one / other for one, other in zip(rates["ours"], rates["transformers"], strict=True)]
    return {
        "answers": len(ours),
        "tokens": sum(map(len, ours)),
        "answer_lengths": {
            "least": min(map(len, ours)),
            "median": statistics.median(map(len, ours)),
            "most": max(map(len, ours)),
        },
        "equal_answers": sum(one == other for one, other in zip(ours, others, strict=True)),
        "tokens_per_cpu_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
    }


def told(case: str, result: dict[str, Any]) -> str:
    """A case's result in words."""
    rates = result["tokens_per_cpu_second"]
    lengths = result["answer_lengths"]
    return (
        f"{case}: {result['answers']} answers of {lengths['least']} to {lengths['most']} tokens (median "
        f"{lengths['median']:g}), {result['equal_answers']} of them equal token for token; tokens per CPU second: ours "
        f"{rates['ours']:,.0f}, transformers {rates['transformers']:,.0f}; ratio {result['ratio']:.2f} "
        f"({result['ratios'][0]:.2f} to {result['ratios'][-1]:.2f} over {len(result['ratios'])} pairs)"
    )


def run_ours(role: Role, job: dict[str, Any]) -> tuple[list[list[int]], float]:
    """Our answers, and the CPU seconds that they took."""
    options = SamplingOptions(temperature=0.0, max_response_length=job["length"], stop_ids=tuple(job["stops"]))
    requests = [Request(prompt, row=row) for row, prompt in enumerate(job["prompts"])]
    answers: dict[int, Answer] = {}
    began = time.process_time()
    generate_share(role, requests, options, on_answer=answers.__setitem__, max_sequences=job["at_a_time"])
    return [answers[place].tokens for place in range(len(requests))], time.process_time() - began


def our_role(folder: Path) -> Role:
    """The folder's model on this one process."""
    model = resolve_model(ModelConfig(load=f"hf:{folder}"))
    role = build_role_alone(model, draw=False)
    load_initial_weights(role, seed=0)
    return role


class Transformers:
    """transformers in a process of its own, which has made the model in `folder`."""

    def __init__(self, folder: Path, *, layers: int, hidden: int) -> None:
        self.folder = folder
        shape = {
            "vocab_size": VOCAB_SIZE, "hidden_size": hidden, "intermediate_size": hidden * 11 // 4 // 8 * 8,
            "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 512,
        }  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _TRANSFORMERS, str(folder), json.dumps(shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._read() == "ready", "transformers did not begin"

    def run(self, job: dict[str, Any]) -> tuple[list[list[int]], float]:
        """Its answers, padding behind them included, and the CPU seconds that they took."""
        assert self.process.stdin is not None, "it was asked for as a pipe"
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._read())
        return answer["answers"], answer["seconds"]

    def _read(self) -> str:
        assert self.process.stdout is not None, "it was asked for as a pipe"
        return self.process.stdout.readline().strip()


def cut(answer: list[int], stops: list[int]) -> list[int]:
    """The answer up to its first stop token."""
    for place, token in enumerate(answer):
        if token in stops:
            return answer[: place + 1]
    return answer


if __name__ == "__main__":
    sys.exit(main())
