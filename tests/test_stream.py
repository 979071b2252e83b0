"""Data that are decoded as they are read: streams and tables, in workers, dealt to ranks, corrupt images, crops."""

import io
import multiprocessing
import random
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vit_rsst.data import sources
from vit_rsst.data.decoding import Corrupt, Decoder, Sample, Window, auto_augment, decode
from vit_rsst.data.loaders import Clock, Dealing, DecodingLoader, InMemoryLoader, evaluation_batches, steps_per_epoch
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
from vit_rsst.data.streams import in_turns, mixed, share_of
from vit_rsst.data.transforms import Augmentation
from vit_rsst.errors import InputError
from vit_rsst.progress import Progress

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
    return [[n for images, _ in batches for n in numbers(images)] for batches in of.steps(progress)]


# -- the order of a stream


def test_a_buffer_mixes_and_keeps_every_row():
    rows = list(mixed(iter(range(1000)), 50, random.Random(0)))
    assert sorted(rows) == list(range(1000))
    assert rows != list(range(1000))
    assert max(row - place for place, row in enumerate(rows)) <= 50, "no row comes before it was read"


@pytest.mark.parametrize("size", [1, 7, 1000, 5000])
def test_a_buffer_of_any_size_keeps_every_row(size):
    assert sorted(mixed(iter(range(1000)), size, random.Random(0))) == list(range(1000))


def test_shards_are_read_in_turns_until_the_last_has_ended():
    rows = list(in_turns((iter([(s, i) for i in range(n)]) for s, n in enumerate((3, 1, 2, 4, 0, 2))), 2))
    assert Counter(s for s, _ in rows) == Counter({0: 3, 1: 1, 2: 2, 3: 4, 5: 2})
    for shard in range(6):
        assert [i for s, i in rows if s == shard] == list(range(sum(s == shard for s, _ in rows)))


def test_the_order_follows_from_the_seed_and_the_buffer_alone(folder):
    stream = open_data(options(folder), 0).rows["train"]
    first, again, other = ([s.place for s in stream.walk(seed)] for seed in (1, 1, 2))
    assert first == again
    assert sorted(first) == sorted(other)
    assert first != other


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
    for [(images, labels)], [(others, their)] in zip(memory.steps(progress), read.steps(progress), strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, their)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_sees_every_image_exactly_once(folder, world, workers):
    data = open_data(options(folder), 0)
    seen = []
    for rank in range(world):
        batches = evaluation_batches(
            data.rows["test"], 3, rank, world, CPU, MEAN, STD, data.decoder("test"), workers=workers
        )
        for images, labels in batches:
            seen += numbers(images)
            assert [n % 2 for n in numbers(images)] == labels.tolist()
    assert sorted(seen) == list(range(11))


def test_a_stream_that_is_given_up_leaves_no_worker_behind(folder):
    of = loader(open_data(options(folder), 0), 0, 1, workers=2)
    steps = of.steps(Progress(6, (1,)))
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert not multiprocessing.active_children()


def test_a_stream_that_ends_before_its_steps_says_how_many_there_are(folder):
    of = loader(open_data(options(folder), 0), 0, 1)
    with pytest.raises(InputError, match=r"train.steps_per_epoch: the training images end within step \d+ .* at most"):
        list(of.steps(Progress(1000, (1,))))


def test_calibration_images_of_a_stream_are_balanced(folder):
    data = open_data(options(folder), 0)
    split = data.balanced("train", 10, 0)
    assert Counter(split.labels.tolist()) == {0: 5, 1: 5}
    assert data.balanced("train", 10_000, 0).images.shape[0] == data.count("train")


# -- tars and class folders


def write_tar(path: Path, first: int, size: int) -> None:
    with tarfile.open(path, "w") as tar:
        for n in range(first, first + size):
            for suffix, content in (("png", png(numbered(n))), ("cls", str(n % 2).encode())):
                info = tarfile.TarInfo(f"{n:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_tars_are_streamed_with_plain_labels(tmp_path):
    write_tar(tmp_path / "train-0.tar", 0, 20)
    write_tar(tmp_path / "train-1.tar", 20, 13)
    write_tar(tmp_path / "test-0.tar", 0, 6)
    with pytest.raises(InputError, match=r"set data\.num_classes"):
        open_data(options(tmp_path), 0)
    data = open_data(options(tmp_path, num_classes=2), 0)
    assert data.count("train") is None
    with pytest.raises(InputError, match=r"train\.steps_per_epoch"):
        steps_per_epoch(data.count("train"), 8, None)
    of = loader(data, 0, 1)
    seen = [n for [(images, _)] in of.steps(Progress(3, (1,))) for n in numbers(images)]
    assert len(set(seen)) == 24
    with pytest.raises(InputError, match=r"label 1 in train-0\.tar:1 is not among the 1 classes"):
        list(open_data(options(tmp_path, num_classes=1), 0).rows["train"].walk(None))


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
    write_shards(tmp_path, [40], corrupt=(3, 19))
    write_shards(tmp_path, [4], "test")
    data = open_data(options(tmp_path, max_corrupt=0.1), 0)
    of = loader(data, 0, 1, max_corrupt=0.1)
    seen = flat(epoch(of))
    metrics, warnings = of.report()
    left_out = int(metrics["data/corrupt"])
    assert 1 <= left_out <= 2
    assert not {3, 19} & set(seen)
    assert f"{left_out} corrupt images were left out" in warnings[0]
    assert of.report()[0]["data/corrupt"] == 0.0
    strict = loader(data, 0, 1, max_corrupt=0.01)
    with pytest.raises(InputError, match=r"data\.max_corrupt"):
        epoch(strict)


def test_a_batch_of_corrupt_images_alone_stops_the_run(tmp_path):
    write_shards(tmp_path, [40], corrupt=tuple(range(40)))
    write_shards(tmp_path, [4], "test")
    with pytest.raises(InputError, match="all images of its batch"):
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
        arguments = (data.rows["test"], 4, 0, 1, CPU, MEAN, STD, data.decoder("test"))
        return [n for images, _ in evaluation_batches(*arguments, max_corrupt=share) for n in numbers(images)]

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
    decoder = Decoder(16, window=Window(), auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)
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
        found = decode({"bytes": png(noise), "path": None}, 16, "x", window=Window()).astype(int)
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
    window = Window((1.0, 1.0), (1.0, 1.0))
    found = decode(encoded, 64, "x", window=window).astype(int)
    expected = decode(encoded, 64, "x").astype(int)
    assert np.abs(found - expected).max() <= 6


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
@pytest.mark.parametrize("window", [None, Window((1.0, 1.0), (1.0, 1.0))])
def test_an_image_stands_upright_as_its_camera_marked_it(orientation, corner, window):
    array = np.zeros((16, 16, 3), np.uint8)
    array[:6, :6] = 255
    buffer, picture = io.BytesIO(), Image.fromarray(array)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(buffer, "JPEG", quality=95, exif=exif)
    found = decode({"bytes": buffer.getvalue(), "path": None}, 16, "x", window=window).transpose(1, 2, 0)
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
