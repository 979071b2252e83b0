"""What is done with sharded weights beside training, and what training sharded weights takes part in: reading files, a
teacher, the checklist, compilation, models of transformers; and that such a run is used as any other."""

import csv
import json
import os
import re
from pathlib import Path

import faulty
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_sharded import FSDP2, UNITS, Trained, assert_alike, command, prepared, trained
from torch import Tensor, distributed, nn

from vit_rsst import shards
from vit_rsst.assembly import sharding
from vit_rsst.errors import Damaged
from vit_rsst.models import zoo
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.recipe.loading import load
from vit_rsst.run.checkpoint import Checkpointer, ResumePoint
from vit_rsst.tickets import ticket_file
from vit_rsst.tickets.stored import Stored
from vit_rsst.train import make_accelerator
from vit_rsst.training import optim
from vit_rsst.training.distill import Distillation

pytestmark = pytest.mark.distributed

# -- reading files


class Network(nn.Module):
    """Of 5 rows and of 1, with an average that is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)


def place_of(rank: int, world: int) -> object:
    """The mesh that a rank sees, without the others: nothing that communicates works."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    return init_device_mesh("cpu", (world,))


def shard_(net: nn.Module, mesh: object) -> nn.Module:
    """With the rows of this rank alone, all zero."""
    from torch.distributed.tensor import DTensor, Shard

    rank, world = mesh.get_local_rank(), mesh.size()
    for module in net.modules():
        for name, whole in list(module.named_parameters(recurse=False)):
            size = -(-len(whole) // world)
            own = torch.zeros_like(whole.detach()[rank * size : (rank + 1) * size])
            like = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
            setattr(module, name, nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], **like)))
    return net


def own_bytes(net: nn.Module) -> int:
    return sum(shards.local(tensor).nbytes for tensor in net.state_dict().values())


def read_own_rows(folder: str) -> None:
    """In the place of one rank after the other."""
    torch.manual_seed(0)
    whole, path, read = Network(), Path(folder) / "ticket.safetensors", []
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    moments = {f"{name}/exp_avg": torch.randn_like(p) for name, p in whole.named_parameters()}
    moments |= {f"{name}/step": torch.tensor(7.0) for name, _ in whole.named_parameters()}
    alive = MaskSet({name: torch.rand_like(state[name]) < 0.6 for name in ("first.weight", "last.weight")})
    bits = {f"mask/{name}": packed for name, packed in alive.pack().items()}
    checkpointer = Checkpointer(Path(folder) / "points")
    checkpointer.save(ResumePoint(1, {"model": state, "optimizer": moments, "controller": bits}, {}))
    checkpointer.wait()
    ticket_file.save(path, {n: t * alive[n] if n in alive.masks else t for n, t in state.items()}, alive, {})
    ticket = ticket_file.load(path)
    plain = Stored.__getitem__

    def counted(self: Stored, rows: slice) -> Tensor:
        found = plain(self, rows)
        read.append(found.nbytes)
        return found

    Stored.__getitem__ = counted
    for rank, world in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (7, 8)):
        point, mesh = checkpointer.load(), place_of(rank, world)
        net = shard_(Network(), mesh)
        weights = {name: net.get_parameter(name) for name in alive}
        read.clear()
        shards.load_state_(net, point.tensors["model"])
        assert sum(read) == own_bytes(net)
        for name, tensor in net.state_dict().items():
            expected = state[name][shards.rows(tensor)] if shards.is_sharded(tensor) else state[name]
            assert torch.equal(shards.local(tensor), expected), (name, rank, world)

        optimizer = torch.optim.AdamW(net.parameters())
        parameters = dict(net.named_parameters())
        read.clear()
        optim.load_state_tensors_(optimizer, point.tensors["optimizer"], parameters)
        assert sum(read) == sum(shards.local(p).nbytes + 4 for p in parameters.values())
        for name, parameter in parameters.items():
            moment = shards.local(optimizer.state[parameter]["exp_avg"])
            assert torch.equal(moment, moments[f"{name}/exp_avg"][shards.rows(parameter)])
            assert optimizer.state[parameter]["step"] == 7

        read.clear()
        packed = {path.removeprefix("mask/"): stored for path, stored in point.tensors["controller"].items()}
        mask = MaskSet.unpack(packed, weights)
        assert sum(read) <= sum(shards.local(w).numel() / 8 + 2 for w in weights.values())
        for name, weight in weights.items():
            assert torch.equal(shards.local(mask[name]), alive[name][shards.rows(weight)])

        read.clear()
        net = shard_(Network(), mesh)
        ticket_file.read_into_(net, path)
        own = sum(int(alive[name][shards.rows(weight)].sum()) for name, weight in weights.items())
        rest = own_bytes(net) - sum(4 * shards.local(weight).numel() for weight in weights.values())
        shapes, most_bits = 2 * 16, sum(weight.numel() / 8 + 4 for weight in weights.values())
        assert 4 * own + rest + shapes <= sum(read) <= 4 * own + rest + shapes + most_bits
        assert max(read) <= max(4 * tensor.numel() for tensor in state.values())
        for name, tensor in net.state_dict().items():
            expected = ticket.state[name][shards.rows(tensor)] if shards.is_sharded(tensor) else ticket.state[name]
            assert torch.equal(shards.local(tensor), expected), (name, rank, world)
        with pytest.raises(Damaged, match="does not match this model in 11 tensors"):
            ticket_file.read_into_(shard_(nn.Sequential(nn.Linear(3, 5)), mesh), path)
        distributed.destroy_process_group()


