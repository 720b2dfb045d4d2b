#!/bin/bash
# Train on one or more nodes under SLURM, from the root of a checkout:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 \
#       scripts/slurm_pretrain.sh moco_r50_in1m --data /data/imagenet/train --out /shared/runs/v1
#
# Arguments are those of `mocohub pretrain`; --out must be on a file system that all nodes share. Each node runs
# one supervisor (scripts/supervise.py), which starts a process for each of its cards and restarts the job from
# the newest checkpoint when a process dies or hangs. Before the time is up a checkpoint is saved, and the job
# queues itself again; after the loss of a node SLURM does that. A job that is done or has failed ends.
#
# Without cards: NPROC_PER_NODE=2 sbatch --gpus-per-node=0 ... --device cpu
# Options of the supervisor: SUPERVISE_OPTIONS="--max-restarts 20 --hang-timeout-s 3600"

#SBATCH --job-name=mocohub
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: sbatch [options of sbatch] $0 RECIPE --data D --out RUN [arguments of mocohub pretrain]" >&2
    exit 2
fi

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")  # no `| head`, whose end would kill scontrol and so this
head_node=${nodes%%$'\n'*}
endpoint="$head_node:$((20000 + SLURM_JOB_ID % 20000))"  # another port for each job that shares the node
read -r -a options <<< "${SUPERVISE_OPTIONS:-}"

# srun has to be told again how many cores a task gets (since Slurm 22.05).
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# The node's number is known only on the node, hence the shell in between.
# shellcheck disable=SC2016
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    bash -c 'exec python scripts/supervise.py --node-rank "$SLURM_NODEID" "$@"' supervise \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv-endpoint "$endpoint" ${options[@]+"${options[@]}"} "$@" --resume auto &
job=$!

# srun hands USR1 to the supervisors, and they to their processes: all save, and exit with 75.
requeue=no
interrupted=no
trap 'interrupted=yes; requeue=yes; echo "The time is nearly up: saving."; kill -USR1 "$job" || true' USR1
trap 'interrupted=yes; kill -USR1 "$job" || true' TERM

while true; do
    code=0
    wait "$job" || code=$?
    if [ "$interrupted" = no ]; then break; fi
    interrupted=no  # a trap ended `wait` early: the job goes on
done

if [ "$code" -eq 75 ] && [ "$requeue" = yes ]; then
    echo "Stopped and saved: queueing again."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
