#!/bin/bash
# A Llama of 8B on one node: tests in brackets, arrays that grow, elements with blanks in quotes.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
CHECKPOINTS=${1:-"checkpoints/llama3_8b"}
TOKENIZER=${2:-"MOCK"}
mkdir -p "$(dirname "$CHECKPOINTS")"
GPUS=8
NODES=1
WORLD_SIZE=$(($GPUS*$NODES))
PROGRAM="examples/pretrain_gpt.py"
DTYPE="fp8"
LENGTH=8192

DISTRIBUTED=(
    --nproc_per_node $GPUS
    --nnodes $NODES
    --master_addr ${MASTER_ADDR:-localhost}
)
MODEL=(
    --use-mcore-models
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length $LENGTH
    --max-position-embeddings $LENGTH
    --position-embedding-type rope
    --rotary-base 500000
    --rotary-percent 1.0
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --swiglu
    --normalization RMSNorm
    --init-method-std 0.0134
    --attention-backend fused
    --apply-layernorm-1p
    --untie-embeddings-and-output-weights
    --disable-bias-linear
)
TRAINING=(
    --micro-batch-size 1
    --global-batch-size $((16 * WORLD_SIZE))
    --train-samples 1280000
    --lr-decay-samples 1270000
    --lr-warmup-samples 12800
    --lr 0.00015
    --min-lr 0.00001
    --lr-decay-style cosine
    --clip-grad 1.0
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --bf16
    --calculate-per-token-loss
    --manual-gc
    --empty-unused-memory-level 1
    --exit-duration-in-mins 235
)
DTYPE_ARGS=()
if [[ "$DTYPE" == "fp8" ]]; then
    DTYPE_ARGS+=(
        "--fp8-format hybrid"
        "--fp8-param-gather"
    )
fi
PARALLEL=(
    --tensor-model-parallel-size 1
    --context-parallel-size 1
    # --pipeline-model-parallel-size 2
    --sequence-parallel  # always
)
PARALLEL+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
TRAINING+=("${PARALLEL[@]}")

DATA=()
if [[ "$TOKENIZER" == "MOCK" ]] || [[ -z "$TOKENIZER" ]]; then
    DATA+=("--mock-data" "--tokenizer-type NullTokenizer" "--vocab-size 128256" "--split '99,1,0'")
else
    DATA+=("--data-path $3" "--tokenizer-type HuggingFaceTokenizer" "--tokenizer-model $TOKENIZER" "--vocab-size 1")
fi
if [ ! -f "$PROGRAM" ]; then
    echo "Error: pretrain_gpt.py is not at $PROGRAM"
    exit 1
fi
torchrun ${DISTRIBUTED[@]} \
    "$PROGRAM" \
    ${MODEL[@]} \
    ${TRAINING[@]} \
    ${DTYPE_ARGS[@]} \
    ${DATA[@]} \
    --log-interval 1 --eval-iters 32 --save-interval 1000 --save "$CHECKPOINTS" --load "$CHECKPOINTS" \
    --distributed-timeout-minutes 60 \
    ${EXTRA_ARGS}

set +x
