#!/bin/bash
#SBATCH --nodes=4
# A Llama of 13B: a sourced file, elif chains over options, strings that grow, bash -c under srun.
source cluster.env
MODEL_SIZE=13B
AC=sel
FLASH=true
TP=4
PP=2

if [ $MODEL_SIZE = 7B ]; then
NUM_LAYERS=32; HIDDEN=4096; HEADS=32; FFN=11008
elif [ $MODEL_SIZE = 13B ]; then
NUM_LAYERS=40; HIDDEN=5120; HEADS=40; FFN=13824
elif [ $MODEL_SIZE = 70B ]; then
NUM_LAYERS=80; HIDDEN=8192; HEADS=64; FFN=28672
fi
case $AC in
    full) ac_options="--recompute-method uniform --recompute-num-layers 1 --recompute-granularity full" ;;
    sel|selective)
        ac_options="--recompute-activations"
        ;;
    *) ac_options="" ;;
esac
if [ $FLASH = true ] && [ $TP -gt 1 ]; then
    flash_options=" --use-flash-attn"
fi
[ -z "$PP" ] || layout="--pipeline-model-parallel-size ${PP}"
TRAIN_TOKENS=8388608000
GBS=$(( 256 * MBS ))
ITERS=$(( ${TRAIN_TOKENS} / ${GBS} / ${SEQ_LEN} ))
cat > ds.json <<EOF
{ "don't read": "this" }
EOF
GPT=" \
    --num_layers ${NUM_LAYERS} \
    --hidden_size ${HIDDEN} \
    --num-attention-heads ${HEADS} \
    --ffn-hidden-size ${FFN} \
    --seq-length ${SEQ_LEN} --max-position-embeddings ${SEQ_LEN} \
    --swiglu --normalization=RMSNorm --disable-bias-linear --use-rotary-position-embeddings \
    --untie-embeddings-and-output-weights --no-position-embedding \
    --attention-dropout 0 --hidden-dropout 0 \
    --vocab-size 39438 --tokenizer-type Llama2Tokenizer --tokenizer-model /models/tokenizer.model"
LAUNCHER="python -u -m torch.distributed.run --nproc_per_node 8 --nnodes $SLURM_NNODES --rdzv_backend c10d"
CMD="pretrain_gpt.py $GPT $layout --tensor-model-parallel-size $TP --micro-batch-size $MBS --global-batch-size $GBS \
    --train-iters $ITERS --lr 3e-4 --lr-warmup-fraction 0.01 --bf16 $ac_options ${flash_options} \
    --data-path 0.7 $DATA_ROOT/zh 0.3 $DATA_ROOT/en --reset-attention-mask --save /ckpt"
echo $CMD
srun --jobid $SLURM_JOB_ID bash -c "$LAUNCHER --node_rank \$SLURM_PROCID $CMD" 2>&1 | tee log
python tools/checkpoint/convert.py --model-type GPT --load-dir /ckpt
