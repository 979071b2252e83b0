#!/usr/bin/env bash
# Starts an experiment from the positionals and option names of the RSST program and its relatives, and prints the recipe
# and overrides they become. Only this script knows the old names.
#   scripts/launch_experiment.sh cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst
set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
    echo "error: bash 4.4 or newer is required; this is $BASH_VERSION. Nothing was started." >&2
    exit 3
}
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/_old_names.sh"

old_names="criteria, pick_pruned, RST_schedule, reg_upper_limit, stabilize_reg_interval, block_loss_grad, pruning_times,
              num_cycles, mlp_prune_ratio, vit_structured, vit_prune_target, sorting_mode, prune_type, rewind_epoch, conv1,
              fc, vit_pretrained_21k, decreasing_lr, warmup, batch_size, lr, weight_decay, momentum, seed, workers, data,
              print_freq, save_dir, exp_name"

usage() {
    cat <<USAGE
usage: launch_experiment.sh DATASET MODEL EPOCHS REG EXP PRETRAINED RATE AUTO ALGORITHM [FILLBACK]
                            [--yes] [--dry-run] [--restart] [--OLD-NAME VALUE ...] [KEY=VALUE ...]

  DATASET     cifar10 | cifar100 | imagenet
  MODEL       CIFAR: vit_tiny | vit_small | vit_base | resnet20 (old: res20s)
              ImageNet: vit_small_imagenet | vit_base_imagenet | vit_large_imagenet
  EPOCHS      epochs per round, 1 to 99999
  REG         penalty strength, above 0 and at most 1000; 1 shrinks the condemned to a thousandth
  EXP         exponent of the penalty's ramp, above 0 and at most 100
  PRETRAINED  true | false
  RATE        share of the remaining weights that each of the 20 rounds removes, above 0 and below 1
  AUTO        y: start at once | n: print the plan and ask
  ALGORITHM   rsst | refill | dense | imp | rst | gmp | constant
  FILLBACK    refill: share of the removed units to put back, 0 or more and below 1

  --yes       start without asking, whatever AUTO is
  --dry-run   print the plan and stop; nothing is created
  --restart, --allow-world-size-change, --allow-data-change: see vit-rsst train --help
  --OLD-NAME  $old_names; the positionals are also dataset, arch, epochs, reg_granularity_prune,
              exponents, vit_pretrained, rate or px, struct, fillback_rate
  KEY=VALUE   any field of recipes/reference.yaml; takes precedence over everything else

The run is named after the positionals, --seed and --criteria; runs that differ in anything else need an --exp_name.
To try it out with a few images instead of ImageNet:
  launch_experiment.sh imagenet vit_small_imagenet 1 1.0 4 false 0.2 n rsst data.path=FOLDER data.val_fraction=0.2 \\
      train.global_batch=8 train.batch_per_device=null pruning.schedule.rounds=1

PYTHON is the interpreter (default: .venv of this checkout, otherwise python3), PROCESSES the number of training processes
(default: one per GPU).
USAGE
}

fail() { usage >&2; printf '\nerror: %s Nothing was started.\n' "$1" >&2; exit 2; }

is_given() { [[ -v given[$1] ]] || fail "$1: missing."; }

one_of() { # LABEL CHOICE...
    local choice
    is_given "$1"
    for choice in "${@:2}"; do [[ ${given[$1]} != "$choice" ]] || return 0; done
    fail "$1: unknown value '${given[$1]}'; expected one of: ${*:2}."
}

