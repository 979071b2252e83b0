# Sourced by launch_experiment.sh: what the positionals and options of the RSST program and its relatives become here.
#   translate   from `given` (labels of positionals, names of options) to a `recipe`, the overrides `made`, what was `told`
#               of each, and `warnings` where the old meaning was broken; an option left in `unused` has no effect
made=() told=() warnings=()

has() { [[ -n ${given[$1]-} ]]; }
used() { unset "unused[$1]"; }
warn() { warnings+=("$1"); }
calculated() { LC_ALL=C awk "BEGIN { print ($1) }"; }
from_recipe() { sed -n "s/.*[{ ]$1: *\([0-9.]*\).*/\1/p" "$recipe" | head -n 1; }

became() { # LABEL OVERRIDE...
    told+=("$(printf '%-36s %s' "$1 ${given[$1]-}" "${*:2}")")
    made+=("${@:2}")
    used "$1"
}

same() { ! has "$1" || became "$1" "$2=${given[$1]}"; } # LABEL FIELD

text() { # LABEL FIELD: quoted where YAML could read something else than text
    if ! has "$1" || [[ ${given[$1]} =~ ^[A-Za-z/~.][A-Za-z0-9/~._-]*$ ]]; then same "$@"; return; fi
    became "$1" "$2='${given[$1]//\'/\'\'}'"
}

renamed() { # LABEL FIELD OLD=NEW...
    has "$1" || return 0
    local pair choices=("${@:3}")
    one_of "$1" "${choices[@]%%=*}"
    for pair in "${choices[@]}"; do
        [[ ${given[$1]} != "${pair%%=*}" ]] || became "$1" "$2=${pair#*=}"
    done
}

translate() {
    source=${given[DATASET]/%imagenet/imagenet1k} model=${given[MODEL]/res20s/resnet20} algorithm=${given[ALGORITHM]}
    epochs=${given[EPOCHS]}
    recipe=$root/recipes/$source/${model%_imagenet}_rsst.yaml
    [[ $model != resnet20 ]] || recipe=$root/recipes/$source/vit_tiny_rsst.yaml
    warmup=$(from_recipe warmup_epochs)
    became DATASET "data.source=$source"
    became MODEL "model.name=$model"
    [[ $model != resnet20 ]] || became "(no ViT)" \
        model.args={} optim.name=sgd optim.lr=0.1 optim.weight_decay=5e-4 data.augment=plain train.label_smoothing=0
    translate_weights
    became EPOCHS "train.epochs=$epochs" train.round_epochs=null
    if ! has warmup && ((epochs < 4 * warmup)); then
        became "(short rounds)" "optim.warmup_epochs=$(calculated "$epochs / 4")"
    fi
    became ALGORITHM "pruning.method=$algorithm"
    if [[ $algorithm == rsst || $algorithm == rst ]]; then
        translate_penalty
    else
        warn "$algorithm has no penalty: REG ${given[REG]} and EXP ${given[EXP]} are ignored."
    fi
    translate_units
    translate_schedule
    translate_pruning
    translate_training
}

translate_weights() {
    local weights=${given[PRETRAINED]} asked=PRETRAINED
    [[ $weights == true ]] || asked=vit_pretrained_21k
    if [[ $model == vit_tiny && ${given[$asked]-} == true ]]; then
        warn "THERE ARE NO PRETRAINED WEIGHTS FOR vit_tiny: $asked true became false; training starts from random weights."
        weights=false
        ! has vit_pretrained_21k || given[vit_pretrained_21k]=false
    fi
    became PRETRAINED "model.pretrained=$weights"
    renamed vit_pretrained_21k model.pretrained true=augreg_in21k false="$weights"
    [[ ${made[-1]} == model.pretrained=false ]] ||
        warn "the old program still started from random weights; here the published weights are loaded."
    given[PRETRAINED]=${made[-1]#*=} # for the name
    translate_rate
}

translate_rate() { # the recipe's is that of the weights that the recipe begins with
    local asked=random at_hand=random
    [[ ${given[PRETRAINED]} == false && " ${overrides[*]} " != *" model."@(pretrained|start_from)=* ]] || asked=trained
    ! grep -q 'pretrained: true' "$recipe" || at_hand=trained
    [[ $model-$asked != vit_large_imagenet-random ]] ||
        fail "PRETRAINED: vit_large_imagenet needs weights to start from; use true, or your own: model.pretrained=FOLDER or model.start_from=RUN."
    ! has lr && [[ $model != resnet20 ]] || return 0
    case $asked-$at_hand in
        trained-random) became "(to fine-tune)" optim.lr=1e-4 optim.layer_decay=0.75 ;;
        random-trained)
            became "(from random weights)" optim.lr=1e-3 optim.layer_decay=1.0 optim.warmup_epochs=5
            warmup=5 ;;
    esac
}

