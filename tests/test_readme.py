"""Every command of the README runs, with the substitutions listed here: two steps an epoch, a CPU, local data."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from test_slurm import Cluster

README = tiny.REPOSITORY / "README.md"

EXEMPT = {"scripts/quickstart", "scripts/test"}
"""The two set-up commands, which whoever runs these tests has run."""

SHORT = [
    "train.steps_per_epoch=2",
    "train.epochs=2",
    "train.round_epochs=1",
    "train.global_batch=8",
    "train.precision=no",
    "optim.warmup_epochs=1",
    "model.args.depth=1",
    "tracking.figures=false",
]
CONFIGURATIONS = {"gpu_bf16.yaml": "cpu.yaml", "gpu_8x_bf16.yaml": "cpu.yaml"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines of all bash blocks, continued lines joined, comments left out."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder with tiny data in the Hub's layout, the repository's recipes and the README's plugin."""
    import datasets

    folder = tmp_path_factory.mktemp("readme")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=[*"abcdefghij"])})
    draw = np.random.default_rng(0)
    for split, rows in (("train", 60), ("test", 20)):
        images = [Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(rows)]
        table = datasets.Dataset.from_dict({"img": images, "label": [i % 10 for i in range(rows)]}, features=features)
        (folder / "DATA" / "cifar10").mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / "DATA" / "cifar10" / f"{split}-00000-of-00001.parquet")
    (folder / "DATA" / "imagenet").mkdir()
    for split in ("train", "validation"):
        table.to_parquet(folder / "DATA" / "imagenet" / f"{split}-00000-of-00001.parquet")
    for name in ("recipes", "accelerate_configs", "scripts"):
        (folder / name).symlink_to(tiny.REPOSITORY / name)
    Image.fromarray(draw.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / "photo.png")
    plugin = next(block for block in blocks("python") if "register_method" in block)
    (folder / "my_method.py").write_text(plugin)
    return folder


def substituted(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables and words of a command, after the substitutions."""
    words = shlex.split(command)
    variables = {}
    while "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        variables[key] = value
    words = [re.sub(r"accelerate_configs/(.+)", lambda m: f"accelerate_configs/{CONFIGURATIONS.get(m[1], m[1])}", w)
             for w in words]  # fmt: skip
    if words[:2] == ["vit-rsst", "study"]:  # all of its runs need more images than there are here
        words += ["data.train_samples=32"]
    if words[:2] == ["vit-rsst", "search"]:
        return variables, words + [item for item in SHORT if not item.startswith("model.args")]
    if words[:2] == ["vit-rsst", "analyze"]:
        words.append("--no-latency")
    if words[0] != "sbatch" and not any(word == "train" or word.endswith(".train") for word in words):
        return variables, words
    words += [item for item in SHORT if not item.startswith("model.args")] if "model.args=" in command else SHORT
    if "recipes/cifar10" in command or "recipes/cifar100" in command:
        words += ["data.train_samples=32"]
        if "data.path" not in command:
            words += ["data.source=cifar10", "data.path=DATA/cifar10"]
    if "name=" in command or "recipes/cifar" in command:  # the quick start alone keeps its rounds: the README names one
        words += ["pruning.schedule.rounds=1"]
    if "recipes/imagenet1k" in command:
        words += ["model.args={img_size: 32, patch_size: 8, depth: 1}", "data.image_size=32", "tracking.with=[]"]
        words += ["data.val_fraction=0.2", "train.batch_per_device=null"]
    if "gpu_" in command:  # the trackers of that recipe have tests of their own
        words += ["tracking.with=[]", f"name=gpu-{command.count('8x')}"]
    return variables, words


def run(command: str, folder: Path) -> str:
    """Runs it in `folder`: the verbs within this process, what needs an environment of its own beside it."""
    variables, words = substituted(command)
    if words[0] == "sbatch":
        return run_job(words, folder)
    if words[0] == "vit-rsst" and not variables:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
            assert tiny.command(*words[1:]) == 0, f"{command}\n{words}\n{out.getvalue()[-2000:]}"
        return out.getvalue()
    modules = {"vit-rsst": "vit_rsst.cli", "accelerate": "accelerate.commands.accelerate_cli"}
    if words[0].startswith("scripts/"):
        words[0:1] = [sys.executable, str(tiny.REPOSITORY / words[0])]
    else:
        words[0:1] = [sys.executable, "-m", modules[words[0]]]
    environment = tiny.environment(**variables)
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(tiny.REPOSITORY)])
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{command}\n{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def run_job(words: list[str], folder: Path) -> str:
    """`sbatch --nodes=N SCRIPT …` with stand-ins for SLURM's programs."""
    nodes, script = int(words[1].removeprefix("--nodes=")), Path(words[2]).name
    cluster = Cluster(folder)
    code, told = cluster.end(cluster.start(script, *words[3:], nodes=nodes, SLURM_SUBMIT_DIR=str(folder)))
    assert code == 0, told
    return told


def test_every_command_of_the_readme_runs(elsewhere):
    found = commands()
    assert set(found) >= EXEMPT
    ran = [command for command in found if command.split()[0] not in EXEMPT]
    assert len(ran) >= 10
    out = {command: run(command, elsewhere) for command in ran}
    assert any("cifar10-cpu-rsst" in text for command, text in out.items() if command == "vit-rsst runs")
    assert (elsewhere / "runs" / "one-shot" / "rounds.csv").read_text().count("\n") == 3


def test_the_readme_builds_a_ticket_into_plain_timm(elsewhere):
    quickstart = "vit-rsst train recipes/digits/quickstart.yaml"
    if not (elsewhere / "runs" / "digits-quickstart").exists():
        run(quickstart, elsewhere)
    program = next(block for block in blocks("python") if "create_model" in block)
    done = subprocess.run(
        [sys.executable, "-c", program + "\nimport sys; assert 'vit_rsst' not in sys.modules"],
        cwd=elsewhere, env=tiny.environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
