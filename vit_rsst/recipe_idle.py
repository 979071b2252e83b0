"""Fields of a recipe that were set and change nothing beside the others: somebody believes that they do."""

from collections.abc import Iterator

from vit_rsst.recipe import Recipe
from vit_rsst.recipe_errors import Problem


def idle_fields(recipe: Recipe) -> Iterator[Problem]:
    """Fields of another value than their default where they have no meaning."""
    for place, section, names, has_meaning, needed in _meanings(recipe):
        for name in names:
            if not has_meaning and getattr(section, name) != getattr(type(section), name):
                yield Problem(f"{place}.{name}", f"means nothing {needed}; set that, or leave it out")


def _meanings(recipe: Recipe) -> Iterator[tuple[str, object, tuple[str, ...], bool, str]]:
    """(place, section, names of fields, whether they mean something here, what they need)."""
    data, augment, optim = recipe.data, recipe.data.augment, recipe.optim
    is_of_files = ("image_column", "label_column", "num_classes", "max_pixels")
    yield "data", data, is_of_files, data.source != "digits", "to the embedded digits; they are for data.source=folder"
    yield "data", data, ("shuffle_buffer",), data.streaming, "without data.streaming"
    imbalance = data.imbalance
    yield "data.imbalance", imbalance, ("ratio",), imbalance.kind is not None, "without kind: long_tail or step"
    for names, has_meaning, needed in (
        (("scale", "ratio"), data.crop == "resized", "without crop: resized"),
        (("padding",), data.crop == "pad", "without crop: pad"),
        (("remode", "rearea", "reaspect"), augment.reprob > 0, "without reprob"),
        (("mixup_prob",), augment.mixes, "without mixup or cutmix"),
        (("mixup_switch_prob",), augment.mixup > 0 and augment.cutmix > 0, "without mixup and cutmix"),
    ):
        yield "data.augment", augment, names, has_meaning, needed
    yield "optim", optim, ("momentum",), optim.name == "sgd", f"to {optim.name}; it is for optim.name=sgd"
    yield "optim", optim, ("betas",), optim.name != "sgd", "to sgd, which has momentum; they are for adam and adamw"
    yield "optim", optim, ("min_lr",), optim.schedule == "cosine", "without optim.schedule=cosine"
    distill = recipe.train.distill
    yield "train.distill", distill, ("weight", "temperature"), distill.teacher is not None, "without a teacher"
    penalty = getattr(recipe.pruning.method, "penalty", None)
    if penalty is not None:
        is_of_ramp = penalty.ramp == "exp_custom_exponents"
        yield "pruning.method.penalty", penalty, ("exponent",), is_of_ramp, "without ramp: exp_custom_exponents"
        shrinks = penalty.coupling == "decoupled"
        yield "pruning.method.penalty", penalty, ("residual",), shrinks, "without coupling: decoupled"