number() { # LABEL BOUNDS-FOR-AWK BOUNDS-IN-WORDS
    is_given "$1"
    [[ ${given[$1]} =~ ^([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] &&
        LC_ALL=C awk "BEGIN { x = ${given[$1]}; exit !($2) }" || fail "$1: '${given[$1]}' is not a number $3."
}

# -- what was given, under the labels of the positionals and the old names of the options

positionals=(DATASET MODEL EPOCHS REG EXP PRETRAINED RATE AUTO ALGORITHM FILLBACK)
declare -A labels=(
    [dataset]=DATASET [arch]=MODEL [epochs]=EPOCHS [reg_granularity_prune]=REG [exponents]=EXP [vit_pretrained]=PRETRAINED
    [rate]=RATE [px]=RATE [struct]=ALGORITHM [fillback_rate]=FILLBACK
)
declare -A given=() unused=()
flags="block_loss_grad vit_structured vit_pretrained vit_pretrained_21k conv1 fc" # a value may follow
overrides=() passed_on=() ask=yes plan_only=no

parse() {
    local words=0 name known=" ${old_names//,/ } ${!labels[*]} "
    while (($#)); do
        name=${1#--} name=${name%%=*} name=${name//-/_}
        case $1 in
            -h | --help) usage; exit 0 ;;
            --yes) ask=no ;;
            --dry-run) plan_only=yes ;;
            --restart | --allow-world-size-change | --allow-data-change) passed_on+=("$1") ;;
            --*=*) set -- "--$name" "${1#*=}" "${@:2}"; continue ;;
            --*)
                [[ -n $name && $known == *" $name "* ]] ||
                    fail "$1: unknown option; expected one of:$(printf ' --%s' yes dry-run restart allow-world-size-change allow-data-change $known)."
                [[ ! " $flags " == *" $name "* || ${2-} == true || ${2-} == false ]] || set -- "$1" true "${@:2}"
                [[ $# -gt 1 && -n $2 && $2 != --* ]] || fail "$1: missing value."
                given[${labels[$name]-$name}]=$2
                [[ -v labels[$name] ]] || unused[$name]=1
                shift ;;
            -[!0-9.]*) fail "$1: unknown option; options start with two dashes." ;;
            [A-Za-z]*=*) overrides+=("$1") ;;
            *)
                ((words < 10)) || fail "'$1': too many arguments."
                given[${positionals[words++]}]=$1 ;;
        esac
        shift
    done
}

