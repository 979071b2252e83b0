"""Streaming: data read per rank, time in the training thread, worker throughput, resume time, shuffle quality.

Images come from a folder (`--imagenet`) or are synthetic. Reads are counted for 1 to 16 ranks in turn, in one process.
Worker throughput alternates with decoding the same encoded images alone; the time of the training thread is its CPU
time between two batches, without augmentation.

    python scripts/benchmarks/streaming.py --imagenet FOLDER
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _common import alternate, environment, interval, report, show_progress
from PIL import Image

from vit_rsst.data.dealing import Dealing
from vit_rsst.data.decoding import Decoder
from vit_rsst.data.feeds import Course, Tracks
from vit_rsst.data.lanes import cut
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.data.streams import Stream
from vit_rsst.data.workers import Here, Pool

READ = 1.05  # times a rank's share, plus a window of each of its lanes
TRAINING_THREAD_US = 3.0  # an image
WORKER = 0.95  # times the rate of decoding alone
RESUME_SECONDS = 2.0
ENTROPY = 0.97  # times that of a full shuffle
NEIGHBOURS = 20.0  # of 50,000 that two epochs share, on average; by chance 2, ± 1.4 from pair to pair

RANKS = (1, 2, 4, 8, 16)
GLOBAL_BATCH = 256
SIZE = 224


def write(folder: Path, images: list[bytes], rows: int, group: int, shards: int = 8) -> Path:
    """Writes parquet shards with the given number of rows and row group size."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split, number in (("train", rows), ("test", 200)):
        for shard, part in enumerate(np.array_split(np.arange(number), shards if split == "train" else 1)):
            content = {
                "image": [{"bytes": images[i % len(images)], "path": None} for i in part],
                "label": [int(i) % 10 for i in part],
            }
            table = pa.Table.from_pydict(content, features.arrow_schema)
            pq.write_table(table, folder / f"{split}-{shard:05d}.parquet", row_group_size=group)
    return folder


def encoded(folder: Path | None, number: int) -> list[bytes]:
    """Encoded images: from a folder in the Hub's layout, or smooth noise of 320 px."""
    if folder is not None:
        files = sorted(folder.rglob("train-*.parquet"))
        rows = (row for file in files for row in pq.read_table(file, columns=["image"])["image"].to_pylist())
        return [row["bytes"] for row in islice(rows, number)]
    generator, found = np.random.default_rng(0), []
    for _ in range(number):
        noise = Image.fromarray(generator.integers(0, 256, (80, 80, 3), dtype=np.uint8)).resize((320, 320))
        buffer = io.BytesIO()
        noise.save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def opened(folder: Path, size: int = SIZE) -> tuple[Stream, Decoder]:
    data = open_data(DataOptions("folder", str(folder), image_size=size, val_fraction=0.01, streaming=True), 0)
    return data.rows["train"], data.decoder("train")


def course(stream: Stream, rank: int = 0, world: int = 1, start: int = 0, epoch: int = 0) -> Course:
    dealing = Dealing.of(GLOBAL_BATCH, None, world)
    steps = stream.count // GLOBAL_BATCH
    return Course(dealing, rank, 0, epoch, epoch * steps, start, steps, lanes=stream.cut(GLOBAL_BATCH))


def reading(stream: Stream, of: Course) -> tuple[int, int]:
    """Rows and bytes that a rank reads in the rest of an epoch."""
    tracks = Tracks(of, stream, 0, 1)
    for number, step, part in of.numbered():
        for position in range(part.start, part.stop):
            tracks.sample(number, step, position)
    tracks.close()
    return tracks.ahead.reader.rows_read, tracks.ahead.reader.bytes_read


def shares(stream: Stream) -> dict[int, dict]:
    """For each number of ranks: the maximum rows and bytes read by a rank, and the bound on rows."""
    lanes, found = stream.cut(GLOBAL_BATCH), {}
    window = lanes.tracks * lanes.largest_window
    for world in RANKS:
        read = [reading(stream, course(stream, rank, world)) for rank in range(world)]
        bound = READ * stream.count / world + window * lanes.lanes / world
        found[world] = {"rows": max(r for r, _ in read), "bytes": max(b for _, b in read), "bound_rows": bound}
        found[world] |= {"share_rows": stream.count / world}
        show_progress(f"{world} ranks")
    return found


