#!/bin/bash
# Runs a Llama of 70B
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NUM_NODES=${NUM_NODES:-64}
WORLD_SIZE=$(($GPUS_PER_NODE*$NUM_NODES))
CHECKPOINT_PATH=$1   # <Specify path>
TOKENIZER_MODEL='/models/tok $enizer.model'
LENGTH=4096
TP=8

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes ${NUM_NODES}
)
MODEL_ARGS=(
    --num-layers 80  # a comment
    --hidden-size 8192
    --ffn-hidden-size 28672
    --num-attention-heads 64
    --group-query-attention --num-query-groups 8
    --seq-length "$LENGTH" --max-position-embeddings ${LENGTH}
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0
    --vocab-size 39438
)
TRAINING_ARGS="--micro-batch-size 1 --global-batch-size 1024 \
  --train-samples 1024000 --lr 1.5e-4 --min-lr=1.0e-5 --lr-decay-style cosine --bf16"
PARALLEL=( --tensor-model-parallel-size $TP --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5 )
PARALLEL+=( --sequence-parallel --use-distributed-optimizer )
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \
    ${MODEL_ARGS[@]} \
    $TRAINING_ARGS "${PARALLEL[@]}" \
    --save $CHECKPOINT_PATH \
    --tokenizer-model "$TOKENIZER_MODEL" --data-path 0.3 /data/code_text 0.7 /data/prose_text \
    --num-experts 8 --split 949,50,1 2>&1 | tee log.txt
touch /tmp/never-run
