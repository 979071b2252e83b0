"""Images per second and core: streams and tables of vit_rsst against a plain DataLoader and timm's loader.

All read the same parquet files with the same augmentation, alternating in one process, without workers, on one thread:
random resized crop and flip at 224 px (a sample of ImageNet), random crop with padding and flip at 32 px (CIFAR-10).
The peers are `datasets` streams with torchvision's transforms per sample, and timm's transforms and collation.

    python scripts/benchmarks/data.py --cifar FOLDER --imagenet FOLDER
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from _common import alternate, environment, interval, report
from datasets import Image, load_dataset
from timm.data import create_transform
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader
from torchvision import transforms

from vit_rsst.data.catalog import CATALOG
from vit_rsst.data.dealing import Dealing
from vit_rsst.data.decoding import RandomCrop, Sample
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import DecodingLoader, InMemoryLoader
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data, open_tables
from vit_rsst.data.streams import share_of
from vit_rsst.data.tables import Rows
from vit_rsst.data.transforms import Augmentation
from vit_rsst.progress import Progress

BATCH = 64
AT_224 = 1.0  # a stream, times the faster peer
FORMER = 0.97  # a stream at 224 px, times that of version 0.1
AT_32 = 1.3  # a stream, times the plain loader
FROM_MEMORY = 10.0  # at 32 px, times the plain loader
FIRST_BATCH_SECONDS = 2.0
GIVE_UP_SECONDS = 1.0


class Plain(torch.utils.data.IterableDataset):
    """A shuffled `datasets` stream, decoded by `datasets` and transformed sample by sample."""

    def __init__(self, folder: Path, transform: Callable):
        self.rows = stream_of(folder).shuffle(seed=0, buffer_size=256)
        self.image = next(name for name, feature in self.rows.features.items() if isinstance(feature, Image))
        self.transform = transform

    def __iter__(self) -> Iterator:
        for row in self.rows:
            yield self.transform(row[self.image].convert("RGB")), row["label"]


def stream_of(folder: Path) -> datasets.IterableDataset:
    files = sorted(map(str, folder.rglob("train-*.parquet")))
    return load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)


def plain(folder: Path, size: int, source: str) -> Iterator:
    """What a user would write with torchvision."""
    info = CATALOG[source]
    if size == 32:
        crop = [transforms.RandomCrop(32, padding=4)]
    else:
        crop = [transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC)]
    after = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(info.mean, info.std)]
    return endless(DataLoader(Plain(folder, transforms.Compose(crop + after)), BATCH, drop_last=True))


def timms(folder: Path, size: int, source: str) -> Iterator:
    """timm's training transform and uint8 collation, normalised like its PrefetchLoader does on the device."""
    info = CATALOG[source]
    transform = create_transform(
        size, is_training=True, no_aug=False, use_prefetcher=True, interpolation="bicubic", color_jitter=None,
        auto_augment=None, scale=(0.08, 1.0) if size > 32 else (0.64, 1.0),
    )  # fmt: skip
    mean, std = (torch.tensor([255 * v for v in values]).view(1, 3, 1, 1) for values in (info.mean, info.std))
    loader = DataLoader(Plain(folder, transform), BATCH, drop_last=True, collate_fn=fast_collate)
    for images, labels in endless(loader):
        yield images.float().sub_(mean).div_(std), labels


def endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def ours(folder: Path, size: int, source: str, streaming: bool = True, in_memory: bool = False) -> Iterator:
    """This package's loader of the same data."""
    info = CATALOG[source]
    options = DataOptions(source, str(folder), image_size=size, streaming=streaming)
    if streaming:
        data = open_data(replace(options, test_fraction=0.1), 0, buffer=256)
    else:
        table = open_tables(options)["train"]
        data = ImageData(options, {"train": Rows("train", table, np.arange(len(table.labels)))}, table.classes, {})
    dealing, crop = Dealing.of(BATCH, None, 1), Augmentation(4 if size == 32 else 0, 0.5)
    common = (dealing, 0, torch.device("cpu"), 0, crop, info.mean, info.std)
    if in_memory:
        loader = InMemoryLoader(*common, split=data.train)
    else:
        decoder = data.decoder("train")
        if size > 32:
            decoder = replace(decoder, random_crop=RandomCrop())
        loader = DecodingLoader(*common, rows=data.rows["train"], decoder=decoder)
    progress = Progress(data.count("train") // BATCH, (1_000_000,))
    while True:
        for [batch] in loader.steps(progress):
            yield batch
        progress.epoch += 1


def former(folder: Path, size: int, source: str) -> Iterator:
    """The stream of version 0.1: shards read round-robin, shuffled through a buffer, decoded as today."""
    info = CATALOG[source]
    data = open_data(DataOptions(source, str(folder), image_size=size, streaming=True, test_fraction=0.1), 0)
    decoder = replace(data.decoder("train"), random_crop=RandomCrop() if size > 32 else None)
    crop, part = Augmentation(4 if size == 32 else 0, 0.5), data.rows["train"].part
    rows = stream_of(folder)
    image = next(name for name, feature in rows.features.items() if isinstance(feature, Image))
    rows = rows.select_columns([image, "label"]).cast_column(image, Image(decode=False)).with_format("arrow")
    names = [Path(file).name for file in sorted(map(str, folder.rglob("train-*.parquet")))]

    def samples(number: int) -> Iterator[Sample]:
        row = 0
        for table in rows.shard(num_shards=len(names), index=number).iter(batch_size=64):
            for image_of_row, label in zip(table[image].to_pylist(), table["label"].to_pylist(), strict=True):
                place = f"{names[number]}:{row}"
                row += 1
                if part[0] <= share_of(place) < part[1]:
                    yield Sample(place, image_of_row, label, row)

    def in_turns() -> Iterator[Sample]:
        going = [samples(number) for number in range(len(names))]
        while going:
            for source in list(going):
                if (sample := next(source, None)) is None:
                    going.remove(source)
                else:
                    yield sample

    generator, step = random.Random(0), 0
    while True:
        read = in_turns()
        buffer = list(islice(read, 256))
        batch = []
        for sample in read:
            place = generator.randrange(len(buffer))
            batch.append(buffer[place])
            buffer[place] = sample
            if len(batch) == BATCH:
                decoded = decoder.__getitems__(batch)
                yield crop.apply(decoded.images, crop.draw(BATCH, step), info.mean, info.std), decoded.labels
                batch, step = [], step + 1


def first_and_last(folder: Path, workers: int) -> tuple[float, float]:
    """Seconds from iter() to the first batch, and to close a shuffled stream mid-epoch."""
    data = open_data(DataOptions("cifar10", str(folder), streaming=True), 0)
    loader = DecodingLoader(
        Dealing.of(BATCH, None, 1), 0, torch.device("cpu"), 0, Augmentation(4, 0.5), (0.5,) * 3, (0.5,) * 3,
        rows=data.rows["train"], decoder=data.decoder("train"), workers=workers,
    )  # fmt: skip
    began = time.perf_counter()
    steps = loader.steps(Progress(data.count("train") // BATCH, (1,)))
    next(steps)
    first = time.perf_counter() - began
    list(islice(steps, 5))
    began = time.perf_counter()
    steps.close()
    return first, time.perf_counter() - began


def plain_gives_up(folder: Path) -> float:
    """Seconds to close a shuffled `datasets` stream mid-epoch."""
    rows = iter(stream_of(folder).shuffle(seed=0, buffer_size=4096))
    list(islice(rows, 5 * BATCH))
    began = time.perf_counter()
    rows.close()
    del rows
    return time.perf_counter() - began


def measure(folder: Path, size: int, source: str, alternations: int, batches: int) -> dict:
    loaders = {"vit_rsst stream": ours(folder, size, source), "vit_rsst table": ours(folder, size, source, False)}
    loaders["version 0.1 stream"] = former(folder, size, source)
    if size == 32:
        loaders["vit_rsst memory"] = ours(folder, size, source, False, True)
    loaders |= {"datasets + torchvision": plain(folder, size, source), "timm": timms(folder, size, source)}
    takes = {name: (lambda loader=loader: list(islice(loader, batches))) for name, loader in loaders.items()}
    seconds = alternate(takes, alternations, 2, torch.device("cpu"))
    rate = {name: batches * BATCH / float(np.median(values)) for name, values in seconds.items()}
    base = seconds["datasets + torchvision"]
    ratios = {name: interval(base / values) for name, values in seconds.items()}
    faster = min(("datasets + torchvision", "timm"), key=lambda name: np.median(seconds[name]))
    return {
        "images_per_s": rate,
        "times_plain": {name: vars(ratio) for name, ratio in ratios.items()},
        "stream_times_faster_peer": vars(interval(seconds[faster] / seconds["vit_rsst stream"])),
        "faster_peer": faster,
        "stream_times_former": vars(interval(seconds["version 0.1 stream"] / seconds["vit_rsst stream"])),
    }


def missed(small: dict | None, large: dict | None, first: float, given_up: float) -> list[str]:
    """A bound is missed if the whole interval is below it."""
    sentences = []
    if large and large["stream_times_faster_peer"]["high"] < AT_224:
        sentences.append(f"at 224 px a stream is slower than {large['faster_peer']}")
    if large and large["stream_times_former"]["high"] < FORMER:
        sentences.append("at 224 px a stream is slower than that of version 0.1")
    for name, bound in (("vit_rsst stream", AT_32), ("vit_rsst memory", FROM_MEMORY)):
        if small and small["times_plain"][name]["high"] < bound:
            sentences.append(f"at 32 px {name} is less than {bound} times the plain loader")
    if first > FIRST_BATCH_SECONDS:
        sentences.append(f"the first batch took {first:.2f} s")
    if given_up > GIVE_UP_SECONDS:
        sentences.append(f"closing a stream took {given_up:.2f} s")
    return sentences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--quick", action="store_true", help="few alternations: a smoke test, numbers are meaningless")
    parser.add_argument("--cifar", type=Path, required=True, metavar="FOLDER", help="CIFAR-10 in the Hub's layout")
    parser.add_argument("--imagenet", type=Path, metavar="FOLDER", help="a subset of ImageNet-1k in the Hub's layout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    alternations = 4 if args.quick else 20
    small = measure(args.cifar, 32, "cifar10", alternations, 4)
    large = measure(args.imagenet, 224, "imagenet1k", alternations, 2) if args.imagenet else None
    first, given_up = first_and_last(args.cifar, 0)
    _, with_workers = first_and_last(args.cifar, 2)
    theirs = plain_gives_up(args.cifar)
    result = {
        "environment": environment(torch.device("cpu")), "at_32": small, "at_224": large,
        "first_batch_s": first, "given_up_s": max(given_up, with_workers), "datasets_given_up_s": theirs,
        "missed": missed(small, large, first, max(given_up, with_workers)),
    }  # fmt: skip
    rows = []
    for size, found in (("32 px", small), ("224 px", large)):
        for name in found["images_per_s"] if found else ():
            ratio = found["times_plain"][name]
            times = f"{ratio['median']:.2f}  [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            rows.append([f"{size}  {name}", f"{found['images_per_s'][name]:,.0f}", times])
    rows.append(["first batch of a stream, s", f"{first:.2f}", ""])
    rows.append(
        ["closing a stream, s (with 2 workers; datasets)", f"{given_up:.2f}", f"{with_workers:.2f}; {theirs:.2f}"]
    )
    return report(args, result, ["images per second, one core", "median", "times datasets + torchvision"], rows)


if __name__ == "__main__":
    sys.exit(main())
