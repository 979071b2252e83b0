"""Reports: runs in every state, under any name, on one self-contained page; comparisons of several runs."""

import base64
import dataclasses
import html.parser
import json
import re
import socket
from pathlib import Path

import browser
import numpy as np
import pytest
import tiny

from vit_rsst.recipe import loading, strict_yaml
from vit_rsst.report import canvas, curves, document, fronts, history, story
from vit_rsst.report.compare import leader
from vit_rsst.report.document import Bullets, Document, Section, Table, breakable
from vit_rsst.report.findings import findings
from vit_rsst.report.fronts import Point, front
from vit_rsst.report.groups import grouped, shortened
from vit_rsst.report.pictures import PICTURES
from vit_rsst.text import width_of as columns_of
from vit_rsst.tickets import rounds

STEPS = 10


def make_run(
    folder: Path,
    name: str = "a run",
    method: str = "rsst",
    seed: int = 0,
    top1: float = 80.0,
    rounds: int = 3,
    state: str = "finished",
    density: float = 0.5,
    **status: object,
) -> Path:
    """A run folder without its tensors: two epochs per round, predictable numbers."""
    path = folder / name
    (path / "tickets").mkdir(parents=True)
    text = tiny.RECIPE.replace("name: rsst, remove_at: 0.8", f"name: {method}").replace(
        "name: tiny", f"name: {json.dumps(name)}"
    )
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    tree = loading.load(folder / "recipe.yaml", [f"seed={seed}"]).tree()
    (path / "recipe.yaml").write_text(strict_yaml.dump(tree), encoding="utf-8")
    step = 2 * rounds * STEPS
    found = {"state": state, "round": rounds - 1, "epoch": 2, "step": step, "exit_code": 0, "reason": "", **status}
    (path / "status.json").write_text(json.dumps(found), encoding="utf-8")
    events = []
    for epoch in range(2 * rounds):
        event = {"event": "epoch", "step": (epoch + 1) * STEPS, "round": epoch // 2, "epoch": epoch % 2 + 1}
        event |= {"train/loss": 2.0 / (epoch + 1), "val/loss": 2.1 / (epoch + 1), "train/lr": 1e-3}
        event |= {"train/top1": 70.0 + epoch, "val/top1": 69.0 + epoch, "prune/density": 1.0}
        events.append(event)
    lines = "".join(f"{json.dumps(event)}\n" for event in events)
    (path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    for round in range(rounds):
        part = density ** (round / max(rounds - 1, 1))
        row = {"round": round, "density_asked": part, "density": part, "val_top1": top1 - 1 - round, "val_top5": 99.0}
        row |= {"val_loss": 0.5, "test_top1": top1 - round, "test_loss": 0.6, "epochs": 2, "seconds": 60.0}
        row |= {"what_if_gap": None if round == 0 else 0.5, "ticket_bytes": 1000 * (rounds - round)}
        layers = {f"blocks.{i}.mlp.fc1.weight": {"elements": 10, "alive": 5, "density": part} for i in range(2)}
        report = {"row": row, "pruning": {"layers": layers, "units": {}}}
        (path / "tickets" / f"round_{round:02d}.json").write_text(json.dumps(report), encoding="utf-8")
    return path


class Page(html.parser.HTMLParser):
    """A page as a browser sees it."""

    VOID = ("meta", "br", "img", "link", "input", "wbr")

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.links.append(value)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.text).split())


