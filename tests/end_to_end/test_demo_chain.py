"""All stages from nothing, as `make demo-chain` has them; examples/tiny's files then run as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 12 * 60


@pytest.mark.slow
def test_the_chain_ends_with_a_model_that_ppo_has_taught(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/demo_chain.py", "--output", str(tmp_path / "demo")]
    began = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert time.monotonic() - began < MOST_SECONDS
    folder = tmp_path / "demo" / "latest"
    forms = ("", "-int8") if find_spec("bitsandbytes") else ("",)
    for released in [folder / f"hf-{model}{form}" for model in ("sft", "ppo") for form in forms]:
        assert (released / "model.safetensors").is_file()
        assert ("## Forms of this model" in (released / "README.md").read_text()) == (len(forms) == 2)
    assert (folder / "ppo" / "report" / "index.html").is_file()
    scores = [json.loads(line)["score_mean"] for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert scores[-1] > scores[0] + 1
    for example in ("sft", "reward", "ppo"):
        text = (ROOT / "examples" / "tiny" / f"{example}.yaml").read_text().replace("runs/demo/latest", str(folder))
        (tmp_path / f"{example}.yaml").write_text(text)
        options = ["--nproc-per-node", "4", f"run_dir={tmp_path / example}"]
        options += ["training.epochs=null"] if example == "reward" else []
        command = [sys.executable, "-m", "megatron_xy", "run", str(tmp_path / f"{example}.yaml"), *options]
        run = subprocess.run(
            [*command, "training.train_iters=2", "training.eval_interval=0"],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
