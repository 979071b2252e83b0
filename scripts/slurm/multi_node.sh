#!/usr/bin/env bash
# A job on several nodes, with one launcher per node and one process per GPU. Submitted and requeued like one_node.sh;
# the repository, the data and the run folder must be on a file system shared by all nodes:
#   sbatch [--partition=P --nodes=4 --gpus-per-node=8] scripts/slurm/multi_node.sh RECIPE [key=value...]
#SBATCH --job-name=vit_rsst
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
cd -- "${SLURM_SUBMIT_DIR:?is missing: submit this script with sbatch}"  # SLURM runs a copy of it elsewhere
source scripts/slurm/job.sh
