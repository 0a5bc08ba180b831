"""Slurm's and Kubernetes' programs as small executables on PATH that do or record what the real ones would."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROGRAMS = {
    # Starts the command once a node, passes USR1 on, ends when all have ended.
    "srun": """
nodes=${FAKE_NODES// /,}
while [[ $1 == --* ]]; do
    [[ $1 == --nodelist=* ]] && nodes=${1#--nodelist=}
    shift
done
for node in ${nodes//,/ }; do SLURMD_NODENAME=$node "$@" & pids+=" $!"; done
trap 'kill -USR1 $pids' USR1
for pid in $pids; do
    while kill -0 "$pid" 2> /dev/null; do wait "$pid"; status=$?; done
done
exit "$status"
""",
    "scontrol": """
if [ "$1" = show ]; then printf '%s\\n' $FAKE_NODES; else echo "$@" >> "$FAKE_RECORD/scontrol"; fi
""",
    "nvidia-smi": """
for gpu in 0 1 2 3; do
    [ "$SLURMD_NODENAME" = "$FAKE_BAD_NODE" ] && [ "$gpu" = 3 ] || echo "GPU $gpu: H100"
done
""",
    "sbatch": """
printf '%s\\0' "$@" > "$FAKE_RECORD/argv"
cat > "$FAKE_RECORD/stdin"
echo "Submitted batch job 7"
exit "${FAKE_CODE:-0}"
""",
    # It ignores USR1, as bash cannot undo; its child, a rank, takes USR1 and leaves exit.json as ours do.
    "torchrun": """
printf '%s\\0' "$@" > "$FAKE_RECORD/torchrun-${SLURMD_NODENAME:-here}"
if [ "$FAKE_CODE" != wait ]; then
    [ -z "$FAKE_CODE" ] || printf '{\\n "code": %s,\\n}\\n' "$FAKE_CODE" > "$FAKE_RUN/exit.json"
    [ "$FAKE_CODE" = 0 ]
    exit
fi
"$FAKE_PYTHON" -ISc '
import os, pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
pathlib.Path(os.environ["FAKE_RECORD"], "waiting-" + os.environ["SLURMD_NODENAME"]).touch()
if signal.sigtimedwait([signal.SIGUSR1], 20):
    pathlib.Path(os.environ["FAKE_RUN"], "exit.json").write_text("{\\n \\"code\\": 75,\\n}\\n")
sys.exit(75)
'
exit 1
""",
}
PROGRAMS["kubectl"] = PROGRAMS["sbatch"].replace("Submitted batch job 7", "jobset created")


def make_cluster(folder: Path) -> None:
    """Writes the programs into folder/bin, and makes folder/record, where they leave what they were told."""
    (folder / "bin").mkdir()
    (folder / "record").mkdir()
    for name, text in PROGRAMS.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)


def cluster_environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a batch script there; `variables` are the programs' own, FAKE_*."""
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "FAKE_RECORD": str(folder / "record"),
        "FAKE_NODES": "node01 node02 node03",
        "FAKE_BAD_NODE": "",
        "FAKE_CODE": "",
        "FAKE_PYTHON": sys.executable,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[01-03]",
        **variables,
    }
