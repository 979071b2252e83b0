"""The data of a recipe: source, augmentation, loaders, evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from vit_rsst import machine, shards
from vit_rsst.data.dealing import Dealing, dealt
from vit_rsst.data.decoding import Decoder, RandomCrop, auto_augment
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import DecodingLoader, InMemoryLoader, Loader, evaluation_batches, placed
from vit_rsst.data.options import DataOptions, Images
from vit_rsst.data.sources import open_data
from vit_rsst.data.streams import Stream
from vit_rsst.data.tables import Rows as TableRows
from vit_rsst.data.tables import Split, class_balanced
from vit_rsst.data.transforms import Augmentation, Erasing
from vit_rsst.errors import MissingRequirement
from vit_rsst.recipe.schema import Recipe, Train
from vit_rsst.training.counters import score

EVALUATION_BATCH, EVALUATION_BATCH_ON_CPU = 500, 128
"""Most images per forward pass of an evaluation."""


def data_options(recipe: Recipe) -> DataOptions:
    """The recipe's data section as options of the data package; images are always cropped at the center."""
    return DataOptions(**{f.name: getattr(recipe.data, f.name) for f in fields(Images)})


def channels(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the source's channels."""
    info = recipe.data.info
    return info.mean, info.std


def augmentation(recipe: Recipe) -> Augmentation:
    """Augmentation of whole batches, on the device."""
    augment = recipe.data.augment
    hflip = 0.5 * recipe.data.info.hflip if augment.hflip is None else augment.hflip
    erasing = None
    if augment.reprob:
        erasing = Erasing(augment.reprob, augment.remode, augment.rearea, augment.reaspect)
    return Augmentation(augment.padding if recipe.data.crop == "pad" else 0, hflip, erasing)


def training_decoder(recipe: Recipe, data: ImageData) -> Decoder:
    """Decoding of a training image, with the augmentation that happens during it.

    Raises:
        InputError: an augmentation unknown to timm.
    """
    augment, mean = recipe.data.augment, channels(recipe)[0]
    if augment.auto_augment is not None:
        auto_augment(augment.auto_augment, data.options.size, mean)
    return replace(
        data.decoder("train"),
        random_crop=RandomCrop(augment.scale, augment.ratio) if recipe.data.crop == "resized" else None,
        auto_augment=augment.auto_augment,
        color_jitter=augment.color_jitter,
        mean=mean,
    )


def num_workers(recipe: Recipe, accelerator: Accelerator) -> int:
    """Decoding processes of this training process; none by default without a GPU, where the model needs the cores."""
    if recipe.data.workers is not None:
        return recipe.data.workers
    if accelerator.device.type == "cpu":
        return 0
    return min(8, machine.cores() // machine.local_processes(accelerator.num_processes))


def build_loader(recipe: Recipe, data: ImageData, dealing: Dealing, accelerator: Accelerator) -> Loader:
    """This rank's training batches, from images decoded in advance or on the fly."""
    mean, std = channels(recipe)
    decoder, device = training_decoder(recipe, data), accelerator.device
    common = {
        "dealing": dealing,
        "rank": accelerator.process_index,
        "device": device,
        "seed": recipe.seed,
        "augmentation": augmentation(recipe),
        "mean": mean,
        "std": std,
        "repeats": recipe.data.augment.aug_repeats,
    }
    samples, weights = data.rows["train"], None
    if recipe.data.sampler == "class_balanced":
        weights = class_balanced(samples.labels)
    if not recipe.data.redrawn:
        samples = data.samples("train", recipe.data.in_memory, 0.4 / machine.local_processes(accelerator.num_processes))
    if isinstance(samples, Split):
        return InMemoryLoader(split=placed(samples, device), weights=weights, **common)
    if weights is not None:
        assert not isinstance(samples, Stream), "the rules refuse a balanced stream"
        samples = replace(samples, weights=weights)
    return DecodingLoader(
        rows=samples,
        decoder=decoder,
        workers=num_workers(recipe, accelerator),
        max_corrupt=recipe.data.max_corrupt,
        lanes=recipe.data.lanes,
        **common,
    )


def evaluation_batch(device: torch.device, train: Train | None = None) -> int:
    """Images per forward pass of an evaluation, the same for any number of processes.

    On a CPU few, as it allocates the activations anew in every pass: 500 images at 32 px take 1.4 times as long as in
    passes of 128.

    Args:
        train: of a run, which evaluates at most eight times as many as in a training step: that keeps the activations
            of all blocks, and an evaluation about one's.
    """
    most = min(EVALUATION_BATCH, EVALUATION_BATCH_ON_CPU) if device.type == "cpu" else EVALUATION_BATCH
    return most if train is None else min(most, 8 * (train.batch_per_device or train.global_batch))


def make_evaluate(
    net: nn.Module, data: ImageData, accelerator: Accelerator, recipe: Recipe, give_up: Callable[[], bool]
) -> Callable[[str], dict[str, float]]:
    """A function that scores the current network on a split, over all ranks.

    Args:
        give_up: checked before every batch.
    """
    mean, std = channels(recipe)
    # What fits in memory is decoded now: a corrupt image is found before the first step, not after the last.
    share = 0.4 / machine.local_processes(accelerator.num_processes)
    batch = evaluation_batch(accelerator.device, recipe.train)
    filler = filler_images(accelerator, data)
    splits = {
        name: own_samples(data, name, accelerator, recipe.data.in_memory, share, batch) for name in ("val", "test")
    }
    workers = num_workers(recipe, accelerator)

    def evaluate(split: str) -> dict[str, float]:
        samples, rank, num_processes = splits[split]
        batches = evaluation_batches(
            samples,
            batch,
            rank=rank,
            num_processes=num_processes,
            device=accelerator.device,
            mean=mean,
            std=std,
            decoder=data.decoder(split),
            workers=workers,
            max_corrupt=recipe.data.max_corrupt,
        )
        scores = score(net, batches, accelerator.device, give_up, bool(recipe.train.compile), filler)
        shards.reshard_(net)
        return scores

    return evaluate


def filler_images(accelerator: Accelerator, data: ImageData) -> Tensor | None:
    """Images for ranks that have run out of theirs; None unless weights are sharded. See `shards.in_step`."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    return torch.zeros(1, 3, data.options.size, data.options.size, device=accelerator.device)


def own_samples(
    data: ImageData, split: str, accelerator: Accelerator, in_memory: bool | None, share: float, batch: int
) -> tuple[Split | TableRows | Stream, int, int]:
    """What this rank evaluates of a split, and the rank and number of processes that it is dealt to.

    Of a table, a rank decodes and holds its own rows alone.
    """
    rank, world, rows = accelerator.process_index, accelerator.num_processes, data.rows[split]
    if isinstance(rows, Stream):
        return rows, rank, world
    rows = rows.part(dealt(rows.count, batch, rank, world))
    if not rows.count:
        return rows, 0, 1
    samples = replace(data, rows={split: rows}).samples(split, in_memory, share)
    if isinstance(samples, Split):
        samples = placed(samples, accelerator.device)
    return samples, 0, 1


@dataclass(frozen=True)
class Rows:
    """Images per split, counted or as published.

    Attributes:
        stream: what the training images are read from, unless from a table.
    """

    train: int
    val: int
    test: int
    num_classes: int
    are_counted: bool
    told: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    stream: Stream | None = None

    @classmethod
    def counted(cls, data: ImageData) -> "Rows":
        counts = (data.count(split) for split in ("train", "val", "test"))
        train = data.rows["train"]
        stream = train if isinstance(train, Stream) else None
        return cls(*counts, len(data.classes), True, data.told, tuple(data.classes), stream)

    def text(self) -> str:
        """`1,293 train, 144 val, 360 test`."""
        counts = {"train": self.train, "val": self.val, "test": self.test}
        return ", ".join(f"{n:,} {split}" for split, n in counts.items())


def count_rows(recipe: Recipe) -> Rows:
    """Images per split: counted, or as published if the Hub cannot be reached."""
    info = recipe.data.info
    try:
        return Rows.counted(open_data(data_options(recipe), recipe.seed, recipe.data.shuffle_buffer))
    except MissingRequirement:
        if info.rows is None or recipe.data.path:
            raise
        val = round(info.rows[0] * recipe.data.val_share)
        train = min(info.rows[0] - val, recipe.data.train_samples or info.rows[0])
        if recipe.data.imbalance.kind is not None:
            train = sum(recipe.data.imbalance.counts(round(train / info.num_classes), info.num_classes))
        return Rows(train, val, info.rows[1], info.num_classes, False)
