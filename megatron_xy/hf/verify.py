"""Is an HF folder the same model as a checkpoint? Every tensor's bits, and the logits of transformers against ours.

transformers runs in a process of its own, as a user of the release would load it: without the stand-in, without this
package.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_xy import parallel
from megatron_xy.config import ModelConfig
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.errors import DataError
from megatron_xy.flops import num_parameters
from megatron_xy.hf.config import CONFIG
from megatron_xy.hf.folder import read_object
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.reader import SINGLE
from megatron_xy.hf.source import Source, open_source
from megatron_xy.hf.target import Output, write_files
from megatron_xy.hf.verb import place
from megatron_xy.model.logits import logits_of
from megatron_xy.model.source import resolve_model
from megatron_xy.model.weights import load_initial_weights
from megatron_xy.role import Role, build_role_alone
from megatron_xy.storage import TEMPORARY_PREFIX, write_json
from megatron_xy.tensors.block_reader import BlockReader
from megatron_xy.tensors.safetensors_file import memory_of

TOLERANCE = 1e-4  # of logits in fp32
ROW_LENGTHS = (1, 17, 64, 128)
MAX_ROW_LENGTH, MAX_TEXT_TOKENS = 1024, 4096  # of a given text
MAX_BLOCK_BYTES = 16 * 10**9  # of the weights of a block in fp32, held once by us and then by transformers

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


def verify(source: str, target: str, *, text: Path | None, say: Callable[[str], None]) -> bool:
    """Whether `target`, converted from `source`, holds the same model: every tensor, and the logits of an HF folder.

    text: what logits are compared on, by the HF folder's tokenizer; pseudo-random tokens if None. Raises ConfigError
    where there is no tokenizer, DataError where one of them is bad or transformers does not open the folder.
    """
    opened = [open_source(*place(text, option)) for text, option in ((source, "--from"), (target, "--to"))]
    with opened[0].verified(), opened[1].verified():
        same = tensors_agree(*opened, say=say)
    folders = [side for side in reversed(opened) if side.kind == "hf"]
    if not folders:
        return same
    rows = _drawn_rows(folders[0].model) if text is None else _text_rows(text, folders[0])
    difference = largest_logit_difference(folders[0], rows)
    what = f"{sum(map(len, rows)):,} {f'tokens of {text}' if text else 'drawn tokens'}"
    say(
        f"logits of transformers and ours, fp32, {what}: largest difference {difference:.2e} (allowed: {TOLERANCE:.0e})"
    )
    return same and difference <= TOLERANCE


def tensors_agree(source: Source, target: Source, *, say: Callable[[str], None]) -> bool:
    """Whether every weight is the same bit for bit in the target's type; a block of each is held at a time.

    Says how many there are, and the hash of all: in the model's order, one behind the other.
    """
    names, different, digest = list(global_names(target.model)), [], hashlib.sha256()
    with BlockReader(source.folder, source.manifest) as ours, BlockReader(target.folder, target.manifest) as theirs:
        for name in names:
            dtype, is_same = target.manifest.tensors[name].dtype, True
            numel = ours.block_numel(name, dtype=dtype)  # no more than theirs, which are of that type
            for a, b in zip(ours.blocks(name, dtype=dtype), theirs.blocks(name, max_numel=numel), strict=True):
                # As bits: NaN is like itself, and -0.0 unlike 0.0.
                is_same &= np.array_equal(a, b)
                digest.update(memory_of(b))
            if not is_same:
                different.append(name)
    if different:
        say(f"{len(different)} of {len(names)} tensors differ, the first is {different[0]}")
    else:
        say(f"every tensor is the same, bit for bit: {len(names)}, sha256 of all {digest.hexdigest()}")
    return not different


def largest_logit_difference(source: Source, rows: list[list[int]], *, max_bytes: int = MAX_BLOCK_BYTES) -> float:
    """The largest difference between our logits and those of transformers, over rows of token ids, in fp32.

    source: an HF folder. Where the model takes more than `max_bytes` in fp32, its layers are gone through in blocks,
    each as a model of its own between the embedding and the head. Raises DataError where transformers does not open it.
    """
    model = source.model
    assert model.num_layers, "an HF folder has a whole shape"
    layer_bytes = 4 * (num_parameters(model) - num_parameters(model.model_copy(update={"num_layers": 1})))
    fixed_bytes = 4 * num_parameters(model) - layer_bytes
    size = max(1, 1 + int((max_bytes - fixed_bytes) * (model.num_layers - 1) // max(layer_bytes, 1)))
    with ExitStack() as stack:
        parallel.start_alone()
        stack.callback(parallel.stop_distributed)
        if size >= model.num_layers:
            return _difference(source.folder, rows)
        differences = []
        for first in range(0, model.num_layers, size):
            with tempfile.TemporaryDirectory(dir=source.folder.parent, prefix=TEMPORARY_PREFIX) as scratch:
                _write_block(source, Path(scratch), layers=range(first, min(first + size, model.num_layers)))
                differences.append(_difference(Path(scratch), rows))
        return torch.tensor(differences).max().item()


def _drawn_rows(model: ModelConfig) -> list[list[int]]:
    """Rows of pseudo-random tokens."""
    assert model.vocab_size, "an HF folder has a whole shape"
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, model.max_position_embeddings) for length in ROW_LENGTHS]
    return [torch.randint(model.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _text_rows(path: Path, source: Source) -> list[list[int]]:
    """The beginning of a text as rows of tokens, none longer than the model's context."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--verify-text {path}: cannot be read as UTF-8 text: {error}") from None
    ids = load_tokenizer(source.folder).encode(text).tolist()[:MAX_TEXT_TOKENS]
    vocab_size = source.model.vocab_size or 0
    if not ids:
        raise DataError(f"--verify-text {path}: holds no token; name a text")
    if max(ids) >= vocab_size:
        raise DataError(f"{source.folder}: its tokenizer gives token {max(ids)}; its model knows 0..{vocab_size - 1}")
    length = min(MAX_ROW_LENGTH, source.model.max_position_embeddings)
    return [ids[first : first + length] for first in range(0, len(ids), length)]