def test_each_rank_reads_its_rows_of_resume_points_and_tickets_and_no_others(tmp_path):
    assert faulty.exit_code(read_own_rows, str(tmp_path)) == 0


# -- a teacher


def teach(rank: int, world: int, port: int, recipe: str) -> None:
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in launch.items()} | FSDP2 | {"ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    accelerator = make_accelerator(load(Path(recipe), ["optim.name=adamw"]))

    def built(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return zoo.create(*zoo.describe("vit_tiny", tiny.MODEL_ARGS | {"embed_dim": 27, "depth": 3}, 10))

    teachers = [built().eval().requires_grad_(False) for _ in range(2)]
    whole, split = teachers[0], sharding.shard_(accelerator, teachers[1])
    held = sum(shards.local(p).numel() for p in split.parameters())
    assert held < (1 / world + 0.05) * sum(p.numel() for p in whole.parameters())
    student = sharding.shard_(accelerator, built(seed=1).train())  # while its weights are gathered, the teacher's come
    torch.manual_seed(rank)  # images of its own
    for _ in range(2):
        images, losses, gradients = torch.randn(4, 3, 32, 32), [], []
        for teacher in (whole, split):
            distillation = Distillation(lambda net=teacher: net, 0.5, 2.0, accelerator.autocast)
            logits = student(images)
            loss = distillation(logits.sum(), logits, images)
            assert all(map(shards.is_sharded, split.parameters())), "the teacher is gathered again in each pass"
            loss.backward()
            losses.append(loss.detach())
            gradients.append([shards.local(p.grad).clone() for p in student.parameters()])
            student.zero_grad()
        assert torch.allclose(*losses, rtol=1e-6)
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*gradients, strict=True))
    accelerator.wait_for_everyone()
    distributed.destroy_process_group()


