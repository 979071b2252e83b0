"""Training techniques in whole runs, combined with pruning, bf16 and gradient accumulation."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from vit_rsst.models import zoo
from vit_rsst.models.footprint import training_bytes
from vit_rsst.tickets.ticket_file import load as load_ticket

ARGS = tiny.MODEL_ARGS | {"depth": 2}
RECIPE = tiny.RECIPE.replace(json.dumps(tiny.MODEL_ARGS), json.dumps(ARGS))
ACCUMULATED = ("train.batch_per_device=16", "train.precision=bf16")
TOGETHER = ("optim.layer_decay=0.5", "train.grad_checkpointing=true")
UNITS = ("pruning.granularity=head+neuron", "pruning.schedule.final_sparsity=0.4")
DROPS = ("model.args.drop_rate=0.1", "model.args.drop_path_rate=0.2", "model.args.proj_drop_rate=0.1")


def losses(tmp_path, name: str, *overrides: str) -> list[float]:
    """Training loss of every step of a run of its own."""
    recipe = tiny.write_recipe(tmp_path, RECIPE)
    assert tiny.command("train", recipe, f"name={name}", *overrides) == 0
    return [event["train/loss"] for event in tiny.events(tmp_path / "runs" / name) if event["event"] == "step"]


@pytest.mark.parametrize("pruning", [(), (*UNITS, "pruning.criterion=saliency", "pruning.calibration_images=32")])
def test_gradient_checkpointing_changes_no_number_of_a_run(pruning, tmp_path):
    for precision in ("no", "bf16"):
        common = (*pruning, *DROPS, "train.batch_per_device=16", f"train.precision={precision}")
        plain = losses(tmp_path, f"plain-{precision}", *common)
        assert losses(tmp_path, f"again-{precision}", *common, "train.grad_checkpointing=true") == plain


TECHNIQUES = {
    "mixup": ("data.augment.mixup=0.8",),
    "cutmix": ("data.augment.cutmix=1.0",),
    "erasing": ("data.augment.reprob=0.5",),
    "strong": ("data.augment=strong", "data.augment.color_jitter=0.2"),
    "repeats": ("data.augment.aug_repeats=3",),
    "tail": ("data.imbalance.kind=long_tail", "data.imbalance.ratio=5", "data.sampler=class_balanced"),
    "balanced softmax": ("train.loss=balanced_softmax",),
    "class weights": ("train.loss=class_weighted", "train.label_smoothing=0.1"),
    "average": ("train.ema_decay=0.99",),
    "best": ("train.keep_best=true", "train.patience=1"),
    "teacher": ("train.distill.teacher=dense",),
    "together": (
        "data.augment=strong", "train.ema_decay=0.99", "train.keep_best=true", "train.distill.teacher=dense",
        "data.imbalance.kind=step", "train.loss=class_weighted", "train.label_smoothing=0.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_techniques_work_with_units_bf16_accumulation_and_checkpointing(technique, tmp_path):
    common = (*ACCUMULATED, *UNITS, "train.grad_checkpointing=true", "optim.layer_decay=0.9")
    found = losses(tmp_path, "run", *common, *TECHNIQUES[technique])
    assert all(loss == loss and loss < 10 for loss in found)
    run = tmp_path / "runs" / "run"
    tickets = [load_ticket(path) for path in sorted(run.glob("tickets/*.safetensors"))]
    assert len(tickets) == 3
    assert tickets[-1].mask.density < 0.7
    assert tiny.command("evaluate", run) == 0


@pytest.mark.slow  # the compiler takes its time
def test_all_techniques_work_with_compilation(tmp_path):
    common = (*TECHNIQUES["together"], "train.batch_per_device=16")
    eager, compiled = (losses(tmp_path, f"run-{on}", *common, f"train.compile={on}") for on in ("false", "true"))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_layer_decay_and_checkpointing_work_with_pruning_bf16_and_accumulation(tmp_path):
    found = losses(tmp_path, "all", *ACCUMULATED, *TOGETHER, *DROPS, *UNITS)
    assert len(found) == 18
    assert all(loss == loss and loss < 10 for loss in found)
    run = tmp_path / "runs" / "all"
    rates = [event["train/lr"] for event in tiny.events(run) if event["event"] == "epoch"]
    assert max(rates) > 1e-4  # of the last layer, as the recipe has it
    last = max(run.glob("tickets/*.safetensors"))
    assert tiny.command("evaluate", last) == 0


def test_weights_of_early_layers_move_less_under_layer_decay(tmp_path):
    def moved(*overrides: str) -> dict[str, float]:
        name = "-".join(["m", *overrides]).replace("=", "_")
        options = ("pruning.method.name=dense", "optim.weight_decay=0", "train.epochs=1", *overrides)
        text = RECIPE.replace("  method: {name: rsst, remove_at: 0.8}", "  method: {name: dense}")
        recipe = tiny.write_recipe(tmp_path, text.replace("{rounds: 2, final_sparsity: 0.9}", "{rounds: 1}"))
        assert tiny.command("train", recipe, f"name={name}", *options[1:]) == 0
        start = weights_at_start()
        end = load_file(tmp_path / "runs" / name / "tickets" / "round_00.safetensors")
        return {n: float((end[n] - start[n]).abs().mean()) for n in ("patch_embed.proj.bias", "head.bias")}

    def weights_at_start() -> dict[str, Tensor]:
        from vit_rsst.seeds import derived_seed

        torch.manual_seed(derived_seed(0, "model"))
        return zoo.create(*zoo.describe("vit_tiny", ARGS, 10)).state_dict()

    plain, decayed = moved(), moved("optim.layer_decay=0.1")
    assert decayed["patch_embed.proj.bias"] < 0.01 * plain["patch_embed.proj.bias"]
    assert decayed["head.bias"] > 0.3 * plain["head.bias"]


@pytest.mark.parametrize("name", ["vit_small", "dynamic_vit", "lightweight_vit", "vit_t16"])
def test_gradient_checkpointing_stores_a_fraction_of_the_activations(name):
    net = zoo.create(*zoo.describe(name, {}, 10), device="meta").train()
    size = net.patch_embed.img_size[0]
    before, in_bf16 = (training_bytes(net, size, 32, bf16, keeps_gradients=False) for bf16 in (False, True))
    zoo.checkpoint_gradients_(net)
    assert training_bytes(net, size, 32, keeps_gradients=False) < 0.35 * before
    assert training_bytes(net, size, 32, bf16=True, keeps_gradients=False) < 0.4 * in_bf16  # the weights' copies stay


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.name=resnet20", "model.args={}", "train.grad_checkpointing=true"), "train.grad_checkpointing"),
        (("model.name=hf:vit", "model.args={image_size: 32}", "optim.layer_decay=0.5"), "optim.layer_decay"),
        (
            ("optim.name=sgd", "optim.layer_decay=0.5", "pruning.method.penalty.coupling=gradient"),
            "which optim.layer_decay varies by layer",
        ),
    ],
)
def test_a_technique_that_a_model_does_not_support_is_rejected(overrides, message, flags, tmp_path, capsys):
    assert tiny.command("train", tiny.write_recipe(tmp_path), *overrides, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
