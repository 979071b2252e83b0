"""Who may import whom, as setup.cfg tells import-linter; heavy dependencies are imported late; all is declared."""

import ast
import configparser
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

FILES = {
    ".".join(path.relative_to(tiny.PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(tiny.PACKAGE.rglob("*.py"))
}


def imports(module: str) -> Iterator[tuple[str, int]]:
    """(imported module, line) of what a module imports from outside of the package."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{FILES[module]}:{node.lineno}: relative import"
            found = [str(node.module)]
        else:
            continue
        for name in found:
            if name.split(".")[0] != "vit_rsst":
                yield name.split(".")[0], node.lineno


OUTSIDE = [(module, target, line) for module in FILES for target, line in imports(module)]


def place(module: str, line: int) -> str:
    return f"{FILES[module].relative_to(tiny.REPOSITORY)}:{line}"


def contracts(folder: Path) -> subprocess.CompletedProcess:
    """The verdict of import-linter on a copy of the package in `folder`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    command += ["--config", str(tiny.REPOSITORY / "setup.cfg"), "--no-cache"]
    environment = tiny.environment(PYTHONPATH=str(folder))
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(tiny.PACKAGE, tmp_path / "vit_rsst", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_import_contracts_hold(copy):
    done = contracts(copy)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("models/resnet.py", "import vit_rsst.loop", "Imports go down"),
        ("recipe/sentences.py", "from vit_rsst.tickets import rounds", "Imports go down"),
        ("pruning/plan.py", "from vit_rsst.pruning import controller", "No circle inside a folder"),
        ("pruning/criteria.py", "from vit_rsst.recipe.schema import Recipe", "Recipe objects stop"),
        ("pruning/methods/imp.py", "import torch", "A method plans"),
        ("training/optim.py", "import timm", "One door to timm"),
        ("loop.py", "def later():\n    import wandb", "One door to wandb"),
        ("report/history.py", "import pickle", "Nothing is unpickled"),
    ],
)
def test_a_planted_import_breaks_its_contract(copy, module, line, contract):
    with open(copy / "vit_rsst" / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = contracts(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(told.startswith(contract) and told.endswith("BROKEN") for told in done.stdout.splitlines()), done.stdout


def test_packages_hold_no_code_of_their_own():
    for module, path in FILES.items():
        if path.name == "__init__.py" and module not in ("", "pruning.methods"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            code = [node for node in body if not isinstance(node, ast.Expr | ast.Assign | ast.ImportFrom)]
            assert not code, place(module, code[0].lineno)


def test_nothing_is_read_or_written_as_a_pickle():
    calls = ("torch.load", "torch.save", "np.load", "pickle.load")
    wrong = [
        place(module, node.lineno)
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls
        if "allow_pickle=False" not in map(ast.unparse, node.keywords)
    ]
    assert not wrong


HEAVY = (
    "torch",
    "numpy",
    "datasets",
    "timm",
    "transformers",
    "accelerate",
    "evaluate",
    "sklearn",
    "safetensors",
    "wandb",
)


def test_a_recipe_can_be_read_without_torch_or_datasets():
    script = (
        "import sys\n"
        "for module in sys.argv[1:]:\n"
        "    __import__(module)\n"
        "    print(module, *[name for name in sys.modules if '.' not in name])\n"
    )
    modules = ["vit_rsst", "vit_rsst.cli", "vit_rsst.train", "vit_rsst.recipe.loading"]
    modules += ["vit_rsst.pruning.methods", "vit_rsst.models.catalog", "vit_rsst.data.catalog", "vit_rsst.run.folder"]
    done = tiny.python("-c", script, *modules)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == modules
    for line in lines:
        module, *loaded = line.split()
        assert "vit_rsst" in loaded
        assert not set(HEAVY) & set(loaded), module


def test_setup_cfg_lists_every_package_of_the_tree():
    config = configparser.ConfigParser()
    config.read(tiny.REPOSITORY / "setup.cfg", encoding="utf-8")
    listed = set(config["options"]["packages"].split())
    tree = {
        ".".join(("vit_rsst", *path.parent.relative_to(tiny.PACKAGE).parts))
        for path in tiny.PACKAGE.rglob("__init__.py")
    }
    folders = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    assert listed == tree | set(folders)
    assert all((tiny.REPOSITORY / folder).is_dir() for folder in folders.values())
    strays = [p for p in tiny.PACKAGE.rglob("*.py") if not (p.parent / "__init__.py").exists()]
    assert not strays, "a folder without __init__.py is not installed"


def test_every_dependency_that_is_imported_is_declared():
    config = configparser.ConfigParser()
    config.read(tiny.REPOSITORY / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"].values()
    lines = "\n".join([config["options"]["install_requires"], *extras]).split("\n")
    declared = {line.split(">")[0].split("<")[0].split("=")[0].strip().lower().replace("-", "_") for line in lines}
    names = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit_learn"}
    used = {t: place(m, line) for m, t, line in OUTSIDE if t not in sys.stdlib_module_names}
    missing = {name: where for name, where in used.items() if names.get(name, name).lower() not in declared}
    assert not missing
    assert len(used) > 12
