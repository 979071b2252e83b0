"""The command `vit-rsst`: verbs for one process. What a verb needs is imported inside the verb."""

import argparse
import os
import sys
from collections.abc import Sequence

from vit_rsst import __version__
from vit_rsst.files import leave, output_file
from vit_rsst.train import add_arguments, guarded, train


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the verb; returns the exit code."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        # Overrides may stand between options: argparse parses them so only without subparsers.
        overrides = getattr(arguments, "overrides", None)
        if overrides is None or any(item.startswith("-") for item in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        overrides.extend(rest)
    return guarded(arguments.verb, arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vit-rsst",
        description="Train and prune Vision Transformers. Exit codes: 0 done, 2 wrong input, 3 the environment lacks "
        "something, 4 training diverged, 5 damaged checkpoint or ticket, 6 a check failed, 75 stopped cleanly and can "
        "go on.",
    )
    parser.add_argument("--version", action="version", version=f"vit-rsst {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, function: object, about: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        added.set_defaults(verb=function)
        return added

    add_arguments(verb("train", train, "train and prune by a recipe, in one process"))
    check = verb("check", check_verb, "go through the checklist before a long run: data, model, learning rate, costs")
    check.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of one that comes with the package")
    check.add_argument("overrides", metavar="key=value", nargs="*", help="fields of the recipe to override")
    check.add_argument("--json", metavar="FILE", help="write every number there, norms of gradients too")
    check.add_argument("--picture", metavar="FILE.svg", help="draw the learning-rate range test there")
    evaluate = verb("evaluate", evaluate_verb, "score a ticket, the last ticket of a run or an export on a split")
    evaluate.add_argument(
        "what",
        metavar="RUN|TICKET|MODEL",
        help="a run folder, a ticket file, a folder that export wrote, or a name of timm with published weights",
    )
    evaluate.add_argument("--split", choices=("test", "val", "train"), default="test")
    evaluate.add_argument("--data", metavar="PATH", help="folder of the data, when it is not where the run found it")
    evaluate.add_argument("--source", metavar="NAME", help="the data, where the model does not say; see methods")
    evaluate.add_argument("--batch", type=int, metavar="N", help="images of a forward pass (default 500)")
    evaluate.add_argument("--json", metavar="FILE", help="write every number there as well")
    evaluate.add_argument("--csv", metavar="FILE", help="write one row for each class there")
    predict = verb("predict", predict_verb, "name the classes of image files, by a ticket or the last ticket of a run")
    predict.add_argument("what", metavar="RUN|TICKET", help="a run folder, a ticket file or an exported slim folder")
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="how many classes to name (default 5)")
    predict.add_argument("--json", metavar="FILE", help="write the predictions there as well")
    analyze = verb("analyze", analyze_verb, "count and measure models, recipes and tickets, side by side")
    analyze.add_argument(
        "what", metavar="WHAT", nargs="+", help="a model, recipe, ticket, run folder (last ticket) or slim folder"
    )
    analyze.add_argument("--json", metavar="FILE", help="write every number there, those of each layer too")
    analyze.add_argument("--csv", metavar="FILE", help="write one row for each WHAT there")
    analyze.add_argument("--no-latency", action="store_true", help="count alone: measure neither time nor memory")
    analyze.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="default: 1 8 64")
    analyze.add_argument("--image-size", type=int, metavar="N", help="side of the images in px (default: the model's)")
    export = verb("export", export_verb, "write a ticket, or the last ticket of a run, as others load it")
    export.add_argument("what", metavar="TICKET|RUN", help="a ticket file, a run folder or a slim folder")
    export.add_argument("--to", required=True, choices=("slim", "timm", "transformers", "dense", "onnx"))
    export.add_argument("folder", metavar="DIR", help="a folder that does not exist yet, or is empty")
    export.add_argument("--round-to", type=int, metavar="N", help="slim, onnx: widths are multiples of N (default 1)")
    export.add_argument("--opset", type=int, metavar="N", help="onnx: version of the operators (default: torch's)")
    push = verb("push", push_verb, "upload an export folder, or a ticket with a card, to the Hub")
    push.add_argument("what", metavar="TICKET|FOLDER", help="a ticket file, or a folder that export wrote")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME of the repository; made where there is none")
    push.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    push.add_argument("--dry-run", action="store_true", help="print what would be sent, and stop")
    report = verb("report", report_verb, "write a run as one HTML page and as Markdown; compare several runs")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders; in whatever state")
    report.add_argument("--out", metavar="DIR", help="default: the run folder; of several runs ./comparison")
    report.add_argument("--no-latency", action="store_true", help="measure no latency")
    study = verb("study", study_verb, "train a grid of recipes by a study file and compare the arms")
    study.add_argument("file", metavar="FILE", help="a study file, such as those in scripts/studies/")
    study.add_argument("overrides", metavar="key=value", nargs="*", help="fields of the recipe, for all runs")
    study.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; the cores are shared out")
    study.add_argument("--dry-run", action="store_true", help="list the runs, their epochs and the time; start none")
    study.add_argument("--csv", metavar="FILE", help="write a line a run")
    study.add_argument("--markdown", metavar="FILE", help="write the table of the arms")
    search = verb("search", search_verb, "tune fields of a recipe by validation, trial by trial")
    search.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of one of the package")
    search.add_argument("overrides", metavar="key=value", nargs="*", help="fields of the recipe, for all trials")
    search.add_argument("--trials", type=int, required=True, metavar="N", help="trials in all, earlier ones included")
    search.add_argument(
        "--field", action="append", required=True, metavar="KEY=KIND(…)", dest="fields",
        help="a field to vary: uniform(a,b), loguniform(a,b), int(a,b) or choice(a,b,…)",
    )  # fmt: skip
    search.add_argument(
        "--metric",
        choices=("val/top1", "val/top5", "val/loss"),
        default="val/top1",
        help="of the last epoch; default: val/top1",
    )
    search.add_argument(
        "--prune", action="store_true", help="stop a trial that is worse than half of the others were at its epoch"
    )
    verb("models", models_verb, "list the models of the catalogue; any timm name works too")
    verb("recipes", recipes_verb, "list the recipes that come with the package")
    verb("methods", methods_verb, "list pruning methods, criteria and data sources")
    runs = verb("runs", runs_verb, "list the runs of a folder with their state and result")
    runs.add_argument("folder", nargs="?", default="runs", metavar="FOLDER")
    runs.add_argument("--json", metavar="FILE", help="write every number there as well")
    return parser


