#!/bin/sh
# On every node: launch.sh HEAD NODES TASK [section.key=value ...]; HEAD is one of the nodes, TASK pretrain, sft or ppo.
set -eu
head=$1 nodes=$2 task=$3
shift 3
exec torchrun --nnodes "$nodes" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m megatron_xy "$task" "examples/xuanyuan2_70b/$task.yaml" "$@"
