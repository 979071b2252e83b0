"""What the arguments of the original RSST program and its relatives become; only this file knows the old names."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from vit_rsst.errors import InputError
from vit_rsst.recipe.loading import find, load

POSITIONALS = ("DATASET", "MODEL", "EPOCHS", "REG", "EXP", "PRETRAINED", "RATE", "AUTO", "ALGORITHM", "FILLBACK")

LABELS = {
    "dataset": "DATASET", "arch": "MODEL", "epochs": "EPOCHS", "reg_granularity_prune": "REG", "exponents": "EXP",
    "vit_pretrained": "PRETRAINED", "rate": "RATE", "px": "RATE", "struct": "ALGORITHM", "fillback_rate": "FILLBACK",
}  # fmt: skip
"""Option → the positional that it stands for."""

CHOICES = {
    "RST_schedule": ("pruning.method.penalty.ramp", {
        "x": "linear", "x^2": "quadratic", "x^3": "cubic",
        "exp": "exponential", "exp_custom": "exponential", "exp_custom_exponents": "exponential"}),
    "block_loss_grad": ("pruning.method.penalty.condemned_gradient", {"true": "false", "false": "true"}),
    "vit_prune_target": ("pruning.granularity", {"head": "head", "mlp": "neuron", "both": "head+neuron"}),
    "criteria": ("pruning.criterion", {
        "remain": "survivors", "magnitude": "magnitude", "l1": "activation_l1", "l2": "activation_l2",
        "saliency": "saliency"}),
    "pick_pruned": ("pruning.criterion", {"min": "magnitude", "rand": "random", "iter_rand": "random"}),
    "sorting_mode": ("pruning.scope", {"layer-wise": "layer", "global": "global", "isomorphic": "isomorphic"}),
    "prune_type": ("pruning.rewind", {"lt": "init", "rewind_lt": "epoch:{rewind_epoch}", "pt": "lr"}),
}  # fmt: skip
"""Option → the field it sets, and the old value → the new one."""

FIELDS = {
    "warmup": "optim.warmup_epochs", "batch_size": "train.global_batch", "lr": "optim.lr",
    "weight_decay": "optim.weight_decay", "momentum": "optim.momentum", "seed": "seed", "workers": "data.workers",
    "print_freq": "train.log_every_steps", "data": "data.path", "save_dir": "output_dir", "exp_name": "name",
}  # fmt: skip
"""Option → the field that takes its value as it is."""

OTHERS = ("vit_structured", "vit_pretrained_21k", "conv1", "fc", "reg_upper_limit", "stabilize_reg_interval",
          "num_cycles", "pruning_times", "mlp_prune_ratio", "rewind_epoch", "decreasing_lr")  # fmt: skip
FLAGS = ("block_loss_grad", "vit_structured", "vit_pretrained", "vit_pretrained_21k", "conv1", "fc")
"""Options that mean true without a value."""

CIFAR_MODELS = ("vit_tiny", "vit_small", "vit_base", "resnet20", "res20s")
MODELS = {
    "cifar10": CIFAR_MODELS, "cifar100": CIFAR_MODELS,
    "imagenet": ("vit_small_imagenet", "vit_base_imagenet", "vit_large_imagenet"),
}  # fmt: skip
ALGORITHMS = ("rsst", "refill", "dense", "imp", "rst", "gmp", "constant")
OF_ONE_ROUND = ("dense", "gmp", "constant")
BOOLEANS = ("true", "false")
LIMITS = {
    **dict.fromkeys(("REG", "reg_upper_limit"), (lambda x: 0 < x <= 1000, "above 0, at most 1000")),
    "EXP": (lambda x: 0 < x <= 100, "above 0, at most 100"),
    **dict.fromkeys(("RATE", "mlp_prune_ratio"), (lambda x: 0 < x < 1, "above 0 and below 1")),
    "FILLBACK": (lambda x: 0 <= x < 1, "of at least 0 and below 1"),
    "batch_size": (lambda x: x > 0, "above 0"),
    "stabilize_reg_interval": (lambda x: True, "of steps"),
}
UNITS = {"tiny": (3, 384, 1 / 2), "small": (6, 1536, 1 / 3), "base": (12, 3072, 1 / 3), "large": (16, 4096, 1 / 3)}
"""Heads of an attention, neurons of an MLP, and the attentions' share of the width of all units."""

NUMBER = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
PLAIN_TEXT = re.compile(r"(?!(null|~)$)[a-z/~.][a-z0-9/~._-]*", re.IGNORECASE)


