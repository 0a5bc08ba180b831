#!/bin/bash
# One node's ranks by plain torchrun; the same command on every node. `megatron-xy launch` writes a whole batch script.
#   srun --nodes=64 --ntasks-per-node=1 --gpus-per-node=8 examples/xuanyuan2_70b/launch.sh ppo examples/xuanyuan2_70b/ppo.yaml
# Without Slurm: NODES, HEAD (one of the nodes) and JOB_ID (a word for this start) in the environment.
export CUDA_DEVICE_MAX_CONNECTIONS=1
head_node=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
exec torchrun --nnodes="${NODES:-$SLURM_NNODES}" --nproc-per-node="${GPUS_PER_NODE:-8}" \
    --rdzv-backend=c10d --rdzv-id="${JOB_ID:-$SLURM_JOB_ID}" --rdzv-endpoint="$head_node:29500" \
    -m megatron_xy "$@"