translate_penalty() {
    local place=pruning.method.penalty strength=REG ramp=${given[RST_schedule]:=exp_custom_exponents}
    renamed RST_schedule "$place.ramp" x=linear x^2=quadratic x^3=cubic exp=exponential exp_custom=exponential \
        exp_custom_exponents=exponential
    if [[ $ramp == exp_custom_exponents ]]; then
        same EXP "$place.exponent"
    else
        warn "the ramp $ramp has no exponent: EXP ${given[EXP]} is ignored."
        [[ $ramp != exp* ]] || became "(exp)" "$place.exponent=1"
    fi
    if has reg_upper_limit; then
        strength=reg_upper_limit
        warn "reg_upper_limit sets how far the penalty grows: REG ${given[REG]}, its increment, is ignored."
    elif [[ $ramp == exp_custom* ]]; then
        warn "the old λ never exceeded 0.003, whatever REG was; here it takes effect."
    else
        warn "REG was added to the ramp's argument at each update; here it is the strength at the end of the ramp."
    fi
    number "$strength" 'x > 0 && x <= 1000' 'above 0, at most 1000'
    same "$strength" "$place.strength"
    warn "the condemned have $(calculated "0.001 ^ ${given[$strength]}") of their size left when the penalty ends, whatever the learning rate."
    [[ $algorithm != rsst ]] ||
        warn "the old RSST trained dense and ranked rewound weights; here removed weights are zero and trained weights are ranked."
    renamed block_loss_grad "$place.condemned_gradient" true=false false=true
    ! has stabilize_reg_interval || translate_hold
}

translate_hold() { # steps between the penalty and the removal become a part of the round
    local images=45000 batch=${given[batch_size]-$(from_recipe global_batch)} at
    [[ $source != imagenet1k ]] || images=1268355
    number stabilize_reg_interval 'x >= 0' 'of steps'
    at=$(calculated "0.3 + ${given[stabilize_reg_interval]} * $batch / ($images * $epochs)")
    [[ $at == 0.* ]] || at=1
    became stabilize_reg_interval "pruning.method.remove_at=$at"
    [[ $at != 1 ]] || became "(after the last removal)" "train.recovery_epochs=$epochs"
}

translate_units() {
    granularity=element
    ! has vit_structured || one_of vit_structured true false
    used vit_structured
    if [[ $algorithm == refill ]]; then
        same FILLBACK pruning.method.refill_ratio
        warn "refill puts whole units back; the old one worked on single weights, like imp, and lost its rewind point."
        : "${given[vit_prune_target]:=both}"
    elif [[ ${given[vit_structured]-${given[vit_prune_target]+true}} == true ]]; then
        : "${given[vit_prune_target]:=head}"
    else
        return 0
    fi
    if [[ $model == resnet20 ]]; then
        [[ ! -v unused[vit_prune_target] ]] || fail "--vit_prune_target: resnet20 has channels, no heads or MLPs; omit it."
        became "(of resnet20)" pruning.granularity=channel
    else
        renamed vit_prune_target pruning.granularity head=head mlp=neuron both=head+neuron
    fi
    granularity=${made[-1]#*=}
    warn "each round removes RATE of the remaining units, and every attention keeps a head; the old masks never became sparser."
}

lasting() { # DENSITY RATE: how many rounds, 20 at most, until less than the density is left
    calculated "(n = int(log($1) / log(1 - $2))) > 20 ? 20 : n < 1 ? 1 : n"
}

translate_schedule() {
    local rate=${given[RATE]} ratio=${given[mlp_prune_ratio]-} rounds=20 heads neurons attention
    case $model in # the width of its attention is that part of all units
        vit_tiny) heads=3 neurons=384 attention=1/2 ;;
        vit_small*) heads=6 neurons=1536 attention=1/3 ;;
        vit_base*) heads=12 neurons=3072 attention=1/3 ;;
        vit_large*) heads=16 neurons=4096 attention=1/3 ;;
    esac
    if [[ -n $ratio && $granularity == *neuron ]]; then
        number mlp_prune_ratio 'x > 0 && x < 1' 'above 0 and below 1'
        used mlp_prune_ratio
    fi
    # An attention keeps a head, an MLP 8 neurons and a hundredth: the old 20 rounds go below that.
    case $granularity-${ratio:+by-kind} in
        head-) rounds=$(lasting "1 / $heads" "$rate") ;;
        neuron-*) rate=${ratio:-$rate} rounds=$(lasting "8 / $neurons + 0.01" "$rate") ;;
        head+neuron-) rounds=$(lasting "$attention / $heads + 8 * (1 - $attention) / $neurons" "$rate") ;;
        head+neuron-by-kind)
            rounds=$(printf '%s\n' "$(lasting "1 / $heads" "$rate")" "$(lasting "8 / $neurons + 0.01" "$ratio")" | sort -n | head -n 1)
            rate="{head: $rate, neuron: $ratio}" ;;
        channel-) rounds=$(lasting 0.022 "$rate") ;;
    esac
    if [[ $algorithm == rst ]] && has num_cycles; then
        rounds=${given[num_cycles]}
        used num_cycles
    elif has pruning_times; then
        rounds=${given[pruning_times]}
        used pruning_times
        warn "each of the $rounds removals is followed by training; the old program never trained its last one."
    elif ((rounds < 20)); then
        warn "ONLY $rounds ROUNDS INSTEAD OF 20: more would remove the last head of an attention or the last neurons of an MLP."
    fi
    became RATE "pruning.schedule={rounds: $rounds, rate: $rate}"
    case $algorithm in
        dense | gmp) warn "$algorithm trains the same total number of epochs as the other methods, EPOCHS × (rounds + 1), in one round." ;;
        constant) warn "constant keeps the zeros of model.start_from and trains EPOCHS: RATE $rate is ignored." ;;
    esac
    [[ $algorithm != dense ]] || warn "dense removes nothing: RATE $rate is ignored."
}

