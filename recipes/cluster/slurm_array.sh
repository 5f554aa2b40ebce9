#!/bin/bash
# Phase 1 as a SLURM array job: every task starts one engine and does its share of one plan; tasks need no word with each other.
#
# Run-book
#   1. Put this clone, the model and the recipe's `cache` on a file system that every node sees (hard links are needed: NFS,
#      Lustre, GPFS and BeeGFS have them). `make setup` once.
#   2. Set --array and `shares` below: `shares` engines, numbered from 0. Set --gpus-per-task to teacher.tensor_parallel_size.
#   3. From the clone:  sbatch recipes/cluster/slurm_array.sh recipes/mine.yaml
#   4. Whatever is cut short is done by the same command again. To do only shares 3 and 7:
#        sbatch --array=3,7 recipes/cluster/slurm_array.sh recipes/mine.yaml
#      When all have ended, one engine does what is left, if anything, and says what the cache holds:
#        .venv/bin/decant teach recipes/mine.yaml
#        .venv/bin/decant cache verify runs/mine/cache
#
# Five minutes before its time is over, or when it is preempted, a task is asked to end (TERM); what it committed stays, and it is put
# back into the queue. The first task to arrive writes the plan; all others, early or late, work from that one. A dead node costs the
# units that it had at work, nothing else. Leave `teacher.workers` out of the recipe, or give each task a node of its own.

#SBATCH --job-name=decant-teach
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=decant-teach-%A-%a.log

set -euo pipefail
shares=16
recipe=${1:?usage: sbatch recipes/cluster/slurm_array.sh RECIPE}
decant=${DECANT:-.venv/bin/decant}

asked_to_end=no
"$decant" teach "$recipe" --partition "$SLURM_ARRAY_TASK_ID/$shares" &
engine=$!
trap 'asked_to_end=yes; kill -TERM "$engine" 2>/dev/null || true' TERM

code=0
wait "$engine" || code=$?
if [ "$asked_to_end" = yes ]; then
    wait "$engine" || true # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
