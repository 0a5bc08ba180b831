"""`import-args`: Megatron-LM's launch scripts as RUN.yaml; parsed, never run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.config import load_config
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.import_args import convert
from megatron_xy.import_args.convert import import_args
from megatron_xy.import_args.program import UNKNOWN, program_arguments

LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192
}  # fmt: skip
BY_SAMPLES = "--seq-length 2048 --train-samples 1000 --global-batch-size 10"
SCRIPT = Path(__file__).with_name("megatron_scripts") / "llama70b.sh"


def words_of(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "launch.sh").write_text(text)
    return program_arguments(tmp_path / "launch.sh").arguments


WORDS = [
    ("python a.py --x 1 \\\n  --y 2", ["--x", "1", "--y", "2"]),
    ("A=(--x 1 # one\n--y 'b c'\n)\npython a.py \"${A[@]}\"", ["--x", "1", "--y", "b c"]),
    ('A=(--x 1)\nA+=( --y 2 )\npython a.py "${A[@]}" --z', ["--x", "1", "--y", "2", "--z"]),
    ('O="--x 1 --y 2"\npython a.py $O', ["--x", "1", "--y", "2"]),
    ("N=3; python a.py --x $N --y ${N}0 --z ${M:-4}", ["--x", "3", "--y", "30", "--z", "4"]),
    (
        "python a.py --x $1 --y $(date) --z `id` --w $((1+(2)))",
        ["--x", UNKNOWN, "--y", UNKNOWN, "--z", UNKNOWN, "--w", "3"],
    ),
    ("python a.py --x '$N' \"\\$N\" > out 2>&1", ["--x", "$N", "$N"]),
    ("export N=7\npython a.py --x $N && echo done", ["--x", "7"]),
    ('if [[ "$D" == "a" ]]; then A=(--x 1); else A=(--y 2); fi\nD=b\npython a.py "${A[@]}"', ["--y", "2"]),
    ('D=a\nif [[ $D == b || -n "$D" && 2 -gt 1 ]]; then A=1; else A=2; fi\npython a.py --x $A', ["--x", "1"]),
    ("D=b\nif [ $D = a ]; then\nA=1\nelif [ $D = b ]\nthen\nA=2\nelse\nA=3\nfi\npython a.py --x $A", ["--x", "2"]),
    ("S=8b\ncase $S in 7b|8b) B=7 ;; *) B=0 ;; esac\npython a.py --x $B", ["--x", "7"]),
    ('E=""\nA=()\n[ -z "$E" ] && A+=(--e)\n[ -n "$E" ] && A+=(--n)\npython a.py "${A[@]}"', ["--e"]),
    ('A=(\n"--x hybrid"\n# --no\n--y 1 )\npython a.py ${A[@]}', ["--x", "hybrid", "--y", "1"]),
    ('python a.py --x ${1:-"c/d"} --y "${Q:-${M:-5}}" --z ${N:+--no}', ["--x", "c/d", "--y", "5", "--z", UNKNOWN]),
    ("N=4; M=$((N*8/2)); python a.py --x $(( $M + ${N} ))", ["--x", "20"]),
    ('P="a/b.py"\ncmd="torchrun $P --x \'1 2\'"\necho $cmd\neval $cmd', ["--x", "1 2"]),
    ('N=3\nsrun -l bash -c "cd /x && python -u a.py --x $N --y" | tee log', ["--x", "3", "--y"]),
    ("cat > c <<EOF\n{ don't }\nEOF\npython a.py --x 1 > log 2>&1 &", ["--x", "1"]),
    ("python a.py --x 1 --y 2\npython convert.py --z", ["--x", "1", "--y", "2"]),
    ("declare -a A=(--x 1)\nreadonly B='--y 2'\npython a.py ${A[@]} $B", ["--x", "1", "--y", "2"]),
    ("f() {\n  torchrun a.py --x 1 $@\n}\nf --y 2", ["--x", "1", "--y", "2"]),
    ("C=b\n[ $C = b ] && F=1 || F=2\n[ $C = a ] && F=3 || G=4\npython a.py --x $F --y $G", ["--x", "1", "--y", "4"]),
    (
        "F=1\n[[ -n $F && $F = 2 ]] && F=3\n[ $F = 1 ] &&\n  G=5 || G=6\npython a.py --x $F --y $G",
        ["--x", "1", "--y", "5"],
    ),
    ("F=0\n[ 1 = 2 ] && { F=1; G=1; } || { F=2; G=3; }\npython a.py --x $F --y $G", ["--x", "2", "--y", "3"]),
    (
        "F=0\n[ 1 = 2 ] && if [ 1 = 1 ]; then F=1; fi\n! [ 1 = 2 ] && G=2\npython a.py --x $F --y $G",
        ["--x", "0", "--y", "2"],
    ),
    ("{ if [ 1 = 2 ]; then F=1; else F=2; fi; }\npython a.py --x $F", ["--x", "2"]),
    ("M=b\nif [ 1 = 1 ]; then case $M in (b|c) F=1;; *) F=2;; esac; fi\npython a.py --x $F", ["--x", "1"]),
    ("if [ 1 = 2 ]; then F=1; else case a in b) F=2;; a) F=3; esac; fi\npython a.py --x $F", ["--x", "3"]),
    ("F=1\nf() { F=2; }\nfunction g\n{\n  if [ 1 = 1 ]; then F=3; fi; }\npython a.py --x $F", ["--x", "1"]),
    ('add() { A+=("$@"); }\nA=(--x 1)\nadd --y "b c"\npython a.py "${A[@]}"', ["--x", "1", "--y", "b c"]),
    ('add() { A="$A $*"; }\nA="--x 1"\nadd --y 2\npython a.py $A', ["--x", "1", "--y", "2"]),
    ("size() { if [ $1 = big ]; then F=1; return; fi; F=2; }\nsize big\npython a.py --x $F", ["--x", "1"]),
    (
        "f() { local F=3; G=$F$2; shift; H=$#$1; }\nF=1\nf 8 9\npython a.py --x $F --y $G --z $H",
        ["--x", "1", "--y", "39", "--z", "19"],
    ),
    (
        "is() { [ $1 = b ]; }\nif ! is b; then F=1; elif is b; then F=2; else F=3; fi\nis a && F=4\npython a.py --x $F",
        ["--x", "2"],
    ),
    ("F=1\nf() { F=2; }\n( F=3 )\nf | cat\npython a.py --x $F", ["--x", "1"]),
    ('run() { echo "$@"; "$@"; }\nset -- --y 2\nrun python a.py --x 1 "$@"', ["--x", "1", "--y", "2"]),
    ("N=1\nf() { F=$N; }\nN=2 f\nN=3 true\npython a.py --x $N --y $F", ["--x", "1", "--y", "2"]),
    ("# python b.py --old\npython a.py --it\\'s ''", ["--it's", ""]),
]


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_words_are_bashs(tmp_path: Path, text: str, words: list[str]) -> None:
    assert words_of(tmp_path, text) == words


def words_of_bash(tmp_path: Path, text: str) -> list[list[str]]:
    """Of each Python program that it starts."""
    tools = {
        "python": 'printf "%s\\0" "$@" >> "$SAID"; printf "END\\0" >> "$SAID"',
        "srun": 'shift; exec "$@"',
        "tee": "cat > log",
    }
    for name, does in (tools | {"torchrun": tools["python"]}).items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "launch.sh").write_text(text.replace("cd /x", "true") + "\nwait\n")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(tmp_path / "said")}
    subprocess.run(["bash", "launch.sh"], cwd=tmp_path, env=environment, capture_output=True, timeout=10)
    programs = [part.split("\0")[:-1] for part in (tmp_path / "said").read_text().split("END\0") if part]
    return [words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :] for words in programs]


@pytest.mark.parametrize("text", [text for text, words in WORDS if UNKNOWN not in words])
def test_bash_says_the_same(tmp_path: Path, text: str) -> None:
    assert words_of(tmp_path, text) in words_of_bash(tmp_path, text)


KNOWN = [
    'A=1; AB=2; python a.py --x "$A"B',
    "A=1\nA=2 python a.py --x $A",
    "A=1; unset A; python a.py --x ${A:-2} ${A+3} $A",
    'A=(a b); A[1]=c; python a.py $A "${A[@]}" ${#A[@]} "${A[@]:1}" ${A[-1]}; A=d',
    "A=(a b); A=c; A+=d; python a.py ${A[@]}",
    'A=(); B=("" b); E=; python a.py "${A[@]}" "${B[@]}" "$E" $E "${E:+x}" "x${A[@]}y"',
    '[[ abc == "a*" ]] && A=1 || A=2; [[ abc == a* ]] && B=1; [[ 10 > 9 ]] && C=1 || C=2; python a.py $A $B $C',
    '[ 5 -gt 3 -a -1 -lt 0 ] && A=1; if [ ! -n "$B" ]; then :; fi; python a.py --x $A',
    "python a.py $((-7/2)) $((-7%3)) $((0x10+010)) $((5>3?1:2)) $((2**10)); let A=3+4; ((A+=2)); python a.py $A",
    "A=1; python a.py $((A++))$A $((++A)) # \\\npython b.py",
    "python a.py --x 1\necho python a.py --x 1 --y 2\necho 'Error: a.py'\necho 'not at a.py'",
    "if [ 1 = 1 ]; then\npython a.py --x 1\nexit 0\nfi\npython a.py --x 1 --y 2",
    "true && exec python a.py --x 1\npython a.py --x 1 --y 2",
    'A=; for i in 1 2 3; do [ $i = 2 ] && continue; A="$A $i"; done; python a.py $A',
    "A='/a/b.c.txt'; python a.py ${A##*/} ${A%.*} ${A%%.*} ${A#/} ${A:1:3} ${A: -3} ${#A}",
    "A=Ab; B=A; python a.py ${A,,} ${A^^} ${!B} \"${C:-'q'}\" ${C:-'q r'} ${D:=s} $D",
    "A='*  b'; python a.py \"$A\" 'a\"b' \"a\\\"b\" a\\ b $'c\\td' --x\\*",
    'set -- a \'b c\'; shift; set -- "$@" d; python a.py $# "$1" "${@:2}" "$*"; shift 5; python a.py $1',
    "f() { local A=2; B=$A$1; return 1; }; A=1; f 3 || C=4; python a.py $A $B $C",
    'A=1; export B=2; D=3 bash -c \'python a.py "$B" "$D" "$1"\' p q',
    "case a1 in [0-9]*) A=1 ;; [!0-9]?) A=2 ;; *) A=3 ;; esac; (A=4); { B=5; } ; python a.py $A $B",
    'export "A=1"; declare B=2; readonly C=3; python a.py $A $B $C',
]
# Not known to one who runs nothing, or not read: then this is told.
TOLD = [
    "python a.py --x {1..3}",
    "touch f; python a.py --x * [f] ~ ~/f",
    "A='a.b'; IFS=.; python a.py --x $A",
    "A=a.b; [[ $A =~ b$ ]] && B=1 || B=2; python a.py --x $B",
    "read -r A <<< 'x'; printf -v B y; mapfile -t C <<< z; python a.py --x $A $B $C",
    "declare -A M=([b]=2); declare -i N=1+1; A=(x y); A[4]=z; python a.py ${M[b]} $N ${A[@]}",
    "A=abc; python a.py ${A/b/c} ${A^} $((1<<2)) $((10#08)) $'\\x41' ${A:0:-1}",
    "while true; do A=1$A; [ $A = 11 ] && break; done; python a.py --x $A",
    "A=1; bash -c 'python a.py --x $A'",
    "OPTS+=' --x 1'; python a.py $OPTS",
    "cd .; echo A=1 > env; . env; python a.py --x $A",
    "[ -f launch.sh ] && A=1 || A=2; python a.py --x $A",
]


@pytest.mark.parametrize("text", [*KNOWN, *TOLD])
def test_nothing_is_silently_unlike_bash(tmp_path: Path, text: str) -> None:
    bashs = words_of_bash(tmp_path, text)
    (tmp_path / "launch.sh").write_text(text)
    program = program_arguments(tmp_path / "launch.sh")
    is_told = any("second start" not in note for note in program.notes) or UNKNOWN in " ".join(program.arguments)
    assert is_told if text in TOLD else program.arguments in bashs and not is_told, program


def test_a_message_about_the_program_is_no_start_of_it() -> None:
    assert not any("second start" in note for note in program_arguments(SCRIPT.with_name("llama8b_fp8.sh")).notes)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("if true; then\npython a.py\n", r"launch.sh must be a bash script: 1:1: .*if"),
        ("{ " * 400 + "a" + "; }" * 400, "nested deeper"),
        ("exit 0\npython a.py --x 1", "must start a Python program"),
        ("for i in 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2; do A=xx$A$A; done\npython a.py", "characters"),
    ],
)
def test_a_script_that_is_not_read(tmp_path: Path, text: str, refusal: str) -> None:
    with pytest.raises(DataError, match=refusal):
        words_of(tmp_path, text)


def test_where_shfmt_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs shfmt.*pip install 'megatron-xy\[import-args\]'"):
        words_of(tmp_path, "python a.py --x 1")
    old = tmp_path / "shfmt"
    old.write_text('#!/bin/sh\necho \'{"Stmts": [{"Cmd": {"Op": 11}}]}\'\n')
    old.chmod(0o755)
    with pytest.raises(ConfigError, match="too old"):
        words_of(tmp_path, "python a.py --x 1")


@pytest.mark.parametrize("text", ["source launch.sh\npython a.py --x\n", "A='eval \"$A\"'\neval $A\npython a.py --x\n"])
def test_a_script_that_starts_itself(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="starts itself again"):
        words_of(tmp_path, text)


def test_what_only_a_run_would_tell_is_noted(tmp_path: Path) -> None:
    (tmp_path / "launch.sh").write_text(
        "source nowhere.sh\nif [ $1 = x ]; then A=1; else A=2; fi\nif [ ! -d out ]; then mkdir out; fi\n"
        "for i in 1 $2; do B=$i; done\npython a.py --x $A --y $B \\\n  # --z \\\n  --w\n"
    )
    program = program_arguments(tmp_path / "launch.sh")
    assert program.arguments == ["--x", "2", "--y", UNKNOWN]
    begins = [note.partition(":")[0] for note in program.notes]
    assert begins == ["source nowhere.sh", "if [ $1 = x ]", "for i in 1 $2", "--w"]


@pytest.mark.parametrize(
    ("text", "arguments", "begins"),
    [
        ("[ -d x ] && F=1 || F=2\npython a.py --x $F", ["--x", "2"], ["[ -d x ]"]),
        ("grep -q x y && F=1\npython a.py --x $F", ["--x", "1"], ["grep -q x y"]),
        ("N=$M\n(( N > 2 )) && F=1\n((N++))\npython a.py --x $N$F", ["--x", f"{UNKNOWN}1"], ["(( N > 2 ))"]),
        ("for ((i=0;i<3;i++)); do F=1; done\npython a.py --x $i", ["--x", UNKNOWN], ["for ((i=0;i<3;i++))"]),
        ("if [ -d x ]; then F=1; exit 1; fi\npython a.py --x ${F:-2}", ["--x", "2"], ["if [ -d x ]"]),
        ('eval "$(setup)"\nPATH+=:/x\npython a.py --x 1', ["--x", "1"], [UNKNOWN]),
        ('bash -c "if $X"\npython a.py --x 1', ["--x", "1"], [f"if {UNKNOWN}"]),
        ("f() { if [ -d x ]; then return; fi; F=2; }\nf\npython a.py --x $F", ["--x", "2"], ["if [ -d x ]"]),
        ("f() { F=$1; f 2; }\nf 1\npython a.py --x $F", ["--x", "1"], ["f 2"]),
        ("f() { F=$1$2; }\nf a $X\nmkdir x && python a.py --x $F", ["--x", f"a{UNKNOWN}"], []),
        ("f() { F=$1; }\nwhile f 2; do G=1; done\npython a.py --x $F", ["--x", "2"], ["while f 2"]),
        ("python a.py --x 1\npython a.py --x 2", ["--x", "2"], ["a.py --x 1"]),
    ],
)
def test_what_is_read_otherwise_than_it_may_run_is_noted(
    tmp_path: Path, text: str, arguments: list[str], begins: list[str]
) -> None:
    (tmp_path / "launch.sh").write_text(text)
    program = program_arguments(tmp_path / "launch.sh")
    assert program.arguments == arguments
    assert [note.partition(":")[0] for note in program.notes] == begins


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [
                "if",
                "then",
                "fi",
                "case",
                "in",
                "esac",
                "for",
                "do",
                "done",
                "else",
                "elif",
                "[",
                "]",
                "&&",
                "||",
                "|",
                ";;",
                "A=(",
                ")",
                "(",
                "$A",
                "${A[@]}",
                "${A",
                "$((1/0))",
                "$((",
                "'",
                '"',
                "\\",
                "\n",
                ";",
                " ",
                "#",
                "<<E",
                "eval",
                "$A$A",
                "A=$A",
                "source",
                "x.sh",
                "a.py",
                "--x",
                "A=x",
                "bash -c",
                "{",
                "}",
                "!",
                "`",
                "$(",
                "f()",
                "f",
                "}",
                "((",
                "[[",
                "!",
                "return",
                "shift",
            ]
        )
    )
)
def test_any_text_is_read_or_refused(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "x.sh"
        script.write_text(" ".join(parts))
        with contextlib.suppress(DataError):
            program_arguments(script)


def test_a_script_without_a_program(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must start a Python program"):
        words_of(tmp_path, "echo hello\n")


def test_a_llama_of_70b(tmp_path: Path) -> None:
    imported = import_args(SCRIPT)
    assert imported.problems == ["--num-experts 8: dense models here"]
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
    assert "--split 949,50,1: `data build --held-out`" in left_out
    assert "--swiglu" not in left_out and "dropout" not in left_out


def test_a_llama_of_13b_over_a_sourced_file_and_tests() -> None:
    imported = import_args(SCRIPT.with_name("llama13b_slurm.sh"))
    values = {key: value for key, (value, _) in imported.values.items()}
    assert (values["model.num_layers"], values["model.hidden_size"], values["model.ffn_hidden_size"]) == (
        40,
        5120,
        13824,
    )
    assert values["parallel.pipeline_model_parallel_size"] == 2
    assert values["model.recompute_granularity"] == "selective"
    assert (values["training.micro_batch_tokens"], values["training.global_batch_tokens"]) == (2 * 4096, 512 * 4096)
    assert (values["training.train_iters"], values["optimizer.lr_warmup_iters"]) == (4000, 40)
    assert values["data.path"] == ["/data/corpus/zh", "/data/corpus/en"] and values["data.split_documents"] is True
    assert "data.weights: 0.7 0.3" in imported.text()
    assert imported.problems == []
    assert imported.left_out == []


def test_a_llama_of_8b_of_arrays_and_tests() -> None:
    imported = import_args(SCRIPT.with_name("llama8b_fp8.sh"))
    values = {key: value for key, (value, _) in imported.values.items()}
    assert (values["model.rotary_base"], values["model.vocab_size"], values["run_dir"]) == (
        500_000, 128_256, "checkpoints/llama3_8b"
    )  # fmt: skip
    assert values["optimizer.lr_warmup_tokens"] == 12_800 * 8192 and "optimizer.lr_warmup_iters" not in values
    assert values["runtime.timeout_seconds"] == 3600 and values["data.split_documents"] is False
    assert [problem.partition(" ")[0] for problem in imported.problems] == ["data.path"]
    left_out = "\n".join(imported.left_out)
    for told in (
        "--fp8-format hybrid: bf16",
        "--apply-layernorm-1p",
        "--exit-duration-in-mins 235",
        "--load checkpoints",
        "(not known) behind --distributed-timeout-minutes",
        "NullTokenizer: always Llama2Tokenizer",
    ):
        assert told in left_out
    assert "dropout" not in left_out
    assert "--data-path" not in left_out, "the branch of a real tokenizer is not taken"


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.sh")), ids=lambda path: path.stem)
def test_no_flag_is_dropped_silently(script: Path) -> None:
    imported = import_args(script)
    always = yaml.safe_load((Path(convert.__file__).parent / "flags.yaml").read_text())["always"]
    told = imported.text() + "\n".join(imported.left_out)
    for word in program_arguments(script).arguments:
        if word.startswith("--"):
            flag = word.partition("=")[0].replace("_", "-")
            assert flag in told or flag in {*always, "--kv-channels", "--group-query-attention"}, flag


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--hidden-size 4096 --swiglu", "model.ffn_hidden_size", 10880),
        ("--num-query-groups 4", "model.num_query_groups", None),
        ("--group-query-attention", "model.num_query_groups", 1),
        ("--group-query-attention --num-query-groups $N", "model.num_query_groups", None),
        ("--num-query-groups 4 --group-query-attention", "model.num_query_groups", 4),
        ("--use-rope-scaling", "model.rope_scaling", LLAMA3 | {"factor": 8.0}),
        ("--use-rope-scaling --rope-scaling-factor 32", "model.rope_scaling", LLAMA3 | {"factor": 32.0}),
        ("--use-rope-scaling --rope-scaling-factor $N", "model.rope_scaling", None),
        ("--rope-scaling-factor 8", "model.rope_scaling", None),
        ("--rotary-seq-len-interpolation-factor 4", "model.rope_scaling", {"rope_type": "linear", "factor": 4.0}),
        ("--train-iters 500 --lr-decay-iters 400 --lr-warmup-fraction .05", "optimizer.lr_warmup_iters", 20),
        ("--seq-length 4096 --lr-decay-samples 1000", "optimizer.lr_decay_tokens", 4_096_000),
        (f"{BY_SAMPLES} --lr-warmup-samples 10", "optimizer.lr_decay_tokens", 2_048_000),
        (f"{BY_SAMPLES} --lr-warmup-samples 10 --lr-decay-samples 500", "optimizer.lr_decay_tokens", 1_024_000),
        (BY_SAMPLES, "optimizer.lr_decay_tokens", None),
        ("--reset-attention-mask --bf16 $MORE", "data.split_documents", True),
        ("--transformer-impl local", "model.layer_spec", "torch"),
    ],
)
def test_flags_that_take_arithmetic_or_each_other(tmp_path: Path, flags: str, key: str, value: object) -> None:
    (tmp_path / "launch.sh").write_text(f"python pretrain_gpt.py {flags}\n")
    imported = import_args(tmp_path / "launch.sh")
    assert imported.values.get(key, (None, ""))[0] == value
    if "$MORE" in flags:
        assert any("stands behind --bf16" in entry for entry in imported.left_out)


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ("--moe-router-topk 2 --expert-model-parallel-size 8", ["--moe-router-topk 2"]),
        ("--multi_latent_attention --qk-layernorm", ["--multi-latent-attention", "--qk-layernorm"]),
        ("--window-size 4096,0 --mtp-num-layers 1", ["--window-size 4096,0", "--mtp-num-layers 1"]),
        ("--mtp-num-layers 0 --softmax-type vanilla --kv-channels 32", []),
        ("--kv-channels 64", ["--kv-channels 64"]),
        ("--kv-channels $N", [f"--kv-channels {UNKNOWN}"]),
        (
            "--position-embedding-type mrope --rotary-percent 0.5",
            ["--position-embedding-type mrope", "--rotary-percent 0.5"],
        ),
    ],
)
def test_another_model_than_is_here_is_refused(tmp_path: Path, flags: str, asked: list[str]) -> None:
    (tmp_path / "launch.sh").write_text(f"python a.py --hidden-size 128 --num-attention-heads 4 {flags}\n")
    problems = import_args(tmp_path / "launch.sh").problems
    assert [problem.partition(":")[0] for problem in problems if problem.startswith("--")] == asked


def test_what_is_missing_is_listed(tmp_path: Path) -> None:
    script = tmp_path / "launch.sh"
    script.write_text(
        "torchrun pretrain_gpt.py --num-layers 4 --hidden-size x --normalization LayerNorm --hidden-dropout 0.1\n"
    )
    result = CliRunner().invoke(app, ["import-args", str(script)])
    assert result.exit_code == 78
    assert yaml.safe_load(result.stdout)["model"]["num_layers"] == 4
    for line in (
        "still needed: --normalization LayerNorm: always RMSNorm here",
        "no counterpart: --hidden-dropout 0.1: always 0 here",
        "no counterpart: --attention-dropout is not given, which is 0.1 in Megatron: always 0 here",
        "no counterpart: --swiglu is not given",
        "still needed: training.global_batch_tokens: --global-batch-size is not given, which is --micro-batch-size x",
        "still needed: model.hidden_size (x): must be a whole number",
    ):
        assert line in result.stderr, result.stderr


@pytest.mark.parametrize(
    "flags",
    ["--lr 1.2.3", "--lr .", "--train-iters 100k --lr-warmup-fraction 0.01", "--num-layers ²", "--seed " + "9" * 5000,
     "--train-iters 10 --lr-warmup-fraction 1e999"],
)  # fmt: skip
def test_what_is_no_number_is_refused_by_the_config(tmp_path: Path, flags: str) -> None:
    (tmp_path / "launch.sh").write_text(f"python a.py {flags}\n")
    result = CliRunner().invoke(app, ["import-args", str(tmp_path / "launch.sh")])
    assert result.exit_code == 78, result.exception


def test_no_key_is_smuggled_in_by_a_line_break(tmp_path: Path) -> None:
    (tmp_path / "launch.sh").write_text(
        "python a.py --foo 'a\ntask: ppo' --save 'b\ntask: ppo' --data-path 'c\u2028task: ppo' d --lr '1\nseed: 2'\n"
    )
    written = yaml.safe_load(import_args(tmp_path / "launch.sh").text())
    assert (written["task"], written["run_dir"]) == ("pretrain", "b\ntask: ppo")
    assert written["data"]["path"] == ["c\u2028task: ppo", "d"] and written["optimizer"]["lr"] == "1\nseed: 2"
    assert "seed" not in written
