"""The direction of imports: down, or sideways where it is listed; one door for each dependency; heavy ones late.

Floors as in the architecture; the ground floor is what needs no other part, the top is what users start.
"""

import ast
import configparser
import sys
from collections.abc import Iterator

import pytest
import tiny

FLOORS = [
    # 0 ground: plain helpers; what lies above may use them anywhere
    "errors files output columns reach seeds schedules progress registry strict_yaml pruning.masks pruning.units "
    "pruning.patterns data.catalog data.options models.catalog best",
    # 1 measure: numbers of weights, logits and images
    "pruning.criteria pruning.granularity models.anatomy models.resnet models.dynamic_vit "
    "models.gated_vit models.lightweight_vit models.weights data.transforms data.decoding "
    "metrics.counters metrics.outcomes metrics.reported optim losses distill ema data.mixing",
    # 2 decide: which elements live
    "pruning.selection pruning.plan pruning.allocation pruning.selector pruning.methods.constant pruning.methods.dense "
    "pruning.methods.gmp pruning.methods.imp pruning.methods.refill pruning.methods.rsst pruning.methods.rst "
    "pruning.methods.ste pruning.methods",
    # 3 act: on weights, files, processes and the screen; what a recipe is
    "pruning.agreement pruning.calibration pruning.controller models.complexity models.hub models.published "
    "models.slim models.timm_weights models.zoo "
    "data.locate data.tables data.streams data.images data.sources data.loaders "
    "checkpoint tickets tracking results console signals watchdog "
    "recipe recipe_errors recipe_idle recipe_rules recipe_file run_folder",
    # 4 run: one experiment
    "resume loop export export.slim_folder export.source trained",
    # 5 assemble: from a recipe to a run, a plan or scores; from a ticket to what others load
    "assembly.data assembly.model assembly.optim assembly.pruning assembly.objective assembly.needs "
    "assembly.build assembly.resuming "
    "evaluation predict planning export.work export.card export.slim_target export.timm_folder "
    "export.transformers_folder export.dense_folder export.onnx_file export.exporting export.push "
    "analysis.subject analysis.counts analysis.measure analysis.probe analysis.analyze analysis.tables",
    # 6 tell: what a person sees of a run
    "report.shapes report.history report.canvas report.diagnosis report.attention report.curves report.pictures "
    "report.document report.findings report.story report.groups report.fronts report.compare report.reporting "
    "report.watching report.listing "
    "checks.bench checks.inputs checks.learning checks.removal checks.costs checks.checking",
    # 7 enter
    "train cli",
]
"""Modules by floor, without the package's name."""

TARGETS = ("slim_target", "timm_folder", "transformers_folder", "dense_folder", "onnx_file")
METHODS = ("constant", "dense", "gmp", "imp", "refill", "rsst", "rst", "ste")