class Arguments(dict[str, str]):
    """Old arguments, by label or name, and what has become of them; reading one marks it as used.

    Attributes:
        user_overrides: `key=value` items, which take precedence over `made`.
        made: the overrides that the arguments become.
        told: a line for each argument that is translated.
    """

    def __init__(self, given: Mapping[str, str], user_overrides: Sequence[str]):
        super().__init__(given)
        self.user_overrides, self.made = list(user_overrides), list[str]()
        self.told, self.warnings, self.used = list[str](), list[str](), set(POSITIONALS)

    def __getitem__(self, label: str) -> str:
        if label not in self:
            raise InputError(f"{label}: missing.")
        self.used.add(label)
        return super().__getitem__(label)

    def one_of(self, label: str, choices: Iterable[str]) -> str:
        if self[label] not in choices:
            raise InputError(f"{label}: unknown value '{self[label]}'; expected one of: {' '.join(choices)}.")
        return self[label]

    def number(self, label: str) -> float:
        is_allowed, bounds = LIMITS[label]
        if not NUMBER.fullmatch(self[label]) or not is_allowed(float(self[label])):
            raise InputError(f"{label}: '{self[label]}' is not a number {bounds}.")
        return float(self[label])

    def become(self, label: str, *overrides: str) -> None:
        argument = f"{label} {self[label]}" if label in self else label
        self.told.append(f"{argument:36} {' '.join(overrides)}")
        self.made += overrides

    def rename(self, *names: str) -> None:
        """Translates options of CHOICES and FIELDS, where given."""
        for name in names:
            if name in CHOICES and name in self:
                field, choices = CHOICES[name]
                self.become(name, f"{field}={choices[self.one_of(name, choices)].format_map(self)}")
            elif name in self:
                value = self[name]
                if name in ("data", "save_dir", "exp_name") and not PLAIN_TEXT.fullmatch(value):
                    value = "'" + value.replace("'", "''") + "'"  # YAML could read something else than text
                self.become(name, f"{FIELDS[name]}={value}")

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


def translate_(old: Arguments) -> str:
    """Fills in `made`, `told` and `warnings`; returns the name of the recipe that the overrides are for.

    Raises:
        InputError: an argument is missing, has a wrong value, or has no effect with the others.
    """
    old.setdefault("FILLBACK", "0")
    check_positionals(old)
    source, model = old["DATASET"].replace("imagenet", "imagenet1k"), old["MODEL"].replace("res20s", "resnet20")
    algorithm, epochs = old["ALGORITHM"], int(old["EPOCHS"])
    size = "tiny" if model == "resnet20" else model.split("_")[1]
    name = f"{source}/vit_{size}_rsst"
    base = load(find(name))
    old.become("DATASET", f"data.source={source}")
    old.become("MODEL", f"model.name={model}")
    if model == "resnet20":
        optim = ("optim.name=sgd", "optim.lr=0.1", "optim.weight_decay=5e-4")
        old.become("(no ViT)", "model.args={}", *optim, "data.augment=plain", "train.label_smoothing=0")
    pretrained, warmup = translate_weights_(old, model, base.optim.warmup_epochs, bool(base.model.pretrained))
    old.become("EPOCHS", f"train.epochs={epochs}", "train.round_epochs=null")
    if "warmup" not in old and epochs < 4 * warmup:
        old.become("(short rounds)", f"optim.warmup_epochs={epochs / 4:.6g}")
    old.become("ALGORITHM", f"pruning.method={algorithm}")
    if algorithm in ("rsst", "rst"):
        images = 1_268_355 if source == "imagenet1k" else 45_000
        translate_penalty_(old, images * epochs, base.train.global_batch)
    else:
        old.warn(f"{algorithm} has no penalty: REG {old['REG']} and EXP {old['EXP']} are ignored.")
    translate_schedule_(old, size, translate_units_(old, model))
    translate_pruning_(old, model)
    translate_training_(old, model)
    old.rename("exp_name")
    if "exp_name" not in old:
        words = [source, model, algorithm, *(old[label] for label in ("EPOCHS", "REG", "EXP")), pretrained]
        words += [old["RATE"], old["FILLBACK"], f"s{old.get('seed', 0)}", old.get("criteria", "magnitude")]
        old.become("(name)", f"name={'-'.join(word for word in words if word not in ('s0', 'magnitude'))}")
    if idle := [f"--{option}" for option in old if option not in old.used]:
        raise InputError(f"{', '.join(idle)}: has no effect with the other arguments; omit it.")
    return name