def test_a_sharded_teacher_gives_the_losses_and_gradients_of_a_whole_one(tmp_path):
    port, recipe = faulty.free_port(), str(tiny.write_recipe(tmp_path))
    processes = [faulty.CONTEXT.Process(target=teach, args=(rank, 2, port, recipe)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(faulty.SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]


# -- the checklist

FEWER = """\
import os
from vit_rsst.checks import learning, removal

learning.FEW = removal.FEW = 8
learning.SWEEP = int(os.environ.get("SWEEP", "12"))
"""
"""A plugin of the recipe: fewer images to learn by heart, and a shorter range test."""


def checked(folder: Path, ranks: int, *overrides: str, **launch: str) -> tuple[dict[str, dict], faulty.Job]:
    """The verdicts by name, and the job."""
    recipe = prepared(folder)
    (folder / "fewer.py").write_text(FEWER, encoding="utf-8")
    argv = ("optim.name=adamw", "optim.lr=1e-3", "plugins=[small, fewer]", *overrides, "--json", folder / "checks.json")
    job = faulty.command("check", recipe, *argv, ranks=ranks, **launch)
    verdicts = json.loads((folder / "checks.json").read_text(encoding="utf-8"))["checks"]
    return {verdict["name"]: verdict for verdict in verdicts}, job


def assert_same_states(found: dict[str, dict], expected: dict[str, dict]) -> None:
    assert len(found) == len(expected) == 12
    for name, verdict in found.items():
        if name in ("memory", "speed", "hours"):
            continue
        assert verdict["state"] == expected[name]["state"], (verdict, expected[name])


def assert_same_verdicts(found: dict[str, dict], expected: dict[str, dict]) -> None:
    """Gradients are means over the batches of all ranks, which make up that of one process."""
    assert_same_states(found, expected)
    of = {name: (found[name]["details"], expected[name]["details"]) for name in found}
    ours, theirs = of["first loss"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    ours, theirs = of["gradients"]
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-2, abs=1e-4)
    ours, theirs = of["learning rate"]
    assert ours["losses"][:6] == pytest.approx(theirs["losses"][:6], rel=1e-2)
    ours, theirs = of["removal"]
    assert ours["density"] == pytest.approx(theirs["density"], abs=0.02)
    assert ours["layers"].keys() == theirs["layers"].keys()


def test_the_checklist_of_a_sharded_run_has_the_verdicts_of_one_process(tmp_path):
    (one, alone), (two, job) = checked(tmp_path / "1", 1), checked(tmp_path / "2", 2, **FSDP2)
    assert alone.codes == [0], alone.log
    assert job.codes == [0, 0], job.log
    assert_same_verdicts(two, one)
    assert "weights sharded over 2 processes (FSDP2): 2 × Block one at a time" in job.log
    assert "with weights sharded over 2 processes" in two["memory"]["text"]
    assert two["memory"]["details"]["needed"] < one["memory"]["details"]["needed"]
    assert two["hours"]["text"].endswith("with 2 process(es)")
    for name in one:
        assert len(re.findall(rf"^\w+ +{name} ", job.log, re.MULTILINE)) == 1, "one rank prints"


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [UNITS, ["pruning.criterion=saliency"], ["model.args.depth=3", *UNITS]])
def test_checklists_of_units_and_criteria_are_those_of_one_process(tmp_path, overrides):
    one, alone = checked(tmp_path / "1", 1, *overrides)
    for number, launch in ((2, FSDP2), (3, FSDP2), (2, {})):
        found, job = checked(tmp_path / f"{number}-{len(launch)}", number, *overrides, **launch)
        assert set(job.codes) == set(alone.codes), job.log
        (assert_same_verdicts if launch else assert_same_states)(found, one)  # without FSDP, gradients are rank 0's own


def test_a_failed_check_of_a_sharded_run_exits_with_6_on_the_first_rank(tmp_path):
    """Where no weight learns: every rank ends, and one of them says why."""
    found, job = checked(tmp_path, 2, "optim.lr=1e-9", SWEEP="100", **FSDP2)
    assert job.codes == [6, 0], job.log
    assert found["learning rate"]["state"] == "failed"
    assert job.log.count("error: 1 of 12 checks failed: learning rate.") == 1


# -- a run with sharded weights is used as any other


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trained:
    """A run over heads and neurons on two processes."""
    schedule = "pruning.schedule={rounds: 1, final_sparsity: 0.5}"
    return trained(tmp_path_factory.mktemp("used"), 2, "pruning.granularity=head+neuron", schedule)


def evaluated(output: Path, what: Path) -> dict:
    assert tiny.command("evaluate", what, "--json", output) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def test_a_sharded_run_is_evaluated_analyzed_exported_and_reported_as_any_other(run, tmp_path, capsys):
    rows = list(csv.DictReader((run.run / "rounds.csv").open()))
    ticket = run.run / "tickets" / "round_01.safetensors"
    scores = evaluated(tmp_path / "ticket.json", run.run)
    assert scores["ticket"] == str(ticket)
    assert scores["top1"] == pytest.approx(float(rows[-1]["test_top1"]), abs=1e-4)
    assert scores["loss"] == pytest.approx(float(rows[-1]["test_loss"]), rel=1e-5)
    assert scores["density"] == pytest.approx(float(rows[-1]["density"]))
    assert tiny.command("export", run.run, "--to", "slim", tmp_path / "slim") == 0
    slim = evaluated(tmp_path / "slim.json", tmp_path / "slim")
    assert slim["confusion"] == scores["confusion"]
    assert slim["loss"] == pytest.approx(scores["loss"], rel=1e-4)
    assert tiny.command("analyze", run.run, "--no-latency", "--json", tmp_path / "analysis.json") == 0
    assert tiny.command("report", run.run, "--no-latency", "--out", tmp_path / "report") == 0
    page = next((tmp_path / "report").glob("*.md")).read_text(encoding="utf-8")
    assert f"{scores['top1']:.2f}" in page
    assert re.search(r"sharding\W+FSDP2", page)
    assert "accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 -m vit_rsst.train" in page
    capsys.readouterr()


SCORES = ("top1", "top5", "ece", "precision", "recall", "f1", "support", "confusion", "macro_f1", "samples")


@pytest.mark.slow
def test_two_processes_score_a_ticket_as_one_does_whatever_the_launcher_asks_for(run, tmp_path):
    expected = evaluated(tmp_path / "one.json", run.run)
    for name, launch in (("sharded", FSDP2), ("ddp", {})):
        output = tmp_path / f"{name}.json"
        job = faulty.command("evaluate", run.run, "--json", output, ranks=2, **launch)
        assert job.codes == [0, 0], job.log
        found = json.loads(output.read_text(encoding="utf-8"))
        assert found["processes"] == 2
        assert {key: found[key] for key in SCORES} == {key: expected[key] for key in SCORES}
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_sharded_run_is_exported_pruned_and_asked_for_predictions_as_any_other(run, tmp_path, capsys):
    expected = evaluated(tmp_path / "ticket.json", run.run)
    for target in ("onnx", "timm", "dense", "torch"):
        assert tiny.command("export", run.run, "--to", target, tmp_path / target) == 0
        source = () if target == "dense" else ("--source", "digits")
        argv = ("evaluate", tmp_path / target, *source, "--json", tmp_path / "export.json")
        assert tiny.command(*argv) == 0, target
        found = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
        assert found["confusion"] == expected["confusion"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert tiny.command("prune", run.run, tmp_path / "pruned", "--sparsity", "0.8", "--granularity", "element") == 0
    pruned = ticket_file.load(next((tmp_path / "pruned").rglob("*.safetensors")))
    assert pruned.mask.density == pytest.approx(0.2, abs=1e-3)
    assert pruned.mask.nested_in(ticket_file.load(Path(expected["ticket"])).mask)
    from PIL import Image
    from sklearn.datasets import load_digits

    Image.fromarray((load_digits().images[0] * 15).astype("uint8")).save(tmp_path / "digit.png")
    assert tiny.command("predict", run.run, tmp_path / "digit.png", "--json", tmp_path / "answers.json") == 0
    capsys.readouterr()


@pytest.mark.slow
def test_a_run_starts_from_a_sharded_ticket_sharded_or_not(run, tmp_path):
    """Each from the same ticket; `constant` keeps its zeros."""
    start = f"model.start_from={run.run / 'tickets' / 'round_01.safetensors'}"
    overrides = [start, "pruning={method: constant, schedule: {rounds: 0}}", "train.epochs=2"]
    assert_alike(trained(tmp_path / "2", 2, *overrides), trained(tmp_path / "1", 1, *overrides, is_sharded=False))


# -- compilation

COUNTING = """\
import torch
from vit_rsst import loop

finish_epoch = loop.finish_epoch

def counted(run):
    finish_epoch(run)
    if run.accelerator.is_main_process:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print(f"step {run.progress.global_step} graphs {graphs}", flush=True)

loop.finish_epoch = counted
"""
"""A plugin of the recipe: says after each epoch how much has been compiled."""


@pytest.mark.slow
def test_compiled_blocks_learn_as_eager_ones_and_are_compiled_once(tmp_path):
    for name in ("eager", "compiled", "stopped"):
        prepared(tmp_path / name)
        (tmp_path / name / "counting.py").write_text(COUNTING, encoding="utf-8")
    overrides = ["train.compile=true", "plugins=[small, counting]", "train.ema_decay=0.9"]
    eager = trained(tmp_path / "eager", 2, "train.ema_decay=0.9")
    compiled = trained(tmp_path / "compiled", 2, *overrides)
    assert_alike(compiled, eager)
    graphs = [int(number) for number in re.findall(r"graphs (\d+)", compiled.log)]
    assert len(graphs) == 6
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, f"masks, penalties and evaluations must compile nothing anew: {graphs}"
    stopped = command(tmp_path / "stopped", 2, *overrides, STOP_AT="8")
    assert set(stopped.codes) == {75}, stopped.log
    resumed = trained(tmp_path / "stopped", 2, *overrides)
    assert resumed.bytes == compiled.bytes


# -- models of transformers

HF_VIT = (
    "{image_size: 32, patch_size: 8, hidden_size: 27, num_hidden_layers: 2, num_attention_heads: 3, "
    "intermediate_size: 27}"
)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], UNITS, ["train.grad_checkpointing=true", "train.ema_decay=0.9"]])
def test_a_model_of_transformers_is_sharded_by_its_layers(tmp_path, more):
    overrides = ["model.name=hf:vit", f"model.args={HF_VIT}", *more]
    sharded = trained(tmp_path / "fsdp", 2, *overrides)
    assert "2 × ViTLayer one at a time, the other" in sharded.log
    assert_alike(sharded, trained(tmp_path / "ddp", 2, *overrides, is_sharded=False))
    names = load_file(next((sharded.run / "tickets").glob("*.safetensors"))).keys()
    assert any(name.startswith("vit.") for name in names)
