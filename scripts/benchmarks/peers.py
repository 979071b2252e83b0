"""Wall time of a small training as a whole process: this project, a loop built from timm, transformers' Trainer.

Three epochs of 10,000 CIFAR-10 images at 32 px with the same small ViT (patch 4, width 192, 6 blocks of 3 heads), batch
64, AdamW, crop and flip, one evaluation per epoch and one of the test images at the end. Each contender is a separate
process; they alternate in random order. Evaluations of the peers take as many images per pass as a training step, which
is timm's default. With --json FILE, each alternation is kept in FILE.part, and a measurement that was interrupted goes
on from there on the same machine and commit. Printed are medians and ranges of the total time, of training with its
evaluations, and of the rest. The bound is missed if the whole interval of the ratio to the faster peer is above it.
--quick: 256 images of noise, and 64 each for evaluation and test, one alternation; the numbers are then meaningless.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from _common import Interval, environment, interval, parse_args, report
from torch import nn

EPOCHS, IMAGES, BATCH, ALTERNATIONS = 3, 10_000, 64, 5
QUICK_IMAGES, QUICK_SCORED, QUICK_ALTERNATIONS = 256, 64, 1
BOUND = 1.0
MODEL = {"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "mlp_ratio": 4.0}
LR, DECAY = 1e-3, 0.05
ROLE, DATA, SIZE = "PEERS_ROLE", "PEERS_DATA", "PEERS_IMAGES"
"""Environment variables that make this script a peer: its role, the CIFAR-10 folder, the number of images."""
OURS = "vit-rsst"


def images() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Decoded images of each split, uint8, and their labels."""
    from vit_rsst.data.options import DataOptions
    from vit_rsst.data.sources import open_data

    number = int(os.environ[SIZE])
    data = open_data(DataOptions("cifar10", os.environ[DATA], train_samples=number), 0)
    found = {split: data.samples(split, True, 0.5) for split in ("train", "val", "test")}
    return {split: (samples.images, samples.labels) for split, samples in found.items()}


