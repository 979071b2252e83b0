"""What must hold on a GPU as on the CPU. Skipped where torch sees none; `scripts/benchmarks/gpu.py --part a` runs them.

With VIT_RSST_REHEARSE=1 they run on the CPU, so that none meets a GPU untried.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import REPOSITORY, alone_on_cpu, events, status, write_recipe

from vit_rsst import cli, loop
from vit_rsst.data.loaders import placed
from vit_rsst.data.tables import Split
from vit_rsst.export import program_file, semi_structured
from vit_rsst.export.exporting import export
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_parts
from vit_rsst.pruning.contest import keep_n_of_m
from vit_rsst.pruning.criteria import CRITERIA, Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.pruning.movement import Movement
from vit_rsst.pruning.selector import Selector
from vit_rsst.tickets import ticket_file
from vit_rsst.training import optim
from vit_rsst.training.readings import Reading

sys.path.insert(0, str(REPOSITORY / "scripts" / "benchmarks"))
import _gpu_steps
from _runs import begin_run

IS_REHEARSED = os.environ.get("VIT_RSST_REHEARSE") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_GPU or IS_REHEARSED), reason="torch sees no GPU"),
]


def train(folder: Path, *overrides: object, verb: str = "train") -> int:
    """`vit-rsst train` of the tiny recipe in this process, on the GPU; the exit code."""
    with alone_on_cpu():
        if HAS_GPU:
            os.environ.pop("ACCELERATE_USE_CPU")
        return cli.main([verb, str(write_recipe(folder)), *map(str, overrides)])


def losses(folder: Path, name: str = "tiny") -> list[float]:
    return [event["train/loss"] for event in events(folder / "runs" / name) if event["event"] == "step"]


def network(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe("vit_tiny", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 10)).to(device)


@pytest.mark.parametrize("granularity", ["element", "2:4", "head", "neuron"])
def test_a_selection_is_the_one_of_the_cpu(granularity: str) -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        weights, groups = prunable_parts(network(device), granularity, (), ())
        selector = Selector(CRITERIA["magnitude"], granularity, groups)
        mask = selector.units(Evidence(weights, MaskSet.full(weights), 0, None), 0.4)
        assert all(bits.device.type == device.type for bits in mask.tensors())
        found.append(mask.fingerprint())
    assert found[0] == found[1]


def test_ties_break_by_index_on_every_device() -> None:
    scores = torch.randint(0, 4, (64, 64), generator=torch.Generator().manual_seed(0)).float()
    alive = torch.ones_like(scores, dtype=torch.bool)
    ours = keep_n_of_m(scores.to(DEVICE), alive.to(DEVICE), 2, 4).cpu()
    assert torch.equal(ours, keep_n_of_m(scores, alive, 2, 4))


def test_movement_adds_up_as_on_the_cpu_and_a_skipped_step_adds_nothing() -> None:
    found, draw = [], torch.Generator().manual_seed(0)
    moves = [(torch.randn(4, 8, 3, 3, generator=draw), torch.randn(4, 8, 3, 3, generator=draw)) for _ in range(4)]
    moves[2][1][0, 0] = torch.nan
    for device in (torch.device("cpu"), DEVICE):
        weight = torch.nn.Parameter(torch.zeros(4, 8, 3, 3, device=device).to(memory_format=torch.channels_last))
        weight.grad = torch.zeros_like(weight)
        movement = Movement.zeros({"w": weight})
        for number, (value, gradient) in enumerate(moves):
            weight.data.copy_(value)
            weight.grad.copy_(gradient)
            movement.note({"w": weight})
            movement.add_(torch.tensor(float(number == 2), device=device))
        found.append(movement.scores["w"].cpu())
    assert torch.equal(*found)
    assert torch.equal(found[0], -moves[0][0] * moves[0][1] - moves[1][0] * moves[1][1] - moves[3][0] * moves[3][1])


def test_a_ticket_is_the_same_file_from_every_device(tmp_path: Path) -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        net = network(device)
        weights, _ = prunable_parts(net, "element", (), ())
        mask = MaskSet({name: weight.abs() > 0.01 for name, weight in weights.items()})
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(~mask[name], 0.0)
        path = tmp_path / f"{device.type}-{len(found)}.safetensors"
        ticket_file.save(path, net.state_dict(), mask, {"round": "0"})
        found.append(load_file(path))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_step_never_waits_for_the_gpu_and_pruning_adds_few_kernels(tmp_path: Path, record_property: Callable) -> None:
    """As `launches.py` counts it on a stand-in; here by CUDA's own check, and by the profiler."""
    case = _gpu_steps.Case("vit_tiny", 32, 64, 20, {"embed_dim": 96, "depth": 3, "num_heads": 3})
    images = torch.randint(0, 256, (64 * 20, 3, 32, 32), dtype=torch.uint8)
    split = placed(Split(images, torch.arange(len(images)) % 10), DEVICE)
    kernels = []
    for is_in_window in (False, True):
        with alone_on_cpu():
            if HAS_GPU:
                os.environ.pop("ACCELERATE_USE_CPU")
            recipe = _gpu_steps.recipe_of(case, tmp_path, False, is_in_window, 2, rehearse=not HAS_GPU)
            run = begin_run(recipe, split, int(is_in_window))
            batches = iter(run.loader.steps(run.progress))
            for _ in range(3):  # the first allocate
                step(run, batches)
            if HAS_GPU:
                torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(3):
                    step(run, batches)
            finally:
                torch.cuda.set_sync_debug_mode("default") if HAS_GPU else None
            with torch.profiler.profile() as profile:
                step(run, batches)
                torch.cuda.synchronize() if HAS_GPU else None
        found = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels.append(sum(not name.startswith(("Memcpy", "Memset")) for name in found))
    record_property("kernels_dense", kernels[0])
    record_property("kernels_in_the_window", kernels[1])
    assert kernels[1] - kernels[0] <= 6
    assert kernels[0] > 100 or not HAS_GPU


