"""Every command of README and docs is run as written; the two set-up commands by CI itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xy.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_BY_CI = {"make demo", "make test"}


def commands_of(document: Path) -> list[str]:
    """The lines of its bash blocks, without comments; of blocks marked `cluster` what they would start is printed."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    on_clusters = re.findall(r"^```bash cluster\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += [block.replace("--submit", "--dry-run") for block in on_clusters]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout after `make demo`, with a small corpus."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    latest = folder / "runs" / "demo" / "latest"
    latest.mkdir(parents=True)
    for command in (
        f"tools/collect_corpus.py --output {latest}/corpus --max-megabytes 0.8",
        f"tools/train_tokenizer.py --input {latest}/corpus --output {latest}/tokenizer.model --vocab-size 4096",
        f"-m megatron_xy data build --input {latest}/corpus --tokenizer {latest}/tokenizer.model "
        f"--output {latest}/data --buckets 128,256,512,1024 --source-field source --append-eod",
    ):
        run([sys.executable, *shlex.split(command)], folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert answer.returncode == 0, f"{shlex.join(command)}\n{answer.stdout[-2000:]}\n{answer.stderr[-3000:]}"
    return answer.stdout + answer.stderr


def test_every_command_of_the_documents_runs_as_written(checkout: Path) -> None:
    ran = 0
    for document in DOCUMENTS:
        for line in commands_of(document):
            if line in RUN_BY_CI:
                continue
            output = run(shlex.split(line), checkout)
            ran += 1
            if "nproc-per-node 2 parallel" in line and "run_dir=runs/first" in line:
                assert "resuming from runs/first/checkpoints/iter_0000006" in output
            if "virtual_pipeline" in line:
                assert "resuming from runs/first/checkpoints/iter_0000009" in output
    assert ran >= 10
    assert not undescribed(checkout)


def undescribed(checkout: Path) -> set[str]:
    """What the runs of the documents have left in their folders, and fields of it, that docs/run_folder.md lacks."""
    commands = "\n".join(line for document in DOCUMENTS for line in commands_of(document))
    tasks, names = set(), set()
    for run_dir in [path.parent for path in (checkout / "runs").rglob("metrics.jsonl")]:
        tasks.add(load_config(run_dir / "run.yaml").task)
        written = [path for path in run_dir.iterdir() if str(path.relative_to(checkout)) not in commands]
        names |= {f"{path.name}/" if path.is_dir() else path.name for path in written}
        names |= json.loads((run_dir / "exit.json").read_text(encoding="utf-8")).keys()
        for path in [run_dir / name for name in ("metrics.jsonl", "eval.jsonl", "events.jsonl", "samples.jsonl")]:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            names |= {name for line in lines for name in fields(json.loads(line))}
    assert tasks == {"pretrain", "sft", "reward", "ppo"}, "the documents run every task"
    page = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
    return names - set(re.findall(r"`([^`\n]+)`", page))


def fields(record: dict[str, Any]) -> Iterator[str]:
    """The names in a record, but for those of sources, buckets, models and roles."""
    for name, value in record.items():
        yield name
        if isinstance(value, dict) and name in ("seconds_by_phase", "held_out", "training"):
            yield from value


def test_ci_runs_the_two_set_up_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert set(script) >= RUN_BY_CI
    assert set(commands_of(ROOT / "README.md")) >= RUN_BY_CI


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*/*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_config(example: Path) -> None:
    config = load_config(example)
    assert yaml.safe_load(example.read_text(encoding="utf-8"))["task"] == config.task
