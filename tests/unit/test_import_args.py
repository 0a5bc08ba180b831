"""`import-args`: Megatron-LM's launch scripts as RUN.yaml; parsed, never run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.config import load_config
from megatron_xy.errors import DataError
from megatron_xy.import_args.convert import import_args
from megatron_xy.import_args.shell import UNKNOWN, program_arguments

SCRIPT = Path(__file__).with_name("megatron_scripts") / "llama70b.sh"


def words_of(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "launch.sh").write_text(text)
    return program_arguments(tmp_path / "launch.sh")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python a.py --x 1 \\\n  --y 2", ["--x", "1", "--y", "2"]),
        ("A=(--x 1 # one\n--y 'b c'\n)\npython a.py ${A[@]}", ["--x", "1", "--y", "b c"]),
        ('A=(--x 1)\nA+=( --y 2 )\npython a.py "${A[@]}" --z', ["--x", "1", "--y", "2", "--z"]),
        ('O="--x 1 --y 2"\npython a.py $O', ["--x", "1", "--y", "2"]),
        ("N=3; python a.py --x $N --y ${N}0 --z ${M:-4}", ["--x", "3", "--y", "30", "--z", "4"]),
        (
            "python a.py --x $1 --y $(date) --z `id` --w $((1+(2)))",
            ["--x", UNKNOWN, "--y", UNKNOWN, "--z", UNKNOWN, "--w", UNKNOWN],
        ),
        ("python a.py --x '$N' \"\\$N\" > out 2>&1", ["--x", "$N", "$N"]),
        ("export N=7\npython a.py --x $N && echo done", ["--x", "7"]),
        ("# python b.py --old\npython a.py --it\\'s ''", ["--it's", ""]),
    ],
)
def test_words_are_bashs(tmp_path: Path, text: str, words: list[str]) -> None:
    assert words_of(tmp_path, text) == words


def test_a_script_without_a_program(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must start a Python program"):
        words_of(tmp_path, "echo hello\n")


def test_a_llama_of_70b(tmp_path: Path) -> None:
    imported = import_args(SCRIPT)
    assert imported.problems == []
    (tmp_path / "run.yaml").write_text(imported.text())
    config = load_config(tmp_path / "run.yaml", world_size=512)
    assert (config.model.num_layers, config.model.ffn_hidden_size, config.model.num_query_groups) == (80, 28672, 8)
    assert config.model.vocab_size == 39438 and config.model.params_dtype == "bf16"
    assert config.parallel.virtual_pipeline_model_parallel_size == 4 and config.parallel.use_distributed_optimizer
    assert (config.training.micro_batch_tokens, config.training.global_batch_tokens) == (4096, 4096 * 1024)
    assert config.training.train_iters == 1000
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.adam_beta2) == (1.5e-4, 1e-5, 0.999)
    assert str(config.data.tokenizer) == "/models/tok $enizer.model"
    assert [str(path) for path in config.data.paths] == ["/data/code_text", "/data/prose_text"]
    assert "num_layers: 80  # --num-layers" in imported.text()
    left_out = "\n".join(imported.left_out)
    assert "--save (not known): its value is not known" in left_out
    assert "--num-experts 8: no such choice here" in left_out and "--split 949,50,1: no such" in left_out
    assert "--swiglu" not in left_out and "dropout" not in left_out


def test_what_is_missing_is_listed(tmp_path: Path) -> None:
    script = tmp_path / "launch.sh"
    script.write_text(
        "torchrun pretrain_gpt.py --num-layers 4 --hidden-size x --normalization LayerNorm --hidden-dropout 0.1\n"
    )
    result = CliRunner().invoke(app, ["import-args", str(script)])
    assert result.exit_code == 78
    assert yaml.safe_load(result.stdout)["model"]["num_layers"] == 4
    for line in (
        "no counterpart: --normalization LayerNorm: always RMSNorm here",
        "no counterpart: --hidden-dropout 0.1: always 0 here",
        "no counterpart: --swiglu is not given",
        "still needed: model.hidden_size (x): must be a whole number",
    ):
        assert line in result.stderr, result.stderr