def step(run: loop.Run, batches: Iterator) -> None:
    """A step of `loop.train_epoch` that logs nothing."""
    micro_batches = next(batches)
    loop.seed_step(run)
    optim.set_lr_(run.optimizer, 1e-3)
    loss, norm = loop.train_step(run, micro_batches)
    run.progress.advance()
    run.readings.note(Reading(run.progress.global_step, {}, None), loss, norm)


@pytest.mark.parametrize("method", ["rsst", "imp", "gmp", "ste", "refill"])
def test_a_run_leaves_its_tickets(method: str, tmp_path: Path) -> None:
    units = ["pruning.granularity=head+neuron", "pruning.min_neurons=2", "pruning.schedule.final_sparsity=0.6"]
    more = units if method == "refill" else []
    assert train(tmp_path, f"pruning.method={method}", "train.ema_decay=0.9", *more) == 0
    assert status(tmp_path / "runs" / "tiny")["state"] == "finished"


def test_bf16_learns_as_fp32_does(tmp_path: Path) -> None:
    longer = ("train.steps_per_epoch=20", "train.log_every_steps=10")
    for precision in ("no", "bf16"):
        assert train(tmp_path, f"name={precision}", f"train.precision={precision}", *longer) == 0
    full, half = (losses(tmp_path, precision) for precision in ("no", "bf16"))
    assert half == pytest.approx(full, rel=0.1)