SIDEWAYS = {
    ("registry", "errors"),
    ("output", "errors"),
    ("output", "files"),
    ("reach", "errors"),
    ("models.zoo", "models.hub"),
    ("models.zoo", "models.slim"),
    ("models.published", "models.hub"),
    ("models.published", "models.zoo"),
    ("metrics.outcomes", "metrics.counters"),
    ("metrics.reported", "metrics.outcomes"),
    ("models.zoo", "models.timm_weights"),
    ("export", "export.slim_folder"),
    ("export.source", "export.slim_folder"),
    ("export.card", "export.work"),
    *((f"export.{name}", "export.work") for name in TARGETS),
    *(("export.exporting", f"export.{name}") for name in (*TARGETS, "card", "work")),
    ("export.push", "export.card"),
    ("export.push", "export.work"),
    *(("pruning.methods", f"pruning.methods.{name}") for name in METHODS),
    *((f"pruning.methods.{name}", "pruning.plan") for name in METHODS),
    ("pruning.methods.rst", "pruning.methods.rsst"),
    ("pruning.allocation", "pruning.plan"),
    ("pruning.allocation", "pruning.selection"),
    ("pruning.selector", "pruning.allocation"),
    ("pruning.selector", "pruning.plan"),
    ("pruning.selector", "pruning.selection"),
    ("pruning.criteria", "pruning.granularity"),
    ("pruning.controller", "pruning.agreement"),
    ("data.options", "data.catalog"),
    ("data.streams", "data.locate"),
    *(("data.images", f"data.{name}") for name in ("streams", "tables")),
    *(("data.sources", f"data.{name}") for name in ("images", "locate", "streams", "tables")),
    *(("data.loaders", f"data.{name}") for name in ("streams", "tables")),
    ("console", "results"),
    ("recipe_idle", "recipe"),
    ("recipe_idle", "recipe_errors"),
    ("recipe_rules", "recipe"),
    ("recipe_rules", "recipe_idle"),
    ("recipe_rules", "recipe_errors"),
    ("recipe_file", "recipe"),
    ("recipe_file", "recipe_errors"),
    ("recipe_file", "recipe_rules"),
    ("run_folder", "recipe"),
    ("loop", "resume"),
    ("trained", "export.source"),
    *(("assembly.build", f"assembly.{name}") for name in ("data", "model", "objective", "optim", "pruning")),
    ("assembly.model", "assembly.data"),
    ("assembly.pruning", "assembly.data"),
    ("evaluation", "assembly.data"),
    ("evaluation", "export.onnx_file"),
    ("analysis.subject", "planning"),
    ("analysis.counts", "analysis.subject"),
    ("analysis.probe", "analysis.measure"),
    *(("analysis.analyze", f"analysis.{name}") for name in ("subject", "counts", "measure")),
    ("analysis.tables", "analysis.counts"),
    *(("planning", f"assembly.{name}") for name in ("build", "data", "model", "needs", "optim", "pruning")),
    *(("report.curves", f"report.{name}") for name in ("canvas", "history")),
    *(("report.pictures", f"report.{name}") for name in ("attention", "canvas", "history")),
    ("report.document", "report.canvas"),
    *((f"checks.{name}", "checks.bench") for name in ("inputs", "learning", "removal", "costs", "checking")),
    ("checks.removal", "checks.learning"),
    *(("checks.checking", f"checks.{name}") for name in ("inputs", "learning", "removal", "costs")),
    ("checks.checking", "report.canvas"),
    ("report.history", "report.shapes"),
    ("report.diagnosis", "report.history"),
    ("report.listing", "report.history"),
    *(
        ("report.story", f"report.{name}")
        for name in ("canvas", "curves", "diagnosis", "document", "findings", "history", "pictures")
    ),
    ("report.findings", "report.history"),
    *(("report.groups", f"report.{name}") for name in ("history", "story")),
    *(("report.fronts", f"report.{name}") for name in ("canvas", "document", "groups")),
    *(("report.compare", f"report.{name}") for name in ("document", "fronts", "groups", "history", "story")),
    *(("report.reporting", f"report.{name}") for name in ("compare", "document", "history", "story")),
    *(("report.watching", f"report.{name}") for name in ("canvas", "curves", "diagnosis", "history", "pictures")),
    ("report.watching", "report.reporting"),
    ("cli", "train"),
}
"""(importer, imported) on one floor."""

FOR_TYPES_ALONE = {("resume", "loop")}
"""Under `if TYPE_CHECKING`, against the direction."""

EMPTY = {"", "analysis", "assembly", "data", "models", "metrics", "pruning", "report", "checks"}
"""Packages whose `__init__` holds no code: whoever imports a module below passes them."""

METHODS_SEE = {"pruning.plan", "pruning.masks", "schedules", "progress", "pruning.methods.rsst"}
"""All that a pruning method may know of the package; rst is rsst from another start."""

DOORS = {
    "datasets": {"data.locate", "data.sources", "data.streams", "metrics.reported"},
    "timm": {
        "data.decoding",
        "data.mixing",
        "data.transforms",
        "models.published",
        "models.zoo",
        "models.dynamic_vit",
        "models.gated_vit",
        "models.lightweight_vit",
        "models.timm_weights",
        "export.timm_folder",
    },
    "transformers": {"models.hub", "export.transformers_folder"},
    "evaluate": {"metrics.reported"},
    "safetensors": {
        "tickets",
        "checkpoint",
        "models.weights",
        "export.slim_folder",
        "export.timm_folder",
        "export.dense_folder",
    },
    "onnxruntime": {"export.onnx_file"},
    "jinja2": {"report.document"},
    "matplotlib": {"report.canvas", "report.curves", "report.fronts", "report.pictures"},
    "huggingface_hub": {"export.push", "models.weights", "reach"},
    "wandb": {"tracking"},
    "tensorboard": set(),
    "tensorboardX": set(),
    "trackio": set(),
}
"""Dependency → modules that import it now."""

ALLOWED_DOORS = {
    "datasets": ("data.", "metrics.reported"),
    "timm": ("data.decoding", "data.mixing", "data.transforms", "models.", "export."),
    "transformers": ("models.", "export."),
    "evaluate": ("metrics.",),
    "safetensors": ("tickets", "checkpoint", "models.weights", "export."),
    "onnxruntime": ("export.",),
    "jinja2": ("report.document",),
    "matplotlib": ("report.",),
    "huggingface_hub": ("export.push", "models.weights", "reach"),
    "wandb": ("tracking",),
    "tensorboard": ("tracking",),
    "tensorboardX": ("tracking",),
    "trackio": ("tracking",),
}
"""Dependency → where it may be imported at all; a name that ends in a dot is a package."""

