"""Data that are decoded as they are read: streams and tables, in workers, dealt to ranks, corrupt images, crops."""

import http.server
import io
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile

from vit_rsst.data import blocks, sources
from vit_rsst.data.dealing import Dealing, dealt, steps_per_epoch
from vit_rsst.data.decoding import Corrupt, Decoder, RandomCrop, Sample, auto_augment, decode
from vit_rsst.data.feeds import Course, Scan, Tracks
from vit_rsst.data.images import ImageData
from vit_rsst.data.loaders import Clock, DecodingLoader, InMemoryLoader, evaluation_batches
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.data.streams import share_of
from vit_rsst.data.transforms import Augmentation, Erasing
from vit_rsst.errors import InputError, MissingRequirement
from vit_rsst.progress import Progress
from vit_rsst.run.resume import check_same_run

CPU = torch.device("cpu")
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def numbered(number: int) -> Image.Image:
    """An image of 8 px that says its number in base 200, losslessly."""
    return Image.new("RGB", (8, 8), (number % 200, number // 200, 7))


def png(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def write_shards(folder: Path, sizes: list[int], split: str = "train", corrupt: tuple[int, ...] = ()) -> Path:
    """Parquet shards of images that are numbered through."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    numbers = iter(range(sum(sizes)))
    for i, size in enumerate(sizes):
        rows = [next(numbers) for _ in range(size)]
        images = [{"bytes": b"no image" if n in corrupt else png(numbered(n)), "path": None} for n in rows]
        content = {"img": images, "label": [n % 2 for n in rows]}
        path = folder / f"{split}-{i:05d}-of-{len(sizes):05d}.parquet"
        datasets.Dataset.from_dict(content, features=features).to_parquet(path)
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    write_shards(tmp_path / "set", [17, 5, 23, 15])
    return write_shards(tmp_path / "set", [11], "test")


def options(folder: Path, **more: object) -> DataOptions:
    return DataOptions("folder", str(folder), **{"image_size": 8, "val_fraction": 0.1, "streaming": True, **more})


def numbers(images: torch.Tensor) -> list[int]:
    """The numbers of a batch of images, (batch, 3, 8, 8) in 0 … 1."""
    values = (images * 255).round().int()
    return (values[:, 0, 4, 4] + 200 * values[:, 1, 4, 4]).tolist()


def loader(data: object, rank: int, world: int, workers: int = 0, batch: int = 8, **more: object) -> DecodingLoader:
    dealing = Dealing.of(batch, batch // world // more.pop("accumulation", 1), world)
    more |= {"rows": data.rows["train"], "decoder": data.decoder("train"), "workers": workers}
    return DecodingLoader(dealing, rank, CPU, 0, Augmentation(), MEAN, STD, **more)


def flat(steps: list[list[int]]) -> list[int]:
    return [number for step in steps for number in step]


def epoch(of: DecodingLoader, number: int = 0, step: int = 0) -> list[list[int]]:
    """The numbers of the images of each step."""
    steps = steps_per_epoch(of.rows.count, of.dealing.global_batch, None)
    progress = Progress(steps, (5,), 0, number, step)
    try:
        return [[n for images, _ in batches for n in numbers(images)] for batches in of.steps(progress)]
    finally:
        of.close()


# -- the order of a stream


def test_a_row_is_known_by_its_file_and_number(folder):
    stream = open_data(options(folder), 0).rows["train"]
    places = [sample.place for sample in stream.walk(None)]
    assert places[0].startswith("train-00000-of-00004.parquet:")
    assert len(set(places)) == len(places) == stream.count


def test_walking_on_from_a_place_equals_walking_there(folder):
    stream = open_data(options(folder), 0).rows["train"]
    whole = [sample.place for sample in stream.walk(3)]
    for start in (0, 1, 13, len(whole) - 1, len(whole)):
        assert [sample.place for sample in stream.walk(3, start)] == whole[start:]


def test_held_out_rows_are_read_once_for_the_same_columns_and_again_for_others(tmp_path, monkeypatch):
    names = {"fine": ["a", "b", "c", "d"], "coarse": ["x", "y"]}
    features = datasets.Features(
        {"img": datasets.Image(), **{k: datasets.ClassLabel(names=v) for k, v in names.items()}}
    )
    labels = {"fine": [n % 4 for n in range(40)], "coarse": [n % 2 for n in range(40)]}
    for split in ("train", "test"):
        content = {"img": [numbered(n) for n in range(40)], **labels}
        datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / f"{split}.parquet")

    def held(column: str) -> list[int]:
        return open_data(options(tmp_path, label_column=column, val_fraction=0.5), 0).val.labels.tolist()

    fine, coarse = held("fine"), held("coarse")
    assert set(fine) == {0, 1, 2, 3}
    assert coarse == [label % 2 for label in fine]
    monkeypatch.setattr(sources, "_as_rows", lambda stream: pytest.fail("it was read again"))
    assert held("coarse") == coarse


# -- who sees what


@pytest.mark.fault("F17")
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [3, 4, 5, 8])
def test_ranks_and_workers_share_an_epoch_without_loss_or_repetition(tmp_path, shards, workers, streaming):
    (tmp_path / "set").mkdir()
    write_shards(tmp_path / "set", [3 + 5 * i for i in range(shards)])
    write_shards(tmp_path / "set", [4], "test")
    data = open_data(options(tmp_path / "set", streaming=streaming), 0)
    alone = epoch(loader(data, 0, 1, 0))
    steps = data.count("train") // 8
    assert len(alone) == steps
    seen = flat(alone)
    assert len(set(seen)) == len(seen) == steps * 8, "less the tail, nothing twice"
    ranks = [epoch(loader(data, rank, 2, workers)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [steps, steps]
    for step in range(steps):
        assert ranks[0][step] + ranks[1][step] == alone[step]


def test_accumulation_sees_what_one_batch_sees(folder):
    data = open_data(options(folder), 0)
    assert [sorted(s) for s in epoch(loader(data, 0, 1, accumulation=4))] == [
        sorted(s) for s in epoch(loader(data, 0, 1))
    ]


def test_another_epoch_has_another_order_of_the_same_images(folder):
    data = open_data(options(folder), 0)
    first, second = (flat(epoch(loader(data, 0, 1), number)) for number in (0, 1))
    assert first != second
    assert len(set(first) | set(second)) <= 60


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [True, False])
def test_the_next_image_after_a_resume_is_the_next_image(folder, workers, streaming):
    data = open_data(options(folder, streaming=streaming), 0)
    whole = epoch(loader(data, 0, 1), 1)
    for step in (1, 3, len(whole) - 1):
        assert epoch(loader(data, 0, 1, workers), 1, step) == whole[step:]


def test_the_parts_of_a_stream_are_disjoint_and_follow_from_the_ids(folder):
    streamed = open_data(options(folder, test_fraction=0.3), 0)
    kept = {sample.place for sample in streamed.rows["train"].walk(None)}
    assert streamed.count("train") + streamed.count("val") + streamed.count("test") == 60
    assert len(kept) == streamed.count("train")
    low = 0.3 + 0.1 * 0.7
    assert all(share_of(place) >= low for place in kept)


def test_decoded_as_read_equals_decoded_in_memory(folder):
    data = open_data(options(folder, streaming=False), 0)
    common = (Dealing.of(8, None, 1), 0, CPU, 0, Augmentation(2, 0.5), MEAN, STD)
    memory = InMemoryLoader(*common, split=data.train)
    read = DecodingLoader(*common, rows=data.rows["train"], decoder=data.decoder("train"))
    progress = Progress(data.count("train") // 8, (2,), 0, 1, 2)
    steps = zip(memory.steps(progress), read.steps(progress), strict=True)
    for [(images, labels)], [(others, their)] in steps:
        assert torch.equal(images, others)
        assert torch.equal(labels, their)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_sees_every_image_exactly_once(folder, world, workers):
    data = open_data(options(folder), 0)
    seen = []
    for rank in range(world):
        batches = evaluation_batches(
            data.rows["test"],
            3,
            rank=rank,
            num_processes=world,
            device=CPU,
            mean=MEAN,
            std=STD,
            decoder=data.decoder("test"),
            workers=workers,
        )
        for images, labels in batches:
            seen += numbers(images)
            assert [n % 2 for n in numbers(images)] == labels.tolist()
    assert sorted(seen) == list(range(11))


def test_a_stream_that_is_given_up_leaves_no_worker_behind(folder):
    of = loader(open_data(options(folder), 0), 0, 1, workers=2)
    steps = of.steps(Progress(5, (1,)))
    assert len(next(steps)[0][1]) == 8
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert not multiprocessing.active_children()


def test_a_stream_that_ends_before_its_steps_says_how_many_there_are(folder):
    of = loader(open_data(options(folder), 0), 0, 1)
    with pytest.raises(InputError, match=r"train.steps_per_epoch: 1,000 steps take 8,000 images, .* at most"):
        list(of.steps(Progress(1000, (1,))))


def test_calibration_images_of_a_stream_are_balanced(folder):
    data = open_data(options(folder), 0)
    split = data.balanced("train", 10, 0)
    assert Counter(split.labels.tolist()) == {0: 5, 1: 5}
    assert data.balanced("train", 10_000, 0).images.shape[0] == data.count("train")


# -- lanes: who reads what


def course(data: object, rank: int, world: int, accumulation: int = 1, step: int = 0, batch: int = 8) -> Course:
    dealing = Dealing.of(batch, batch // world // accumulation, world)
    stream = data.rows["train"]
    return Course(dealing, rank, 0, 1, 100, step, stream.count // batch, lanes=stream.cut(batch))


def ids(data: object, of: Course, workers: int) -> list[list[tuple[str, int]]]:
    """(id, seed of the crop) of each micro-batch, from the parts of so many workers."""
    found = []
    for parts in zip(*(of.parts(data.rows["train"], w, workers) for w in range(workers)), strict=True):
        placed = [(p, (s.place, s.seed)) for part in parts for p, s in zip(*part, strict=True)]
        assert sorted(p for p, _ in placed) == list(range(of.dealing.batch_per_device)), "each position once"
        found.append([sample for _, sample in sorted(placed)])
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [1, 3, 7])
def test_the_order_is_the_same_for_any_ranks_workers_and_accumulation(folder, world, accumulation, workers):
    data = open_data(options(folder), 0)
    [alone] = [flat(ids(data, course(data, 0, 1), 1))]
    for step in (0, 2, 4):
        ranks = [ids(data, course(data, rank, world, accumulation, step), workers) for rank in range(world)]
        together = [micro for micros in zip(*ranks, strict=True) for micro in micros]
        assert flat(together) == alone[8 * step :]


@pytest.mark.parametrize("world, accumulation", [(3, 1), (3, 4), (6, 2)])
def test_ranks_that_do_not_divide_the_lanes_share_some(folder, world, accumulation):
    data = open_data(options(folder), 0)
    stream = data.rows["train"]
    dealing = Dealing.of(12, 12 // world // accumulation, world)
    cut = stream.cut(12, lanes=4)
    found = [ids(data, Course(dealing, rank, 0, 1, 0, 0, stream.count // 12, lanes=cut), 2) for rank in range(world)]
    whole = ids(data, Course(Dealing.of(12, None, 1), 0, 0, 1, 0, 0, stream.count // 12, lanes=cut), 1)
    assert flat([micro for micros in zip(*found, strict=True) for micro in micros]) == flat(whole)


@pytest.fixture(scope="module")
def many_blocks(tmp_path_factory):
    """6,400 rows in row groups of 10; what they hold is no image."""
    folder = tmp_path_factory.mktemp("many")
    for split, shards in (("train", 4), ("test", 1)):
        for i in range(shards):
            rows = {"img": [{"bytes": b"x" * 1000, "path": None}] * 1600, "label": [n % 2 for n in range(1600)]}
            features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
            table = datasets.Dataset.from_dict(rows, features=features).with_format("arrow")[:]
            pq.write_table(table, folder / f"{split}-{i:05d}-of-{shards:05d}.parquet", row_group_size=10)
    return folder


def rows_read(stream: object, of: Course) -> int:
    tracks = Tracks(of, stream, 0, 1)
    for number, step, part in of.numbered():
        for position in range(part.start, part.stop):
            assert tracks.sample(number, step, position) is not None
    tracks.close()
    return tracks.ahead.reader.rows_read


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_a_rank_reads_its_share_and_a_window_a_lane_at_the_most(many_blocks, world):
    data = open_data(options(many_blocks, val_fraction=0.01), 0)
    cut = data.rows["train"].cut(32)
    window = cut.tracks * cut.largest_window
    for rank in range(world):
        of = course(data, rank, world, batch=32)
        bound = 1.05 * data.count("train") / world + window * cut.lanes / world
        assert rows_read(data.rows["train"], of) <= bound


def test_a_resume_reads_a_window_a_track_before_its_first_batch(many_blocks):
    data = step_by_step(open_data(options(many_blocks, val_fraction=0.01), 0))
    stream, of = data.rows["train"], course(data, 0, 1, step=180, batch=32)
    tracks = Tracks(of, stream, 0, 1)
    [tracks.sample(0, 180, position) for position in range(32)]
    tracks.close()
    cut = of.lanes
    # A window of small blocks ends with a block that the next track may begin with; the reader is some blocks ahead.
    assert tracks.ahead.reader.rows_read <= cut.lanes * cut.tracks * (cut.largest_window + 10)


def test_an_evaluation_is_read_by_its_rank_alone(many_blocks):
    data = open_data(options(many_blocks), 0)
    stream = data.rows["test"]
    for world in (1, 2, 3):
        places = []
        for rank in range(world):
            for parts in zip(
                *(Scan(dealt(1600, 50, rank, world), 50).parts(stream, w, 2) for w in (0, 1)), strict=True
            ):
                batch = {p: s.place for part in parts for p, s in zip(*part, strict=True)}
                places += [batch[i] for i in range(50)]
        assert places == [sample.place for sample in stream.walk(None)]


# -- what happens to files and networks


def step_by_step(data: ImageData) -> ImageData:
    """The same data, whose readers load a window when it is needed, also in workers."""
    return replace(data, rows=data.rows | {"train": replace(data.rows["train"], ahead_bytes=1)})


def first_steps(of: DecodingLoader, between: Callable[[], None]) -> None:
    """Reads a step, lets something happen, reads the rest."""
    steps = of.steps(Progress(of.rows.count // of.dealing.global_batch, (1,)))
    try:
        list(next(steps))
        between()
        for step in steps:
            list(step)
    finally:
        steps.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change, sentence", [
    ("vanishes", "is gone; put the file back"),
    ("shrinks", r"has changed since it was opened \([\d,]+ bytes then, [\d,]+ now\)"),
    ("grows", r"has changed since it was opened \([\d,]+ bytes then, [\d,]+ now\)"),
    ("is damaged", "cannot be read|it was written to"),
])  # fmt: skip
def test_a_shard_that_changes_mid_run_is_said(many_blocks, tmp_path, workers, change, sentence):
    folder = shutil.copytree(many_blocks, tmp_path / "set")
    for path in folder.glob("train-*.parquet"):  # images that can be decoded
        table = pq.read_table(path)
        image = {"bytes": png(numbered(1)), "path": None}
        column = pa.array([image] * len(table), type=table.schema.field("img").type)
        pq.write_table(table.set_column(0, table.schema.field("img"), column), path, row_group_size=10)

    def happen() -> None:
        for path in folder.glob("train-*.parquet"):
            content, stamp = path.read_bytes(), path.stat()
            if change == "vanishes":
                path.unlink()
                continue
            if change == "is damaged":
                with path.open("r+b") as file:
                    file.write(content[:4] + bytes(30_000))
                os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            else:  # at once: a reader may look at any time
                new = path.with_suffix(".new")
                new.write_bytes({"shrinks": content[:-1000], "grows": content + b"more"}[change])
                os.utime(new, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
                new.replace(path)

    of = loader(step_by_step(open_data(options(folder, val_fraction=0.01), 0)), 0, 1, workers, batch=32)
    with pytest.raises(InputError, match=sentence):
        first_steps(of, happen)


@pytest.mark.parametrize("then", [None, {"lanes": 8, "tracks": 2, "window": 1}], ids=["version 0.1", "other lanes"])
def test_a_run_that_stopped_mid_epoch_in_another_order_is_refused_there_alone(then):
    now = {"lanes": 16, "tracks": 2, "window": 1}
    run = SimpleNamespace(folder=SimpleNamespace(path="runs/x"), recipe_fingerprint="f", environment={"order": now})

    def resume(step: int) -> None:
        numbers = {"recipe": "f", "progress": {"step": step}, "environment": {"order": then} if then else {}}
        check_same_run(run, SimpleNamespace(step=30, numbers=numbers), {}, False, False)

    resume(0)
    with pytest.raises(
        InputError, match=r"mid-epoch, at step 30, .*(version 0\.1 read streams|lanes were .*8.* and are .*16)"
    ):
        resume(4)


def test_a_tar_that_is_cut_short_is_said(tmp_path):
    write_tar(tmp_path / "train-0.tar", 0, 20)
    write_tar(tmp_path / "test-0.tar", 0, 6)
    whole = (tmp_path / "train-0.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in (end - 100, (end // 512 + 1) * 512):  # within a member; between two, where tarfile sees nothing
        (tmp_path / "train-0.tar").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"train-0\.tar .*cut short"):
            open_data(options(tmp_path), 0)


def test_the_index_of_a_tar_is_made_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "train-0.tar"
    write_tar(path, 0, 20)
    fields = blocks.Fields("png", "cls")
    assert sum(block.rows for block in blocks.list_blocks([str(path)], None, fields)) == 20
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "_index", lambda *_: pytest.fail("it was read again"))
        assert sum(block.rows for block in blocks.list_blocks([str(path)], None, fields)) == 20
    write_tar(path, 0, 25)
    assert sum(block.rows for block in blocks.list_blocks([str(path)], None, fields)) == 25


def test_a_sample_of_a_tar_without_a_label_is_named(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in ("a.png", "a.cls", "b.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    with pytest.raises(InputError, match=r"sample b of .*train-0\.tar has no \.cls"):
        blocks.list_blocks([str(tmp_path / "train-0.tar")], None, blocks.Fields("png", "cls"))


def test_a_row_group_that_is_too_large_is_refused_with_the_way_out(many_blocks, monkeypatch):
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 1000)
    with pytest.raises(InputError, match=r"row group 0 of .*reads at most .*row_group_size=100"):
        open_data(options(many_blocks), 0)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files; `troubles` are answers that come before: a status, or seconds of silence."""

    troubles: ClassVar[list] = []

    def do_GET(self) -> None:
        content = Path(self.directory, self.path.lstrip("/")).read_bytes()
        begin, end = 0, len(content) - 1
        if found := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(found[1]), min(int(found[2] or end), end)
            if self.troubles:
                trouble = self.troubles.pop(0)
                if trouble > 100:
                    self.send_error(trouble)
                    return
                time.sleep(trouble)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin + 1))
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(content[begin : end + 1])

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(Path(self.directory, self.path.lstrip("/")).stat().st_size))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(blocks, "PAUSES", (0.01,) * 5)
    monkeypatch.setattr(blocks, "STALLED_SECONDS", 0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/train-00002-of-00004.parquet"
        Server.troubles.clear()
        server.shutdown()


@pytest.mark.fault("F28")
@pytest.mark.parametrize("troubles", [[], [503, 503, 503], [1.0], [503, 1.0, 500]], ids=str)
def test_a_server_that_fails_or_stalls_is_asked_again(server, folder, troubles):
    fields = blocks.Fields("img", "label")
    [block] = blocks.list_blocks([server], None, fields)
    [local] = blocks.list_blocks([str(folder / "train-00002-of-00004.parquet")], None, fields)
    Server.troubles[:] = troubles
    assert blocks.Reader(fields).read(block) == blocks.Reader(fields).read(local)
    assert not Server.troubles


@pytest.mark.fault("F28")
def test_a_server_that_stays_away_ends_the_run_with_a_sentence(server):
    fields = blocks.Fields("img", "label")
    [block] = blocks.list_blocks([server], None, fields)
    Server.troubles[:] = [503] * 100
    with pytest.raises(MissingRequirement, match=r"cannot be read over the network, in 6 attempts .*data\.path=FOLDER"):
        blocks.Reader(fields).read(block)


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(folder, monkeypatch):
    monkeypatch.setattr("vit_rsst.data.loaders.AHEAD_IMAGES", 8)
    of = loader(open_data(options(folder), 0), 0, 1, workers=2)

    def kill() -> None:
        multiprocessing.active_children()[0].kill()

    with pytest.raises(MissingRequirement, match=r"data\.workers: worker process \d+ died with exit code -9"):
        first_steps(of, kill)


def test_workers_stay_from_epoch_to_epoch(folder):
    of = loader(open_data(options(folder), 0), 0, 1, workers=2)
    pids = []
    for number in range(3):
        for step in of.steps(Progress(5, (5,), 0, number)):
            list(step)
        pids.append(sorted(process.pid for process in multiprocessing.active_children()))
    of.close()
    assert pids[0] == pids[1] == pids[2]
    assert not multiprocessing.active_children()


def test_decoding_in_this_process_leaves_its_generators_as_they_were(folder):
    of = loader(open_data(options(folder), 0), 0, 1)
    of.decoder = replace(of.decoder, random_crop=RandomCrop())
    of.augmentation = Augmentation(erasing=Erasing(1.0))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    steps = of.steps(Progress(5, (1,)))
    list(next(steps))
    assert torch.equal(torch.rand(3), expected)


# -- tars and class folders


def write_tar(path: Path, first: int, size: int, num_classes: int = 2) -> None:
    with tarfile.open(path, "w") as tar:
        for n in range(first, first + size):
            for suffix, content in (("png", png(numbered(n))), ("cls", str(n % num_classes).encode())):
                info = tarfile.TarInfo(f"{n:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_tars_are_streamed_with_plain_labels(tmp_path):
    write_tar(tmp_path / "train-0.tar", 0, 20)
    write_tar(tmp_path / "train-1.tar", 20, 13)
    write_tar(tmp_path / "test-0.tar", 0, 6)
    data = open_data(options(tmp_path), 0)
    assert data.classes == ("0", "1")
    assert data.count("train") + data.count("val") == 33
    of = loader(data, 0, 1)
    seen = [n for [(images, _)] in of.steps(Progress(3, (1,))) for n in numbers(images)]
    assert len(set(seen)) == 24
    assert len(open_data(options(tmp_path, num_classes=3), 0).classes) == 3
    write_tar(tmp_path / "train-2.tar", 40, 3, num_classes=5)
    with pytest.raises(InputError, match=r"label 2 in train-2\.tar, row 2"):
        open_data(options(tmp_path, num_classes=2), 0)


def test_class_folders_are_opened_file_by_file_in_a_random_order(tmp_path):
    for n in range(20):
        path = tmp_path / "set" / "train" / NAMES[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        numbered(n).save(path)
    data = open_data(options(tmp_path / "set", test_fraction=0.2), 0)
    seen = flat(epoch(loader(data, 0, 1)))
    assert len(set(seen)) == len(seen) == 8
    assert len({n % 2 for n in seen}) == 2, "classes are mixed though they lie in folders"


# -- corrupt images


@pytest.mark.fault("F16")
def test_a_corrupt_image_stops_the_run_with_its_row(tmp_path):
    write_shards(tmp_path, [30, 10], corrupt=(34,))
    write_shards(tmp_path, [4], "test")
    for workers in (0, 2):
        of = loader(
            open_data(options(tmp_path), 0),
            0,
            1,
            workers,
        )
        with pytest.raises(InputError) as caught:
            epoch(of)
        assert "train-00001-of-00002.parquet:4" in str(caught.value)
        assert "data.max_corrupt" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.fault("F16")
def test_corrupt_images_are_left_out_and_counted_up_to_a_share(tmp_path):
    write_shards(tmp_path, [40], corrupt=(3, 11, 19))
    write_shards(tmp_path, [4], "test")
    data = open_data(options(tmp_path, max_corrupt=0.1), 0)
    of = loader(data, 0, 1, max_corrupt=0.1)
    seen = flat(epoch(of))
    metrics, warnings = of.report()
    left_out = int(metrics["data/corrupt"])
    assert 1 <= left_out <= 3
    assert not {3, 11, 19} & set(seen)
    assert f"{left_out} corrupt images were left out" in warnings[0]
    assert of.report()[0]["data/corrupt"] == 0.0
    strict = loader(data, 0, 1, max_corrupt=0.01)
    with pytest.raises(InputError, match=r"data\.max_corrupt"):
        epoch(strict)


def test_a_batch_of_corrupt_images_alone_stops_the_run(tmp_path):
    write_shards(tmp_path, [40], corrupt=tuple(range(40)))
    write_shards(tmp_path, [4], "test")
    with pytest.raises(InputError, match="every other image of its batch"):
        epoch(loader(open_data(options(tmp_path), 0), 0, 1, max_corrupt=0.9))


def test_calibration_leaves_out_corrupt_images_where_training_may(tmp_path):
    write_shards(tmp_path, [40], corrupt=(3, 19))
    write_shards(tmp_path, [4], "test")
    tolerant = open_data(options(tmp_path, max_corrupt=0.2), 0).balanced("train", 1000, 0)
    found = numbers(tolerant.images.float() / 255)
    assert not {3, 19} & set(found)
    assert [n % 2 for n in found] == tolerant.labels.tolist()
    with pytest.raises(Corrupt):
        open_data(options(tmp_path), 0).balanced("train", 1000, 0)


def test_an_evaluation_counts_corrupt_images_too(tmp_path):
    write_shards(tmp_path, [40])
    write_shards(tmp_path, [10], "test", corrupt=(4,))
    data = open_data(options(tmp_path), 0)

    def batches(share: float) -> list:
        found = evaluation_batches(
            data.rows["test"],
            4,
            rank=0,
            num_processes=1,
            device=CPU,
            mean=MEAN,
            std=STD,
            decoder=data.decoder("test"),
            max_corrupt=share,
        )
        return [n for images, _ in found for n in numbers(images)]

    assert sorted(batches(0.2)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet:4"):
        batches(0.0)
    with pytest.raises(InputError, match="1 of 10 are"):
        batches(0.05)


@pytest.mark.fault("F22")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_refused_from_its_header_alone(monkeypatch):
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 20_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(Corrupt, match=r"10,000 × 10,000 px are more than data.max_pixels=89,478,485"):
        decode({"bytes": bomb.getvalue(), "path": None}, 8, "row 1")
    with pytest.raises(Corrupt, match=r"data\.max_pixels=64"):
        decode({"bytes": png(Image.new("RGB", (9, 9))), "path": None}, 8, "row 1", max_pixels=64)


# -- random parts and augmentation


def test_a_random_part_is_drawn_by_the_samples_seed_alone():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    decoder = Decoder(16, random_crop=RandomCrop(), auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)
    sample = Sample("x", {"bytes": png(noise), "path": None}, 0, seed=5)
    first, again = decoder.picture(sample), decoder.picture(sample)
    assert (first == again).all()
    assert first.shape == (3, 16, 16)
    assert (decoder.picture(sample._replace(seed=6)) != first).any()


def test_a_random_part_equals_torchvisions_crop():
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    theirs, largest = RandomResizedCrop(16, interpolation=InterpolationMode.BICUBIC), []
    for seed in range(20):
        torch.manual_seed(seed)
        expected = np.asarray(theirs(noise)).astype(int)
        torch.manual_seed(seed)
        found = decode({"bytes": png(noise), "path": None}, 16, "x", random_crop=RandomCrop()).astype(int)
        largest.append(np.abs(found - expected.transpose(2, 0, 1)).max())
    # Between its two passes torch clips what Pillow does, now and then in another order; on noise that is most.
    assert sorted(largest)[-2] <= 1
    assert max(largest) < 16


@pytest.mark.parametrize("crop_pct, interpolation", [(1.0, "bicubic"), (0.875, "bicubic"), (0.9, "bilinear")])
@pytest.mark.parametrize("width, height", [(90, 61), (61, 90), (64, 64), (37, 30)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_the_middle_of_an_image_is_that_of_timms_evaluation(crop_pct, interpolation, width, height, crop_mode):
    from timm.data import create_transform

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    shown = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    theirs = create_transform(32, False, normalize=False, **shown)
    found = decode({"bytes": png(noise), "path": None}, 32, "x", **shown)
    assert (found == theirs(noise).numpy()).all()


def test_a_large_photograph_is_decoded_at_a_fraction_of_its_size_when_enough_is_left():
    x = np.linspace(0, 255, 1024)
    smooth = Image.fromarray(np.stack([np.add.outer(x, x) / 2] * 3, -1).astype(np.uint8))
    encoded = {"bytes": png(smooth, "JPEG"), "path": None}
    random_crop = RandomCrop((1.0, 1.0), (1.0, 1.0))
    found = decode(encoded, 64, "x", random_crop=random_crop).astype(int)
    expected = decode(encoded, 64, "x").astype(int)
    assert np.abs(found - expected).max() <= 6


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
@pytest.mark.parametrize("random_crop", [None, RandomCrop((1.0, 1.0), (1.0, 1.0))])
def test_an_image_stands_upright_as_its_camera_marked_it(orientation, corner, random_crop):
    array = np.zeros((16, 16, 3), np.uint8)
    array[:6, :6] = 255
    buffer, picture = io.BytesIO(), Image.fromarray(array)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(buffer, "JPEG", quality=95, exif=exif)
    found = decode({"bytes": buffer.getvalue(), "path": None}, 16, "x", random_crop=random_crop).transpose(1, 2, 0)
    bright = found[corner[0] * 2, corner[1] * 2] if corner[0] < 0 or corner[1] < 0 else found[1, 1]
    assert bright.min() > 200
    assert (found.mean(2) > 128).sum() == pytest.approx(36, abs=8)


@pytest.mark.parametrize("config", ["rand-m9-mstd0.5-inc1", "original", "v0", "3a", "augmix-m3-w3"])
def test_timms_augmentations_are_known_by_their_names(config):
    picture = auto_augment(config, 32, (0.5, 0.5, 0.5))(Image.new("RGB", (32, 32), (10, 200, 30)))
    assert picture.size == (32, 32)


@pytest.mark.parametrize("config", ["randaugment", "nothing-m9", ""])
def test_an_unknown_augmentation_is_one_sentence(config):
    with pytest.raises(InputError, match=r"data\.augment\.auto_augment: timm has no"):
        auto_augment(config, 32, (0.5, 0.5, 0.5))


# -- a loader that is too slow


def test_waiting_for_images_is_told_with_the_workers_that_would_end_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vit_rsst.data.loaders.time.monotonic", lambda: now[0])
    clock = Clock()
    for _ in range(11):  # 3 seconds of waiting, 1 of work
        with clock:
            now[0] += 3.0
        now[0] += 1.0
    assert clock.waited_share == pytest.approx(0.75)
    assert "75% of the time" in clock.advice(2)
    assert "about 8 would keep up" in clock.advice(2)
    idle = Clock()
    for _ in range(11):
        with idle:
            now[0] += 0.01
        now[0] += 1.0
    assert idle.advice(0) == ""
