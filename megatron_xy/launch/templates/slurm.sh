#!/bin/bash
# {{ job.task }} of {{ job.run_yaml }} on {{ job.nodes }} node(s) of {{ job.gpus_per_node }} GPUs, written by `megatron-xy launch`.
# Submit: mkdir -p {{ job.log_dir_from_anywhere }} && sbatch THIS_FILE     (without the folder Slurm drops the job without a word)
#SBATCH --job-name={{ job.name }}
#SBATCH --nodes={{ job.nodes + job.spare_nodes }}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={{ job.gpus_per_node }}
#SBATCH --exclusive
#SBATCH --chdir={{ job.workdir }}
#SBATCH --output={{ job.log_dir }}/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
{% if job.time %}#SBATCH --time={{ job.time }}
{% endif %}
# USR1 to this script that many seconds before the time limit: the ranks save, then the job is requeued.
#SBATCH --signal=B:USR1@{{ job.save_seconds }}
{% for option in ("partition", "account", "qos", "reservation", "exclude") if job[option] %}
#SBATCH --{{ option }}={{ job[option] }}
{% endfor %}
set -u

{% for variable in variables %}
# {{ variable.why }}
export {{ variable.name }}="${{ "{" }}{{ variable.name }}:-{{ variable.value }}{{ "}" }}"
{% endfor %}

{% set node_name = '"$SLURMD_NODENAME"' %}
{% include "node.sh" %}

# Nodes whose GPUs do not all answer within a minute are left out{{ " and spare ones take their place" if job.spare_nodes else "" }}.
bad_nodes=$(srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c \
    '[ "$(timeout 60 nvidia-smi -L | grep -c "^GPU ")" -eq {{ job.gpus_per_node }} ] || echo "$SLURMD_NODENAME"' | sort | paste -sd,)
[ -z "$bad_nodes" ] || echo "left out, since not all {{ job.gpus_per_node }} GPUs answer: $bad_nodes; exclude them from the next job with --exclude"
good_nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF -f <(tr , '\n' <<< "${bad_nodes:-,}" | grep .) | head -n {{ job.nodes }})
if [ "$(grep -c . <<< "$good_nodes")" -lt {{ job.nodes }} ]; then
    echo "too few good nodes are left of $SLURM_JOB_NODELIST: {{ job.nodes }} are needed; ask for more with --spare-nodes"
    exit 76
fi

head_node=$(head -n 1 <<< "$good_nodes")
rendezvous_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
export head_node rendezvous_id
# A requeued job goes on with its own checkpoints, whatever checkpoint.resume said to its first start.
export MEGATRON_XY_START="slurm-$SLURM_JOB_ID" MEGATRON_XY_ATTEMPT="${SLURM_RESTART_COUNT:-0}"
forget_exit

srun --nodes={{ job.nodes }} --ntasks={{ job.nodes }} --ntasks-per-node=1 --nodelist="$(paste -sd, <<< "$good_nodes")" \
    --kill-on-bad-exit=0 --wait={{ job.timeout_seconds + 60 }} --label --cpu-bind=none \
{% if job.container %}
    --container-image={{ job.pyxis_image | quoted }} --container-workdir={{ job.workdir | quoted }} \
    --container-mounts={{ ([job.workdir ~ ":" ~ job.workdir] + job.mount | list) | join(",") | quoted }} \
{% endif %}
    bash -c "$(declare -f train_node); train_node" &
step=$!
status=1
trap 'kill -USR1 "$step"' USR1  # srun passes it on to every node
while kill -0 "$step" 2> /dev/null; do
    wait "$step"
    status=$?
done

code=$(exit_code)
echo "the run ended with ${code:-no exit.json; srun with $status}"
case "${code:-76}" in
    75) scontrol requeue "$SLURM_JOB_ID" ;;  # stopped cleanly: the same job goes on from its checkpoint
    74 | 76)  # storage failed or a node was lost: another try may not meet it again. Counted by the newest checkpoint, since one
        # that moved on is progress kept; Slurm's own count holds clean stops, too
        failures={{ job.log_dir | string | quoted }}"/slurm-$SLURM_JOB_ID.failures"
        newest=$(ls {{ (job.run_dir / "checkpoints") | quoted }} 2> /dev/null | grep -x 'iter_[0-9]*' | sort -V | tail -n 1)
        echo "${newest:-none}" >> "$failures"
        if [ "$(grep -cx "${newest:-none}" "$failures")" -le {{ job.restarts }} ]; then
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "${code:-$status}"
