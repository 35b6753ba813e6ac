#!/bin/bash
# Train on Slurm across preemptions and time limits:
#   sbatch --nodes=8 scripts/slurm.sh stage=c experiment=laion
#
# Slurm signals the run 5 minutes before the time limit; the run saves a checkpoint and exits with
# 75, and the job is requeued. The same happens on preemption.
#SBATCH --job-name=wuerstchen
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# A rank that fails would leave the others waiting; srun no longer inherits --cpus-per-task.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m wuerstchen_pl.train trainer=slurm ckpt=auto "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
