#!/bin/bash
# Several nodes under SLURM: one launcher a node, one process a GPU.
#
#   sbatch --nodes 4 examples/slurm.sh --config configs/qwen2.5-32b/kl_cov.yaml --output_dir /shared/runs/kl_cov
#
# The folder of the repository, the environment and output_dir must be on a file system that every node sees. A job that
# is requeued goes on from its last complete checkpoint.
#SBATCH --job-name=entropy-trl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail

GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-configs/accelerate/zero3.yaml}"
export MAIN_ADDRESS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MAIN_PORT="${MAIN_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# Every node runs this line with a SLURM_PROCID of its own, hence the inner shell; "$@" are the training arguments.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file "$0" \
    --num_machines "$SLURM_NNODES" --num_processes "$1" --machine_rank "$SLURM_PROCID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    train.py "${@:2}" --resume_from_checkpoint auto' \
    "$ACCELERATE_CONFIG" "$((SLURM_NNODES * GPUS_PER_NODE))" "$@"
