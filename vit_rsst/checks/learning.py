"""Checks of model and optimizer: shapes, first loss, gradients, over-fitting, learning rate range test."""

import math
import statistics
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from vit_rsst import shards
from vit_rsst.checks.bench import LIMIT, Bench, Verdict
from vit_rsst.errors import OF_A_LIBRARY, first_line
from vit_rsst.text import duration
from vit_rsst.timing import timed
from vit_rsst.training import optim

FEW, STEPS = 32, 200
"""Images to over-fit, and steps allowed for it."""

SWEEP = 100
"""Steps of the range test."""

NO_SHAPES, NOTHING_LEARNS = "shapes do not match", "nothing is trained"
"""Why the remaining checks cannot run."""


def shapes(bench: Bench) -> Verdict:
    """The shapes of consecutive stages match, and the last one returns one logit per class."""
    net, found = bench.make_net(), []

    def note(name: str) -> object:
        return lambda module, args, output: found.append((name, _shape(output)))

    hooks = [module.register_forward_hook(note(name)) for name, module in stages(net)]
    images = bench.batch[0]
    try:
        with torch.no_grad():
            logits, _ = timed(lambda: net(images), bench.device)
    except OF_A_LIBRARY as error:
        text = f"the model fails on images {tuple(images.shape)}: {first_line(error)}"
        advice = "adjust data.image_size or model.args"
        return Verdict("shapes", "failed", text, advice, blocks=NO_SHAPES)
    for hook in hooks:
        hook.remove()
    found = [("images", tuple(images.shape)), *found]
    merged = [found[0], *(b for a, b in pairwise(found) if a[1] != b[1])]
    text = " → ".join(f"{name} {'×'.join(map(str, shape[1:]))}" for name, shape in merged)
    details = {"stages": [[name, list(shape)] for name, shape in found]}
    if tuple(logits.shape) != (len(images), bench.num_classes):
        advice = f"expected {bench.num_classes} logits, one per class; check model.args"
        return Verdict("shapes", "failed", f"{text}; logits are {tuple(logits.shape)}", advice, details, NO_SHAPES)
    return Verdict("shapes", "ok", text, details=details)