check() { # in the order of the words, so that the first that is wrong is named where one was forgotten
    local models=(vit_tiny vit_small vit_base resnet20 res20s)
    one_of DATASET cifar10 cifar100 imagenet
    [[ ${given[DATASET]} != imagenet ]] || models=(vit_small_imagenet vit_base_imagenet vit_large_imagenet)
    one_of MODEL "${models[@]}"
    is_given EPOCHS
    [[ ${given[EPOCHS]} =~ ^[1-9][0-9]{0,4}$ ]] || fail "EPOCHS: '${given[EPOCHS]}' is not a whole number from 1 to 99999."
    number REG 'x > 0 && x <= 1000' 'above 0, at most 1000'
    number EXP 'x > 0 && x <= 100' 'above 0, at most 100'
    one_of PRETRAINED true false
    number RATE 'x > 0 && x < 1' 'above 0 and below 1'
    one_of AUTO y n
    one_of ALGORITHM rsst refill dense imp rst gmp constant
    [[ -v given[FILLBACK] ]] || given[FILLBACK]=0
    number FILLBACK 'x >= 0 && x < 1' 'of at least 0 and below 1'
    [[ ${given[ALGORITHM]} == refill || ! ${given[FILLBACK]} =~ [1-9] ]] ||
        fail "FILLBACK: '${given[FILLBACK]}' has no effect with ${given[ALGORITHM]}, which puts nothing back; omit it."
    [[ ${PROCESSES:-1} =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES: '$PROCESSES' is not a positive whole number."
}

# -- from the recipe to a run

announce() {
    local word line=""
    for word in "${command[@]}"; do
        [[ $word =~ ^[A-Za-z0-9_./,:=@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    printf '%s\n' "${told[@]}" "${overrides[@]}" "${warnings[@]/#/warning: }" "" "without this script:" "${line# }" ""
}

start() {
    local log=$run_folder/logs/launch-$(date +%Y%m%d-%H%M%S).log before after code=0 tee child set_aside old
    mkdir -p -- "${log%/*}" || exit 3
    announce >"$log"
    before=$(cat -- "$run_folder/status.json" 2>/dev/null) || true
    exec 3> >(exec tee -ia -- "$log")
    tee=$!
    set -m # the training gets a process group of its own, and so each signal once: from here
    PYTHONUNBUFFERED=1 PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170 \
        "${command[@]}" >&3 2>&1 </dev/null &
    child=$!
    exec 3>&-
    trap 'kill -INT "$child"' INT
    trap 'kill -TERM "$child"' TERM HUP
    trap 'kill -USR1 "$child"' USR1
    while code=0; wait "$child" || code=$?; ((code > 128)) && kill -0 "$child" 2>/dev/null; do :; done
    wait "$tee" || true
    after=$(cat -- "$run_folder/status.json" 2>/dev/null) || true
    if ((processes > 1)) && [[ $after != "$before" && $after =~ \"exit_code\":\ ([0-9]+) ]]; then
        code=${BASH_REMATCH[1]} # accelerate's launcher turns every code into 1
    fi
    set_aside=("$run_folder".old-*/"logs/${log##*/}") # --restart takes the log with the old run
    if [[ ! -e $log && -e ${set_aside[0]} ]]; then
        mkdir -p -- "${log%/*}" && mv -- "${set_aside[0]}" "$log"
        old=${set_aside[0]%/logs/*} # holds nothing but this log and a lock where there was no run before
        [[ -e $old/recipe.yaml ]] || { rm -f -- "$old/.lock" && rmdir -- "$old/logs" "$old"; } 2>/dev/null || true
    fi
    printf '\nlog: %s\n' "$log"
    exit "$code"
}

parse "$@"
check
translate
((${#unused[@]} == 0)) || fail "--${!unused[*]}: has no effect with the other arguments; omit it."
made+=("${overrides[@]}")
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}
environment=(env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
# Where this checkout is installed the command is shorter.
[[ ! $(cd / && "$python" -c 'import vit_rsst; print(*vit_rsst.__path__)' 2>/dev/null) -ef $root/vit_rsst ]] || environment=()
"$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "timm", "accelerate", "pydantic"))))' ||
    { echo "error: $python does not have vit_rsst's dependencies; run scripts/quickstart, or set PYTHON. Nothing was started." >&2; exit 3; }
# A wrong recipe ends here, with all its mistakes.
run_folder=$("${environment[@]}" "$python" - "$recipe" "${made[@]}" <<'PYTHON'
import sys
from vit_rsst.recipe.loading import find, load
from vit_rsst.train import guarded
sys.exit(guarded(lambda words: print(load(find(words[0]), words[1:]).run_folder), sys.argv[1:]))
PYTHON
)
processes=${PROCESSES:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
training=(-m vit_rsst.train "${recipe#"$PWD/"}" "${made[@]}" "${passed_on[@]}")
command=("${environment[@]}" "$python")
plan=(env WORLD_SIZE="$processes" "${command[@]}" "${training[@]}" --dry-run)
if ((processes > 1)); then # the recipe decides on the precision
    command+=(-m accelerate.commands.launch --config_file "$root/accelerate_configs/gpu_8x_bf16.yaml")
    command+=(--num_processes "$processes" --mixed_precision no)
fi
command+=("${training[@]}")
announce
[[ $plan_only == no && ${given[AUTO]} == y ]] || "${plan[@]}" </dev/null
[[ $plan_only == no ]] || exit 0
if [[ ${given[AUTO]} == n && $ask == yes ]]; then
    printf '\nStart? [y/N] '
    read -r answer || true # the last line may have no newline
    [[ $answer == [yY]* ]] || { echo "nothing was started"; exit 0; }
fi
start