FLOOR_OF = {module: number for number, line in enumerate(FLOORS) for module in line.split()}
FILES = {
    ".".join(path.relative_to(tiny.PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(tiny.PACKAGE.rglob("*.py"))
}


def imports(module: str) -> Iterator[tuple[str, int, bool]]:
    """(imported module, line, whether it is for types alone); a module of this package begins with a dot."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    typed = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{FILES[module]}:{node.lineno}: relative import"
            found = []
            for alias in node.names:
                inside = f"{node.module}.{alias.name}".removeprefix("vit_rsst.")
                found.append(f"{node.module}.{alias.name}" if inside in FILES else node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        else:
            continue
        for name in dict.fromkeys(found):
            is_ours = name == "vit_rsst" or name.startswith("vit_rsst.")
            yield f".{name[9:]}" if is_ours else name, node.lineno, id(node) in typed


EDGES = [
    (module, target[1:], line, is_typed)
    for module in FILES
    for target, line, is_typed in imports(module)
    if target.startswith(".")
]
OUTSIDE = [
    (module, target.split(".")[0], line)
    for module in FILES
    for target, line, _ in imports(module)
    if not target.startswith(".")
]


def place(module: str, line: int) -> str:
    return f"{FILES[module].relative_to(tiny.REPOSITORY)}:{line}"


def test_every_module_stands_on_a_floor():
    assert set(FLOOR_OF) | EMPTY == set(FILES), "give each new module its floor in this file"
    assert len(FLOOR_OF) + len(EMPTY) == len(FILES) == sum(len(line.split()) for line in FLOORS) + len(EMPTY)
    assert len(EDGES) > 100


def test_the_packages_that_are_passed_on_the_way_hold_no_code():
    for module in EMPTY:
        body = ast.parse(FILES[module].read_text(encoding="utf-8")).body
        code = [node for node in body if not isinstance(node, ast.Expr | ast.Assign)]
        assert not code, place(module, code[0].lineno)


def test_imports_go_down_or_sideways_where_it_is_listed():
    wrong = []
    for module, target, line, is_typed in EDGES:
        if target in EMPTY or (is_typed and (module, target) in FOR_TYPES_ALONE):
            continue
        above, below = FLOOR_OF.get(module, 7), FLOOR_OF.get(target)
        assert below is not None, f"{place(module, line)}: {target} is no module"
        if below > above or (below == above and (module, target) not in SIDEWAYS):
            wrong.append(f"{place(module, line)}: {module} (floor {above}) imports {target} (floor {below})")
    assert not wrong, "\n".join(wrong)


def test_no_permission_is_left_over():
    used = {(module, target) for module, target, _, _ in EDGES}
    assert used >= SIDEWAYS
    assert used >= FOR_TYPES_ALONE
    assert all(FLOOR_OF[a] == FLOOR_OF[b] for a, b in SIDEWAYS)


def test_methods_see_plan_masks_and_progress_alone():
    seen = {t for m, t, _, _ in EDGES if m.startswith("pruning.methods.")}
    assert seen <= METHODS_SEE
    assert "pruning.plan" in seen


def test_recipe_objects_stop_above_what_they_describe():
    allowed = {
        "recipe_idle",
        "recipe_rules",
        "recipe_file",
        "run_folder",
        "assembly.build",
        "assembly.data",
        "assembly.model",
        "assembly.needs",
        "assembly.objective",
        "assembly.optim",
        "assembly.pruning",
        "planning",
        "analysis.subject",
        "report.compare",
        "report.groups",
        "checks.bench",
        "train",
        "cli",
    }
    users = {m: place(m, line) for m, t, line, _ in EDGES if t == "recipe"}
    assert not set(users) - allowed, [users[m] for m in set(users) - allowed]


@pytest.mark.parametrize("package", DOORS)
def test_a_dependency_has_one_door(package):
    users = {module: place(module, line) for module, target, line in OUTSIDE if target == package}
    allowed = ALLOWED_DOORS[package]
    wrong = [
        where for m, where in users.items() if not any(m == a or (a[-1] == "." and m.startswith(a)) for a in allowed)
    ]
    assert not wrong
    assert set(users) == DOORS[package], "the table of this file is out of date"


def test_no_module_reads_pickles():
    wrong = [
        place(module, line) for module, target, line in OUTSIDE if target in ("pickle", "dill", "cloudpickle", "joblib")
    ]
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "torch.save",
                "np.load",
                "pickle.load",
            ):
                wrong.append(place(module, node.lineno))
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
    modules = ["vit_rsst", "vit_rsst.cli", "vit_rsst.train", "vit_rsst.recipe_file"]
    modules += ["vit_rsst.pruning.methods", "vit_rsst.models.catalog", "vit_rsst.data.catalog", "vit_rsst.run_folder"]
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