def stages(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Top-level parts of the network; of each list of blocks, the first and the last."""
    found = []
    for name, module in net.named_children():
        inner = list(module.named_children())
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(inner) > 1:
            found += [(f"{name}.{key}", child) for key, child in (inner[0], inner[-1])]
        elif inner or any(True for _ in module.parameters()):
            found.append((name, module))
    return found


def _shape(output: object) -> tuple[int, ...]:
    output = getattr(output, "logits", getattr(output, "last_hidden_state", output))
    return tuple(output.shape) if isinstance(output, Tensor) else ()


def first_loss(bench: Bench) -> Verdict:
    """The loss of an untrained model is about ln C."""
    net = bench.make_net()
    with torch.no_grad():
        loss, seconds = timed(lambda: float(bench.loss(net, bench.batch)), bench.device)
    loss = bench.mean(loss)
    bench.step_seconds = bench.mean(3 * seconds)  # a backward pass costs about two forward passes
    expected = math.log(bench.num_classes)
    text, details = f"{loss:.3f} before the first step; ln {bench.num_classes} is {expected:.3f}", {"loss": loss}
    if not math.isfinite(loss):
        return Verdict(
            "first loss",
            "failed",
            text,
            "weights or images are not finite: check model.start_from and the data",
            details,
        )
    if loss > 1.5 * expected + 0.2:
        advice = "the untrained head is over-confident: check normalisation and model.args"
        return Verdict("first loss", "warning", text, advice, details)
    if loss < 0.8 * expected - 0.1 and not (bench.recipe.model.start_from or bench.recipe.model.pretrained):
        return Verdict(
            "first loss", "warning", text, "too low for an untrained model: do the images reveal the label?", details
        )
    return Verdict("first loss", "ok", text, details=details)


def gradients(bench: Bench) -> Verdict:
    """Within three steps every parameter gets a gradient that is non-zero and finite."""
    seconds = bench.estimate(3, len(bench.batch[1]))
    if seconds > LIMIT:
        return Verdict("gradients", "skipped", f"would take about {duration(seconds)} on this machine")
    net = bench.make_net().train()
    most = {name: 0.0 for name, _ in net.named_parameters()}
    optimizer = None

    def backward() -> bool:
        loss = bench.loss(net, bench.batch)
        if loss.requires_grad:  # FSDP2 must not see a forward pass that no backward pass follows
            loss.backward()
        return loss.requires_grad

    for _ in range(3):  # below a zero-initialised head, gradients start at the second step
        learns, seconds = timed(backward, bench.device)
        if not learns:
            return replace(_gradient_verdict(net, most), blocks=NOTHING_LEARNS)
        bench.step_seconds = bench.mean(seconds)
        for name, parameter in net.named_parameters():
            norm = 0.0 if parameter.grad is None else float(shards.whole(parameter.grad.norm()))
            most[name] = norm if math.isnan(norm) else max(norm, most[name])
        if optimizer is None:
            optimizer = bench.optimizer(net)
            optim.set_lr_(optimizer, min(bench.recipe.optim.lr, 1e-3))
        optimizer.step()
        optimizer.zero_grad()
    return _gradient_verdict(net, most)


def _gradient_verdict(net: nn.Module, norms: dict[str, float]) -> Verdict:
    unreached = [name for name, p in net.named_parameters() if name in net.observed.unreached and not p.requires_grad]
    norms = {name: norm for name, norm in norms.items() if name not in unreached}
    frozen = [n for n, p in net.named_parameters() if not p.requires_grad and n not in (*optim.TOKENS, *unreached)]
    silent = [n for n, norm in norms.items() if norm == 0.0 and n not in frozen and n not in optim.TOKENS]
    broken = [n for n, norm in norms.items() if not math.isfinite(norm)]
    details = {"norms": {name: norm if math.isfinite(norm) else str(norm) for name, norm in norms.items()}}
    wrong = (
        (broken, "a gradient that is not finite", "lower optim.lr, set optim.clip_grad_norm or train.precision=no"),
        (frozen, "no gradient because they are frozen", "requires_grad is off, but every parameter should train"),
        (silent, "a gradient of zero", "they do not affect the loss: is a part detached or unused?"),
    )
    for names, what, advice in wrong:
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return Verdict("gradients", "failed", f"{', '.join(names[:3])}{more} have {what}", advice, details)
    low, high = min(norms, key=norms.get), max(norms, key=norms.get)
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    ends = " to ".join(f"{norms[name]:.1e} ({name})" for name in (low, high))
    text = f"all {len(norms)} parameters have a gradient; norms from {ends}, total {total:.2f}"
    if idle := [name for name in unreached if name.rpartition(".")[2] not in optim.TOKENS]:
        text = f"the loss does not reach {', '.join(idle[:3])} ({len(idle)} in all), which are frozen; {text}"
        advice = "expected of heads that classification does not use; otherwise look for a part that is detached"
        return Verdict("gradients", "warning", text, advice, details)
    if not 1e-3 <= total <= 1e3:
        return Verdict("gradients", "warning", text, "a total of 0.1 to 10 is usual: check normalisation", details)
    return Verdict("gradients", "ok", text, details=details)


def over_fit(bench: Bench) -> Verdict:
    """The model memorises 32 images within 200 steps, without augmentation, dropout or weight decay."""
    seconds = bench.estimate(2 * STEPS, FEW)
    if seconds > LIMIT:
        return Verdict("over-fit", "skipped", f"would take about {duration(seconds)} on this machine")
    batch, trails = bench.draw("train", FEW, 2), {}
    for lr in (1e-3, 2e-4):
        bench.toy, trails[lr] = _learn_by_heart(bench, batch, lr)
        if trails[lr][-1][1] == 1.0:
            text = f"{len(batch[1])} images memorised after {len(trails[lr])} steps (AdamW, learning rate {lr:g})"
            return Verdict("over-fit", "ok", text, details={"losses": [loss for loss, _ in trails[lr]]})
    best = max(share for trail in trails.values() for _, share in trail)
    last = min(trail[-1][0] for trail in trails.values())
    text = f"only {best:.0%} of {len(batch[1])} images were memorised in {STEPS} steps, loss {last:.3f}"
    advice = "the model does not learn: see the checks above, look for frozen or detached parts, check model.args"
    return Verdict("over-fit", "failed", text, advice, {"losses": [loss for loss, _ in trails[1e-3]]})


def _learn_by_heart(
    bench: Bench, batch: tuple[Tensor, Tensor], lr: float
) -> tuple[nn.Module, list[tuple[float, float]]]:
    """The network, and (loss, accuracy) of every step until all images are correct."""
    net, trail = bench.make_net().train(), []
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "DropPath":  # timm's
            module.drop_prob = 0.0
    learnt = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=lr, weight_decay=0.0)
    for step in range(STEPS):
        optim.set_lr_(optimizer, lr * min(1.0, (step + 1) / 10))
        with bench.accelerator.autocast():
            logits = net(batch[0])
        loss = nn.functional.cross_entropy(logits.float(), batch[1])
        share = float((logits.argmax(1) == batch[1]).float().mean())
        trail.append((bench.mean(float(loss.detach())), bench.mean(share)))
        if trail[-1][1] == 1.0 or not (loss.requires_grad and math.isfinite(trail[-1][0])):
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
    return net, trail


def learning_rate(bench: Bench) -> Verdict:
    """Range test (Smith 2017): the rate grows from step to step; where has the loss fallen, where does it diverge?

    A rate between a tenth of the first and twice the second is fine: a round has more steps than the test, warm-up
    and decay.
    """
    seconds = bench.estimate(SWEEP, len(bench.batch[1]))
    if seconds > LIMIT:
        return Verdict(
            "learning rate", "skipped", f"the range test would take about {duration(seconds)} on this machine"
        )
    rates, losses = sweep(bench)
    falls, diverges = turning_points(rates, losses)
    lr = bench.recipe.optim.lr
    details = {"rates": rates, "losses": losses, "falls_at": falls, "diverges_at": diverges}
    if falls is None:
        text = f"{lr:g}; in the range test the loss never falls by more than noise"
        return Verdict("learning rate", "warning", f"{text}: inconclusive", "see the checks above", details)
    text = f"{lr:g}; in the range test the loss has fallen by {falls:.1e} and diverges at {diverges:.1e}"
    suggestion = f"optim.lr={_rounded(min(math.sqrt(falls * diverges), diverges / 10))}"
    if lr > 2 * diverges:
        return Verdict("learning rate", "failed", f"{text}: the run would diverge", suggestion, details)
    if lr < falls / 10:
        return Verdict("learning rate", "failed", f"{text}: training would be too slow", suggestion, details)
    if lr > diverges and not bench.recipe.optim.warmup_epochs:
        return Verdict("learning rate", "warning", f"{text}: high without warm-up", "set optim.warmup_epochs", details)
    return Verdict("learning rate", "ok", f"{text}: fine", details=details)


def sweep(bench: Bench) -> tuple[list[float], list[float]]:
    """Learning rates and the loss at each; ends once the loss has diverged."""
    options = bench.recipe.optim
    low, high = (1e-4, 100.0) if options.name == "sgd" else (1e-6, 10.0)
    net = bench.make_net().train()
    optimizer = bench.optimizer(net)
    rates, losses = [], []
    for i, batch in enumerate(bench.batches(SWEEP)):
        optim.set_lr_(optimizer, low * (high / low) ** (i / (SWEEP - 1)))
        loss = bench.loss(net, batch)
        value = bench.mean(float(loss.detach()))
        if not math.isfinite(value) or (losses and value > 5 * max(losses[0], 1.0)) or not loss.requires_grad:
            break
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(value)
        optimizer.zero_grad()
        loss.backward()
        if options.clip_grad_norm:
            nn.utils.clip_grad_norm_(net.parameters(), options.clip_grad_norm)
        optimizer.step()
    return rates, losses


def turning_points(rates: list[float], losses: list[float]) -> tuple[float | None, float]:
    """Rates at which the smoothed loss has fallen by three quarters, and later at which it exceeds its start.

    The start is the mean of the first ten steps, whose rates are too low to change anything; twice their standard
    deviation is noise.

    Returns:
        The two rates. The first is None if the loss falls by no more than noise; the second is the last rate if the
        loss never exceeds its start again.
    """
    if len(losses) < 10:
        return None, rates[-1] if rates else 0.0
    parts = [losses[max(0, i - 2) : i + 3] for i in range(len(losses))]
    smooth = [statistics.mean(part) for part in parts]
    start, noise = statistics.mean(losses[:10]), 2 * statistics.stdev(losses[:10])
    low = min(smooth)
    diverges = next((i for i in range(smooth.index(low), len(smooth)) if smooth[i] > start + noise), len(smooth) - 1)
    falls = next(i for i, loss in enumerate(smooth) if loss <= start - 0.75 * (start - low))
    return (rates[falls] if low < start - noise else None), rates[diverges]


def _rounded(value: float) -> str:
    """To one significant digit."""
    return f"{float(f'{value:.0e}'):g}"