def training_thread(stream: Stream, decoder: Decoder, workers: int, batches: int) -> float:
    """Microseconds of the training thread per image, with workers."""
    pool = Pool(stream, decoder, workers, GLOBAL_BATCH)
    running = pool.run(course(stream))
    list(islice(running, 2))
    began, images = time.thread_time(), 0
    for batch in islice(running, batches):
        images += len(batch.labels)
    took = time.thread_time() - began
    running.close()
    return 1e6 * took / images


def endless(pool: Pool | Here, stream: Stream) -> Iterator:
    epoch = 0
    while True:
        yield from pool.run(course(stream, epoch=epoch))
        epoch += 1


def worker_rate(stream: Stream, decoder: Decoder, alternations: int) -> tuple[dict[str, float], object]:
    """Images per second: reading and decoding like a worker, against decoding alone."""
    batches = endless(Here(stream, decoder), stream)
    samples = list(islice(stream.walk(0), GLOBAL_BATCH))
    takes = {"worker": lambda: next(batches), "decoding": lambda: decoder.__getitems__(samples)}
    seconds = alternate(takes, alternations, 1, torch.device("cpu"))
    rates = {name: GLOBAL_BATCH / float(np.median(values)) for name, values in seconds.items()}
    return rates, interval(seconds["decoding"] / seconds["worker"])


