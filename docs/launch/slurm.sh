#!/bin/bash
# Pre-training on several machines under Slurm; --resume goes on after a preemption or a time limit.
#
#   sbatch --nodes 4 docs/launch/slurm.sh RECIPE DATA RUN [KEY=VALUE ...]
#
# DATA and RUN lie on a file system that all machines see; SELFSUP_CACHE on one as well, or on local
# disks, which each machine then fills by itself.
#SBATCH --job-name=selfsup
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
recipe=$1 data=$2 run=$3
shift 3
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
if [ -e "$run/run.toml" ]; then resume=(--resume); fi
settings=()
if [ $# -gt 0 ]; then settings=(--set "$@"); fi

# 120 seconds before the end every process gets SIGTERM, saves, and exits with 143
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m selfsup pretrain "$recipe" --data "$data" --out "$run" "${resume[@]}" "${settings[@]}"
