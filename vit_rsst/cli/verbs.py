"""What each verb of `vit-rsst` does, given its arguments. What a verb needs is imported inside it: help stays quick."""

import argparse
import sys
from collections.abc import Callable

from vit_rsst.files import output_file, write_result


def check(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from vit_rsst import files
    from vit_rsst.recipe.loading import find, load

    recipe = load(find(arguments.recipe), arguments.overrides)
    as_json, picture = output_file(arguments.json), output_file(arguments.picture, ".svg")

    from vit_rsst.checks import checking
    from vit_rsst.checks.bench import Bench
    from vit_rsst.train import make_accelerator

    accelerator = make_accelerator(recipe)
    is_main = accelerator.is_main_process
    bench, verdicts = Bench.of(recipe, accelerator), []
    if is_main:
        print("\n".join(bench.told), file=sys.stderr)
    try:
        for verdict in checking.check(bench):
            verdicts.append(verdict)
            if is_main:
                print(checking.line(verdict), flush=True)
    finally:  # keep the verdicts so far
        if is_main:
            write_result(
                as_json, files.write_json, {"recipe": recipe.name, "checks": [asdict(verdict) for verdict in verdicts]}
            )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if not is_main:
        return
    if picture and checking.draw_range_test(verdicts, recipe.optim.lr, picture):
        print(f"range test: {picture}")
    print(checking.conclude(verdicts))


def evaluate(arguments: argparse.Namespace) -> None:
    from vit_rsst import files

    _check_source(arguments.source)
    as_json, as_csv = output_file(arguments.json), output_file(arguments.csv)

    from vit_rsst.evaluation import evaluate as evaluation
    from vit_rsst.train import start_processes

    state = start_processes()
    a = arguments
    result = evaluation.evaluate(a.what, a.split, state, a.data, a.source, a.batch, a.classes_by == "position")
    if state.is_main_process:
        write_result(as_json, files.write_json, result)
        write_result(as_csv, evaluation.write_csv, result)
        print(evaluation.report_text(result))
    state.destroy_process_group()


def predict(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst import files
    from vit_rsst.evaluation import predict as prediction

    output = output_file(arguments.json)
    result = prediction.predict(Path(arguments.what), [Path(image) for image in arguments.images], arguments.top)
    write_result(output, files.write_json, result)
    print(prediction.predictions_text(result))
    if skipped := prediction.skipped_text(result):
        print(skipped, file=sys.stderr)


def analyze(arguments: argparse.Namespace) -> None:
    from vit_rsst import files
    from vit_rsst.analysis import analyze as analysis
    from vit_rsst.analysis.tables import analysis_text

    as_json, as_csv = output_file(arguments.json), output_file(arguments.csv)
    result = analysis.analyze(arguments.what, arguments.image_size, arguments.batch, not arguments.no_latency)
    write_result(as_json, files.write_json, result)
    write_result(as_csv, analysis.write_csv, result)
    print(analysis_text(result))


def export(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst.export import exporting

    a = arguments
    options = {"round_to": a.round_to, "opset": a.opset, "precision": a.precision}
    options |= {"int8_keep": a.int8_keep, "data": a.data, "semi_structured": a.semi_structured}
    print(exporting.export(Path(a.what), a.to, Path(a.folder), **options).text())


def prune(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst import files
    from vit_rsst.errors import InputError
    from vit_rsst.library import after_training, after_training_text
    from vit_rsst.library.after_training import Asked, Goal
    from vit_rsst.pruning.patterns import pattern
    from vit_rsst.train import start_processes

    a, as_json = arguments, output_file(arguments.json)
    _check_source(a.source)
    named = [(of, getattr(a, of)) for of in ("sparsity", "flops", "parameters") if getattr(a, of) is not None]
    goals = [Goal(a.sweep_by, value) for value in a.sweep or ()] or [Goal(*given) for given in named]
    if a.sweep_by != "sparsity" and not a.sweep:
        raise InputError("--sweep-by: has no effect without --sweep; omit it.")
    if a.sweep and a.sweep != sorted(set(a.sweep), reverse=a.sweep_by != "sparsity"):
        way = "rise" if a.sweep_by == "sparsity" else "fall"
        raise InputError(f"--sweep: {', '.join(map(str, a.sweep))} of {a.sweep_by} does not {way} from point to point.")
    if not goals and pattern(a.granularity) is None:
        raise InputError(
            "prune: how much is to leave? Set --sparsity, --flops, --parameters or --sweep, or a --granularity of N:M."
        )
    words = {name: getattr(a, name) for name in ("granularity", "criterion", "scope", "compensate")}
    words |= {name: getattr(a, name) for name in ("min_neurons", "max_layer_sparsity", "include", "protect")}
    asked = Asked(
        a.what, Path(a.folder).expanduser(), goals or [Goal()], words, a.calibration_images,
        None if a.no_evaluate else a.split, a.source, a.data, a.classes_by == "position", bool(a.sweep),
    )  # fmt: skip
    state = start_processes()
    if state.num_processes > 1:
        raise InputError("prune: takes one process; start it without accelerate launch.")
    prepared = after_training.prepare(asked, state.device)
    if a.dry_run:
        print(after_training_text.plan_text(prepared))
        return
    result = after_training.run(prepared)
    write_result(as_json, files.write_json, result)
    print(after_training_text.result_text(prepared, result))


def _check_source(source: str | None) -> None:
    from vit_rsst.data.catalog import CATALOG
    from vit_rsst.errors import InputError, unknown

    if source not in (None, *CATALOG):
        raise InputError(f"--source: {unknown('source', source, CATALOG)}")


def push(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst.export import push as uploading

    print(uploading.push(Path(arguments.what), arguments.repo, arguments.public, arguments.dry_run))


def report(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from vit_rsst.report import reporting

    out = Path(arguments.out).expanduser() if arguments.out else None
    page = reporting.report([Path(run).expanduser() for run in arguments.runs], out, not arguments.no_latency)
    print(f"{page}\n{page.with_suffix('.md')}")


def study(arguments: argparse.Namespace) -> None:
    from vit_rsst.experiments.study import run_study

    run_study(arguments)


def search(arguments: argparse.Namespace) -> None:
    from vit_rsst.experiments.search import run_search

    run_search(arguments)


def models(arguments: argparse.Namespace) -> None:
    from vit_rsst.models import zoo
    from vit_rsst.models.anatomy import prunable_weights
    from vit_rsst.models.catalog import CATALOG
    from vit_rsst.models.complexity import flops, size_of
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
        aligned(lines, num_left=1),
        "\n\nFor 10 classes and one image; a multiply-accumulate is two FLOPs. Any other timm model works too; its "
        "arguments go into model.args.",
    )


def recipes(arguments: argparse.Namespace) -> None:
    from vit_rsst.recipe.loading import builtin_folder, builtin_recipes
    from vit_rsst.text import aligned

    lines = []
    for path in builtin_recipes():
        about = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append((str(path.relative_to(builtin_folder()).with_suffix("")), about))
    print(aligned(lines, num_left=2))


def methods(arguments: argparse.Namespace) -> None:
    import vit_rsst.pruning.methods  # noqa: F401 - registers them
    from vit_rsst.data.catalog import CATALOG
    from vit_rsst.pruning.criteria import CRITERIA
    from vit_rsst.pruning.patterns import GRANULARITIES
    from vit_rsst.pruning.plan import METHODS

    def about(name: str, part: type | Callable) -> str:
        text = (sys.modules[part.__module__] if isinstance(part, type) else part).__doc__ or ""
        return text.strip().splitlines()[0].removeprefix(f"{name}: ")

    for title, registry in (("method", METHODS), ("criterion", CRITERIA)):
        for name in registry:
            print(f"{title:13}{name:15}{about(name, registry[name])}")
    for name, what in GRANULARITIES.items():
        print(f"{'granularity':13}{name:15}{what}")
    for name, info in CATALOG.items():
        print(f"{'source':13}{name:15}{info.about}")


def runs(arguments: argparse.Namespace) -> None:
    import datetime
    from pathlib import Path

    from vit_rsst import files
    from vit_rsst.errors import InputError
    from vit_rsst.report import listing
    from vit_rsst.text import terminal_width

    folder, output = Path(arguments.folder).expanduser(), output_file(arguments.json)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the output_dir of your runs.")
    items = [listing.listed(path, folder) for path in listing.find(folder)]
    write_result(output, files.write_json, listing.as_data(items))
    now, is_colored = datetime.datetime.now(datetime.UTC), listing.wants_color(sys.stdout.isatty())
    print(listing.table(items, now, terminal_width(), is_colored) if items else f"no runs in {folder}")