def test_a_run_that_is_stopped_after_every_step_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Where kernels are deterministic; the environment names the GPU, its driver and its libraries."""
    exact = ("train.deterministic=true", "train.precision=bf16")
    assert train(tmp_path, "name=whole", *exact) == 0
    sittings = [train(tmp_path, "name=parts", "train.max_minutes=1e-6", *exact) for _ in range(5)]
    assert sittings == [75] * 5
    assert train(tmp_path, "name=parts", *exact) == 0
    resumes = [event for event in events(tmp_path / "runs" / "parts") if event["event"] == "resume"]
    assert [event["bit_exact"] for event in resumes] == [True] * 5, resumes
    whole, parts = (sorted((tmp_path / "runs" / name / "tickets").glob("*.safetensors")) for name in ("whole", "parts"))
    assert len(whole) == 3
    for first, second in zip(whole, parts, strict=True):
        one, two = load_file(first), load_file(second)
        assert all(torch.equal(one[name], two[name]) for name in one)
    gpu = json.loads((tmp_path / "runs" / "parts" / "environment.json").read_text())["gpu"]
    assert (gpu is None) == (not HAS_GPU)
    assert gpu is None or all(gpu[name] for name in ("model", "memory", "driver", "cuda", "cudnn", "nccl")), gpu


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_learns_as_an_eager_one(mode: str, tmp_path: Path) -> None:
    import torch._dynamo

    assert train(tmp_path, "name=eager") == 0
    torch.compiler.reset()
    assert train(tmp_path, "name=compiled", f"train.compile={mode}") == 0
    assert losses(tmp_path, "compiled") == pytest.approx(losses(tmp_path, "eager"), rel=1e-3)


def test_too_little_memory_says_which_batch_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not HAS_GPU:
        pytest.skip("only a GPU's memory can be limited")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        code = train(
            tmp_path, "data.image_size=224", "model.name=vit_base_patch16_224", "model.args={}",
            "train.global_batch=512", "train.steps_per_epoch=1",
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert code == 3  # a missing requirement
    assert "train.batch_per_device=256" in capsys.readouterr().err


def test_a_deterministic_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """A run stopped after each epoch and the same command again, beside one that is not disturbed."""
    common = ("train.deterministic=true", "train.save_every_steps=1", "train.ema_decay=0.9", "model.args.drop_rate=0.1")
    assert train(tmp_path, "name=whole", *common) == 0
    codes = []
    for _ in range(20):
        codes.append(train(tmp_path, "name=stopped", "train.max_minutes=0.0005", *common))
        if codes[-1] == 0:
            break
    else:
        assert train(tmp_path, "name=stopped", *common) == 0
    assert 75 in codes
    tickets = sorted((tmp_path / "runs" / "whole" / "tickets").glob("*.safetensors"))
    assert len(tickets) == 3
    for path in tickets:
        expected, found = load_file(path), load_file(tmp_path / "runs" / "stopped" / "tickets" / path.name)
        assert all(torch.equal(expected[name], found[name]) for name in expected), path.name


MEMORY = {
    "dense": ["pruning.method=dense"],
    "rsst": ["pruning.method={name: rsst, remove_at: 1.0}"],
    "ema": ["pruning.method=dense", "train.ema_decay=0.99"],
    "distill": ["pruning.method=imp", "train.distill.teacher=dense"],
    "ste": ["pruning.method={name: ste, interval: 1}"],
}


@pytest.mark.parametrize("case", MEMORY)
def test_the_peak_of_memory_is_the_predicted_one(case: str, tmp_path: Path, record_property: Callable) -> None:
    from vit_rsst.assembly.data import Rows
    from vit_rsst.assembly.needs import needs
    from vit_rsst.assembly.parts import Sizes, prepare
    from vit_rsst.recipe.loading import load

    overrides = [
        "model.args={embed_dim: 384, depth: 6, num_heads: 6}" if HAS_GPU else "model.args={embed_dim: 48, depth: 1}",
        f"train.global_batch={256 if HAS_GPU else 32}", "train.steps_per_epoch=2", "train.epochs=1",
        "train.round_epochs=1", f"train.precision={'bf16' if HAS_GPU else 'no'}", f"name={case}",
    ]  # fmt: skip
    path = write_recipe(tmp_path)
    recipe = load(path, [*overrides, *MEMORY[case]])
    sizes = Sizes.of(recipe, Rows(1293, 144, 360, 10, True), 1)
    parts = prepare(recipe, sizes, torch.device("meta"))
    predicted = needs(parts, parts.preview(sizes.progress), sizes.dealing, (144, 360), on_gpu=HAS_GPU).peak
    before = 0
    if HAS_GPU:
        gc.collect()  # what earlier tests of this process have left
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    assert train(tmp_path, *overrides, *MEMORY[case]) == 0
    if not HAS_GPU:
        return
    images = 1797 * 3 * 32 * 32
    measured = torch.cuda.max_memory_allocated() - before - images
    record_property("predicted_mib", round(predicted / 2**20, 1))
    record_property("measured_mib", round(measured / 2**20, 1))
    assert measured == pytest.approx(predicted, rel=0.1)


@pytest.mark.skipif(not HAS_GPU, reason="sparse tensor cores cannot be rehearsed")
def test_a_two_of_four_ticket_is_exported_compressed_and_scores_as_in_float32(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < semi_structured.CAPABILITY:
        pytest.skip("this GPU has no sparse tensor cores")
    args = {"embed_dim": 128, "depth": 2, "num_heads": 4, "patch_size": 8}
    overrides = ("pruning.granularity=2:4", "pruning.schedule=linear", f"model.args={json.dumps(args)}")
    assert train(tmp_path, *overrides) == 0
    done = export(tmp_path / "runs" / "tiny", "torch", tmp_path / "out", semi_structured=True)
    assert done.difference < 1e-2
    program = torch.export.load(tmp_path / "out" / program_file.FILE)
    assert sum(name.endswith(".packed") for name in program.state_dict) == 8
    assert [section.title for section in done.measured] == ["Speed"]