def check_positionals(old: Arguments) -> None:
    """In their order, so that a forgotten one shows in the first value that is out of place."""
    old.one_of("MODEL", MODELS[old.one_of("DATASET", MODELS)])
    if not re.fullmatch(r"[1-9][0-9]{0,4}", old["EPOCHS"]):
        raise InputError(f"EPOCHS: '{old['EPOCHS']}' is not a whole number from 1 to 99999.")
    old.number("REG")
    old.number("EXP")
    old.one_of("PRETRAINED", BOOLEANS)
    old.number("RATE")
    old.one_of("AUTO", ("y", "n"))
    algorithm = old.one_of("ALGORITHM", ALGORITHMS)
    if old.number("FILLBACK") and algorithm != "refill":
        idle = f"has no effect with {algorithm}, which puts nothing back; omit it."
        raise InputError(f"FILLBACK: '{old['FILLBACK']}' {idle}")


def translate_weights_(old: Arguments, model: str, warmup: float, is_recipe_pretrained: bool) -> tuple[str, float]:
    """The recipe's learning rate is for the weights it starts from; returns `model.pretrained` and the warm-up."""
    weights = old["PRETRAINED"]
    asked = "PRETRAINED" if weights == "true" else "vit_pretrained_21k"
    is_missing = model == "vit_tiny" and old.get(asked) == "true"
    if is_missing:
        weights, instead = "false", f"{asked} true became false; training starts from random weights."
        old.warn(f"THERE ARE NO PRETRAINED WEIGHTS FOR vit_tiny: {instead}")
    old.become("PRETRAINED", f"model.pretrained={weights}")
    if "vit_pretrained_21k" in old:
        if old.one_of("vit_pretrained_21k", BOOLEANS) == "true" and not is_missing:
            weights = "augreg_in21k"
        old.become("vit_pretrained_21k", f"model.pretrained={weights}")
    if weights != "false":
        old.warn("the old program still started from random weights; here the published weights are loaded.")
    own = ("model.pretrained=", "model.start_from=")
    is_trained = weights != "false" or any(item.startswith(own) for item in old.user_overrides)
    if model == "vit_large_imagenet" and not is_trained:
        way_out = "use true, or your own: model.pretrained=FOLDER or model.start_from=RUN."
        raise InputError(f"PRETRAINED: vit_large_imagenet needs weights to start from; {way_out}")
    if "lr" not in old and model != "resnet20" and is_trained != is_recipe_pretrained:
        if not is_trained:
            old.become("(from random weights)", "optim.lr=1e-3", "optim.layer_decay=1.0", "optim.warmup_epochs=5")
            return weights, 5
        old.become("(to fine-tune)", "optim.lr=1e-4", "optim.layer_decay=0.75")
    return weights, warmup


def translate_penalty_(old: Arguments, images: int, batch: float) -> None:
    place, strength, ramp = "pruning.method.penalty", "REG", old.setdefault("RST_schedule", "exp_custom_exponents")
    old.rename("RST_schedule")
    if ramp == "exp_custom_exponents":
        old.become("EXP", f"{place}.exponent={old['EXP']}")
    else:
        old.warn(f"the ramp {ramp} has no exponent: EXP {old['EXP']} is ignored.")
        if ramp.startswith("exp"):
            old.become("(exp)", f"{place}.exponent=1")
    if "reg_upper_limit" in old:
        strength = "reg_upper_limit"
        old.warn(f"reg_upper_limit sets how far the penalty grows: REG {old['REG']}, its increment, is ignored.")
    elif ramp.startswith("exp_custom"):
        old.warn("the old λ never exceeded 0.003, whatever REG was; here it takes effect.")
    else:
        old.warn("REG was added to the ramp's argument at each update; here it is the strength at the end of the ramp.")
    left = 0.001 ** old.number(strength)
    old.become(strength, f"{place}.strength={old[strength]}")
    old.warn(f"the condemned have {left:.6g} of their size left when the penalty ends, whatever the learning rate.")
    if old["ALGORITHM"] == "rsst":
        old.warn(
            "the old RSST trained dense and ranked rewound weights; here removed ones are zero, trained ones ranked."
        )
    old.rename("block_loss_grad")
    if "stabilize_reg_interval" in old:  # steps between the penalty and the removal become a part of the round
        steps = old.number("stabilize_reg_interval")
        if "batch_size" in old:
            batch = old.number("batch_size")
        at = f"{min(0.3 + steps * batch / images, 1):.6g}"
        old.become("stabilize_reg_interval", f"pruning.method.remove_at={at}")
        if at == "1":
            old.become("(after the last removal)", f"train.recovery_epochs={old['EPOCHS']}")


