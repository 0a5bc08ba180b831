#!/bin/sh
# On every node: launch.sh HEAD NODES [section.key=value ...]; HEAD is one of the nodes.
set -eu
head=$1 nodes=$2
shift 2
exec torchrun --nnodes "$nodes" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m megatron_xy reward examples/xuanyuan_13b/reward.yaml "$@"
