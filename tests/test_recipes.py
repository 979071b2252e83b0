"""The recipes of the repository: each takes its steps on a model made small, and every command in its header loads."""

import re
import shlex
from pathlib import Path

import pytest
import tiny

from vit_rsst.models import zoo
from vit_rsst.recipe.loading import builtin_recipes, find, load
from vit_rsst.recipe.schema import Recipe, StepDecay

NAMES = [str(path.relative_to(tiny.REPOSITORY / "recipes").with_suffix("")) for path in builtin_recipes()]
SHORT = [
    "train.epochs=1",
    "train.round_epochs=null",
    "train.steps_per_epoch=2",
    "train.global_batch=8",
    "train.batch_per_device=4",
    "optim.warmup_epochs=0.5",
    "data.train_samples=null",
    "data.val_fraction=0.2",
    "data.image_size=16",
    "data.workers=0",
    "model.pretrained=false",
    "model.shape_from=null",
    "pruning.calibration_images=8",
    "pruning.min_neurons=1",
    "tracking={figures: false}",
]
SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 6, "mlp_ratio": 2.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder for each source."""
    root = tmp_path_factory.mktemp("data")
    for source in tiny.COLUMNS:
        tiny.write_images(root / source, source)
    return root


def shortened(recipe: Recipe, data: Path) -> list[str]:
    """Two steps a round, at most one round after the dense one, a narrow model of one block."""
    items = [*SHORT, *(f"model.args.{key}={value}" for key, value in SHAPE.items() if recipe.model.name != "resnet20")]
    if recipe.data.source != "digits":
        items.append(f"data.path={data / recipe.data.source}")
    if recipe.pruning.schedule.num_rounds:
        items.append("pruning.schedule.rounds=1")
    if isinstance(recipe.optim.schedule, StepDecay):
        items.append("optim.schedule.steps=[0.5]")
    return items


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_its_steps_on_a_model_made_small(name, data, tmp_path):
    recipe = load(find(name))
    assert tiny.command("train", name, *shortened(recipe, data), f"output_dir={tmp_path}") == 0
    run = tmp_path / recipe.name
    assert tiny.status(run)["step"] == 2 * sum(load(run / "recipe.yaml").round_epochs)


def header(name: str) -> list[str]:
    """Lines of the comment that a recipe begins with; those continued by a backslash joined."""
    text = re.match(r"(#.*\n)+", find(name).read_text(encoding="utf-8"))[0]
    return [line.strip("# ") for line in re.sub(r" \\\n# *", " ", text).splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_the_header_of_a_recipe_has_commands_that_build_and_says_what_is_measured(name):
    lines = header(name)
    commands = [told[1] for line in lines if (told := re.search(r"train (recipes/.*?)( --dry-run|  |$)", line))]
    assert commands or name == "cifar10/study"
    found = [load(find(path), overrides) for path, *overrides in map(shlex.split, commands)]
    assert len({recipe.name for recipe in found}) == len(found), "commands that share a run folder"
    for recipe in found:
        zoo.create(*zoo.describe(recipe.model.name, recipe.model.args, 10), device="meta")
    assert all(command.startswith(f"recipes/{name}.yaml") for command in commands)
    measured = "Hardware: .*(not yet measured|Measured: not yet|Measured: see)"
    assert name == "reference" or re.search(measured, " ".join(lines))


def test_every_recipe_is_in_the_table_under_its_data_set():
    table = (tiny.REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    groups = {group[1]: group[2] for group in re.finditer(r"\*\*(\w+)\*\*(.*?)(?=\*\*|\Z)", table, re.DOTALL)}
    assert len(NAMES) == 34
    for name in NAMES:
        folder, _, stem = name.rpartition("/")
        assert re.search(rf"\b{stem}\b", groups[folder or "imagenet1k"]), f"{name} is not in recipes/README.md"
