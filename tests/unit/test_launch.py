"""`launch`: what it writes is what the programs of a cluster take, run here by stand-ins for them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.config import InvalidConfig
from megatron_xy.errors import ConfigError
from megatron_xy.launch.job import _RULES
from megatron_xy.run_folder import lock, prepare, read_exit
from tests.unit.fake_cluster import cluster_environment, make_cluster

ROOT = Path(__file__).parents[2]
PPO = ROOT / "examples" / "xuanyuan2_70b" / "ppo.yaml"
CONFIG = """\
run_dir: run
model: {num_layers: 4, hidden_size: 128, ffn_hidden_size: 352, num_attention_heads: 4, vocab_size: 4096}
parallel: {tensor_model_parallel_size: 2}
data: {path: data}
training: {global_batch_tokens: 8192, micro_batch_tokens: 2048}
"""
KUBERNETES = ("--on", "kubernetes", "--container", "image:1", "--volume-claim", "claim", "--workdir", "/data")
ODD = "data.tokenizer=a b'c\"$(touch x)`;&#é$(NCCL_DEBUG)$$$"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a RUN.yaml and a cluster's programs, to stand in."""
    make_cluster(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launched(*arguments: str | Path) -> str:
    """What `megatron-xy launch ARGUMENTS` prints."""
    result = CliRunner().invoke(app, ["launch", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def slurm_script(*arguments: str | Path) -> str:
    """For 2 nodes of 4 in the cluster, one node to spare."""
    sizes = ("--nodes", "2", "--gpus-per-node", "4", "--spare-nodes", "1")
    return launched("run.yaml", "--on", "slurm", *sizes, "--venv", ".", *arguments)


def run_script(cluster: Path, text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = cluster_environment(cluster, FAKE_RUN=str(cluster / "run"), **variables)
    return subprocess.run(
        ["bash", "-c", text], env=environment, capture_output=True, text=True, timeout=30, check=False
    )


def filled_in(text: str) -> str:
    """What Kubernetes makes of a container's argument: $(NAME) of a variable it knows, and $ of $$."""
    return re.sub(r"\$\$|\$\(NCCL_DEBUG\)", lambda match: "$" if match[0] == "$$" else "WARN", text)


def recorded(cluster: Path, name: str) -> list[str]:
    path = cluster / "record" / name
    return path.read_text().split("\0")[:-1] if path.exists() else []


def test_local_is_one_torchrun(cluster: Path) -> None:
    lines = launched("run.yaml", "--gpus-per-node", "4", "training.train_iters=7", "data.tokenizer=a b").splitlines()
    assert lines[-1].endswith(
        "torchrun --standalone --nproc-per-node=4 --log-dir=run/logs/torchrun --tee=3 "
        "-m megatron_xy pretrain run.yaml training.train_iters=7 'data.tokenizer=a b'"
    )
    told = subprocess.run(
        ["bash", "-c", "\n".join(lines[:-1]) + "\necho $NCCL_DEBUG $CUDA_DEVICE_MAX_CONNECTIONS"],
        env={"NCCL_DEBUG": "INFO"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == "INFO 1\n", "a variable that is set already wins"
    several = launched("run.yaml", "--nodes", "2", "--gpus-per-node", "4", "--rdzv-endpoint", "h1:29500")
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-id=run --rdzv-endpoint=h1:29500 --nproc-per-node=4" in several
    with pytest.raises(InvalidConfig, match=r"--rdzv-endpoint \(h1:65536\): a port is 65535 at most"):
        launched("run.yaml", "--nodes", "2", "--gpus-per-node", "4", "--rdzv-endpoint", "h1:65536")
    with pytest.raises(InvalidConfig, match="needs --rdzv-endpoint HOST:PORT"):
        launched("run.yaml", "--nodes", "2", "--gpus-per-node", "4")


@pytest.mark.parametrize("target", ["local", "slurm", "kubernetes"])
def test_the_config_is_checked_for_the_exact_world(cluster: Path, target: str) -> None:
    with pytest.raises(InvalidConfig, match=r"world size \(9\) must be a multiple") as caught:
        launched("run.yaml", "--on", target, "--nodes", "3", "--gpus-per-node", "3")
    assert caught.value.exit_code == 78


def test_every_variable_has_its_reason(cluster: Path) -> None:
    for arguments in (("--on", "slurm"), KUBERNETES):
        text = launched("run.yaml", *arguments, "--network-interface", "eth0", "--ib-hca", "mlx5_0,mlx5_1")
        for name in (
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "NCCL_DEBUG",
            "NCCL_SOCKET_IFNAME",
            "GLOO_SOCKET_IFNAME",
            "NCCL_IB_HCA",
        ):
            before, line = re.findall(rf"(.*)\n(.*\b{name}\b.*)", text)[0]
            assert re.match(r" *# \w.{20}", before), (name, line)


@pytest.mark.parametrize(("given", "of_gloo"), [("eth0,eth1", "eth0,eth1"), ("=eth0", "eth0"), ("^docker0", None)])
def test_gloo_is_told_interfaces_by_their_plain_names(cluster: Path, given: str, of_gloo: str | None) -> None:
    text = launched("run.yaml", *KUBERNETES, "--network-interface", given)
    values = dict(re.findall(r"name: (\w+)_SOCKET_IFNAME\n *value: \"(.*)\"", text))
    assert (values["NCCL"], values.get("GLOO")) == (given, of_gloo)


def test_slurm_directives(cluster: Path) -> None:
    text = launched(
        PPO, "--on", "slurm", "--nodes", "16", "--time", "1-00:00:00", "--partition", "h100", "--account", "lab",
        "--exclude", "node[07-08],node11", "--spare-nodes", "2", "--save-seconds", "600",
    )  # fmt: skip
    directives = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    expected = {
        "job-name": "xuanyuan2-70b-ppo", "nodes": "18", "ntasks-per-node": "1", "gpus-per-node": "8", "requeue": "",
        "time": "1-00:00:00", "signal": "B:USR1@600", "partition": "h100", "account": "lab", "chdir": str(cluster),
        "exclude": "node[07-08],node11", "output": "runs/xuanyuan2-70b-ppo/logs/slurm-%j.log",
    }  # fmt: skip
    assert expected.items() <= dict(directives).items()
    first_command = text.index("\nset -u")
    assert text.rindex("#SBATCH") < first_command, "Slurm reads no directive after the first command"
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_slurm_starts_one_torchrun_a_good_node_with_the_words_as_given(cluster: Path) -> None:
    answer = run_script(cluster, slurm_script(ODD), FAKE_CODE="0", FAKE_BAD_NODE="node02")
    assert answer.returncode == 0, answer.stderr
    assert "all 4 GPUs answer: node02;" in answer.stdout
    assert not recorded(cluster, "torchrun-node02") and not (cluster / "record" / "scontrol").exists()
    for node in ("node01", "node03"):
        assert recorded(cluster, f"torchrun-{node}") == [
            "--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-id=7-0", "--rdzv-endpoint=node01:29500",
            f"--local-addr={node}",
            "--log-dir=run/logs/torchrun", "--tee=3", "-m", "megatron_xy", "pretrain", "run.yaml", ODD,
        ]  # fmt: skip
    assert not (cluster / "x").exists()


def test_slurm_without_any_good_node(cluster: Path) -> None:
    script = launched("run.yaml", "--on", "slurm", "--nodes", "1", "--gpus-per-node", "4", "--venv", ".")
    answer = run_script(cluster, script, FAKE_NODES="node02", FAKE_BAD_NODE="node02")
    assert answer.returncode == 76 and "too few good nodes" in answer.stdout, answer


def test_slurm_without_enough_good_nodes(cluster: Path) -> None:
    script = slurm_script("--spare-nodes", "0")
    answer = run_script(cluster, script, FAKE_NODES="node01 node02", FAKE_BAD_NODE="node02")
    assert answer.returncode == 76
    assert "too few good nodes" in answer.stdout and not recorded(cluster, "torchrun-node01")


@pytest.mark.parametrize(
    ("code", "failures", "requeued"),
    [
        ("75", ["iter_0000200"] * 9, True),
        ("76", [], True),
        ("74", ["iter_0000200"] * 2, True),
        ("76", ["iter_0000200"] * 3, False),
        ("76", ["none"] * 3 + ["iter_0000100"] * 3, True),
        ("65", [], False),
        ("78", [], False),
    ],
)
def test_slurm_goes_on_after_codes_that_are_worth_it(
    cluster: Path, code: str, failures: list[str], requeued: bool
) -> None:
    """failures: the newest checkpoint at each of this job's earlier ones."""
    for folder in ("iter_0000100", "iter_0000200", "abandoned_1_iter_0000300", ".tmp-iter_0000300"):
        (cluster / "run" / "checkpoints" / folder).mkdir(parents=True)
    (cluster / "run" / "logs").mkdir(parents=True)
    (cluster / "run" / "logs" / "slurm-7.failures").write_text("".join(f"{name}\n" for name in failures))
    script = slurm_script()
    assert 'MEGATRON_XY_START="slurm-$SLURM_JOB_ID" MEGATRON_XY_ATTEMPT="${SLURM_RESTART_COUNT:-0}"' in script
    answer = run_script(cluster, script, FAKE_CODE=code, SLURM_RESTART_COUNT="50")  # clean stops, most of them
    assert answer.returncode == int(code)
    record = cluster / "record" / "scontrol"
    assert (record.read_text() == "requeue 7\n") if requeued else not record.exists()


def test_slurm_forgets_the_last_try_and_takes_silence_for_a_lost_peer(cluster: Path) -> None:
    (cluster / "run" / "logs").mkdir(parents=True)
    (cluster / "run" / "exit.json").write_text('{\n "code": 75,\n}\n')
    answer = run_script(cluster, slurm_script("--restarts", "0"))
    assert answer.returncode == 1 and "no exit.json" in answer.stdout
    assert not (cluster / "record" / "scontrol").exists()


def test_a_start_in_a_folder_at_work_leaves_with_78_and_what_lies_there_alone(cluster: Path) -> None:
    prepare(cluster / "run")
    (cluster / "run" / "exit.json").write_text("another's")
    manifest = yaml.safe_load(launched("run.yaml", "--nodes", "2", "--gpus-per-node", "4", *KUBERNETES))
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    with lock(cluster / "run"):
        for script in (slurm_script(), container["args"][0]):
            answer = run_script(cluster, script.replace("--wait 120", "--wait 0.1"), FAKE_CODE="0")
            assert answer.returncode == 78 and "another run is active in run;" in answer.stdout, answer
    assert (cluster / "run" / "exit.json").read_text() == "another's"
    assert not [path for path in (cluster / "record").iterdir() if path.name.startswith(("scontrol", "torchrun"))]
    assert run_script(cluster, slurm_script(), FAKE_CODE="0").returncode == 0, "the lock is free again"


def test_slurm_passes_usr1_to_the_ranks_and_requeues(cluster: Path) -> None:
    environment = cluster_environment(cluster, FAKE_RUN=str(cluster / "run"), FAKE_CODE="wait")
    with subprocess.Popen(["bash", "-c", slurm_script()], env=environment, stdout=subprocess.PIPE, text=True) as script:
        deadline = time.monotonic() + 20
        while not all((cluster / "record" / f"waiting-node0{number}").exists() for number in (1, 2)):
            assert time.monotonic() < deadline and script.poll() is None
            time.sleep(0.02)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(timeout=30) == 75  # the ranks wait for 20 s
    assert (cluster / "record" / "scontrol").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("run_dir", "name"),
    [("runs/2026-11-27", "pretrain-2026-11-27"), ("runs/__", "pretrain"), (f"9{'x' * 40}", f"pretrain-9{'x' * 22}")],
)
def test_a_jobset_s_name_begins_with_a_letter(cluster: Path, run_dir: str, name: str) -> None:
    manifest = yaml.safe_load(launched("run.yaml", *KUBERNETES, f"run_dir={run_dir}"))
    assert manifest["metadata"]["name"] == name


def test_jobset_fields(cluster: Path) -> None:
    arguments = ("--nodes", "16", "--exclude", "a,b", "--time", "24:00:00", "--rdma-resource", "rdma/hca", *KUBERNETES)
    manifest = yaml.safe_load(launched(PPO, *arguments))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "xuanyuan2-70b-ppo"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 50
    for rule in policy["rules"]:  # ruleNameFmt of JobSet's webhook
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == (
        "Indexed",
        16,
        16,
        0,
    )
    assert job["activeDeadlineSeconds"] == 24 * 3600 - 300
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 65, 70, 78]
    pod: dict[str, Any] = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 300)
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/hca": 1}
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
    assert all(isinstance(entry["value"], str) for entry in container["env"])
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms[0]["matchExpressions"][0]["values"] == ["a", "b"]


@pytest.mark.parametrize("code", ["0", "65", "75"])
def test_pod_leaves_with_the_runs_code(cluster: Path, code: str) -> None:
    manifest = yaml.safe_load(launched("run.yaml", "--nodes", "2", "--gpus-per-node", "4", *KUBERNETES, ODD))
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    answer = run_script(cluster, filled_in(container["args"][0]), FAKE_CODE=code)
    assert answer.returncode == int(code), answer.stderr
    argv = recorded(cluster, "torchrun-here")
    assert "--rdzv-endpoint=run-node-0-0.run:29500" in argv and argv[-1] == ODD
    assert f"--local-addr={os.uname().nodename}.run" in argv


@pytest.mark.parametrize(
    ("image", "by_pyxis"),
    [
        ("nvcr.io/nvidia/pytorch:25.01-py3", "nvcr.io#nvidia/pytorch:25.01-py3"),
        ("registry:5000/train:1", "registry:5000#train:1"),
        ("nvcr.io#nvidia/pytorch:25.01-py3", "nvcr.io#nvidia/pytorch:25.01-py3"),
        ("ubuntu:24.04", "ubuntu:24.04"),
        ("team/train:1", "team/train:1"),
        ("/images/train.sqsh", "/images/train.sqsh"),
    ],
)
def test_pyxis_is_told_the_registry_its_way(cluster: Path, image: str, by_pyxis: str) -> None:
    script = launched("run.yaml", "--on", "slurm", "--nodes", "2", "--gpus-per-node", "4", "--container", image)
    assert f"--container-image={shlex.quote(by_pyxis)} " in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("target", "given"),
    [
        (("--on", "local"), ("--time", "24:00:00", "--restarts", "9", "--partition", "gpu", "--port", "29501")),
        (("--on", "local"), ("--workdir", "/elsewhere")),
        (("--on", "slurm"), ("--mount", "/data:/data", "--namespace", "team")),
        (KUBERNETES, ("--spare-nodes", "1", "--qos", "high", "--rdzv-endpoint", "node01:29500", "--name", "7b")),
    ],
)
def test_options_that_a_target_would_pass_over_are_refused(
    cluster: Path, target: tuple[str, ...], given: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        launched("run.yaml", *target, *given)
    assert {problem.where for problem in caught.value.problems} == set(given[::2])


def test_kubernetes_needs(cluster: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        launched("run.yaml", "--on", "kubernetes", "--name", "Big_Run", "--workdir", "here")
    assert [problem.where for problem in caught.value.problems] == [
        "--name",
        "--container",
        "--volume-claim",
        "--workdir",
    ]


@pytest.mark.parametrize("resume", ["never", "100"])
def test_a_jobset_whose_restarts_would_not_go_on_is_refused(cluster: Path, resume: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"checkpoint.resume \({resume}\) would hold at every restart") as caught:
        launched("run.yaml", *KUBERNETES, f"checkpoint.resume={resume}")
    assert len(caught.value.problems) == 1
    assert slurm_script(f"checkpoint.resume={resume}")


def test_submit_makes_the_log_folder_where_slurm_will_look_for_it(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster_environment(cluster, FAKE_CODE="0").items():
        monkeypatch.setenv(name, value)
    (cluster / "there").mkdir()
    arguments = ("run.yaml", "--on", "slurm", "--workdir", cluster / "there")
    assert f"mkdir -p {cluster}/there/run/logs &&" in launched(*arguments)
    launched(*arguments, "--submit")
    assert (cluster / "there" / "run" / "logs").is_dir() and not (cluster / "run").exists()


@pytest.mark.parametrize(("target", "program"), [(("--on", "slurm"), "sbatch"), (KUBERNETES, "kubectl")])
def test_submit_hands_over_what_is_printed(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, target: tuple[str, ...], program: str
) -> None:
    for name, value in cluster_environment(cluster).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FAKE_CODE")
    printed = launched("run.yaml", *target)
    answer = launched("run.yaml", *target, "--submit")
    assert answer.strip() in ("Submitted batch job 7", "jobset created")
    assert (cluster / "record" / "stdin").read_text() == printed
    assert [word for word in recorded(cluster, "argv") if word] == (
        [] if program == "sbatch" else ["create", "--filename", "-"]
    )
    monkeypatch.setenv("FAKE_CODE", "1")
    with pytest.raises(ConfigError, match=r"refused the job \(1\)"):
        launched("run.yaml", *target, "--submit")
    monkeypatch.setenv("PATH", str(cluster))
    with pytest.raises(ConfigError, match=f"needs {program}, which is not on PATH"):
        launched("run.yaml", *target, "--submit")


@pytest.mark.parametrize("where", [(), ("--nodes", "2", "--rdzv-endpoint", "node01:29500")], ids=["alone", "of two"])
@pytest.mark.parametrize(
    ("program", "code", "told"),
    [
        ("exit 1", 76, "(peer_lost): torchrun left with 1; its own words are in run/logs/torchrun.log"),
        ("kill -KILL $$", 76, "(peer_lost): torchrun was killed by SIGKILL"),
        ("kill -TERM $PPID; exec sleep 60", 75, "(stopped): stopped before the ranks had begun"),
        ("exit 0", 0, ""),
    ],
)
def test_submit_on_local_gives_a_documented_code_whatever_ends_torchrun(
    cluster: Path, where: tuple[str, ...], program: str, code: int, told: str
) -> None:
    (cluster / "bin" / "torchrun").write_text(f"#!/bin/bash\n{program}\n")
    command = ["launch", "run.yaml", "--gpus-per-node", "4", *where, "--venv", ".", "--submit"]
    result = CliRunner().invoke(app, command)
    record = read_exit(cluster / "run")
    assert (result.exit_code, record.code if record else None) == (code, code), result
    assert told in result.stderr


def test_submit_on_local_needs_a_torchrun(cluster: Path) -> None:
    with pytest.raises(ConfigError, match="/no/bin/torchrun is not there or no program; name another --venv"):
        launched("run.yaml", "--gpus-per-node", "4", "--venv", "/no", "--submit")


def test_all_texts_that_are_not_allowed_are_told_at_once(cluster: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        launched(
            "run.yaml", "--on", "slurm", "--name", "", "--partition", "a;b", "--mount", "$(x)", "data.tokenizer=a\nb"
        )
    assert {problem.where for problem in caught.value.problems} == {"--name", "--partition", "--mount", "an override"}
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("character", "\n\x85\u2028\u2029")
def test_overrides_are_printable(cluster: Path, character: str) -> None:
    with pytest.raises(InvalidConfig, match="printable characters only"):
        launched("run.yaml", *KUBERNETES, f"data.tokenizer=a{character}b")


@pytest.mark.parametrize("character", " \t\n\r\0;&|<>$`\\\"'(){}*?!")
def test_no_allowed_text_means_anything_to_a_shell(character: str) -> None:
    for option, (pattern, _) in _RULES.items():
        for text in ("", character, f"a{character}", f"a{character}a:a/a", f"a:a{character}", f"1{character}1:00"):
            if option != "an override":
                assert not re.fullmatch(pattern, text), (option, text)


def test_example_script_is_one_torchrun(cluster: Path) -> None:
    script = ROOT / "examples" / "xuanyuan2_70b" / "launch.sh"
    environment = cluster_environment(cluster, FAKE_RUN=str(cluster / "run"), FAKE_CODE="0")
    (cluster / "run").mkdir()
    subprocess.run([script, "node01", "3", "ppo", ODD], env=environment, check=True)
    assert recorded(cluster, "torchrun-here") == [
        "--nnodes", "3", "--nproc-per-node", "8", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node01:29500",
        "-m", "megatron_xy", "ppo", "examples/xuanyuan2_70b/ppo.yaml", ODD,
    ]  # fmt: skip