def _difference(hf_folder: Path, rows: list[list[int]]) -> float:
    role = _role_of(hf_folder)
    ours = [logits.cpu() for logits in logits_of(role, rows)]
    del role  # before transformers takes as much memory
    theirs = transformers_logits(hf_folder, rows)
    # Tensors' maximum is NaN where any difference is; Python's would pass it over.
    return torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max().item()


def _write_block(source: Source, folder: Path, *, layers: range) -> None:
    """An HF folder of some consecutive layers, with the source's own embedding, head and config.json."""
    block = source.model.model_copy(update={"num_layers": len(layers)})
    outputs = []
    for name in global_names(block):
        original = re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) + layers.start}", name)
        for part, shard in hf_shards(name, block).items():
            outputs.append(Output(part, original, shard, source.manifest.tensors[original].dtype))
    write_files(folder, {SINGLE: outputs}, source=source, metadata={"format": "pt"}, say=lambda text: None)
    values = read_object(source.folder, CONFIG) or {}
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][layers.start : layers.stop]
    write_json(folder / CONFIG, {**values, "num_hidden_layers": len(layers)})


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
            said = answer.stderr.strip().splitlines() or [f"its process ended with {answer.returncode}"]
            raise DataError(f"transformers does not open {hf_folder}: {said[-1]}")
        logits = load_file(target)
        return [logits[str(number)] for number in range(len(rows))]


def _role_of(hf_folder: Path) -> Role:
    """The folder's model in fp32, whatever its dtype, on this one process."""
    model = resolve_model(ModelConfig(load=f"hf:{hf_folder}"))
    role = build_role_alone(model, draw=False)
    load_initial_weights(role, seed=0)
    return role
