"""The pages: every command and every Python block runs, every link leads somewhere, every name exists.

Commands run with the substitutions listed here: two steps an epoch, a CPU, local data.
"""

import ast
import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image
from test_slurm import Cluster

from vit_rsst import errors
from vit_rsst.cli.parser import make_parser
from vit_rsst.experiments import running, study_file
from vit_rsst.recipe.loading import load

README = tiny.REPOSITORY / "README.md"
DOCS = sorted((tiny.REPOSITORY / "docs").glob("*.md"))
PAGES = [README, tiny.REPOSITORY / "CONTRIBUTING.md", *DOCS]
LINKED = [*PAGES, tiny.REPOSITORY / "CHANGELOG.md", tiny.REPOSITORY / "recipes" / "README.md"]

EXEMPT = {
    "scripts/test": "it runs these tests",
    "scripts/test --all": "it runs these tests",
    "scripts/test tests/test_schedules.py": "it runs these tests",
    "scripts/lint": "it lints the tree, not a user's work",
    "pre-commit install": "it changes this clone",
    "vit-rsst models": "it builds every model; tests/test_models.py runs it",
}

QUICKSTART = {"scripts/quickstart": "vit-rsst train recipes/digits/quickstart.yaml"}
"""What the script runs once it has installed the package."""

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
TINY_DIGITS = ["data.test_fraction=0.05", "data.val_fraction=0.05"]


@functools.cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> list[str]:
    """The lines of all bash blocks, continued lines joined, comments left out."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]
    return [QUICKSTART.get(command, command) for command in found]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
PYTHON = [block for page in PAGES for block in blocks(page, "python")]
LAUNCHED = [c for c in COMMANDS if c.startswith(("sbatch", "accelerate"))]
"""Their trainer runs by default; through the launcher, which takes a minute, only with the slow tests."""
PRODUCT = r"\b(?:runs|exports)/[\w-]+"
"""A run folder or an export that one command makes and another needs."""


def product(command: str) -> str | None:
    """The folder that a command makes."""
    words = shlex.split(command)
    if "export" in words:
        return words[-1]
    if "prune" in words:
        return words[3]
    if not any(word == "train" or word.endswith(".train") for word in words) or "--dry-run" in words:
        return None
    named = [word.removeprefix("name=") for word in words if word.startswith("name=")]
    recipe = next(tiny.REPOSITORY / word for word in words if word.startswith("recipes/"))
    return f"runs/{named[-1] if named else yaml.safe_load(recipe.read_text(encoding='utf-8'))['name']}"


class Reader:
    """Somebody who types the commands of the pages, each once, in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, {}
        self.makers = {product(command): command for command in reversed(COMMANDS) if command not in EXEMPT}

    def prepare(self, text: str) -> None:
        """Runs the commands that make what `text` needs."""
        for needed in re.findall(PRODUCT, text):
            if needed in self.makers and self.makers[needed] != text:
                self.run(self.makers[needed])

    def run(self, command: str, through_launcher: bool = False) -> str:
        """The verbs within this process, what needs an environment of its own beside it; returns the output."""
        variables, words = substituted(command)
        if not through_launcher and command in LAUNCHED:
            start = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
            variables, words = {}, ["vit-rsst", "train", *words[start:]]
        if (key := (*variables.items(), *words)) not in self.out:
            self.prepare(command)
            self.out[key] = self.run_now(variables, words)
        return self.out[key]

    def run_now(self, variables: dict[str, str], words: list[str]) -> str:
        if words[0] == "sbatch":
            return self.run_job(words)
        if words[0] == "vit-rsst" and not variables:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()) as out:
                assert tiny.command(*words[1:]) == 0, f"{words}\n{out.getvalue()[-2000:]}"
            return out.getvalue()
        modules = {"vit-rsst": "vit_rsst.cli", "accelerate": "accelerate.commands.accelerate_cli"}
        return self.python("-m", modules[words[0]], *words[1:], **variables)

    def python(self, *words: str, **variables: str) -> str:
        environment = tiny.environment(**variables)
        environment["PYTHONPATH"] = os.pathsep.join([str(self.folder), str(tiny.REPOSITORY)])
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=200,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def run_job(self, words: list[str]) -> str:
        """`sbatch --nodes=N SCRIPT …` with stand-ins for SLURM's programs."""
        nodes, script = int(words[1].removeprefix("--nodes=")), Path(words[2]).name
        cluster = Cluster(self.folder)
        code, out = cluster.end(cluster.start(script, *words[3:], nodes=nodes, SLURM_SUBMIT_DIR=str(self.folder)))
        assert code == 0, out
        return out


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    """In a folder with tiny data in the Hub's layout, the repository's recipes and the page's plugin."""
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
    photo = Image.fromarray(draw.integers(0, 255, (40, 30, 3), dtype=np.uint8))
    for path in ("photo.png", "DATA/photos/a/1.png", "DATA/photos/b/1.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        photo.save(folder / path)
    for block in PYTHON:
        if file := re.match(r"# (\w+\.py)\b", block):
            (folder / file[1]).write_text(block)
    return Reader(folder)


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
        short = [item for item in SHORT if not item.startswith("model.args")]
        return variables, [*words, *short, "pruning.schedule.rounds=1"]
    if words[:2] == ["vit-rsst", "check"]:
        words.append("model.args.depth=1")
    if words[1] in ("analyze", "report"):
        words.append("--no-latency")
    if words[0] != "sbatch" and not any(word == "train" or word.endswith(".train") for word in words):
        return variables, words
    words += [item for item in SHORT if not item.startswith("model.args")] if "model.args=" in command else SHORT
    if "interval:" in command:
        words += ["pruning.method.interval=1"]
    if "recipes/digits" in command:
        words += TINY_DIGITS
    if "recipes/cifar10" in command or "recipes/cifar100" in command:
        words += ["data.train_samples=32"]
        if "data.path" not in command:
            words += ["data.source=cifar10", "data.path=DATA/cifar10"]
    if "name=" in command or "recipes/cifar" in command:  # the quick start alone keeps its rounds: a page names one
        words += ["pruning.schedule.rounds=1"]
    if "recipes/imagenet1k" in command:
        words += ["model.args={img_size: 32, patch_size: 8, depth: 1}", "data.image_size=32", "tracking.with=[]"]
        words += ["data.val_fraction=0.2", "train.batch_per_device=null"]
    if "gpu_" in command:  # the trackers of that recipe have tests of their own
        words += ["tracking.with=[]", f"name=gpu-{command.count('8x')}"]
    return variables, words


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in EXEMPT], ids=str)
def test_every_command_of_the_pages_runs(reader, command, monkeypatch):
    monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=tiny.TrainerHere, DEVNULL=None, STDOUT=None))
    out = reader.run(command)
    if command == "vit-rsst runs":
        assert "cifar10-cpu-rsst" in out
    if command.endswith("name=one-shot"):
        assert (reader.folder / "runs" / "one-shot" / "rounds.csv").read_text().count("\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", LAUNCHED)
