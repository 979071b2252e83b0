"""The recipes of the repository: each takes its steps on a model made small, and every command in its header loads."""

import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
from PIL import Image

from vit_rsst.data.catalog import CATALOG as SOURCES
from vit_rsst.recipe import Recipe, StepDecay
from vit_rsst.recipe_file import builtin_recipes, find, load

NAMES = [str(path.relative_to(tiny.REPOSITORY / "recipes").with_suffix("")) for path in builtin_recipes()]
COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label"), "imagenet1k": ("image", "label")}
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
    """A folder for each source with some images of three classes, in the Hub's layout."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for source, (image, label) in COLUMNS.items():
        (root / source).mkdir()
        features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["a", "b", "c"])})
        for split, rows in (("train", 120), (SOURCES[source].test_split, 6)):
            images = [Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(rows)]
            table = datasets.Dataset.from_dict({image: images, label: [i % 3 for i in range(rows)]}, features=features)
            table.to_parquet(root / source / f"{split}-00000-of-00001.parquet")
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
def test_the_header_of_a_recipe_has_commands_that_load_and_says_what_is_measured(name):
    lines = header(name)
    commands = [found[1] for line in lines if (found := re.search(r"train (recipes/.*?)( --dry-run|  |$)", line))]
    assert commands or name == "cifar10/study"
    names = [load(find(path), overrides).name for path, *overrides in map(shlex.split, commands)]
    assert len(set(names)) == len(names), "commands that share a run folder"
    assert all(command.startswith(f"recipes/{name}.yaml") for command in commands)
    told = " ".join(lines)
    assert name == "reference" or re.search("Hardware: .*(not yet measured|Measured: not yet|Measured: see)", told)


def test_every_recipe_is_in_the_table_under_its_data_set():
    table = (tiny.REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    groups = {group[1]: group[2] for group in re.finditer(r"\*\*(\w+)\*\*(.*?)(?=\*\*|\Z)", table, re.DOTALL)}
    assert len(NAMES) == 33
    for name in NAMES:
        folder, _, stem = name.rpartition("/")
        assert re.search(rf"\b{stem}\b", groups[folder or "imagenet1k"]), f"{name} is not in recipes/README.md"