def page(*argv: object) -> Page:
    assert tiny.command("report", *argv, "--no-latency") == 0
    out = Path(argv[argv.index("--out") + 1]) if "--out" in argv else Path(argv[0])
    found = Page(out / "report.html")
    assert all(link.startswith(("#", "data:image/")) for link in found.links)
    assert not {"script", "link", "iframe", "object", "base"} & set(found.tags)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A real run with figures that wrote its own report."""
    folder = tmp_path_factory.mktemp("reported")
    text = tiny.RECIPE.replace("figures: false", "figures: true")
    assert tiny.command("train", tiny.write_recipe(folder, text)) == 0
    return folder / "runs" / "tiny"


def test_a_run_writes_its_own_report(run):
    shown = Page(run / "report.html").shown
    row = history.read(run).rows[-1]
    assert f"reaches {row.test_top1:.2f} % test top-1" in shown
    assert (run / "report.md").read_text().startswith("# tiny (finished)\n")


def test_the_report_has_every_section(run, capsys):
    assert tiny.command("report", run, "--out", run.parent / "again") == 0
    found = Page(run.parent / "again" / "report.html")
    for title in ("Question", "Key findings", "Rounds", "Figures", "Classes", "Complexity", "Recipe",
                  "Data and environment", "Reproduce this run"):  # fmt: skip
        assert title in found.shown
    for text in (
        "Confusion matrix",
        "Attention maps",
        "latency at batch 1, ms",
        "scikit-learn digits",
        "vit-rsst evaluate",
    ):
        assert text in found.shown, text
    assert found.tags.count("img") == 9
    assert capsys.readouterr().out.splitlines()[-1].endswith("report.md")


def test_the_markdown_links_to_existing_figures(run):
    text = (run / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(links) == 9
    assert all((run / link).is_file() for link in links)
    assert "| round | density |" in text
    assert re.search(r"^\| 0 \| 1\.0000 \|", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"state": "running"}, "The run is in progress, last seen at round 2, epoch 2, step 60"),
        ({"state": "stopped", "exit_code": 75}, "The run stopped cleanly at round 2"),
        (
            {"state": "failed", "exit_code": 4, "reason": "the loss is <not> finite"},
            "The run failed at round 2, epoch 2, step 60: the loss is <not> finite",
        ),
    ],
)
def test_an_unfinished_run_is_reported_as_far_as_it_went(tmp_path, changes, expected):
    assert expected in page(make_run(tmp_path, **changes)).shown


def test_a_run_that_has_just_started_is_reported(tmp_path):
    path = make_run(tmp_path, state="running", rounds=1)
    (path / "metrics.jsonl").write_text("")
    (path / "tickets" / "round_00.json").unlink()
    assert "No epoch has finished yet" in page(path).shown
    (path / "recipe.yaml").unlink()
    assert "a run" in page(path).shown


@pytest.mark.parametrize("name", ["two words", "剪枝 实验", "<script>alert(1)</script>", "a&b|c`d*e_f#g\"'", "x" * 150])
def test_any_name_is_shown_verbatim(tmp_path, name):
    name = name.replace("/", "∕")  # no folder has it in its name
    path = make_run(tmp_path, name)
    found = page(path)
    assert name in found.shown
    assert found.tags.count("script") == 0
    text = (path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text.split("## Recipe")[0]


def test_text_that_looks_like_html_stays_text(tmp_path):
    path = make_run(tmp_path)
    evil = "<img src=http://x onerror=alert(1)>"
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "warning", "step": 3, "text": evil}) + "\n")
    scores = {"classes": [evil, "b|c"], "confusion": [[3, 2], [0, 1]], "ticket": evil}
    (path / "figures").mkdir()
    (path / "figures" / history.SCORES).write_text(json.dumps(scores))
    found = page(path)
    assert found.shown.count(evil) >= 3
    text = (path / "report.md").read_text(encoding="utf-8")
    assert "<img" not in text
    assert r"| b\|c |" in text


def test_a_failing_figure_does_not_break_the_report(tmp_path, monkeypatch):
    def broken(shown: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(curves, "DRAWINGS", [curves.Drawing("broken", "t", "c", broken), *curves.DRAWINGS])
    shown, failed = history.read(make_run(tmp_path)), []

    def guard(name: str, call: object) -> object:
        try:
            return call()
        except RuntimeError:
            failed.append(name)
            return None

    assert {image.name for image in story.images(shown, guard)} == {"curves", "rate_and_penalty", "accuracy_by_density",
                                                                 "layers"}  # fmt: skip
    assert failed == ["broken"]


def test_a_folder_that_is_not_a_run_or_is_given_twice_is_rejected(tmp_path, capsys):
    path = make_run(tmp_path)
    for argv, message in (
        ([tmp_path / "nothing"], "not a run folder"),
        ([path, path], "given twice"),
        ([path, "--out", path / "recipe.yaml"], "is a file; name a folder"),
    ):
        assert tiny.command("report", *argv) == 2
        assert message in capsys.readouterr().err


def test_pages_support_phones_print_and_dark_mode(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    for needed in ("width=device-width", "prefers-color-scheme: dark", "@media print", "overflow-x: auto"):
        assert needed in text
    assert canvas.INK not in text.split("</style>", 1)[1]


# -- in a browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    strange = make_run(folder, "<b>剪枝 & x" + "x" * 100, state="failed", exit_code=4, reason="<script>x()</script>")
    page(strange)
    page(*make_many(folder), "--out", folder / "compared")
    return {
        "comparison": folder / "compared" / "report.html",
        "failed run with a strange name": strange / "report.html",
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if browser.executable() is None:
        pytest.skip("Chromium is not installed")
    with browser.opened(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["run", "comparison", "failed run with a strange name"])
def test_a_page_fits_the_window_and_loads_nothing(run, pages, tab, kind, width, scheme):
    path = run / "report.html" if kind == "run" else pages[kind]
    tab.open(path, width, scheme)
    found = tab.value(browser.LAYOUT)
    assert found.pop("wide") <= 0
    assert not any(found.values()), found
    assert (tab.said, tab.asked) == ([], [path.as_uri()])
    ground = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_drawn_in_the_scheme_of_the_page(run, tab, scheme):
    tab.open(run / "report.html", 1280, scheme)
    shades = np.asarray(tab.picture("figure img").convert("L"))
    assert (shades[0, 0] > 128) == (scheme == "light"), "the figure is transparent"
    ink = shades < 80 if scheme == "light" else shades > 200
    assert 0.005 < ink.mean() < 0.2, "the text stands out"


def test_a_figure_in_print_is_black_on_white_whatever_the_scheme(run, tab):
    tab.open(run / "report.html", 1280, "dark")
    tab.call("Emulation.setEmulatedMedia", media="print")
    shades = np.asarray(tab.picture("figure img").convert("L"))
    assert shades[0, 0] > 240
    assert (shades < 80).mean() > 0.005


EVIL = [
    "<svg><script>alert(1)</script></svg>",
    '<svg onload="alert(1)"></svg>',
    '<svg><image xlink:href="http://x/y.png"/></svg>',
    '<svg><style>@import "http://x"</style></svg>',
]


def test_a_stored_figure_can_neither_run_nor_load_anything(tmp_path, tab):
    path = make_run(tmp_path)
    (path / "figures").mkdir()
    for picture, evil in zip(PICTURES, EVIL, strict=True):
        text = evil.replace(
            "<svg", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"', 1
        )
        (path / "figures" / f"{picture.name}.svg").write_text(text.replace("alert(1)", "console.log(1)"))
    assert page(path).tags.count("img") == 4 + len(EVIL)
    tab.open(path / "report.html", 1280, "light")
    assert (tab.said, tab.asked) == ([], [(path / "report.html").as_uri()])


def test_a_page_prints_black_on_white(run, tab):
    tab.open(run / "report.html", 1280, "dark")
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.value("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    pdf = base64.b64decode(tab.call("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6


# -- sentences


def said(path: Path) -> str:
    return "\n".join(findings(history.read(path), {}))


def test_findings_follow_from_the_numbers(tmp_path):
    shown = said(make_run(tmp_path, top1=80.0, rounds=3, density=0.25))
    assert "keeps 25.0% of the prunable weights and reaches 78.00 % test top-1, 2.00 points below" in shown
    assert (
        "Best ticket by validation: round 0 at density 1.00, with 79.00 % validation top-1 and 80.00 % test top-1."
        in shown
    )
    assert "cost 1.00 points of validation top-1 in total over 2 rounds; the largest gap is +0.50, in round 2" in shown
    assert "takes 1000 B, 0.33 × the ticket of round 0" in shown


def test_the_standard_error_is_binomial(tmp_path):
    path = make_run(tmp_path, top1=52.0)
    (path / "figures").mkdir()
    scores = {"classes": ["a", "b"], "confusion": [[50, 0], [49, 1]], "ticket": "t"}
    (path / "figures" / history.SCORES).write_text(json.dumps(scores))
    assert "One standard error on 100 test images is 5.00 points" in said(path)  # √(50 · 50 / 100)
    assert "Most frequent confusion: b predicted as a, 49 of 50 images" in said(path)


# -- comparisons


def make_many(folder: Path) -> list[Path]:
    """Two experiments of three seeds, and a third with a smaller budget."""
    paths = [make_run(folder, f"exp-imp-s{i}", "imp", i, 80.0 + 0.1 * i) for i in range(3)]
    paths += [make_run(folder, f"exp-rsst-s{i}", "rsst", i, 85.0 + 0.1 * i) for i in range(3)]
    return [*paths, make_run(folder, "exp-half", "rst", rounds=2, density=0.9, state="running", step=30)]


@pytest.fixture
def many(tmp_path) -> list[Path]:
    return make_many(tmp_path)


def test_runs_that_differ_only_in_the_seed_are_one_experiment(many):
    groups = grouped([history.read(path) for path in many])
    assert [(group.label, len(group.runs)) for group in groups] == [("imp", 3), ("rsst", 3), ("half", 1)]
    assert groups[0].mean == pytest.approx(78.1)
    assert groups[0].spread == pytest.approx(0.1)
    assert groups[2].spread is None
    assert groups[0].images == 60 * 32


def test_runs_that_start_from_dense_rounds_of_several_seeds_are_one_experiment(tmp_path):
    paths = []
    for seed in range(3):
        dense = make_run(tmp_path, f"dense-s{seed}", "dense", seed, rounds=1)
        ticket = dense / "tickets" / "round_00.safetensors"
        ticket.touch()
        for name, start in (("run", dense), ("ticket", ticket), ("other", f"/nowhere/{seed}")):
            path = make_run(tmp_path, f"{name}-s{seed}", "imp", seed)
            overrides = [f"model.start_from={start}"]
            (path / "recipe.yaml").write_text(
                strict_yaml.dump(loading.load(path / "recipe.yaml", overrides).tree()), encoding="utf-8"
            )
            paths.append(path)
    groups = grouped([history.read(path) for path in paths])
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("run", 3), ("ticket", 3), ("other-s0", 1), ("other-s1", 1), ("other-s2", 1),
    ]  # fmt: skip


def test_runs_that_name_each_other_are_compared(tmp_path):
    paths = [make_run(tmp_path, name, "imp") for name in ("dense", "b", "c")]
    for path, start in zip(paths, ("../b", "../dense", "../c"), strict=True):
        tree = loading.load(path / "recipe.yaml", ["train.distill.teacher=dense"]).tree()
        tree["model"]["start_from"] = str(path / start)
        (path / "recipe.yaml").write_text(strict_yaml.dump(tree), encoding="utf-8")
    assert len(grouped([history.read(path) for path in paths])) == 3


def test_steps_skipped_by_an_early_stop_are_not_in_the_budget(tmp_path):
    path = make_run(tmp_path)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["epoch"] == 1) + "\n")
    assert history.read(path).steps_taken == 30  # of 60: every round ended after its first epoch


def test_round_100_comes_after_round_99(tmp_path):
    (tmp_path / "tickets").mkdir()
    for round in (100, 9, 99):
        (tmp_path / "tickets" / f"round_{round:02d}.safetensors").touch()
    assert [path.stem for path in rounds.of_rounds(tmp_path, ".safetensors")] == ["round_09", "round_99", "round_100"]
    assert rounds.last_ticket(tmp_path).stem == "round_100"


def test_fields_and_paths_wrap_at_their_parts():
    assert breakable("a.b_c/d <e>. 0.5") == "a.<wbr>b_<wbr>c/<wbr>d &lt;e&gt;. 0.<wbr>5"


MANGLED = {
    "status.json": ['{"state": 5, "round": "x", "updated": 3}', "[1]", None],
    "environment.json": ['{"data": 3, "versions": [1], "command": "x", "commit": 5}', "[1]"],
    "recipe.yaml": ["- 1", "name: [", "name: 5", "name: x\npruning: hello\nmodel: 3\ntrain: null", None],
    "metrics.jsonl": [
        '{"event": "weights", "step": 10, "round": 0, "epoch": 1}\n',
        '{"event": "epoch", "step": 10, "prune/density": "x", "val/loss": "y"}\n',
        '{"event": "epoch", "step": 10, "val/top1": 5}\n', "[1]\n7\n", "\0\0"],
    "figures/test_outcomes.json": [
        '{"classes": ["a"], "confusion": [[1, 2], [3]]}', '{"classes": ["a", "b"]}', '{"confusion": [[0, 3], [3, 0]]}',
        '{"classes": ["a", "b"], "confusion": [[0, "3"], [3, 0]]}', '{"classes": 3, "confusion": [[0, 3], [3, 0]]}',
    ],
    "tickets/round_02.json": [
        json.dumps({"row": {name: 1 for name in rounds.COLUMNS} | {"what_if_gap": "x"}}),
        json.dumps({"row": {name: 0 for name in rounds.COLUMNS}}),
        '{"row": {"round": "a"}}', "{}", '{"row": 3, "pruning": null}'],
}  # fmt: skip


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in MANGLED.items() for text in texts])
def test_a_malformed_file_counts_as_missing(tmp_path, file, text, capsys):
    path = make_run(tmp_path / "runs")
    (path / "figures").mkdir()
    if text is None:
        (path / file).unlink()
    else:
        (path / file).write_text(text, encoding="utf-8")
    assert "Key findings" in page(path).shown
    capsys.readouterr()
    assert tiny.command("runs", tmp_path / "runs") == 0
    assert "a run" in capsys.readouterr().out
    assert "Comparison of 2 runs" in page(path, make_run(tmp_path, "b"), "--out", tmp_path / "out").shown


@pytest.mark.parametrize("pruning", [None, [], {"layers": None, "units": 3}, {"layers": {"a": 1}, "units": {"b": {}}}])
def test_a_malformed_round_report_counts_as_missing(tmp_path, pruning):
    path = make_run(tmp_path)
    report = rounds.of_rounds(path, ".json")[-1]
    report.write_text(json.dumps({**json.loads(report.read_text()), "pruning": pruning}))
    shown = history.read(path)
    assert len(shown.rows) == len(shown.pruning) == 3
    assert shown.pruning[-1] == {}
    assert "Key findings" in page(path).shown


def test_a_run_without_readable_files_is_listed(tmp_path, capsys):
    path = make_run(tmp_path / "runs")
    (path / "status.json").unlink()
    (path / "recipe.yaml").write_text("- 1")
    make_run(tmp_path / "runs", "sound")
    (tmp_path / "runs" / "recipe.yaml").write_text("name: of-the-next-run")  # in the folder of the runs: no run itself
    assert tiny.command("runs", tmp_path / "runs") == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["a run", "sound"]


def test_a_killed_run_is_shown_as_lost(tmp_path):
    path = make_run(tmp_path, state="running")
    (path / "environment.json").write_text(json.dumps({"host": socket.gethostname()}))
    (path / ".lock").touch()
    shown = page(path).shown
    assert "lost" in shown.split("How accurate")[0]
    assert "no process is working on it" in shown
    assert f"{path.name} (lost)" in page(path, make_run(tmp_path, "b"), "--out", tmp_path / "out").shown


def test_a_comparison_draws_its_conclusions(many, tmp_path):
    shown = page(*many, "--out", tmp_path / "out").shown
    assert "Comparison of 7 runs" in shown
    assert "At density 0.50, rsst leads with 83.10 %, 5.00 points ahead of imp over 3 seeds: above noise" in shown
    assert "no fair comparison: half (0.67) of the largest, 1,920 images" in shown
    assert "≠ 0.67" in shown
    assert "Unfinished runs: exp-half (running)" in shown
    assert "Final densities differ (0.90, 0.50)" in shown
    assert "imp: removal alone cost 1.00 points in total over 2 rounds" in shown
    assert "pruning.method.name" in shown
    assert (tmp_path / "out" / "report.md").is_file()
    assert Page(tmp_path / "out" / "report.html").tags.count("img") == 2


def test_scores_on_different_splits_are_never_compared(tmp_path):
    paths = [make_run(tmp_path, "a", "imp", top1=80.0), make_run(tmp_path, "b", "rsst", top1=80.0)]
    report = rounds.of_rounds(paths[1], ".json")[-1]
    found = json.loads(report.read_text())
    found["row"]["test_top1"] = None
    found["row"]["val_top1"] = 99.0  # `a` has its test score, 2 points below its validation score
    report.write_text(json.dumps(found))
    groups = grouped([history.read(path) for path in paths])
    last = groups[0].runs[0].rows[-1]
    assert last.test_top1 not in (None, last.val_top1)
    assert [group.split for group in groups] == ["validation"] * 2
    assert [group.mean for group in groups] == [last.val_top1, 99.0]
    shown = page(*paths, "--out", tmp_path / "out").shown
    assert f"b leads with 99.00 %, {99.0 - last.val_top1:.2f} points ahead of a" in shown
    assert "Some tickets have no test score yet, so all are compared on validation." in shown
    first = history.read(paths[1]).rows[0]
    assert f"({first.val_top1:.2f} %)" in page(paths[1]).shown  # one run alone, killed while its tickets were scored


def test_a_small_lead_with_one_seed_is_a_tie(tmp_path):
    paths = [make_run(tmp_path, "a", "imp", top1=80.0), make_run(tmp_path, "b", "rsst", top1=80.9)]
    [sentence] = leader(sorted(grouped([history.read(path) for path in paths]), key=lambda g: -g.mean))
    assert "b leads" in sentence
    assert "over one seed: within noise (1.00 points), so far a tie" in sentence


@pytest.mark.parametrize(("names", "columns"), [(("a", "b", "c"), 2), (("a" * 27, "b" * 3, "剪枝" * 60), 1)])
def test_long_names_fit_the_legend(tmp_path, names, columns):
    groups = grouped([history.read(make_run(tmp_path))])
    groups = [dataclasses.replace(groups[0], label=name) for name in names]
    with canvas.drawing():
        drawn = fronts.curves(groups)
        drawn.draw_without_rendering()
        [legend] = drawn.legends
        box = legend.get_window_extent()
    assert legend._ncols == columns
    assert box.x1 <= drawn.bbox.x1
    assert box.height < 0.3 * drawn.bbox.height
    assert [columns_of(text.get_text()) <= 56 for text in legend.get_texts()] == [True] * len(groups)


def test_the_front_is_pareto_optimal():
    points = [
        Point(0.5, 80, 0),
        Point(1.0, 80, 0),
        Point(0.1, 70, 1),
        Point(0.2, 70, 0),
        Point(0.1, 60, 1),
        Point(2, 81, 2),
    ]
    assert [(p.x, p.y) for p in front(points)] == [(0.1, 70), (0.5, 80), (2, 81)]
    assert front([]) == []


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["cifar-imp", "cifar-rsst"], ["imp", "rsst"]),
        (["cifar", "cifar-rsst"], ["cifar", "cifar-rsst"]),
        (["a", "a"], ["a (1)", "a (2)"]),
        (["剪枝 甲", "剪枝 乙"], ["甲", "乙"]),
    ],
)
def test_labels_drop_their_common_prefix(labels, expected):
    assert shortened(labels) == expected


# -- the two formats


def test_both_formats_hold_the_same_blocks():
    nasty = "a<b> & `c` | *d*"
    shown = Document("t", "", "l", [Section("S", [Bullets([nasty]), Table(("h", "k"), [(nasty, "1")], "n")])])
    found = html.unescape(re.sub(r"<[^>]*>", "", document.as_html(shown)))
    assert found.count(nasty) == 2
    text = document.as_markdown(shown)
    assert r"- a&lt;b&gt; &amp; \`c\` \| \*d\*" in text
    assert r"| a&lt;b&gt; &amp; \`c\` \| \*d\* | 1 |" in text
    assert "| --- | ---: |" in text


def test_code_with_backticks_gets_a_longer_fence():
    shown = Document("t", "", "l", [Section("S", [document.Code("```\ncode")])])
    assert "````\n```\ncode\n````" in document.as_markdown(shown)
