"""The verbs of `vit-rsst` and their options, in the order of a project: train, look, use, repeat, look things up."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence

from vit_rsst import __version__
from vit_rsst.arguments import Parser, at_least, one_of, share, share_or_by_kind, shares
from vit_rsst.cli import verbs
from vit_rsst.errors import unknown
from vit_rsst.train import add_arguments, guarded, train

RECIPE = "recipe file, or the name of a recipe shipped with the package"
OVERRIDES = "recipe fields to override"
SPLITS = ("test", "val", "train")
TARGETS = ("slim", "timm", "transformers", "dense", "onnx", "torch")
PRECISIONS = {
    "fp16": "onnx: weights and activations in float16",
    "bf16": "onnx: weights and activations in bfloat16",
    "int8": "onnx: weights and inputs of layers in int8, calibrated on training images",
}
MEASURES = ("sparsity", "flops", "parameters")
METRICS = ("val/top1", "val/top5", "val/loss")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the verb; returns the exit code."""

    def run() -> None:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        arguments.verb(arguments)

    return guarded(run)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the function of the verb as `verb`.

    Raises:
        InputError: they are not understood.
    """
    parser, names = make_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        parser.error(unknown("verb", argv[0], names))
    return parser.parse(argv)


def make_parser() -> tuple[Parser, Collection[str]]:
    """The parser, and the names of the verbs."""
    parser = Parser(
        prog="vit-rsst",
        description="Train and prune Vision Transformers. `vit-rsst VERB --help` shows the options of a verb.",
        epilog="Exit codes: 0 success, 2 invalid input, 3 missing requirement, 4 training diverged, 5 damaged "
        "checkpoint or ticket, 6 check failed, 75 stopped cleanly (run the same command to resume).",
    )
    parser.add_argument("--version", action="version", version=f"vit-rsst {__version__}")
    added = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=Parser)

    def verb(name: str, function: Callable[[argparse.Namespace], None], about: str) -> Parser:
        of_verb = added.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        of_verb.set_defaults(verb=function, parser=of_verb)
        return of_verb

    add_arguments(verb("train", train, "train and prune from a recipe, in one process"))
    add_check(verb("check", verbs.check, "run the checklist before a long run: data, model, learning rate, cost"))
    add_runs(verb("runs", verbs.runs, "list runs with their state and results"))
    add_report(verb("report", verbs.report, "write an HTML and Markdown report of one run, or compare several"))
    add_evaluate(verb("evaluate", verbs.evaluate, "score a ticket, a run's last ticket or an export on a split"))
    add_predict(verb("predict", verbs.predict, "classify image files with a ticket or a run's last ticket"))
    add_analyze(verb("analyze", verbs.analyze, "count and measure models, recipes and tickets side by side"))
    add_export(verb("export", verbs.export, "export a ticket, or a run's last ticket, for other libraries"))
    add_prune(verb("prune", verbs.prune, "prune a trained model once, without training, and score it before and after"))
    add_push(verb("push", verbs.push, "upload an export, or a ticket with a model card, to the Hub"))
    add_study(verb("study", verbs.study, "train a grid of recipes from a study file and compare its arms"))
    add_search(verb("search", verbs.search, "tune recipe fields on a validation metric, trial by trial"))
    verb("recipes", verbs.recipes, "list the recipes shipped with the package")
    verb("models", verbs.models, "list the built-in models; any timm name works too")
    verb("methods", verbs.methods, "list pruning methods, criteria, granularities and data sources")
    return parser, added.choices


def add_check(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE)
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=(), help=OVERRIDES)
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE, gradient norms included")
    parser.add_argument("--picture", metavar="FILE.svg", help="plot the learning-rate range test")


def add_runs(parser: Parser) -> None:
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="default: runs")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")


def add_report(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, finished or not")
    parser.add_argument("--out", metavar="DIR", help="default: the run folder; ./comparison for several runs")
    parser.add_argument("--no-latency", action="store_true", help="skip latency")


def add_evaluate(parser: Parser) -> None:
    parser.add_argument(
        "what",
        metavar="RUN|TICKET|MODEL",
        help="run folder, ticket, exported folder, or timm model with published weights",
    )
    parser.add_argument("--split", type=one_of("split", SPLITS), default="test", help="test (default), val or train")
    parser.add_argument(
        "--data", metavar="PATH", help="dataset folder, if it has moved, or a folder of images to score"
    )
    parser.add_argument(
        "--classes-by", type=one_of("way", ("name", "position")), default="name",
        help="how the classes of the dataset are matched with the model's: name (default) or position",
    )  # fmt: skip
    parser.add_argument("--source", metavar="NAME", help="data source, if the model does not name one; see methods")
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N", help="images per forward pass (default 500, on a CPU 128)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    parser.add_argument("--csv", metavar="FILE", help="write one row per class to FILE")


def add_predict(parser: Parser) -> None:
    parser.add_argument("what", metavar="RUN|TICKET", help="run folder, ticket or exported slim folder")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files or folders of them")
    parser.add_argument("--top", type=at_least(1), default=5, metavar="N", help="classes per image (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write the predictions to FILE")


def add_analyze(parser: Parser) -> None:
    parser.add_argument(
        "what", metavar="WHAT", nargs="+", help="model, recipe, ticket, run folder (last ticket) or slim folder"
    )
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE, layer by layer")
    parser.add_argument("--csv", metavar="FILE", help="write one row per WHAT to FILE")
    parser.add_argument("--no-latency", action="store_true", help="count only; skip timing and memory")
    parser.add_argument(
        "--batch", type=at_least(1), nargs="+", default=[1, 8, 64], metavar="N", help="batch sizes (default 1 8 64)"
    )
    parser.add_argument("--image-size", type=at_least(1), metavar="N", help="image side in px (default: the model's)")


def add_export(parser: Parser) -> None:
    parser.add_argument("what", metavar="TICKET|RUN", help="ticket, run folder or slim folder")
    parser.add_argument("--to", required=True, type=one_of("format", TARGETS), metavar="FORMAT", help=_listed(TARGETS))
    parser.add_argument("folder", metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--round-to", type=at_least(1), metavar="N", help="slim, onnx, torch: make widths multiples of N (default 1)"
    )
    parser.add_argument("--opset", type=at_least(1), metavar="N", help="onnx: operator set (default: torch's)")
    precisions = parser.add_mutually_exclusive_group()
    for name, how in PRECISIONS.items():
        precisions.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=how)
        parser.known_options.append(f"--{name}")
    parser.add_argument(
        "--int8-keep", action="append", default=[], metavar="GLOB", help="int8: layers that stay in float32; repeatable"
    )
    parser.add_argument("--data", metavar="PATH", help="int8: dataset folder for calibration, if it has moved")
    parser.add_argument(
        "--semi-structured", action="store_true", help="torch: 2:4 layers in the compressed form of the GPU, in float16"
    )


def add_prune(parser: Parser) -> None:
    parser.add_argument(
        "what",
        metavar="MODEL|TICKET|RUN",
        help="ticket, run folder, exported folder, or timm model with published weights",
    )
    parser.add_argument("folder", metavar="DIR", help="new or empty folder for ticket, slim model and results")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument(
        "--sparsity",
        type=share_or_by_kind,
        metavar="S",
        help="share of the prunable weights to remove, or head=S,neuron=S",
    )
    how_much.add_argument("--flops", type=share, metavar="F", help="share of the FLOPs to leave, by removing units")
    how_much.add_argument("--parameters", type=share, metavar="P", help="share of the parameters to leave, likewise")
    how_much.add_argument(
        "--sweep",
        type=shares,
        metavar="A,B,…",
        help="several of them, mildest first: a ticket each, a table and a figure",
    )
    parser.known_options += ["--sparsity", "--flops", "--parameters", "--sweep"]
    parser.add_argument(
        "--sweep-by", type=one_of("measure", MEASURES), default="sparsity", metavar="WHAT",
        help=f"what the numbers of --sweep are: {_listed(MEASURES)} (default sparsity)",
    )  # fmt: skip
    parser.add_argument(
        "--granularity", default="element", metavar="UNIT",
        help="element (default), head, neuron, head+neuron, channel, or N:M, such as 2:4, which says how much leaves",
    )  # fmt: skip
    parser.add_argument("--criterion", metavar="NAME", help="how they are ranked (default magnitude); see methods")
    parser.add_argument("--scope", metavar="NAME", help="which compete: global, layer, isomorphic or erk")
    parser.add_argument("--min-neurons", type=at_least(1), metavar="N", help="kept in every MLP (default 8)")
    parser.add_argument("--max-layer-sparsity", type=share, metavar="S", help="of every layer (default 0.99)")
    parser.add_argument(
        "--compensate", default="none", metavar="HOW",
        help="none (default), or least_squares: what stays in a layer is fitted to what the layer computed before",
    )  # fmt: skip
    parser.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="weights to prune as well; repeatable"
    )
    parser.add_argument(
        "--protect", action="append", default=[], metavar="GLOB", help="weights to leave whole; repeatable"
    )
    parser.add_argument(
        "--calibration-images", type=at_least(1), metavar="N",
        help="training images, for compensation and criteria that need them (default 512)",
    )  # fmt: skip
    parser.add_argument("--source", metavar="NAME", help="data source, if the model does not name one; see methods")
    parser.add_argument("--data", metavar="PATH", help="dataset folder, if it has moved")
    parser.add_argument(
        "--classes-by", type=one_of("way", ("name", "position")), default="name",
        help="how the classes of the dataset are matched with the model's: name (default) or position",
    )  # fmt: skip
    parser.add_argument(
        "--split", type=one_of("split", SPLITS), default="test", help="scored: test (default), val or train"
    )
    parser.add_argument("--no-evaluate", action="store_true", help="do not score the model before and after")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done and the memory for it, and exit"
    )
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")


def add_push(parser: Parser) -> None:
    parser.add_argument("what", metavar="TICKET|FOLDER", help="ticket or exported folder")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME of the repository; created if missing")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="list the files to upload and exit")


def add_study(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="study file, such as those in scripts/studies/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=(), help=f"{OVERRIDES}, in all runs")
    parser.add_argument(
        "--jobs", type=at_least(1), default=1, metavar="N", help="runs in parallel; they share the cores (default 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs with their epochs and time, and exit")
    parser.add_argument("--csv", metavar="FILE", help="write one row per run to FILE")
    parser.add_argument("--markdown", metavar="FILE", help="write the table of arms to FILE")


def add_search(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE)
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=(), help=f"{OVERRIDES}, in all trials")
    parser.add_argument(
        "--trials", type=at_least(1), required=True, metavar="N", help="total trials, earlier ones included"
    )
    parser.add_argument(
        "--field",
        action="append",
        required=True,
        metavar="KEY=KIND(…)",
        dest="fields",
        help="field to vary: uniform(a,b), loguniform(a,b), int(a,b) or choice(a,b,…)",
    )
    parser.add_argument(
        "--metric",
        type=one_of("metric", METRICS),
        default="val/top1",
        help=f"{_listed(METRICS)}, after the last epoch (default val/top1)",
    )
    parser.add_argument(
        "--prune", action="store_true", help="stop trials that fall behind the median of the others at the same epoch"
    )


def _listed(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
