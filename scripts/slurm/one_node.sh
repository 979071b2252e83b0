#!/usr/bin/env bash
# A job on one node, with one process per GPU. Submit from the root of the repository, after scripts/quickstart or
# `pip install -e .` there; options of sbatch override the lines below:
#   sbatch [--partition=P --gpus-per-node=4 --time=8:00:00] scripts/slurm/one_node.sh RECIPE [key=value...]
# Three minutes before the time limit SLURM sends USR1: the run saves a resume point, and the job requeues itself and
# resumes from there. `scancel` ends it for good; the same sbatch command then resumes the run.
#SBATCH --job-name=vit_rsst
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
cd -- "${SLURM_SUBMIT_DIR:?is missing: submit this script with sbatch}"  # SLURM runs a copy of it elsewhere
source scripts/slurm/job.sh