translate_pruning() {
    local first=patch_embed last=head
    local -A ends=()
    renamed criteria pruning.criterion remain=survivors magnitude=magnitude l1=activation_l1 l2=activation_l2 saliency=saliency
    [[ ! ${given[criteria]-} =~ ^(l1|l2|saliency)$ ]] ||
        warn "${given[criteria]} uses trained weights and 2,048 images; it used rewound weights and one batch."
    renamed pick_pruned pruning.criterion min=magnitude rand=random iter_rand=random
    renamed sorting_mode pruning.scope layer-wise=layer global=global isomorphic=isomorphic
    ! has rewind_epoch || : "${given[prune_type]:=rewind_lt}"
    renamed prune_type pruning.rewind lt=init rewind_lt="epoch:${given[rewind_epoch]-24}" pt=lr
    [[ ${given[prune_type]-} != rewind_lt ]] || used rewind_epoch
    [[ $model != resnet20 ]] || first=conv1 last=fc
    ! has conv1 || { one_of conv1 true false; used conv1; ends[${given[conv1]}]+="$first.*, "; }
    ! has fc || { one_of fc true false; used fc; ends[${given[fc]}]+="$last.*, "; }
    [[ ! -v ends[true] ]] || became "(conv1, fc: true)" "pruning.include=[${ends[true]%, }]"
    [[ ! -v ends[false] ]] || became "(conv1, fc: false)" "pruning.protect=[${ends[false]%, }]"
}

translate_momentum() { # the old optimizer was SGD
    if has momentum; then
        became momentum "optim.momentum=${given[momentum]}" optim.name=sgd
        has lr || [[ $model == resnet20 ]] || warn "the recipe's learning rate is for AdamW; SGD needs a larger one: set --lr."
    elif { has lr || has weight_decay; } && [[ $model != resnet20 ]]; then
        warn "lr and weight_decay were for SGD, but AdamW is used here; --momentum 0.9 selects SGD."
    fi
}

translate_training() {
    local name=$source-$model-$algorithm-$epochs-${given[REG]}-${given[EXP]}-${given[PRETRAINED]}-${given[RATE]}-${given[FILLBACK]}
    [[ ${given[seed]:-0} == 0 ]] || name+=-s${given[seed]}
    [[ ${given[criteria]:-magnitude} == magnitude ]] || name+=-${given[criteria]}
    ! has decreasing_lr || became decreasing_lr "optim.schedule={steps: [${given[decreasing_lr]//,/, }]}"
    same warmup optim.warmup_epochs
    same batch_size train.global_batch
    same lr optim.lr
    same weight_decay optim.weight_decay
    translate_momentum
    same seed seed
    same workers data.workers
    same print_freq train.log_every_steps
    text data data.path
    text save_dir output_dir
    if has exp_name; then text exp_name name; else became "(name)" "name=$name"; fi
}