def write_noise(folder: Path) -> None:
    """As many images of noise as --quick reads, as the parquet files of CIFAR-10; a tenth of train is val."""
    import datasets
    from PIL import Image

    names = datasets.ClassLabel(names=list("abcdefghij"))
    features, draw = datasets.Features({"img": datasets.Image(), "label": names}), np.random.default_rng(0)
    for split, count in (("train", 10 * QUICK_SCORED), ("test", QUICK_SCORED)):
        noise = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        rows = {"img": [Image.fromarray(image) for image in noise], "label": [i % 10 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def said(moment: str) -> None:
    print(json.dumps({"moment": moment, "time": time.time()}), flush=True)


def timm_net() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **MODEL)


def trainer_net() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=32,
        patch_size=4, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def our_net() -> nn.Module:
    from vit_rsst.models import zoo

    return zoo.create(*zoo.describe("vit_tiny", MODEL, 10))


def num_parameters() -> dict[str, int]:
    """Of each contender's network; the comparison is fair only if they are equal."""
    with torch.device("meta"):
        nets = {OURS: our_net(), "timm": timm_net(), "Trainer": trainer_net()}
    return {name: sum(parameter.numel() for parameter in net.parameters()) for name, net in nets.items()}


def by_timm() -> None:
    """What a timm user would write: its model, optimizer, scheduler, clipping and meters, torch's DataLoader."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter, accuracy, dispatch_clip_grad
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    splits = images()
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))]
    augment = v2.Compose([v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), *to_float])

    class Images(Dataset):
        def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, transform: Callable):
            self.pixels, self.labels, self.transform = pixels, labels, transform

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return self.transform(self.pixels[i]), int(self.labels[i])

    torch.manual_seed(0)
    net = timm_net()
    optimizer = create_optimizer_v2(net, "adamw", lr=LR, weight_decay=DECAY)
    train = DataLoader(Images(*splits["train"], augment), BATCH, shuffle=True, drop_last=True)
    scored = {split: DataLoader(Images(*splits[split], v2.Compose(to_float)), BATCH) for split in ("val", "test")}
    scheduler = CosineLRScheduler(optimizer, EPOCHS * len(train), t_in_epochs=False)

    def evaluate(split: str) -> float:
        net.eval()
        top1 = AverageMeter()
        with torch.inference_mode():
            for batch, labels in scored[split]:
                top1.update(accuracy(net(batch), labels)[0].item(), len(labels))
        return top1.avg

    said("training")
    for epoch in range(EPOCHS):
        net.train()
        losses = AverageMeter()
        for step, (batch, labels) in enumerate(train):
            loss = torch.nn.functional.cross_entropy(net(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(net.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 0:
                losses.update(loss.item(), len(labels))
            scheduler.step_update(epoch * len(train) + step + 1)
        evaluate("val")
    said("trained")
    evaluate("test")


def by_trainer() -> None:
    """What a transformers user would write: its ViT, its Trainer, its default collator."""
    from torch.utils.data import Dataset
    from torchvision.transforms import v2
    from transformers import Trainer, TrainerCallback, TrainingArguments

    splits = images()
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))]
    augment = v2.Compose([v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), *to_float])

    class Images(Dataset):
        def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, transform: Callable):
            self.pixels, self.labels, self.transform = pixels, labels, transform

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, i: int) -> dict:
            return {"pixel_values": self.transform(self.pixels[i]), "labels": int(self.labels[i])}

    class Moments(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            said("training")

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            learning_rate=LR, weight_decay=DECAY, lr_scheduler_type="cosine", eval_strategy="epoch", logging_steps=50,
            save_strategy="no", report_to=[], dataloader_drop_last=True, disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            trainer_net(), arguments, train_dataset=Images(*splits["train"], augment),
            eval_dataset=Images(*splits["val"], v2.Compose(to_float)), callbacks=[Moments()],
            compute_metrics=lambda found: {"top1": float((found.predictions.argmax(1) == found.label_ids).mean())},
        )  # fmt: skip
        trainer.train()
        said("trained")
        trainer.evaluate(Images(*splits["test"], v2.Compose(to_float)))


ROLES = {"timm": by_timm, "Trainer": by_trainer}


def command(name: str, folder: Path, data: Path, number: int) -> list[str]:
    if name in ROLES:
        return [sys.executable, __file__]
    recipe = Path(folder) / "recipe.yaml"
    recipe.write_text(
        f"name: run\noutput_dir: {folder}\n"
        f"data: {{source: cifar10, path: {data}, train_samples: {number}, augment: plain}}\n"
        f"model: {{name: vit_tiny, args: {json.dumps(MODEL)}}}\n"
        f"optim: {{lr: {LR}, weight_decay: {DECAY}}}\n"
        f"train: {{epochs: {EPOCHS}, global_batch: {BATCH}}}\n"
        "pruning: {method: dense, schedule: {rounds: 0}}\ntracking: {figures: false}\n",
        encoding="utf-8",
    )
    return [sys.executable, "-m", "vit_rsst.train", str(recipe)]


def whole_process(name: str, data: Path, number: int) -> dict[str, float]:
    """Seconds in total, of training, and of the rest.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        variables = {ROLE: name, DATA: str(data), SIZE: str(number), "PYTHONPATH": paths}
        began = time.time()
        done = subprocess.run(
            command(name, Path(folder), data, number), env=os.environ | variables, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        ended = time.time()
        if done.returncode:
            raise RuntimeError(f"{name} exited with {done.returncode}: {done.stderr[-2000:]}")
        if name == OURS:
            events = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
            rounds = [event["seconds"] for event in events if event["event"] == "round"]
            training = sum(rounds)
            return {"everything": ended - began, "training": training, "outside": ended - began - training}
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"moment"')]
    moments = {line["moment"]: line["time"] for line in lines}
    training = moments["trained"] - moments["training"]
    return {"everything": ended - began, "training": training, "outside": ended - began - training}


def measure(data: Path, number: int, alternations: int, part: Path | None = None) -> list[dict[str, dict[str, float]]]:
    """Contender → what `whole_process` finds, in each alternation.

    Args:
        part: file that holds the alternations so far.
    """
    here = {key: value for key, value in surroundings().items() if key not in ("date", "command")}
    found = []
    with suppress(OSError, ValueError, KeyError):
        kept = json.loads(part.read_text(encoding="utf-8")) if part else {"environment": None}
        found = kept["alternations"] if kept["environment"] == here else []
    for i in range(len(found), alternations):
        order = np.random.default_rng(i).permutation([OURS, *ROLES])
        found.append({str(name): whole_process(name, data, number) for name in order})
        print(i + 1, {name: round(times["everything"], 1) for name, times in found[-1].items()}, file=sys.stderr)
        if part:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"environment": here, "alternations": found}), encoding="utf-8")
    return found


def surroundings() -> dict:
    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def main() -> int:
    if os.environ.get(ROLE) in ROLES:
        ROLES[os.environ[ROLE]]()
        return 0
    args = parse_args(__doc__)
    part = args.json.with_name(args.json.name + ".part") if args.json and not args.quick else None
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            write_noise(Path(folder))
            alternations = measure(Path(folder), QUICK_IMAGES, QUICK_ALTERNATIONS)
    else:
        data = Path(os.environ.get(DATA, "data/cifar10")).resolve()
        alternations = measure(data, IMAGES, ALTERNATIONS, part)
    found = {name: [times[name] for times in alternations] for name in (OURS, *ROLES)}
    everything = {name: np.array([times["everything"] for times in runs]) for name, runs in found.items()}
    faster = min(ROLES, key=lambda name: float(np.median(everything[name])))
    ratio: Interval = interval(everything[OURS] / everything[faster])
    parameters = num_parameters()
    missed = [f"the networks differ: {parameters}"] if len(set(parameters.values())) > 1 else []
    missed += [f"{OURS} takes {ratio} of {faster}'s time, bound {BOUND}"] if ratio.exceeds(BOUND) else []
    rows = []
    for name, runs in found.items():
        cells = []
        for phase in ("everything", "training", "outside"):
            values = [times[phase] for times in runs]
            cells.append(f"{np.median(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        rows.append((name, *cells))
    result = {
        "environment": surroundings(),
        "parameters": parameters,
        "ratio": asdict(ratio),
        "faster_peer": faster,
        "missed": missed,
        "seconds": found,
    }
    code = report(args, result, ("peers", "total s", "training", "start-up, test and end"), rows)
    if part:
        part.unlink()
    return code


if __name__ == "__main__":
    sys.exit(main())
