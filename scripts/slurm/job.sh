# Sourced by the job scripts from the root of the repository: launches the run on every node of the job and requeues the
# job if the run stopped cleanly. Arguments: the recipe and its overrides.
#   PROCESSES_PER_NODE   default: the GPUs of a node
set -euo pipefail
(($#)) || { echo "usage: sbatch $0 RECIPE [key=value...]" >&2; exit 2; }
[[ ! -f .venv/bin/activate ]] || source .venv/bin/activate

# The launchers lose exit codes, so they are read from the run folder. A wrong recipe ends here, with all its errors.
run_folder=$(python - "$@" <<'PYTHON'
import sys
from vit_rsst.recipe.loading import find, load
from vit_rsst.train import guarded
sys.exit(guarded(lambda words: print(load(find(words[0]), words[1:]).run_folder), sys.argv[1:]))
PYTHON
)
read_status() { cat -- "$run_folder/status.json" 2>/dev/null || true; }

nodes=${SLURM_NNODES:-1}
processes=$((nodes * ${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}))
read -r host < <(scontrol show hostnames "${SLURM_JOB_NODELIST:-$(hostname)}")
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on the same node must not share a port

export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 # forwarded to the ranks; otherwise USR1 ends only the launcher
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170           # seconds the ranks then have for their resume point, instead of 30
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it

# SLURM signals every process of the step. What is only starting dies of USR1 instead of leaving a status, which then
# counts as a clean stop: code 75, on every node. The traps run when the command has ended.
task='trap asked=1 USR1; trap : TERM; "${@/#@NODE/$SLURM_NODEID}"; code=$?
[[ -z ${asked-} || $code == 0 ]] || code=75; exit $code'
if ((processes == 1)); then
    launcher=(python) # for a single process `accelerate launch` forwards no signals
else
    launcher=(
        accelerate launch --machine_rank @NODE
        --config_file accelerate_configs/multinode.yaml --mixed_precision no # the recipe decides
        --main_process_ip "$host" --main_process_port "$port"
        --num_machines "$nodes" --num_processes "$processes"
    )
fi

before=$(read_status)
code=0
# A node whose step daemon is lost never reports its end: the others' end counts after five minutes.
srun --nodes="$nodes" --ntasks="$nodes" --kill-on-bad-exit=1 --wait=300 bash -c "$task" task "${launcher[@]}" -m vit_rsst.train "$@" ||
    code=$?
after=$(read_status)
if [[ $after != "$before" ]]; then # an unchanged status is from an earlier job
    code=$(python -c 'import json, sys; found = json.loads(sys.argv[1])["exit_code"]
print(sys.argv[2] if found is None else found)' "$after" "$code")
fi
if ((code == 75)); then
    echo "stopped cleanly; requeueing job $SLURM_JOB_ID, which resumes from the resume point." >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