def resuming(folder: Path) -> tuple[float, int, int, int]:
    """Seconds to the first batch at 90 % of an epoch, rows read before it, the bound, and all rows."""
    began = time.perf_counter()
    stream, decoder = opened(folder)
    lanes = stream.cut(GLOBAL_BATCH)
    of = course(stream, start=int(0.9 * (stream.count // GLOBAL_BATCH)))
    running = Here(stream, decoder).run(of)
    next(running)
    took = time.perf_counter() - began
    running.close()
    tracks = Tracks(of, stream, 0, 1)
    for position in range(GLOBAL_BATCH):
        tracks.sample(0, of.start, position)
    tracks.close()
    read = tracks.ahead.reader.rows_read
    window = lanes.largest_window + max(
        block.rows for block in stream.blocks
    )  # it is read to the end of its last block
    return took, read, lanes.lanes * lanes.tracks * window, stream.count


def entropy(batches: np.ndarray, labels: np.ndarray) -> float:
    counts = np.stack([np.bincount(labels[batch], minlength=10) for batch in batches]) / batches.shape[1]
    return float(-(counts * np.log(np.where(counts > 0, counts, 1.0))).sum(1).mean())


def neighbours(first: np.ndarray, second: np.ndarray) -> int:
    pairs = [{tuple(sorted(pair)) for pair in zip(o.ravel(), o.ravel()[1:], strict=False)} for o in (first, second)]
    return len(pairs[0] & pairs[1])


def shuffling(epochs: int) -> dict[str, dict[str, float]]:
    """Class entropy and shared neighbours for 50,000 rows sorted by 10 classes, like a sorted CIFAR-10."""
    of_one_class = [len(p) for c in range(10) for p in np.array_split(np.arange(5000), 7 if c < 4 else 6)]
    labels = np.repeat(np.arange(10), 5000)
    steps = 50_000 // GLOBAL_BATCH
    full = [np.random.default_rng(seed).permutation(50_000)[: steps * GLOBAL_BATCH] for seed in range(epochs)]
    base, found = entropy(full[0].reshape(steps, -1), labels), {}
    for name, shards in (("8 sorted shards", [6250] * 8), ("64 shards of one class", of_one_class)):
        for group in (100, 6250):
            counts = [min(group, shard - row) for shard in shards for row in range(0, shard, group)]
            orders = [
                cut(np.asarray(counts), 10**5, GLOBAL_BATCH, 4096).order(seed, GLOBAL_BATCH) for seed in range(epochs)
            ]
            pairs = [neighbours(a, b) for i, a in enumerate(orders) for b in orders[:i]]
            found[f"{name}, row groups of {group}"] = {
                "entropy_ratio": min(entropy(o, labels) for o in orders) / base,
                "shared_neighbours": float(np.mean(pairs)),
            }
    chance = [neighbours(a, b) for i, a in enumerate(full) for b in full[:i]]
    return found | {"a full shuffle": {"entropy_ratio": 1.0, "shared_neighbours": float(np.mean(chance))}}


def missed(result: dict) -> list[str]:
    sentences = [
        f"with {world} ranks one reads {found['rows']:,} rows, more than {found['bound_rows']:,.0f}"
        for world, found in result["reading"].items()
        if found["rows"] > found["bound_rows"]
    ]
    if result["training_thread_us"] > TRAINING_THREAD_US:
        sentences.append(f"the training thread takes {result['training_thread_us']:.1f} µs per image")
    if result["worker_ratio"]["high"] < WORKER:
        sentences.append(f"a worker reaches {result['worker_ratio']['median']:.3f} of the rate of decoding alone")
    if result["resume"]["seconds"] > RESUME_SECONDS:
        sentences.append(f"the first batch after a resume took {result['resume']['seconds']:.1f} s")
    if result["resume"]["rows"] > result["resume"]["bound_rows"]:
        sentences.append("a resume reads more than one window per track")
    for name, found in result["shuffling"].items():
        if found["entropy_ratio"] < ENTROPY or found["shared_neighbours"] > NEIGHBOURS:
            sentences.append(
                f"{name}: entropy {found['entropy_ratio']:.3f}, {found['shared_neighbours']:.0f} neighbours"
            )
    return sentences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--quick", action="store_true", help="smaller sizes: a smoke test, numbers are meaningless")
    parser.add_argument("--imagenet", type=Path, metavar="FOLDER", help="a subset of ImageNet-1k in the Hub's layout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    images = encoded(args.imagenet, 200 if args.quick else 1000)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        small.mkdir()
        large.mkdir()
        counted, _ = opened(write(small, [image[:500] for image in images], 128_000 if args.quick else 512_000, 25))
        stream, decoder = opened(write(large, images, 2000 if args.quick else 8000, 25))
        took, read, bound, rows = resuming(large)
        rates, ratio = worker_rate(stream, decoder, 3 if args.quick else 12)
        result = {
            "environment": environment(torch.device("cpu")),
            "reading": shares(counted),
            "training_thread_us": training_thread(stream, decoder, 2, 3 if args.quick else 20),
            "images_per_s": rates,
            "worker_ratio": vars(ratio),
            "resume": {"seconds": took, "rows": read, "bound_rows": bound, "rows_of_the_epoch": rows},
            "shuffling": shuffling(3 if args.quick else 8),
        }
    result["missed"] = missed(result)
    table = [
        [f"rows read per rank, {world} ranks", f"{found['rows']:,}", f"≤ {found['bound_rows']:,.0f}"]
        for world, found in result["reading"].items()
    ]
    table += [
        ["training thread, µs per image", f"{result['training_thread_us']:.2f}", f"≤ {TRAINING_THREAD_US}"],
        ["a worker, times decoding alone", str(ratio), f"≥ {WORKER}"],
        ["first batch at 90 % of an epoch, s", f"{took:.2f}", f"≤ {RESUME_SECONDS}"],
        ["rows read before it", f"{read:,} of {rows:,}", f"≤ {bound:,}"],
    ]
    for name, found in result["shuffling"].items():
        table.append([f"entropy, {name}", f"{found['entropy_ratio']:.3f}", f"≥ {ENTROPY}"])
        table.append([f"neighbours shared, {name}", f"{found['shared_neighbours']:.1f}", f"≤ {NEIGHBOURS}"])
    return report(args, result, ["", "measured", "bound"], table)


if __name__ == "__main__":
    sys.exit(main())
