"""`vit-rsst prune`: the library's removal from the command line, with scores, tickets, slim models and sweeps."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vit_rsst
from vit_rsst import cli
from vit_rsst.assembly.fitting import fit_needs
from vit_rsst.data.images import ImageData
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.data.transforms import normalize
from vit_rsst.models import zoo
from vit_rsst.seeds import derived_seed
from vit_rsst.text import size
from vit_rsst.tickets import ticket_file

DIGITS = DataOptions("digits")
ARGS = {**tiny.MODEL_ARGS, "patch_size": 4}
DATA = {"source": "digits", "classes": [str(digit) for digit in range(10)]}
SHOWN = (DIGITS.info.mean, DIGITS.info.std)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """dense.safetensors: a model that has learnt to tell most digits apart; and what is made of it."""
    place, split = tmp_path_factory.mktemp("pruned"), open_data(DIGITS, 0).train
    torch.manual_seed(0)
    net = zoo.create(*zoo.describe("vit_tiny", ARGS, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    for _ in range(60):
        rows = torch.randint(len(split), (96,))
        F.cross_entropy(net(normalize(split.images[rows], *SHOWN)), split.labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    vit_rsst.save(net, place / "dense.safetensors", name="vit_tiny", args=ARGS, data=DATA)
    return place


@pytest.fixture(scope="module")
def sweep(folder) -> Path:
    argv = ("--sweep", "0.25,0.5,0.6", "--granularity", "head+neuron", *LEAST_SQUARES, "--criterion", "activation_l2")
    return pruned(folder / "dense.safetensors", folder / "sweep", *argv)


LEAST_SQUARES = ("--compensate", "least_squares", "--calibration-images", 200)


def pruned(what: Path, out: Path, *argv: object) -> Path:
    assert tiny.command("prune", what, out, *argv) == 0
    return out


def result_of(out: Path) -> dict:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def calibration(number: int = 200) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """The images that the command takes, in its batches."""
    found = open_data(DIGITS, 0).balanced("train", number, derived_seed(0, "calibration"))
    parts = zip(normalize(found.images, *SHOWN).split(128), found.labels.split(128), strict=True)
    return lambda parts=list(parts): iter(parts)


def same(one: Path, two: Path | nn.Module) -> bool:
    """Whether tickets, or a ticket and a model, hold the same tensors bit for bit."""
    theirs = two.state_dict() if isinstance(two, nn.Module) else ticket_file.load(two).state
    ours = ticket_file.load(one).state
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--sparsity", 0.6, *LEAST_SQUARES), {"sparsity": 0.6, "compensate": "least_squares"}),
        (("--granularity", "2:4", *LEAST_SQUARES), {"granularity": "2:4", "compensate": "least_squares"}),
        (("--sparsity", 0.4, "--protect", "*.qkv.*"), {"sparsity": 0.4, "protect": ["*.qkv.*"]}),
        (
            ("--flops", 0.7, "--granularity", "head+neuron", "--criterion", "taylor", *LEAST_SQUARES),
            {
                "budget": {"flops": 0.7}, "granularity": "head+neuron", "criterion": "taylor",
                "compensate": "least_squares",
            },
        ),
        (
            ("--sparsity", "head=0.4,neuron=0.6", "--granularity", "head+neuron", "--criterion", "random"),
            {"sparsity": {"head": 0.4, "neuron": 0.6}, "granularity": "head+neuron", "criterion": "random"},
        ),
    ],
)  # fmt: skip
def test_the_command_removes_what_the_library_removes_bit_for_bit(folder, tmp_path, argv, words):
    out = pruned(folder / "dense.safetensors", tmp_path / "out", *argv)
    needs = "compensate" in words or words.get("criterion") == "taylor"
    net = vit_rsst.load(folder / "dense.safetensors")
    found = vit_rsst.prune(net, **words, calibration=calibration() if needs else None)
    assert same(out / "ticket.safetensors", net)
    mask = ticket_file.load(out / "ticket.safetensors").mask
    assert all(torch.equal(mask[name], found.mask[name]) for name in {*mask, *found.mask})
    assert result_of(out)["points"][0]["density"] == found.density


def test_every_point_of_a_sweep_is_what_a_call_of_its_own_gives(folder, sweep, tmp_path):
    points = result_of(sweep)["points"]
    assert [point["final_sparsity"] for point in points] == [0.25, 0.5, 0.6]
    for sparsity, point in ((0.5, points[1]), (0.6, points[2])):  # each follows another
        argv = ("--granularity", "head+neuron", *LEAST_SQUARES, "--criterion", "activation_l2")
        alone = pruned(folder / "dense.safetensors", tmp_path / str(sparsity), "--sparsity", sparsity, *argv)
        assert same(alone / "ticket.safetensors", Path(point["ticket"]))
        [only] = result_of(alone)["points"]
        assert [only[key] for key in ("top1", "loss", "flops")] == [point[key] for key in ("top1", "loss", "flops")]
    assert len({point["flops"]["slim"] for point in points}) == 3
    assert (sweep / "front.svg").read_text(encoding="utf-8").count(">0.") >= 3  # labels of the points


def test_what_is_said_of_a_ticket_is_what_evaluate_finds(folder, sweep, tmp_path):
    result = result_of(sweep)
    first, last = result["points"][0], result["points"][-1]
    files = {folder / "dense.safetensors": result["dense"], first["ticket"]: first, last["slim"]: last}
    for file, said in files.items():
        assert tiny.command("evaluate", file, "--json", tmp_path / "scores.json") == 0
        scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
        assert scores["top1"] == said["top1"]
        assert scores["samples"] == said["samples"] == 360
        assert scores["loss"] == pytest.approx(said["loss"], rel=1e-5)
    assert result["dense"]["top1"] > 30.0


def test_the_slim_model_has_the_logits_of_its_ticket_and_fewer_weights(sweep):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for point in result_of(sweep)["points"]:
        ticket, small = vit_rsst.load(point["ticket"]), vit_rsst.load(point["slim"])
        with torch.no_grad():
            torch.testing.assert_close(small(images), ticket(images), rtol=1e-4, atol=1e-4)
        assert sum(p.numel() for p in small.parameters()) == point["parameters"]["slim"]
        assert point["parameters"]["slim"] < point["parameters"]["total"]
        assert f"{point['top1']:.2f}" in (Path(point["slim"]) / "README.md").read_text(encoding="utf-8")


@torch.no_grad()
def error(point: dict, folder: Path) -> float:
    """Of the logits of a ticket on test images, against those of the dense model."""
    images = normalize(open_data(DIGITS, 0).test.images, *SHOWN)
    found, dense = (vit_rsst.load(path)(images) for path in (point["ticket"], folder / "dense.safetensors"))
    return float((found - dense).square().sum())


def test_a_fit_gives_back_accuracy_and_the_table_says_what_was_done(folder, tmp_path, capsys):
    words = ("--sparsity", 0.7, "--json", tmp_path / "all.json")
    plain = result_of(pruned(folder / "dense.safetensors", tmp_path / "plain", *words))
    capsys.readouterr()
    out = pruned(folder / "dense.safetensors", tmp_path / "fitted", *words, *LEAST_SQUARES)
    fitted, shown = result_of(out), capsys.readouterr().out
    assert error(fitted["points"][0], folder) < 0.7 * error(plain["points"][0], folder)
    assert json.loads((tmp_path / "all.json").read_text(encoding="utf-8")) == fitted
    before, [after] = fitted["dense"], fitted["points"]
    assert f"{before['top1']:.2f} → {after['top1']:.2f}" in shown
    heads, dense, row = (line.split() for line in shown.splitlines()[1:4])
    assert heads == ["density", "top-1", "MFLOPs", "parameters", "seconds"]
    assert dense[:3] == ["dense", "1.0000", f"{before['top1']:.2f}"]
    assert row[:3] == ["pruned", f"{after['density']:.4f}", f"{after['top1']:.2f}"]
    assert row[4] == f"{after['parameters']['alive']:,}"
    net = vit_rsst.load(out / "ticket.safetensors")
    assert after["parameters"]["alive"] == sum(p.numel() for p in net.parameters()) - sum(
        int((net.get_parameter(name) == 0).sum()) for name in after["fits"]
    )
    assert "calibration on 200 training images" in shown
    assert f"ticket: {out / 'ticket.safetensors'}" in shown
    assert "4 weights fitted by least squares" in shown
    assert after["fits"]["blocks.0.mlp.fc2.weight"]["tokens"] == 200 * 65


def test_a_sparse_ticket_is_pruned_further_and_its_dead_stay_dead(folder, sweep, tmp_path):
    once = pruned(folder / "dense.safetensors", tmp_path / "once", "--sparsity", 0.3, "--criterion", "random")
    ticket = once / "ticket.safetensors"
    twice = pruned(ticket, tmp_path / "twice", "--granularity", "2:4", *LEAST_SQUARES) / "ticket.safetensors"
    before, after = (ticket_file.load(path).mask for path in (ticket, twice))
    assert after.density < 0.5 < before.density
    assert all(not (after[name] & ~before[name]).any() for name in after)
    net = vit_rsst.load(ticket)
    vit_rsst.prune(net, granularity="2:4", compensate="least_squares", calibration=calibration(), masks=before.masks)
    assert same(twice, net)


def test_an_export_that_does_not_name_its_data_is_pruned_on_data_that_is_named(folder, tmp_path):
    assert tiny.command("export", folder / "dense.safetensors", "--to", "transformers", tmp_path / "hf") == 0
    argv = ("--granularity", "neuron", "--sparsity", 0.5, "--no-evaluate", "--source", "digits", *LEAST_SQUARES)
    out = pruned(tmp_path / "hf", tmp_path / "out", *argv)
    [point], dense = result_of(out)["points"], result_of(out)["dense"]
    assert "top1" not in point
    assert "top1" not in dense
    assert tiny.command("evaluate", out / "ticket.safetensors", "--json", tmp_path / "scores.json") == 0
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["top1"] > 15.0


def test_a_dry_run_says_what_it_takes_and_looks_at_no_image(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ImageData, "_decoded", lambda *_: pytest.fail("decodes images"))
    argv = ("--sweep", "0.5,0.8", "--compensate", "least_squares", "--dry-run")
    assert tiny.command("prune", folder / "dense.safetensors", tmp_path / "out", *argv) == 0
    shown = capsys.readouterr().out
    net = vit_rsst.load(folder / "dense.safetensors")
    weights = {name: p for name, p in net.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    needed = fit_needs(net, weights, 32, 512)
    assert needed.activations == 4 * 512 * 65 * 24
    assert needed.matrix == 4 * 24 * 24
    assert needed.operations == 4 * 2 * 512 * 65 * 24**2
    for line in (
        "512 training images", "0.5000, 0.2000", f"activations {size(needed.activations)}", "sparsity_0.8", "front.svg",
        "2 fits", "a batch of 128 takes",
    ):  # fmt: skip
        assert line in shown
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ticket_file, "save", full)
    assert tiny.command("prune", folder / "dense.safetensors", tmp_path / "a" / "out", "--sparsity", 0.5) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["full", "terminated"])
def test_an_interrupted_sweep_keeps_its_finished_points_and_nothing_half_written(folder, tmp_path, monkeypatch, end):
    before, save = signal.getsignal(signal.SIGTERM), ticket_file.save

    def interrupted(path: Path, *arguments: object) -> int:
        if "sparsity_0.8" not in str(path):
            return save(path, *arguments)
        path.write_bytes(b"half")
        if end == "full":
            raise OSError(28, "No space left on device")
        os.kill(os.getpid(), signal.SIGTERM)
        return pytest.fail("the process goes on")

    monkeypatch.setattr(ticket_file, "save", interrupted)
    argv = ("prune", folder / "dense.safetensors", tmp_path / "out", "--sweep", "0.3,0.8,0.9")
    if end == "full":
        assert tiny.command(*argv) == 3
    else:
        with pytest.raises(SystemExit) as ended:
            tiny.command(*argv)
        assert ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "out", "result.json", "sparsity_0.3", "ticket.json", "ticket.safetensors",
    ]  # fmt: skip
    result = result_of(tmp_path / "out")
    [point] = result["points"]
    assert [goal["final_sparsity"] for goal in result["asked"]] == [0.3, 0.8, 0.9]
    monkeypatch.undo()
    alone = pruned(folder / "dense.safetensors", tmp_path / "alone", "--sparsity", 0.3)
    assert same(alone / "ticket.safetensors", Path(point["ticket"]))
    assert result_of(alone)["points"][0]["top1"] == point["top1"]


def test_a_sweep_that_ends_before_its_first_point_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ticket_file, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert tiny.command("prune", folder / "dense.safetensors", tmp_path / "out", "--sweep", "0.3,0.8") == 3
    assert list(tmp_path.iterdir()) == []


UNITS = ("--granularity", "head+neuron")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--sparsity", "1.0"), "--sparsity: expected a number above 0 and below 1, such as 0.5, not '1.0'."),
        (("--sparsity", "nan"), "not 'nan'"),
        (("--sparsity", "0"), "not '0'"),
        (("--sparsity", "-0.5"), "--sparsity"),
        ((), "Set --sparsity, --flops, --parameters or --sweep"),
        (
            ("--granularity", "3:7"),
            "--granularity: 3:7 needs input widths divisible by 7, but blocks.0",
        ),
        (("--granularity", "4:4"), "--granularity: 4:4 keeps 4 of 4; expected 1 ≤ N < M."),
        (("--granularity", "heads", "--sparsity", "0.5"), "Did you mean 'head'?"),
        (("--granularity", "channel", "--sparsity", "0.5"), "has no channel that can be removed exactly; use head"),
        (("--granularity", "2:4", "--sparsity", "0.5"), "--sparsity: 2:4 says how much is removed; omit it."),
        (("--granularity", "2:4", "--sweep", "0.5,0.6"), "--sweep: 2:4 says how much is removed; omit it."),
        (("--sparsity", "0.5", "--flops", "0.5"), "--flops: not allowed with argument --sparsity."),
        (("--flops", "0.5"), "--flops and --parameters: needs units that can be cut out"),
        ((*UNITS, "--flops", "0.01"), "--flops: 0.01 of the model cannot be reached"),
        ((*UNITS, "--sparsity", "0.9"), "every block keeps a head and --min-neurons neurons"),
        ((*UNITS, "--sparsity", "head=0.5"), "--sparsity: set for head, but head+neuron needs head and neuron."),
        (("--sweep", "0.5,0.3"), "--sweep: 0.5, 0.3 of sparsity does not rise from point to point"),
        (("--sweep", "0.5,0.5"), "--sweep: 0.5, 0.5 of sparsity does not rise from point to point"),
        ((*UNITS, "--sweep", "0.5,0.8", "--sweep-by", "flops"), "--sweep: 0.5, 0.8 of flops does not fall"),
        (("--sweep", "0.5,1"), "--sweep: expected a number above 0 and below 1, such as 0.5, not '1'."),
        (("--sparsity", "0.5", "--sweep-by", "flops"), "--sweep-by: has no effect without --sweep; omit it."),
        (("--sparsity", "0.5", "--criterion", "magnitud"), "Did you mean 'magnitude'?"),
        (("--sparsity", "0.5", "--criterion", "taylor"), "--criterion: taylor scores units, and 'element' has none"),
        (("--sparsity", "0.5", "--compensate", "lstsq"), "--compensate: "),
        (("--sparsity", "0.5", "--calibration-images", "9"), "--calibration-images: has no effect with magnitude"),
        (
            ("--sparsity", "0.5", "--calibration-images", "0"),
            "--calibration-images: expected a whole number, 1 or",
        ),
        (("--sparsity", "0.5", "--protect", "blok*"), "--protect: 'blok*' matches no prunable weight"),
        (("--sparsity", "0.5", "--source", "cifar"), "--source: unknown source 'cifar'"),
        (("--sparsity", "0.5", "--source", "cifar10", "--data", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence_before_any_work(folder, tmp_path, capsys, argv, sentence):
    assert tiny.command("prune", folder / "dense.safetensors", tmp_path / "out", *argv) == 2
    told = capsys.readouterr().err.strip()
    assert sentence in told
    assert len(told.splitlines()) == 1, told
    assert list(tmp_path.iterdir()) == []


def test_models_and_folders_that_cannot_be_pruned_are_refused(folder, sweep, tmp_path, capsys):
    net = timm.create_model("test_nfnet", num_classes=10)
    nfnet = vit_rsst.save(net, tmp_path / "nfnet.safetensors", data=DATA, masks={})
    (tmp_path / "model.onnx").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    sparse = sweep / "sparsity_0.6" / "ticket.safetensors"
    dense, images = folder / "dense.safetensors", tiny.write_images(tmp_path / "images", "cifar10")
    out, half = tmp_path / "out", ("--sparsity", "0.5")
    for what, place, argv, code, sentence in (
        (nfnet, out, (*half, "--protect", "*.attn*"), 2, f"{nfnet}: nothing to prune in NormFreeNet"),
        (sweep / "sparsity_0.5" / "slim", out, half, 2, "slim already; prune the ticket that it was cut from"),
        (tmp_path / "model.onnx", out, half, 2, "prune the ticket that it was exported from"),
        (tmp_path / "no.safetensors", out, half, 5, "no such ticket"),
        (dense, tmp_path / "full", half, 2, "already exists and is not empty"),
        (dense, out, (*half, "--source", "cifar10", "--data", images), 5, "trained on 10 classes"),
        (sparse, out, (*UNITS, *half), 2, "--sparsity: 0.5 would remove nothing"),
        (sparse, out, ("--sparsity", "0.4"), 2, "would remove nothing"),
    ):
        assert tiny.command("prune", what, place, *argv) == code
        told = capsys.readouterr().err.strip()
        assert sentence in told
        assert len(told.splitlines()) == 1, told
        assert not out.exists()


def test_help_says_what_every_option_is_for(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prune", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("(default 512)", "share of the prunable weights", "new or empty folder", "mildest first"):
        assert text in shown