def translate_units_(old: Arguments, model: str) -> str:
    """Returns the granularity."""
    is_structured, target = "vit_prune_target" in old, "head"
    if "vit_structured" in old:
        is_structured = old.one_of("vit_structured", BOOLEANS) == "true"
    if old["ALGORITHM"] == "refill":
        is_structured, target = True, "both"
        old.become("FILLBACK", f"pruning.method.refill_ratio={old['FILLBACK']}")
        old.warn("refill puts whole units back; on single weights, the old one was imp and lost its rewind point.")
    if not is_structured:
        return "element"
    if model != "resnet20":
        old.setdefault("vit_prune_target", target)
        old.rename("vit_prune_target")
    elif "vit_prune_target" in old:
        raise InputError("--vit_prune_target: resnet20 has channels, no heads or MLPs; omit it.")
    else:
        old.become("(of resnet20)", "pruning.granularity=channel")
    old.warn("each round removes RATE of the remaining units, but no last head; the old masks never became sparser.")
    return old.made[-1].partition("=")[2]


def translate_schedule_(old: Arguments, size: str, granularity: str) -> None:
    """An attention keeps a head, an MLP 8 neurons and a hundredth: the old 20 rounds go below that."""
    heads, neurons, attention = UNITS[size]
    floors = {
        "head": 1 / heads, "neuron": 8 / neurons + 0.01, "channel": 0.022,
        "head+neuron": attention / heads + (1 - attention) * 8 / neurons,
    }  # fmt: skip
    algorithm, rate, rates = old["ALGORITHM"], old["RATE"], {granularity: float(old["RATE"])}
    if "mlp_prune_ratio" in old and granularity.endswith("neuron"):
        rates = {"neuron": old.number("mlp_prune_ratio")}
        if granularity == "head+neuron":
            rates["head"], rate = float(rate), f"{{head: {rate}, neuron: {old['mlp_prune_ratio']}}}"
        else:
            rate = old["mlp_prune_ratio"]
    lasting = [int(math.log(floors[kind]) / math.log1p(-rates[kind])) for kind in rates if kind in floors]
    rounds = str(max(min([20, *lasting]), 1))
    if algorithm == "rst" and "num_cycles" in old:
        rounds = old["num_cycles"]
    elif "pruning_times" in old:
        rounds = old["pruning_times"]
        old.warn(f"each of the {rounds} removals is followed by training; the old program never trained its last one.")
    elif rounds != "20":
        old.warn(f"ONLY {rounds} ROUNDS INSTEAD OF 20: more would remove the last head or neurons of a block.")
    old.become("RATE", f"pruning.schedule={{rounds: {rounds}, rate: {rate}}}")
    if algorithm in ("dense", "gmp"):
        old.warn(f"{algorithm} trains the same total number of epochs, EPOCHS × (rounds + 1), in one round.")
    if algorithm in ("dense", "constant"):
        kept = "removes nothing" if algorithm == "dense" else "keeps the zeros of model.start_from and trains EPOCHS"
        old.warn(f"{algorithm} {kept}: RATE {rate} is ignored.")


def translate_pruning_(old: Arguments, model: str) -> None:
    old.rename("criteria", "pick_pruned", "sorting_mode")
    if old["ALGORITHM"] not in OF_ONE_ROUND:  # the others have nothing to rewind between rounds
        if "rewind_epoch" in old:
            old.setdefault("prune_type", "rewind_lt")
        elif old.get("prune_type") == "rewind_lt":
            old["rewind_epoch"] = "24"
        old.rename("prune_type")
    if old.get("criteria") in ("l1", "l2", "saliency"):
        old.warn(f"{old['criteria']} uses trained weights and 2,048 images; it used rewound weights and one batch.")
    layers = ("conv1", "fc") if model == "resnet20" else ("patch_embed", "head")
    for value, field in zip(BOOLEANS, ("include", "protect"), strict=True):
        ends = zip(("conv1", "fc"), layers, strict=True)
        chosen = [f"{layer}.*" for name, layer in ends if name in old and old.one_of(name, BOOLEANS) == value]
        if chosen:
            old.become(f"(conv1, fc: {value})", f"pruning.{field}=[{', '.join(chosen)}]")


def translate_training_(old: Arguments, model: str) -> None:
    if "decreasing_lr" in old:
        old.become("decreasing_lr", f"optim.schedule={{steps: [{old['decreasing_lr'].replace(',', ', ')}]}}")
    old.rename(*(name for name in FIELDS if name != "exp_name"))
    if "momentum" in old:
        old.become("(the old optimizer)", "optim.name=sgd")
        if "lr" not in old and model != "resnet20":
            old.warn("the recipe's learning rate is for AdamW; SGD needs a larger one: set --lr.")
    elif ("lr" in old or "weight_decay" in old) and model != "resnet20":
        old.warn("lr and weight_decay were for SGD, but AdamW is used here; --momentum 0.9 selects SGD.")
