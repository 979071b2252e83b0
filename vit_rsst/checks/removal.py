"""Check of the removal: applies the final mask of the recipe to a network that has memorised a few images."""

import torch
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.analysis.counts import block_of
from vit_rsst.assembly.calibration import make_calibration
from vit_rsst.checks.bench import LIMIT, Bench, Verdict
from vit_rsst.checks.learning import FEW
from vit_rsst.data.loaders import Batch
from vit_rsst.models import slim
from vit_rsst.pruning.criteria import Evidence
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.text import duration

LEAST = 0.01
"""Density below which a layer passes on hardly anything."""


def removal(bench: Bench) -> Verdict:
    """The final mask meets its density, leaves no layer empty, and the slim model gives the same logits."""
    if not bench.recipe.pruning.method.prunes:
        return Verdict("removal", "skipped", f"{bench.recipe.pruning.method_name} removes nothing")
    seconds = bench.estimate(0.4, bench.recipe.pruning.calibration_images)
    if seconds > LIMIT:
        return Verdict("removal", "skipped", f"the calibration would take about {duration(seconds)} on this machine")
    net = bench.toy if bench.toy is not None else bench.make_net()
    mask, asked = final_mask(bench, net)
    images = bench.draw("train", FEW, 2)
    known = accuracy(net, images)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name in mask.masks:
                shards.local(weight).masked_fill_(~shards.local(mask[name]), 0.0)
    text = f"density {mask.density:.3f} (target {asked:.3f}), {mask.num_alive:,} of {mask.num_elements:,} weights left"
    if bench.toy is not None:
        left = accuracy(net, images)
        text += f"; accuracy on {len(images[1])} memorised images: {known:.0%} before, {left:.0%} after the removal"
    complete, mask = bench.whole(net), mask.gathered()
    if complete is None:
        return Verdict("removal", "skipped", "rank 0 has the weights")
    return _judged(complete, mask, bench.batch[0][:2].to(next(complete.parameters()).device), asked, text)


def final_mask(bench: Bench, net: nn.Module) -> tuple[MaskSet, float]:
    """The mask selected at the final density of the recipe, and that density."""
    parts = bench.parts(net)
    calibrate, _ = make_calibration(parts, bench.data, bench.accelerator)
    statistics = calibrate() if calibrate is not None else None
    evidence = Evidence(parts.weights, parts.mask, bench.recipe.seed, statistics)
    return parts.selector.units(evidence, parts.final_density), parts.mean_density(parts.final_density)


@torch.no_grad()
def accuracy(net: nn.Module, batch: Batch) -> float:
    """Share of the images classified correctly."""
    images, labels = batch
    was_training = net.training
    logits = net.eval()(images)
    shards.reshard_(net)
    net.train(was_training)
    return float((logits.argmax(1) == labels).float().mean())


def _judged(net: nn.Module, mask: MaskSet, images: Tensor, asked: float, text: str) -> Verdict:
    layers = mask.layers()
    details = {"density": mask.density, "layers": {name: layer["density"] for name, layer in layers.items()}}
    dead = [name for name, layer in layers.items() if layer["alive"] == 0]
    if dead:
        blocks = ", ".join(dict.fromkeys(block_of(name) or name for name in dead))
        advice = "lower pruning.max_layer_sparsity, check pruning.layer_sparsity, or use pruning.scope=layer or erk"
        return Verdict(
            "removal", "failed", f"all weights are removed from {', '.join(dead[:3])} (in {blocks})", advice, details
        )
    if (difference := _slim_difference(net, mask, images)) > 1e-4:
        text = f"{text}; the slim model differs by {difference:.1e}"
        return Verdict("removal", "failed", text, "please report this: a removed unit is still in use", details)
    thin = min(layers, key=lambda name: layers[name]["density"])
    if layers[thin]["density"] < LEAST:
        text = f"{text}; sparsest layer: {thin} ({layers[thin]['density']:.2%} of weights kept)"
        return Verdict("removal", "warning", text, "lower pruning.max_layer_sparsity to spare it", details)
    if abs(mask.density - asked) > 0.05:
        return Verdict("removal", "warning", text, "units are too coarse to meet the target density", details)
    return Verdict("removal", "ok", text, details=details)


@torch.no_grad()
def _slim_difference(net: nn.Module, mask: MaskSet, images: Tensor) -> float:
    """Largest relative difference of logits between the masked network and the slim one."""
    kept, full = slim.kept_units(net, mask), slim.copy_of(net).eval()
    small = slim.copy_of(full)
    slim.shrink_(small, kept)
    expected = full(images)
    return float((small(images) - expected).abs().max() / expected.abs().max().clamp(min=1.0))
