"""Is an HF folder the same model as a checkpoint? Every tensor's bits, and the logits of transformers against ours.

transformers runs in a process of its own, as a user of the release would load it: without the stand-in, without this
package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_xy import parallel
from megatron_xy.config import ModelConfig, ParallelConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.names import global_names
from megatron_xy.hf.source import Source, open_source
from megatron_xy.hf.target import stored_dtype
from megatron_xy.hf.verb import place
from megatron_xy.model.logits import logits_of
from megatron_xy.role import Role, build_role
from megatron_xy.safetensors_file import memory_of
from megatron_xy.tensor_reader import TensorReader
from megatron_xy.weights import load_initial_weights, resolve_model

TOLERANCE = 1e-4  # of logits in fp32
ROW_LENGTHS = (1, 17, 64, 128)

# Run by `python -c` in another process; argv: model folder, rows.json, where the logits go.
_TRANSFORMERS_LOGITS = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, rows, target = sys.argv[1:]
is_value = AutoConfig.from_pretrained(folder).architectures[0].endswith("ForSequenceClassification")
model = (AutoModelForSequenceClassification if is_value else AutoModelForCausalLM).from_pretrained(folder)
model = model.float().eval()
head = model.score if is_value else model.lm_head
with torch.no_grad():
    hidden = [model.model(torch.tensor([row])).last_hidden_state[0] for row in json.load(open(rows))]
    logits = {str(i): head(states).contiguous() for i, states in enumerate(hidden)}
save_file(logits, target)
"""


def verify(source: str, target: str, *, say: Callable[[str], None]) -> bool:
    """Whether `target`, converted from `source`, holds the same model: every tensor, and the logits of an HF folder.

    Raises ConfigError where transformers is needed and not there.
    """
    opened = [open_source(*place(text, option)) for text, option in ((source, "--from"), (target, "--to"))]
    same = tensors_agree(*opened, say=say)
    folders = [side.folder for side in reversed(opened) if side.kind == "hf"]
    if not folders:
        return same
    difference = largest_logit_difference(folders[0])
    say(f"logits of transformers and ours, fp32: largest difference {difference:.2e}, {TOLERANCE:.0e} is allowed")
    return same and difference <= TOLERANCE


def tensors_agree(source: Source, target: Source, *, say: Callable[[str], None]) -> bool:
    """Whether every weight is the same bit for bit in the target's type; a block of each is held at a time."""
    different = []
    with TensorReader(source.folder, source.manifest) as ours, TensorReader(target.folder, target.manifest) as theirs:
        for name in global_names(target.model):
            dtype = stored_dtype(target.manifest, name)
            blocks = zip(ours.blocks(name, dtype=dtype), theirs.blocks(name), strict=True)
            # As bytes: NaN is like itself, and -0.0 unlike 0.0.
            if not all(memory_of(a) == memory_of(b) for a, b in blocks):
                different.append(name)
    if different:
        say(f"{len(different)} tensors differ, the first is {different[0]}")
    else:
        say("every tensor is the same, bit for bit")
    return not different


def largest_logit_difference(hf_folder: Path) -> float:
    """The largest difference between our logits and those of transformers, over rows of pseudo-random tokens, fp32.

    Raises DataError where transformers does not open the folder.
    """
    with _alone_in_the_world():
        role = _role_of(hf_folder)
        assert role.model.vocab_size, "an HF folder has a whole shape"
        generator = torch.Generator().manual_seed(0)
        lengths = [min(length, role.model.max_position_embeddings) for length in ROW_LENGTHS]
        rows = [torch.randint(role.model.vocab_size, (length,), generator=generator).tolist() for length in lengths]
        ours = [logits.cpu() for logits in logits_of(role, rows)]
    theirs = transformers_logits(hf_folder, rows)
    # Tensors' maximum is NaN where any difference is; Python's would pass it over.
    return torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max().item()


def transformers_logits(hf_folder: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits [row length, vocabulary], fp32, of transformers in a process of its own; of a value head [row length, 1].

    Raises DataError where it does not open the folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rows_path, target = Path(scratch, "rows.json"), Path(scratch, "logits.safetensors")
        rows_path.write_text(json.dumps(rows), encoding="utf-8")
        command = [sys.executable, "-P", "-c", _TRANSFORMERS_LOGITS, str(hf_folder), str(rows_path), str(target)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if answer.returncode:
            raise DataError(f"transformers does not open {hf_folder}: {answer.stderr.strip().splitlines()[-1]}")
        logits = load_file(target)
        return [logits[str(number)] for number in range(len(rows))]


def _role_of(hf_folder: Path) -> Role:
    """The folder's model in fp32, whatever its dtype, on this one process."""
    model = resolve_model(ModelConfig(load=f"hf:{hf_folder}"))
    groups = parallel.build_groups("model", ranks=[0], parallel=ParallelConfig(), timeout_seconds=120)
    assert groups is not None, "this process is the role's one rank"
    role = build_role(groups, model=model, parallel=ParallelConfig(), optimizer=None, seed=0, draw=False)
    load_initial_weights(role, seed=0)
    return role


@contextmanager
def _alone_in_the_world() -> Iterator[None]:
    parallel.start_alone()
    try:
        yield
    finally:
        parallel.stop_distributed()