def test_every_launched_command_runs_through_its_launcher(reader, command):
    reader.run(f"{command} --restart" if "accelerate" in command else command, through_launcher=True)


@pytest.mark.parametrize("path", sorted((tiny.REPOSITORY / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_understands_every_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).distributed_type in ("NO", "MULTI_GPU", "FSDP")


@pytest.mark.parametrize("program", PYTHON, ids=lambda block: block.splitlines()[0])
def test_every_program_of_the_pages_runs(reader, program):
    reader.prepare(program)
    if "vit_rsst" not in program:
        program += "\nimport sys; assert 'vit_rsst' not in sys.modules"
    reader.python("-c", program)


@pytest.mark.parametrize("fields", [block for page in PAGES for block in blocks(page, "yaml")])
def test_every_yaml_block_is_a_study_or_part_of_a_recipe(fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.REPOSITORY)
    path = tmp_path / "page.yaml"
    path.write_text(fields if "arms:" in fields else f"name: page\n{fields}", encoding="utf-8")
    assert study_file.read(path).runs if "arms:" in fields else load(path)


def test_the_commands_are_found():
    assert {command for page in PAGES for command in commands_of(page)} >= {*EXEMPT, *QUICKSTART.values()}
    assert len(COMMANDS) > 30
    assert len(PYTHON) >= 2


def test_every_verb_is_on_a_page():
    _, verbs = make_parser()
    shown = {word for command in COMMANDS for word in shlex.split(command)}
    assert set(verbs) <= shown


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(tiny.REPOSITORY)))
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", prose(page), re.MULTILINE)
    for link in (inline or reference for inline, reference in links):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_names_every_page():
    assert len(text(README).splitlines()) <= 180
    assert len(DOCS) >= 10
    for page in LINKED[1:]:
        assert f"({page.relative_to(tiny.REPOSITORY)})" in text(README), page.name


def quoted_names(page: Path) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_field_on_a_page_is_in_the_reference(page):
    reference = yaml.safe_load((tiny.REPOSITORY / "recipes" / "reference.yaml").read_text(encoding="utf-8"))
    for name in quoted_names(page):
        path = name.partition("=")[0]
        if path.endswith(".py") or not re.fullmatch(
            rf"(?:{'|'.join(k for k, v in reference.items() if isinstance(v, dict))})(?:\.[a-z_]+)+", path
        ):
            continue
        node = reference
        for part in path.split("."):
            if node == {}:  # free arguments
                break
            assert isinstance(node, dict), name
            assert part in node, name
            node = node[part]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_folder_on_a_page_exists(page):
    roots = (tiny.REPOSITORY, tiny.PACKAGE, tiny.SCRIPTS / "benchmarks")
    for name in quoted_names(page):
        if re.fullmatch(r"[\w/]+\.(?:py|cfg|sh)|(?:\w+/)+", name) and name not in ("runs/", "train/", "val/", "test/"):
            assert any((root / name).exists() for root in roots), name


def test_the_design_page_lists_the_folders_of_the_package():
    rows = re.findall(r"^\| `(\w+)/` \|", text(tiny.REPOSITORY / "docs" / "design.md"), re.MULTILINE)
    assert sorted(rows) == sorted(path.parent.name for path in tiny.PACKAGE.glob("*/__init__.py"))


def test_the_exit_codes_on_the_page_are_those_of_the_program():
    codes = {
        one.exit_code for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.RunError)
    }
    table = re.findall(r"^\| (\d+) \| ", text(tiny.REPOSITORY / "docs" / "reports.md"), re.MULTILINE)
    assert {int(code) for code in table} == codes - {errors.RunError.exit_code} | {0}


def test_the_benchmarks_page_lists_every_benchmark():
    rows = re.findall(r"^\| `(\w+\.py)` \|", text(tiny.REPOSITORY / "docs" / "benchmarks.md"), re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (tiny.SCRIPTS / "benchmarks").glob("[a-z]*.py"))


def messages() -> str:
    """Every string of the package, an expression inside of one as `…`."""
    found = []
    for path in tiny.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_in_troubleshooting_are_those_of_the_program():
    page = text(tiny.REPOSITORY / "docs" / "troubleshooting.md")
    quoted = re.findall(r"[|,] \"([^\"]+)\"", page)
    assert len(quoted) > 12
    known = messages()
    parts = [part for message in quoted for part in re.split(r"\s*(?:…|FILE|\bN\b)\s*", message)]
    assert not [part for part in parts if part not in known]
