"""One step of every recipe on the stand-in device: a tensor that is made on the wrong device does not mix there."""

import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(tiny.SCRIPTS / "benchmarks"))
import launches
from _stand_in import Counting, begin_phase, stand_in

from vit_rsst.recipe.loading import load

RECIPES = sorted(p for p in tiny.REPOSITORY.glob("recipes/*/*.yaml") if "study" not in p.name)
PHASES = {"rsst": ("window", "masked"), "rst": ("window", "masked"), "ste": ("ste",), "dense": ("dense",)}


def check(path: Path, folder: Path) -> None:
    recipe = load(
        path, ["train.precision=no", "train.distill.teacher=null", "model.pretrained=false", "model.shape_from=null"]
    )
    for phase in PHASES.get(recipe.pruning.method_name, ("masked",)):
        run, _ = stand_in(recipe, folder)
        with Counting() as counting:
            begin_phase(run, phase)
            launches.step(run, logs=False)
        assert not counting.waits, (path.name, phase, counting.waits)


def test_there_are_as_many_recipes_as_there_should_be():
    assert len(RECIPES) >= 30


@pytest.mark.slow  # a minute in all
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_step_of_a_recipe_mixes_no_devices_and_waits_for_none(path, tmp_path):
    check(path, tmp_path)


def test_a_step_of_the_short_recipe_mixes_no_devices(tmp_path):
    check(tiny.REPOSITORY / "recipes" / "cifar100" / "vit_tiny_rsst_short.yaml", tmp_path)


def test_a_tensor_on_the_wrong_device_is_found(tmp_path):
    import torch

    run, _ = stand_in(launches.CASES["dense"].recipe(), tmp_path)
    run.loss = lambda logits, labels: torch.nn.functional.cross_entropy(logits + torch.ones(64, 10), labels)
    with pytest.raises(RuntimeError, match="device"), Counting():
        launches.step(run, logs=False)