def check_verb(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from vit_rsst import files
    from vit_rsst.recipe.loading import find, load

    recipe = load(find(arguments.recipe), arguments.overrides)
    as_json, picture = output_file(arguments.json), output_file(arguments.picture, ".svg")

    from vit_rsst.checks import checking
    from vit_rsst.checks.bench import Bench
    from vit_rsst.train import make_accelerator

    bench, verdicts = Bench.of(recipe, make_accelerator(recipe)), []
    try:
        for verdict in checking.check(bench):
            verdicts.append(verdict)
            print(checking.line(verdict), flush=True)
    finally:  # what was found so far
        leave(as_json, files.write_json, {"recipe": recipe.name, "checks": [asdict(verdict) for verdict in verdicts]})
    if picture and checking.draw_range_test(verdicts, recipe.optim.lr, picture):
        print(f"range test: {picture}")
    print(checking.conclude(verdicts))


def evaluate_verb(arguments: argparse.Namespace) -> None:
    from vit_rsst import files
    from vit_rsst.data.catalog import CATALOG
    from vit_rsst.errors import InputError, unknown

    if arguments.source not in (None, *CATALOG):
        raise InputError(f"--source: {unknown('source', arguments.source, CATALOG)}")
    as_json, as_csv = output_file(arguments.json), output_file(arguments.csv)

    from vit_rsst.evaluation.evaluate import evaluate, report_text, write_csv
    from vit_rsst.train import start_processes

    state = start_processes()
    a = arguments
    result = evaluate(a.what, a.split, state, a.data, a.source, a.batch)
    if state.is_main_process:
        leave(as_json, files.write_json, result)
        leave(as_csv, write_csv, result)
        print(report_text(result))
    state.destroy_process_group()


def predict_verb(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst import files
    from vit_rsst.evaluation.predict import predict, predictions_text

    output = output_file(arguments.json)
    result = predict(Path(arguments.what), [Path(image) for image in arguments.images], arguments.top)
    leave(output, files.write_json, result)
    print(predictions_text(result))


def analyze_verb(arguments: argparse.Namespace) -> None:
    from vit_rsst import files
    from vit_rsst.analysis.analyze import analyze, write_csv
    from vit_rsst.analysis.tables import analysis_text

    as_json, as_csv = output_file(arguments.json), output_file(arguments.csv)
    result = analyze(arguments.what, arguments.image_size, arguments.batch, not arguments.no_latency)
    leave(as_json, files.write_json, result)
    leave(as_csv, write_csv, result)
    print(analysis_text(result))


def export_verb(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst.export.exporting import export

    a = arguments
    print(export(Path(a.what), a.to, Path(a.folder), a.round_to, a.opset).text())


def push_verb(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst.export.push import push

    print(push(Path(arguments.what), arguments.repo, arguments.public, arguments.dry_run))


def report_verb(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst.report.reporting import report

    out = Path(arguments.out).expanduser() if arguments.out else None
    page = report([Path(run).expanduser() for run in arguments.runs], out, not arguments.no_latency)
    print(f"{page}\n{page.with_suffix('.md')}")


def study_verb(arguments: argparse.Namespace) -> None:
    from vit_rsst.experiments.study import run_study

    run_study(arguments)


def search_verb(arguments: argparse.Namespace) -> None:
    from vit_rsst.experiments.search import run_search

    run_search(arguments)


def models_verb(arguments: argparse.Namespace) -> None:
    from vit_rsst.analysis.subject import size_of
    from vit_rsst.models import zoo
    from vit_rsst.models.anatomy import prunable_weights
    from vit_rsst.models.catalog import CATALOG
    from vit_rsst.models.complexity import flops
    from vit_rsst.text import aligned

    lines = [("model", "parameters", "prunable", "MFLOPs", "px", "weights", "architecture")]
    for name, stock in CATALOG.items():
        net = zoo.create(*zoo.describe(name, {}, 10), device="meta")
        total, prunable = sum(p.numel() for p in net.parameters()), prunable_weights(net)
        published = "published" if stock.has_weights else "none"
        counted, px = f"{sum(w.numel() for w in prunable.values()):,}", size_of(net)
        cost = f"{flops(net, px) / 1e6:,.0f}"
        lines.append((name, f"{total:,}", counted, cost, str(px), published, stock.architecture))
    print(
        aligned(lines),
        "\n\nCounted with 10 classes; FLOPs of one image, two for each multiply-accumulate. Any other name of timm "
        "works too, with its arguments in model.args.",
    )


def recipes_verb(arguments: argparse.Namespace) -> None:
    from vit_rsst.recipe.loading import builtin_folder, builtin_recipes

    paths = {str(path.relative_to(builtin_folder()).with_suffix("")): path for path in builtin_recipes()}
    width = max(map(len, paths)) + 2
    for name, path in paths.items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:{width}}{first.lstrip('# ')}")


def methods_verb(arguments: argparse.Namespace) -> None:
    import sys

    import vit_rsst.pruning.methods  # noqa: F401 - registers them
    from vit_rsst.data.catalog import CATALOG
    from vit_rsst.pruning.criteria import CRITERIA
    from vit_rsst.pruning.patterns import GRANULARITIES
    from vit_rsst.pruning.plan import METHODS

    def about(name: str, part: object) -> str:
        text = sys.modules[part.__module__].__doc__ if isinstance(part, type) else part.__doc__
        return text.strip().splitlines()[0].removeprefix(f"{name}: ")

    for title, registry in (("method", METHODS), ("criterion", CRITERIA)):
        for name in registry:
            print(f"{title:13}{name:15}{about(name, registry[name])}")
    for name, what in GRANULARITIES.items():
        print(f"{'granularity':13}{name:15}{what}")
    for name, info in CATALOG.items():
        print(f"{'source':13}{name:15}{info.about}")


def runs_verb(arguments: argparse.Namespace) -> None:
    import datetime
    import shutil
    from pathlib import Path

    from vit_rsst import files
    from vit_rsst.errors import InputError
    from vit_rsst.report import listing

    folder, output = Path(arguments.folder).expanduser(), output_file(arguments.json)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give the output_dir of your runs.")
    items = [listing.listed(path, folder) for path in listing.find(folder)]
    leave(output, files.write_json, listing.as_data(items))
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal or "COLUMNS" in os.environ else None
    now = datetime.datetime.now(datetime.UTC)
    print(listing.table(items, now, width, listing.wants_color(is_terminal)) if items else f"no runs in {folder}")


if __name__ == "__main__":
    sys.exit(main())
