"""The data folders that a run draws from: those that it names, and one built of each file of conversations it names.

A built folder is named by the contents it came from: the same file is built once, whichever rank comes first, and a
file that has changed is built anew, as other data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_xy.config import RunConfig
from megatron_xy.data.building.build import build_dataset
from megatron_xy.data.building.build_folder import WORK_FORMAT
from megatron_xy.data.building.options import BuildOptions
from megatron_xy.data.chat.template import OF_TOKENIZER, load_chat_template
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.inspection.progress import showing_progress
from megatron_xy.data.manifest import read_manifest
from megatron_xy.errors import ConfigError
from megatron_xy.rows_files import is_file_of_rows
from megatron_xy.storage import file_sha256

SOURCE_FIELD = "source"  # names the source of a row, where it has one


def data_folders(config: RunConfig, paths: Sequence[Path], *, into: Path) -> list[Path]:
    """`paths` with each file of rows replaced by the data folder that is built of it, below `into`, if need be.

    Its buckets are those of the run's own data folders, or one of micro_batch_tokens. Every bad row is refused.
    Raises ConfigError, DataError (with file and line), StorageError.
    """
    return [_built(config, path, into=into) if is_file_of_rows(path) else path for path in paths]


def _built(config: RunConfig, file: Path, *, into: Path) -> Path:
    data = config.data
    if not file.is_file():
        raise ConfigError(f"data ({file}): there is no such file; name a jsonl file of conversations")
    assert data.tokenizer is not None, "the config refuses files of rows without a tokenizer"
    tokenizer = load_tokenizer(data.tokenizer)
    name = data.chat_template or OF_TOKENIZER
    folders = [path for path in data.paths if not is_file_of_rows(path)]
    buckets = sorted(read_manifest(folders[0]).buckets) if folders else [config.training.micro_batch_tokens]
    template, beside = load_chat_template(name, tokenizer), tokenizer.config_path
    settled = [  # no less than the fingerprint of the build, which refuses a folder of another
        file_sha256(file),
        [tokenizer.sha256, None if beside is None else file_sha256(beside)],
        [template.name, template.source],
        [data.chat_overflow, data.last_turn_only, buckets],
        WORK_FORMAT,
    ]
    digest = hashlib.sha256(json.dumps(settled).encode()).hexdigest()
    folder = into / f"{file.name.partition('.')[0]}-{digest[:12]}"
    options = BuildOptions(
        buckets=buckets,
        source_field=SOURCE_FIELD,
        source_optional=True,
        bad_lines="fail",
        chat_template=name,
        chat_overflow=data.chat_overflow,
        last_turn_only=data.last_turn_only,
    )
    with showing_progress() as progress:
        build_dataset(
            [file],
            tokenizer=data.tokenizer,
            output=folder,
            options=options,
            progress=progress if not folder.is_dir() else None,
        )
    return folder
